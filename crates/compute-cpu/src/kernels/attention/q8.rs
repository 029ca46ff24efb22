//! Attention over q8 pages: whole-number products of fifteen-bit queries and weights with signed bytes. Decides no order.

use std::ops::Range;

use tramontane_compute::KV_PAGE_TOKENS;

use super::{
    AttendPages, PageWeights, QueryScale, Softmaxes, TOKEN_VECTORS, TOKEN_WORDS, Tile, clip,
    has_many_registers, head_groups, softmax, with_heads,
};
use crate::cache::Q8Page;
use crate::rows::offset;
use crate::simd::{LANES, Simd};

/// What the high part of a number counts. Not 256: then a low part could be -128, whose negative is no byte.
const STEP: f32 = 254.0;

/// The largest number that [`split`] takes.
const SPLIT_MAX: f32 = 127.0 * STEP;

/// Added to a whole number of few bits, it leaves them at the low end of the sum's bits.
const TO_BITS: f32 = 12_582_912.0; // 1.5 * 2^23

/// Whole numbers up to [`SPLIT_MAX`] as `254 high + low`, both whole and in `-127..=127`.
#[inline(always)]
fn split<S: Simd>(s: S, x: S::F) -> (S::F, S::F) {
    let high = s.round(s.mul(x, s.splat(1.0 / STEP)));
    let low = s.fma(high, s.splat(-STEP), x);
    (high, low)
}

/// The low bytes of whole numbers.
#[inline(always)]
fn store_bytes<S: Simd>(s: S, x: S::F, out: &mut [u8]) {
    let mut sums = [0.0_f32; LANES];
    s.store(s.add(x, s.splat(TO_BITS)), &mut sums);
    for (out, sum) in out.iter_mut().zip(sums) {
        *out = sum.to_bits() as u8;
    }
}

impl AttendPages<'_> {
    #[inline(always)]
    pub(super) fn attend_q8<S: Simd>(self, s: S) {
        let Self { head_dim, tile, .. } = self;
        let num_heads = tile.num_heads;
        let words = head_dim.div_ceil(4);
        for row in 0..self.visible.len() {
            let queries = &self.queries[row * self.query_stride..][..num_heads * head_dim];
            for heads in head_groups(num_heads) {
                round_queries(s, queries, heads, head_dim, row * num_heads, tile);
            }
        }
        for (i, page) in self.pages.iter().enumerate() {
            let cached = self.cache.q8(*page);
            let next = self.cache.q8(*self.pages.get(i + 1).unwrap_or(page));
            for (row, visible) in self.visible.iter().enumerate() {
                let visible = clip(visible, self.first_position + i * KV_PAGE_TOKENS);
                if visible.is_empty() {
                    continue;
                }
                let Tile {
                    high,
                    low,
                    query_scales,
                    maxima,
                    sums,
                    outputs,
                    ..
                } = &mut *tile;
                let stride = outputs.len() / maxima.len();
                for heads in head_groups(num_heads) {
                    let at = row * num_heads + heads.start..row * num_heads + heads.end;
                    let queries = Queries {
                        high: &high[at.start * words..at.end * words],
                        low: &low[at.start * words..at.end * words],
                        scales: &query_scales[at.clone()],
                    };
                    let mut state = Softmaxes {
                        maxima: &mut maxima[at.clone()],
                        sums: &mut sums[at.clone()],
                        outputs: &mut outputs[at.start * stride..at.end * stride],
                    };
                    with_heads!(
                        heads.len(),
                        attend_page::<S>(s, (cached, next), &queries, visible.clone(), &mut state)
                    );
                }
            }
        }
    }
}

/// Queries of one group of heads.
struct Queries<'a> {
    /// `[head_dim / 4][N]` words of four signed bytes.
    high: &'a [u32],
    low: &'a [u32],
    /// `[N]`
    scales: &'a [QueryScale],
}

/// Rounds the queries of a group of heads: `d = amax / 32258`, `q = round(x / d)`.
#[inline(always)]
fn round_queries<S: Simd>(
    s: S,
    queries: &[f32],
    heads: Range<usize>,
    head_dim: usize,
    first_head: usize,
    tile: &mut Tile,
) {
    let words = head_dim.div_ceil(4);
    let len = heads.len();
    let at = (first_head + heads.start) * words..(first_head + heads.end) * words;
    let (high_words, low_words) = (&mut tile.high[at.clone()], &mut tile.low[at]);
    let factor = 1.0 / (head_dim as f32).sqrt();
    for (h, head) in heads.enumerate() {
        let query = &queries[head * head_dim..(head + 1) * head_dim];
        let mut amax = s.splat(0.0);
        let mut poison = s.splat(0.0);
        for x in query.chunks(LANES) {
            let x = crate::simd::load_padded(s, x);
            amax = s.max(s.abs(x), amax);
            // NaN where x is not finite, and stays it.
            poison = s.fma(x, s.splat(0.0), poison);
        }
        let scale = s.reduce_max(amax) / SPLIT_MAX + s.reduce_add(poison);
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        let (mut high_sum, mut low_sum) = (s.splat(0.0), s.splat(0.0));
        for (i, x) in query.chunks(LANES).enumerate() {
            let x = s.round(s.mul(crate::simd::load_padded(s, x), s.splat(inverse)));
            let (high, low) = split(s, x);
            high_sum = s.add(high_sum, high);
            low_sum = s.add(low_sum, low);
            let mut bytes = [[0; LANES]; 2];
            store_bytes(s, high, &mut bytes[0]);
            store_bytes(s, low, &mut bytes[1]);
            for (j, (high, low)) in bytes[0]
                .as_chunks()
                .0
                .iter()
                .zip(bytes[1].as_chunks().0)
                .enumerate()
            {
                let word = 4 * i + j;
                if word < words {
                    high_words[word * len + h] = u32::from_le_bytes(*high);
                    low_words[word * len + h] = u32::from_le_bytes(*low);
                }
            }
        }
        tile.query_scales[first_head + head] = QueryScale {
            scale: scale * factor,
            high_sum: s.reduce_add(high_sum) as i32,
            low_sum: s.reduce_add(low_sum) as i32,
        };
    }
}

/// One page for one group of heads of one row.
#[inline(always)]
fn attend_page<S: Simd, const N: usize>(
    s: S,
    (page, next): (Q8Page<'_>, Q8Page<'_>),
    queries: &Queries<'_>,
    visible: Range<usize>,
    state: &mut Softmaxes<'_>,
) {
    let mut weights: PageWeights<N> = [[0.0; KV_PAGE_TOKENS]; N];
    if has_many_registers::<S>() {
        scores::<S, N, TOKEN_VECTORS>(s, page, next, queries, &mut weights);
    } else {
        scores::<S, N, 1>(s, page, next, queries, &mut weights);
    }
    let rescale = softmax::<S, N>(s, &mut weights, &visible, state.maxima, state.sums);
    let mut rounded = RoundedWeights::<N>::default();
    for (h, weights) in weights.iter_mut().enumerate() {
        weigh(s, weights, page.value_scales, &visible);
        rounded.round(s, h, weights, &mut state.sums[h]);
    }
    let words = visible.start / 4..visible.end.div_ceil(4);
    let stride = state.outputs.len() / N / LANES;
    let mut col = 0;
    while has_many_registers::<S>() && col + 4 <= stride {
        let (at, words) = ((stride, col), words.clone());
        let weights = (&rounded, &rescale);
        add_values::<S, N, 4>(s, (page, next), weights, words, at, state.outputs);
        col += 4;
    }
    while col < stride {
        let (at, words) = ((stride, col), words.clone());
        let weights = (&rounded, &rescale);
        add_values::<S, N, 1>(s, (page, next), weights, words, at, state.outputs);
        col += 1;
    }
}

/// `(254 high . k + low . k) * query scale * key scale`, `V` vectors of tokens at a time.
#[inline(always)]
fn scores<S: Simd, const N: usize, const V: usize>(
    s: S,
    page: Q8Page<'_>,
    next: Q8Page<'_>,
    queries: &Queries<'_>,
    scores: &mut PageWeights<N>,
) {
    let key_scales = page.key_scales.as_chunks::<LANES>().0;
    let (highs, lows) = (
        queries.high.as_chunks::<N>().0,
        queries.low.as_chunks::<N>().0,
    );
    for begin in (0..TOKEN_VECTORS).step_by(V) {
        let mut acc = [[s.start_q8(0); V]; N];
        for (acc, scale) in acc.iter_mut().zip(queries.scales) {
            *acc = [s.start_q8(offset(scale.high_sum)); V];
        }
        for (word, high) in highs.iter().enumerate() {
            let at = word * TOKEN_VECTORS + begin;
            let lines = &page.keys[at..][..V];
            for v in 0..V {
                let keys = s.signed_bytes(&lines[v].0);
                s.prefetch(next.keys.as_ptr().wrapping_add(at + v).cast());
                for h in 0..N {
                    acc[h][v] = s.dot_q8(acc[h][v], keys, high[h]);
                }
            }
        }
        for h in 0..N {
            let vectors = &mut scores[h].as_chunks_mut::<LANES>().0[begin..][..V];
            for v in 0..V {
                s.store(s.to_f32(acc[h][v]), &mut vectors[v]);
            }
            acc[h] = [s.start_q8(offset(queries.scales[h].low_sum)); V];
        }
        for (word, low) in lows.iter().enumerate() {
            let lines = &page.keys[word * TOKEN_VECTORS + begin..][..V];
            for v in 0..V {
                let keys = s.signed_bytes(&lines[v].0);
                for h in 0..N {
                    acc[h][v] = s.dot_q8(acc[h][v], keys, low[h]);
                }
            }
        }
        for h in 0..N {
            let vectors = &mut scores[h].as_chunks_mut::<LANES>().0[begin..][..V];
            let query_scale = s.splat(queries.scales[h].scale);
            for v in 0..V {
                let high = s.load(&vectors[v]);
                let dot = s.fma(high, s.splat(STEP), s.to_f32(acc[h][v]));
                let scale = s.mul(query_scale, s.load(&key_scales[begin + v]));
                s.store(s.mul(dot, scale), &mut vectors[v]);
            }
        }
    }
}

/// Weights times the scales of the values. What is not visible has weight 0, but its scale may be anything.
#[inline(always)]
fn weigh<S: Simd>(
    s: S,
    weights: &mut [f32; KV_PAGE_TOKENS],
    value_scales: &[f32; KV_PAGE_TOKENS],
    visible: &Range<usize>,
) {
    let scales = value_scales.as_chunks::<LANES>().0;
    for (weights, scales) in weights.as_chunks_mut().0.iter_mut().zip(scales) {
        let product = s.mul(s.load(weights), s.load(scales));
        s.store(product, weights);
    }
    weights[..visible.start].fill(0.0);
    weights[visible.end..].fill(0.0);
}

/// The weights of a page times the scales of its values, rounded: `d = max / 32258`, `q = round(x / d)`.
struct RoundedWeights<const N: usize> {
    /// Signed bytes of the tokens.
    high: [[u8; KV_PAGE_TOKENS]; N],
    low: [[u8; KV_PAGE_TOKENS]; N],
    high_sums: [i32; N],
    low_sums: [i32; N],
    scales: [f32; N],
}

impl<const N: usize> Default for RoundedWeights<N> {
    #[inline(always)]
    fn default() -> Self {
        Self {
            high: [[0; KV_PAGE_TOKENS]; N],
            low: [[0; KV_PAGE_TOKENS]; N],
            high_sums: [0; N],
            low_sums: [0; N],
            scales: [0.0; N],
        }
    }
}

impl<const N: usize> RoundedWeights<N> {
    /// Rounds the weights of one head. A scale that is NaN makes its sum NaN.
    #[inline(always)]
    fn round<S: Simd>(
        &mut self,
        s: S,
        h: usize,
        weights: &[f32; KV_PAGE_TOKENS],
        sum: &mut [f32; LANES],
    ) {
        let (vectors, zero) = (weights.as_chunks::<LANES>().0, s.splat(0.0));
        let (mut largest, mut total) = (zero, s.load(sum));
        for x in vectors {
            let x = s.load(x);
            largest = s.max(x, largest);
            total = s.fma(x, zero, total);
        }
        s.store(total, sum);
        let scale = s.reduce_max(largest) / SPLIT_MAX;
        let inverse = 1.0 / scale;
        let inverse = s.splat(if inverse.is_finite() { inverse } else { 0.0 });
        let (mut high_sum, mut low_sum) = (zero, zero);
        for (v, x) in vectors.iter().enumerate() {
            let (high, low) = split(s, s.round(s.mul(s.load(x), inverse)));
            high_sum = s.add(high_sum, high);
            low_sum = s.add(low_sum, low);
            store_bytes(s, high, &mut self.high[h][v * LANES..(v + 1) * LANES]);
            store_bytes(s, low, &mut self.low[h][v * LANES..(v + 1) * LANES]);
        }
        self.high_sums[h] = s.reduce_add(high_sum) as i32;
        self.low_sums[h] = s.reduce_add(low_sum) as i32;
        self.scales[h] = scale;
    }
}

/// `outputs = outputs * rescale + (254 high . v + low . v) * scale`, for `V` of `stride` vectors.
#[inline(always)]
fn add_values<S: Simd, const N: usize, const V: usize>(
    s: S,
    (page, next): (Q8Page<'_>, Q8Page<'_>),
    (weights, rescale): (&RoundedWeights<N>, &[f32; LANES]),
    words: Range<usize>,
    (stride, col): (usize, usize),
    outputs: &mut [f32],
) {
    let outputs = outputs.as_chunks_mut::<LANES>().0;
    let at = (stride, col);
    let (bytes, sums) = (&weights.high, &weights.high_sums);
    let high = dot_values::<S, N, V, true>(s, (page, next), (bytes, sums), words.clone(), at);
    let (bytes, sums) = (&weights.low, &weights.low_sums);
    let low = dot_values::<S, N, V, false>(s, (page, next), (bytes, sums), words, at);
    for h in 0..N {
        let vectors = &mut outputs[h * stride + col..][..V];
        for v in 0..V {
            let sum = s.fma(high[h][v], s.splat(STEP), low[h][v]);
            let before = s.mul(s.load(&vectors[v]), s.splat(rescale[h]));
            let after = s.fma(sum, s.splat(weights.scales[h]), before);
            s.store(after, &mut vectors[v]);
        }
    }
}

/// Signed bytes of tokens and their sum, for `N` heads.
type TokenBytes<'a, const N: usize> = (&'a [[u8; KV_PAGE_TOKENS]; N], &'a [i32; N]);

/// The products of one part of the weights with `V` of `stride` vectors of values; exact.
#[inline(always)]
fn dot_values<S: Simd, const N: usize, const V: usize, const PREFETCH: bool>(
    s: S,
    (page, next): (Q8Page<'_>, Q8Page<'_>),
    (bytes, sums): TokenBytes<'_, N>,
    words: Range<usize>,
    (stride, col): (usize, usize),
) -> [[S::F; V]; N] {
    let mut acc = [[s.start_q8(0); V]; N];
    for h in 0..N {
        acc[h] = [s.start_q8(offset(sums[h])); V];
    }
    for word in words {
        let at = word * stride + col;
        let lines = &page.values[at..][..V];
        for v in 0..V {
            let values = s.signed_bytes(&lines[v].0);
            if PREFETCH {
                s.prefetch(next.values.as_ptr().wrapping_add(at + v).cast());
            }
            for h in 0..N {
                let weights = bytes[h].as_chunks::<4>().0[word % TOKEN_WORDS];
                acc[h][v] = s.dot_q8(acc[h][v], values, u32::from_le_bytes(weights));
            }
        }
    }
    let mut out = [[s.splat(0.0); V]; N];
    for h in 0..N {
        for v in 0..V {
            out[h][v] = s.to_f32(acc[h][v]);
        }
    }
    out
}
