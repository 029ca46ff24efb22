//! The matrix kernel: rows of activations times one pair of panels. Never depends on how many rows.
//!
//! Every output has one accumulator that walks k in ascending blocks of 32, so a result is the same in
//! a tile of one row and of six; between two strips of blocks it waits in memory, which changes nothing. See
//! [`tramontane_compute::quant`] for the formula of a q8 block.

use std::ops::Range;

use crate::pack::{BF16_LINES, Line, PackFormat, PackedMatrix, Q4_LINES, Q8_LINES};
use crate::rows::{GROUP_ROWS, RowRef, Rows};
use crate::simd::{LANES, Operation, Simd};

/// Most rows of one tile, whole groups: what a caller keeps on its stack.
pub(crate) const TILE_ROWS_MAX: usize = 4 * GROUP_ROWS;

/// Blocks of a pair that all rows take before the next ones, where rows are more than registers: a few KB, which
/// stay in the first cache, so that the weights are one ascending stream however many rows there are.
const STRIP_BLOCKS: usize = 4;

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
    fn run<S: Simd>(mut self, s: S) {
        let blocks = self.matrix.blocks().max(1);
        // Sums that all stay in registers walk over k once.
        let is_one_part = self.num_rows <= S::TILE_ROWS;
        let strip = if is_one_part { blocks } else { STRIP_BLOCKS };
        let num_parts = |rows: usize| rows.div_ceil(S::TILE_ROWS);
        let (full, rest) = (self.num_rows / GROUP_ROWS, self.num_rows % GROUP_ROWS);
        let passes = full * num_parts(GROUP_ROWS) + num_parts(rest);
        let mut ahead = Ahead::of_stream(&self, passes);
        for begin in (0..blocks).step_by(strip) {
            let blocks = begin..self.matrix.blocks().min(begin + strip);
            for group in (0..self.num_rows).step_by(GROUP_ROWS) {
                let end = self.num_rows.min(group + GROUP_ROWS);
                // About the same number in every part.
                let rows = (end - group).div_ceil(num_parts(end - group));
                for row in (group..end).step_by(rows) {
                    let part = row..end.min(row + rows);
                    self.run_part(s, part, &blocks, &mut ahead);
                }
            }
        }
    }
}

impl<'a> Tile<'a> {
    #[inline(always)]
    fn run_part<S: Simd>(
        &mut self,
        s: S,
        rows: Range<usize>,
        blocks: &Range<usize>,
        ahead: &mut Ahead<'a>,
    ) {
        let begin = rows.start;
        match rows.len() {
            1 => self.run_rows::<S, 1>(s, begin, blocks, ahead),
            2 => self.run_rows::<S, 2>(s, begin, blocks, ahead),
            3 if S::TILE_ROWS >= 3 => self.run_rows::<S, 3>(s, begin, blocks, ahead),
            4 if S::TILE_ROWS >= 4 => self.run_rows::<S, 4>(s, begin, blocks, ahead),
            5 if S::TILE_ROWS >= 5 => self.run_rows::<S, 5>(s, begin, blocks, ahead),
            6 if S::TILE_ROWS >= 6 => self.run_rows::<S, 6>(s, begin, blocks, ahead),
            rows => debug_assert!(false, "part of {rows} rows"),
        }
    }

    /// Adds the products of some blocks to the sums of `R` rows of a group; the first blocks begin them.
    #[inline(always)]
    fn run_rows<S: Simd, const R: usize>(
        &mut self,
        s: S,
        begin: usize,
        blocks: &Range<usize>,
        ahead: &mut Ahead<'a>,
    ) {
        let block_begin = self.block_begin + blocks.start;
        let row = self.row_begin + begin;
        let rows = self.rows.part(row, R, block_begin, blocks.len());
        let Some(out) = self.out[begin..].first_chunk_mut::<R>() else {
            debug_assert!(false, "room for {R} rows");
            return;
        };
        let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
        if blocks.start > 0 {
            for r in 0..R {
                acc[r] = [s.load(&out[r][0]), s.load(&out[r][1])];
            }
        }
        let block_lines = self.matrix.format().block_lines();
        let lines = blocks.start * block_lines..blocks.end * block_lines;
        let lines = &self.matrix.pair(self.pair)[lines];
        match self.matrix.format() {
            PackFormat::Bf16 => tile_bf16(s, lines, rows, ahead, &mut acc),
            PackFormat::Q8 => tile_q8(s, lines, rows, ahead, &mut acc),
            PackFormat::Q4 => tile_q4(s, lines, rows, ahead, &mut acc),
        }
        for r in 0..R {
            s.store(acc[r][0], &mut out[r][0]);
            s.store(acc[r][1], &mut out[r][1]);
        }
    }
}

/// Asks for weights before they are read, evenly over the time that is computed meanwhile.
pub(crate) struct Ahead<'a> {
    /// What is asked for now, from `at` on.
    lines: &'a [Line],
    at: usize,
    /// What comes behind `lines`.
    next: &'a [Line],
    lines_per_block: usize,
}

impl<'a> Ahead<'a> {
    /// For a tile that reads its weights as one stream and walks over each block `passes` times.
    #[inline(always)]
    pub(crate) fn of_stream(tile: &Tile<'a>, passes: usize) -> Self {
        let block_lines = tile.matrix.format().block_lines();
        Self {
            lines: tile.matrix.pair(tile.pair),
            at: AHEAD_LINES,
            next: tile.next,
            lines_per_block: block_lines.div_ceil(passes.max(1)),
        }
    }

    /// For a tile that walks over all of its blocks `passes` times: of many passes, each asks for a part of what
    /// comes next.
    #[inline(always)]
    pub(crate) fn of_passes(tile: &Tile<'a>, passes: usize) -> Self {
        let stream = Self::of_stream(tile, passes);
        let at = if passes > 1 {
            stream.lines.len()
        } else {
            stream.at
        };
        Self { at, ..stream }
    }

    /// Called once for every block.
    #[inline(always)]
    pub(crate) fn step<S: Simd>(&mut self, s: S) {
        if self.at >= self.lines.len() {
            self.at -= self.lines.len();
            self.lines = std::mem::take(&mut self.next);
        }
        if self.lines.is_empty() {
            return;
        }
        // The last lines of a pair may reach behind it, which asking may.
        let first = self.lines.as_ptr().wrapping_add(self.at);
        for i in 0..self.lines_per_block {
            s.prefetch(first.wrapping_add(i).cast());
        }
        self.at += self.lines_per_block;
    }
}

/// Two accumulators per row: panel a, panel b.
type Accumulators<S, const R: usize> = [[<S as Simd>::F; 2]; R];

/// An element of a table of `R` rows of a group that were cut to the blocks of the matrix: `[block][row][len]`.
#[inline(always)]
fn element<T: Copy, const R: usize>(
    table: &[T],
    len: usize,
    (block, row): (usize, usize),
    i: usize,
) -> T {
    let at = (block * GROUP_ROWS + row) * len + i;
    debug_assert!(row < R && i < len && at < table.len());
    // SAFETY: `Rows::part` cut the table to as many rows and blocks as callers count, and `Dispatch::tile` has
    // checked that the rows have what a product with the format of the matrix reads.
    unsafe { *table.get_unchecked(at) }
}

#[expect(clippy::needless_range_loop, reason = "registers by number")]
#[inline(always)]
fn tile_bf16<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: RowRef<'_>,
    ahead: &mut Ahead<'_>,
    acc: &mut Accumulators<S, R>,
) {
    const WORDS: usize = BF16_LINES / 2;
    for (b, block) in lines.as_chunks::<BF16_LINES>().0.iter().enumerate() {
        ahead.step(s);
        for j in 0..WORDS {
            let w = [s.bytes(&block[j].0), s.bytes(&block[WORDS + j].0)];
            for r in 0..R {
                let x = element::<_, R>(rows.words, WORDS, (b, r), j);
                acc[r][0] = s.dot_bf16(acc[r][0], w[0], x);
                acc[r][1] = s.dot_bf16(acc[r][1], w[1], x);
            }
        }
    }
}

#[expect(clippy::needless_range_loop, reason = "registers by number")]
#[inline(always)]
fn tile_q8<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: RowRef<'_>,
    ahead: &mut Ahead<'_>,
    acc: &mut Accumulators<S, R>,
) {
    const WORDS: usize = Q8_LINES / 2;
    for (b, block) in lines.as_chunks::<Q8_LINES>().0.iter().enumerate() {
        ahead.step(s);
        let mut sums = [[s.splat_i32(0); 2]; R];
        for r in 0..R {
            sums[r] = [s.start_q8(element::<_, R>(rows.offsets, 1, (b, r), 0)); 2];
        }
        for j in 0..WORDS {
            let w = [
                s.signed_bytes(&block[j].0),
                s.signed_bytes(&block[WORDS + j].0),
            ];
            for r in 0..R {
                let x = element::<_, R>(rows.words, WORDS, (b, r), j);
                sums[r][0] = s.dot_q8(sums[r][0], w[0], x);
                sums[r][1] = s.dot_q8(sums[r][1], w[1], x);
            }
        }
        scale_and_add(s, &block[2 * WORDS], &sums, rows, b, acc);
    }
}

#[expect(clippy::needless_range_loop, reason = "registers by number")]
#[inline(always)]
fn tile_q4<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: RowRef<'_>,
    ahead: &mut Ahead<'_>,
    acc: &mut Accumulators<S, R>,
) {
    const HALF: usize = 4;
    const WORDS: usize = 2 * HALF;
    for (b, block) in lines.as_chunks::<Q4_LINES>().0.iter().enumerate() {
        ahead.step(s);
        let mut sums = [[s.splat_i32(0); 2]; R];
        for j in 0..HALF {
            let (low_a, high_a) = s.nibbles(&block[j].0);
            let (low_b, high_b) = s.nibbles(&block[HALF + j].0);
            for r in 0..R {
                let x = element::<_, R>(rows.words, WORDS, (b, r), j);
                sums[r][0] = s.dot_q4(sums[r][0], low_a, x);
                sums[r][1] = s.dot_q4(sums[r][1], low_b, x);
                let x = element::<_, R>(rows.words, WORDS, (b, r), HALF + j);
                sums[r][0] = s.dot_q4(sums[r][0], high_a, x);
                sums[r][1] = s.dot_q4(sums[r][1], high_b, x);
            }
        }
        scale_and_add(s, &block[WORDS], &sums, rows, b, acc);
        add_minima(s, &block[WORDS + 1], rows, b, acc);
    }
}

/// `acc = fma(weight_min, row_sum, acc)`.
#[expect(clippy::needless_range_loop, reason = "registers by number")]
#[inline(always)]
fn add_minima<S: Simd, const R: usize>(
    s: S,
    minima: &Line,
    rows: RowRef<'_>,
    block: usize,
    acc: &mut Accumulators<S, R>,
) {
    let minima = [halves(s, minima, 0), halves(s, minima, 1)];
    for r in 0..R {
        let sum = s.splat(element::<_, R>(rows.sums, 1, (block, r), 0));
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
    rows: RowRef<'_>,
    block: usize,
    acc: &mut Accumulators<S, R>,
) {
    let weight_scales = [halves(s, scales, 0), halves(s, scales, 1)];
    for r in 0..R {
        let row_scale = s.splat(element::<_, R>(rows.scales, 1, (block, r), 0));
        for p in 0..2 {
            let scale = s.mul(row_scale, weight_scales[p]);
            acc[r][p] = s.fma(s.to_f32(sums[r][p]), scale, acc[r][p]);
        }
    }
}

/// The half of a line of f16 that belongs to a panel.
#[inline(always)]
pub(crate) fn halves<S: Simd>(s: S, line: &Line, panel: usize) -> S::F {
    s.load_f16(&line.0.as_chunks::<{ 2 * LANES }>().0[panel])
}
