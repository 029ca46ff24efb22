//! What the ranks of an island exchange, queued on a stream of each: the seam that NCCL and the emulator share.
//!
//! Ranks queue the same operations in the same order. Nothing here reduces: sums are taken by the kernels, in one
//! order, so that they do not depend on how data travelled.

use std::fmt;

use crate::device::{DeviceError, Handle};
use crate::nccl::{Communicator, ElementType, NcclError, Span};

/// One rank's place among connected devices.
///
/// # Safety
/// Of the unsafe functions: addresses are good for as many bytes as are said until the stream has passed what was
/// queued, and the stream is the rank's device's.
#[expect(
    clippy::missing_safety_doc,
    reason = "one promise for both, at the trait"
)]
pub trait Collective: Send + Sync + fmt::Debug {
    /// This rank; 0 leads.
    fn rank(&self) -> u32;

    /// How many there are.
    fn num_ranks(&self) -> u32;

    /// Queues gathering `bytes` of every rank, in order of ranks, at `at`, where this rank's part is in place.
    unsafe fn all_gather(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError>;

    /// Queues copying `bytes` at `at` of rank 0 to `at` of all others.
    unsafe fn broadcast(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError>;

    /// What has gone wrong since. To be asked after the stream was waited for and before a result is used: an
    /// operation that was aborted ends like one that was done.
    ///
    /// # Errors
    /// That; nothing works from then on.
    fn check(&self) -> Result<(), DeviceError>;

    /// Ends everything that is queued or runs, now and here; the other ranks notice. Any thread may do it. It may take
    /// until the graphs with operations of this were given back.
    fn abort(&self);
}

impl Communicator {
    fn failed(&self, error: &NcclError) -> DeviceError {
        DeviceError::Ranks {
            rank: Self::rank(self),
            num_ranks: Self::num_ranks(self),
            message: error.to_string(),
        }
    }
}

fn bytes_at(address: u64, len: usize) -> Span {
    Span {
        address,
        len,
        element: ElementType::U8,
    }
}

impl Collective for Communicator {
    fn rank(&self) -> u32 {
        Self::rank(self)
    }

    fn num_ranks(&self) -> u32 {
        Self::num_ranks(self)
    }

    unsafe fn all_gather(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError> {
        let _inside = self.inside();
        let own = at + u64::from(Self::rank(self)) * bytes as u64;
        // SAFETY: the caller's promise; NCCL allows a part that is in place.
        let queued = unsafe { Self::all_gather(self, bytes_at(own, bytes), at, stream.to_cuda()) };
        queued.map_err(|error| self.failed(&error))
    }

    unsafe fn broadcast(&self, at: u64, bytes: usize, stream: Handle) -> Result<(), DeviceError> {
        let _inside = self.inside();
        // SAFETY: the caller's promise.
        let queued = unsafe { Self::broadcast(self, bytes_at(at, bytes), 0, stream.to_cuda()) };
        queued.map_err(|error| self.failed(&error))
    }

    fn check(&self) -> Result<(), DeviceError> {
        let _inside = self.inside();
        Self::check(self).map_err(|error| self.failed(&error))
    }

    fn abort(&self) {
        Self::abort(self);
    }
}
