//! Sixteen lanes as one AVX-512 register. Never runs where the CPU lacks the instructions.

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _CMP_GE_OQ, _CMP_UNORD_Q, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T1, _mm_prefetch, _mm256_add_ps, _mm256_loadu_si256,
    _mm256_max_ps, _mm256_set_m128i, _mm256_storeu_si256, _mm512_abs_ps, _mm512_add_epi32,
    _mm512_add_ps, _mm512_and_si512, _mm512_castps512_ps256, _mm512_castsi512_ps,
    _mm512_cmp_ps_mask, _mm512_cvtepi32_epi8, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtps_ph, _mm512_div_ps, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_extractf32x8_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_maskz_mov_ps, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_roundscale_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_slli_epi32,
    _mm512_srli_epi16, _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps, _mm512_xor_si512,
};
use std::mem::transmute;

use crate::avx2::{add_lanes, max_lanes};
use crate::simd::{LANES, Operation, Simd};

/// AVX-512 F, BW, DQ, VL and VNNI; with `BF16` also AVX512_BF16, whose dot product has its own rounding.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const BF16: bool>(());

impl Avx512<false> {
    /// The proof, when this CPU has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
    fn enter<O: Operation>(self, operation: O) -> O::Output {
        operation.run(self)
    }
}

impl Avx512<true> {
    /// The proof, when this CPU has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512bf16");
        Avx512::<false>::detect()
            .filter(|_| found)
            .map(|_| Self(()))
    }

    #[target_feature(
        enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,avx2,fma,f16c"
    )]
    fn enter<O: Operation>(self, operation: O) -> O::Output {
        operation.run(self)
    }
}

/// Calls intrinsics from methods of a type that proves their presence.
macro_rules! proven {
    ($call:expr) => {{
        // SAFETY: a value of this type exists only where `detect` found the instructions; references
        // to arrays are valid for the bytes that the unaligned loads and stores touch.
        unsafe { $call }
    }};
}

macro_rules! implement {
    ($bf16:literal, $dot_bf16:item) => {
        impl Simd for Avx512<$bf16> {
            type F = __m512;
            type I = __m512i;
            type B = __m512i;

            const TILE_ROWS: usize = 6;

            #[inline(always)]
            fn vectorize<O: Operation>(self, operation: O) -> O::Output {
                proven!(self.enter(operation))
            }

            #[inline(always)]
            fn splat(self, x: f32) -> Self::F {
                proven!(_mm512_set1_ps(x))
            }

            #[inline(always)]
            fn load(self, x: &[f32; LANES]) -> Self::F {
                proven!(_mm512_loadu_ps(x.as_ptr()))
            }

            #[inline(always)]
            fn store(self, x: Self::F, out: &mut [f32; LANES]) {
                proven!(_mm512_storeu_ps(out.as_mut_ptr(), x));
            }

            #[inline(always)]
            fn add(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_add_ps(a, b))
            }

            #[inline(always)]
            fn sub(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_sub_ps(a, b))
            }

            #[inline(always)]
            fn mul(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_mul_ps(a, b))
            }

            #[inline(always)]
            fn div(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_div_ps(a, b))
            }

            #[inline(always)]
            fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
                proven!(_mm512_fmadd_ps(a, b, c))
            }

            #[inline(always)]
            fn max(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_max_ps(a, b))
            }

            #[inline(always)]
            fn min(self, a: Self::F, b: Self::F) -> Self::F {
                proven!(_mm512_min_ps(a, b))
            }

            #[inline(always)]
            fn round(self, a: Self::F) -> Self::F {
                const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
                proven!(_mm512_roundscale_ps::<NEAREST>(a))
            }

            #[inline(always)]
            fn abs(self, a: Self::F) -> Self::F {
                proven!(_mm512_abs_ps(a))
            }

            #[inline(always)]
            fn has_nan(self, a: Self::F) -> bool {
                proven!(_mm512_cmp_ps_mask::<_CMP_UNORD_Q>(a, a) != 0)
            }

            #[inline(always)]
            fn reduce_add(self, a: Self::F) -> f32 {
                proven!(add_lanes(_mm256_add_ps(
                    _mm512_castps512_ps256(a),
                    _mm512_extractf32x8_ps::<1>(a)
                )))
            }

            #[inline(always)]
            fn reduce_max(self, a: Self::F) -> f32 {
                proven!(max_lanes(_mm256_max_ps(
                    _mm512_castps512_ps256(a),
                    _mm512_extractf32x8_ps::<1>(a)
                )))
            }

            #[inline(always)]
            fn exp2_integer(self, n: Self::F) -> Self::F {
                proven!({
                    let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
                })
            }

            #[inline(always)]
            fn zero_below(self, x: Self::F, limit: Self::F, value: Self::F) -> Self::F {
                proven!(_mm512_maskz_mov_ps(
                    _mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, limit),
                    value
                ))
            }

            #[inline(always)]
            fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
                proven!({
                    let halves = _mm256_loadu_si256(x.as_ptr().cast::<__m256i>());
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(halves)))
                })
            }

            #[inline(always)]
            fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
                proven!(_mm512_cvtph_ps(_mm256_loadu_si256(
                    x.as_ptr().cast::<__m256i>()
                )))
            }

            #[inline(always)]
            fn store_f16(self, x: Self::F, out: &mut [u8; 2 * LANES]) {
                const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
                proven!(_mm256_storeu_si256(
                    out.as_mut_ptr().cast::<__m256i>(),
                    _mm512_cvtps_ph::<NEAREST>(x)
                ));
            }

            #[inline(always)]
            fn splat_i32(self, x: i32) -> Self::I {
                proven!(_mm512_set1_epi32(x))
            }

            #[inline(always)]
            fn load_i32(self, x: &[i32; LANES]) -> Self::I {
                proven!(_mm512_loadu_si512(x.as_ptr().cast::<__m512i>()))
            }

            #[inline(always)]
            fn to_f32(self, x: Self::I) -> Self::F {
                proven!(_mm512_cvtepi32_ps(x))
            }

            #[inline(always)]
            fn store_i8(self, low: Self::F, high: Self::F, out: &mut [u8; 2 * LANES]) {
                // NaN becomes i32::MIN, whose low byte is 0.
                proven!({
                    let low = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(low));
                    let high = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(high));
                    _mm256_storeu_si256(
                        out.as_mut_ptr().cast::<__m256i>(),
                        _mm256_set_m128i(high, low),
                    );
                });
            }

            #[inline(always)]
            fn bytes(self, x: &[u8; 64]) -> Self::B {
                proven!(_mm512_loadu_si512(x.as_ptr().cast::<__m512i>()))
            }

            #[inline(always)]
            fn signed_bytes(self, x: &[u8; 64]) -> Self::B {
                // The dot product takes one operand unsigned, here `w + 128`; see `start_q8`.
                proven!(_mm512_xor_si512(self.bytes(x), _mm512_set1_epi8(-128)))
            }

            #[inline(always)]
            fn store_bytes(self, x: Self::B, out: &mut [u8; 64]) {
                proven!(_mm512_storeu_si512(out.as_mut_ptr().cast::<__m512i>(), x));
            }

            #[inline(always)]
            fn nibbles(self, x: &[u8; 64]) -> (Self::B, Self::B) {
                let x = self.bytes(x);
                proven!({
                    let low = _mm512_set1_epi8(15);
                    (
                        _mm512_and_si512(x, low),
                        _mm512_and_si512(_mm512_srli_epi16::<4>(x), low),
                    )
                })
            }

            #[inline(always)]
            fn start_q8(self, offset: i32) -> Self::I {
                self.splat_i32(offset)
            }

            #[inline(always)]
            fn dot_q8(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
                proven!(_mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(x as i32)))
            }

            #[inline(always)]
            fn dot_q4(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
                self.dot_q8(acc, w, x)
            }

            #[inline(always)]
            $dot_bf16

            #[inline(always)]
            fn prefetch(self, line: *const u8) {
                proven!(_mm_prefetch::<_MM_HINT_T1>(line.cast::<i8>()));
            }
        }
    };
}

implement!(
    true,
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F {
        proven!(_mm512_dpbf16_ps(
            acc,
            transmute::<__m512i, __m512bh>(w),
            transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x as i32))
        ))
    }
);

implement!(
    false,
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F {
        proven!({
            let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let w0 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w));
            let w1 = _mm512_castsi512_ps(_mm512_and_si512(w, upper));
            let x0 = _mm512_set1_ps(f32::from_bits(x << 16));
            let x1 = _mm512_set1_ps(f32::from_bits(x & 0xffff_0000));
            _mm512_fmadd_ps(w1, x1, _mm512_fmadd_ps(w0, x0, acc))
        })
    }
);
