//! The threads that find masks, for the owners of sequences in turn. Nothing but the mask itself ends the work on it: a
//! thread that is at one for too long is replaced, and ends when it is done.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tramontane_types::{TokenId, TurnQueue};

use super::{
    HeldMatcher, MASK_QUEUE_MAX, MASK_STRAYS_MAX, MASK_THREADS, MaskError, MaskLimits, MatcherRoom,
};
use crate::Error;
use crate::sequence::OwnerId;

/// Stack of a thread: what expressions derive to calls itself.
const MASK_STACK_BYTES: usize = 16 << 20;

/// Called on its thread before each mask, with the token that it follows: tests make masks slow by it.
pub type BeforeMask = Box<dyn Fn(TokenId) + Send + Sync>;

/// The threads of one engine.
#[derive(Debug)]
pub(crate) struct MaskThreads {
    jobs: Arc<Jobs>,
    threads: Vec<MaskThread>,
    /// Those that were replaced and are still at their masks.
    strays: Vec<MaskThread>,
    shared: Arc<Shared>,
    /// Rings when a mask was found.
    bell: Receiver<()>,
    pub(crate) room: MatcherRoom,
    pub(crate) limits: MaskLimits,
}

/// What waits for a thread.
#[derive(Debug)]
struct Jobs {
    /// `None` when no more will come.
    waiting: Mutex<Option<TurnQueue<OwnerId, Job>>>,
    changed: Condvar,
}

/// What all threads use.
pub(crate) struct Shared {
    /// Masks that were found or not.
    pub(crate) masks: AtomicU64,
    pub(crate) mask_us: AtomicU64,
    bell: SyncSender<()>,
    before: OnceLock<BeforeMask>,
}

#[derive(Debug)]
struct MaskThread {
    handle: JoinHandle<()>,
    desk: Arc<Mutex<Desk>>,
}

/// What a thread is at.
#[derive(Debug, Default)]
struct Desk {
    since: Option<Instant>,
    /// Another thread has its place: it ends when it is done.
    is_relieved: bool,
}

/// What is known of a job without its result.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    began: OnceLock<Instant>,
    is_given_up: AtomicBool,
}

#[derive(Debug)]
pub(super) struct Job {
    pub(super) held: HeldMatcher,
    pub(super) id: TokenId,
    /// Nothing follows the last token, whatever may.
    pub(super) finds_mask: bool,
    pub(super) ticket: Arc<Ticket>,
    pub(super) done: SyncSender<HeldMatcher>,
}

impl MaskThreads {
    /// Starts the threads.
    pub(crate) fn start(limits: MaskLimits) -> Result<Self, Error> {
        let (ring, bell) = sync_channel(1);
        let mut crew = Self {
            jobs: Arc::new(Jobs {
                waiting: Mutex::new(Some(TurnQueue::default())),
                changed: Condvar::new(),
            }),
            threads: Vec::with_capacity(MASK_THREADS),
            strays: Vec::new(),
            shared: Arc::new(Shared {
                masks: AtomicU64::new(0),
                mask_us: AtomicU64::new(0),
                bell: ring,
                before: OnceLock::new(),
            }),
            bell,
            room: MatcherRoom::new(limits.bytes_max),
            limits,
        };
        for _ in 0..MASK_THREADS {
            let thread = crew.spawn().map_err(|source| Error::Thread { source })?;
            crew.threads.push(thread);
        }
        Ok(crew)
    }

    fn spawn(&self) -> std::io::Result<MaskThread> {
        let desk = Arc::<Mutex<Desk>>::default();
        let (jobs, shared, own) = (
            Arc::clone(&self.jobs),
            Arc::clone(&self.shared),
            Arc::clone(&desk),
        );
        let handle = thread::Builder::new()
            .name("masks".to_owned())
            .stack_size(MASK_STACK_BYTES)
            .spawn(move || work(&jobs, &shared, &own))?;
        Ok(MaskThread { handle, desk })
    }

    /// Queues a job of an owner. Where there is no room, one of whoever has most gives way: its sequence finds it lost.
    pub(super) fn send(&self, owner: OwnerId, job: Job) -> Result<(), MaskError> {
        let mut waiting = self.jobs.waiting.lock();
        let queue = waiting.as_mut().ok_or(MaskError::Lost)?;
        let limit = MASK_QUEUE_MAX;
        let pushed = queue.push(owner, job, limit);
        let _gone = pushed.map_err(|_refused| MaskError::Queue { limit })?;
        self.jobs.changed.notify_one();
        Ok(())
    }

    /// Replaces threads that are at one mask for too long, or have ended.
    pub(crate) fn tend(&mut self) {
        self.strays.retain(|stray| !stray.handle.is_finished());
        for i in 0..self.threads.len() {
            let has_ended = self.threads[i].handle.is_finished();
            let is_slow = self.strays.len() < MASK_STRAYS_MAX
                && self.threads[i].relieve(self.limits.relief_after);
            if !has_ended && !is_slow {
                continue;
            }
            match self.spawn() {
                Ok(thread) => {
                    let stray = std::mem::replace(&mut self.threads[i], thread);
                    tracing::warn!(has_ended, "a thread that finds masks is replaced");
                    if !has_ended {
                        self.strays.push(stray);
                    }
                }
                // It is looked for again.
                Err(error) => tracing::warn!(%error, "no thread to find masks with"),
            }
        }
    }

    /// Whether so many masks take too long that no further sequences should need any.
    pub(crate) fn are_taken(&self) -> bool {
        let after = self.limits.relief_after;
        self.strays.len() >= MASK_STRAYS_MAX && self.threads.iter().any(|t| t.is_slow(after))
    }

    /// Returns when a mask was found, or after `limit`.
    pub(crate) fn wait(&self, limit: Duration) {
        // Nobody rings after the last thread has gone; `tend` finds that.
        let _rang = self.bell.recv_timeout(limit);
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Only the first call has an effect.
    pub(crate) fn before_each(&self, before: BeforeMask) {
        let _is_set = self.shared.before.set(before);
    }
}

impl Drop for MaskThreads {
    fn drop(&mut self) {
        *self.jobs.waiting.lock() = None;
        self.jobs.changed.notify_all();
        for thread in self.threads.drain(..).chain(self.strays.drain(..)) {
            // What waits belongs to sequences that are gone, and is given up. One that is at a mask may be so for minutes:
            // it has nothing that anybody needs, and ends by itself.
            let is_at_work = thread.desk.lock().since.is_some();
            if !is_at_work && thread.handle.join().is_err() {
                tracing::error!("a thread that finds masks had panicked");
            }
        }
    }
}

impl MaskThread {
    fn is_slow(&self, after: Duration) -> bool {
        let since = self.desk.lock().since;
        since.is_some_and(|since| since.elapsed() > after)
    }

    /// Has it end after its mask, if it is slow.
    fn relieve(&self, after: Duration) -> bool {
        let mut desk = self.desk.lock();
        desk.is_relieved = desk.since.is_some_and(|since| since.elapsed() > after);
        desk.is_relieved
    }
}

impl Jobs {
    /// Waits for the next job; `None` when no more will come.
    fn next(&self) -> Option<Job> {
        let mut waiting = self.waiting.lock();
        loop {
            if let Some(job) = waiting.as_mut()?.pop() {
                return Some(job);
            }
            self.changed.wait(&mut waiting);
        }
    }
}

fn work(jobs: &Jobs, shared: &Shared, desk: &Mutex<Desk>) {
    while let Some(job) = jobs.next() {
        desk.lock().since = Some(Instant::now());
        job.run(shared);
        let mut desk = desk.lock();
        desk.since = None;
        if desk.is_relieved {
            return;
        }
    }
}

impl Job {
    fn run(mut self, shared: &Shared) {
        if self.ticket.is_given_up.load(Ordering::Relaxed) {
            return;
        }
        let began = Instant::now();
        let _first = self.ticket.began.set(began);
        if let Some(before) = shared.before.get() {
            before(self.id);
        }
        // An error is kept by the matcher, and found by whoever asks for the next token.
        if self.held.matcher.accept(self.id).is_ok() && self.finds_mask {
            let _kept = self.held.matcher.allowed().map(|_| ());
        }
        self.held.count();
        let took = began.elapsed().as_micros() as u64;
        let num_masks = u64::from(self.finds_mask);
        shared.masks.fetch_add(num_masks, Ordering::Relaxed);
        shared.mask_us.fetch_add(took, Ordering::Relaxed);
        // The sequence may have ended meanwhile, and nobody may be waiting.
        let _gone = self.done.try_send(self.held);
        let _rings_already = shared.bell.try_send(());
    }
}

impl Ticket {
    /// When a thread began with the job.
    pub(super) fn began(&self) -> Option<Instant> {
        self.began.get().copied()
    }

    /// Nobody wants the result any more.
    pub(super) fn give_up(&self) {
        self.is_given_up.store(true, Ordering::Relaxed);
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("masks", &self.masks)
            .finish_non_exhaustive()
    }
}
