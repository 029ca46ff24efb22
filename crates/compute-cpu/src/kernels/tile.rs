//! The matrix kernel: rows of activations times one pair of panels. Never depends on how many rows.
//!
//! Every output has one accumulator that walks k in ascending blocks of 32, so a result is the same in
//! a tile of one row and of six. See [`tramontane_compute::quant`] for the formula of a q8 block.

use crate::pack::{BF16_LINES, Line, PackFormat, PackedMatrix, Q4_LINES, Q8_LINES};
use crate::rows::{GROUP_ROWS, RowRef, Rows};
use crate::simd::{LANES, Operation, Simd};

/// Most rows of one tile, whole groups: what a caller keeps on its stack.
pub(crate) const TILE_ROWS_MAX: usize = 4 * GROUP_ROWS;

/// How far ahead of the reads a tile asks for weights when it reads them once: far enough for the memory
/// to answer in time, near enough not to drive what will be used out of the first caches.
const AHEAD_LINES: usize = 128;

/// The 32 outputs of one row: panel a, panel b.
pub(crate) type TileRow = [[f32; LANES]; 2];

/// The outputs of a tile, for a caller's stack; whole cache lines, as kernels store them.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(crate) struct TileOut(pub(crate) [TileRow; TILE_ROWS_MAX]);

impl TileOut {
    pub(crate) const ZERO: Self = Self([[[0.0; LANES]; 2]; TILE_ROWS_MAX]);
}

/// `out[i] = pair . rows[row_begin + i]` over all blocks of the matrix, read in the rows from `block_begin`
/// on.
pub(crate) struct Tile<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) pair: usize,
    pub(crate) rows: &'a Rows,
    /// Begins a group of rows.
    pub(crate) row_begin: usize,
    /// At most [`TILE_ROWS_MAX`].
    pub(crate) num_rows: usize,
    pub(crate) block_begin: usize,
    /// What this thread will probably read next, if known: it is asked for while this tile computes.
    pub(crate) next: &'a [Line],
    /// Room for whole groups; what rows that were not asked for receive is undefined.
    pub(crate) out: &'a mut [TileRow],
}

impl Operation for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let passes = self.num_rows.div_ceil(S::TILE_ROWS);
        let mut ahead = Ahead::new(&self, passes);
        let num_rows = self.num_rows;
        let mut tile = self;
        for begin in (0..num_rows).step_by(S::TILE_ROWS) {
            match (num_rows - begin).min(S::TILE_ROWS) {
                1 => tile.run_rows::<S, 1>(s, begin, &mut ahead),
                2 => tile.run_rows::<S, 2>(s, begin, &mut ahead),
                3 if S::TILE_ROWS >= 3 => tile.run_rows::<S, 3>(s, begin, &mut ahead),
                4 if S::TILE_ROWS >= 4 => tile.run_rows::<S, 4>(s, begin, &mut ahead),
                5 if S::TILE_ROWS >= 5 => tile.run_rows::<S, 5>(s, begin, &mut ahead),
                _ if S::TILE_ROWS >= 6 => tile.run_rows::<S, 6>(s, begin, &mut ahead),
                rows => debug_assert!(false, "tile of {rows} rows"),
            }
        }
    }
}

impl<'a> Tile<'a> {
    #[inline(always)]
    fn run_rows<S: Simd, const R: usize>(&mut self, s: S, begin: usize, ahead: &mut Ahead<'a>) {
        let blocks = self.matrix.blocks();
        let row = |r| self.row_begin + begin + r;
        let rows = std::array::from_fn(|r| self.rows.row(row(r), self.block_begin, blocks));
        let Some(out) = self.out[begin..].first_chunk_mut::<R>() else {
            debug_assert!(false, "room for {R} rows");
            return;
        };
        let lines = self.matrix.pair(self.pair);
        match self.matrix.format() {
            PackFormat::Bf16 => tile_bf16(s, lines, &rows, ahead, out),
            PackFormat::Q8 => tile_q8(s, lines, &rows, ahead, out),
            PackFormat::Q4 => tile_q4(s, lines, &rows, ahead, out),
        }
    }
}

/// Asks for weights before they are read: those of this pair a little ahead when it is read once, those of
/// the next one spread over the passes when this one is computed with longer than it is read.
pub(crate) struct Ahead<'a> {
    own: &'a [Line],
    next: &'a [Line],
    /// In `own`, then `next`.
    at: usize,
    lines_per_block: usize,
}

impl<'a> Ahead<'a> {
    /// For a tile that walks over its blocks `passes` times.
    #[inline(always)]
    pub(crate) fn new(tile: &Tile<'a>, passes: usize) -> Self {
        let own = tile.matrix.pair(tile.pair);
        let block_lines = tile.matrix.format().block_lines();
        Self {
            own,
            next: tile.next,
            at: if passes > 1 { own.len() } else { AHEAD_LINES },
            lines_per_block: block_lines.div_ceil(passes.max(1)),
        }
    }

    /// Called once for every block.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self, s: S) {
        for at in self.at..self.at + self.lines_per_block {
            let line = match self.own.get(at) {
                Some(line) => Some(line),
                None => self.next.get(at - self.own.len()),
            };
            if let Some(line) = line {
                s.prefetch(line.0.as_ptr());
            }
        }
        self.at += self.lines_per_block;
    }
}

/// Two accumulators per row: panel a, panel b.
type Accumulators<S, const R: usize> = [[<S as Simd>::F; 2]; R];

#[inline(always)]
fn store<S: Simd, const R: usize>(s: S, acc: &Accumulators<S, R>, out: &mut [TileRow; R]) {
    for r in 0..R {
        s.store(acc[r][0], &mut out[r][0]);
        s.store(acc[r][1], &mut out[r][1]);
    }
}

/// Word `word` of block `block` of a row whose length was checked against the blocks of the matrix.
#[inline(always)]
fn word<const WORDS: usize>(row: &RowRef<'_>, block: usize, word: usize) -> u32 {
    let at = block * GROUP_ROWS * WORDS + word;
    debug_assert!(at < row.words.len());
    // SAFETY: `Rows::row` cut the row to as many blocks as the matrix has, and callers count within
    // both.
    unsafe { *row.words.get_unchecked(at) }
}

#[inline(always)]
fn tile_bf16<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: &[RowRef<'_>; R],
    ahead: &mut Ahead<'_>,
    out: &mut [TileRow; R],
) {
    const WORDS: usize = BF16_LINES / 2;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<BF16_LINES>().0.iter().enumerate() {
        ahead.step(s);
        for j in 0..WORDS {
            let w = [s.bytes(&block[j].0), s.bytes(&block[WORDS + j].0)];
            for r in 0..R {
                let x = word::<WORDS>(&rows[r], b, j);
                acc[r][0] = s.dot_bf16(acc[r][0], w[0], x);
                acc[r][1] = s.dot_bf16(acc[r][1], w[1], x);
            }
        }
    }
    store(s, &acc, out);
}

#[inline(always)]
fn tile_q8<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: &[RowRef<'_>; R],
    ahead: &mut Ahead<'_>,
    out: &mut [TileRow; R],
) {
    const WORDS: usize = Q8_LINES / 2;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<Q8_LINES>().0.iter().enumerate() {
        ahead.step(s);
        let mut sums = [[s.splat_i32(0); 2]; R];
        for r in 0..R {
            sums[r] = [s.start_q8(rows[r].sums[b * GROUP_ROWS]); 2];
        }
        for j in 0..WORDS {
            let w = [s.bytes(&block[j].0), s.bytes(&block[WORDS + j].0)];
            for r in 0..R {
                let x = word::<WORDS>(&rows[r], b, j);
                sums[r][0] = s.dot_q8(sums[r][0], w[0], x);
                sums[r][1] = s.dot_q8(sums[r][1], w[1], x);
            }
        }
        scale_and_add(s, &block[2 * WORDS], &sums, rows, b, &mut acc);
    }
    store(s, &acc, out);
}

#[inline(always)]
fn tile_q4<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: &[RowRef<'_>; R],
    ahead: &mut Ahead<'_>,
    out: &mut [TileRow; R],
) {
    const HALF: usize = 4;
    const WORDS: usize = 2 * HALF;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<Q4_LINES>().0.iter().enumerate() {
        ahead.step(s);
        let mut sums = [[s.splat_i32(0); 2]; R];
        for j in 0..HALF {
            let (low_a, high_a) = s.nibbles(&block[j].0);
            let (low_b, high_b) = s.nibbles(&block[HALF + j].0);
            for r in 0..R {
                let x = word::<WORDS>(&rows[r], b, j);
                sums[r][0] = s.dot_q4(sums[r][0], low_a, x);
                sums[r][1] = s.dot_q4(sums[r][1], low_b, x);
                let x = word::<WORDS>(&rows[r], b, HALF + j);
                sums[r][0] = s.dot_q4(sums[r][0], high_a, x);
                sums[r][1] = s.dot_q4(sums[r][1], high_b, x);
            }
        }
        scale_and_add(s, &block[WORDS], &sums, rows, b, &mut acc);
        add_minima(s, &block[WORDS + 1], rows, b, &mut acc);
    }
    store(s, &acc, out);
}

/// `acc = fma(weight_min, row_scale * row_sum, acc)`.
#[inline(always)]
fn add_minima<S: Simd, const R: usize>(
    s: S,
    minima: &Line,
    rows: &[RowRef<'_>; R],
    block: usize,
    acc: &mut Accumulators<S, R>,
) {
    let (halves, _) = minima.0.as_chunks::<{ 2 * LANES }>();
    let minima = [s.load_f16(&halves[0]), s.load_f16(&halves[1])];
    for r in 0..R {
        let sum =
            s.splat(rows[r].scales[block * GROUP_ROWS] * rows[r].sums[block * GROUP_ROWS] as f32);
        for p in 0..2 {
            acc[r][p] = s.fma(minima[p], sum, acc[r][p]);
        }
    }
}

/// `acc = fma(isum, row_scale * weight_scale, acc)`.
#[inline(always)]
fn scale_and_add<S: Simd, const R: usize>(
    s: S,
    scales: &Line,
    sums: &[[S::I; 2]; R],
    rows: &[RowRef<'_>; R],
    block: usize,
    acc: &mut Accumulators<S, R>,
) {
    let (halves, _) = scales.0.as_chunks::<{ 2 * LANES }>();
    let weight_scales = [s.load_f16(&halves[0]), s.load_f16(&halves[1])];
    for r in 0..R {
        let row_scale = s.splat(rows[r].scales[block * GROUP_ROWS]);
        for p in 0..2 {
            let scale = s.mul(row_scale, weight_scales[p]);
            acc[r][p] = s.fma(s.to_f32(sums[r][p]), scale, acc[r][p]);
        }
    }
}
