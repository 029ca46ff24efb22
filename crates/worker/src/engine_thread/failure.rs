//! Why a sequence is not taken, or cannot go on.

use tramontane_engine::{FailureKind, SubmitError};

use super::EVENTS_MAX;

/// Why a sequence cannot go on here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerationFailure {
    /// The engine gave it up.
    #[error("{message}")]
    Step {
        /// What went wrong.
        message: String,
        /// Who may do something about it.
        kind: FailureKind,
    },
    /// Its events were not read.
    #[error("{EVENTS_MAX} events were not read")]
    SlowReader,
    /// The engine is stopping.
    #[error("the worker is stopping")]
    Stopped,
}

/// Why a sequence was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RefusedSequence {
    /// The engine refuses it.
    #[error(transparent)]
    Engine(#[from] SubmitError),
    /// The worker takes no new sequences.
    #[error("the worker is draining")]
    Draining,
    /// The engine is stopping.
    #[error("the worker is stopping")]
    Stopped,
}
