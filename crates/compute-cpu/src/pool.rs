//! The compute pool: the caller and its helpers take numbered work items. It knows no kernel and allocates nothing.
//!
//! One run at a time: callers on several threads wait for each other. Helpers spin briefly for the
//! next run, because the phases of a layer follow each other within microseconds, and then park.

use std::any::Any;
use std::cell::UnsafeCell;
use std::fmt;
use std::hint::spin_loop;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle, Thread};

use parking_lot::Mutex;

/// Looks at the state before a thread parks: some tens of microseconds.
const SPIN_ROUNDS: u32 = 2_000;

/// Rows that are not worth waking anybody for: what is done to one takes about a microsecond.
const ROWS_ALONE: usize = 4;

/// Items of [`Pool::run_rows`] that a thread has about: enough that all end at the same time.
const ITEMS_PER_THREAD: usize = 4;

/// Most rows of such an item: the 16-bit keys of so many tokens are one cache line.
const ITEM_ROWS_MAX: usize = 32;

/// Most threads of one pool.
pub(crate) const THREADS_MAX: usize = 1_024;

/// `state` is `run number << 32 | OPEN | helpers inside`.
const OPEN: u64 = 1 << 31;
const HELPERS: u64 = OPEN - 1;

/// Threads that compute; dropped, it joins them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Held by the caller of the running run.
    turn: Mutex<()>,
}

struct Shared {
    state: AtomicU64,
    /// Helpers that park or are about to.
    sleeping: AtomicUsize,
    stop: AtomicBool,
    next_item: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is the only field that is not `Sync`. It is written by the holder of `Pool::turn` while
// `state` is closed with no helper inside, and read only by helpers that have entered an open run.
unsafe impl Sync for Shared {}
// SAFETY: the closure that `job` points to is `Sync`, and lives until the run that uses it has ended.
unsafe impl Send for Shared {}

struct Job {
    work: *const (dyn Fn(usize, usize) + Sync),
    num_items: usize,
    caller: Thread,
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("threads", &self.threads())
            .finish_non_exhaustive()
    }
}

impl Pool {
    /// Starts `threads - 1` helpers.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn new(threads: NonZeroUsize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            sleeping: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            next_item: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
        });
        // Built first, so that its drop joins what was started when a later thread is refused.
        let mut pool = Self {
            shared,
            helpers: Vec::new(),
            turn: Mutex::new(()),
        };
        for i in 1..threads.get().min(THREADS_MAX) {
            let shared = Arc::clone(&pool.shared);
            let helper = thread::Builder::new()
                .name(format!("compute-{i}"))
                .spawn(move || help(&shared, i))?;
            pool.helpers.push(helper);
        }
        Ok(pool)
    }

    /// Threads that compute, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `work` once for every item in `0..num_items`, in any order, on any thread, and returns
    /// when all are done. Must not be called from inside `work`.
    ///
    /// # Panics
    /// With the panic of an item, after the run has ended.
    pub(crate) fn run(&self, num_items: usize, work: &(dyn Fn(usize) + Sync)) {
        self.run_on_threads(num_items, &|item, _thread| work(item));
    }

    /// As [`run`](Self::run), for small work on each row: few rows are done by the caller alone, and of many an
    /// item has several in a row, whose tokens lie in the same cache lines.
    pub(crate) fn run_rows(&self, num_rows: usize, work: &(dyn Fn(usize) + Sync)) {
        let items = ITEMS_PER_THREAD * self.threads();
        let item_rows = match num_rows {
            0..=ROWS_ALONE => num_rows.max(1),
            _ => num_rows.div_ceil(items).min(ITEM_ROWS_MAX),
        };
        self.run(num_rows.div_ceil(item_rows), &|item| {
            let begin = item * item_rows;
            for row in begin..(begin + item_rows).min(num_rows) {
                work(row);
            }
        });
    }

    /// As [`run`](Self::run); `work` also learns the number of its thread, below [`threads`](Self::threads): a
    /// thread has one item at a time. Callers without helpers are all thread 0.
    pub(crate) fn run_on_threads(&self, num_items: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if self.helpers.is_empty() || num_items <= 1 {
            for item in 0..num_items {
                work(item, 0);
            }
            return;
        }
        let turn = self.turn.lock();
        self.open(num_items, work);
        let own = catch_unwind(AssertUnwindSafe(|| {
            self.shared.take_items(work, num_items, 0);
        }));
        self.shared.close_and_wait();
        let theirs = self.shared.panic.lock().take();
        drop(turn);
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }

    fn open(&self, num_items: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. `run` returns after `close_and_wait`, that is when no
        // helper can reach the closure any more.
        let work = unsafe {
            std::mem::transmute::<
                &(dyn Fn(usize, usize) + Sync),
                &'static (dyn Fn(usize, usize) + Sync),
            >(work)
        };
        let job = Job {
            work,
            num_items,
            caller: thread::current(),
        };
        // SAFETY: we hold `turn` and the last run is closed with no helper inside: nobody else looks.
        unsafe { *shared.job.get() = Some(job) };
        shared.next_item.store(0, Ordering::Relaxed);
        let run = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared.state.store(run << 32 | OPEN, Ordering::SeqCst);
        if shared.sleeping.load(Ordering::SeqCst) > 0 {
            self.wake_helpers();
        }
    }

    fn wake_helpers(&self) {
        for helper in &self.helpers {
            helper.thread().unpark();
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.wake_helpers();
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of its items; it has none of its own to report.
            let _joined = helper.join();
        }
    }
}

impl Shared {
    fn take_items(&self, work: &(dyn Fn(usize, usize) + Sync), num_items: usize, thread: usize) {
        loop {
            let item = self.next_item.fetch_add(1, Ordering::Relaxed);
            if item >= num_items {
                return;
            }
            work(item, thread);
        }
    }

    /// Lets no further helper in and waits for those inside.
    fn close_and_wait(&self) {
        self.state.fetch_and(!OPEN, Ordering::SeqCst);
        let mut rounds = 0;
        while self.state.load(Ordering::Acquire) & HELPERS != 0 {
            if rounds < SPIN_ROUNDS {
                rounds += 1;
                spin_loop();
            } else {
                // The last helper unparks us after it has left.
                thread::park();
            }
        }
    }

    /// Enters the open run unless it is `seen`; returns its number.
    fn enter(&self, seen: u64) -> Option<u64> {
        let mut state = self.state.load(Ordering::SeqCst);
        while state & OPEN != 0 && state >> 32 != seen {
            let entered = self.state.compare_exchange_weak(
                state,
                state + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            match entered {
                Ok(_) => return Some(state >> 32),
                Err(now) => state = now,
            }
        }
        None
    }

    /// Works on the run that this helper has entered, then leaves it.
    fn work_and_leave(&self, thread: usize) {
        // SAFETY: a helper inside an open run: the job was written before the run was opened and is
        // not written again before this helper has left.
        let job = unsafe { (*self.job.get()).as_ref() };
        let Some(job) = job else {
            self.state.fetch_sub(1, Ordering::AcqRel);
            return;
        };
        let caller = job.caller.clone();
        // SAFETY: the caller of the run keeps the closure alive until this helper has left.
        let work = unsafe { &*job.work };
        let num_items = job.num_items;
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| {
            self.take_items(work, num_items, thread);
        })) {
            self.panic.lock().get_or_insert(payload);
        }
        let before = self.state.fetch_sub(1, Ordering::AcqRel);
        if before & OPEN == 0 && before & HELPERS == 1 {
            caller.unpark();
        }
    }
}

/// The life of a helper; the caller is thread 0.
fn help(shared: &Shared, thread: usize) {
    let mut seen = 0;
    let mut rounds = 0;
    while !shared.stop.load(Ordering::SeqCst) {
        if let Some(run) = shared.enter(seen) {
            shared.work_and_leave(thread);
            seen = run;
            rounds = 0;
            continue;
        }
        if rounds < SPIN_ROUNDS {
            rounds += 1;
            spin_loop();
            continue;
        }
        sleep_until_open(shared, seen);
        rounds = 0;
    }
}

/// Parks. Announces itself first and looks again, so that a run opened in between is not missed.
fn sleep_until_open(shared: &Shared, seen: u64) {
    shared.sleeping.fetch_add(1, Ordering::SeqCst);
    let state = shared.state.load(Ordering::SeqCst);
    let is_new = state & OPEN != 0 && state >> 32 != seen;
    if !is_new && !shared.stop.load(Ordering::SeqCst) {
        thread::park();
    }
    shared.sleeping.fetch_sub(1, Ordering::SeqCst);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap()
    }

    #[test]
    fn every_item_is_done_once_in_every_run() {
        for threads in [1, 2, 3, 5] {
            let pool = pool(threads);
            for num_items in [0, 1, 2, 7, 100] {
                for _run in 0..50 {
                    let counts: Vec<AtomicUsize> =
                        (0..num_items).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(num_items, &|i| {
                        counts[i].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn callers_on_several_threads_share_it() {
        let pool = pool(2);
        let total = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _caller in 0..4 {
                scope.spawn(|| {
                    for _run in 0..100 {
                        pool.run(8, &|i| {
                            total.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 100 * 28);
    }

    #[test]
    fn the_panic_of_an_item_reaches_the_caller_and_the_pool_goes_on() {
        let pool = pool(3);
        let caught = catch_unwind(AssertUnwindSafe(|| {
            pool.run(64, &|i| assert_ne!(i, 40, "item forty"));
        }));
        let payload = caught.unwrap_err();
        let text = payload.downcast_ref::<String>().unwrap();
        assert!(text.contains("item forty"), "{text}");
        let done = AtomicUsize::new(0);
        pool.run(64, &|_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.into_inner(), 64);
    }
}
