//! What both halves of a backend share: the shape of the model, the kernels and the threads. Holds no weights.

use tramontane_compute::{Error, HostTensor, RowFormat};
use tramontane_types::ModelGeometry;

use crate::isa::Dispatch;
use crate::pack::{PackFormat, PackedMatrix};
use crate::pool::Pool;

/// Shared by [`CpuBackend`](crate::CpuBackend), its attention workers and its experts.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) geometry: ModelGeometry,
    pub(crate) format: PackFormat,
    pub(crate) dispatch: Dispatch,
    pub(crate) pool: Pool,
}

impl Context {
    /// The format of activation rows in every product.
    pub(crate) fn row_format(&self) -> RowFormat {
        match self.format {
            PackFormat::Bf16 => RowFormat::Bf16,
            PackFormat::Q8 | PackFormat::Q4 => RowFormat::Q8,
        }
    }

    /// Packs a whole tensor.
    pub(crate) fn pack_tensor(&self, tensor: &HostTensor<'_>) -> PackedMatrix {
        let shape = (tensor.rows, tensor.cols);
        PackedMatrix::pack(self.dispatch, self.format, shape, |row, out| {
            tensor.read_row(row, 0, out);
        })
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
    let bytes = rows * cols * tensor.dtype.size();
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
