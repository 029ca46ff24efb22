//! Rows to q8 and bf16: the formulas of [`tramontane_compute::quant`], bit for bit. Never rounds otherwise.

use tramontane_compute::RowFormat;
use tramontane_compute::quant::BLOCK;

use crate::rows::BlockMut;
use crate::simd::{LANES, Operation, Simd, load_padded};

/// A row of activations to the row format.
pub(crate) struct QuantiseRow<'a, F> {
    pub(crate) format: RowFormat,
    pub(crate) values: &'a [f32],
    /// Where each block goes.
    pub(crate) out: F,
}

impl<'a, F: Fn(usize) -> BlockMut<'a>> Operation for QuantiseRow<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (full, rest) = self.values.as_chunks::<BLOCK>();
        for (i, values) in full.iter().enumerate() {
            quantise_block(s, self.format, values, (self.out)(i));
        }
        if !rest.is_empty() {
            quantise_block(s, self.format, &padded_block(rest), (self.out)(full.len()));
        }
    }
}

/// One block of activations to the row format.
#[inline(always)]
pub(crate) fn quantise_block<S: Simd>(
    s: S,
    format: RowFormat,
    values: &[f32; BLOCK],
    out: BlockMut<'_>,
) {
    match format {
        RowFormat::Q8 => {
            let bytes = bytemuck::cast_slice_mut(out.words);
            let Some(bytes) = bytes.first_chunk_mut() else {
                debug_assert!(false, "words of a block");
                return;
            };
            let (d, byte_sum) = q8_block(s, values, bytes);
            out.set_scale(d, byte_sum);
        }
        RowFormat::Bf16 => {
            for (word, pair) in out.words.iter_mut().zip(values.as_chunks::<2>().0) {
                *word = u32::from(to_bf16(pair[0])) | u32::from(to_bf16(pair[1])) << 16;
            }
        }
        RowFormat::F32 => debug_assert!(false, "the cpu backend has bf16 and q8 rows"),
    }
}

/// To bfloat16, ties to even; a NaN stays one.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if x.is_nan() { quiet } else { rounded }
}

/// Writes the bytes of a block; returns its scale and the sum of the bytes.
#[inline(always)]
fn q8_block<S: Simd>(s: S, values: &[f32; BLOCK], out: &mut [u8; BLOCK]) -> (f32, i32) {
    let (halves, _) = values.as_chunks::<LANES>();
    let (low, high) = (s.load(&halves[0]), s.load(&halves[1]));
    let zero = s.splat(0.0);
    // 0 * x is NaN where x is not finite; the maximum loses a NaN.
    let poison = s.fma(zero, low, s.mul(zero, high));
    let amax = if s.has_nan(poison) {
        f32::NAN
    } else {
        s.reduce_max(s.max(s.abs(low), s.abs(high)))
    };
    let d = amax / 127.0;
    let inverse = s.splat(if d == 0.0 { 0.0 } else { 1.0 / d });
    // The inverse of a denormal scale may be infinite; with a scale of NaN every quotient is NaN.
    let quotient = |x| {
        let q = s.round(s.mul(x, inverse));
        s.min(s.splat(127.0), s.max(s.splat(-127.0), q))
    };
    let (low, high) = (quotient(low), quotient(high));
    s.store_i8(low, high, out);
    // Whole numbers below 2^24 have the same sum in any order. A lane that is NaN is a byte 0.
    let sum = s.reduce_add(s.add(low, high));
    if sum.is_nan() {
        let mut byte_sum = 0;
        for &q in out.iter() {
            byte_sum += i32::from(q as i8);
        }
        return (d, byte_sum);
    }
    (d, sum as i32)
}

/// Numbers to binary16, little-endian, at most [`LANES`] at a time: ties to even, finite ones beyond its range to its
/// largest; a number that is not finite becomes NaN.
pub(crate) struct ToF16<'a, F> {
    pub(crate) values: &'a [f32],
    /// Takes the index of the first number and the numbers.
    pub(crate) out: F,
}

/// The largest finite binary16.
const F16_MAX: f32 = 65_504.0;

impl<F: Fn(usize, &[[u8; 2]])> Operation for ToF16<'_, F> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, values) in self.values.chunks(LANES).enumerate() {
            let x = load_padded(s, values);
            let bounded = s.min(s.splat(F16_MAX), s.max(s.splat(-F16_MAX), x));
            let mut halves = [0; 2 * LANES];
            // 0 * x is NaN where x is not finite.
            s.store_f16(s.fma(s.splat(0.0), x, bounded), &mut halves);
            (self.out)(i * LANES, &halves.as_chunks().0[..values.len()]);
        }
    }
}

/// A row of f32 to its wire form, see [`RowFormat`].
pub(crate) struct QuantiseToWire<'a> {
    pub(crate) format: RowFormat,
    pub(crate) values: &'a [f32],
    pub(crate) out: &'a mut [u8],
}

impl Operation for QuantiseToWire<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if self.format == RowFormat::Bf16 {
            for (bytes, &x) in self.out.as_chunks_mut::<2>().0.iter_mut().zip(self.values) {
                *bytes = to_bf16(x).to_le_bytes();
            }
            return;
        }
        let blocks = self.values.len().div_ceil(BLOCK);
        let (bytes, scales) = self.out.split_at_mut(blocks * BLOCK);
        let targets = bytes
            .as_chunks_mut::<BLOCK>()
            .0
            .iter_mut()
            .zip(scales.as_chunks_mut::<4>().0);
        for ((bytes, scale), values) in targets.zip(self.values.chunks(BLOCK)) {
            let (d, _sum) = q8_block(s, &padded_block(values), bytes);
            *scale = d.to_le_bytes();
        }
    }
}

/// A block, the missing columns zero.
#[inline(always)]
pub(crate) fn padded_block(values: &[f32]) -> [f32; BLOCK] {
    if let Some(full) = values.first_chunk() {
        return *full;
    }
    let mut block = [0.0; BLOCK];
    for (target, x) in block.iter_mut().zip(values) {
        *target = *x;
    }
    block
}
