//! The specification: sixteen lanes as plain arrays. Uses no instruction set and no unsafe code.

use half::f16;

use crate::simd::{LANES, Operation, Simd};

/// Plain Rust; runs everywhere.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scalar;

#[inline(always)]
fn map2(a: [f32; LANES], b: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> [f32; LANES] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

/// The two bfloat16 of a word, the first in the low half.
#[inline(always)]
fn bf16_pair(word: u32) -> (f32, f32) {
    (
        f32::from_bits(word << 16),
        f32::from_bits(word & 0xffff_0000),
    )
}

impl Simd for Scalar {
    type F = [f32; LANES];
    type I = [i32; LANES];
    type B = [u8; 64];

    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn vectorize<O: Operation>(self, operation: O) -> O::Output {
        operation.run(self)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }

    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        *out = x;
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        a.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn has_nan(self, a: Self::F) -> bool {
        a.iter().any(|a| a.is_nan())
    }

    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        let mut lanes = a;
        let mut width = LANES / 2;
        while width > 0 {
            for i in 0..width {
                lanes[i] += lanes[i + width];
            }
            width /= 2;
        }
        lanes[0]
    }

    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn exp2_integer(self, n: Self::F) -> Self::F {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F, limit: Self::F, value: Self::F) -> Self::F {
        std::array::from_fn(|i| if x[i] >= limit[i] { value[i] } else { 0.0 })
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        x.map(|x| f32::from_bits(u32::from(x) << 16))
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        std::array::from_fn(|i| f16::from_le_bytes([x[2 * i], x[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn store_f16(self, x: Self::F, out: &mut [u8; 2 * LANES]) {
        for (out, x) in out.as_chunks_mut().0.iter_mut().zip(x) {
            *out = f16::from_f32(x).to_le_bytes();
        }
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        [x; LANES]
    }

    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I {
        *x
    }

    #[inline(always)]
    fn to_f32(self, x: Self::I) -> Self::F {
        x.map(|x| x as f32)
    }

    #[inline(always)]
    fn store_i8(self, low: Self::F, high: Self::F, out: &mut [u8; 2 * LANES]) {
        for (out, x) in out.iter_mut().zip([low, high].as_flattened()) {
            *out = *x as i8 as u8;
        }
    }

    #[inline(always)]
    fn bytes(self, x: &[u8; 64]) -> Self::B {
        *x
    }

    #[inline(always)]
    fn signed_bytes(self, x: &[u8; 64]) -> Self::B {
        *x
    }

    #[inline(always)]
    fn store_bytes(self, x: Self::B, out: &mut [u8; 64]) {
        *out = x;
    }

    #[inline(always)]
    fn nibbles(self, x: &[u8; 64]) -> (Self::B, Self::B) {
        (x.map(|x| x & 15), x.map(|x| x >> 4))
    }

    #[inline(always)]
    fn start_q8(self, _offset: i32) -> Self::I {
        [0; LANES]
    }

    #[inline(always)]
    fn dot_q8(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|lane| {
            let mut sum = acc[lane];
            for k in 0..4 {
                sum += i32::from(w[4 * lane + k] as i8) * x[k];
            }
            sum
        })
    }

    #[inline(always)]
    fn dot_q4(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
        let x = x.to_le_bytes().map(|x| i32::from(x as i8));
        std::array::from_fn(|lane| {
            let mut sum = acc[lane];
            for k in 0..4 {
                sum += i32::from(w[4 * lane + k]) * x[k];
            }
            sum
        })
    }

    #[inline(always)]
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F {
        let (x0, x1) = bf16_pair(x);
        std::array::from_fn(|lane| {
            let at = 4 * lane;
            let (w0, w1) = bf16_pair(u32::from_le_bytes([w[at], w[at + 1], w[at + 2], w[at + 3]]));
            w1.mul_add(x1, w0.mul_add(x0, acc[lane]))
        })
    }

    #[inline(always)]
    fn prefetch(self, _line: *const u8) {}
}
