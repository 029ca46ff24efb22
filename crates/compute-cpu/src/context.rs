//! What both halves of a backend share: the shape of the model, the kernels and the threads. Holds no weights.

use tramontane_compute::{DType, Error, HostTensor, RowFormat};
use tramontane_types::ModelGeometry;

use crate::isa::Dispatch;
use crate::kernels::pack::RowSource;
use crate::memory::Slab;
use crate::pack::{PackFormat, PackedMatrix, Packing};
use crate::pool::Pool;

/// Shared by [`CpuBackend`](crate::CpuBackend), its attention workers and its experts.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) geometry: ModelGeometry,
    /// What was asked for; see [`matrix_format`](Self::matrix_format).
    pub(crate) format: PackFormat,
    pub(crate) dispatch: Dispatch,
    pub(crate) pool: Pool,
    /// Memory of all packed matrices.
    pub(crate) weights: Slab,
}

/// What a matrix belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// q, k, v, o and the LM head.
    Attention,
    /// `w1`, `w2` and `w3`.
    Expert,
}

impl Context {
    /// The format of activation rows in every product.
    pub(crate) fn row_format(&self) -> RowFormat {
        self.format.row_format()
    }

    /// The one place that decides how a matrix is stored, from the tensors that it is made of. Rows of
    /// activations are the same for all quantised matrices, so these may differ freely.
    ///
    /// Quantised files keep their own numbers: a matrix whose tensors all have q4 blocks is q4, other
    /// quantised tensors become q8, whatever was asked for. Of plain numbers, q4 means experts in q4: they
    /// are nearly all of the weights. What every token passes through stays in q8, where an error costs
    /// more than its few bytes.
    pub(crate) fn matrix_format(&self, part: Part, tensors: &[HostTensor<'_>]) -> PackFormat {
        let is_q4 = |t: &HostTensor<'_>| matches!(t.dtype, DType::Q4_0 | DType::Q4_1 | DType::Q4K);
        let is_quantised = |t: &HostTensor<'_>| t.dtype.block_len() > 1;
        match self.format {
            PackFormat::Bf16 => PackFormat::Bf16,
            _ if !tensors.is_empty() && tensors.iter().all(is_q4) => PackFormat::Q4,
            _ if tensors.iter().any(is_quantised) => PackFormat::Q8,
            PackFormat::Q4 if part == Part::Expert => PackFormat::Q4,
            PackFormat::Q8 | PackFormat::Q4 => PackFormat::Q8,
        }
    }

    /// Packs tensors of the attention half, one below the other, with all threads.
    pub(crate) fn pack_attention(&self, tensors: &[HostTensor<'_>]) -> Result<PackedMatrix, Error> {
        let source = |row| {
            let mut row = row;
            for &tensor in tensors {
                if row < tensor.rows {
                    return Some(RowSource {
                        tensor,
                        row,
                        col: 0,
                    });
                }
                row -= tensor.rows;
            }
            None
        };
        let packing = Packing {
            dispatch: self.dispatch,
            format: self.matrix_format(Part::Attention, tensors),
            rows: tensors.iter().map(|tensor| tensor.rows).sum(),
            cols: tensors.first().map_or(0, |tensor| tensor.cols),
            source: &source,
        };
        packing.run_on(&self.pool, &self.weights)
    }
}

/// Refuses a tensor that is not `[rows, cols]` or whose bytes do not match its shape.
pub(crate) fn check_tensor(
    what: &str,
    tensor: &HostTensor<'_>,
    (rows, cols): (usize, usize),
) -> Result<(), Error> {
    check_size(&format!("rows of {what}"), rows, tensor.rows)?;
    check_size(&format!("columns of {what}"), cols, tensor.cols)?;
    // No number of bytes is right for a row that is no whole number of blocks.
    let bytes = tensor.expected_bytes().unwrap_or(usize::MAX);
    check_size(&format!("bytes of {what}"), bytes, tensor.data.len())
}

/// Refuses a size other than the expected one.
pub(crate) fn check_size(what: &str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Shape {
        what: what.to_owned(),
        expected,
        got,
    })
}

/// Refuses an index that is not below `limit`.
pub(crate) fn check_index(what: &'static str, limit: usize, got: usize) -> Result<(), Error> {
    if got < limit {
        return Ok(());
    }
    Err(Error::OutOfRange { what, limit, got })
}
