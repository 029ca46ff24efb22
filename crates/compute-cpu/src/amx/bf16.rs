//! bfloat16 products on the matrix unit. The sums stay in tile registers over all of k; no vector touches them.
//!
//! The rounding is that of `TDPBF16PS`: of the 32 columns of a block, the products of the even ones are
//! summed by one chain of fused multiply-adds that starts at zero and those of the odd ones by another,
//! then the two chains are added, then the sum is added to the accumulator. All of it rounds to nearest
//! even, takes denormal inputs for zero and turns denormal results into zero.

use std::arch::asm;

use super::{Amx, Shapes};
use crate::kernels::tile::{Ahead, Tile, TileRow};
use crate::pack::{BF16_LINES, Line};
use crate::rows::{GROUP_ROWS, RowRef};
use crate::simd::{Operation, Simd};

/// Bytes from one row of a tile to the next, where tiles are dense.
const ROW_BYTES: usize = 64;

/// Words of one block of a group.
const GROUP_WORDS: usize = GROUP_ROWS * ROW_BYTES / 4;

/// The sums of one group.
type GroupSums = [TileRow; GROUP_ROWS];

/// A tile of a bf16 matrix.
pub(super) struct TileBf16<'a> {
    pub(super) proof: Amx,
    pub(super) tile: Tile<'a>,
}

impl Operation for TileBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        const PASS_ROWS: usize = 2 * GROUP_ROWS;
        let Self { proof, tile } = self;
        let mut ahead = Ahead::of_passes(&tile, tile.num_rows.div_ceil(PASS_ROWS));
        let (blocks, _) = tile.matrix.pair(tile.pair).as_chunks::<BF16_LINES>();
        let group = |row| {
            let row = tile.row_begin + row;
            tile.rows.group(row, tile.block_begin, blocks.len())
        };
        let (sums, _) = tile.out.as_chunks_mut::<GROUP_ROWS>();
        let groups = sums.iter_mut().take(tile.num_rows.div_ceil(GROUP_ROWS));
        let mut groups = groups.enumerate();
        Shapes::FULL.load(proof);
        while let Some((i, first)) = groups.next() {
            let rows = group(i * GROUP_ROWS);
            match groups.next() {
                Some((i, second)) => {
                    let rows = [rows, group(i * GROUP_ROWS)];
                    two_groups(s, blocks, rows, &mut ahead, [first, second]);
                }
                None => one_group(s, blocks, rows, &mut ahead, first),
            }
        }
    }
}

#[inline(always)]
fn one_group<S: Simd>(
    s: S,
    blocks: &[[Line; BF16_LINES]],
    rows: RowRef<'_>,
    ahead: &mut Ahead<'_>,
    sums: &mut GroupSums,
) {
    let (rows, _) = rows.words.as_chunks::<GROUP_WORDS>();
    // SAFETY: an `Amx` was needed to get here, and the shapes are full; see `two_groups` for the tiles.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem));
    }
    for (block, rows) in blocks.iter().zip(rows) {
        ahead.step(s);
        // SAFETY: both panels of the block and the rows are dense tiles of 16 rows of 64 bytes.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {stride}]",
                "tileloadd tmm6, [{w} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {stride} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                x = in(reg) rows.as_ptr(),
                w = in(reg) block.as_ptr(),
                stride = in(reg) ROW_BYTES,
                options(nostack, readonly),
            );
        }
    }
    // SAFETY: the sums are 16 rows of two panels of 64 bytes.
    unsafe {
        asm!(
            "tilestored [{sums} + {stride}], tmm0",
            "tilestored [{sums} + {stride} + 64], tmm1",
            sums = in(reg) sums.as_mut_ptr(),
            stride = in(reg) size_of::<TileRow>(),
            options(nostack),
        );
    }
}

#[inline(always)]
fn two_groups<S: Simd>(
    s: S,
    blocks: &[[Line; BF16_LINES]],
    rows: [RowRef<'_>; 2],
    ahead: &mut Ahead<'_>,
    sums: [&mut GroupSums; 2],
) {
    let [rows_0, rows_1] = rows.map(|rows| rows.words.as_chunks::<GROUP_WORDS>().0);
    // SAFETY: an `Amx` was needed to get here, and the shapes are full. Nothing but this function uses
    // tile registers between its first instruction and its last: the compiler knows none.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem),
        );
    }
    for (block, (rows_0, rows_1)) in blocks.iter().zip(rows_0.iter().zip(rows_1)) {
        ahead.step(s);
        // SAFETY: both panels of the block and the rows are dense tiles of 16 rows of 64 bytes.
        unsafe {
            asm!(
                "tileloadd tmm4, [{x} + {stride}]",
                "tileloadd tmm6, [{w} + {stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w} + {stride} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{y} + {stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                x = in(reg) rows_0.as_ptr(),
                y = in(reg) rows_1.as_ptr(),
                w = in(reg) block.as_ptr(),
                stride = in(reg) ROW_BYTES,
                options(nostack, readonly),
            );
        }
    }
    let [sums_0, sums_1] = sums;
    // SAFETY: the sums are 16 rows of two panels of 64 bytes.
    unsafe {
        asm!(
            "tilestored [{a} + {stride}], tmm0",
            "tilestored [{a} + {stride} + 64], tmm1",
            "tilestored [{b} + {stride}], tmm2",
            "tilestored [{b} + {stride} + 64], tmm3",
            a = in(reg) sums_0.as_mut_ptr(),
            b = in(reg) sums_1.as_mut_ptr(),
            stride = in(reg) size_of::<TileRow>(),
            options(nostack),
        );
    }
}
