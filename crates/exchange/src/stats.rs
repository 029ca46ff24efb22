//! Counters of the calling side, readable from any thread while the engine runs.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tramontane_types::{LayerId, ModelGeometry};

use crate::Job;

/// What the exchange of one engine has done since it was made. All but the link only grow.
#[derive(Debug)]
pub struct ExchangeStats {
    made: Instant,
    /// Milliseconds after `made` since when the running layer is stuck; 0 while it goes on.
    stuck_since: AtomicU64,
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
    /// (row, expert) pairs that the rows chose, `[num_layers * num_experts]`, layer-major.
    pub chosen: Vec<AtomicU64>,
    /// Microseconds that a call to the usual peer takes beyond its service; 0 before the first.
    pub link_us: AtomicU64,
    num_experts: usize,
}

impl ExchangeStats {
    pub(crate) fn new(geometry: &ModelGeometry) -> Self {
        let num_experts = geometry.num_experts;
        let chosen = std::iter::repeat_with(AtomicU64::default);
        Self {
            chosen: chosen.take(geometry.num_layers * num_experts).collect(),
            num_experts,
            ..Self::default()
        }
    }

    /// Counts what the rows of a layer chose.
    pub(crate) fn count_chosen(&self, layer: LayerId, wants: &[Job]) {
        let begin = usize::from(layer.0) * self.num_experts;
        for want in wants {
            if let Some(chosen) = self.chosen.get(begin + usize::from(want.expert.0)) {
                add(chosen, want.row_ids.len());
            }
        }
    }

    /// Counts what steps without an exchange chose, in the order of `chosen`.
    pub(crate) fn count_whole_steps(&self, chosen: &[u64]) {
        for (counter, &count) in self.chosen.iter().zip(chosen) {
            counter.fetch_add(count, Ordering::Relaxed);
        }
    }
}

impl Default for ExchangeStats {
    fn default() -> Self {
        let zero = AtomicU64::default;
        Self {
            made: Instant::now(),
            stuck_since: zero(),
            rows_local: zero(),
            rows_remote: zero(),
            bytes_sent: zero(),
            bytes_received: zero(),
            wait_us_total: zero(),
            retries: zero(),
            frames: zero(),
            chosen: Vec::new(),
            link_us: zero(),
            num_experts: 0,
        }
    }
}

impl ExchangeStats {
    /// For how long the running layer has lacked experts that nobody answers for.
    #[must_use]
    pub fn stuck_for(&self) -> Duration {
        match self.stuck_since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self
                .made
                .elapsed()
                .saturating_sub(Duration::from_millis(since)),
        }
    }

    /// Nobody could be asked for a job of the running layer, or two who were asked are silent. A call on its way to a worker
    /// that may not be there changes nothing about that.
    pub(crate) fn set_stuck(&self) {
        if self.stuck_since.load(Ordering::Relaxed) == 0 {
            let now = self.made.elapsed().as_millis() as u64;
            self.stuck_since.store(now.max(1), Ordering::Relaxed);
        }
    }

    #[cfg(test)]
    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck_since.load(Ordering::Relaxed) != 0
    }

    /// The running layer is complete.
    pub(crate) fn set_unstuck(&self) {
        self.stuck_since.store(0, Ordering::Relaxed);
    }
}

pub(crate) fn add(counter: &AtomicU64, value: usize) {
    counter.fetch_add(value as u64, Ordering::Relaxed);
}
