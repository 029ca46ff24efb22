//! Threads that do jobs, of their owners in turn. A job that takes too long loses its thread, not the others theirs: the thread is replaced,
//! a few times. Knows nothing of grammars; whoever waits for a job hears from it or from [`Missed`].

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use tramontane_types::TurnQueue;

use crate::GrammarError;

/// What a pool may use, and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) name: &'static str,
    pub(crate) threads: usize,
    /// Threads past `run` that are replaced.
    pub(crate) strays: usize,
    /// Jobs that wait.
    pub(crate) queue: usize,
    /// How long a job may take.
    pub(crate) run: Duration,
    /// How long a job waits for a thread.
    pub(crate) wait: Duration,
    pub(crate) stack_bytes: usize,
}

/// Called once, from another thread, when a job will not be done, or not in time: it goes on then.
pub(crate) type Missed = Box<dyn FnOnce(GrammarError) + Send>;

/// Something to do. It must not panic: its thread would not come back.
pub(crate) struct Job {
    pub(crate) work: Box<dyn FnOnce() + Send>,
    pub(crate) missed: Missed,
}

/// Some threads, and one that looks at the clock. They end when it is dropped, those that work when their job is done.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
}

struct Shared {
    rules: Rules,
    state: Mutex<State>,
    /// There is a job, or the end.
    changed: Condvar,
    /// There is another time to wake up at, or the end.
    watch: Condvar,
}

#[derive(Default)]
struct State {
    queue: TurnQueue<u64, Waiting>,
    /// Of jobs that gave way to those of others.
    turned_out: Vec<Missed>,
    running: Vec<Running>,
    /// Threads that take jobs.
    num_threads: usize,
    /// Threads that are past their time.
    num_strays: usize,
    next_id: u64,
    is_closed: bool,
}

/// A job that waits for a thread.
struct Waiting {
    since: Instant,
    job: Job,
}

struct Running {
    id: u64,
    until: Instant,
    /// Gone once it is past its time.
    missed: Option<Missed>,
}

impl Pool {
    /// Starts the threads.
    pub(crate) fn start(rules: Rules) -> Result<Self, GrammarError> {
        let pool = Self {
            shared: Arc::new(Shared {
                rules,
                state: Mutex::default(),
                changed: Condvar::new(),
                watch: Condvar::new(),
            }),
        };
        let spawned = (0..rules.threads).try_for_each(|_| pool.shared.spawn());
        let shared = Arc::clone(&pool.shared);
        let watched = thread::Builder::new().name(format!("{}-watch", rules.name));
        let watched = spawned.and_then(|()| watched.spawn(move || watch(&shared)));
        match watched {
            Ok(_) => Ok(pool),
            Err(error) => Err(GrammarError::internal(&format!("no thread: {error}"))),
        }
    }

    /// Queues a job of an owner. Never waits.
    pub(crate) fn submit(&self, owner: u64, job: Job) -> Result<(), GrammarError> {
        let Rules { queue, strays, .. } = self.shared.rules;
        let mut state = self.shared.state.lock();
        if state.num_threads == 0 {
            return Err(GrammarError::Stuck { limit: strays });
        }
        let since = Instant::now();
        let pushed = state.queue.push(owner, Waiting { since, job }, queue);
        let gone = pushed.map_err(|_refused| GrammarError::Busy { limit: queue })?;
        state.turned_out.extend(gone.map(|gone| gone.job.missed));
        drop(state);
        self.shared.changed.notify_one();
        self.shared.watch.notify_one();
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.is_closed = true;
        let queue = std::mem::take(&mut state.queue);
        drop(state);
        self.shared.changed.notify_all();
        self.shared.watch.notify_all();
        drop(queue);
    }
}

impl Shared {
    fn spawn(self: &Arc<Self>) -> std::io::Result<()> {
        let shared = Arc::clone(self);
        self.state.lock().num_threads += 1;
        let spawned = thread::Builder::new()
            .name(self.rules.name.to_owned())
            .stack_size(self.rules.stack_bytes)
            .spawn(move || work(&shared));
        if spawned.is_err() {
            self.state.lock().num_threads -= 1;
        }
        spawned.map(|_thread| ())
    }
}

fn work(shared: &Shared) {
    let mut state = shared.state.lock();
    while !state.is_closed {
        let Some(Waiting { job, .. }) = state.queue.pop() else {
            shared.changed.wait(&mut state);
            continue;
        };
        let until = Instant::now() + shared.rules.run;
        let id = state.begin(until, job.missed);
        shared.watch.notify_one();
        MutexGuard::unlocked(&mut state, job.work);
        if !state.end(id, shared.rules.threads) {
            return;
        }
    }
}

fn watch(shared: &Arc<Shared>) {
    let mut state = shared.state.lock();
    while !state.is_closed {
        let (missed, num_new) = state.overdue(Instant::now(), &shared.rules);
        if missed.is_empty() && num_new == 0 {
            match state.next_time(shared.rules.wait) {
                Some(time) => drop(shared.watch.wait_until(&mut state, time)),
                None => shared.watch.wait(&mut state),
            }
            continue;
        }
        MutexGuard::unlocked(&mut state, || {
            for _ in 0..num_new {
                if let Err(error) = shared.spawn() {
                    tracing::error!(%error, pool = shared.rules.name, "a thread cannot be replaced");
                }
            }
            for (missed, error) in missed {
                missed(error);
            }
        });
    }
}

impl State {
    fn begin(&mut self, until: Instant, missed: Missed) -> u64 {
        self.next_id += 1;
        self.running.push(Running {
            id: self.next_id,
            until,
            missed: Some(missed),
        });
        self.next_id
    }

    /// Whether the thread is still needed.
    fn end(&mut self, id: u64, threads: usize) -> bool {
        let index = self.running.iter().position(|running| running.id == id);
        let running = index.map(|index| self.running.swap_remove(index));
        if running.is_some_and(|running| running.missed.is_some()) {
            return true;
        }
        self.num_strays -= 1;
        let is_needed = self.num_threads < threads;
        self.num_threads += usize::from(is_needed);
        is_needed
    }

    /// What is past its time, with what its waiters are told, and how many threads are to be replaced.
    fn overdue(&mut self, now: Instant, rules: &Rules) -> (Vec<(Missed, GrammarError)>, usize) {
        let mut all = Vec::new();
        let mut num_new = 0;
        for running in &mut self.running {
            let Some(missed) = running.missed.take_if(|_| running.until <= now) else {
                continue;
            };
            all.push((missed, GrammarError::TooSlow { limit: rules.run }));
            self.num_threads -= 1;
            self.num_strays += 1;
            num_new += usize::from(self.num_strays <= rules.strays);
            let (name, strays) = (rules.name, self.num_strays);
            tracing::warn!(
                pool = name,
                strays,
                "a job takes too long; its thread is left alone"
            );
        }
        let limit = rules.queue;
        let turned_out = self.turned_out.drain(..);
        all.extend(turned_out.map(|missed| (missed, GrammarError::Busy { limit })));
        if self.num_threads + num_new == 0 {
            let limit = rules.strays;
            let queued = std::iter::from_fn(|| self.queue.pop());
            all.extend(queued.map(|queued| (queued.job.missed, GrammarError::Stuck { limit })));
        }
        if let Some(long_ago) = now.checked_sub(rules.wait) {
            let limit = rules.wait;
            let is_old = |waiting: &Waiting| waiting.since <= long_ago;
            let old = std::iter::from_fn(|| self.queue.pop_front_if(is_old));
            all.extend(old.map(|old| (old.job.missed, GrammarError::Waited { limit })));
        }
        (all, num_new)
    }

    fn next_time(&self, wait: Duration) -> Option<Instant> {
        let running = self
            .running
            .iter()
            .filter(|running| running.missed.is_some());
        let queued = self.queue.fronts().map(|waiting| waiting.since + wait);
        running.map(|running| running.until).chain(queued).min()
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("rules", &self.rules)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const RULES: Rules = Rules {
        name: "test",
        threads: 1,
        strays: 1,
        queue: 8,
        // So long that a busy machine does not stand still for it.
        run: Duration::from_secs(1),
        wait: Duration::from_secs(600),
        stack_bytes: 1 << 20,
    };

    /// What came of a job: done, or the error that its waiters were told.
    type Heard = Receiver<Result<(), GrammarError>>;

    /// A job that waits until it may end.
    fn job(may_end: Receiver<()>) -> (Job, Heard) {
        let (done, heard) = channel();
        let missed = done.clone();
        let job = Job {
            work: Box::new(move || {
                let _dropped_is_as_good = may_end.recv();
                let _nobody_listens = done.send(Ok(()));
            }),
            missed: Box::new(move |error| drop(missed.send(Err(error)))),
        };
        (job, heard)
    }

    fn endless(pool: &Pool) -> (Sender<()>, Heard) {
        let (end, may_end) = channel();
        let (job, heard) = job(may_end);
        pool.submit(7, job).unwrap();
        (end, heard)
    }

    fn quick(pool: &Pool) -> Heard {
        endless(pool).1
    }

    #[test]
    fn a_job_that_takes_too_long_is_told_and_its_thread_replaced() {
        let pool = Pool::start(RULES).unwrap();
        let (end, heard) = endless(&pool);
        let limit = RULES.run;
        assert_eq!(heard.recv().unwrap(), Err(GrammarError::TooSlow { limit }));
        assert_eq!(quick(&pool).recv().unwrap(), Ok(()));
        // It goes on, and its thread is not needed any more.
        drop(end);
        assert_eq!(heard.recv().unwrap(), Ok(()));
        assert_eq!(quick(&pool).recv().unwrap(), Ok(()));
    }

    #[test]
    fn when_too_many_take_too_long_all_others_hear_so_until_one_ends() {
        let pool = Pool::start(RULES).unwrap();
        let (end, first) = endless(&pool);
        let (_never, second) = endless(&pool);
        let third = quick(&pool);
        for heard in [&first, &second] {
            assert!(matches!(
                heard.recv().unwrap(),
                Err(GrammarError::TooSlow { .. })
            ));
        }
        let stuck = GrammarError::Stuck { limit: 1 };
        assert_eq!(third.recv().unwrap(), Err(stuck.clone()));
        let (another, _heard) = job(channel().1);
        assert_eq!(pool.submit(7, another), Err(stuck));
        drop(end);
        assert_eq!(first.recv().unwrap(), Ok(()));
        // It takes jobs again just after it has said so.
        let mut refused = true;
        while refused {
            let (job, heard) = job(channel().1);
            refused = pool.submit(7, job).is_err();
            assert!(refused || heard.recv().unwrap().is_ok());
            thread::yield_now();
        }
    }

    #[test]
    fn time_in_the_queue_is_not_that_of_the_job() {
        let rules = Rules {
            run: Duration::from_secs(600),
            wait: Duration::from_millis(20),
            ..RULES
        };
        let pool = Pool::start(rules).unwrap();
        let (end, first) = endless(&pool);
        let second = quick(&pool);
        let limit = rules.wait;
        assert_eq!(second.recv().unwrap(), Err(GrammarError::Waited { limit }));
        drop(end);
        assert_eq!(first.recv().unwrap(), Ok(()));
    }

    #[test]
    fn a_full_queue_refuses() {
        let rules = Rules {
            queue: 2,
            run: Duration::from_secs(600),
            ..RULES
        };
        let pool = Pool::start(rules).unwrap();
        let mut ends = Vec::new();
        let error = loop {
            let (end, may_end) = channel();
            match pool.submit(7, job(may_end).0) {
                Ok(()) => ends.push(end),
                Err(error) => break error,
            }
        };
        assert_eq!(error, GrammarError::Busy { limit: rules.queue });
        assert!((2..=3).contains(&ends.len()), "with the one that runs");
    }

    /// Jobs that say whose they are when they are done, behind one that has the only thread until `end` is dropped.
    fn behind_one(pool: &Pool, owners: &[u64]) -> (Sender<()>, Receiver<u64>) {
        let (end, may_end) = channel();
        let (began, has_begun) = channel();
        let first = Job {
            work: Box::new(move || {
                began.send(()).unwrap();
                let _dropped_is_as_good = may_end.recv();
            }),
            missed: Box::new(drop),
        };
        pool.submit(1, first).unwrap();
        has_begun.recv().unwrap();
        let (done, order) = channel();
        for &owner in owners {
            let done = done.clone();
            let job = Job {
                work: Box::new(move || done.send(owner).unwrap()),
                missed: Box::new(drop),
            };
            pool.submit(owner, job).unwrap();
        }
        (end, order)
    }

    #[test]
    fn owners_take_turns() {
        let pool = Pool::start(RULES).unwrap();
        let (end, order) = behind_one(&pool, &[1, 1, 1, 2, 3, 2]);
        drop(end);
        assert_eq!(order.iter().collect::<Vec<_>>(), [2, 3, 1, 2, 1, 1]);
    }

    #[test]
    fn who_has_most_waiting_gives_way_where_there_is_no_room() {
        let rules = Rules {
            queue: 3,
            run: Duration::from_secs(600),
            ..RULES
        };
        let pool = Pool::start(rules).unwrap();
        // Two of the first owner's three stay: the second's first turns out the last of them, its second would not.
        let (end, order) = behind_one(&pool, &[1, 1, 1, 2]);
        let (more, _heard) = job(channel().1);
        let busy = GrammarError::Busy { limit: 3 };
        assert_eq!(pool.submit(2, more), Err(busy));
        drop(end);
        assert_eq!(order.iter().collect::<Vec<_>>(), [2, 1, 1]);
    }
}
