//! What a backend may refuse, with the numbers that did not fit.

use tramontane_types::ExpertSlice;

/// Why a backend could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer or tensor has the wrong number of elements or bytes.
    #[error("{what}: expected {expected}, got {got}")]
    Shape {
        /// Which buffer or tensor.
        what: String,
        /// What the geometry asks for.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// An expert slice was asked for that is not loaded here.
    #[error("{slice} is not held here")]
    NotHeld {
        /// The slice asked for.
        slice: ExpertSlice,
    },
    /// An index (token id, row, page, layer, expert) is out of range.
    #[error("{what} {got} is out of range, expected less than {limit}")]
    OutOfRange {
        /// Which index.
        what: &'static str,
        /// One behind the largest allowed value.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// This backend does not offer the weight format.
    #[error("backend {backend} offers weights as {offered}, got {format}")]
    WeightFormat {
        /// Name of the backend.
        backend: String,
        /// The formats that it offers.
        offered: &'static str,
        /// Name of the format.
        format: String,
    },
    /// The library underneath refused (candle in the reference backend).
    #[error("{operation}")]
    Library {
        /// What was being computed.
        operation: &'static str,
        /// The library's own words.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// Refuses a size other than the expected one.
///
/// # Errors
/// [`Error::Shape`], with both.
pub fn check_size(what: &str, expected: usize, got: usize) -> Result<(), Error> {
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
///
/// # Errors
/// [`Error::OutOfRange`], with both.
pub fn check_index(what: &'static str, limit: usize, got: usize) -> Result<(), Error> {
    if got < limit {
        return Ok(());
    }
    Err(Error::OutOfRange { what, limit, got })
}
