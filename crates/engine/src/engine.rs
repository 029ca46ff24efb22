//! The engine: sequences in, events out, one step at a time. Never waits except inside the exchange
//! and, for a moment, for masks; never speaks to a client.

mod commit;
mod constrained;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::Ordering;
use std::time::Instant;

use tramontane_compute::{Attention, KV_PAGE_TOKENS, StepBatch, StepOutputs, Wanted};
use tramontane_exchange::Exchange;
use tramontane_types::{FinishReason, ModelGeometry, RequestId, Usage};

use crate::kv::{BlockPool, pages_needed};
use crate::masks::{
    BeforeMask, HeldMatcher, MASK_STEP_WAIT_MAX, MASK_STEP_WAIT_MIN, MASK_STRAYS_MAX, MaskThreads,
    MatcherRoom, Matching,
};
use crate::model_runner::ModelRunner;
use crate::sampler::Sampler;
use crate::scheduler::{Plan, Scheduler};
use crate::sequence::{Sequence, SequenceKey, Sequences};
use crate::{
    EngineConfig, EngineStats, Error, FailureKind, NewSequence, SequenceEvent, StepReport,
    SubmitError, batch,
};

/// Events of a step, in order; those of one sequence are in the order in which they happened.
type Events = Vec<(RequestId, SequenceEvent)>;

/// Runs sequences on one attention worker. One thread owns it and calls [`step`](Self::step) while
/// [`has_work`](Self::has_work).
#[derive(Debug)]
pub struct Engine {
    config: EngineConfig,
    geometry: ModelGeometry,
    /// Tokens at which a sequence is full: prompt and output together.
    length_max: usize,
    sequences: Sequences,
    by_id: HashMap<RequestId, SequenceKey>,
    next_key: u64,
    scheduler: Scheduler,
    pool: BlockPool,
    runner: ModelRunner,
    sampler: Sampler,
    masks: MaskThreads,
    /// Sequences whose masks were not there when they were to sample.
    late: BTreeSet<SequenceKey>,
    /// Sequences that had ended when they were submitted: their end is told by the next step.
    ended: Vec<(RequestId, FinishReason, Usage)>,
    /// Failures of the exchange since the last step that was computed.
    num_failures: u32,
    stats: EngineStats,
    /// Kept between steps for their memory.
    batch: StepBatch,
    /// What is wanted of each logits row of the batch, and what came.
    wanted: Vec<Wanted>,
    outputs: StepOutputs,
}

impl Engine {
    /// An engine without sequences. `attention` must have at least `config.num_pages` pages and take
    /// `config.max_step_rows` rows.
    ///
    /// # Errors
    /// When a limit breaks its rule.
    pub fn new(
        config: EngineConfig,
        geometry: ModelGeometry,
        attention: Box<dyn Attention>,
        exchange: Box<dyn Exchange>,
    ) -> Result<Self, Error> {
        config.validate(geometry.vocab)?;
        let pool = BlockPool::new(config.num_pages);
        let masks = MaskThreads::start(config.masks.clone())?;
        Ok(Self {
            scheduler: Scheduler::new(&config, geometry.sliding_window, pool.clone()),
            runner: ModelRunner::new(&geometry, attention, exchange)?,
            length_max: length_max(&geometry, config.num_pages),
            config,
            geometry,
            sequences: Sequences::new(),
            by_id: HashMap::new(),
            next_key: 0,
            pool,
            sampler: Sampler::default(),
            masks,
            late: BTreeSet::new(),
            ended: Vec::new(),
            num_failures: 0,
            stats: EngineStats::default(),
            batch: StepBatch::default(),
            wanted: Vec::new(),
            outputs: StepOutputs::default(),
        })
    }

    /// Queues a sequence.
    ///
    /// A sequence ends with [`FinishReason::Length`] at the model's context or when it would need more
    /// than the whole KV cache, whatever `max_tokens` says.
    ///
    /// A resumed sequence whose last token already ended it (a stop id, `max_tokens`) is taken, and
    /// finishes in the next step without a token.
    ///
    /// # Errors
    /// When the queue is full or the sequence can never run here; then nothing was changed.
    pub fn submit(&mut self, new: NewSequence) -> Result<(), SubmitError> {
        if new.params.constraint.is_some() {
            return Err(SubmitError::NoGrammar);
        }
        self.take(new, None)
    }

    /// The room for the matchers of its sequences.
    #[must_use]
    pub fn matcher_room(&self) -> MatcherRoom {
        self.masks.room.clone()
    }

    /// Queues a sequence whose output is a word of a grammar. `matcher`, held by [`matcher_room`](Self::matcher_room), is
    /// behind its resumed tokens. It finishes with [`FinishReason::Stop`] where the grammar lets nothing follow, without a
    /// token for that.
    ///
    /// # Errors
    /// As those of [`submit`](Self::submit).
    pub fn submit_constrained(
        &mut self,
        new: NewSequence,
        matcher: HeldMatcher,
    ) -> Result<(), SubmitError> {
        self.masks.tend();
        if self.masks.are_taken() {
            let limit = MASK_STRAYS_MAX;
            return Err(SubmitError::MasksSlow { limit });
        }
        self.take(new, Some(matcher))
    }

    fn take(&mut self, new: NewSequence, matcher: Option<HeldMatcher>) -> Result<(), SubmitError> {
        self.check(&new)?;
        let mut sequence =
            Sequence::new(new, &self.pool).with_lookup(self.config.lookup_tokens, self.length_max);
        let is_whole = matcher.as_ref().is_some_and(HeldMatcher::has_ended);
        let reason = sequence.finish_reason(&self.config.eos_ids, self.length_max);
        if let Some(reason) = is_whole.then_some(FinishReason::Stop).or(reason) {
            let usage = sequence.usage();
            self.ended.push((sequence.id, reason, usage));
            return Ok(());
        }
        let (tokens, max_positions) = (sequence.tokens.len(), self.geometry.max_positions);
        if tokens >= max_positions {
            return Err(SubmitError::TooLong {
                tokens,
                limit: max_positions.saturating_sub(1),
            });
        }
        if tokens >= self.length_max {
            return Err(SubmitError::NeverFits {
                pages: pages_needed(tokens + 1, self.geometry.sliding_window),
                limit: self.config.num_pages,
            });
        }
        sequence.matching = matcher.map(Matching::new);
        let key = SequenceKey(self.next_key);
        self.next_key += 1;
        self.by_id.insert(sequence.id.clone(), key);
        self.scheduler.enqueue(key, sequence.owner);
        self.sequences.insert(key, sequence);
        Ok(())
    }

    fn check(&self, new: &NewSequence) -> Result<(), SubmitError> {
        let tokens = new.prompt.len();
        if tokens == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if new.num_resumed >= tokens {
            return Err(SubmitError::ResumedTooMany {
                num_resumed: new.num_resumed,
                tokens,
            });
        }
        let vocab = self.geometry.vocab;
        if let Some(&id) = new.prompt.iter().find(|&&id| id as usize >= vocab) {
            return Err(SubmitError::TokenOutOfRange { id, vocab });
        }
        new.params.validate(vocab)?;
        let is_known =
            self.by_id.contains_key(&new.id) || self.ended.iter().any(|(id, ..)| *id == new.id);
        if is_known {
            return Err(SubmitError::Duplicate { id: new.id.clone() });
        }
        let limit = self.config.max_waiting;
        if self.scheduler.num_waiting() + self.ended.len() >= limit {
            return Err(SubmitError::QueueFull { limit });
        }
        Ok(())
    }

    /// Has `before` be called on its thread before each mask, with the token that it follows: for tests, whose masks would
    /// be found too fast. Only the first call has an effect.
    #[doc(hidden)]
    pub fn before_each_mask(&self, before: BeforeMask) {
        self.masks.before_each(before);
    }

    /// Ends a sequence without an event. Its pages are free when this returns. False when it is not here.
    pub fn abort(&mut self, id: &RequestId) -> bool {
        let num_ended = self.ended.len();
        self.ended.retain(|(ended, ..)| ended != id);
        match self.by_id.get(id) {
            Some(&key) => self.remove(key).is_some(),
            None => self.ended.len() < num_ended,
        }
    }

    /// Whether [`step`](Self::step) has something to do.
    #[must_use]
    pub fn has_work(&self) -> bool {
        !self.sequences.is_empty() || !self.ended.is_empty()
    }

    /// Tells the exchange that no step will follow until further notice.
    pub fn rest(&mut self) {
        self.runner.rest();
    }

    /// Plans and computes one step, and appends what happened to `events`.
    ///
    /// When the backend refuses, or the exchange has failed `step_attempts_max` times in a row, the
    /// sequences of the step fail (retryable elsewhere), the report says why, and the engine goes on
    /// with the others.
    ///
    /// # Errors
    /// When the exchange did not complete: no token was sampled, nothing was cached, and `step` may
    /// simply be called again. Sequences may be submitted and aborted in between. Events that were
    /// appended are valid.
    pub fn step(&mut self, events: &mut Events) -> Result<StepReport, Error> {
        let mut report = StepReport::default();
        for (id, reason, usage) in self.ended.drain(..) {
            events.push((id.clone(), SequenceEvent::Started { cached_tokens: 0 }));
            events.push((id, SequenceEvent::Finished { reason, usage }));
            report.num_ended += 1;
        }
        let begin = Instant::now();
        self.make_room(events, &mut report);
        self.look_for_masks(events, &mut report);
        let plan = self.scheduler.next_step(&mut self.sequences);
        self.stats.preemptions += plan.num_preempted as u64;
        report.num_preempted = plan.num_preempted;
        if plan.chunks.is_empty() {
            self.wait_for_masks(&plan, &report);
            return Ok(report);
        }
        let filled = (&mut self.batch, &mut self.wanted);
        batch::fill(filled, &plan.chunks, &self.sequences);
        report.times.schedule_us = elapsed_us(begin);
        let begin = Instant::now();
        let outputs = (&mut self.wanted[..], &mut self.outputs);
        if let Err(error) = self.runner.run(&self.batch, outputs, &mut report.times) {
            self.give_up(error, &plan, events, &mut report)?;
            return Ok(report);
        }
        self.num_failures = 0;
        let patience = begin
            .elapsed()
            .clamp(MASK_STEP_WAIT_MIN, MASK_STEP_WAIT_MAX);
        let begin = Instant::now();
        self.commit(&plan, begin + patience, events, &mut report);
        report.times.sample_us = elapsed_us(begin);
        self.count(&report);
        Ok(report)
    }

    /// Fails all running sequences: another worker may continue them. Waiting ones keep waiting.
    pub fn fail_running(&mut self, message: &str, events: &mut Events) {
        let running: Vec<_> = self.scheduler.running().iter().copied().collect();
        for key in running {
            self.fail(key, message.to_owned(), FailureKind::Step, events);
        }
    }

    /// Gauges and counters as they are now.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        let counts = self.masks.shared();
        EngineStats {
            running: self.scheduler.running().len(),
            waiting: self.scheduler.num_waiting(),
            pages_total: self.pool.num_pages(),
            pages_free: self.pool.num_available(),
            pages_cached: self.pool.num_idle(),
            masks: counts.masks.load(Ordering::Relaxed),
            mask_us: counts.mask_us.load(Ordering::Relaxed),
            ..self.stats
        }
    }

    /// Checks that every page is free, cached or read by exactly the sequences that say so. For tests
    /// and diagnosis; costs a walk over all pages.
    ///
    /// # Errors
    /// Says what does not add up.
    pub fn check_integrity(&self) -> Result<(), String> {
        self.pool
            .check_integrity(self.sequences.values().map(|s| s.table.pages()))
    }

    /// Lets others find the pages that became full behind token `from`.
    fn register(&mut self, key: SequenceKey, from: usize) {
        if self.config.prefix_cache
            && let Some(sequence) = self.sequences.get_mut(&key)
        {
            sequence.register_pages(from);
        }
    }

    /// Ends the sequence if its last token says so.
    fn finish(&mut self, key: SequenceKey, events: &mut Events) -> bool {
        let length_max = self.length_max;
        let reason = self
            .sequences
            .get(&key)
            .and_then(|s| s.finish_reason(&self.config.eos_ids, length_max));
        let Some(reason) = reason else {
            return false;
        };
        self.end(key, reason, events);
        true
    }

    fn end(&mut self, key: SequenceKey, reason: FinishReason, events: &mut Events) {
        if let Some(sequence) = self.remove(key) {
            let usage = sequence.usage();
            events.push((sequence.id, SequenceEvent::Finished { reason, usage }));
        }
    }

    /// A step was not computed: either it is to be tried again, or its sequences fail.
    fn give_up(
        &mut self,
        error: Error,
        plan: &Plan,
        events: &mut Events,
        report: &mut StepReport,
    ) -> Result<(), Error> {
        self.stats.steps_failed += 1;
        self.num_failures += 1;
        let attempts_max = self.config.step_attempts_max;
        if error.is_retryable() && self.num_failures < attempts_max {
            return Err(error);
        }
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            attempts = self.num_failures,
            num_sequences = plan.chunks.len(),
            "step given up, its sequences are handed back"
        );
        self.num_failures = 0;
        let message = error.with_causes();
        for chunk in &plan.chunks {
            self.fail(chunk.key, message.clone(), FailureKind::Step, events);
            report.num_ended += 1;
        }
        report.gave_up = Some(error);
        Ok(())
    }

    fn fail(&mut self, key: SequenceKey, message: String, kind: FailureKind, events: &mut Events) {
        if let Some(sequence) = self.remove(key) {
            events.push((sequence.id, SequenceEvent::Failed { message, kind }));
        }
    }

    /// Takes a sequence out and gives its pages back.
    fn remove(&mut self, key: SequenceKey) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&key)?;
        self.by_id.remove(&sequence.id);
        self.scheduler.remove(key);
        sequence.clear_pages();
        Some(sequence)
    }

    const fn count(&mut self, report: &StepReport) {
        self.stats.steps += 1;
        self.stats.rows += report.num_rows as u64;
        self.stats.tokens_sampled += report.num_sampled as u64;
        self.stats.times.add(&report.times);
    }
}

/// Tokens that a sequence may have: the model's context, or what fits when it has all pages to itself.
fn length_max(geometry: &ModelGeometry, num_pages: usize) -> usize {
    let max_positions = geometry.max_positions;
    if pages_needed(max_positions, geometry.sliding_window) <= num_pages {
        return max_positions;
    }
    max_positions.min(num_pages.saturating_mul(KV_PAGE_TOKENS))
}

fn elapsed_us(begin: Instant) -> u64 {
    begin.elapsed().as_micros() as u64
}
