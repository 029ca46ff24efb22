//! A borrowed view of a checkpoint tensor in host memory (usually just read from a file); owns nothing.

use half::{bf16, f16};

use crate::blocks::{self, SUPER_BLOCK};
use crate::quant::{BLOCK, Q4Block, Q8Block};

/// Element types of checkpoints: plain numbers, and the blocks of GGUF files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
    /// 32 signed bytes and a scale.
    Q8_0,
    /// 32 four-bit numbers around zero and a scale.
    Q4_0,
    /// 32 four-bit numbers, a scale and a minimum.
    Q4_1,
    /// 32 five-bit numbers around zero and a scale.
    Q5_0,
    /// 32 five-bit numbers, a scale and a minimum.
    Q5_1,
    /// 256 four-bit numbers; every 32 have a scale and a minimum of six bits.
    Q4K,
    /// 256 five-bit numbers; every 32 have a scale and a minimum of six bits.
    Q5K,
    /// 256 six-bit numbers; every 16 have a scale of eight bits.
    Q6K,
}

impl DType {
    /// Numbers that are stored together; a row has a multiple of them.
    #[must_use]
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q8_0 | Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => BLOCK,
            Self::Q4K | Self::Q5K | Self::Q6K => SUPER_BLOCK,
        }
    }

    /// Bytes of [`block_len`](Self::block_len) numbers.
    #[must_use]
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Q8_0 => 34,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Bytes of a row of `cols` numbers; `None` when they are no whole number of blocks, or too many to count.
    #[must_use]
    pub const fn row_bytes(self, cols: usize) -> Option<usize> {
        if !cols.is_multiple_of(self.block_len()) {
            return None;
        }
        (cols / self.block_len()).checked_mul(self.block_bytes())
    }
}

/// In which order the rows of a matrix lie in its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// Row 0 first.
    #[default]
    Plain,
    /// Inside each head of `head_dim` (even) rows, the two rows of a rotary pair are neighbours: row `i` of a
    /// head lies at `2 i`, its partner `i + head_dim / 2` at `2 i + 1`. GGUF files have queries and keys so.
    RotaryPairs {
        /// Rows of one head.
        head_dim: usize,
    },
}

impl RowOrder {
    /// Where row `row` lies.
    #[must_use]
    pub const fn place(self, row: usize) -> usize {
        match self {
            Self::Plain => row,
            Self::RotaryPairs { head_dim } => {
                let (head, i, half) = (row / head_dim, row % head_dim, head_dim / 2);
                head * head_dim + 2 * (i % half) + i / half
            }
        }
    }
}

/// A row-major matrix (or vector, with one row) in little-endian bytes; `data` may be unaligned.
#[derive(Clone, Copy, Debug)]
pub struct HostTensor<'a> {
    /// Element type.
    pub dtype: DType,
    /// Number of rows; 1 for a vector.
    pub rows: usize,
    /// Elements of one row.
    pub cols: usize,
    /// Where each row lies.
    pub order: RowOrder,
    /// [`expected_bytes`](Self::expected_bytes) of them.
    pub data: &'a [u8],
}

impl<'a> HostTensor<'a> {
    /// Bytes that `data` must have; `None` when a row is no whole number of blocks, or there are too many to count.
    #[must_use]
    pub fn expected_bytes(&self) -> Option<usize> {
        self.dtype.row_bytes(self.cols)?.checked_mul(self.rows)
    }

    /// The bytes of row `row`, wherever it lies; `None` outside the tensor.
    #[must_use]
    pub fn row_bytes(&self, row: usize) -> Option<&'a [u8]> {
        if row >= self.rows {
            return None;
        }
        let len = self.dtype.row_bytes(self.cols)?;
        let begin = self.order.place(row).checked_mul(len)?;
        self.data.get(begin..begin.checked_add(len)?)
    }

    /// Block `block` (of 32 columns) of row `row` as q8, where the file has just that: `Q8_0`.
    ///
    /// `None` for other types, outside the tensor, and for blocks that q8 does not know: a scale that is not
    /// finite, or a -128.
    #[must_use]
    pub fn q8_block(&self, row: usize, block: usize) -> Option<Q8Block> {
        blocks::q8_block(self.dtype, self.row_bytes(row)?, block)
    }

    /// Block `block` (of 32 columns) of row `row` as q4, where the file has such a block.
    ///
    /// `Q4_0` and `Q4_1` without loss. `Q4_K` keeps its numbers; the products `d * s` and `dmin * b`, which
    /// have up to 17 bits, are rounded to the 11 of f16: a relative error of at most 2^-11 in each, far
    /// below a step. `None` for other types, outside the tensor, and where scale or minimum are no finite f16.
    #[must_use]
    pub fn q4_block(&self, row: usize, block: usize) -> Option<Q4Block> {
        blocks::q4_block(self.dtype, self.row_bytes(row)?, block)
    }

    /// Converts columns `[col_begin, col_begin + out.len())` of row `row` to f32.
    ///
    /// Reads only those bytes (of block types: the whole blocks that they touch), so that of a tensor that is to
    /// be packed in part only that part is read from its file. What lies outside the tensor becomes zero (the padding of odd shapes).
    pub fn read_row(&self, row: usize, col_begin: usize, out: &mut [f32]) {
        let num_read = if row < self.rows {
            self.cols.saturating_sub(col_begin).min(out.len())
        } else {
            0
        };
        let (read, padding) = out.split_at_mut(num_read);
        padding.fill(0.0);
        if num_read == 0 {
            return;
        }
        let is_read = self
            .row_bytes(row)
            .and_then(|bytes| read_cols(self.dtype, bytes, col_begin, read));
        if is_read.is_none() {
            debug_assert!(
                false,
                "tensor of {} bytes read in row {row}",
                self.data.len()
            );
            read.fill(0.0);
        }
    }

    /// The whole tensor as f32, `[rows * cols]`.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, values) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read_row(row, 0, values);
        }
        out
    }
}

/// Columns of one row; `None` when its bytes do not hold them.
fn read_cols(dtype: DType, row: &[u8], col_begin: usize, out: &mut [f32]) -> Option<()> {
    let plain = |size: usize| row.get(col_begin * size..(col_begin + out.len()) * size);
    match dtype {
        DType::F32 => {
            let bytes = plain(4)?.as_chunks().0;
            for (x, b) in out.iter_mut().zip(bytes) {
                *x = f32::from_le_bytes(*b);
            }
        }
        DType::F16 => {
            let bytes = plain(2)?.as_chunks().0;
            for (x, b) in out.iter_mut().zip(bytes) {
                *x = f16::from_le_bytes(*b).to_f32();
            }
        }
        DType::Bf16 => {
            let bytes = plain(2)?.as_chunks().0;
            for (x, b) in out.iter_mut().zip(bytes) {
                *x = bf16::from_le_bytes(*b).to_f32();
            }
        }
        _ => {
            let (mut col, mut rest) = (col_begin, out);
            while !rest.is_empty() {
                let values = blocks::decode(dtype, row, col / BLOCK)?;
                let values = &values[col % BLOCK..];
                let (now, later) = rest.split_at_mut(values.len().min(rest.len()));
                now.copy_from_slice(&values[..now.len()]);
                (col, rest) = (col + now.len(), later);
            }
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_reads_the_same_numbers_and_pads_with_zero() {
        let values = [1.0_f32, -2.5, 0.0, 384.0, 0.5, -0.125];
        let f32_bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let f16_bytes: Vec<u8> = values
            .iter()
            .flat_map(|&x| f16::from_f32(x).to_le_bytes())
            .collect();
        let bf16_bytes: Vec<u8> = values
            .iter()
            .flat_map(|&x| bf16::from_f32(x).to_le_bytes())
            .collect();
        for (dtype, data) in [
            (DType::F32, &f32_bytes),
            (DType::F16, &f16_bytes),
            (DType::Bf16, &bf16_bytes),
        ] {
            let tensor = HostTensor {
                dtype,
                rows: 2,
                cols: 3,
                order: RowOrder::Plain,
                data,
            };
            assert_eq!(tensor.to_f32(), values);
            let mut out = [9.0; 4];
            tensor.read_row(1, 1, &mut out);
            assert_eq!(out, [0.5, -0.125, 0.0, 0.0]);
            tensor.read_row(2, 0, &mut out);
            assert_eq!(out, [0.0; 4]);
        }
    }
}
