//! int8 products on the matrix unit: the bits of the vector kernels, for many rows. Never rounds on its own.
//!
//! A tile product is the integer sums of one block of 32 columns, up to 16 rows by 16 outputs. They go through memory into
//! vector registers, where the formula of [`tramontane_compute::quant`] is applied in its order. The unit
//! works on one block while the vectors finish the one before the last: products, stores and vectors are
//! two steps apart, which measured 1.3 times as fast as one after the other.

use std::arch::asm;

use super::{Amx, Shapes};
use crate::kernels::tile::{Ahead, Tile, TileRow, halves};
use crate::pack::{Line, PackFormat, Q4_LINES, Q8_LINES};
use crate::rows::{GROUP_ROWS, RowRef};
use crate::simd::{LANES, Operation, Simd};

/// Blocks that are multiplied with all rows before the next ones: 17 KB of bytes, which the first cache
/// holds; those of q4 are expanded there.
const STRIP_BLOCKS: usize = 16;

/// Lines of a panel of one block, a byte for every weight.
const PANEL_LINES: usize = 8;

/// Words of one block of a group.
const GROUP_WORDS: usize = GROUP_ROWS * 8;

/// A zeroed line, to be overwritten.
const ZERO: Line = Line([0; 64]);

/// The sums of one block: 16 rows by 16 outputs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Products([[i32; LANES]; GROUP_ROWS]);

/// A tile of a q8 or q4 matrix.
pub(super) struct TileInt8<'a> {
    pub(super) proof: Amx,
    pub(super) tile: Tile<'a>,
}

impl Operation for TileInt8<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // The unit takes as long as there are rows.
        match self.tile.num_rows {
            ..=8 => self.run_rows::<S, 8>(s),
            9..=12 => self.run_rows::<S, 12>(s),
            _ => self.run_rows::<S, GROUP_ROWS>(s),
        }
    }
}

impl TileInt8<'_> {
    /// `N` rows of every group.
    #[inline(always)]
    fn run_rows<S: Simd, const N: usize>(self, s: S) {
        let Self { proof, mut tile } = self;
        // Every group walks over both panels.
        let mut ahead = Ahead::of_passes(&tile, 2 * tile.num_rows.div_ceil(GROUP_ROWS));
        const { &Shapes::of_32_bytes(N as u8) }.load(proof);
        let lines = tile.matrix.pair(tile.pair);
        if lines.is_empty() {
            tile.out.fill(TileRow::default());
        }
        if tile.matrix.format() == PackFormat::Q4 {
            let mut bytes = [ZERO; STRIP_BLOCKS * 2 * PANEL_LINES];
            let (blocks, _) = lines.as_chunks::<Q4_LINES>();
            for (i, blocks) in blocks.chunks(STRIP_BLOCKS).enumerate() {
                expand(s, blocks, &mut bytes);
                let strip = Strip {
                    begin: i * STRIP_BLOCKS,
                    num_blocks: blocks.len(),
                    bytes: &bytes,
                    block_lines: 2 * PANEL_LINES,
                    scales: &blocks.as_flattened()[PANEL_LINES..],
                    scale_lines: Q4_LINES,
                };
                strip.multiply::<S, N, true>(s, &mut tile, &mut ahead);
            }
            return;
        }
        let (blocks, _) = lines.as_chunks::<Q8_LINES>();
        for (i, blocks) in blocks.chunks(STRIP_BLOCKS).enumerate() {
            let lines = blocks.as_flattened();
            let strip = Strip {
                begin: i * STRIP_BLOCKS,
                num_blocks: blocks.len(),
                bytes: lines,
                block_lines: Q8_LINES,
                scales: &lines[2 * PANEL_LINES..],
                scale_lines: Q8_LINES,
            };
            strip.multiply::<S, N, false>(s, &mut tile, &mut ahead);
        }
    }
}

/// Nibbles to bytes.
#[inline(always)]
fn expand<S: Simd>(s: S, blocks: &[[Line; Q4_LINES]], bytes: &mut [Line]) {
    const HALF: usize = PANEL_LINES / 2;
    for (block, bytes) in blocks.iter().zip(
        bytes
            .as_chunks_mut::<PANEL_LINES>()
            .0
            .as_chunks_mut::<2>()
            .0,
    ) {
        for (panel, bytes) in bytes.iter_mut().enumerate() {
            for line in 0..HALF {
                let (low, high) = s.nibbles(&block[panel * HALF + line].0);
                s.store_bytes(low, &mut bytes[line].0);
                s.store_bytes(high, &mut bytes[HALF + line].0);
            }
        }
    }
}

/// Some blocks of a pair, a byte for every weight.
struct Strip<'a> {
    /// The first block, counted in the pair.
    begin: usize,
    num_blocks: usize,
    /// Block `b` begins at `b * block_lines`: panel a, panel b.
    bytes: &'a [Line],
    block_lines: usize,
    /// The scales of block `b` are line `b * scale_lines`; for q4, the minima follow.
    scales: &'a [Line],
    scale_lines: usize,
}

impl Strip<'_> {
    /// Adds the products of this strip to the sums of all groups of rows; the first strip begins them.
    #[inline(always)]
    fn multiply<S: Simd, const N: usize, const Q4: bool>(
        &self,
        s: S,
        tile: &mut Tile<'_>,
        ahead: &mut Ahead<'_>,
    ) {
        let begin = tile.block_begin + self.begin;
        let (groups, _) = tile.out.as_chunks_mut::<GROUP_ROWS>();
        let num_groups = tile.num_rows.div_ceil(GROUP_ROWS);
        for (i, sums) in groups.iter_mut().take(num_groups).enumerate() {
            let row = tile.row_begin + i * GROUP_ROWS;
            let rows = tile.rows.group(row, begin, self.num_blocks);
            let part = GroupStrip::<Q4> { strip: self, rows };
            part.multiply::<S, N, 0>(s, ahead, sums);
            part.multiply::<S, N, 1>(s, ahead, sums);
        }
    }
}

/// A strip with one group of rows.
struct GroupStrip<'a, const Q4: bool> {
    strip: &'a Strip<'a>,
    rows: RowRef<'a>,
}

// Plain loops over constant bounds and constant panels: where anything else touches the sums, the compiler keeps them in
// memory, which took a third of the time.
impl<const Q4: bool> GroupStrip<'_, Q4> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize, const PANEL: usize>(
        &self,
        s: S,
        ahead: &mut Ahead<'_>,
        sums: &mut [TileRow; GROUP_ROWS],
    ) {
        let num_blocks = self.strip.num_blocks;
        let mut acc = [s.splat(0.0); N];
        if self.strip.begin > 0 {
            for r in 0..N {
                acc[r] = s.load(&sums[r][PANEL]);
            }
        }
        let mut products = [Products([[0; LANES]; GROUP_ROWS]); 2];
        // One place for all blocks, so that the sums stay in registers.
        for b in 0..num_blocks + 2 {
            if b < num_blocks {
                ahead.step(s);
                self.start::<PANEL>(b, &mut products[(b + 1) % 2]);
            } else if b == num_blocks && b > 0 {
                store(b - 1, &mut products[(b + 1) % 2]);
            }
            if b >= 2 {
                self.finish::<S, N, PANEL>(s, b - 2, &products[b % 2], &mut acc);
            }
        }
        for r in 0..N {
            s.store(acc[r], &mut sums[r][PANEL]);
        }
    }

    /// Starts the products of a block and stores those of the block before it.
    #[inline(always)]
    fn start<const PANEL: usize>(&self, block: usize, before: &mut Products) {
        let bytes = &self.strip.bytes[block * self.strip.block_lines + PANEL * PANEL_LINES..];
        let rows = &self.rows.words[block * GROUP_WORDS..];
        debug_assert!(bytes.len() >= PANEL_LINES && rows.len() >= GROUP_WORDS);
        // SAFETY: an `Amx` was needed to get here and set the shapes: the rows are at most 16 times 32 bytes (see
        // `Rows::group`), the weights 8 lines, the products at most 16. Blocks take turns with the registers, and
        // nothing else uses tile registers meanwhile: the compiler knows none.
        unsafe {
            macro_rules! start {
                ($now:literal, $before:literal, $x:literal, $w:literal) => {
                    asm!(
                        concat!("tilezero ", $now),
                        concat!("tileloadd ", $x, ", [{x} + {half}]"),
                        concat!("tileloadd ", $w, ", [{w} + {line}]"),
                        concat!("tdpbssd ", $now, ", ", $x, ", ", $w),
                        concat!("tilestored [{before} + {line}], ", $before),
                        x = in(reg) rows.as_ptr(),
                        w = in(reg) bytes.as_ptr(),
                        before = in(reg) before,
                        half = in(reg) 32_usize,
                        line = in(reg) 64_usize,
                        options(nostack),
                    )
                };
            }
            if block.is_multiple_of(2) {
                start!("tmm0", "tmm1", "tmm4", "tmm6");
            } else {
                start!("tmm1", "tmm0", "tmm5", "tmm7");
            }
        }
    }

    /// The formula of a block, see [`scale_and_add`](crate::kernels::tile).
    #[inline(always)]
    fn finish<S: Simd, const N: usize, const PANEL: usize>(
        &self,
        s: S,
        block: usize,
        products: &Products,
        acc: &mut [S::F; N],
    ) {
        let lines = &self.strip.scales[block * self.strip.scale_lines..];
        let scales = self.rows.scales.as_chunks::<GROUP_ROWS>().0;
        let sums = self.rows.sums.as_chunks::<GROUP_ROWS>().0;
        let (Some(scales), Some(sums)) = (scales.get(block), sums.get(block)) else {
            return;
        };
        let weight_scales = halves(s, &lines[0], PANEL);
        for r in 0..N {
            let scale = s.mul(s.splat(scales[r]), weight_scales);
            acc[r] = s.fma(s.to_f32(s.load_i32(&products.0[r])), scale, acc[r]);
        }
        if Q4 {
            let minima = halves(s, &lines[1], PANEL);
            for r in 0..N {
                acc[r] = s.fma(minima, s.splat(sums[r]), acc[r]);
            }
        }
    }
}

/// Stores the products of the last block.
#[inline(always)]
fn store(block: usize, products: &mut Products) {
    // SAFETY: as in `start`.
    unsafe {
        macro_rules! store {
            ($register:literal) => {
                asm!(
                    concat!("tilestored [{products} + {line}], ", $register),
                    products = in(reg) products,
                    line = in(reg) 64_usize,
                    options(nostack),
                )
            };
        }
        if block.is_multiple_of(2) {
            store!("tmm0");
        } else {
            store!("tmm1");
        }
    }
}
