//! Many seeds on all cores. Runs do not share anything but the tokenizer.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tramontane_tokenizer::Tokenizer;

use crate::check::Counts;
use crate::world::{Outcome, run_seed};

/// What many runs gave together.
#[derive(Clone, Debug, Default)]
pub struct Totals {
    /// Runs.
    pub seeds: u64,
    /// The first run with a violation, by seed.
    pub first_bad: Option<Outcome>,
    /// What all of them counted.
    pub counts: Counts,
    /// Virtual time of all of them.
    pub lasted: Duration,
    /// Real time.
    pub took: Duration,
}

/// The tokenizer of the demo model.
///
/// # Errors
/// When its files are not in the repository.
pub fn tokenizer() -> Result<Arc<Tokenizer>, tramontane_tokenizer::Error> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    Tokenizer::from_dir(&folder).map(Arc::new)
}

/// Runs `seeds` on all cores, until the first violation when `stop_at_bad`.
#[must_use]
pub fn run_seeds(
    seeds: std::ops::Range<u64>,
    stop_at_bad: bool,
    tokenizer: &Arc<Tokenizer>,
) -> Totals {
    run_seeds_with(|| {}, seeds, stop_at_bad, tokenizer)
}

/// As [`run_seeds`], on threads that have done `prepare` first. `first_bad` is the first of all seeds.
#[must_use]
pub fn run_seeds_with(
    prepare: impl Fn() + Sync,
    seeds: std::ops::Range<u64>,
    stop_at_bad: bool,
    tokenizer: &Arc<Tokenizer>,
) -> Totals {
    let begin = Instant::now();
    let (next, is_bad) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let totals = Mutex::new(Totals::default());
    let work = || {
        prepare();
        while !(stop_at_bad && is_bad.load(Ordering::Relaxed)) {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let outcome = run_seed(seed, false, tokenizer);
            is_bad.fetch_or(!outcome.violations.is_empty(), Ordering::Relaxed);
            totals.lock().add(outcome);
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (0..cores).for_each(|_| drop(scope.spawn(work)));
    });
    let mut totals = totals.into_inner();
    totals.took = begin.elapsed();
    totals
}

impl Totals {
    fn add(&mut self, outcome: Outcome) {
        let (all, one) = (&mut self.counts, outcome.counts);
        all.requests += one.requests;
        all.finished += one.finished;
        all.failed += one.failed;
        all.abandoned += one.abandoned;
        all.tokens += one.tokens;
        all.replays += one.replays;
        all.publishes += one.publishes;
        all.calls += one.calls;
        all.stale += one.stale;
        all.drops += one.drops;
        all.faults += one.faults;
        all.updated += one.updated;
        self.seeds += 1;
        self.lasted += outcome.lasted;
        let is_first = self
            .first_bad
            .as_ref()
            .is_none_or(|bad| outcome.seed < bad.seed);
        if !outcome.violations.is_empty() && is_first {
            self.first_bad = Some(outcome);
        }
    }
}
