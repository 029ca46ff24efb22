//! What an engine counts. Numbers only grow, except the gauges that say so.

use crate::Error;

/// A snapshot of an engine's gauges and counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Gauge: sequences that hold pages.
    pub running: usize,
    /// Gauge: sequences that wait, preempted ones included.
    pub waiting: usize,
    /// Pages of the KV cache.
    pub pages_total: usize,
    /// Gauge: pages that a sequence could take now, idle pages of the prefix cache included.
    pub pages_free: usize,
    /// Gauge: pages that the prefix cache keeps without a reader (part of `pages_free`).
    pub pages_cached: usize,
    /// Sequences whose pages were taken away, to be computed again later.
    pub preemptions: u64,
    /// Steps that were computed to their end.
    pub steps: u64,
    /// Steps that ended in an error of the exchange or the backend.
    pub steps_failed: u64,
    /// Rows computed, recomputed ones included.
    pub rows: u64,
    /// Tokens sampled.
    pub tokens_sampled: u64,
    /// Tokens guessed, and computed as rows of their own.
    pub tokens_guessed: u64,
    /// Of those, the ones that came true.
    pub guesses_true: u64,
    /// Prompt tokens of the sequences that were started.
    pub prompt_tokens: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_query_tokens: u64,
    /// Prompt tokens found there.
    pub prefix_hit_tokens: u64,
    /// Masks of constrained sequences that were found.
    pub masks: u64,
    /// Time that threads beside the engine's spent on them, in microseconds.
    pub mask_us: u64,
    /// Time that the engine stood still for them, in microseconds: in sampling, and where nothing else could be computed.
    pub mask_wait_us: u64,
    /// Masks that were not there when their sequences were to sample.
    pub masks_late: u64,
    /// Where the time of the completed steps went.
    pub times: StepTimes,
}

/// Time spent per part of a step, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Choosing rows and building the batch.
    pub schedule_us: u64,
    /// Embedding and the attention halves of the layers.
    pub attend_us: u64,
    /// Dispatch and combine: experts, local and remote, and waiting for them.
    pub exchange_us: u64,
    /// Final norm and LM head.
    pub logits_us: u64,
    /// Sampling and bookkeeping.
    pub sample_us: u64,
}

impl StepTimes {
    /// Adds another step's times.
    pub(crate) const fn add(&mut self, other: &Self) {
        self.schedule_us += other.schedule_us;
        self.attend_us += other.attend_us;
        self.exchange_us += other.exchange_us;
        self.logits_us += other.logits_us;
        self.sample_us += other.sample_us;
    }

    /// The whole step.
    #[must_use]
    pub const fn total_us(&self) -> u64 {
        self.schedule_us + self.attend_us + self.exchange_us + self.logits_us + self.sample_us
    }
}

/// What one call of [`crate::Engine::step`] did.
#[derive(Debug, Default)]
pub struct StepReport {
    /// Rows computed; 0 when there was nothing to do.
    pub num_rows: usize,
    /// Sequences in the batch.
    pub num_sequences: usize,
    /// Tokens sampled.
    pub num_sampled: usize,
    /// Sequences preempted to make room.
    pub num_preempted: usize,
    /// Sequences that ended, well or with an error.
    pub num_ended: usize,
    /// Where the time went.
    pub times: StepTimes,
    /// Why the batch's sequences were failed: the backend refused, or the exchange did not complete
    /// in all its attempts. Their [`crate::SequenceEvent::Failed`] events are in the same call.
    pub gave_up: Option<Error>,
}
