//! How long to wait for a worker's answer before another holder is asked too. Reads no clock.
//!
//! As TCP does for its retransmissions (RFC 6298): a smoothed time of answers and its mean deviation, for
//! each worker and size of call. What answers take longer than that, one call in some dozens, is asked of
//! a second holder; a budget keeps a busy cluster from doubling its own work.

use std::cell::Cell;
use std::collections::HashMap;
use std::time::Duration;

use tramontane_types::WorkerId;

/// A second holder is never asked sooner: a thread that lost its core is back before.
pub(crate) const HEDGE_MIN: Duration = Duration::from_millis(25);
/// Answers of one worker to calls of one size before their times mean anything.
const SAMPLES_MIN: u32 = 8;
/// Weight of a new time in the mean.
const MEAN_GAIN: f64 = 1.0 / 8.0;
/// Weight of a new deviation in the mean deviation.
const DEVIATION_GAIN: f64 = 1.0 / 4.0;
/// Deviations above the mean that are still usual.
const DEVIATIONS: f64 = 4.0;
/// Sizes are told apart by powers of two of their output bytes, up to this.
const NUM_SIZES: usize = 40;
/// Second holders asked per call, in the long run.
const HEDGES_PER_CALL: f64 = 0.05;
/// Second holders asked in a row after a calm time: about one for each worker that a call may need.
const HEDGES_MAX: f64 = 16.0;
/// Workers remembered before all are forgotten: far above those of one placement that matter at once.
const REMEMBERED_MAX: usize = 1024;

/// Times of answers, and the budget for asking twice.
#[derive(Debug)]
pub(crate) struct Patience {
    /// Longest wait, see [`crate::CALL_TIMEOUT`].
    max: Duration,
    workers: HashMap<WorkerId, [Times; NUM_SIZES]>,
    hedges: Cell<f64>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Times {
    num: u32,
    /// Seconds.
    mean: f64,
    /// Seconds.
    deviation: f64,
}

impl Patience {
    pub(crate) fn new(max: Duration) -> Self {
        Self {
            max,
            workers: HashMap::new(),
            hedges: Cell::new(HEDGES_MAX),
        }
    }

    /// How long a call whose answer has `bytes` may take, on this worker, before it is late.
    pub(crate) fn with(&self, worker: &WorkerId, bytes: usize) -> Duration {
        let times = self.workers.get(worker).map(|sizes| sizes[size(bytes)]);
        let Some(times) = times.filter(|times| times.num >= SAMPLES_MIN) else {
            return self.max;
        };
        let usual = times.mean + DEVIATIONS * times.deviation;
        Duration::from_secs_f64(usual).clamp(HEDGE_MIN.min(self.max), self.max)
    }

    /// A call whose answer has `bytes` was answered after `took`.
    pub(crate) fn answered(&mut self, worker: &WorkerId, bytes: usize, took: Duration) {
        if self.workers.len() >= REMEMBERED_MAX && !self.workers.contains_key(worker) {
            self.workers.clear();
        }
        let fresh = || [Times::default(); NUM_SIZES];
        let sizes = match self.workers.get_mut(worker) {
            Some(sizes) => sizes,
            None => self.workers.entry(worker.clone()).or_insert_with(fresh),
        };
        sizes[size(bytes)].note(took.as_secs_f64());
        self.hedges
            .set((self.hedges.get() + HEDGES_PER_CALL).min(HEDGES_MAX));
    }

    /// Whether another holder may be asked now for a call that is late; counts it.
    pub(crate) fn may_hedge(&self) -> bool {
        let left = self.hedges.get() - 1.0;
        if left >= 0.0 {
            self.hedges.set(left);
        }
        left >= 0.0
    }
}

impl Times {
    fn note(&mut self, took: f64) {
        self.num = self.num.saturating_add(1);
        if self.num == 1 {
            (self.mean, self.deviation) = (took, took / 2.0);
            return;
        }
        let off = took - self.mean;
        self.deviation += DEVIATION_GAIN * (off.abs() - self.deviation);
        self.mean += MEAN_GAIN * off;
    }
}

/// Index of the size of a call whose answer has `bytes`.
fn size(bytes: usize) -> usize {
    (bytes.max(1).ilog2() as usize).min(NUM_SIZES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: Duration = Duration::from_millis(500);
    const KIB: usize = 1024;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_stranger_gets_the_whole_patience_and_a_known_worker_what_is_usual_for_it() {
        let (fast, slow) = (WorkerId::new("fast"), WorkerId::new("slow"));
        let mut patience = Patience::new(MAX);
        assert_eq!(patience.with(&fast, KIB), MAX);
        for _ in 0..64 {
            patience.answered(&fast, KIB, ms(1));
            patience.answered(&slow, KIB, ms(60));
        }
        assert_eq!(patience.with(&fast, KIB), HEDGE_MIN);
        let usual = patience.with(&slow, KIB);
        assert!(usual >= ms(60) && usual < ms(70), "{usual:?}");
        // A call of another size says nothing about it.
        assert_eq!(patience.with(&fast, 64 * KIB), MAX);
    }

    #[test]
    fn a_worker_that_becomes_slow_is_given_more_time_soon() {
        let worker = WorkerId::new("a");
        let mut patience = Patience::new(MAX);
        for _ in 0..64 {
            patience.answered(&worker, KIB, ms(1));
        }
        for _ in 0..4 {
            patience.answered(&worker, KIB, ms(100));
        }
        assert!(patience.with(&worker, KIB) > ms(100));
    }

    #[test]
    fn asking_twice_is_bounded_by_a_share_of_the_calls() {
        let worker = WorkerId::new("a");
        let mut patience = Patience::new(MAX);
        let at_once = (0..100).filter(|_| patience.may_hedge()).count();
        assert_eq!(at_once, HEDGES_MAX as usize);
        let mut more = 0;
        for _ in 0..1000 {
            patience.answered(&worker, KIB, ms(1));
            more += usize::from(patience.may_hedge());
        }
        assert!((49..=51).contains(&more), "{more}");
    }
}
