//! Sixteen lanes: the vocabulary that every kernel is written in, once. Never chooses an instruction set.
//!
//! A kernel is an [`Operation`], generic over [`Simd`]; [`Dispatch::run`](crate::isa::Dispatch::run)
//! compiles it once per instruction set. All f32 arithmetic is lane by lane with the same roundings,
//! so an operation has the same bits everywhere; the scalar implementation is the specification. The
//! one exception is [`Simd::dot_bf16`], whose order is part of the numeric class.

/// Lanes of every vector: output rows in matrix products, tokens or head columns in attention.
pub(crate) const LANES: usize = 16;

/// Sixteen lanes of one instruction set. A value is the proof that this machine has it.
pub(crate) trait Simd: Copy {
    /// 16 f32.
    type F: Copy;
    /// 16 i32.
    type I: Copy;
    /// 64 bytes: 4 of k for each of 16 rows.
    type B: Copy;

    /// Most rows that a matrix tile keeps in registers.
    const TILE_ROWS: usize;

    /// Runs an operation compiled for this instruction set.
    fn vectorize<O: Operation>(self, operation: O) -> O::Output;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, x: &[f32; LANES]) -> Self::F;
    fn store(self, x: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a` where `a > b`, else `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a` where `a < b`, else `b`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// The magnitude.
    fn abs(self, a: Self::F) -> Self::F;
    /// Whether a lane is NaN.
    fn has_nan(self, a: Self::F) -> bool;
    /// The sum of the lanes, halves onto halves: lane `i` and `i + 8`, then `i` and `i + 4`, and so on.
    fn reduce_add(self, a: Self::F) -> f32;
    /// The largest lane, of lanes without NaN.
    fn reduce_max(self, a: Self::F) -> f32;
    /// `2^n` for integers `-126..=127`.
    fn exp2_integer(self, n: Self::F) -> Self::F;
    /// `value` where `x >= limit`, else 0.
    fn zero_below(self, x: Self::F, limit: Self::F, value: Self::F) -> Self::F;
    /// 16 bfloat16.
    fn load_bf16(self, x: &[u16; LANES]) -> Self::F;
    /// 16 little-endian binary16.
    fn load_f16(self, x: &[u8; 2 * LANES]) -> Self::F;
    /// To binary16, ties to even.
    fn store_f16(self, x: Self::F, out: &mut [u8; 2 * LANES]);

    fn splat_i32(self, x: i32) -> Self::I;
    fn load_i32(self, x: &[i32; LANES]) -> Self::I;
    fn to_f32(self, x: Self::I) -> Self::F;
    /// Whole numbers in -128..=127 as signed bytes, NaN as 0.
    fn store_i8(self, low: Self::F, high: Self::F, out: &mut [u8; 2 * LANES]);

    fn bytes(self, x: &[u8; 64]) -> Self::B;
    /// 64 signed bytes, as [`dot_q8`](Self::dot_q8) takes them.
    fn signed_bytes(self, x: &[u8; 64]) -> Self::B;
    fn store_bytes(self, x: Self::B, out: &mut [u8; 64]);
    /// The low and the high four bits of every byte.
    fn nibbles(self, x: &[u8; 64]) -> (Self::B, Self::B);
    /// What [`dot_q8`](Self::dot_q8) starts from in a block of this [`offset`](crate::rows::offset).
    fn start_q8(self, offset: i32) -> Self::I;
    /// Adds the products of 4 signed weights per lane with the 4 signed bytes of `x`.
    fn dot_q8(self, acc: Self::I, w: Self::B, x: u32) -> Self::I;
    /// Adds the products of 4 weights per lane in `0..16` with the 4 signed bytes of `x`.
    fn dot_q4(self, acc: Self::I, w: Self::B, x: u32) -> Self::I;
    /// Adds the products of 2 bfloat16 weights per lane with the 2 of `x`.
    fn dot_bf16(self, acc: Self::F, w: Self::B, x: u32) -> Self::F;

    /// Asks for a cache line that will be read soon; the address may lie behind the data.
    fn prefetch(self, line: *const u8);
}

/// One kernel, generic over the instruction set.
pub(crate) trait Operation {
    type Output;

    /// Must be `#[inline(always)]`, like all that it calls: that is how it receives the instruction set.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Smallest argument with a normal result; below it the exponential is 0.
const EXP_MIN: f32 = -87.3;
/// Largest argument; above it the exponential stays at its value here, 1.65e38.
const EXP_MAX: f32 = 88.0;
const LN2_HI: f32 = 0.693_359_4;
const LN2_LO: f32 = -2.121_944_4e-4;
/// `exp(r) = 1 + r + r^2 p(r)` for `|r| <= ln(2)/2`, highest power first: the coefficients of Cephes' `expf`,
/// as f32.
const EXP_POLYNOMIAL: [f32; 6] = [
    1.987_569_1e-4,
    1.398_2e-3,
    8.333_452e-3,
    4.166_579_6e-2,
    1.666_666_5e-1,
    0.5,
];

/// The exponential, within 2 units in the last place.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let bounded = s.min(s.max(x, s.splat(EXP_MIN)), s.splat(EXP_MAX));
    let n = s.round(s.mul(bounded, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2_HI), bounded);
    let r = s.fma(n, s.splat(-LN2_LO), r);
    let mut p = s.splat(EXP_POLYNOMIAL[0]);
    for &c in &EXP_POLYNOMIAL[1..] {
        p = s.fma(p, r, s.splat(c));
    }
    let tail = s.fma(s.mul(r, r), p, r);
    let y = s.mul(s.add(tail, s.splat(1.0)), s.exp2_integer(n));
    s.zero_below(x, s.splat(EXP_MIN), y)
}

/// `x * sigmoid(x)`.
#[inline(always)]
pub(crate) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = exp(s, s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// Up to 16 values, the missing ones zero.
#[inline(always)]
pub(crate) fn load_padded<S: Simd>(s: S, x: &[f32]) -> S::F {
    if let Some(full) = x.first_chunk() {
        return s.load(full);
    }
    let mut lanes = [0.0; LANES];
    for (lane, x) in lanes.iter_mut().zip(x) {
        *lane = *x;
    }
    s.load(&lanes)
}
