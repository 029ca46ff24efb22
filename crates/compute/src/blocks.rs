//! The block formats of GGUF files, 32 numbers at a time. Reads bytes; never allocates.
//!
//! Layouts are those of the GGUF type list (ggml's block structures): all little-endian, `d`, `m` and
//! `dmin` f16. The K types are super-blocks of 256 numbers in eight blocks of 32; `s` and `b` below are
//! the six-bit scale and minimum of a block.
//!
//! | type | bytes | value |
//! |---|---|---|
//! | `Q8_0` | `d`, 32 signed bytes | `d * q` |
//! | `Q4_0` | `d`, 16 bytes of two numbers (low half: the first 16) | `d * (q - 8)` |
//! | `Q4_1` | `d`, `m`, 16 bytes as above | `d * q + m` |
//! | `Q5_0` | `d`, 4 bytes of fifth bits, 16 bytes as above | `d * (q - 16)` |
//! | `Q5_1` | `d`, `m`, 4 bytes of fifth bits, 16 bytes as above | `d * q + m` |
//! | `Q4_K` | `d`, `dmin`, 12 bytes of `s` and `b`, 128 of two numbers | `d s q - dmin b` |
//! | `Q5_K` | as `Q4_K`, with 32 bytes of fifth bits before the numbers | `d s q - dmin b` |
//! | `Q6_K` | 128 bytes of low halves, 64 of upper two bits, 16 signed `s` (one for 16 numbers), `d` | `d s (q - 32)` |
//!
//! Every value is computed in f32 in that order, each product rounded: the bits of ggml's own
//! reference conversion.

use half::f16;

use crate::DType;
use crate::quant::{BLOCK, Q4Block, Q8Block};

/// Numbers of a super-block of the K types.
pub(crate) const SUPER_BLOCK: usize = 256;
/// Blocks of a super-block.
const SUB_BLOCKS: usize = SUPER_BLOCK / BLOCK;
/// Bytes of the scales and minima of a super-block.
const SCALES: usize = 12;

/// The numbers of block `index` of a row, counted in blocks of 32; `None` when `row` does not hold it, or
/// `dtype` has no blocks.
pub(crate) fn decode(dtype: DType, row: &[u8], index: usize) -> Option<[f32; BLOCK]> {
    match dtype {
        DType::F32 | DType::F16 | DType::Bf16 => None,
        DType::Q8_0 => {
            let block = eight(row, index)?;
            let d = block.scale.to_f32();
            Some(block.q.map(|q| d * f32::from(q)))
        }
        DType::Q4_0 => {
            let block: &[u8; 18] = block_of(row, index)?;
            let d = half_at(block, 0).to_f32();
            Some(nibbles(block).map(|q| d * (f32::from(q) - 8.0)))
        }
        DType::Q4_1 => {
            let block: &[u8; 20] = block_of(row, index)?;
            let [d, m] = [0, 2].map(|at| half_at(block, at).to_f32());
            Some(nibbles(block).map(|q| d * f32::from(q) + m))
        }
        DType::Q5_0 => {
            let block: &[u8; 22] = block_of(row, index)?;
            let d = half_at(block, 0).to_f32();
            Some(five_bits(block).map(|q| d * (f32::from(q) - 16.0)))
        }
        DType::Q5_1 => {
            let block: &[u8; 24] = block_of(row, index)?;
            let [d, m] = [0, 2].map(|at| half_at(block, at).to_f32());
            Some(five_bits(block).map(|q| d * f32::from(q) + m))
        }
        DType::Q4K => {
            let (scale, min, q) = four_k(row, index)?;
            Some(q.map(|q| scale * f32::from(q) - min))
        }
        DType::Q5K => five_k(row, index),
        DType::Q6K => six_k(row, index),
    }
}

/// Block `index` of a row without loss; see [`HostTensor::q8_block`](crate::HostTensor::q8_block).
pub(crate) fn q8_block(dtype: DType, row: &[u8], index: usize) -> Option<Q8Block> {
    if dtype != DType::Q8_0 {
        return None;
    }
    let block = eight(row, index)?;
    (block.scale.is_finite() && !block.q.contains(&i8::MIN)).then_some(block)
}

/// Block `index` of a row; see [`HostTensor::q4_block`](crate::HostTensor::q4_block).
pub(crate) fn q4_block(dtype: DType, row: &[u8], index: usize) -> Option<Q4Block> {
    let block = match dtype {
        DType::Q4_0 => {
            let block: &[u8; 18] = block_of(row, index)?;
            let scale = half_at(block, 0);
            Q4Block {
                q: nibbles(block),
                scale,
                min: f16::from_f32(-8.0 * scale.to_f32()),
            }
        }
        DType::Q4_1 => {
            let block: &[u8; 20] = block_of(row, index)?;
            Q4Block {
                q: nibbles(block),
                scale: half_at(block, 0),
                min: half_at(block, 2),
            }
        }
        DType::Q4K => {
            let (scale, min, q) = four_k(row, index)?;
            Q4Block {
                q,
                scale: f16::from_f32(scale),
                min: f16::from_f32(-min),
            }
        }
        _ => return None,
    };
    (block.scale.is_finite() && block.min.is_finite()).then_some(block)
}

/// The `N` bytes of block `index`.
fn block_of<const N: usize>(row: &[u8], index: usize) -> Option<&[u8; N]> {
    row.as_chunks().0.get(index)
}

/// A `Q8_0` block as it is.
fn eight(row: &[u8], index: usize) -> Option<Q8Block> {
    let block: &[u8; 34] = block_of(row, index)?;
    Some(Q8Block {
        q: std::array::from_fn(|i| block[2 + i] as i8),
        scale: half_at(block, 0),
    })
}

/// The numbers of a block whose last 16 bytes hold them: lower halves first.
fn nibbles<const N: usize>(block: &[u8; N]) -> [u8; BLOCK] {
    std::array::from_fn(|i| block[N - 16 + i % 16] >> (4 * (i / 16)) & 15)
}

/// The numbers of a block with four bytes of fifth bits before the 16 bytes.
fn five_bits<const N: usize>(block: &[u8; N]) -> [u8; BLOCK] {
    let low = nibbles(block);
    std::array::from_fn(|i| low[i] | (block[N - 20 + i / 8] >> (i % 8) & 1) << 4)
}

fn half_at<const N: usize>(block: &[u8; N], at: usize) -> f16 {
    f16::from_le_bytes([block[at], block[at + 1]])
}

/// Block `index` of a `Q4_K` row: `d * s`, `dmin * b` and the numbers.
fn four_k(row: &[u8], index: usize) -> Option<(f32, f32, [u8; BLOCK])> {
    let block: &[u8; 144] = block_of(row, index / SUB_BLOCKS)?;
    let sub = index % SUB_BLOCKS;
    let (scale, min) = scale_and_min(block, sub);
    let (begin, shift) = (4 + SCALES + sub / 2 * BLOCK, 4 * (sub % 2));
    let q = std::array::from_fn(|i| block[begin + i] >> shift & 15);
    Some((scale, min, q))
}

/// Block `index` of a `Q5_K` row.
fn five_k(row: &[u8], index: usize) -> Option<[f32; BLOCK]> {
    let block: &[u8; 176] = block_of(row, index / SUB_BLOCKS)?;
    let sub = index % SUB_BLOCKS;
    let (scale, min) = scale_and_min(block, sub);
    let high = 4 + SCALES;
    let (low, shift) = (high + BLOCK + sub / 2 * BLOCK, 4 * (sub % 2));
    Some(std::array::from_fn(|i| {
        let q = (block[low + i] >> shift & 15) | (block[high + i] >> sub & 1) << 4;
        scale * f32::from(q) - min
    }))
}

/// Block `index` of a `Q6_K` row.
fn six_k(row: &[u8], index: usize) -> Option<[f32; BLOCK]> {
    const HIGH: usize = SUPER_BLOCK / 2;
    const SCALES: usize = HIGH + SUPER_BLOCK / 4;
    let block: &[u8; 210] = block_of(row, index / SUB_BLOCKS)?;
    // Each half of the super-block has its own bytes; inside, four blocks share them.
    let (half, sub) = (index % SUB_BLOCKS / 4, index % 4);
    let d = half_at(block, SCALES + 16).to_f32();
    let low = 64 * half + 32 * (sub % 2);
    let high = HIGH + 32 * half;
    let (low_shift, high_shift) = (4 * (sub / 2), 2 * sub);
    let scales = SCALES + 8 * half + 2 * sub;
    Some(std::array::from_fn(|i| {
        let q = (block[low + i] >> low_shift & 15) | (block[high + i] >> high_shift & 3) << 4;
        d * f32::from(block[scales + i / 16] as i8) * (f32::from(q) - 32.0)
    }))
}

/// `d * s` and `dmin * b` of a block of `Q4_K` or `Q5_K`.
///
/// The first four blocks have the lower six bits of bytes 0..4 (scales) and 4..8 (minima). The others have
/// the lower and upper halves of bytes 8..12, with the two bits that the first four left over on top.
fn scale_and_min<const N: usize>(block: &[u8; N], sub: usize) -> (f32, f32) {
    let packed = |i: usize| block[4 + i];
    let (s, b) = if sub < 4 {
        (packed(sub) & 63, packed(sub + 4) & 63)
    } else {
        let (scale, min, both) = (packed(sub - 4), packed(sub), packed(sub + 4));
        (both & 15 | scale >> 6 << 4, both >> 4 | min >> 6 << 4)
    };
    let scale = half_at(block, 0).to_f32() * f32::from(s);
    (scale, half_at(block, 2).to_f32() * f32::from(b))
}
