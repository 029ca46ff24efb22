//! Matrix products over the pool: who computes which outputs. The products themselves are in [`tile`](crate::kernels::tile).

use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileRow};
use crate::pack::{PAIR_ROWS, PackedMatrix};
use crate::rows::Rows;
use crate::simd::LANES;

/// Pairs of panels of one work item: 64 outputs, read once for all rows.
const STRIP_PAIRS: usize = 2;

/// Where a product goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    Store,
    Add,
}

/// `out[i] (+)= matrix . rows[ids[i]]`.
#[derive(Debug)]
pub(crate) struct Linear<'a> {
    pub(crate) matrix: &'a PackedMatrix,
    pub(crate) rows: &'a Rows,
    pub(crate) ids: &'a [u32],
    /// `[ids.len()][matrix.rows()]`.
    pub(crate) out: &'a mut [f32],
    pub(crate) write: Write,
}

impl Context {
    /// Computes a product with all threads.
    pub(crate) fn linear(&self, linear: Linear<'_>) {
        let Linear {
            matrix,
            rows,
            ids,
            out,
            write,
        } = linear;
        let stride = matrix.rows();
        assert_eq!(out.len(), ids.len() * stride, "room for the product");
        let out = Disjoint::new(out);
        let pairs = matrix.pairs();
        let tile_rows = self.dispatch.tile_rows();
        self.pool.run(pairs.div_ceil(STRIP_PAIRS), &|strip| {
            let mut tile = [TileRow::default(); TILE_ROWS_MAX];
            let begin = strip * STRIP_PAIRS;
            for pair in begin..(begin + STRIP_PAIRS).min(pairs) {
                for (chunk, ids) in ids.chunks(tile_rows).enumerate() {
                    self.dispatch.run(Tile {
                        matrix,
                        pair,
                        rows,
                        block_begin: 0,
                        ids,
                        out: &mut tile,
                    });
                    for (i, row) in tile[..ids.len()].iter().enumerate() {
                        let col = pair * PAIR_ROWS;
                        let len = PAIR_ROWS.min(stride - col);
                        let at = (chunk * tile_rows + i) * stride + col;
                        // SAFETY: this item alone has these columns, and each row comes once.
                        let target = unsafe { out.range_mut(at..at + len) };
                        write_row(row, target, write);
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
