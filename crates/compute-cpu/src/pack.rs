//! Weight matrices in the kernels' layout, packed once at load. Multiplies nothing.
//!
//! A *panel* is 16 output rows; two panels are a *pair*, the unit that a tile computes. Along k a pair
//! is a sequence of blocks of 32 columns; a block is whole cache lines, so a pair is read as one
//! ascending stream:
//!
//! * bf16: 16 lines of panel a, 16 of panel b; a line holds 2 of k for each of 16 rows;
//! * q8: 8 lines of panel a, 8 of panel b (4 of k for each of 16 rows, stored as `w + 128`), then one
//!   line with the 32 scales (f16);
//! * q4: 4 lines of panel a, 4 of panel b (low nibbles: the 4 of k of line `i` of q8, high nibbles: those
//!   of line `i + 4`), then one line of scales.
//!
//! Rows are padded to whole pairs and columns to whole blocks with zeros.

use half::{bf16, f16};
use tramontane_compute::quant::BLOCK;
use tramontane_compute::{Error, WeightFormat};

use crate::isa::Dispatch;
use crate::kernels::quantise::{QuantiseWeights, WeightBlock};
use crate::simd::LANES;

/// Output rows of one pair of panels.
pub(crate) const PAIR_ROWS: usize = 2 * LANES;

/// One cache line.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Formats that have kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PackFormat {
    Bf16,
    Q8,
    Q4,
}

impl PackFormat {
    /// Cache lines of one panel in one block, without the scales.
    const fn panel_lines(self) -> usize {
        match self {
            Self::Bf16 => 16,
            Self::Q8 => 8,
            Self::Q4 => 4,
        }
    }

    /// Cache lines of one block of a pair.
    pub(crate) const fn block_lines(self) -> usize {
        match self {
            Self::Bf16 => BF16_LINES,
            Self::Q8 => Q8_LINES,
            Self::Q4 => Q4_LINES,
        }
    }
}

pub(crate) const BF16_LINES: usize = 32;
pub(crate) const Q8_LINES: usize = 17;
pub(crate) const Q4_LINES: usize = 9;

impl TryFrom<WeightFormat> for PackFormat {
    type Error = Error;

    fn try_from(format: WeightFormat) -> Result<Self, Error> {
        match format {
            WeightFormat::Bf16 => Ok(Self::Bf16),
            WeightFormat::Q8 => Ok(Self::Q8),
            WeightFormat::Q4 => Ok(Self::Q4),
            WeightFormat::F32 => Err(Error::WeightFormat {
                backend: "cpu",
                format: format.to_string(),
            }),
        }
    }
}

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    format: PackFormat,
    rows: usize,
    blocks: usize,
    lines: Vec<Line>,
}

/// Bytes of a packed matrix.
pub(crate) const fn packed_bytes(format: PackFormat, rows: usize, cols: usize) -> usize {
    rows.div_ceil(PAIR_ROWS) * cols.div_ceil(BLOCK) * format.block_lines() * size_of::<Line>()
}

impl PackedMatrix {
    /// Packs `rows` rows of `cols` columns; `read` writes one row as f32.
    pub(crate) fn pack(
        dispatch: Dispatch,
        format: PackFormat,
        (rows, cols): (usize, usize),
        mut read: impl FnMut(usize, &mut [f32]),
    ) -> Self {
        let blocks = cols.div_ceil(BLOCK);
        let num_lines = packed_bytes(format, rows, cols) / size_of::<Line>();
        let mut matrix = Self {
            format,
            rows,
            blocks,
            lines: vec![bytemuck::Zeroable::zeroed(); num_lines],
        };
        let mut row_values = vec![0.0; blocks * BLOCK];
        for row in 0..rows.next_multiple_of(PAIR_ROWS) {
            if row < rows {
                read(row, &mut row_values[..cols]);
            } else {
                row_values.fill(0.0);
            }
            matrix.write_row(dispatch, row, &row_values);
        }
        matrix
    }

    /// Rows without padding.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Pairs of panels.
    pub(crate) fn pairs(&self) -> usize {
        self.rows.div_ceil(PAIR_ROWS)
    }

    /// Blocks along k.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn format(&self) -> PackFormat {
        self.format
    }

    /// Bytes that it takes.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line>()
    }

    /// The lines of one pair, block after block.
    #[inline]
    pub(crate) fn pair(&self, pair: usize) -> &[Line] {
        let len = self.blocks * self.format.block_lines();
        &self.lines[pair * len..(pair + 1) * len]
    }

    fn write_row(&mut self, dispatch: Dispatch, row: usize, values: &[f32]) {
        let block_lines = self.format.block_lines();
        let panel_lines = self.format.panel_lines();
        let (pair, panel, lane) = (row / PAIR_ROWS, row % PAIR_ROWS / LANES, row % LANES);
        let pair_lines = self.blocks * block_lines;
        let lines = &mut self.lines[pair * pair_lines..(pair + 1) * pair_lines];
        let (value_blocks, _) = values.as_chunks::<BLOCK>();
        for (block, values) in lines.chunks_exact_mut(block_lines).zip(value_blocks) {
            let (weights, scales) = block.split_at_mut(2 * panel_lines);
            let target = &mut weights[panel * panel_lines..(panel + 1) * panel_lines];
            let scale = match self.format {
                PackFormat::Bf16 => {
                    write_bf16(target, lane, values);
                    continue;
                }
                PackFormat::Q8 => write_q8(dispatch, target, lane, values),
                PackFormat::Q4 => write_q4(dispatch, target, lane, values),
            };
            if let [line] = scales {
                let at = 2 * (panel * LANES + lane);
                line.0[at..at + 2].copy_from_slice(&scale.to_le_bytes());
            }
        }
    }
}

fn write_bf16(lines: &mut [Line], lane: usize, values: &[f32; BLOCK]) {
    let (pairs, _) = values.as_chunks::<2>();
    for (line, pair) in lines.iter_mut().zip(pairs) {
        for (i, &x) in pair.iter().enumerate() {
            let at = 4 * lane + 2 * i;
            line.0[at..at + 2].copy_from_slice(&bf16::from_f32(x).to_le_bytes());
        }
    }
}

fn write_q8(dispatch: Dispatch, lines: &mut [Line], lane: usize, values: &[f32; BLOCK]) -> f16 {
    let WeightBlock { q, scale } = dispatch.run(QuantiseWeights {
        values,
        is_q4: false,
    });
    let (quads, _) = q.as_chunks::<4>();
    for (line, quad) in lines.iter_mut().zip(quads) {
        for (target, &q) in line.0[4 * lane..4 * lane + 4].iter_mut().zip(quad) {
            *target = (q as u8) ^ 0x80;
        }
    }
    scale
}

fn write_q4(dispatch: Dispatch, lines: &mut [Line], lane: usize, values: &[f32; BLOCK]) -> f16 {
    let WeightBlock { q, scale } = dispatch.run(QuantiseWeights {
        values,
        is_q4: true,
    });
    let (low, high) = q.split_at(BLOCK / 2);
    let (low, _) = low.as_chunks::<4>();
    let (high, _) = high.as_chunks::<4>();
    for ((line, low), high) in lines.iter_mut().zip(low).zip(high) {
        for k in 0..4 {
            line.0[4 * lane + k] = (low[k] as u8) | (high[k] as u8) << 4;
        }
    }
    scale
}
