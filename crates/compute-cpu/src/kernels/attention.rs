//! Flash attention of one row over one page of the KV cache. Keeps the running softmax, decides no order.
//!
//! Online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135): for each page
//! `m' = max(m, max s)`, `l' = l exp(m - m') + sum exp(s - m')`, `o' = o exp(m - m') + sum exp(s - m') v`.
//! Scores run over d ascending, outputs over tokens ascending, each in one accumulator.

use tramontane_compute::KV_PAGE_TOKENS;

use crate::simd::{LANES, Operation, Simd, exp, reduce_add, reduce_max};

/// Vectors of tokens in a page.
const TOKEN_VECTORS: usize = KV_PAGE_TOKENS / LANES;

/// Most query heads that one call takes: they share the keys and values that it loads.
pub(crate) const HEADS_MAX: usize = 4;

/// One page, for heads of the same group of one row.
pub(crate) struct AttendPage<'a> {
    /// `[head_dim][64]` bf16.
    pub(crate) keys: &'a [u16],
    /// `[64][head_dim rounded up to 16]` bf16.
    pub(crate) values: &'a [u16],
    /// The tokens of the page that the row sees; not empty.
    pub(crate) visible: std::ops::Range<usize>,
    /// `1 / sqrt(head_dim)`.
    pub(crate) scale: f32,
    /// `[num_heads][head_dim]`, 1 to [`HEADS_MAX`] heads.
    pub(crate) queries: &'a [f32],
    /// `[num_heads]`: `m`, minus infinity before the first page.
    pub(crate) maxima: &'a mut [f32],
    /// `[num_heads]`: `l`.
    pub(crate) sums: &'a mut [f32],
    /// `[num_heads][head_dim rounded up to 16]`: `o`.
    pub(crate) outputs: &'a mut [f32],
}

impl Operation for AttendPage<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.maxima.len() {
            1 => self.run_heads::<S, 1>(s),
            2 => self.run_heads::<S, 2>(s),
            3 => self.run_heads::<S, 3>(s),
            4 => self.run_heads::<S, 4>(s),
            other => debug_assert!(false, "{other} heads in one call"),
        }
    }
}

impl AttendPage<'_> {
    #[inline(always)]
    fn run_heads<S: Simd, const H: usize>(self, s: S) {
        let head_dim = self.queries.len() / H;
        let (key_rows, _) = self.keys.as_chunks::<KV_PAGE_TOKENS>();
        let mut scores = [[s.splat(0.0); TOKEN_VECTORS]; H];
        for (d, keys) in key_rows.iter().enumerate() {
            let (vectors, _) = keys.as_chunks::<LANES>();
            for v in 0..TOKEN_VECTORS {
                let key = s.load_bf16(&vectors[v]);
                for (h, scores) in scores.iter_mut().enumerate() {
                    let query = s.splat(self.queries[h * head_dim + d]);
                    scores[v] = s.fma(query, key, scores[v]);
                }
            }
        }
        let mut weights = [[0.0; KV_PAGE_TOKENS]; H];
        let mut rescale = [0.0; H];
        for h in 0..H {
            let (vectors, _) = weights[h].as_chunks_mut::<LANES>();
            for v in 0..TOKEN_VECTORS {
                s.store(s.mul(scores[h][v], s.splat(self.scale)), &mut vectors[v]);
            }
            rescale[h] = softmax_page(
                s,
                &mut weights[h],
                self.visible.clone(),
                &mut self.maxima[h],
                &mut self.sums[h],
            );
        }
        add_values::<S, H>(
            s,
            &weights,
            &rescale,
            self.values,
            self.visible,
            self.outputs,
        );
    }
}

/// Turns scores into weights relative to the new maximum; returns the factor for what came before.
#[inline(always)]
fn softmax_page<S: Simd>(
    s: S,
    scores: &mut [f32; KV_PAGE_TOKENS],
    visible: std::ops::Range<usize>,
    maximum: &mut f32,
    sum: &mut f32,
) -> f32 {
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    let (vectors, _) = scores.as_chunks_mut::<LANES>();
    let mut largest = s.splat(*maximum);
    for vector in vectors.iter() {
        largest = s.max(s.load(vector), largest);
    }
    let largest = reduce_max(s, largest);
    let mut page_sum = s.splat(0.0);
    for vector in vectors.iter_mut() {
        let weight = exp(s, s.sub(s.load(vector), s.splat(largest)));
        page_sum = s.add(page_sum, weight);
        s.store(weight, vector);
    }
    let mut rescale = [0.0; LANES];
    s.store(exp(s, s.splat(*maximum - largest)), &mut rescale);
    *maximum = largest;
    *sum = *sum * rescale[0] + reduce_add(s, page_sum);
    rescale[0]
}

/// `outputs = outputs * rescale + weights . values` over the visible tokens.
#[inline(always)]
fn add_values<S: Simd, const H: usize>(
    s: S,
    weights: &[[f32; KV_PAGE_TOKENS]; H],
    rescale: &[f32; H],
    values: &[u16],
    visible: std::ops::Range<usize>,
    outputs: &mut [f32],
) {
    let stride = outputs.len() / H;
    let mut col = 0;
    while col + 4 * LANES <= stride {
        add_value_columns::<S, H, 4>(s, weights, rescale, values, &visible, outputs, stride, col);
        col += 4 * LANES;
    }
    while col + LANES <= stride {
        add_value_columns::<S, H, 1>(s, weights, rescale, values, &visible, outputs, stride, col);
        col += LANES;
    }
}

/// [`add_values`] for `16 * V` columns from `col` on.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "the inner half of one loop, with its accumulators in registers"
)]
fn add_value_columns<S: Simd, const H: usize, const V: usize>(
    s: S,
    weights: &[[f32; KV_PAGE_TOKENS]; H],
    rescale: &[f32; H],
    values: &[u16],
    visible: &std::ops::Range<usize>,
    outputs: &mut [f32],
    stride: usize,
    col: usize,
) {
    let mut acc = [[s.splat(0.0); V]; H];
    for h in 0..H {
        let (vectors, _) = outputs[h * stride + col..][..V * LANES].as_chunks::<LANES>();
        for v in 0..V {
            acc[h][v] = s.mul(s.load(&vectors[v]), s.splat(rescale[h]));
        }
    }
    for token in visible.clone() {
        let (vectors, _) = values[token * stride + col..][..V * LANES].as_chunks::<LANES>();
        for v in 0..V {
            let value = s.load_bf16(&vectors[v]);
            for h in 0..H {
                acc[h][v] = s.fma(s.splat(weights[h][token]), value, acc[h][v]);
            }
        }
    }
    for h in 0..H {
        let (vectors, _) = outputs[h * stride + col..][..V * LANES].as_chunks_mut::<LANES>();
        for v in 0..V {
            s.store(acc[h][v], &mut vectors[v]);
        }
    }
}
