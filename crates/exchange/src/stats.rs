//! Counters of the calling side, readable from any thread while the engine runs.

use std::sync::atomic::{AtomicU64, Ordering};

/// What the exchange of one engine has done since it was made. All of them only grow.
#[derive(Debug, Default)]
pub struct ExchangeStats {
    /// (row, expert slice) pairs computed by our own experts.
    pub rows_local: AtomicU64,
    /// (row, expert slice) pairs that other workers answered.
    pub rows_remote: AtomicU64,
    /// Bytes of rows sent.
    pub bytes_sent: AtomicU64,
    /// Bytes of outputs received.
    pub bytes_received: AtomicU64,
    /// Microseconds spent waiting for replies.
    pub wait_us_total: AtomicU64,
    /// Calls that were refused, lost or late, and whose jobs were planned again.
    pub retries: AtomicU64,
    /// Calls sent.
    pub frames: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, value: usize) {
    counter.fetch_add(value as u64, Ordering::Relaxed);
}
