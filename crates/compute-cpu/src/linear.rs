//! Matrix products over the pool: who computes which outputs. The products themselves are in [`tile`](crate::kernels::tile).

use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::guided::run_guided;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileOut, TileRow};
use crate::pack::{PAIR_ROWS, PackedMatrix};
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
        let (stride, num_rows_all) = (matrix.rows(), num_rows);
        assert_eq!(out.len(), num_rows * stride, "room for the product");
        let out = Disjoint::new(out);
        run_guided(&self.pool, matrix.pairs(), &|pairs| {
            let mut tile = TileOut::ZERO;
            // Rows are read again for every pair, and what is written lies in as many places as there are rows:
            // some pairs in turn for the same rows keep both near.
            let together = if num_rows > TILE_ROWS_MAX {
                PAIRS_TOGETHER
            } else {
                1
            };
            for begin in pairs.clone().step_by(together) {
                let pairs = begin..pairs.end.min(begin + together);
                for row_begin in (0..num_rows).step_by(TILE_ROWS_MAX) {
                    let num_rows = TILE_ROWS_MAX.min(num_rows - row_begin);
                    let is_last = row_begin + TILE_ROWS_MAX >= num_rows_all;
                    for pair in pairs.clone() {
                        let next = if pair + 1 < pairs.end || is_last {
                            pair + 1
                        } else {
                            pairs.start
                        };
                        self.dispatch.tile(Tile {
                            matrix,
                            pair,
                            rows,
                            row_begin,
                            num_rows,
                            block_begin: 0,
                            next: matrix.pair(next),
                            out: &mut tile.0,
                        });
                        let col = pair * PAIR_ROWS;
                        let len = PAIR_ROWS.min(stride - col);
                        for (i, row) in tile.0[..num_rows].iter().enumerate() {
                            let at = (row_begin + i) * stride + col;
                            // SAFETY: this item alone has these columns, and each row comes once.
                            let target = unsafe { out.range_mut(at..at + len) };
                            write_row(row, target, write);
                        }
                    }
                }
            }
        });
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
