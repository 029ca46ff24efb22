//! One packed segment of one expert. It never changes once packed.

use std::ops::Range;

use tramontane_compute::ExpertWeights;
use tramontane_compute::quant::BLOCK;

use crate::context::Context;
use crate::pack::{PAIR_ROWS, PackedMatrix};
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
    /// Packs the `columns` of an expert; the tensors have been checked.
    pub(crate) fn pack(
        context: &Context,
        weights: &ExpertWeights<'_>,
        columns: Range<usize>,
    ) -> Self {
        let hidden = context.geometry.hidden;
        let len = columns.len();
        // Whole blocks of columns, because an item activates and rounds a block at a time.
        let gate_up_rows = 2 * len.next_multiple_of(BLOCK);
        let pack = |shape, read: &mut dyn FnMut(usize, &mut [f32])| {
            PackedMatrix::pack(context.dispatch, context.format, shape, read)
        };
        let gate_up = pack((gate_up_rows, hidden), &mut |row, out| {
            let column = row / PAIR_ROWS * LANES + row % LANES;
            if column >= len {
                out.fill(0.0);
                return;
            }
            let is_gate = row % PAIR_ROWS < LANES;
            let tensor = if is_gate { &weights.w1 } else { &weights.w3 };
            tensor.read_row(columns.start + column, 0, out);
        });
        let down = pack((hidden, len), &mut |row, out| {
            weights.w2.read_row(row, columns.start, out);
        });
        Self { gate_up, down }
    }
}
