//! What NCCL may refuse, in values. Aborts nothing.

use std::ffi::c_int;

use super::VERSION_MIN;
use crate::libraries::NotFound;

/// Why a collective or its group failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NcclError {
    /// NCCL said so.
    #[error("NCCL, rank {rank} of {num_ranks}: {call}: {message} ({code})")]
    Call {
        /// This process.
        rank: u32,
        /// Of how many.
        num_ranks: u32,
        /// The function.
        call: &'static str,
        /// Its result.
        code: c_int,
        /// What that means.
        message: String,
    },
    /// The communicator was aborted, here or because a peer died.
    #[error("NCCL, rank {rank} of {num_ranks}: the communicator was aborted")]
    Aborted {
        /// This process.
        rank: u32,
        /// Of how many.
        num_ranks: u32,
    },
    /// A rank outside the group.
    #[error("NCCL: rank {got} of a group of {num_ranks}")]
    NoSuchRank {
        /// What came.
        got: u32,
        /// Ranks of the group.
        num_ranks: u32,
    },
    /// The library is too old.
    #[error("NCCL {got} is too old, expected at least {VERSION_MIN}")]
    TooOld {
        /// Its version.
        got: c_int,
    },
    /// There is no library.
    #[error("NCCL is missing")]
    Missing(#[source] NotFound),
}
