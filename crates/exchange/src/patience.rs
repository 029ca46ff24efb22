//! How long to wait for a worker's answer before another holder is asked too. Reads no clock.
//!
//! As TCP does for its retransmissions (RFC 6298): a smoothed time of answers and its mean deviation, for
//! each worker and size of call. What answers take longer than that, one call in some dozens, is asked of
//! a second holder; a budget keeps a busy cluster from doubling its own work. A size that is new to a worker
//! is judged by the nearest ones that are known: a larger call takes no less time, and a smaller one takes
//! at least its share.

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
/// What takes this many times as long as is usual is not late but silent.
const SILENCE: f64 = 4.0;
/// Nobody is waited for longer, however slow they are.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(5);
/// A stranger gets its time once more for every so many rows: prompts take longer than tokens.
const ROWS_PER_PATIENCE: usize = 64;
/// Most doublings of a bound within one layer.
const DOUBLINGS_MAX: u32 = 5;
/// Workers remembered before all are forgotten: far above those of one placement that matter at once.
const REMEMBERED_MAX: usize = 1024;

/// Times of answers, and the budget for asking twice.
#[derive(Debug)]
pub(crate) struct Patience {
    /// What a stranger gets for few rows, see [`crate::CALL_TIMEOUT`].
    stranger: Duration,
    workers: HashMap<WorkerId, [Times; NUM_SIZES]>,
    hedges: Cell<f64>,
}

/// How long one call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// From then on it is late: another holder may be asked too, within the budget.
    pub(crate) late: Duration,
    /// From then on nobody believes that an answer comes; never before it is late.
    pub(crate) silent: Duration,
}

impl Bounds {
    /// The bounds of the next call, when so many calls of a layer were late, and so many silent. Only silence makes
    /// silence come later: else whoever is cut off asks one after the other and never knows it.
    pub(crate) fn doubled(self, num_late: u32, num_silent: u32) -> Self {
        let doubled = |bound: Duration, times: u32| bound * (1 << times.min(DOUBLINGS_MAX));
        let silent = doubled(self.silent, num_silent);
        Self {
            late: doubled(self.late, num_late).min(silent),
            silent,
        }
    }
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
    pub(crate) fn new(stranger: Duration) -> Self {
        Self {
            stranger,
            workers: HashMap::new(),
            hedges: Cell::new(HEDGES_MAX),
        }
    }

    /// How long a call of `num_rows` rows whose answer has `bytes` may take on this worker.
    pub(crate) fn bounds(&self, worker: &WorkerId, num_rows: usize, bytes: usize) -> Bounds {
        let more = u32::try_from(num_rows / ROWS_PER_PATIENCE).unwrap_or(u32::MAX);
        let longest = SILENCE_MAX.max(self.stranger);
        let stranger = self.stranger.saturating_mul(1 + more).min(longest);
        let seconds = |seconds: f64| Duration::from_secs_f64(seconds.min(longest.as_secs_f64()));
        let sizes = self.workers.get(worker);
        let known = sizes.and_then(|sizes| sizes[size(bytes)].usual());
        let (usual, silent) = match known {
            Some(usual) => (seconds(usual), seconds(SILENCE * usual).max(self.stranger)),
            None => {
                let bound = sizes.and_then(|sizes| bound(sizes, size(bytes)));
                (bound.map_or(stranger, seconds).min(stranger), stranger)
            }
        };
        Bounds {
            late: usual.max(HEDGE_MIN).min(silent),
            silent,
        }
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
    /// What answers seldom take longer than, in seconds; `None` while there were too few.
    fn usual(&self) -> Option<f64> {
        let usual = self.mean + DEVIATIONS * self.deviation;
        (self.num >= SAMPLES_MIN).then_some(usual)
    }

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

/// The longest that a call of this size usually takes by what is known of the nearest other sizes, in seconds.
fn bound(sizes: &[Times; NUM_SIZES], wanted: usize) -> Option<f64> {
    // Twice as much per size, and once more for the width of a size.
    let scaled = |(below, times): (usize, &Times)| {
        let doublings = i32::try_from(wanted - below + 1).ok()?;
        Some(times.usual()? * 2.0_f64.powi(doublings))
    };
    let below = sizes[..wanted].iter().enumerate().rev().find_map(scaled);
    let above = sizes[wanted + 1..].iter().find_map(Times::usual);
    match (below, above) {
        (Some(below), Some(above)) => Some(below.min(above)),
        (below, above) => below.or(above),
    }
}

/// Index of the size of a call whose answer has `bytes`.
fn size(bytes: usize) -> usize {
    (bytes.max(1).ilog2() as usize).min(NUM_SIZES - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGER: Duration = Duration::from_millis(500);
    const KIB: usize = 1024;

    fn late(patience: &Patience, worker: &WorkerId, bytes: usize) -> Duration {
        patience.bounds(worker, 1, bytes).late
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_stranger_gets_the_whole_patience_and_a_known_worker_what_is_usual_for_it() {
        let (fast, slow) = (WorkerId::new("fast"), WorkerId::new("slow"));
        let mut patience = Patience::new(STRANGER);
        assert_eq!(late(&patience, &fast, KIB), STRANGER);
        for _ in 0..64 {
            patience.answered(&fast, KIB, ms(1));
            patience.answered(&slow, KIB, ms(60));
        }
        assert_eq!(late(&patience, &fast, KIB), HEDGE_MIN);
        let usual = late(&patience, &slow, KIB);
        assert!(usual >= ms(60) && usual < ms(70), "{usual:?}");
    }

    #[test]
    fn a_new_size_is_judged_by_its_neighbours() {
        let worker = WorkerId::new("w");
        let mut patience = Patience::new(STRANGER);
        for _ in 0..64 {
            patience.answered(&worker, 4 * KIB, ms(10));
        }
        // Four times the bytes and the width of a size: at most eight times as long.
        let larger = late(&patience, &worker, 16 * KIB);
        assert!(larger >= ms(80) && larger < ms(90), "{larger:?}");
        let smaller = late(&patience, &worker, KIB);
        assert_eq!(smaller, HEDGE_MIN);
        // Far beyond what can be said of it.
        assert_eq!(late(&patience, &worker, 4096 * KIB), STRANGER);
        for _ in 0..64 {
            patience.answered(&worker, 32 * KIB, ms(30));
        }
        let between = late(&patience, &worker, 16 * KIB);
        assert!(between >= ms(30) && between < ms(40), "{between:?}");
        assert_eq!(late(&patience, &WorkerId::new("other"), 16 * KIB), STRANGER);
    }

    #[test]
    fn a_slow_worker_is_not_silent_and_prompts_get_longer_than_tokens() {
        let worker = WorkerId::new("w");
        let mut patience = Patience::new(STRANGER);
        let strange = |rows| patience.bounds(&worker, rows, KIB).silent;
        assert_eq!((strange(1), strange(63)), (STRANGER, STRANGER));
        assert_eq!((strange(64), strange(512)), (STRANGER * 2, STRANGER * 9));
        assert_eq!(strange(100_000), SILENCE_MAX);
        for _ in 0..64 {
            patience.answered(&worker, KIB, ms(1));
            patience.answered(&worker, 1024 * KIB, ms(900));
        }
        assert_eq!(patience.bounds(&worker, 1, KIB).silent, STRANGER);
        let slow = patience.bounds(&worker, 512, 1024 * KIB);
        assert!(slow.late >= ms(900) && slow.late < ms(1000), "{slow:?}");
        assert!(slow.silent >= ms(3600), "{slow:?}");
    }

    #[test]
    fn a_worker_that_becomes_slow_is_given_more_time_soon() {
        let worker = WorkerId::new("a");
        let mut patience = Patience::new(STRANGER);
        for _ in 0..64 {
            patience.answered(&worker, KIB, ms(1));
        }
        for _ in 0..4 {
            patience.answered(&worker, KIB, ms(100));
        }
        assert!(late(&patience, &worker, KIB) > ms(100));
    }

    #[test]
    fn asking_twice_is_bounded_by_a_share_of_the_calls() {
        let worker = WorkerId::new("a");
        let mut patience = Patience::new(STRANGER);
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
