//! Softmaxes over parts of a context become one, and then attention outputs. Reads no page.

use super::Softmaxes;
use crate::simd::{LANES, Operation, Simd, exp};

/// `into` and `from` become the softmax over the tokens of both; `into` has the earlier ones.
pub(crate) struct Merge<'a> {
    pub(crate) into: Softmaxes<'a>,
    pub(crate) from: Softmaxes<'a>,
}

impl Operation for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { into, from } = self;
        let stride = into.outputs.len() / into.maxima.len();
        for h in 0..into.maxima.len() {
            let (a, b) = (into.maxima[h], from.maxima[h]);
            let largest = if b > a { b } else { a };
            into.maxima[h] = largest;
            let mut factors = [0.0; LANES];
            factors[0] = a - largest;
            factors[1] = b - largest;
            let drops = s.load(&factors);
            s.store(exp(s, drops), &mut factors);
            let factors = (s.splat(factors[0]), s.splat(factors[1]));
            add_scaled(s, &mut into.sums[h], &from.sums[h], factors);
            let outputs = &mut into.outputs[h * stride..(h + 1) * stride];
            let others = &from.outputs[h * stride..(h + 1) * stride];
            let outputs = outputs.as_chunks_mut().0.iter_mut();
            for (x, y) in outputs.zip(others.as_chunks().0) {
                add_scaled(s, x, y, factors);
            }
        }
    }
}

/// `x = x * a + y * b`. Not a closure: one that is not inlined would lose the instruction set.
#[inline(always)]
fn add_scaled<S: Simd>(s: S, x: &mut [f32; LANES], y: &[f32; LANES], (a, b): (S::F, S::F)) {
    s.store(s.fma(s.load(y), b, s.mul(s.load(x), a)), x);
}

/// `o / l` of each head, `[num_heads][head_dim]`.
pub(crate) struct Finish<'a> {
    pub(crate) softmaxes: Softmaxes<'a>,
    pub(crate) head_dim: usize,
    pub(crate) out: &'a mut [f32],
}

impl Operation for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Softmaxes {
            maxima,
            sums,
            outputs,
        } = self.softmaxes;
        let stride = outputs.len() / maxima.len();
        let heads = outputs.chunks_exact(stride).zip(sums);
        for (out, (output, sum)) in self.out.chunks_exact_mut(self.head_dim).zip(heads) {
            let sum = s.reduce_add(s.load(sum));
            for (x, o) in out.iter_mut().zip(output) {
                *x = o / sum;
            }
        }
    }
}
