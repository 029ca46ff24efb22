//! One sequence's life on the workers: start, follow, and when a worker is lost go on elsewhere from the
//! journal. Dropping it aborts it on its worker.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tramontane_coordination::mutation::{Mutation, is_on};
use tramontane_proto::{finish_reason_from_wire, v1};
use tramontane_types::{FinishReason, TokenOutput, WorkerId};

use crate::admission::Counted;
pub(crate) use crate::delta::Delta;
use crate::error::{ApiError, ErrorKind};
use crate::journal::Entry;
use crate::metrics::{LossReason, Metrics};
use crate::policy::PromptBlocks;
use crate::text::{AnswerText, TextEnd};
use crate::worker_link::SequenceEvents;
use crate::worker_pool::{PoolWorker, WorkerPool};

/// First pause before asking the same worker again; doubles.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Longest pause before asking again.
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);
/// A sequence that was moved this often without a new token ends: something in it kills workers.
const MOVES_MAX: u32 = 16;

/// Workers without a sign of life that a sequence leaves before it has a new token; from then on it waits like
/// everybody: where all lack the same experts, going round in circles helps nobody.
const DESERTIONS_MAX: u32 = 2;

/// The reason in a worker's status for a sequence that no worker can continue.
const SEQUENCE_FAILED: &str = "SEQUENCE_FAILED";
/// The reason in a worker's status for a constraint that nobody can go on in.
const CONSTRAINT_FAILED: &str = "CONSTRAINT_FAILED";

/// What a sequence may cost in time and attempts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    pub(crate) attempts_max: u32,
    pub(crate) failover_wait: Duration,
    /// Longest silence of a worker, before it accepts a sequence and between its events.
    pub(crate) silence_max: Duration,
}

/// One running sequence.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) choice: usize,
    pub(crate) pool: Arc<WorkerPool>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) patience: Patience,
    pub(crate) entry: Entry,
    pub(crate) blocks: PromptBlocks,
    pub(crate) text: AnswerText,
    /// What the client calls the constraint of its answer.
    pub(crate) constraint_name: &'static str,
    pub(crate) state: State,
}

/// Where a sequence is.
#[derive(Debug, Default)]
pub(crate) struct State {
    run: Option<Run>,
    /// Workers that failed since the last new token.
    excluded: Vec<WorkerId>,
    failures: u32,
    moves: u32,
    /// Workers left since the last new token because they showed no sign of life.
    desertions: u32,
    /// Tokens of the prompt that were reported.
    num_prompt_told: usize,
    /// Whether a worker has ever taken it.
    was_taken: bool,
    /// Since when there is no worker.
    lost_at: Option<Instant>,
    finished: bool,
}

/// The open stream of a worker.
struct Run {
    worker: Arc<PoolWorker>,
    events: SequenceEvents,
    _occupied: Counted,
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").finish_non_exhaustive()
    }
}

/// A worker that cannot go on.
enum Loss {
    /// The request itself is at fault: nobody will take it.
    Refused(String),
    /// Nobody can go on in the constraint of the sequence, here or anywhere.
    Constraint(String),
    /// The sequence cannot be computed, here or anywhere.
    Failed,
    /// This worker has no room.
    Busy,
    /// This worker shows no sign of life, and another one does.
    Deserted,
    /// This worker is gone, going, silent or confused.
    Gone(LossReason),
}

impl Sequence {
    /// Starts on `first`, or on whoever takes it.
    pub(crate) async fn start(&mut self, first: Arc<PoolWorker>) -> Result<(), ApiError> {
        match self.open(&first).await {
            Ok(run) => self.state.run = Some(run),
            Err(loss) => {
                self.lost(first.contact.id.clone(), loss)?;
                self.go_on().await?;
            }
        }
        self.state.was_taken = true;
        Ok(())
    }

    /// What comes next; `None` after the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Delta>, ApiError> {
        while !self.state.finished {
            let Some(run) = &mut self.state.run else {
                if let Some(last) = self.already_ended() {
                    return Ok(Some(last));
                }
                self.go_on().await?;
                continue;
            };
            let worker = Arc::clone(&run.worker);
            // What was said before the silence counts.
            let event = tokio::select! {
                biased;
                event = next_event(&mut run.events, self.patience.silence_max) => event,
                () = self.pool.deserted(&worker, self.entry.version()), if self.state.desertions < DESERTIONS_MAX => {
                    Err(Loss::Deserted)
                }
            };
            match event.and_then(|event| self.take(event)) {
                Ok(Some(delta)) => return Ok(Some(delta)),
                Ok(None) => {}
                Err(loss) => self.lose_run(loss)?,
            }
        }
        Ok(None)
    }

    fn take(&mut self, event: v1::SequenceEvent) -> Result<Option<Delta>, Loss> {
        use v1::sequence_event::Kind;
        match event.kind {
            Some(Kind::Started(started)) => {
                let first = self.entry.sampled().is_empty();
                let cached = first.then_some(started.cached_tokens);
                Ok(first.then(|| Delta {
                    cached_tokens: cached,
                    ..self.delta()
                }))
            }
            Some(Kind::PromptTokens(tokens)) => self.take_prompt(tokens.tokens),
            Some(Kind::Tokens(tokens)) => self.take_tokens(tokens.tokens),
            Some(Kind::Finished(finished)) => match finish_reason_from_wire(finished.reason) {
                Ok(FinishReason::Aborted) => Err(Loss::Gone(LossReason::Aborted)),
                Ok(reason) => Ok(Some(self.finish(reason))),
                Err(error) => {
                    tracing::warn!(%error, "worker ended a sequence without a known reason");
                    Err(Loss::Gone(LossReason::Confused))
                }
            },
            // An event kind of a later version.
            None => Ok(None),
        }
    }

    /// A worker that goes on with a sequence tells all of the prompt again.
    fn take_prompt(&mut self, tokens: Vec<v1::SampledToken>) -> Result<Option<Delta>, Loss> {
        let mut delta = self.delta();
        for token in tokens {
            // Nothing is told of the first one.
            let expected = self.state.num_prompt_told + 1;
            if token.index as usize == expected && expected < self.entry.num_prompt() {
                self.state.num_prompt_told += 1;
                delta.prompt_tokens.push(TokenOutput::from(token));
            } else if token.index as usize >= expected {
                let got = token.index;
                tracing::warn!(expected, got, "worker told of the prompt out of order");
                return Err(Loss::Gone(LossReason::Confused));
            }
        }
        Ok((!delta.prompt_tokens.is_empty()).then_some(delta))
    }

    fn take_tokens(&mut self, tokens: Vec<v1::SampledToken>) -> Result<Option<Delta>, Loss> {
        self.check_order(&tokens)?;
        let mut delta = self.delta();
        for token in tokens {
            self.entry.record(token.id);
            self.state.failures = 0;
            self.state.moves = 0;
            self.state.desertions = 0;
            self.state.excluded.clear();
            let added = self.text.push(token.id);
            delta.text.push_str(&added.text);
            delta.text_ends.push(delta.text.len());
            delta.calls.extend(added.calls);
            delta.call_ends.push(delta.calls.len());
            delta.tokens.push(TokenOutput::from(token));
            match added.end {
                Some(TextEnd::StopString) => {
                    self.end();
                    delta.finish = Some(FinishReason::Stop);
                    return Ok(Some(delta));
                }
                Some(TextEnd::EndToken) => delta.has_end_token = true,
                None => {}
            }
        }
        Ok((!delta.tokens.is_empty()).then_some(delta))
    }

    /// Refuses a batch as a whole, so that what was taken is always also given out.
    fn check_order(&self, tokens: &[v1::SampledToken]) -> Result<(), Loss> {
        let next = self.entry.sampled().len();
        let max = self.entry.params().max_tokens as usize;
        for (expected, token) in (next..).zip(tokens) {
            if token.index as usize != expected || expected >= max {
                tracing::warn!(
                    expected,
                    max,
                    got = token.index,
                    "worker sent a token out of order"
                );
                return Err(Loss::Gone(LossReason::Confused));
            }
        }
        Ok(())
    }

    fn delta(&self) -> Delta {
        Delta {
            choice: self.choice,
            ..Delta::default()
        }
    }

    fn finish(&mut self, reason: FinishReason) -> Delta {
        let rest = self.text.finish();
        self.end();
        let reason = if rest.end.is_some() {
            FinishReason::Stop
        } else {
            reason
        };
        Delta {
            text: rest.text,
            calls: rest.calls,
            finish: Some(reason),
            ..self.delta()
        }
    }

    /// Lets go of the worker; a sequence that it still runs is aborted by this.
    fn end(&mut self) {
        self.state.run = None;
        self.state.finished = true;
    }

    /// The end of a sequence whose worker was lost between the last token and saying so. Whether a constrained one is whole
    /// with its last token only a worker knows.
    fn already_ended(&mut self) -> Option<Delta> {
        let sampled = self.entry.sampled();
        let last = *sampled.last()?;
        if self.text.is_end(last) {
            return Some(self.finish(FinishReason::Stop));
        }
        let params = self.entry.params();
        let is_full = sampled.len() >= params.max_tokens as usize;
        (is_full && params.constraint.is_none()).then(|| self.finish(FinishReason::Length))
    }

    fn lose_run(&mut self, loss: Loss) -> Result<(), ApiError> {
        self.state.run = None;
        match self.entry.worker().cloned() {
            Some(worker) => self.lost(worker, loss),
            None => Ok(()),
        }
    }

    /// Notes that `worker` is of no use; an error when the sequence must end here.
    fn lost(&mut self, worker: WorkerId, loss: Loss) -> Result<(), ApiError> {
        let started = !self.entry.sampled().is_empty();
        let error = match loss {
            Loss::Refused(message) if !started => {
                return Err(ApiError::new(ErrorKind::Invalid, message));
            }
            Loss::Constraint(message) => {
                let (request, param) = (self.entry.request_id(), self.constraint_name);
                tracing::debug!(request, param, message, "a constraint cannot be followed");
                let message = format!("{param} cannot be followed further: {message}");
                return Err(ApiError::invalid(param, message));
            }
            Loss::Failed => return Err(ApiError::internal()),
            Loss::Refused(_) => {
                self.metrics.lost(LossReason::Refused);
                ApiError::unavailable("no worker takes the request over")
            }
            // Nothing has failed; it only costs time to leave too soon.
            Loss::Deserted => {
                tracing::info!(request = self.entry.request_id(), %worker, "no sign of life, going on elsewhere");
                self.metrics.lost(LossReason::Silent);
                self.pool.sequence_moved(&worker);
                self.state.desertions += 1;
                self.state.lost_at.get_or_insert_with(Instant::now);
                self.state.excluded.push(worker);
                return Ok(());
            }
            Loss::Busy => {
                self.metrics.lost(LossReason::Busy);
                ApiError::new(ErrorKind::QueueFull, "all workers are full")
            }
            Loss::Gone(reason) => {
                let request = self.entry.request_id();
                tracing::warn!(request, %worker, ?reason, started, "worker lost a sequence");
                self.metrics.lost(reason);
                self.pool.sequence_moved(&worker);
                ApiError::unavailable("the workers that took this request were lost")
            }
        };
        self.state.failures += 1;
        self.state.lost_at.get_or_insert_with(Instant::now);
        self.state.excluded.push(worker);
        // Once the client has text, time is the limit; before that it may as well ask again itself.
        if !started && self.state.failures >= self.patience.attempts_max {
            return Err(error);
        }
        Ok(())
    }

    /// Opens the sequence on another worker, or on the same one when there is no other.
    async fn go_on(&mut self) -> Result<(), ApiError> {
        let deadline =
            self.state.lost_at.unwrap_or_else(Instant::now) + self.patience.failover_wait;
        self.state.moves += 1;
        if self.state.moves > MOVES_MAX {
            return Err(ApiError::unavailable(format!(
                "moved {MOVES_MAX} times without a new token"
            )));
        }
        loop {
            let worker = self.choose(deadline).await?;
            match self.open(&worker).await {
                Ok(run) => {
                    self.metrics.moved(self.entry.sampled().len());
                    self.state.lost_at = None;
                    self.state.run = Some(run);
                    return Ok(());
                }
                Err(loss) => self.lost(worker.contact.id.clone(), loss)?,
            }
        }
    }

    /// Another worker of the same weights; waits for one until `deadline`.
    async fn choose(&mut self, deadline: Instant) -> Result<Arc<PoolWorker>, ApiError> {
        let mut cluster = self.pool.cluster().clone();
        if let (true, Some(other)) = (is_on(Mutation::WeightsMixed), cluster.serving()) {
            self.entry.mix_weights(other);
        }
        let version = Arc::clone(self.entry.version());
        loop {
            let excluded = &self.state.excluded;
            if let Some(worker) = self.pool.pick(&version, &self.blocks, excluded) {
                return Ok(worker);
            }
            // Who has not begun may as well begin with what serves now.
            let serves = cluster.serving().is_none_or(|serving| serving == version);
            if Instant::now() >= deadline || !(serves || self.state.was_taken) {
                let reason = cluster.check_version(&version).err();
                let reason =
                    reason.unwrap_or_else(|| "no worker took the sequence over".to_owned());
                return Err(ApiError::unavailable(reason));
            }
            // Nobody else is there: whoever comes, or after a pause those that failed.
            let doublings = self.state.failures.saturating_sub(1).min(8);
            let pause = (RETRY_PAUSE * 2_u32.pow(doublings)).min(RETRY_PAUSE_MAX);
            tokio::select! {
                biased;
                _ = timeout_at(deadline, cluster.changed()) => {}
                () = sleep(pause) => self.state.excluded.clear(),
            }
        }
    }

    async fn open(&mut self, worker: &Arc<PoolWorker>) -> Result<Run, Loss> {
        let (occupied, version) = (worker.occupy(), Arc::clone(self.entry.version()));
        // A worker answers between two steps, and a step of a big model is long; its pulse says whether it lives.
        let generate = worker.contact.link.generate(self.entry.next_request());
        let answer = tokio::select! {
            biased;
            answer = timeout(self.patience.silence_max, generate) => answer,
            () = self.pool.deserted(worker, &version), if self.state.desertions < DESERTIONS_MAX => {
                return Err(Loss::Deserted);
            }
        };
        match answer {
            Ok(Ok(events)) => {
                self.entry.move_to(worker.contact.id.clone());
                Ok(Run {
                    worker: Arc::clone(worker),
                    events,
                    _occupied: occupied,
                })
            }
            Ok(Err(status)) => Err(classify(&status)),
            Err(_elapsed) => Err(Loss::Gone(LossReason::Silent)),
        }
    }
}

/// The next event of a worker, which may say nothing for `silence_max`.
async fn next_event(
    events: &mut SequenceEvents,
    silence_max: Duration,
) -> Result<v1::SequenceEvent, Loss> {
    match timeout(silence_max, events.next()).await {
        Ok(Some(Ok(event))) => Ok(event),
        Ok(None) => Err(Loss::Gone(LossReason::Broken)),
        Ok(Some(Err(status))) => Err(classify(&status)),
        Err(_elapsed) => Err(Loss::Gone(LossReason::Silent)),
    }
}

/// What a worker's status says about trying elsewhere. A dead worker shows as `Unknown` in tonic.
fn classify(status: &Status) -> Loss {
    match status.code() {
        Code::InvalidArgument if says(status, CONSTRAINT_FAILED) => {
            Loss::Constraint(status.message().to_owned())
        }
        Code::InvalidArgument | Code::OutOfRange => Loss::Refused(status.message().to_owned()),
        Code::ResourceExhausted => Loss::Busy,
        Code::Internal if says(status, SEQUENCE_FAILED) => {
            tracing::error!(message = status.message(), "a sequence cannot be computed");
            Loss::Failed
        }
        Code::Unavailable | Code::FailedPrecondition | Code::Aborted => {
            Loss::Gone(LossReason::Broken)
        }
        _ => {
            tracing::warn!(code = ?status.code(), message = status.message(), "worker failed a sequence");
            Loss::Gone(LossReason::Broken)
        }
    }
}

/// Whether the worker itself says so; the transport has the same codes for less.
fn says(status: &Status, reason: &str) -> bool {
    status
        .get_details_error_info()
        .is_some_and(|info| info.reason == reason)
}
