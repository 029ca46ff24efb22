//! The expert half of a worker: one thread that merges the waiting calls of a layer, so that each weight
//! is read once for all of them. Never blocks a caller.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use tramontane_compute::{ExpertJob, Experts, RowFormat};
use tramontane_types::{Epoch, LayerId, ModelGeometry};

use crate::call::outputs_of;
use crate::exchange::borrow;
use crate::failure::{Failure, panic_text};
use crate::merge::{len_of, merge, split};
use crate::stats::add;
use crate::validate::check_call;
use crate::{CallLimits, ExpertCall, Refusal, Reply, ReplySender};

/// Most calls that wait; the next one is refused as busy.
pub const SERVER_QUEUE_MAX: usize = 256;

/// Most rows of one merged batch, unless a single call has more.
pub const MERGE_ROWS_MAX: usize = 2048;

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
}

impl ExpertServerConfig {
    /// The configuration with default limits.
    #[must_use]
    pub const fn new(
        geometry: ModelGeometry,
        row_format: RowFormat,
        numeric_class: String,
    ) -> Self {
        let (queue_max, merge_rows_max) = (SERVER_QUEUE_MAX, MERGE_ROWS_MAX);
        Self {
            geometry,
            row_format,
            numeric_class,
            queue_max,
            merge_rows_max,
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

/// What an expert server has done. All counters only grow.
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

#[derive(Debug)]
struct Shared {
    config: ExpertServerConfig,
    limits: CallLimits,
    experts: Arc<dyn Experts>,
    epoch: Arc<AtomicU64>,
    queue: Mutex<Queue>,
    arrived: Condvar,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Counters {
    calls: AtomicU64,
    batches: AtomicU64,
    rows: AtomicU64,
    busy: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Queue {
    /// In the order of arrival.
    calls: VecDeque<Waiting>,
    stop: Stop,
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
    arrived: Instant,
}

impl ExpertServer {
    /// Starts the thread. `epoch` is the placement epoch that this worker serves, for stale answers.
    #[must_use]
    pub fn start(
        config: ExpertServerConfig,
        experts: Arc<dyn Experts>,
        epoch: Arc<AtomicU64>,
    ) -> Self {
        let limits = CallLimits::new(&config.geometry, config.row_format);
        let (queue, arrived, counters) = Default::default();
        let shared = Arc::new(Shared {
            config,
            limits,
            experts,
            epoch,
            queue,
            arrived,
            counters,
        });
        let worker = Arc::clone(&shared);
        let name = "expert-server".to_owned();
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || run(&worker));
        let thread = thread.map_err(|error| {
            tracing::error!(%error, "no thread for the expert server, every call is refused");
            shared.queue.lock().stop = Stop::Now;
        });
        Self {
            handle: ExpertServerHandle { shared },
            thread: thread.ok(),
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
        self.handle.shared.arrived.notify_all();
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
        let refusal = match self.shared.accept(call, reply) {
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
        call: ExpertCall,
        reply: ReplySender,
    ) -> Result<(), Box<(ReplySender, Refusal)>> {
        if let Err(reason) = check_call(&call, &self.config.geometry, &self.limits) {
            return Err(Box::new((reply, Refusal::Invalid(reason))));
        }
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
        queue.calls.push_back(Waiting {
            call,
            reply,
            arrived: Instant::now(),
        });
        self.arrived.notify_one();
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

    /// Waits for calls; takes those of the layer whose call waits longest. `None`: stop.
    fn next_batch(&self) -> Option<Vec<Waiting>> {
        let mut queue = self.queue.lock();
        loop {
            let drained = queue.stop == Stop::Drain && queue.calls.is_empty();
            if queue.stop == Stop::Now || drained {
                return None;
            }
            if let Some(oldest) = queue.calls.front() {
                let layer = oldest.call.layer;
                return Some(take_layer(
                    &mut queue.calls,
                    layer,
                    self.config.merge_rows_max,
                ));
            }
            self.arrived.wait(&mut queue);
        }
    }

    /// Computes a batch and answers its calls. Calls that fail together are tried one by one, so that
    /// one of them cannot take the others with it. A panic is a failure like any other.
    fn serve(&self, mut batch: Vec<Waiting>, scratch: &mut Scratch) {
        while let Some(at) = batch.iter().position(|waiting| !self.holds(&waiting.call)) {
            let waiting = batch.swap_remove(at);
            self.refuse(
                waiting,
                Refusal::Stale {
                    epoch: self.epoch(),
                },
            );
        }
        let calls: Vec<&ExpertCall> = batch.iter().map(|waiting| &waiting.call).collect();
        if calls.is_empty() {
            return;
        }
        match self.compute_caught(&calls, scratch) {
            Ok(outputs) => {
                add(&self.counters.batches, 1);
                for (waiting, outputs) in batch.into_iter().zip(outputs) {
                    self.answer(waiting, outputs);
                }
            }
            Err(_) if batch.len() > 1 => {
                for waiting in batch {
                    self.serve(vec![waiting], scratch);
                }
            }
            Err(failure) => {
                let why = failure.refusal(self.epoch());
                for waiting in batch {
                    self.refuse(waiting, why.clone());
                }
            }
        }
    }

    fn answer(&self, waiting: Waiting, outputs: Vec<f32>) {
        add(&self.counters.calls, 1);
        add(&self.counters.rows, waiting.call.num_rows);
        let service_us = waiting.arrived.elapsed().as_micros() as u64;
        waiting.reply.send(Ok(Reply {
            outputs: outputs_of(outputs),
            service_us,
        }));
    }

    fn refuse(&self, waiting: Waiting, why: Refusal) {
        add(&self.counters.refused, 1);
        waiting.reply.send(Err(why));
    }

    /// The outputs of each call. A panic of the backend ends here, or it would end the thread and with
    /// it every later call.
    fn compute_caught(
        &self,
        calls: &[&ExpertCall],
        scratch: &mut Scratch,
    ) -> Result<Vec<Vec<f32>>, Failure> {
        // The scratch is all that a panic could leave half-written here; it is thrown away then.
        let computed = catch_unwind(AssertUnwindSafe(|| self.compute(calls, scratch)));
        let panic = match computed {
            Ok(result) => return result.map_err(Failure::Refused),
            Err(panic) => panic,
        };
        *scratch = Scratch::default();
        let (num_calls, text) = (calls.len(), panic_text(panic.as_ref()));
        let layer = calls.first().map(|call| call.layer.0);
        tracing::error!(num_calls, layer, panic = text, "the experts panicked");
        Err(Failure::Panicked)
    }

    /// The outputs of each call.
    fn compute(
        &self,
        calls: &[&ExpertCall],
        scratch: &mut Scratch,
    ) -> Result<Vec<Vec<f32>>, tramontane_compute::Error> {
        if let [call] = calls {
            let jobs: Vec<ExpertJob<'_>> = call.jobs.iter().map(borrow).collect();
            let mut out = Vec::new();
            self.experts
                .compute(call.layer, &call.rows, call.num_rows, &jobs, &mut out)?;
            return Ok(vec![out]);
        }
        let merged = merge(calls, &mut scratch.rows);
        let jobs: Vec<ExpertJob<'_>> = merged.jobs.iter().map(borrow).collect();
        let layer = calls.first().map_or(LayerId(0), |call| call.layer);
        let out = &mut scratch.out;
        self.experts
            .compute(layer, &scratch.rows, merged.num_rows, &jobs, out)?;
        let geometry = &self.config.geometry;
        let lens = merged.jobs.iter().map(|job| len_of(geometry, job));
        let (expected, got) = (lens.sum(), out.len());
        if expected != got {
            let what = "outputs of a merged batch".to_owned();
            return Err(tramontane_compute::Error::Shape {
                what,
                expected,
                got,
            });
        }
        Ok(split(calls, &merged.parts, out, geometry))
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
    let mut scratch = Scratch::default();
    while let Some(batch) = rest.0.next_batch() {
        rest.0.serve(batch, &mut scratch);
    }
}

/// Memory of the thread, reused from batch to batch.
#[derive(Debug, Default)]
struct Scratch {
    rows: Vec<u8>,
    out: Vec<f32>,
}

/// Takes the calls of `layer` in order of arrival, up to `rows_max` rows but at least one call.
fn take_layer(calls: &mut VecDeque<Waiting>, layer: LayerId, rows_max: usize) -> Vec<Waiting> {
    let mut batch: Vec<Waiting> = Vec::new();
    let mut num_rows = 0;
    let mut at = 0;
    while let Some(waiting) = calls.get(at) {
        if waiting.call.layer != layer {
            at += 1;
            continue;
        }
        num_rows += waiting.call.num_rows;
        if num_rows > rows_max && !batch.is_empty() {
            break;
        }
        batch.extend(calls.remove(at));
    }
    batch
}
