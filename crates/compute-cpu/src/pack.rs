//! Weight matrices in the kernels' layout, packed once at load. Multiplies nothing.
//!
//! A *panel* is 16 output rows; two panels are a *pair*, the unit that a tile computes. Along k a pair
//! is a sequence of blocks of 32 columns; a block is whole cache lines, so a pair is read as one
//! ascending stream:
//!
//! * bf16: 16 lines of panel a, 16 of panel b; a line holds 2 of k for each of 16 rows;
//! * q8: 8 lines of panel a, 8 of panel b (4 of k for each of 16 rows, signed), then one
//!   line with the 32 scales (f16);
//! * q4: 4 lines of panel a, 4 of panel b (low nibbles: the 4 of k of line `i` of q8, high nibbles: those
//!   of line `i + 4`), then one line of scales and one with the 32 minima (f16).
//!
//! Rows are padded to whole pairs and columns to whole blocks with zeros.

use tramontane_compute::quant::BLOCK;
use tramontane_compute::{Error, RowFormat, WeightFormat};

use crate::disjoint::Disjoint;
use crate::isa::Dispatch;
use crate::kernels::pack::{PackPair, RowSource};
use crate::memory::{Region, Slab, region_bytes};
use crate::pool::Pool;
use crate::simd::LANES;

/// Output rows of one pair of panels.
pub(crate) const PAIR_ROWS: usize = 2 * LANES;

/// One cache line.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line(pub(crate) [u8; 64]);

/// Formats that have kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PackFormat {
    Bf16,
    Q8,
    Q4,
}

impl PackFormat {
    /// Cache lines of one panel in one block, without scales and minima.
    pub(crate) const fn panel_lines(self) -> usize {
        match self {
            Self::Bf16 => 16,
            Self::Q8 => 8,
            Self::Q4 => 4,
        }
    }

    /// What the rows are that are multiplied with it.
    pub(crate) const fn row_format(self) -> RowFormat {
        match self {
            Self::Bf16 => RowFormat::Bf16,
            Self::Q8 | Self::Q4 => RowFormat::Q8,
        }
    }

    /// Cache lines of one block of a pair.
    pub(crate) const fn block_lines(self) -> usize {
        match self {
            Self::Bf16 => BF16_LINES,
            Self::Q8 => Q8_LINES,
            Self::Q4 => Q4_LINES,
        }
    }
}

pub(crate) const BF16_LINES: usize = 32;
pub(crate) const Q8_LINES: usize = 17;
pub(crate) const Q4_LINES: usize = 10;

impl TryFrom<WeightFormat> for PackFormat {
    type Error = Error;

    fn try_from(format: WeightFormat) -> Result<Self, Error> {
        match format {
            WeightFormat::Bf16 => Ok(Self::Bf16),
            WeightFormat::Q8 => Ok(Self::Q8),
            WeightFormat::Q4 => Ok(Self::Q4),
            WeightFormat::F32 | WeightFormat::E4m3 => Err(Error::WeightFormat {
                backend: "cpu".to_owned(),
                offered: "bf16, q8 or q4",
                format: format.to_string(),
            }),
        }
    }
}

/// A packed matrix `[rows, cols]`.
#[derive(Debug)]
pub(crate) struct PackedMatrix {
    format: PackFormat,
    rows: usize,
    blocks: usize,
    region: Region,
}

/// Bytes that a packed matrix takes, the rest of its last page included.
pub(crate) const fn packed_bytes(format: PackFormat, rows: usize, cols: usize) -> usize {
    region_bytes(packed_lines(format, rows, cols))
}

const fn packed_lines(format: PackFormat, rows: usize, cols: usize) -> usize {
    rows.div_ceil(PAIR_ROWS) * cols.div_ceil(BLOCK) * format.block_lines()
}

/// A matrix that is to be packed.
#[derive(Clone, Copy)]
pub(crate) struct Packing<'a> {
    pub(crate) dispatch: Dispatch,
    pub(crate) format: PackFormat,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Where each row comes from; `None` is a row of zeros.
    pub(crate) source: &'a (dyn Fn(usize) -> Option<RowSource<'a>> + Sync),
}

impl Packing<'_> {
    fn num_lines(&self) -> usize {
        packed_lines(self.format, self.rows, self.cols)
    }

    /// Packs on the calling thread.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub(crate) fn run(&self, slab: &Slab) -> Result<PackedMatrix, Error> {
        let mut region = slab.take(self.num_lines())?;
        let lines = region.lines_mut().chunks_mut(self.pair_lines());
        for (pair, lines) in lines.enumerate() {
            self.pack_pair(pair, lines);
        }
        Ok(self.packed(region))
    }

    /// Packs with all threads of a pool.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub(crate) fn run_on(&self, pool: &Pool, slab: &Slab) -> Result<PackedMatrix, Error> {
        let mut region = slab.take(self.num_lines())?;
        let len = self.pair_lines();
        let lines = Disjoint::new(region.lines_mut());
        pool.run(self.rows.div_ceil(PAIR_ROWS), &|pair| {
            // SAFETY: this item alone has this pair.
            let lines = unsafe { lines.range_mut(pair * len..(pair + 1) * len) };
            self.pack_pair(pair, lines);
        });
        Ok(self.packed(region))
    }

    fn pair_lines(&self) -> usize {
        self.cols.div_ceil(BLOCK) * self.format.block_lines()
    }

    fn pack_pair(&self, pair: usize, lines: &mut [Line]) {
        let row = |i| pair * PAIR_ROWS + i;
        let rows = std::array::from_fn(|i| {
            let is_padding = row(i) >= self.rows;
            (self.source)(row(i)).filter(|_| !is_padding)
        });
        self.dispatch.run(PackPair {
            format: self.format,
            cols: self.cols,
            rows: &rows,
            lines,
        });
    }

    fn packed(&self, region: Region) -> PackedMatrix {
        PackedMatrix {
            format: self.format,
            rows: self.rows,
            blocks: self.cols.div_ceil(BLOCK),
            region,
        }
    }
}

impl PackedMatrix {
    /// Rows without padding.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Pairs of panels.
    pub(crate) fn pairs(&self) -> usize {
        self.rows.div_ceil(PAIR_ROWS)
    }

    /// Blocks along k.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(crate) fn format(&self) -> PackFormat {
        self.format
    }

    /// The lines of one pair, block after block; none behind the last pair.
    #[inline]
    pub(crate) fn pair(&self, pair: usize) -> &[Line] {
        let len = self.blocks * self.format.block_lines();
        let lines = self.region.lines();
        lines.get(pair * len..(pair + 1) * len).unwrap_or_default()
    }
}
