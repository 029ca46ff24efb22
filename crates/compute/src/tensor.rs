//! A borrowed view of a checkpoint tensor in host memory (usually a memory map); owns nothing.

use half::{bf16, f16};

/// Element types of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl DType {
    /// Bytes of one element.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
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
    /// `rows * cols * dtype.size()` bytes.
    pub data: &'a [u8],
}

impl HostTensor<'_> {
    /// Converts columns `[col_begin, col_begin + out.len())` of row `row` to f32.
    ///
    /// Reads only those bytes, so a memory-mapped tensor is paged in no further. What lies outside
    /// the tensor becomes zero (the padding of odd shapes).
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
        let size = self.dtype.size();
        let begin = (row * self.cols + col_begin) * size;
        let Some(bytes) = self.data.get(begin..begin + num_read * size) else {
            debug_assert!(false, "tensor of {} bytes read at {begin}", self.data.len());
            read.fill(0.0);
            return;
        };
        match self.dtype {
            DType::F32 => {
                for (x, b) in read.iter_mut().zip(bytes.chunks_exact(4)) {
                    *x = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            DType::F16 => {
                for (x, b) in read.iter_mut().zip(bytes.chunks_exact(2)) {
                    *x = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            DType::Bf16 => {
                for (x, b) in read.iter_mut().zip(bytes.chunks_exact(2)) {
                    *x = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
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
