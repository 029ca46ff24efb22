//! How large one call may be. Both sides derive the same numbers from the model's shape.

use tramontane_compute::RowFormat;
use tramontane_types::{ModelGeometry, SEGMENTS_PER_EXPERT};

/// Most rows of one call; a larger dispatch is cut into several.
pub const CALL_ROWS_MAX: usize = 512;

/// Most output vectors (row, expert, node) of one call, unless a single row needs more.
pub const CALL_VECTORS_MAX: usize = 2048;

/// Upper bound of the encoded size of one job beside its row ids: tags, lengths and three numbers.
const JOB_OVERHEAD_BYTES: usize = 40;

/// Upper bound of one encoded row id.
const ROW_ID_BYTES: usize = 5;

/// Upper bound of everything else in a frame, the text of a refusal included.
const FRAME_OVERHEAD_BYTES: usize = 4096;

/// Longest text of a refusal or status that we send or keep.
pub const REFUSAL_TEXT_MAX: usize = 512;

/// The limits of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallLimits {
    /// Most rows.
    pub rows_max: usize,
    /// Most output vectors.
    pub vectors_max: usize,
    /// Bytes of one row.
    pub row_bytes: usize,
    /// Bytes of one output vector.
    pub vector_bytes: usize,
}

impl CallLimits {
    /// The limits for a model whose rows travel in `row_format`.
    #[must_use]
    pub fn new(geometry: &ModelGeometry, row_format: RowFormat) -> Self {
        let one_row = geometry.top_k * usize::from(SEGMENTS_PER_EXPERT);
        Self {
            rows_max: CALL_ROWS_MAX,
            vectors_max: CALL_VECTORS_MAX.max(one_row),
            row_bytes: row_format.row_bytes(geometry.hidden),
            vector_bytes: geometry.hidden * size_of::<f32>(),
        }
    }

    /// Most bytes of an encoded call.
    #[must_use]
    pub const fn request_bytes_max(&self) -> usize {
        self.rows_max * self.row_bytes
            + self.vectors_max * (JOB_OVERHEAD_BYTES + ROW_ID_BYTES)
            + FRAME_OVERHEAD_BYTES
    }

    /// Most bytes of an encoded reply.
    #[must_use]
    pub const fn reply_bytes_max(&self) -> usize {
        self.vectors_max * self.vector_bytes + FRAME_OVERHEAD_BYTES
    }
}
