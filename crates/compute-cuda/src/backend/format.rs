//! How weights are packed, by format: what a part takes, and what goes up to the device to be packed. Queues nothing.

use std::num::NonZeroUsize;
use std::ops::Range;

use half::bf16;
use tramontane_compute::quant::{BLOCK, Q4Block, q4_weights};
use tramontane_compute::{DType, Error, HostTensor, WeightFormat};

use crate::target::Target;

/// Packed rows come in strips, their number a multiple of 4.
pub(super) const STRIP_ROWS: usize = 16;
pub(super) const ROWS_ALIGN: usize = 4 * STRIP_ROWS;
/// Nibbles of a block of q4 on their way, and its scale and minimum.
const Q4_NIBBLES: usize = BLOCK / 2;
const Q4_LINE: usize = size_of::<u32>();

/// A matrix format that there are products for: `kernels/README.md` has its layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    Bf16,
    /// With an f32 scale for each packed row of a part; rows of activations have scales too.
    E4m3,
    Q4,
}

/// What the numeric class says of weights: the formats of a model's matrices. Embedding, norms, gate and LM head are
/// the same in all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Formats {
    pub(super) class: &'static str,
    /// Queries, keys, values and O.
    pub(super) dense: Packing,
    pub(super) experts: Packing,
}

impl Formats {
    /// Those of a worker's weight format.
    ///
    /// # Errors
    /// When there are no kernels for it on this target, or on none.
    pub(super) fn of(format: WeightFormat, target: Option<Target>) -> Result<Self, Error> {
        let has_e4m3 = target != Some(Target::Sm80);
        let (class, dense, experts) = match format {
            WeightFormat::Bf16 => ("bf16", Packing::Bf16, Packing::Bf16),
            WeightFormat::E4m3 if has_e4m3 => ("e4m3", Packing::E4m3, Packing::E4m3),
            WeightFormat::Q4 => ("q4", Packing::Bf16, Packing::Q4),
            WeightFormat::E4m3 | WeightFormat::Q8 | WeightFormat::F32 => {
                return Err(Error::WeightFormat {
                    backend: target
                        .map_or_else(|| "cuda".to_owned(), |target| format!("cuda on {target}")),
                    offered: if has_e4m3 {
                        "bf16, e4m3 or q4"
                    } else {
                        "bf16 or q4 (e4m3 from sm_89 on)"
                    },
                    format: format.to_string(),
                });
            }
        };
        Ok(Self {
            class,
            dense,
            experts,
        })
    }

    /// Whether products of layers read rows as e4m3.
    pub(super) fn has_rounded_rows(&self) -> bool {
        self.experts == Packing::E4m3
    }
}

impl Packing {
    /// As names of kernels have it.
    pub(super) const fn step_bytes(self) -> usize {
        match self {
            Self::Bf16 | Self::E4m3 => 2048,
            Self::Q4 => 640,
        }
    }

    /// Columns of a step: 128 bytes of a row that products read.
    pub(super) const fn step_cols(self) -> usize {
        match self {
            Self::Bf16 | Self::Q4 => 64,
            Self::E4m3 => 128,
        }
    }

    /// Steps of a strip: an even number.
    pub(super) const fn steps(self, cols: usize) -> usize {
        cols.div_ceil(2 * self.step_cols()) * 2
    }

    /// Bytes of a packed part, without scales that lie beside it.
    pub(super) const fn part_bytes(self, packed_rows: usize, cols: usize) -> usize {
        packed_rows.next_multiple_of(ROWS_ALIGN) / STRIP_ROWS * self.steps(cols) * self.step_bytes()
    }

    /// Bytes of the scales beside a part.
    pub(super) const fn scales_bytes(self, packed_rows: usize) -> usize {
        match self {
            Self::Bf16 | Self::Q4 => 0,
            Self::E4m3 => packed_rows.next_multiple_of(ROWS_ALIGN) * size_of::<f32>(),
        }
    }

    /// Bytes of a row on its way to be packed.
    pub(super) const fn staged_bytes(self, cols: usize) -> usize {
        match self {
            Self::Bf16 | Self::E4m3 => cols * size_of::<u16>(),
            Self::Q4 => cols.div_ceil(BLOCK) * (Q4_NIBBLES + Q4_LINE),
        }
    }

    /// Elements (q4: bytes) from row to row there.
    pub(super) const fn staged_stride(self, cols: usize) -> usize {
        match self {
            Self::Bf16 | Self::E4m3 => cols,
            Self::Q4 => cols.div_ceil(BLOCK) * Q4_NIBBLES,
        }
    }
}

/// Packed rows of the gate and up halves of `len` columns of ff.
pub(super) const fn gate_up_rows(len: usize) -> usize {
    len.div_ceil(32) * 64
}

/// Tensors one below the other, read from a row and a column on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'a> {
    pub(super) tensors: &'a [HostTensor<'a>],
    pub(super) row_begin: usize,
    /// A multiple of [`BLOCK`].
    pub(super) col_begin: usize,
}

impl<'a> Source<'a> {
    /// The tensor that has a row, and which one of its rows that is.
    fn find(&self, row: usize) -> Option<(&'a HostTensor<'a>, usize)> {
        let mut row = self.row_begin + row;
        for tensor in self.tensors {
            if row < tensor.rows {
                return Some((tensor, row));
            }
            row -= tensor.rows;
        }
        None
    }

    /// Rows as bf16, one after the other.
    pub(super) fn stage_bf16(&self, rows: Range<usize>, cols: usize, out: &mut [u16]) {
        for (row, out) in rows.zip(out.chunks_exact_mut(cols)) {
            match self.find(row) {
                Some((tensor, row)) => read_bf16(tensor, row, self.col_begin, out),
                None => out.fill(0),
            }
        }
    }

    /// Rows as blocks of q4, nibbles and lines (f16 scale, then minimum) apart: those of the file where it has such
    /// blocks. Searching for others takes long, so all cores do it.
    pub(super) fn stage_q4(
        &self,
        rows: Range<usize>,
        cols: usize,
        (nibbles, lines): (&mut [u8], &mut [u32]),
    ) {
        let blocks = cols.div_ceil(BLOCK);
        let threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let share = rows.len().div_ceil(threads).max(1);
        let nibbles = nibbles.chunks_mut(share * blocks * Q4_NIBBLES);
        let lines = lines.chunks_mut(share * blocks);
        let firsts = rows.step_by(share);
        std::thread::scope(|scope| {
            for (first, (nibbles, lines)) in firsts.zip(nibbles.zip(lines)) {
                scope.spawn(move || {
                    let places = nibbles.chunks_exact_mut(Q4_NIBBLES).zip(lines);
                    for (i, (nibbles, line)) in places.enumerate() {
                        let block = self.q4_block(first + i / blocks, i % blocks);
                        for (byte, pair) in nibbles.iter_mut().zip(block.q.as_chunks::<2>().0) {
                            *byte = pair[0] | pair[1] << 4;
                        }
                        let [scale, min] = [block.scale, block.min].map(|x| u32::from(x.to_bits()));
                        *line = scale | min << 16;
                    }
                });
            }
        });
    }

    fn q4_block(&self, row: usize, block: usize) -> Q4Block {
        let mut values = [0.0; BLOCK];
        let Some((tensor, row)) = self.find(row) else {
            return q4_weights(&values);
        };
        let as_it_is = tensor.q4_block(row, self.col_begin / BLOCK + block);
        as_it_is.unwrap_or_else(|| {
            tensor.read_row(row, self.col_begin + block * BLOCK, &mut values);
            q4_weights(&values)
        })
    }
}

/// Columns of a row as bf16, zeros outside the tensor.
pub(super) fn read_bf16(tensor: &HostTensor<'_>, row: usize, col_begin: usize, out: &mut [u16]) {
    let plain = (tensor.dtype == DType::Bf16)
        .then(|| {
            tensor
                .row_bytes(row)?
                .get(2 * col_begin..)?
                .get(..2 * out.len())
        })
        .flatten();
    if let Some(bytes) = plain {
        for (x, b) in out.iter_mut().zip(bytes.as_chunks().0) {
            *x = u16::from_le_bytes(*b);
        }
        return;
    }
    let mut values = vec![0.0; out.len()];
    tensor.read_row(row, col_begin, &mut values);
    for (x, value) in out.iter_mut().zip(values) {
        *x = bf16::from_f32(value).to_bits();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_says_which_formats_it_has() {
        let class = |format, target| Formats::of(format, Some(target)).map(|formats| formats.class);
        assert_eq!(class(WeightFormat::E4m3, Target::Sm90a).unwrap(), "e4m3");
        assert_eq!(class(WeightFormat::Q4, Target::Sm80).unwrap(), "q4");
        let refused = class(WeightFormat::E4m3, Target::Sm80).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "backend cuda on sm_80 offers weights as bf16 or q4 (e4m3 from sm_89 on), got e4m3"
        );
        for format in [WeightFormat::Q8, WeightFormat::F32] {
            assert!(class(format, Target::Sm90a).is_err());
        }
    }

    /// Mixtral's gate and up, and its down: `kernels/README.md` has the formulas.
    #[test]
    fn parts_take_what_their_numbers_need() {
        let weights = 2 * 1792 * 4096;
        assert_eq!(
            Packing::Bf16.part_bytes(gate_up_rows(1792), 4096),
            2 * weights
        );
        assert_eq!(Packing::E4m3.part_bytes(gate_up_rows(1792), 4096), weights);
        assert_eq!(
            Packing::Q4.part_bytes(gate_up_rows(1792), 4096),
            weights / 32 * 20
        );
        assert_eq!(Packing::E4m3.scales_bytes(gate_up_rows(1792)), 4 * 3584);
        assert_eq!(Packing::E4m3.part_bytes(72, 40), 8 * 2 * 2048);
    }
}
