//! Parallel loops over items that lie one behind the other in memory: long runs first, single items last. Never waits.
//!
//! A thread that reads weights wants one long ascending stream; threads that are to end together want
//! small items. So each takes a share of what is left.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::pool::Pool;

/// Runs that the rest would be cut into for every thread.
const RUNS_PER_THREAD: usize = 2;

/// Calls `work` with ranges that cover `0..num_items` once, on all threads of the pool.
pub(crate) fn run_guided(pool: &Pool, num_items: usize, work: &(dyn Fn(Range<usize>) + Sync)) {
    let threads = pool.threads();
    if threads == 1 || num_items <= 1 {
        work(0..num_items);
        return;
    }
    let taken = AtomicUsize::new(0);
    let share = |begin: usize| {
        let left = num_items - begin;
        begin + left.div_ceil(RUNS_PER_THREAD * threads)
    };
    pool.run(threads.min(num_items), &|_thread| {
        let take = |begin: usize| (begin < num_items).then(|| share(begin));
        while let Ok(begin) = taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            work(begin..share(begin));
        }
    });
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;

    #[test]
    fn every_item_is_in_one_range() {
        for threads in 1..4 {
            let pool = Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap();
            for num_items in [0, 1, 2, 5, 64, 1000] {
                let counts: Vec<AtomicUsize> =
                    (0..num_items).map(|_| AtomicUsize::new(0)).collect();
                run_guided(&pool, num_items, &|items| {
                    for item in items {
                        counts[item].fetch_add(1, Ordering::Relaxed);
                    }
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }
}
