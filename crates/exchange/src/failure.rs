//! Why a batch has no outputs, and what its callers are told of it. Computes nothing.

use std::any::Any;

use tramontane_compute::Error;
use tramontane_types::Epoch;

use crate::Refusal;
use crate::limits::REFUSAL_TEXT_MAX;

/// What a caller is told when its call made the experts panic.
const PANIC_REASON: &str = "the experts failed unexpectedly";

/// Why a batch has no outputs.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The backend said so.
    Refused(Error),
    /// The backend panicked.
    Panicked,
}

impl Failure {
    /// What the caller is told by a worker that serves `epoch`. Of a panic it learns only that there was one.
    pub(crate) fn refusal(self, epoch: Epoch) -> Refusal {
        match self {
            Self::Refused(Error::NotHeld { .. }) => Refusal::Stale { epoch },
            Self::Refused(other) => {
                tracing::error!(error = %other, "expert call failed");
                let mut reason = other.to_string();
                reason.truncate(reason.floor_char_boundary(REFUSAL_TEXT_MAX));
                Refusal::Invalid(reason)
            }
            Self::Panicked => Refusal::Invalid(PANIC_REASON.to_owned()),
        }
    }
}

/// What a panic said, when it said it in words.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let owned = panic.downcast_ref::<String>().map(String::as_str);
    owned
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no text")
}
