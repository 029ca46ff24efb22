//! One packed segment of one expert. It never changes once packed.

use std::ops::Range;

use tramontane_compute::quant::BLOCK;
use tramontane_compute::{Error, ExpertWeights};
use tramontane_types::slice;

use crate::context::{Context, Part};
use crate::kernels::pack::RowSource;
use crate::pack::{PAIR_ROWS, PackedMatrix, Packing, packed_bytes};
use crate::simd::LANES;

/// The part of an expert's matrices that belongs to some `ff` columns.
#[derive(Debug)]
pub(crate) struct Segment {
    /// `w1` and `w3`: pair `p` holds their rows `16 p..16 p + 16`, `w1` in panel a and `w3` in panel b.
    pub(crate) gate_up: PackedMatrix,
    /// `w2`: `[hidden, columns]`.
    pub(crate) down: PackedMatrix,
}

impl Segment {
    /// Bytes that the segment with the most columns takes, when the checkpoint is not quantised itself.
    pub(crate) fn bytes_max(context: &Context) -> usize {
        let hidden = context.geometry.hidden;
        let len = slice::segment_len(context.geometry.ff);
        let format = context.matrix_format(Part::Expert, &[]);
        packed_bytes(format, 2 * len, hidden) + packed_bytes(format, hidden, len)
    }

    /// Packs the `columns` of an expert; the tensors have been checked.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub(crate) fn pack(
        context: &Context,
        weights: &ExpertWeights<'_>,
        columns: Range<usize>,
    ) -> Result<Self, Error> {
        let hidden = context.geometry.hidden;
        let len = columns.len();
        let gate_up_row = |row| {
            let column = row / PAIR_ROWS * LANES + row % LANES;
            let is_gate = row % PAIR_ROWS < LANES;
            (column < len).then_some(RowSource {
                tensor: if is_gate { weights.w1 } else { weights.w3 },
                row: columns.start + column,
                col: 0,
            })
        };
        let down_row = |row| {
            Some(RowSource {
                tensor: weights.w2,
                row,
                col: columns.start,
            })
        };
        let gate_up = Packing {
            dispatch: context.dispatch,
            format: context.matrix_format(Part::Expert, &[weights.w1, weights.w3]),
            // Whole blocks of columns, because an item activates and rounds a block at a time.
            rows: 2 * len.next_multiple_of(BLOCK),
            cols: hidden,
            source: &gate_up_row,
        };
        let down = Packing {
            format: context.matrix_format(Part::Expert, &[weights.w2]),
            rows: hidden,
            cols: len,
            source: &down_row,
            ..gate_up
        };
        Ok(Self {
            gate_up: gate_up.run(&context.weights)?,
            down: down.run(&context.weights)?,
        })
    }
}
