//! The expert half of a worker: merges the waiting calls of a layer, its own engine's included, so that each
//! weight is read once for all of them. Never blocks a caller.
//!
//! Whoever sits at the [`Desk`] computes: the server's own thread, or the engine's while it waits.

mod batch;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tramontane_compute::{Experts, RowFormat};
use tramontane_types::{Epoch, ModelGeometry};

use self::batch::{Scratch, take_layer};
use crate::meters::Mean;
use crate::rhythm::{Caller, Rhythm};
use crate::stats::add;
use crate::validate::check_call;
use crate::{CallLimits, Desk, ExpertCall, Refusal, ReplySender};

/// Most calls that wait; the next one is refused as busy.
pub const SERVER_QUEUE_MAX: usize = 256;

/// Most rows of one merged batch, unless a single call has more. Beyond, products take longer than reading
/// the weights, and a call that is computed first is answered first.
pub const MERGE_ROWS_MAX: usize = 256;

/// Most rows of a batch that waits for callers which are about to call.
const WAIT_ROWS_MAX: usize = 64;

/// A call that has waited this long goes first, whatever its layer.
const PHASE_PATIENCE: Duration = Duration::from_millis(50);

/// How long the thread sits without looking whether it should.
const SITTING_MAX: Duration = Duration::from_secs(60);

/// What an expert server needs to know; made with [`ExpertServerConfig::new`].
#[derive(Clone, Debug)]
pub struct ExpertServerConfig {
    /// Shape of the model.
    pub geometry: ModelGeometry,
    /// Format of the rows of a call.
    pub row_format: RowFormat,
    /// What decides the bits of a result; callers of another class are refused.
    pub numeric_class: String,
    /// Most calls that wait.
    pub queue_max: usize,
    /// Most rows of one merged batch.
    pub merge_rows_max: usize,
    /// Tells the time; a simulation has its own.
    pub clock: fn() -> Instant,
}

impl ExpertServerConfig {
    /// The configuration with default limits.
    #[must_use]
    pub const fn new(
        geometry: ModelGeometry,
        row_format: RowFormat,
        numeric_class: String,
    ) -> Self {
        Self {
            geometry,
            row_format,
            numeric_class,
            queue_max: SERVER_QUEUE_MAX,
            merge_rows_max: MERGE_ROWS_MAX,
            clock: Instant::now,
        }
    }
}

/// Owns the thread. Dropped, it refuses what still waits; [`ExpertServer::shutdown`] computes it first.
#[derive(Debug)]
pub struct ExpertServer {
    handle: ExpertServerHandle,
    thread: Option<JoinHandle<()>>,
}

/// Submits calls to an [`ExpertServer`]. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ExpertServerHandle {
    shared: Arc<Shared>,
}

/// What was done at the desk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Served {
    /// A batch was computed.
    Batch,
    /// Calls wait for others of their layer.
    Later,
    Nothing,
}

/// What an expert server has done for other workers. All counters only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertServerStats {
    /// Calls answered with outputs.
    pub calls: u64,
    /// Batches computed; fewer than `calls` when calls were merged.
    pub batches: u64,
    /// Rows of the answered calls.
    pub rows: u64,
    /// Calls refused because the queue was full.
    pub busy: u64,
    /// Calls refused for another reason.
    pub refused: u64,
    /// Calls that wait now.
    pub waiting: u64,
}

/// What the desk serves from.
#[derive(Debug)]
pub(crate) struct Shared {
    config: ExpertServerConfig,
    limits: CallLimits,
    experts: Arc<dyn Experts>,
    epoch: Arc<AtomicU64>,
    desk: Arc<Desk>,
    queue: Mutex<Queue>,
    /// Of whoever sits at the desk.
    scratch: Mutex<Scratch>,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    batches: AtomicU64,
    rows: AtomicU64,
    busy: AtomicU64,
    refused: AtomicU64,
    segment_ns: Mean,
}

#[derive(Debug)]
struct Queue {
    /// In the order of arrival.
    calls: VecDeque<Waiting>,
    rhythm: Rhythm,
    stop: Stop,
}

/// What is to be done about the queue.
enum Next {
    Batch(Vec<Waiting>),
    Later,
    Nothing,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Stop {
    #[default]
    No,
    /// Computes what waits, takes nothing new.
    Drain,
    /// Refuses what waits.
    Now,
}

#[derive(Debug)]
struct Waiting {
    call: ExpertCall,
    reply: ReplySender,
    /// `None` when it is not known who called last time.
    caller: Option<Caller>,
    arrived: Instant,
}

impl ExpertServer {
    /// Starts the thread at a desk of its own. `epoch` is the placement epoch that this worker serves,
    /// for stale answers.
    #[must_use]
    pub fn start(
        config: ExpertServerConfig,
        experts: Arc<dyn Experts>,
        epoch: Arc<AtomicU64>,
    ) -> Self {
        Self::start_at(Arc::default(), config, experts, epoch)
    }

    /// Starts the thread at `desk`, which it shares with the worker's engine.
    #[must_use]
    pub fn start_at(
        desk: Arc<Desk>,
        config: ExpertServerConfig,
        experts: Arc<dyn Experts>,
        epoch: Arc<AtomicU64>,
    ) -> Self {
        let mut server = Self::without_thread(desk, config, experts, epoch);
        let shared = Arc::clone(&server.handle.shared);
        let thread = std::thread::Builder::new()
            .name("expert-server".to_owned())
            .spawn(move || run(&shared));
        let thread = thread.map_err(|error| {
            tracing::error!(%error, "no thread for the expert server, every call is refused");
            server.handle.shared.queue.lock().stop = Stop::Now;
        });
        server.thread = thread.ok();
        server
    }

    /// A server that computes only when it is told to.
    pub(crate) fn without_thread(
        desk: Arc<Desk>,
        config: ExpertServerConfig,
        experts: Arc<dyn Experts>,
        epoch: Arc<AtomicU64>,
    ) -> Self {
        let queue = Queue {
            calls: VecDeque::new(),
            rhythm: Rhythm::new(config.geometry.num_layers),
            stop: Stop::No,
        };
        let shared = Arc::new(Shared {
            limits: CallLimits::new(&config.geometry, config.row_format),
            config,
            experts,
            epoch,
            desk,
            queue: Mutex::new(queue),
            scratch: Mutex::default(),
            counters: Counters::default(),
        });
        Self {
            handle: ExpertServerHandle { shared },
            thread: None,
        }
    }

    /// A handle for submitting calls.
    #[must_use]
    pub fn handle(&self) -> ExpertServerHandle {
        self.handle.clone()
    }

    /// Refuses new calls, computes those that wait, and joins the thread.
    pub fn shutdown(mut self) {
        self.stop(Stop::Drain);
    }

    fn stop(&mut self, how: Stop) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        self.handle.shared.queue.lock().stop = how;
        self.handle.shared.desk.stop_waiting();
        if thread.join().is_err() {
            tracing::error!("the expert server's thread had panicked");
        }
    }
}

impl Drop for ExpertServer {
    fn drop(&mut self) {
        self.stop(Stop::Now);
    }
}

impl ExpertServerHandle {
    /// Checks and queues a call. Never blocks: a call that does not fit, is not held here, or finds the
    /// queue full is refused through `reply` before this returns.
    pub fn submit(&self, call: ExpertCall, reply: ReplySender) {
        self.accept(None, call, reply);
    }

    /// As [`ExpertServerHandle::submit`], for one whose next call can be foreseen from this one.
    pub(crate) fn submit_from(&self, caller: Caller, call: ExpertCall, reply: ReplySender) {
        self.accept(Some(caller), call, reply);
    }

    /// Queues a call of this worker's own engine, which may have more rows than others may send.
    pub(crate) fn submit_own(&self, call: ExpertCall, reply: ReplySender) {
        if let Err(refused) = self.shared.enqueue(Some(Caller::OWN), call, reply) {
            let (reply, why) = *refused;
            reply.send(Err(why));
        }
    }

    /// A caller will not call again.
    pub(crate) fn forget(&self, caller: Caller) {
        self.shared.queue.lock().rhythm.forget(caller);
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    pub(crate) fn desk(&self) -> &Arc<Desk> {
        &self.shared.desk
    }

    fn accept(&self, caller: Option<Caller>, call: ExpertCall, reply: ReplySender) {
        let refusal = match self.shared.accept(caller, call, reply) {
            Ok(()) => return,
            Err(refusal) => refusal,
        };
        let (reply, why) = *refusal;
        let counters = &self.shared.counters;
        add(
            if why == Refusal::Busy {
                &counters.busy
            } else {
                &counters.refused
            },
            1,
        );
        reply.send(Err(why));
    }

    /// What was done so far.
    #[must_use]
    pub fn stats(&self) -> ExpertServerStats {
        let counters = &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ExpertServerStats {
            calls: read(&counters.calls),
            batches: read(&counters.batches),
            rows: read(&counters.rows),
            busy: read(&counters.busy),
            refused: read(&counters.refused),
            waiting: self.shared.queue.lock().calls.len() as u64,
        }
    }

    /// Whether new calls are taken. False for good once the server stops, or its thread died.
    #[must_use]
    pub fn is_serving(&self) -> bool {
        self.shared.queue.lock().stop == Stop::No
    }

    /// The numeric class of the results.
    #[must_use]
    pub fn numeric_class(&self) -> &str {
        &self.shared.config.numeric_class
    }

    /// The limits of one call.
    #[must_use]
    pub fn limits(&self) -> CallLimits {
        self.shared.limits
    }

    /// The placement epoch that this worker serves.
    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.shared.epoch()
    }
}

impl Shared {
    fn accept(
        &self,
        caller: Option<Caller>,
        call: ExpertCall,
        reply: ReplySender,
    ) -> Result<(), Box<(ReplySender, Refusal)>> {
        if let Err(reason) = check_call(&call, &self.config.geometry, &self.limits) {
            return Err(Box::new((reply, Refusal::Invalid(reason))));
        }
        self.enqueue(caller, call, reply)
    }

    fn enqueue(
        &self,
        caller: Option<Caller>,
        call: ExpertCall,
        reply: ReplySender,
    ) -> Result<(), Box<(ReplySender, Refusal)>> {
        if !self.holds(&call) {
            return Err(Box::new((
                reply,
                Refusal::Stale {
                    epoch: self.epoch(),
                },
            )));
        }
        let mut queue = self.queue.lock();
        if queue.stop != Stop::No {
            return Err(Box::new((reply, Refusal::Stopping)));
        }
        if queue.calls.len() >= self.config.queue_max {
            return Err(Box::new((reply, Refusal::Busy)));
        }
        let arrived = self.now();
        if let Some(caller) = caller {
            queue.rhythm.called(caller, call.layer, arrived);
        }
        queue.calls.push_back(Waiting {
            call,
            reply,
            caller,
            arrived,
        });
        drop(queue);
        self.desk.ring();
        Ok(())
    }

    fn holds(&self, call: &ExpertCall) -> bool {
        let num_segments = self.config.geometry.num_segments();
        call.jobs.iter().all(|job| {
            let needed = (job.range.begin()..job.range.end().min(num_segments))
                .fold(0_u8, |mask, segment| mask | 1 << segment);
            self.experts.held(call.layer, job.expert) & needed == needed
        })
    }

    fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    fn now(&self) -> Instant {
        (self.config.clock)()
    }

    /// Computes one batch, if one is ready.
    pub(crate) fn serve_one(&self) -> Served {
        match self.next_batch(self.now()) {
            Next::Batch(batch) => {
                self.serve(batch, &mut self.scratch.lock());
                Served::Batch
            }
            Next::Later => Served::Later,
            Next::Nothing => Served::Nothing,
        }
    }

    pub(crate) fn has_calls(&self) -> bool {
        !self.queue.lock().calls.is_empty()
    }

    /// The calls of the lowest layer that somebody waits for: then those who are behind catch up, and
    /// all go on together. Nobody waits longer for it than [`PHASE_PATIENCE`].
    fn next_batch(&self, now: Instant) -> Next {
        let mut queue = self.queue.lock();
        let queue = &mut *queue;
        let Some(oldest) = queue.calls.front().filter(|_| queue.stop != Stop::Now) else {
            return Next::Nothing;
        };
        let lowest = queue.calls.iter().map(|waiting| waiting.call.layer).min();
        let is_overdue = now.saturating_duration_since(oldest.arrived) >= PHASE_PATIENCE;
        let layer = lowest.filter(|_| !is_overdue).unwrap_or(oldest.call.layer);
        if !is_overdue && queue.stop == Stop::No && queue.is_worth_waiting(layer, now) {
            return Next::Later;
        }
        let rows_max = self.config.merge_rows_max;
        Next::Batch(take_layer(&mut queue.calls, layer, rows_max))
    }

    /// Whether the thread is to leave the desk.
    fn is_to_leave(&self) -> bool {
        let queue = self.queue.lock();
        match queue.stop {
            Stop::No => self.desk.is_engine_here(),
            Stop::Drain => queue.calls.is_empty(),
            Stop::Now => true,
        }
    }

    fn has_stopped(&self) -> bool {
        let queue = self.queue.lock();
        match queue.stop {
            Stop::No => false,
            Stop::Drain => queue.calls.is_empty(),
            Stop::Now => true,
        }
    }
}

fn run(shared: &Shared) {
    /// Refuses what is left, however the thread ends.
    struct RefuseRest<'a>(&'a Shared);
    impl Drop for RefuseRest<'_> {
        fn drop(&mut self) {
            let rest = {
                let mut queue = self.0.queue.lock();
                queue.stop = Stop::Now;
                std::mem::take(&mut queue.calls)
            };
            for waiting in rest {
                self.0.refuse(waiting, Refusal::Stopping);
            }
        }
    }
    let rest = RefuseRest(shared);
    while !shared.has_stopped() {
        shared
            .desk
            .wait_for_engine(|| shared.queue.lock().stop != Stop::No);
        let mut seat = shared.desk.sit(Some(rest.0));
        let until = Instant::now() + SITTING_MAX;
        let _left = seat.wait(until, &mut || shared.is_to_leave().then_some(()));
    }
}
