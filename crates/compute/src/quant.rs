//! Block formats of weights and activations, and their plain conversions. The kernels' layouts are repacked from these.
//!
//! * **q8 weights** (as GGUF `Q8_0`): blocks of 32 along the input dimension; scale `d = f16(amax / 127)`,
//!   `q = round(w / d)` in `-127..=127`, value `d * q`. 34 bytes per 32 weights.
//! * **q4 weights**: blocks of 32 with a scale `d` and a minimum `m`, both f16; `q` in `0..16`, value
//!   `d * q + m`. 20 bytes per 32 weights. GGUF `Q4_0` (`m = -8 d`) and `Q4_1` are such blocks, and `Q4_K` is
//!   but for the rounding of its products of scales to f16. How `d` and `m` are chosen: [`q4_weights`].
//! * **e4m3** (weights and rows, on GPUs): 8-bit floating point with a sign, 4 bits of exponent and 3 of mantissa
//!   (OCP 8-bit Floating Point Specification, E4M3), and one f32 scale `amax / 448` for each row of a part of a matrix:
//!   see [`round_to_e4m3`].
//! * **q8 rows** (activations): `d = amax / 127` in f32, `q = round(x / d)`. A row of `n` elements is
//!   padded with zeros to whole blocks and stored as all `q` bytes, then all scales (f32, little-endian).
//!
//! `round` is to nearest, ties to even. A block of zeros has scale 0 (and minimum 0). A block with a value
//! that is not finite, or whose scale or minimum overflows f16, has scale NaN, minimum 0 and every `q` 0:
//! what reads it becomes NaN and not a plausible number.
//!
//! The dot product of a q8 row `x` with q8 or q4 weights is exact in i32 inside a block:
//! `isum = sum(q * x)`. Over blocks, ascending, it is
//! `acc = fma(isum as f32, row_scale * d, acc)`, and for q4 then, with `row_sum = sum(x)` of the block,
//! `acc = fma(m, row_scale * (row_sum as f32), acc)`: the same bits on every instruction set.

use half::f16;

/// Elements of one quantisation block.
pub const BLOCK: usize = 32;

/// One block of q8 weights: `scale * q`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Q8Block {
    /// The numbers.
    pub q: [i8; BLOCK],
    /// What one step is worth.
    pub scale: f16,
}

/// One block of q4 weights: `scale * q + min`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Q4Block {
    /// The numbers, each in `0..16`.
    pub q: [u8; BLOCK],
    /// What one step is worth; may be negative.
    pub scale: f16,
    /// The value of 0.
    pub min: f16,
}

/// Bytes of a q8 row of `len` elements.
#[must_use]
pub const fn q8_row_bytes(len: usize) -> usize {
    let blocks = len.div_ceil(BLOCK);
    blocks * BLOCK + blocks * 4
}

/// Quantises one block of weights to q8.
#[must_use]
pub fn q8_weights(block: &[f32; BLOCK]) -> Q8Block {
    let scale = weight_scale(amax(block) / 127.0);
    let inverse = inverse(scale.to_f32());
    let mut q = [0; BLOCK];
    for (q, x) in q.iter_mut().zip(block) {
        *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8;
    }
    Q8Block { q, scale }
}

/// The largest number of a q4 block.
pub const Q4_MAX: f32 = 15.0;

/// By how many steps the search of [`q4_weights`] moves each end of the range inwards.
pub const Q4_TRIMS: [f32; 3] = [0.0, 0.5, -0.5];

/// Steps smaller than this are no f16: the block becomes its smallest value.
pub const Q4_STEP_MIN: f32 = 1.0 / (1 << 25) as f32;

/// Quantises one block of weights to q4, with close to the smallest squared error.
///
/// In units of a fifteenth of the block's range, counted from its smallest value, weights are `u` in
/// `0..=15`. Nine ranges are tried, both ends moved by each of [`Q4_TRIMS`]: each gives numbers `q`, and
/// those the line `s q + m` that fits `u` best (least squares). The best line is fitted once more to the
/// numbers nearest to it; then it is rounded to f16, and the numbers are those nearest to what remains.
/// On normally distributed weights the squared error is 0.79 of that of the plain range, and 0.94 of that
/// of `Q4_K` as llama.cpp makes it.
#[must_use]
pub fn q4_weights(block: &[f32; BLOCK]) -> Q4Block {
    let (mut low, mut high) = (block[0], block[0]);
    for &x in block {
        low = if x < low { x } else { low };
        high = if x > high { x } else { high };
    }
    let step = (high - low) / Q4_MAX;
    let inverse = if step > Q4_STEP_MIN { 1.0 / step } else { 0.0 };
    let u = block.map(|x| (x - low) * inverse);
    let mut best = Line::default();
    for trim_low in Q4_TRIMS {
        for trim_high in Q4_TRIMS {
            let slope = Q4_MAX / (Q4_MAX - trim_low - trim_high);
            let line = Line::fit(&u, slope, -trim_low * slope);
            if line.gain >= best.gain {
                best = line;
            }
        }
    }
    let slope = self::inverse(best.scale);
    best = Line::fit(&u, slope, -best.min * slope);
    let scale = f16::from_f32(best.scale * step);
    let min = f16::from_f32(best.min.mul_add(step, low));
    let is_finite = block.iter().all(|x| x.is_finite()) && scale.is_finite() && min.is_finite();
    if !is_finite {
        return Q4Block {
            q: [0; BLOCK],
            scale: f16::NAN,
            min: f16::ZERO,
        };
    }
    let slope = self::inverse(scale.to_f32());
    let q = block.map(|x| nearest((x - min.to_f32()) * slope) as u8);
    Q4Block { q, scale, min }
}

/// The number of a q4 block that is nearest.
fn nearest(x: f32) -> f32 {
    x.round_ties_even().clamp(0.0, Q4_MAX)
}

/// `scale * q + min`, fitted to the weights of a block.
#[derive(Clone, Copy, Default)]
struct Line {
    scale: f32,
    min: f32,
    /// By how much it lowers the squared error against 0.
    gain: f32,
}

impl Line {
    /// The least-squares fit of `u` by the numbers nearest to `u * slope + offset`.
    fn fit(u: &[f32; BLOCK], slope: f32, offset: f32) -> Self {
        const COUNT: f32 = BLOCK as f32;
        let (mut sum_u, mut sum_q, mut sum_qq, mut sum_uq) = (0.0_f32, 0.0_f32, 0.0_f32, 0.0_f32);
        for &u in u {
            let q = nearest(u.mul_add(slope, offset));
            sum_u += u;
            sum_q += q;
            sum_qq = q.mul_add(q, sum_qq);
            sum_uq = u.mul_add(q, sum_uq);
        }
        // The sums of whole numbers are exact, so is this; 0 where all numbers are equal.
        let spread = COUNT * sum_qq - sum_q * sum_q;
        let scale = if spread > 0.0 {
            (COUNT * sum_uq - sum_u * sum_q) / spread
        } else {
            0.0
        };
        let min = (sum_u - scale * sum_q) / COUNT;
        let gain = scale.mul_add(sum_uq, min * sum_u);
        Self { scale, min, gain }
    }
}

/// The largest e4m3 number.
pub const E4M3_MAX: f32 = 448.0;

/// What is beyond half-way to the number that would come next.
const E4M3_BEYOND: f32 = 464.0;

/// The nearest e4m3 number, ties to even; what is larger than all becomes the largest, and NaN is NaN.
#[must_use]
pub fn e4m3_from_f32(x: f32) -> u8 {
    if x.is_nan() {
        return 0x7F;
    }
    let (sign, x) = ((x.to_bits() >> 24) as u8 & 0x80, x.abs());
    if x >= E4M3_BEYOND {
        return sign | 0x7E;
    }
    // The exponent from 0 on, which is that of 2^-6; smaller numbers have the steps of that one.
    let exponent = (x.to_bits() >> 23).saturating_sub(127 - 6);
    let step = f32::from_bits((exponent + 127 - 6 - 3) << 23);
    // A mantissa that is full carries into the exponent by itself.
    let steps = (x / step).round_ties_even() as u32;
    sign | (8 * exponent + steps) as u8
}

/// The value of an e4m3 number.
#[must_use]
pub fn e4m3_to_f32(x: u8) -> f32 {
    let (exponent, mantissa) = (u32::from(x >> 3 & 15), u32::from(x & 7));
    if x & 0x7F == 0x7F {
        return f32::NAN;
    }
    let steps = if exponent == 0 {
        mantissa
    } else {
        8 + mantissa
    };
    let step = f32::from_bits((exponent.max(1) + 127 - 7 - 3) << 23);
    let value = steps as f32 * step;
    if x & 0x80 == 0 { value } else { -value }
}

/// Rounds numbers that share a scale, a row of a part of a matrix, to what e4m3 makes of them: `scale = amax / 448`, numbers
/// `q = e4m3(x * (1 / scale))`, value `q * scale`; NaN where one is not finite.
pub fn round_to_e4m3(part: &mut [f32]) {
    let scale = amax(part) / E4M3_MAX;
    let inverse = inverse(scale);
    for x in part {
        *x = e4m3_to_f32(e4m3_from_f32(*x * inverse)) * scale;
    }
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
            *q = (x * inverse).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
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
        let Q8Block { q, scale } = q8_weights(&block);
        let d = scale.to_f32();
        for (q, x) in q.iter().zip(block) {
            assert!((f32::from(*q) * d - x).abs() <= d * 0.51, "{q} {x}");
        }
        let Q4Block { q, scale, min } = q4_weights(&block);
        let (d, m) = (scale.to_f32(), min.to_f32());
        for (q, x) in q.iter().zip(block) {
            // The ends may lie half a step outside the range.
            assert!((f32::from(*q) * d + m - x).abs() <= d * 1.01, "{q} {x}");
        }
    }

    fn q4_error(block: &[f32; BLOCK], scale: f32, min: f32) -> f32 {
        let errors = block.map(|x| nearest((x - min) * inverse(scale)).mul_add(scale, min) - x);
        errors.iter().map(|e| e * e).sum()
    }

    #[test]
    fn the_search_beats_the_plain_range() {
        let (mut plain, mut searched) = (0.0, 0.0);
        let mut state = 1_u32;
        for _ in 0..500 {
            // Sums of uniform numbers are close to normal.
            let block: [f32; BLOCK] = std::array::from_fn(|_| {
                (0..6).fold(0.0, |sum, _| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    sum + (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
            });
            let low = block.iter().fold(f32::MAX, |m, &x| m.min(x));
            let high = block.iter().fold(f32::MIN, |m, &x| m.max(x));
            plain += q4_error(&block, (high - low) / Q4_MAX, low);
            let Q4Block { scale, min, .. } = q4_weights(&block);
            searched += q4_error(&block, scale.to_f32(), min.to_f32());
        }
        assert!(searched < 0.82 * plain, "{searched} {plain}");
    }

    #[test]
    fn values_on_a_line_are_kept() {
        for (d, m) in [(0.25, -2.0), (1.0 / 64.0, 3.0), (2.0, -31.0)] {
            let block: [f32; BLOCK] = std::array::from_fn(|i| ((i * 7) % 16) as f32 * d + m);
            let Q4Block { q, scale, min } = q4_weights(&block);
            assert_eq!((scale.to_f32(), min.to_f32()), (d, m));
            assert!((0..BLOCK).all(|i| usize::from(q[i]) == i * 7 % 16));
        }
        let Q4Block { q, scale, min } = q4_weights(&[-0.75; BLOCK]);
        assert_eq!((q, scale.to_f32(), min.to_f32()), ([0; BLOCK], 0.0, -0.75));
    }

    #[test]
    fn e4m3_numbers_are_the_nearest_and_come_back() {
        for code in 0..=u8::MAX {
            let value = e4m3_to_f32(code);
            if value.is_nan() {
                assert_eq!(code & 0x7F, 0x7F);
                continue;
            }
            assert_eq!(e4m3_from_f32(value), code);
            // Half-way to the next is the even one, and what is a little less or more the nearer.
            let next = e4m3_to_f32(code + 1);
            if !next.is_nan() {
                let middle = (value + next) / 2.0;
                assert_eq!(e4m3_from_f32(middle), code + code % 2, "{middle}");
                assert_eq!(e4m3_from_f32(middle + (value - middle) * 1e-3), code);
                assert_eq!(e4m3_from_f32(middle + (next - middle) * 1e-3), code + 1);
            }
        }
        let known = [1.0, -2.5, 448.0, 1e9, f32::INFINITY, 0.001_953_125];
        assert_eq!(
            known.map(e4m3_from_f32),
            [0x38, 0xC2, 0x7E, 0x7E, 0x7E, 0x01]
        );
        let mut part = [3.0, -1.5, 0.01, 0.0];
        round_to_e4m3(&mut part);
        assert!((part[0] - 3.0).abs() < 1e-6 && (part[1] + 1.5).abs() < 1e-6);
        assert!((part[2] - 0.01).abs() < 0.01 / 16.0 && part[3] == 0.0);
        let mut part = [1.0, f32::NAN];
        round_to_e4m3(&mut part);
        assert!(part.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn a_block_of_zeros_is_zero() {
        let (q, scale) = ([0; BLOCK], f16::ZERO);
        assert_eq!(q8_weights(&[0.0; BLOCK]), Q8Block { q, scale });
        let (q, min) = ([0; BLOCK], f16::ZERO);
        assert_eq!(q4_weights(&[0.0; BLOCK]), Q4Block { q, scale, min });
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
                let Q8Block { q, scale } = q8_weights(&block);
                assert!(scale.is_nan() && q == [0; BLOCK], "{poison} at {at}");
                let Q4Block { q, scale, min } = q4_weights(&block);
                assert!(scale.is_nan() && q == [0; BLOCK], "{poison} at {at}");
                assert_eq!(min, f16::ZERO, "{poison} at {at}");
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
        assert!(q8_weights(&at(65_504.0 * 127.0)).scale.is_finite());
        assert!(q8_weights(&at(-65_600.0 * 127.0)).scale.is_nan());
        assert!(q4_weights(&at(65_000.0 * 15.0)).scale.is_finite());
        assert!(q4_weights(&at(65_600.0 * 15.0)).scale.is_nan());
        assert!(q4_weights(&at(-65_000.0)).scale.is_finite());
        assert!(q4_weights(&at(-65_600.0)).scale.is_nan());
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
