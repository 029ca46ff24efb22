//! The matrix kernel: a few rows of activations times one pair of panels. Never depends on how many rows.
//!
//! Every output has one accumulator that walks k in ascending blocks of 32, so a result is the same in
//! a tile of one row and of six. See [`tramontane_compute::quant`] for the formula of a q8 block.

use crate::pack::{BF16_LINES, Line, PackFormat, PackedMatrix, Q4_LINES, Q8_LINES};
use crate::rows::{RowRef, Rows};
use crate::simd::{LANES, Operation, Simd};

/// Most rows of a tile on any instruction set.
pub(crate) const TILE_ROWS_MAX: usize = 6;

/// How far ahead of the reads a tile asks for weights, when it reads them for one or two rows only.
const PREFETCH_BYTES: usize = 4096;

/// Tiles of this many rows or fewer are bound by memory and prefetch.
const PREFETCH_ROWS_MAX: usize = 3;

/// The 32 outputs of one row: panel a, panel b.
pub(crate) type TileRow = [[f32; LANES]; 2];

/// `out[i] = pair . rows[ids[i]]` over all blocks of the matrix, read in the rows from `block_begin` on.
pub(crate) struct Tile<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) pair: usize,
    pub(crate) rows: &'a Rows,
    pub(crate) block_begin: usize,
    /// At most as many as the instruction set keeps in registers.
    pub(crate) ids: &'a [u32],
    pub(crate) out: &'a mut [TileRow],
}

impl Operation for Tile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match *self.ids {
            [a] => self.run_rows(s, [a]),
            [a, b] => self.run_rows(s, [a, b]),
            [a, b, c] if S::TILE_ROWS >= 3 => self.run_rows(s, [a, b, c]),
            [a, b, c, d] if S::TILE_ROWS >= 4 => self.run_rows(s, [a, b, c, d]),
            [a, b, c, d, e] if S::TILE_ROWS >= 5 => self.run_rows(s, [a, b, c, d, e]),
            [a, b, c, d, e, f] if S::TILE_ROWS >= 6 => self.run_rows(s, [a, b, c, d, e, f]),
            _ => debug_assert!(self.ids.is_empty(), "tile of {} rows", self.ids.len()),
        }
    }
}

impl Tile<'_> {
    #[inline(always)]
    fn run_rows<S: Simd, const R: usize>(self, s: S, ids: [u32; R]) {
        let blocks = self.matrix.blocks();
        let rows = ids.map(|id| self.rows.row(id as usize, self.block_begin, blocks));
        let Some(out) = self.out.first_chunk_mut::<R>() else {
            debug_assert!(false, "room for {R} rows, got {}", self.out.len());
            return;
        };
        let lines = self.matrix.pair(self.pair);
        match self.matrix.format() {
            PackFormat::Bf16 => tile_bf16(s, lines, &rows, out),
            PackFormat::Q8 => tile_q8(s, lines, &rows, out),
            PackFormat::Q4 => tile_q4(s, lines, &rows, out),
        }
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
    debug_assert!(block * WORDS + word < row.words.len());
    // SAFETY: `Rows::row` cut the row to as many blocks as the matrix has, and callers count within
    // both.
    unsafe { *row.words.get_unchecked(block * WORDS + word) }
}

#[inline(always)]
fn prefetch<S: Simd, const R: usize>(s: S, line: &Line) {
    if R <= PREFETCH_ROWS_MAX {
        s.prefetch(line.0.as_ptr().wrapping_add(PREFETCH_BYTES));
    }
}

#[inline(always)]
fn tile_bf16<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: &[RowRef<'_>; R],
    out: &mut [TileRow; R],
) {
    const WORDS: usize = BF16_LINES / 2;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<BF16_LINES>().0.iter().enumerate() {
        for j in 0..WORDS {
            prefetch::<S, R>(s, &block[j]);
            prefetch::<S, R>(s, &block[WORDS + j]);
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
    out: &mut [TileRow; R],
) {
    const WORDS: usize = Q8_LINES / 2;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<Q8_LINES>().0.iter().enumerate() {
        let mut sums = [[s.splat_i32(0); 2]; R];
        for r in 0..R {
            sums[r] = [s.start_q8(rows[r].sums[b]); 2];
        }
        for j in 0..WORDS {
            prefetch::<S, R>(s, &block[j]);
            prefetch::<S, R>(s, &block[WORDS + j]);
            let w = [s.bytes(&block[j].0), s.bytes(&block[WORDS + j].0)];
            for r in 0..R {
                let x = word::<WORDS>(&rows[r], b, j);
                sums[r][0] = s.dot_q8(sums[r][0], w[0], x);
                sums[r][1] = s.dot_q8(sums[r][1], w[1], x);
            }
        }
        prefetch::<S, R>(s, &block[2 * WORDS]);
        scale_and_add(s, &block[2 * WORDS], &sums, rows, b, &mut acc);
    }
    store(s, &acc, out);
}

#[inline(always)]
fn tile_q4<S: Simd, const R: usize>(
    s: S,
    lines: &[Line],
    rows: &[RowRef<'_>; R],
    out: &mut [TileRow; R],
) {
    const HALF: usize = Q4_LINES / 2;
    const WORDS: usize = 2 * HALF;
    let mut acc: Accumulators<S, R> = [[s.splat(0.0); 2]; R];
    for (b, block) in lines.as_chunks::<Q4_LINES>().0.iter().enumerate() {
        let mut sums = [[s.splat_i32(0); 2]; R];
        for r in 0..R {
            sums[r] = [s.splat_i32(-8 * rows[r].sums[b]); 2];
        }
        for j in 0..HALF {
            prefetch::<S, R>(s, &block[j]);
            prefetch::<S, R>(s, &block[HALF + j]);
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
        prefetch::<S, R>(s, &block[WORDS]);
        scale_and_add(s, &block[WORDS], &sums, rows, b, &mut acc);
    }
    store(s, &acc, out);
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
        let row_scale = s.splat(rows[r].scales[block]);
        for p in 0..2 {
            let scale = s.mul(row_scale, weight_scales[p]);
            acc[r][p] = s.fma(s.to_f32(sums[r][p]), scale, acc[r][p]);
        }
    }
}
