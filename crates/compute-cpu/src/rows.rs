//! Rows of activations in the form that the matrix kernels read. Computes no products.
//!
//! A row is cut into blocks of 32 columns, the last one padded with zeros. A bf16 block is 16 words of
//! two numbers. A q8 block is 8 words of four signed bytes in -127..=127, a scale, and two things made of them once
//! for all products: an offset, what a kernel starts from that multiplies weights `w + 128` because its instruction
//! has one unsigned operand, and the sum of the numbers, what the minima of q4 are multiplied with. Sixteen rows are a
//! *group*: block by block, the 16 rows of a group lie one behind the other, so that a block of a group is one tile of
//! the matrix unit.

use tramontane_compute::RowFormat;
use tramontane_compute::quant::BLOCK;

use crate::disjoint::Disjoint;
use crate::pack::Line;
use crate::simd::LANES;

/// Rows of one group; a run of rows that go through the kernels together begins at a group.
pub(crate) const GROUP_ROWS: usize = LANES;

/// A table of rows of the same length.
#[derive(Debug)]
pub(crate) struct Rows {
    format: RowFormat,
    num_rows: usize,
    blocks: usize,
    /// Whole cache lines, because a tile of the matrix unit is loaded line by line.
    words: Vec<Line>,
    /// f32.
    scales: Vec<Line>,
    /// i32.
    offsets: Vec<Line>,
    /// f32.
    sums: Vec<Line>,
}

/// One block of one row, to be written.
#[derive(Debug)]
pub(crate) struct BlockMut<'a> {
    pub(crate) words: &'a mut [u32],
    // One element each for q8, none for bf16.
    scale: &'a mut [f32],
    offset: &'a mut [i32],
    sum: &'a mut [f32],
}

impl BlockMut<'_> {
    /// What belongs to the bytes of a q8 block; nothing for bf16.
    #[inline(always)]
    pub(crate) fn set_scale(self, scale: f32, byte_sum: i32) {
        if let ([to_scale], [to_offset], [to_sum]) = (self.scale, self.offset, self.sum) {
            *to_scale = scale;
            *to_offset = offset(byte_sum);
            *to_sum = scale * byte_sum as f32;
        }
    }
}

/// What the kernels read of one row, or of the rows behind it in its group, from some block on: row `r` of block `b`
/// begins at `b * GROUP_ROWS + r` times the words (or scales) of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowRef<'a> {
    pub(crate) words: &'a [u32],
    pub(crate) scales: &'a [f32],
    pub(crate) offsets: &'a [i32],
    pub(crate) sums: &'a [f32],
}

/// Where a block of a row lies, in blocks.
const fn place(blocks: usize, row: usize, block: usize) -> usize {
    (row / GROUP_ROWS * blocks + block) * GROUP_ROWS + row % GROUP_ROWS
}

/// The offset of a block whose bytes have this sum: -128 times it.
pub(crate) const fn offset(byte_sum: i32) -> i32 {
    -128 * byte_sum
}

/// Words of one block.
pub(crate) const fn block_words(format: RowFormat) -> usize {
    match format {
        RowFormat::F32 => BLOCK,
        RowFormat::Bf16 => BLOCK / 2,
        RowFormat::Q8 => BLOCK / 4,
    }
}

/// Scales (and offsets, and sums) of one block.
const fn block_scales(format: RowFormat) -> usize {
    match format {
        RowFormat::F32 | RowFormat::Bf16 => 0,
        RowFormat::Q8 => 1,
    }
}

impl Rows {
    /// No rows yet; [`reserve`](Self::reserve) makes room.
    pub(crate) fn new(format: RowFormat, cols: usize) -> Self {
        Self {
            format,
            num_rows: 0,
            blocks: cols.div_ceil(BLOCK),
            words: Vec::new(),
            scales: Vec::new(),
            offsets: Vec::new(),
            sums: Vec::new(),
        }
    }

    pub(crate) fn format(&self) -> RowFormat {
        self.format
    }

    /// Makes room for at least `num_rows` rows, whole groups; what they hold is undefined until written.
    pub(crate) fn reserve(&mut self, num_rows: usize) {
        if num_rows <= self.num_rows {
            return;
        }
        self.num_rows = num_rows.next_multiple_of(GROUP_ROWS);
        // The words of 16 rows are whole lines, and so are 16 scales.
        let lines = |block_words| self.num_rows * self.blocks * block_words / LANES;
        let (words, scales) = (block_words(self.format), block_scales(self.format));
        self.words.resize(lines(words), Line([0; 64]));
        self.scales.resize(lines(scales), Line([0; 64]));
        self.offsets.resize(lines(scales), Line([0; 64]));
        self.sums.resize(lines(scales), Line([0; 64]));
    }

    /// Blocks of all rows of the group that begins at `row`.
    ///
    /// # Panics
    /// When `row` begins no group, or the group or a block does not exist.
    #[inline]
    pub(crate) fn group(&self, row: usize, block_begin: usize, num_blocks: usize) -> RowRef<'_> {
        assert!(row.is_multiple_of(GROUP_ROWS), "row {row} begins no group");
        self.part(row, GROUP_ROWS, block_begin, num_blocks)
    }

    /// Blocks `block_begin..block_begin + num_blocks` of `rows` rows of a group.
    ///
    /// # Panics
    /// When they are not in one group, or a row or block does not exist.
    #[inline]
    pub(crate) fn part(
        &self,
        row: usize,
        rows: usize,
        block_begin: usize,
        num_blocks: usize,
    ) -> RowRef<'_> {
        assert!(row % GROUP_ROWS + rows <= GROUP_ROWS, "rows of one group");
        assert!(block_begin + num_blocks <= self.blocks, "block of a row");
        let begin = place(self.blocks, row, block_begin);
        let end = match num_blocks {
            0 => begin,
            _ => begin + (num_blocks - 1) * GROUP_ROWS + rows,
        };
        let (words, scales) = (block_words(self.format), block_scales(self.format));
        RowRef {
            words: &bytemuck::cast_slice(&self.words)[begin * words..end * words],
            scales: &bytemuck::cast_slice(&self.scales)[begin * scales..end * scales],
            offsets: &bytemuck::cast_slice(&self.offsets)[begin * scales..end * scales],
            sums: &bytemuck::cast_slice(&self.sums)[begin * scales..end * scales],
        }
    }

    /// For writing from the items of a parallel run.
    pub(crate) fn writer(&mut self) -> RowsWriter<'_> {
        RowsWriter {
            format: self.format,
            blocks: self.blocks,
            words: Disjoint::new(bytemuck::cast_slice_mut(&mut self.words)),
            scales: Disjoint::new(bytemuck::cast_slice_mut(&mut self.scales)),
            offsets: Disjoint::new(bytemuck::cast_slice_mut(&mut self.offsets)),
            sums: Disjoint::new(bytemuck::cast_slice_mut(&mut self.sums)),
        }
    }
}

/// Writes blocks of [`Rows`] from the items of one parallel run.
#[derive(Debug)]
pub(crate) struct RowsWriter<'a> {
    pub(crate) format: RowFormat,
    blocks: usize,
    words: Disjoint<'a, u32>,
    scales: Disjoint<'a, f32>,
    offsets: Disjoint<'a, i32>,
    sums: Disjoint<'a, f32>,
}

impl RowsWriter<'_> {
    /// One block.
    ///
    /// # Safety
    /// While the result lives, no other call may ask for the same block.
    pub(crate) unsafe fn block(&self, row: usize, block: usize) -> BlockMut<'_> {
        assert!(block < self.blocks, "block of a row");
        let at = place(self.blocks, row, block);
        let (words, scales) = (block_words(self.format), block_scales(self.format));
        // SAFETY: blocks do not overlap, and the caller promises that nobody else holds this one.
        unsafe {
            BlockMut {
                words: self.words.range_mut(at * words..(at + 1) * words),
                scale: self.scales.range_mut(at * scales..(at + 1) * scales),
                offset: self.offsets.range_mut(at * scales..(at + 1) * scales),
                sum: self.sums.range_mut(at * scales..(at + 1) * scales),
            }
        }
    }

    /// Copies one row from its wire form, see [`RowFormat`].
    ///
    /// # Safety
    /// While this runs, no other call may ask for a block of the same row.
    pub(crate) unsafe fn copy_wire(&self, row: usize, wire: &[u8]) {
        let values = match self.format {
            RowFormat::F32 | RowFormat::Bf16 => wire,
            RowFormat::Q8 => &wire[..self.blocks * BLOCK],
        };
        let scales = &wire[values.len()..];
        let block_bytes = block_words(self.format) * 4;
        for (i, bytes) in values.chunks(block_bytes).enumerate() {
            // SAFETY: the caller promises the whole row.
            let block = unsafe { self.block(row, i) };
            let target: &mut [u8] = bytemuck::cast_slice_mut(block.words);
            target[..bytes.len()].copy_from_slice(bytes);
            target[bytes.len()..].fill(0);
            if let Some(scale) = scales.as_chunks().0.get(i) {
                let byte_sum = bytes.iter().map(|&q| i32::from(q as i8)).sum();
                block.set_scale(f32::from_le_bytes(*scale), byte_sum);
            }
        }
    }
}
