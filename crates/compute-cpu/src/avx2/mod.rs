//! Sixteen lanes as two AVX2 registers. Never runs where the CPU lacks the instructions.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_GE_OQ, _CMP_ORD_Q, _CMP_UNORD_Q, _MM_FROUND_NO_EXC,
    _MM_FROUND_TO_NEAREST_INT, _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadu_si128,
    _mm_max_ps, _mm_max_ss, _mm_movehdup_ps, _mm_movehl_ps, _mm_packs_epi16, _mm_packs_epi32,
    _mm_prefetch, _mm_storeu_si128, _mm256_abs_epi8, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_ps, _mm256_and_si256, _mm256_andnot_ps, _mm256_castps_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_castsi256_si128, _mm256_cmp_ps, _mm256_cvtepi32_ps,
    _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32, _mm256_cvtps_ph, _mm256_div_ps,
    _mm256_extractf128_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_maddubs_epi16, _mm256_max_ps, _mm256_min_ps,
    _mm256_movemask_ps, _mm256_mul_ps, _mm256_round_ps, _mm256_set1_epi8, _mm256_set1_epi16,
    _mm256_set1_epi32, _mm256_set1_ps, _mm256_sign_epi8, _mm256_slli_epi32, _mm256_srli_epi16,
    _mm256_storeu_ps, _mm256_storeu_si256, _mm256_sub_ps,
};

use crate::simd::{LANES, Operation, Simd};

/// AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The proof, when this CPU has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    #[target_feature(enable = "avx2,fma,f16c")]
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

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];

    const TILE_ROWS: usize = 2;

    #[inline(always)]
    fn vectorize<O: Operation>(self, operation: O) -> O::Output {
        proven!(self.enter(operation))
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        let half = proven!(_mm256_set1_ps(x));
        [half, half]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        proven!([
            _mm256_loadu_ps(x.as_ptr()),
            _mm256_loadu_ps(x.as_ptr().add(8))
        ])
    }

    #[inline(always)]
    fn store(self, x: Self::F, out: &mut [f32; LANES]) {
        proven!({
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), x[1]);
        });
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        proven!([
            _mm256_fmadd_ps(a[0], b[0], c[0]),
            _mm256_fmadd_ps(a[1], b[1], c[1])
        ])
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        proven!([_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])])
    }

    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        proven!([
            _mm256_round_ps::<NEAREST>(a[0]),
            _mm256_round_ps::<NEAREST>(a[1])
        ])
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        proven!({
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_andnot_ps(sign, a[0]), _mm256_andnot_ps(sign, a[1])]
        })
    }

    #[inline(always)]
    fn has_nan(self, a: Self::F) -> bool {
        proven!({
            let unordered = _mm256_cmp_ps::<_CMP_UNORD_Q>(a[0], a[1]);
            _mm256_movemask_ps(unordered) != 0
        })
    }

    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        proven!(add_lanes(_mm256_add_ps(a[0], a[1])))
    }

    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        proven!(max_lanes(_mm256_max_ps(a[0], a[1])))
    }

    #[inline(always)]
    fn exp2_integer(self, n: Self::F) -> Self::F {
        n.map(|n| {
            proven!({
                let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
            })
        })
    }

    #[inline(always)]
    fn zero_below(self, x: Self::F, limit: Self::F, value: Self::F) -> Self::F {
        proven!([
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x[0], limit[0]), value[0]),
            _mm256_and_ps(_mm256_cmp_ps::<_CMP_GE_OQ>(x[1], limit[1]), value[1])
        ])
    }

    #[inline(always)]
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F {
        let at = x.as_ptr().cast::<__m128i>();
        proven!([
            widen(_mm256_cvtepu16_epi32(_mm_loadu_si128(at))),
            widen(_mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(1))))
        ])
    }

    #[inline(always)]
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F {
        let at = x.as_ptr().cast::<__m128i>();
        proven!([
            _mm256_cvtph_ps(_mm_loadu_si128(at)),
            _mm256_cvtph_ps(_mm_loadu_si128(at.add(1)))
        ])
    }

    #[inline(always)]
    fn store_f16(self, x: Self::F, out: &mut [u8; 2 * LANES]) {
        let at = out.as_mut_ptr().cast::<__m128i>();
        proven!({
            _mm_storeu_si128(at, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(
                at.add(1),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]),
            );
        });
    }

    #[inline(always)]
    fn splat_i32(self, x: i32) -> Self::I {
        let half = proven!(_mm256_set1_epi32(x));
        [half, half]
    }

    #[inline(always)]
    fn load_i32(self, x: &[i32; LANES]) -> Self::I {
        let at = x.as_ptr().cast::<__m256i>();
        proven!([_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))])
    }

    #[inline(always)]
    fn to_f32(self, x: Self::I) -> Self::F {
        proven!([_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])])
    }

    #[inline(always)]
    fn store_i8(self, low: Self::F, high: Self::F, out: &mut [u8; 2 * LANES]) {
        // NaN becomes i32::MIN: it is masked to 0, as the packs saturate.
        for (x, out) in [low, high].into_iter().zip(out.as_chunks_mut::<LANES>().0) {
            proven!({
                let ordered = [
                    _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(x[0], x[0])),
                    _mm256_castps_si256(_mm256_cmp_ps::<_CMP_ORD_Q>(x[1], x[1])),
                ];
                let low = _mm256_and_si256(_mm256_cvtps_epi32(x[0]), ordered[0]);
                let high = _mm256_and_si256(_mm256_cvtps_epi32(x[1]), ordered[1]);
                let low = _mm_packs_epi32(
                    _mm256_castsi256_si128(low),
                    _mm256_extracti128_si256::<1>(low),
                );
                let high = _mm_packs_epi32(
                    _mm256_castsi256_si128(high),
                    _mm256_extracti128_si256::<1>(high),
                );
                let packed = _mm_packs_epi16(low, high);
                _mm_storeu_si128(out.as_mut_ptr().cast::<__m128i>(), packed);
            });
        }
    }

    #[inline(always)]
    fn bytes(self, x: &[u8; 64]) -> Self::B {
        let at = x.as_ptr().cast::<__m256i>();
        proven!([_mm256_loadu_si256(at), _mm256_loadu_si256(at.add(1))])
    }

    #[inline(always)]
    fn signed_bytes(self, x: &[u8; 64]) -> Self::B {
        self.bytes(x)
    }

    #[inline(always)]
    fn store_bytes(self, x: Self::B, out: &mut [u8; 64]) {
        let at = out.as_mut_ptr().cast::<__m256i>();
        proven!({
            _mm256_storeu_si256(at, x[0]);
            _mm256_storeu_si256(at.add(1), x[1]);
        });
    }

    #[inline(always)]
    fn nibbles(self, x: &[u8; 64]) -> (Self::B, Self::B) {
        let [a, b] = self.bytes(x);
        proven!({
            let low = _mm256_set1_epi8(15);
            (
                [_mm256_and_si256(a, low), _mm256_and_si256(b, low)],
                [
                    _mm256_and_si256(_mm256_srli_epi16::<4>(a), low),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(b), low),
                ],
            )
        })
    }

    #[inline(always)]
    fn start_q8(self, _offset: i32) -> Self::I {
        self.splat_i32(0)
    }

    #[inline(always)]
    fn dot_q8(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
        proven!({
            let x = _mm256_set1_epi32(x as i32);
            [dot_signed(acc[0], w[0], x), dot_signed(acc[1], w[1], x)]
        })
    }

    #[inline(always)]
    fn dot_q4(self, acc: Self::I, w: Self::B, x: u32) -> Self::I {
        proven!({
            let x = _mm256_set1_epi32(x as i32);
            [dot_unsigned(acc[0], w[0], x), dot_unsigned(acc[1], w[1], x)]
        })
    }

    #[inline(always)]
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F {
        let x0 = f32::from_bits(x << 16);
        let x1 = f32::from_bits(x & 0xffff_0000);
        proven!({
            let upper = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let w0 = [widen(w[0]), widen(w[1])];
            let w1 = [
                _mm256_castsi256_ps(_mm256_and_si256(w[0], upper)),
                _mm256_castsi256_ps(_mm256_and_si256(w[1], upper)),
            ];
            self.fma(w1, self.splat(x1), self.fma(w0, self.splat(x0), acc))
        })
    }

    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(line.cast::<i8>()));
    }
}

/// The low half of every word, a bfloat16, as f32.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(words: __m256i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
}

/// Unsigned bytes of at most 15 times signed bytes: the 16-bit pair sums cannot saturate.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_unsigned(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    let pairs = _mm256_maddubs_epi16(w, x);
    _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
}

/// Signed weights: `|w|` times `x` with the sign of `w`. 2 * 127 * 127 fits 16 bits.
#[inline]
#[target_feature(enable = "avx2")]
fn dot_signed(acc: __m256i, w: __m256i, x: __m256i) -> __m256i {
    dot_unsigned(acc, _mm256_abs_epi8(w), _mm256_sign_epi8(x, w))
}

/// The sum of eight lanes, halves onto halves.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn add_lanes(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

/// The largest of eight lanes.
#[inline]
#[target_feature(enable = "avx2")]
pub(crate) fn max_lanes(x: __m256) -> f32 {
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}
