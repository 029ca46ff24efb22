//! Block formats of weights and activations, and their plain conversions. The kernels' layouts are repacked from these.
//!
//! * **q8 weights** (as GGUF `Q8_0`): blocks of 32 along the input dimension; scale `d = f16(amax / 127)`,
//!   `q = round(w / d)` in `-127..=127`, value `q * d`. 34 bytes per 32 weights.
//! * **q4 weights** (as GGUF `Q4_0`): `m` the element of largest magnitude, `d = f16(m / -8)`,
//!   `q = clamp(round(w / d) + 8, 0, 15)`, value `(q - 8) * d`. 18 bytes per 32 weights.
//! * **q8 rows** (activations): `d = amax / 127` in f32, `q = round(x / d)`. A row of `n` elements is
//!   padded with zeros to whole blocks and stored as all `q` bytes, then all scales (f32, little-endian).
//!
//! `round` is to nearest, ties to even. A block of zeros has scale 0. A block with a value that is not
//! finite, or whose scale overflows f16, has scale NaN and every `q` 0: what reads it becomes NaN and not
//! a plausible number. The dot product of a q8 row with
//! q8 or q4 weights is exact in i32 inside a block; over blocks, ascending, it is
//! `acc = fma(isum as f32, row_scale * weight_scale, acc)`: the same bits on every instruction set.

use half::f16;

/// Elements of one quantisation block.
pub const BLOCK: usize = 32;

/// Bytes of a q8 row of `len` elements.
#[must_use]
pub const fn q8_row_bytes(len: usize) -> usize {
    let blocks = len.div_ceil(BLOCK);
    blocks * BLOCK + blocks * 4
}

/// Quantises one block of weights to q8: 32 signed bytes and their scale.
#[must_use]
pub fn q8_weights(block: &[f32; BLOCK]) -> ([i8; BLOCK], f16) {
    let scale = weight_scale(amax(block) / 127.0);
    let inverse = inverse(scale.to_f32());
    let mut q = [0; BLOCK];
    for (q, x) in q.iter_mut().zip(block) {
        *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    (q, scale)
}

/// Quantises one block of weights to q4: 32 numbers in `0..16` (value `q - 8`) and their scale.
#[must_use]
pub fn q4_weights(block: &[f32; BLOCK]) -> ([u8; BLOCK], f16) {
    let extreme = block
        .iter()
        .fold(0.0_f32, |m, &x| if x.abs() > m.abs() { x } else { m });
    let is_finite = block.iter().all(|x| x.is_finite());
    let scale = weight_scale(if is_finite { extreme / -8.0 } else { f32::NAN });
    let inverse = inverse(scale.to_f32());
    let mut q = [0; BLOCK];
    for (q, x) in q.iter_mut().zip(block) {
        *q = ((x * inverse).round_ties_even() + 8.0).clamp(0.0, 15.0) as u8;
    }
    (q, scale)
}

/// Quantises a row of activations into `out`, [`q8_row_bytes`] long.
pub fn q8_row(row: &[f32], out: &mut [u8]) {
    debug_assert_eq!(out.len(), q8_row_bytes(row.len()), "room for a q8 row");
    let blocks = row.len().div_ceil(BLOCK);
    let (bytes, scales) = out.split_at_mut(blocks * BLOCK);
    let targets = bytes
        .chunks_exact_mut(BLOCK)
        .zip(scales.chunks_exact_mut(4));
    for (block, (bytes, scale)) in row.chunks(BLOCK).zip(targets) {
        let d = amax(block) / 127.0;
        let inverse = inverse(d);
        bytes.fill(0);
        for (q, x) in bytes.iter_mut().zip(block) {
            *q = (x * inverse).round_ties_even() as i8 as u8;
        }
        scale.copy_from_slice(&d.to_le_bytes());
    }
}

/// The values that a q8 row stands for, `len` of them.
#[must_use]
pub fn q8_row_to_f32(row: &[u8], len: usize) -> Vec<f32> {
    let blocks = len.div_ceil(BLOCK);
    let (bytes, scales) = row.split_at(blocks * BLOCK);
    let mut out = Vec::with_capacity(blocks * BLOCK);
    for (block, scale) in bytes.chunks_exact(BLOCK).zip(scales.chunks_exact(4)) {
        let d = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
        out.extend(block.iter().map(|&q| f32::from(q as i8) * d));
    }
    out.truncate(len);
    out
}

/// The largest magnitude; NaN when a value is not finite.
fn amax(block: &[f32]) -> f32 {
    if block.iter().all(|x| x.is_finite()) {
        block.iter().fold(0.0, |m, x| m.max(x.abs()))
    } else {
        f32::NAN
    }
}

/// The scale of a block of weights: NaN where f16 has no finite number for it.
#[must_use]
pub fn weight_scale(scale: f32) -> f16 {
    let rounded = f16::from_f32(scale);
    if rounded.is_finite() {
        rounded
    } else {
        f16::NAN
    }
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave() -> [f32; BLOCK] {
        std::array::from_fn(|i| (i as f32 * 0.7).sin() * 3.0)
    }

    #[test]
    fn quantised_weights_are_within_half_a_step() {
        let block = wave();
        let (q, d) = q8_weights(&block);
        for (q, x) in q.iter().zip(block) {
            assert!(
                (f32::from(*q) * d.to_f32() - x).abs() <= d.to_f32() * 0.51,
                "{q} {x}"
            );
        }
        let (q, d) = q4_weights(&block);
        for (q, x) in q.iter().zip(block) {
            // The side away from the extreme clips at 7 of 8 steps.
            assert!(
                ((f32::from(*q) - 8.0) * d.to_f32() - x).abs() <= d.to_f32().abs() * 1.01,
                "{q} {x}"
            );
        }
    }

    #[test]
    fn a_block_of_zeros_is_zero() {
        assert_eq!(q8_weights(&[0.0; BLOCK]), ([0; BLOCK], f16::ZERO));
        assert_eq!(q4_weights(&[0.0; BLOCK]).0, [8; BLOCK]);
        let mut row = vec![7; q8_row_bytes(40)];
        q8_row(&[0.0; 40], &mut row);
        assert!(row.iter().all(|&b| b == 0));
    }

    #[test]
    fn a_block_that_is_not_finite_has_scale_nan_and_no_numbers() {
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 9, BLOCK - 1] {
                let mut block = wave();
                block[at] = poison;
                let (q, d) = q8_weights(&block);
                assert!(d.is_nan() && q == [0; BLOCK], "{poison} at {at}");
                let (q, d) = q4_weights(&block);
                assert!(d.is_nan() && q == [0; BLOCK], "{poison} at {at}");
                let row: Vec<f32> = wave().into_iter().chain(block).collect();
                let mut packed = vec![7; q8_row_bytes(row.len())];
                q8_row(&row, &mut packed);
                assert_eq!(packed[BLOCK..2 * BLOCK], [0; BLOCK]);
                let back = q8_row_to_f32(&packed, row.len());
                assert!(back[..BLOCK].iter().all(|x| x.is_finite()));
                assert!(back[BLOCK..].iter().all(|x| x.is_nan()));
            }
        }
    }

    #[test]
    fn a_weight_scale_beyond_f16_is_nan() {
        let at = |x: f32| {
            let mut block = wave();
            block[3] = x;
            block
        };
        assert!(q8_weights(&at(65_504.0 * 127.0)).1.is_finite());
        assert!(q8_weights(&at(-65_600.0 * 127.0)).1.is_nan());
        assert!(q4_weights(&at(65_504.0 * 8.0)).1.is_finite());
        assert!(q4_weights(&at(-65_600.0 * 8.0)).1.is_nan());
        assert!(q4_weights(&at(65_600.0 * 8.0)).1.is_nan());
    }

    #[test]
    fn a_row_of_odd_length_comes_back() {
        let row: Vec<f32> = wave().into_iter().chain(wave()).take(45).collect();
        let mut packed = vec![0; q8_row_bytes(row.len())];
        q8_row(&row, &mut packed);
        for (x, y) in q8_row_to_f32(&packed, row.len()).iter().zip(&row) {
            assert!((x - y).abs() <= 3.0 / 127.0 * 0.51);
        }
    }
}
