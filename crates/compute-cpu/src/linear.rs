//! Matrix products over the pool: who computes which outputs. The products themselves are in [`tile`](crate::kernels::tile).

use std::ops::Range;

use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::guided::run_guided;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileOut, TileRow};
use crate::pack::{Line, PAIR_ROWS, PackedMatrix};
use crate::rows::Rows;
use crate::simd::LANES;

/// Pairs that take the same rows in turn when there are more rows than a tile has: their weights fit the second cache.
const PAIRS_TOGETHER: usize = 4;

/// Where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Store,
    Add,
}

/// `out[i] (+)= matrix . rows[i]`.
#[derive(Debug)]
pub(crate) struct Linear<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) rows: &'a Rows,
    /// Rows `0..num_rows` of the table.
    pub(crate) num_rows: usize,
    /// `[num_rows][matrix.rows()]`.
    pub(crate) out: &'a mut [f32],
    pub(crate) write: Write,
}

impl Context {
    /// Computes a product with all threads.
    pub(crate) fn linear(&self, linear: Linear<'_>) {
        let Linear {
            matrix,
            rows,
            num_rows,
            out,
            write,
        } = linear;
        assert_eq!(out.len(), num_rows * matrix.rows(), "room for the product");
        let product = Product {
            context: self,
            matrix,
            rows,
            num_rows,
            out: Disjoint::new(out),
            write,
        };
        run_guided(&self.pool, matrix.pairs(), &|pairs| product.run(pairs));
    }
}

/// What the items of a product share.
struct Product<'a> {
    context: &'a Context,
    matrix: &'a PackedMatrix,
    rows: &'a Rows,
    num_rows: usize,
    out: Disjoint<'a, f32>,
    write: Write,
}

impl Product<'_> {
    /// Rows are read again for every pair, and what is written lies in as many places as there are rows: some pairs
    /// in turn for the same rows keep both near.
    fn run(&self, pairs: Range<usize>) {
        let mut out = TileOut::ZERO;
        let is_one_tile = self.num_rows <= TILE_ROWS_MAX;
        let together = if is_one_tile { 1 } else { PAIRS_TOGETHER };
        for begin in pairs.clone().step_by(together) {
            let end = pairs.end.min(begin + together);
            for row_begin in (0..self.num_rows).step_by(TILE_ROWS_MAX) {
                let is_last = row_begin + TILE_ROWS_MAX >= self.num_rows;
                for pair in begin..end {
                    // Behind the last of them the same pairs again, for the next rows.
                    let goes_on = pair + 1 < end || is_last;
                    let next = if goes_on { pair + 1 } else { begin };
                    self.run_tile(pair, row_begin, self.matrix.pair(next), &mut out);
                }
            }
        }
    }

    /// One pair for the rows of a tile.
    fn run_tile(&self, pair: usize, row_begin: usize, next: &[Line], out: &mut TileOut) {
        let num_rows = TILE_ROWS_MAX.min(self.num_rows - row_begin);
        self.context.dispatch.tile(Tile {
            matrix: self.matrix,
            pair,
            rows: self.rows,
            row_begin,
            num_rows,
            block_begin: 0,
            next,
            out: &mut out.0,
        });
        let stride = self.matrix.rows();
        let col = pair * PAIR_ROWS;
        let len = PAIR_ROWS.min(stride - col);
        for (i, row) in out.0[..num_rows].iter().enumerate() {
            let at = (row_begin + i) * stride + col;
            // SAFETY: this item alone has these columns, and each row comes once.
            let target = unsafe { self.out.range_mut(at..at + len) };
            write_row(row, target, self.write);
        }
    }
}

fn write_row(row: &TileRow, target: &mut [f32], write: Write) {
    for (panel, target) in row.iter().zip(target.chunks_mut(LANES)) {
        match write {
            Write::Store => target.copy_from_slice(&panel[..target.len()]),
            Write::Add => {
                for (y, x) in target.iter_mut().zip(panel) {
                    *y += x;
                }
            }
        }
    }
}
