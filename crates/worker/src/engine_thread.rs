//! The one thread that owns the engine, and the handle that others hold. Never waits for a reader.
//!
//! Commands come through a bounded channel, events leave through one bounded channel per sequence. A
//! dropped [`Generation`] closes its channel, which the thread sees before its next step: the sequence
//! is aborted and its pages are free. A reader that leaves its channel full loses its sequence.

mod failure;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::mpsc::{self, error::TryRecvError, error::TrySendError};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tokio_util::task::task_tracker::TaskTrackerToken;
use tramontane_engine::masks::{HeldMatcher, MatcherRoom};
use tramontane_engine::{Engine, EngineStats, NewSequence, SequenceEvent, StepReport, SubmitError};
use tramontane_grammar::Matcher;
use tramontane_types::{FinishReason, RequestId, TokenOutput, Usage};

use crate::Error;

pub use failure::{GenerationFailure, RefusedSequence};

/// Commands that wait for the running step to end; one more is refused as a full queue.
pub const COMMANDS_MAX: usize = 1024;
/// Events of one sequence that wait for their reader.
pub const EVENTS_MAX: usize = 4096;
/// Room beside the tokens: the start, and the end that always fits.
const EVENTS_EXTRA: usize = 2;
/// A step that takes longer than this means that the thread hangs: far above the largest prompt chunk on
/// the slowest machine plus the deadline of a layer.
pub const STEP_MAX: Duration = Duration::from_secs(600);

/// What happens to a sequence, as its reader sees it. After `Finished` or `Failed` comes nothing.
#[derive(Clone, Debug, PartialEq)]
pub enum GenerationEvent {
    /// Its first rows were computed.
    Started {
        /// Prompt tokens that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// What was asked for about the next tokens of the prompt.
    PromptTokens(Vec<TokenOutput>),
    /// A token was sampled.
    Token(TokenOutput),
    /// It ended.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// It cannot go on here.
    Failed(GenerationFailure),
}

/// A running sequence. Dropped, it ends the sequence and frees its pages.
#[derive(Debug)]
pub struct Generation {
    events: mpsc::Receiver<GenerationEvent>,
    ended: bool,
    /// A draining worker waits for this.
    _running: TaskTrackerToken,
}

impl Generation {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        if self.ended {
            return None;
        }
        let stopped = GenerationEvent::Failed(GenerationFailure::Stopped);
        let event = self.events.recv().await.unwrap_or(stopped);
        Some(self.note(event))
    }

    /// The next event if it is there already.
    pub fn try_next(&mut self) -> Option<GenerationEvent> {
        if self.ended {
            return None;
        }
        let event = self.events.try_recv().ok()?;
        Some(self.note(event))
    }

    fn note(&mut self, event: GenerationEvent) -> GenerationEvent {
        self.ended = matches!(
            event,
            GenerationEvent::Finished { .. } | GenerationEvent::Failed(_)
        );
        event
    }
}

/// Speaks to the engine's thread. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    shared: Arc<Shared>,
    running: TaskTracker,
    room: MatcherRoom,
}

/// Owns the thread; [`EngineThread::stop`] ends it.
#[derive(Debug)]
pub struct EngineThread {
    handle: EngineHandle,
    stop: CancellationToken,
    ended: CancellationToken,
    thread: Option<JoinHandle<()>>,
}

/// Called after each step, on the engine's thread.
pub(crate) type OnStep = Box<dyn FnMut(&StepReport) + Send>;

#[derive(Debug)]
struct Shared {
    began: Instant,
    /// When the running step began, in milliseconds since `began`; [`PARKED`] while there is none.
    step_began: AtomicU64,
    stats: Mutex<EngineStats>,
}

const PARKED: u64 = u64::MAX;

#[derive(Debug)]
enum Command {
    Submit(Box<Submission>),
    /// Only ends the wait for a command.
    Wake,
}

#[derive(Debug)]
struct Submission {
    new: NewSequence,
    matcher: Option<HeldMatcher>,
    events: mpsc::Sender<GenerationEvent>,
    answer: oneshot::Sender<Result<(), SubmitError>>,
}

impl EngineHandle {
    /// Queues a sequence.
    ///
    /// # Errors
    /// When the engine refuses it, or the worker takes no new sequences.
    pub async fn generate(&self, new: NewSequence) -> Result<Generation, RefusedSequence> {
        self.generate_in(new, None).await
    }

    /// Queues a sequence; with a `matcher`, its place in the grammar that its output is a word of.
    ///
    /// # Errors
    /// As those of [`generate`](Self::generate).
    pub async fn generate_in(
        &self,
        new: NewSequence,
        matcher: Option<Matcher>,
    ) -> Result<Generation, RefusedSequence> {
        // The token is taken first: a drain that begins now either waits for it or is seen here.
        let running = self.running.token();
        if self.running.is_closed() {
            return Err(RefusedSequence::Draining);
        }
        // What waits for the engine counts as well.
        let held = matcher.map(|matcher| self.room.hold(matcher));
        let matcher = held.transpose()?;
        let of_prompt = new.params.prompt_logprobs.map_or(0, |_| new.prompt.len());
        let of_output = new.params.max_tokens as usize;
        let capacity = of_output.saturating_add(of_prompt).min(EVENTS_MAX) + EVENTS_EXTRA;
        let (sender, events) = mpsc::channel(capacity);
        let (answer, answered) = oneshot::channel();
        let submission = Submission {
            new,
            matcher,
            events: sender,
            answer,
        };
        match self
            .commands
            .try_send(Command::Submit(Box::new(submission)))
        {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return Err(SubmitError::QueueFull {
                    limit: COMMANDS_MAX,
                }
                .into());
            }
            Err(TrySendError::Closed(_)) => return Err(RefusedSequence::Stopped),
        }
        answered
            .await
            .map_err(|_dropped| RefusedSequence::Stopped)??;
        Ok(Generation {
            events,
            ended: false,
            _running: running,
        })
    }

    /// Refuses new sequences from now on.
    pub fn refuse_new(&self) {
        self.running.close();
    }

    /// Takes new sequences again.
    pub fn accept_new(&self) {
        self.running.reopen();
    }

    /// Waits until every [`Generation`] was dropped; endless before [`EngineHandle::refuse_new`].
    pub async fn idle(&self) {
        self.running.wait().await;
    }

    /// Sequences whose [`Generation`] lives.
    #[must_use]
    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    /// Gauges and counters after the last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        *self.shared.stats.lock()
    }

    /// How long the running step has taken so far; `None` while nothing runs.
    #[must_use]
    pub fn step_age(&self) -> Option<Duration> {
        let began = self.shared.step_began.load(Ordering::Acquire);
        (began != PARKED).then(|| {
            self.shared
                .began
                .elapsed()
                .saturating_sub(Duration::from_millis(began))
        })
    }

    /// Whether the thread lives and its step makes progress.
    ///
    /// # Errors
    /// Says what is wrong.
    pub fn check(&self) -> Result<(), String> {
        if self.commands.is_closed() {
            return Err("the engine has ended".to_owned());
        }
        match self.step_age().filter(|age| *age > STEP_MAX) {
            Some(age) => Err(format!("a step has been running for {} s", age.as_secs())),
            None => Ok(()),
        }
    }
}

impl EngineThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub(crate) fn start(engine: Engine, on_step: OnStep) -> Result<Self, Error> {
        let (commands, waiting) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared {
            began: Instant::now(),
            step_began: AtomicU64::new(PARKED),
            stats: Mutex::new(engine.stats()),
        });
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        let room = engine.matcher_room();
        let worker = Loop {
            engine,
            commands: waiting,
            readers: HashMap::new(),
            events: Vec::new(),
            shared: Arc::clone(&shared),
            stop: stop.clone(),
            on_step,
        };
        let guard = ended.clone().drop_guard();
        let thread = std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let _ended = guard;
                worker.run();
            })
            .map_err(|source| Error::Thread {
                what: "the engine",
                source,
            })?;
        let handle = EngineHandle {
            commands,
            shared,
            running: TaskTracker::new(),
            room,
        };
        Ok(Self {
            handle,
            stop,
            ended,
            thread: Some(thread),
        })
    }

    /// A handle to it.
    #[must_use]
    pub fn handle(&self) -> EngineHandle {
        self.handle.clone()
    }

    /// Cancelled when somebody has asked the thread to end.
    pub(crate) fn asked_to_stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Cancelled when the thread has ended, also by a panic.
    pub(crate) fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// Asks the thread to end after the running step: what still runs fails as stopped.
    pub fn stop(&self) {
        self.stop.cancel();
        // A full channel wakes it as well.
        let _full_or_closed = self.handle.commands.try_send(Command::Wake);
    }
}

impl Drop for EngineThread {
    fn drop(&mut self) {
        self.stop();
        // A step may take long and the drop may be on a runtime thread: it is not waited for here.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished)
            && thread.join().is_err()
        {
            tracing::error!("the engine's thread had panicked");
        }
    }
}

/// What the thread owns.
struct Loop {
    engine: Engine,
    commands: mpsc::Receiver<Command>,
    readers: HashMap<RequestId, mpsc::Sender<GenerationEvent>>,
    /// Kept between steps for its memory.
    events: Vec<(RequestId, SequenceEvent)>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    on_step: OnStep,
}

impl Loop {
    fn run(mut self) {
        while self.take_commands() {
            self.abort_unread();
            if self.engine.has_work() {
                self.step();
            }
            *self.shared.stats.lock() = self.engine.stats();
        }
        for (_, reader) in self.readers.drain() {
            let _closed = reader.try_send(GenerationEvent::Failed(GenerationFailure::Stopped));
        }
        // Whoever serves experts here goes on without it.
        self.engine.rest();
    }

    /// Takes what waits; waits itself while there is nothing to compute. False: stop.
    fn take_commands(&mut self) -> bool {
        if !self.engine.has_work() {
            self.engine.rest();
            match self.commands.blocking_recv() {
                Some(command) => self.take(command),
                None => return false,
            }
        }
        loop {
            match self.commands.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return !self.stop.is_cancelled(),
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take(&mut self, command: Command) {
        let Command::Submit(submission) = command else {
            return;
        };
        let Submission {
            new,
            matcher,
            events,
            answer,
        } = *submission;
        let id = new.id.clone();
        let result = match matcher {
            Some(matcher) => self.engine.submit_constrained(new, matcher),
            None => self.engine.submit(new),
        };
        if result.is_ok() {
            self.readers.insert(id, events);
        }
        // A caller that left has dropped the other end of `events` too: see `abort_unread`.
        let _left = answer.send(result);
    }

    fn abort_unread(&mut self) {
        let engine = &mut self.engine;
        self.readers.retain(|id, reader| {
            if reader.is_closed() {
                engine.abort(id);
                return false;
            }
            true
        });
    }

    fn step(&mut self) {
        let began = self.shared.began.elapsed().as_millis() as u64;
        self.shared.step_began.store(began, Ordering::Release);
        let result = self.engine.step(&mut self.events);
        self.shared.step_began.store(PARKED, Ordering::Release);
        match result {
            Ok(report) => (self.on_step)(&report),
            // Nothing was lost: the loop steps again, and the engine counts the attempts.
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "step did not complete, trying again");
            }
        }
        // Before its events: whoever has seen a token finds it counted.
        *self.shared.stats.lock() = self.engine.stats();
        let mut events = std::mem::take(&mut self.events);
        for (id, event) in events.drain(..) {
            self.deliver(&id, event);
        }
        self.events = events;
    }

    fn deliver(&mut self, id: &RequestId, event: SequenceEvent) {
        let Some(reader) = self.readers.get(id) else {
            return;
        };
        let event = match event {
            SequenceEvent::Started { cached_tokens } => GenerationEvent::Started { cached_tokens },
            SequenceEvent::PromptTokens(tokens) => GenerationEvent::PromptTokens(tokens),
            SequenceEvent::Token(token) => GenerationEvent::Token(token),
            SequenceEvent::Finished { reason, usage } => {
                GenerationEvent::Finished { reason, usage }
            }
            SequenceEvent::Failed { message, kind } => {
                GenerationEvent::Failed(GenerationFailure::Step { message, kind })
            }
        };
        let is_last = matches!(
            event,
            GenerationEvent::Finished { .. } | GenerationEvent::Failed(_)
        );
        // Only this thread sends, so the room that is seen here stays. The last place is for the end.
        let event = if is_last || reader.capacity() > 1 {
            event
        } else {
            tracing::warn!(request_id = %id, "events are not read, sequence aborted");
            self.engine.abort(id);
            GenerationEvent::Failed(GenerationFailure::SlowReader)
        };
        let is_last = is_last || matches!(event, GenerationEvent::Failed(_));
        // A closed channel is found before the next step.
        let _closed = reader.try_send(event);
        if is_last {
            self.readers.remove(id);
        }
    }
}

#[cfg(test)]
mod tests;
