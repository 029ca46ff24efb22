//! Flash attention of a tile of rows over pages of the KV cache, for one key and value head. Decides no order.
//!
//! Online softmax (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135): for each page
//! `m' = max(m, max s)`, `l' = l exp(m - m') + sum exp(s - m')`, `o' = o exp(m - m') + sum exp(s - m') v`.
//! Scores run over d ascending, outputs over tokens ascending, each in one accumulator; `l` has sixteen
//! accumulators, one for every sixteenth token. So a row has the same bits alone and in any tile.
//!
//! With q8 keys and values, queries and the weights of a page become whole numbers of fifteen bits (see
//! [`split`]) and all products are exact in i32.

pub(crate) mod join;
mod q8;

use std::ops::Range;

use tramontane_compute::{KV_PAGE_TOKENS, KvFormat};
use tramontane_types::PageId;

use crate::cache::HeadPages;
use crate::simd::{LANES, Operation, Simd, exp};

/// Vectors of tokens in a page.
pub(crate) const TOKEN_VECTORS: usize = KV_PAGE_TOKENS / LANES;

/// Words of four tokens in a page.
pub(crate) const TOKEN_WORDS: usize = KV_PAGE_TOKENS / 4;

/// Most query heads that are computed together: they share each key and value that is loaded.
const HEADS_MAX: usize = 4;

/// Scores or weights of one page for `N` heads.
type PageWeights<const N: usize> = [[f32; KV_PAGE_TOKENS]; N];

/// Rows at consecutive positions of one sequence over consecutive pages.
#[derive(Debug)]
pub(crate) struct AttendPages<'a> {
    pub(crate) cache: HeadPages<'a>,
    pub(crate) pages: &'a [PageId],
    /// Position of the first token of the first page.
    pub(crate) first_position: usize,
    /// The positions that each row sees, inside and outside these pages.
    pub(crate) visible: &'a [Range<usize>],
    /// `[num_rows][num_heads][head_dim]`, contiguous for the heads of one row, `query_stride` from row to row.
    pub(crate) queries: &'a [f32],
    pub(crate) query_stride: usize,
    pub(crate) head_dim: usize,
    pub(crate) tile: &'a mut Tile,
}

/// The running softmax of some heads.
#[derive(Debug)]
pub(crate) struct Softmaxes<'a> {
    /// `m` of each head, minus infinity before the first page.
    pub(crate) maxima: &'a mut [f32],
    /// `l` of each head, in parts.
    pub(crate) sums: &'a mut [[f32; LANES]],
    /// `o` of each head, `[num_heads][head_dim rounded up to 16]`.
    pub(crate) outputs: &'a mut [f32],
}

/// What one thread computes a tile in.
#[derive(Debug)]
pub(crate) struct Tile {
    num_heads: usize,
    /// The queries times `1 / sqrt(head_dim)`, groups of heads with `[head_dim][heads of the group]`.
    queries: Vec<f32>,
    /// q8: their high and low numbers, `[head_dim / 4][heads of the group]`.
    high: Vec<u32>,
    low: Vec<u32>,
    /// q8: of each head.
    query_scales: Vec<QueryScale>,
    /// Keys and values of a page as f32, for all rows of the tile.
    keys: Vec<WideVector>,
    values: Vec<WideVector>,
    /// `[num_rows][num_heads]`, see [`Softmaxes`].
    pub(crate) maxima: Vec<f32>,
    pub(crate) sums: Vec<[f32; LANES]>,
    pub(crate) outputs: Vec<f32>,
}

/// One vector in one cache line.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct WideVector([f32; LANES]);

/// What turns whole numbers back into scores.
#[derive(Clone, Copy, Debug, Default)]
struct QueryScale {
    scale: f32,
    high_sum: i32,
    low_sum: i32,
}

impl Tile {
    /// Room for `num_rows` rows of `num_heads` heads.
    pub(crate) fn new(
        format: KvFormat,
        num_rows: usize,
        num_heads: usize,
        head_dim: usize,
    ) -> Self {
        let heads = num_rows * num_heads;
        let vectors = head_dim.div_ceil(LANES);
        let (words, wide) = match format {
            KvFormat::F16 => (0, 1),
            KvFormat::Q8 => (head_dim.div_ceil(4), 0),
        };
        Self {
            num_heads,
            queries: vec![0.0; heads * head_dim * wide],
            high: vec![0; heads * words],
            low: vec![0; heads * words],
            query_scales: vec![QueryScale::default(); heads],
            keys: vec![WideVector([0.0; LANES]); head_dim * TOKEN_VECTORS * wide],
            values: vec![WideVector([0.0; LANES]); KV_PAGE_TOKENS * vectors * wide],
            maxima: vec![0.0; heads],
            sums: vec![[0.0; LANES]; heads],
            outputs: vec![0.0; heads * vectors * LANES],
        }
    }

    /// The softmaxes of one row.
    pub(crate) fn row(&mut self, row: usize) -> Softmaxes<'_> {
        let heads = row * self.num_heads..(row + 1) * self.num_heads;
        let stride = self.outputs.len() / self.maxima.len();
        Softmaxes {
            maxima: &mut self.maxima[heads.clone()],
            sums: &mut self.sums[heads.clone()],
            outputs: &mut self.outputs[heads.start * stride..heads.end * stride],
        }
    }
}

/// Cuts the heads of a row into groups of [`HEADS_MAX`], then two, then one: each size is a kernel.
fn head_groups(num_heads: usize) -> impl Iterator<Item = Range<usize>> + Clone {
    let mut begin = 0;
    std::iter::from_fn(move || {
        let len = match num_heads - begin {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            _ => HEADS_MAX,
        };
        begin += len;
        Some(begin - len..begin)
    })
}

/// Calls a generic function with the number of heads in a group as its last parameter.
macro_rules! with_heads {
    ($len:expr, $function:ident::<$($parameter:ty),*>($($argument:expr),* $(,)?)) => {
        match $len {
            1 => $function::<$($parameter,)* 1>($($argument),*),
            2 => $function::<$($parameter,)* 2>($($argument),*),
            4 => $function::<$($parameter,)* 4>($($argument),*),
            other => debug_assert!(false, "{other} heads in one group"),
        }
    };
}
use with_heads;

impl Operation for AttendPages<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let num_rows = self.visible.len();
        let heads = num_rows * self.tile.num_heads;
        self.tile.maxima[..heads].fill(f32::NEG_INFINITY);
        self.tile.sums[..heads].fill([0.0; LANES]);
        let stride = self.tile.outputs.len() / self.tile.maxima.len();
        self.tile.outputs[..heads * stride].fill(0.0);
        match self.cache.format {
            KvFormat::F16 => self.attend_f16(s),
            KvFormat::Q8 => self.attend_q8(s),
        }
    }
}

/// The tokens of a page that a row sees.
#[inline(always)]
fn clip(visible: &Range<usize>, page_begin: usize) -> Range<usize> {
    let begin = visible.start.saturating_sub(page_begin).min(KV_PAGE_TOKENS);
    let end = visible.end.saturating_sub(page_begin).min(KV_PAGE_TOKENS);
    begin..end
}

impl AttendPages<'_> {
    #[inline(always)]
    fn attend_f16<S: Simd>(self, s: S) {
        let Self { head_dim, tile, .. } = self;
        let num_heads = tile.num_heads;
        let scale = 1.0 / (head_dim as f32).sqrt();
        for row in 0..self.visible.len() {
            let queries = &self.queries[row * self.query_stride..][..num_heads * head_dim];
            let packed = &mut tile.queries[row * num_heads * head_dim..][..num_heads * head_dim];
            for heads in head_groups(num_heads) {
                pack_queries(queries, heads, head_dim, scale, packed);
            }
        }
        let widen = self.visible.len() > 1;
        for (i, page) in self.pages.iter().enumerate() {
            let cached = self.cache.f16(*page);
            // Behind the last page this one again: it is in the cache.
            let next = self.cache.f16(*self.pages.get(i + 1).unwrap_or(page));
            if widen {
                widen_all(s, cached.keys, next.keys, &mut tile.keys);
                widen_all(s, cached.values, next.values, &mut tile.values);
            }
            for (row, visible) in self.visible.iter().enumerate() {
                let visible = clip(visible, self.first_position + i * KV_PAGE_TOKENS);
                if visible.is_empty() {
                    continue;
                }
                let Tile {
                    queries,
                    keys,
                    values,
                    maxima,
                    sums,
                    outputs,
                    ..
                } = &mut *tile;
                let stride = outputs.len() / maxima.len();
                for heads in head_groups(num_heads) {
                    let at = row * num_heads + heads.start..row * num_heads + heads.end;
                    let queries = &queries[at.start * head_dim..at.end * head_dim];
                    let visible = visible.clone();
                    let mut state = Softmaxes {
                        maxima: &mut maxima[at.clone()],
                        sums: &mut sums[at.clone()],
                        outputs: &mut outputs[at.start * stride..at.end * stride],
                    };
                    if widen {
                        let (keys, values) = (Wide(keys), Wide(values));
                        with_heads!(
                            heads.len(),
                            attend_page::<S, Wide<'_>>(
                                s, keys, values, queries, visible, &mut state
                            )
                        );
                    } else {
                        let keys = Narrow {
                            page: cached.keys,
                            next: next.keys,
                        };
                        let values = Narrow {
                            page: cached.values,
                            next: next.values,
                        };
                        with_heads!(
                            heads.len(),
                            attend_page::<S, Narrow<'_>>(
                                s, keys, values, queries, visible, &mut state
                            )
                        );
                    }
                }
            }
        }
    }
}

/// Lays the queries of a group of heads out as `[head_dim][heads of the group]`, times `scale`.
#[inline(always)]
fn pack_queries(
    queries: &[f32],
    heads: Range<usize>,
    head_dim: usize,
    scale: f32,
    packed: &mut [f32],
) {
    let packed = &mut packed[heads.start * head_dim..heads.end * head_dim];
    for (h, head) in heads.clone().enumerate() {
        let query = &queries[head * head_dim..(head + 1) * head_dim];
        for (packed, query) in packed.chunks_exact_mut(heads.len()).zip(query) {
            packed[h] = query * scale;
        }
    }
}

/// Converts a whole part of a page; asks for the same part of the next one.
#[inline(always)]
fn widen_all<S: Simd>(s: S, from: &[u16], next: &[u16], to: &mut [WideVector]) {
    let (from, next) = (from.as_chunks::<LANES>().0, next.as_chunks::<LANES>().0);
    for ((from, next), to) in from.iter().zip(next).zip(to) {
        s.prefetch(next.as_ptr().cast());
        s.store(s.load_f16(bytemuck::cast_ref(from)), &mut to.0);
    }
}

/// Rows of vectors of f32, stored as such or not.
trait Source<S: Simd>: Copy {
    /// `V` vectors of a row of `stride` vectors, from vector `col` on.
    fn load<const V: usize>(self, s: S, row: usize, stride: usize, col: usize) -> [S::F; V];
}

/// Converted before, see [`widen_all`].
#[derive(Clone, Copy)]
struct Wide<'a>(&'a [WideVector]);

impl<S: Simd> Source<S> for Wide<'_> {
    #[inline(always)]
    fn load<const V: usize>(self, s: S, row: usize, stride: usize, col: usize) -> [S::F; V] {
        let vectors = &self.0[row * stride + col..][..V];
        let mut loaded = [s.splat(0.0); V];
        for v in 0..V {
            loaded[v] = s.load(&vectors[v].0);
        }
        loaded
    }
}

/// Converted on the way. Asks for the same place of the next page, which is nowhere near.
#[derive(Clone, Copy)]
struct Narrow<'a> {
    page: &'a [u16],
    next: &'a [u16],
}

impl<S: Simd> Source<S> for Narrow<'_> {
    #[inline(always)]
    fn load<const V: usize>(self, s: S, row: usize, stride: usize, col: usize) -> [S::F; V] {
        let at = row * stride + col;
        let vectors = &self.page.as_chunks::<LANES>().0[at..][..V];
        let next = self.next.as_ptr().wrapping_add(at * LANES);
        for line in 0..V.div_ceil(2) {
            s.prefetch(next.wrapping_add(line * 2 * LANES).cast());
        }
        let mut loaded = [s.splat(0.0); V];
        for v in 0..V {
            loaded[v] = s.load_f16(bytemuck::cast_ref(&vectors[v]));
        }
        loaded
    }
}

/// One page for one group of heads of one row. `queries` are `[head_dim][N]` and scaled.
#[inline(always)]
fn attend_page<S: Simd, L: Source<S>, const N: usize>(
    s: S,
    keys: L,
    values: L,
    queries: &[f32],
    visible: Range<usize>,
    state: &mut Softmaxes<'_>,
) {
    let queries = queries.as_chunks::<N>().0;
    let mut weights: PageWeights<N> = [[0.0; KV_PAGE_TOKENS]; N];
    if has_many_registers::<S>() {
        scores::<S, L, N, TOKEN_VECTORS>(s, keys, queries, &mut weights);
    } else {
        scores::<S, L, N, 1>(s, keys, queries, &mut weights);
    }
    let rescale = softmax::<S, N>(s, &mut weights, &visible, state.maxima, state.sums);
    let stride = state.outputs.len() / N / LANES;
    let mut col = 0;
    while has_many_registers::<S>() && col + TOKEN_VECTORS <= stride {
        let (weights, visible) = ((&weights, &rescale), visible.clone());
        let at = (stride, col);
        add_values::<S, L, N, 4>(s, values, weights, visible, at, state.outputs);
        col += 4;
    }
    while col < stride {
        let (weights, visible) = ((&weights, &rescale), visible.clone());
        let at = (stride, col);
        add_values::<S, L, N, 1>(s, values, weights, visible, at, state.outputs);
        col += 1;
    }
}

/// Whether [`HEADS_MAX`] times four accumulators fit in registers.
const fn has_many_registers<S: Simd>() -> bool {
    S::TILE_ROWS > HEADS_MAX
}

/// The products of queries and keys, `V` vectors of tokens at a time.
#[inline(always)]
fn scores<S: Simd, L: Source<S>, const N: usize, const V: usize>(
    s: S,
    keys: L,
    queries: &[[f32; N]],
    scores: &mut PageWeights<N>,
) {
    for begin in (0..TOKEN_VECTORS).step_by(V) {
        let mut acc = [[s.splat(0.0); V]; N];
        for (d, query) in queries.iter().enumerate() {
            let keys: [S::F; V] = keys.load(s, d, TOKEN_VECTORS, begin);
            for v in 0..V {
                for h in 0..N {
                    acc[h][v] = s.fma(s.splat(query[h]), keys[v], acc[h][v]);
                }
            }
        }
        for h in 0..N {
            let vectors = &mut scores[h].as_chunks_mut::<LANES>().0[begin..][..V];
            for v in 0..V {
                s.store(acc[h][v], &mut vectors[v]);
            }
        }
    }
}

/// Turns scores into weights relative to the new maxima; returns the factors for what came before.
#[inline(always)]
fn softmax<S: Simd, const N: usize>(
    s: S,
    scores: &mut PageWeights<N>,
    visible: &Range<usize>,
    maxima: &mut [f32],
    sums: &mut [[f32; LANES]],
) -> [f32; LANES] {
    let mut drops = [0.0; LANES];
    for h in 0..N {
        scores[h][..visible.start].fill(f32::NEG_INFINITY);
        scores[h][visible.end..].fill(f32::NEG_INFINITY);
        let vectors = scores[h].as_chunks::<LANES>().0;
        let mut largest = s.splat(maxima[h]);
        for vector in vectors {
            largest = s.max(s.load(vector), largest);
        }
        let largest = s.reduce_max(largest);
        drops[h] = maxima[h] - largest;
        maxima[h] = largest;
    }
    let mut rescale = [0.0; LANES];
    s.store(exp(s, s.load(&drops)), &mut rescale);
    for h in 0..N {
        let largest = s.splat(maxima[h]);
        let mut sum = s.mul(s.load(&sums[h]), s.splat(rescale[h]));
        for vector in scores[h].as_chunks_mut::<LANES>().0 {
            let weight = exp(s, s.sub(s.load(vector), largest));
            sum = s.add(sum, weight);
            s.store(weight, vector);
        }
        s.store(sum, &mut sums[h]);
    }
    rescale
}

/// `outputs = outputs * rescale + weights . values` over the visible tokens, for `V` of `stride` vectors.
#[inline(always)]
fn add_values<S: Simd, L: Source<S>, const N: usize, const V: usize>(
    s: S,
    values: L,
    (weights, rescale): (&PageWeights<N>, &[f32; LANES]),
    visible: Range<usize>,
    (stride, col): (usize, usize),
    outputs: &mut [f32],
) {
    let outputs = outputs.as_chunks_mut::<LANES>().0;
    let mut acc = [[s.splat(0.0); V]; N];
    for h in 0..N {
        let vectors = &outputs[h * stride + col..][..V];
        for v in 0..V {
            acc[h][v] = s.mul(s.load(&vectors[v]), s.splat(rescale[h]));
        }
    }
    for token in visible {
        let values: [S::F; V] = values.load(s, token, stride, col);
        for v in 0..V {
            for h in 0..N {
                acc[h][v] = s.fma(s.splat(weights[h][token]), values[v], acc[h][v]);
            }
        }
    }
    for h in 0..N {
        let vectors = &mut outputs[h * stride + col..][..V];
        for v in 0..V {
            s.store(acc[h][v], &mut vectors[v]);
        }
    }
}
