//! Rows to q8 and bf16: the formulas of [`tramontane_compute::quant`], bit for bit. Never rounds otherwise.

use tramontane_compute::RowFormat;
use tramontane_compute::quant::BLOCK;

use crate::rows::BlockMut;
use crate::simd::{LANES, Operation, Simd, reduce_add, reduce_max};

/// One block of activations to the row format.
pub(crate) struct QuantiseBlock<'a> {
    pub(crate) format: RowFormat,
    pub(crate) values: &'a [f32; BLOCK],
    pub(crate) out: BlockMut<'a>,
}

impl Operation for QuantiseBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        quantise_block(s, self.format, self.values, self.out);
    }
}

/// See [`QuantiseBlock`].
#[inline(always)]
pub(crate) fn quantise_block<S: Simd>(
    s: S,
    format: RowFormat,
    values: &[f32; BLOCK],
    out: BlockMut<'_>,
) {
    match (format, out.scale, out.sum) {
        (RowFormat::Q8, [scale], [sum]) => {
            let (q, d, total) = q8_block(s, values);
            *scale = d;
            *sum = total;
            for (word, quad) in out.words.iter_mut().zip(q.as_chunks::<4>().0) {
                *word = u32::from_le_bytes(*quad);
            }
        }
        (RowFormat::Bf16, ..) => {
            for (word, pair) in out.words.iter_mut().zip(values.as_chunks::<2>().0) {
                *word = u32::from(to_bf16(pair[0])) | u32::from(to_bf16(pair[1])) << 16;
            }
        }
        _ => debug_assert!(false, "the cpu backend has bf16 and q8 rows"),
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

/// The largest magnitude; NaN when a value is not finite.
#[inline(always)]
fn amax<S: Simd>(s: S, values: &[f32; BLOCK]) -> f32 {
    let zero = s.splat(0.0);
    let mut largest = zero;
    // 0 * x is NaN where x is not finite, and stays it; the maximum loses a NaN.
    let mut poison = zero;
    for half in values.as_chunks::<LANES>().0 {
        let x = s.load(half);
        largest = s.max(x, largest);
        largest = s.max(s.sub(zero, x), largest);
        poison = s.fma(zero, x, poison);
    }
    if reduce_add(s, poison).is_nan() {
        f32::NAN
    } else {
        reduce_max(s, largest)
    }
}

#[inline(always)]
fn q8_block<S: Simd>(s: S, values: &[f32; BLOCK]) -> ([u8; BLOCK], f32, i32) {
    let d = amax(s, values) / 127.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    // With a scale of NaN every quotient is NaN, and NaN as i8 is 0.
    let mut q = [0_u8; BLOCK];
    let mut sum = 0;
    let halves = q.as_chunks_mut::<LANES>().0.iter_mut();
    for (q, x) in halves.zip(values.as_chunks::<LANES>().0) {
        let bytes = s.to_i8(s.round(s.mul(s.load(x), s.splat(inverse))));
        for (q, byte) in q.iter_mut().zip(bytes) {
            *q = byte as u8;
            sum += i32::from(byte);
        }
    }
    (q, d, sum)
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
            let (q, d, _sum) = q8_block(s, &padded_block(values));
            *bytes = q;
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
