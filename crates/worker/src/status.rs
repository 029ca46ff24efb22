//! What callers of `Generate` are told when it does not work: one table from reasons to gRPC codes.
//!
//! Every status that a worker makes carries an `ErrorInfo` of [`ERROR_DOMAIN`]. One without comes from
//! the transport, and says nothing about the request.

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};
use tramontane_engine::{FailureKind, SubmitError};
use tramontane_grammar::GrammarError;
use tramontane_proto::InvalidWire;
use tramontane_types::InvalidSampling;

use crate::engine_thread::{GenerationFailure, RefusedSequence};

/// Domain of the `ErrorInfo` in every status of a worker.
pub const ERROR_DOMAIN: &str = "tramontane";
/// When to ask a worker again whose queue was full.
pub const QUEUE_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Reasons in `ErrorInfo`.
pub mod reason {
    /// The request breaks a rule; sending it again is of no use.
    pub const INVALID: &str = "INVALID";
    /// A sequence of this id runs already.
    pub const DUPLICATE: &str = "DUPLICATE";
    /// The queue is full; another worker may have room.
    pub const QUEUE_FULL: &str = "QUEUE_FULL";
    /// The worker takes no new sequences; others do.
    pub const DRAINING: &str = "DRAINING";
    /// The worker serves no placement yet; others may.
    pub const NOT_READY: &str = "NOT_READY";
    /// The worker has other weights, or computes in another class, than the sequence began with.
    pub const OTHER_WEIGHTS: &str = "OTHER_WEIGHTS";
    /// The worker keeps no sequences at all.
    pub const NO_ATTENTION: &str = "NO_ATTENTION";
    /// The worker does not know what its tokens stand for, which a constraint needs.
    pub const NO_VOCABULARY: &str = "NO_VOCABULARY";
    /// A step did not complete; another worker may continue the sequence.
    pub const STEP_FAILED: &str = "STEP_FAILED";
    /// Nobody can go on in the constraint of the sequence; the message says why.
    pub const CONSTRAINT_FAILED: &str = "CONSTRAINT_FAILED";
    /// The sequence cannot be continued anywhere.
    pub const SEQUENCE_FAILED: &str = "SEQUENCE_FAILED";
    /// The client did not read its events.
    pub const SLOW_READER: &str = "SLOW_READER";
    /// The worker stopped; another worker may continue the sequence.
    pub const STOPPED: &str = "STOPPED";
    /// The worker's configuration allows no drills.
    pub const DRILLS_OFF: &str = "DRILLS_OFF";
    /// Another drill runs.
    pub const DRILL_RUNNING: &str = "DRILL_RUNNING";
    /// The worker runs where this drill cannot be.
    pub const DRILL_IMPOSSIBLE: &str = "DRILL_IMPOSSIBLE";
}

/// Why a sequence was not taken, or did not come to its end.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The message does not say what it must.
    #[error(transparent)]
    Wire(#[from] InvalidWire),
    /// A request id that is empty or too long.
    #[error("request_id has {got} bytes, expected 1 to {limit}")]
    RequestId {
        /// Its length.
        got: usize,
        /// The limit.
        limit: usize,
    },
    /// A sampling parameter is outside its range.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// The worker has no engine.
    #[error("worker {worker} has no attention role")]
    NoAttention {
        /// Which worker.
        worker: String,
    },
    /// The sequence has a constraint, and the worker no vocabulary.
    #[error("worker {worker} has no vocabulary, which the constraint of the sequence needs")]
    NoVocabulary {
        /// Which worker.
        worker: String,
    },
    /// The sequence's constraint is refused.
    #[error("the constraint {0}")]
    Grammar(#[from] GrammarError),
    /// The worker serves no placement yet.
    #[error("worker {worker} serves no placement yet")]
    NotReady {
        /// Which worker.
        worker: String,
    },
    /// The sequence began with other weights, or in another class.
    #[error("worker {worker} has {got}, expected {expected}")]
    OtherWeights {
        /// Which worker.
        worker: String,
        /// What the sequence began with.
        expected: String,
        /// What the worker has.
        got: String,
    },
    /// The sequence was not taken.
    #[error(transparent)]
    Refused(#[from] RefusedSequence),
    /// The sequence ended early.
    #[error(transparent)]
    Failed(#[from] GenerationFailure),
}

impl GenerateError {
    /// The gRPC code and the reason.
    #[must_use]
    pub const fn code(&self) -> (Code, &'static str) {
        match self {
            Self::Wire(_) | Self::RequestId { .. } | Self::Sampling(_) => {
                (Code::InvalidArgument, reason::INVALID)
            }
            Self::NoAttention { .. } => (Code::FailedPrecondition, reason::NO_ATTENTION),
            Self::NoVocabulary { .. } => (Code::FailedPrecondition, reason::NO_VOCABULARY),
            Self::Grammar(error) => grammar_code(error),
            Self::NotReady { .. } => (Code::Unavailable, reason::NOT_READY),
            Self::OtherWeights { .. } => (Code::FailedPrecondition, reason::OTHER_WEIGHTS),
            Self::Refused(RefusedSequence::Draining) => (Code::Unavailable, reason::DRAINING),
            Self::Refused(RefusedSequence::Stopped) | Self::Failed(GenerationFailure::Stopped) => {
                (Code::Unavailable, reason::STOPPED)
            }
            Self::Refused(RefusedSequence::Engine(error)) => match error {
                _ if error.is_retryable() => (Code::ResourceExhausted, reason::QUEUE_FULL),
                SubmitError::Duplicate { .. } => (Code::AlreadyExists, reason::DUPLICATE),
                _ => (Code::InvalidArgument, reason::INVALID),
            },
            Self::Failed(GenerationFailure::SlowReader) => {
                (Code::ResourceExhausted, reason::SLOW_READER)
            }
            Self::Failed(GenerationFailure::Step { kind, .. }) => failure_code(*kind),
        }
    }
}

const fn failure_code(kind: FailureKind) -> (Code, &'static str) {
    match kind {
        FailureKind::Step => (Code::Unavailable, reason::STEP_FAILED),
        FailureKind::Full => (Code::ResourceExhausted, reason::QUEUE_FULL),
        FailureKind::Constraint => (Code::InvalidArgument, reason::CONSTRAINT_FAILED),
        FailureKind::Sequence => (Code::Internal, reason::SEQUENCE_FAILED),
    }
}

const fn grammar_code(error: &GrammarError) -> (Code, &'static str) {
    match error {
        _ if error.is_retryable() => (Code::ResourceExhausted, reason::QUEUE_FULL),
        _ if error.is_internal() => (Code::Unavailable, reason::STOPPED),
        // It was sampled in another grammar, or with another vocabulary.
        GrammarError::Resumed { .. } => (Code::Internal, reason::SEQUENCE_FAILED),
        GrammarError::Match(_) => (Code::InvalidArgument, reason::CONSTRAINT_FAILED),
        _ => (Code::InvalidArgument, reason::INVALID),
    }
}

impl From<GenerateError> for Status {
    fn from(error: GenerateError) -> Self {
        let (code, reason) = error.code();
        let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, HashMap::new());
        if reason == reason::QUEUE_FULL {
            details.set_retry_info(Some(QUEUE_RETRY_AFTER));
        }
        Self::with_error_details(code, error.to_string(), details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_carries_its_reason() {
        let refused = |error: SubmitError| GenerateError::Refused(error.into());
        let table: [(GenerateError, Code, &str); 7] = [
            (
                refused(SubmitError::QueueFull { limit: 3 }),
                Code::ResourceExhausted,
                "QUEUE_FULL",
            ),
            (
                refused(SubmitError::EmptyPrompt),
                Code::InvalidArgument,
                "INVALID",
            ),
            (
                refused(SubmitError::TooLong {
                    tokens: 9,
                    limit: 8,
                }),
                Code::InvalidArgument,
                "INVALID",
            ),
            (
                RefusedSequence::Draining.into(),
                Code::Unavailable,
                "DRAINING",
            ),
            (
                GenerationFailure::SlowReader.into(),
                Code::ResourceExhausted,
                "SLOW_READER",
            ),
            (
                GenerateError::NoAttention {
                    worker: "a".to_owned(),
                },
                Code::FailedPrecondition,
                "NO_ATTENTION",
            ),
            (
                GenerateError::OtherWeights {
                    worker: "a".to_owned(),
                    expected: "f1".to_owned(),
                    got: "f2".to_owned(),
                },
                Code::FailedPrecondition,
                "OTHER_WEIGHTS",
            ),
        ];
        for (error, code, reason) in table {
            let status = Status::from(error.clone());
            assert_eq!(status.code(), code, "{error}");
            let info = status.get_details_error_info().unwrap();
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason, ERROR_DOMAIN)
            );
            let is_full = reason == reason::QUEUE_FULL;
            assert_eq!(
                status.get_details_retry_info().is_some(),
                is_full,
                "{error}"
            );
        }
    }

    #[test]
    fn whoever_can_mend_a_failure_is_told() {
        let table = [
            (FailureKind::Step, Code::Unavailable, "STEP_FAILED"),
            (FailureKind::Full, Code::ResourceExhausted, "QUEUE_FULL"),
            (
                FailureKind::Constraint,
                Code::InvalidArgument,
                "CONSTRAINT_FAILED",
            ),
            (FailureKind::Sequence, Code::Internal, "SEQUENCE_FAILED"),
        ];
        for (kind, code, reason) in table {
            let message = "m".to_owned();
            let error = GenerateError::from(GenerationFailure::Step { message, kind });
            assert_eq!(error.code(), (code, reason));
        }
    }
}
