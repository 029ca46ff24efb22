//! Rows as e4m3 for products with such weights: their memory, and the kernel that rounds rows of bf16. Decides nothing.

use tramontane_compute::Error;
use tramontane_types::{SEGMENTS_PER_EXPERT, slice};

use super::abi::Round;
use super::context::{Context, Rows};
use crate::device::{Args, Buffer, DeviceError, Kernel, Shape, Stream};

/// Rows of activations as e4m3, and their scales.
#[derive(Debug)]
pub(super) struct RoundedRows {
    rows: Buffer,
    /// `[rows, parts]` f32.
    scales: Buffer,
    cols: usize,
    part_cols: usize,
    parts: usize,
    kernel: Kernel,
}

/// Bytes from row to row.
pub(super) const fn rounded_stride(cols: usize) -> usize {
    cols.next_multiple_of(16)
}

impl RoundedRows {
    /// With one scale for a whole row; `None` where products read rows of bf16.
    pub(super) fn new(context: &Context, rows: usize, cols: usize) -> Result<Option<Self>, Error> {
        Self::in_parts(context, rows, cols, (cols, 1))
    }

    /// The same with one scale for each segment of the columns of ff.
    pub(super) fn of_segments(context: &Context, rows: usize) -> Result<Option<Self>, Error> {
        let ff = context.geometry.ff;
        let parts = usize::from(SEGMENTS_PER_EXPERT);
        Self::in_parts(context, rows, ff, (slice::segment_len(ff), parts))
    }

    fn in_parts(
        context: &Context,
        rows: usize,
        cols: usize,
        (part_cols, parts): (usize, usize),
    ) -> Result<Option<Self>, Error> {
        let Some(kernel) = context.kernels.round else {
            return Ok(None);
        };
        Ok(Some(Self {
            rows: context.buffer(rows * rounded_stride(cols))?,
            scales: context.buffer(rows * parts * size_of::<f32>())?,
            cols,
            part_cols,
            parts,
            kernel,
        }))
    }

    /// For a product of `num_tokens` of them.
    pub(super) fn as_rows(&self, num_tokens: usize) -> Rows {
        Rows {
            address: self.rows.address(),
            num_tokens,
            stride: rounded_stride(self.cols),
            scales: self.scales.address(),
        }
    }

    /// Queues the rounding of `from`, whose number of rows the device finds at `num_rows`; no more than it says itself.
    ///
    /// # Safety
    /// As [`Stream::launch`].
    pub(super) unsafe fn fill(
        &self,
        stream: &Stream,
        from: Rows,
        num_rows: u64,
    ) -> Result<(), DeviceError> {
        let args = Round {
            out: self.rows.address(),
            scales: self.scales.address(),
            rows: from.address,
            num_rows,
            cols: self.cols as u32,
            part_cols: self.part_cols as u32,
            row_stride: (from.stride / 2) as u32,
            out_stride: rounded_stride(self.cols) as u32,
            scale_stride: self.parts as u32,
            pad: 0,
        };
        let shape = Shape::grid2(from.num_tokens as u32, self.parts as u32, 256, 32);
        // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
        unsafe { stream.launch(self.kernel, shape, Args::new().pod(&args)) }
    }
}
