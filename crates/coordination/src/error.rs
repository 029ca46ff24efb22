//! What can go wrong with the store and with what is read from it. Never carries a secret.

use std::time::Duration;

use crate::store::{LeaseId, Revision};

/// Why a call to the store, or a value read from it, was no use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Nobody answered, or whoever answered has no leader.
    #[error("{operation}: store unavailable: {detail}")]
    Unavailable {
        /// The call.
        operation: &'static str,
        /// What the last attempt met.
        detail: String,
    },
    /// The deadline of the call passed; a write may or may not have happened.
    #[error("{operation}: no answer within {after:?}")]
    Timeout {
        /// The call.
        operation: &'static str,
        /// The limit that passed.
        after: Duration,
    },
    /// A key changed between reading and writing it.
    #[error("key {key}: changed by somebody else, expected revision {expected:?}")]
    Conflict {
        /// The key.
        key: String,
        /// The revision that the caller had read.
        expected: Option<Revision>,
    },
    /// The history that a watch asked for is gone: list again.
    #[error("history from revision {from} is gone, the oldest kept is {oldest}")]
    Compacted {
        /// Where the watch wanted to begin.
        from: Revision,
        /// Oldest revision still kept.
        oldest: Revision,
    },
    /// The store is not the one that was read before: its data was lost or it was exchanged. List again.
    #[error("store was replaced: at revision {found}, expected {expected} or later")]
    Replaced {
        /// Newest revision that had been read before.
        expected: Revision,
        /// Revision of the store that answers now.
        found: Revision,
    },
    /// A value, a listing or a message above its limit.
    #[error("{what}: size {size} is above the limit of {max}")]
    TooLarge {
        /// What is too large.
        what: String,
        /// Its size.
        size: usize,
        /// The limit.
        max: usize,
    },
    /// The lease is gone: expired, revoked or never granted.
    #[error("lease {lease} does not exist")]
    LeaseNotFound {
        /// The lease.
        lease: LeaseId,
    },
    /// The store refuses writes until an operator gives it room.
    #[error("{operation}: store is out of space")]
    OutOfSpace {
        /// The call.
        operation: &'static str,
    },
    /// Wrong user, password or permission.
    #[error("{operation}: not allowed: {detail}")]
    Denied {
        /// The call.
        operation: &'static str,
        /// What the store says.
        detail: String,
    },
    /// A key, an argument or a stored value that breaks its rule.
    #[error("{what}: {detail}")]
    Invalid {
        /// What is wrong, such as a key.
        what: String,
        /// The rule and what was found.
        detail: String,
    },
}

impl Error {
    /// Whether the same call may work later without anybody changing anything.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::Timeout { .. })
    }

    pub(crate) fn invalid(what: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Invalid {
            what: what.into(),
            detail: detail.into(),
        }
    }
}
