//! Row-wise steps of a layer: RMS norm, scores of the gate, rotary embedding. No matrices.

use crate::simd::{LANES, Operation, Simd, exp, load_padded};

/// `out = x / sqrt(mean(x^2) + eps) * weight`.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Operation for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut squares = s.splat(0.0);
        for x in self.x.chunks(LANES) {
            let x = load_padded(s, x);
            squares = s.fma(x, x, squares);
        }
        let mean = s.reduce_add(squares) / self.x.len() as f32;
        // Squares beyond f32 would make zeros of the row: it is refused as NaN like one that is not finite.
        let inverse = if mean.is_finite() {
            1.0 / (mean + self.eps).sqrt()
        } else {
            f32::NAN
        };
        let (x, weight) = (&self.x[..self.out.len()], &self.weight[..self.out.len()]);
        for i in 0..self.out.len() {
            self.out[i] = x[i] * inverse * weight[i];
        }
    }
}

/// Rows of the gate that are computed together: each sum has a chain of its own.
const GATE_ROWS: usize = 8;

/// The scores of all experts: `weights` (`[num_experts][hidden]`) times `x`.
pub(crate) struct Gate<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weights: &'a [f32],
    /// `[num_experts]`
    pub(crate) out: &'a mut [f32],
}

impl Operation for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let hidden = self.x.len();
        let groups = self.weights.chunks(GATE_ROWS * hidden);
        for (out, weights) in self.out.chunks_mut(GATE_ROWS).zip(groups) {
            if out.len() == GATE_ROWS {
                gate_rows::<S, GATE_ROWS>(s, self.x, weights, out);
                continue;
            }
            for (out, weights) in out.chunks_mut(1).zip(weights.chunks(hidden)) {
                gate_rows::<S, 1>(s, self.x, weights, out);
            }
        }
    }
}

#[inline(always)]
fn gate_rows<S: Simd, const N: usize>(s: S, x: &[f32], weights: &[f32], out: &mut [f32]) {
    let mut sums = [s.splat(0.0); N];
    for (i, chunk) in x.chunks(LANES).enumerate() {
        let at = i * LANES..i * LANES + chunk.len();
        let x_lanes = load_padded(s, chunk);
        for (n, sum) in sums.iter_mut().enumerate() {
            let row = &weights[n * x.len()..(n + 1) * x.len()];
            *sum = s.fma(x_lanes, load_padded(s, &row[at.clone()]), *sum);
        }
    }
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = s.reduce_add(sum);
    }
}

/// Rotates heads in place: element `i` with element `i + head_dim / 2` (the "half-split" form of the
/// published checkpoints). `cos` and `sin` have `head_dim / 2` elements.
pub(crate) struct Rotate<'a> {
    pub(crate) heads: &'a mut [f32],
    pub(crate) cos: &'a [f32],
    pub(crate) sin: &'a [f32],
}

impl Operation for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let half = self.cos.len();
        let sin = &self.sin[..half];
        for head in self.heads.chunks_exact_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for i in 0..half {
                let (x, y) = (low[i], high[i]);
                low[i] = x * self.cos[i] - y * sin[i];
                high[i] = y * self.cos[i] + x * sin[i];
            }
        }
    }
}

/// Softmax in place.
pub(crate) struct Softmax<'a> {
    pub(crate) x: &'a mut [f32],
}

impl Operation for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut largest = f32::NEG_INFINITY;
        for &x in self.x.iter() {
            largest = largest.max(x);
        }
        let mut sum = 0.0;
        for chunk in self.x.chunks_mut(LANES) {
            let mut lanes = [0.0; LANES];
            s.store(
                exp(s, s.sub(load_padded(s, chunk), s.splat(largest))),
                &mut lanes,
            );
            for (x, lane) in chunk.iter_mut().zip(lanes) {
                *x = lane;
                sum += lane;
            }
        }
        for x in self.x.iter_mut() {
            *x /= sum;
        }
    }
}
