//! One sequence: its tokens, how many of them are computed, its pages, and when it ends. Knows nothing
//! of other sequences.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use tramontane_compute::KV_PAGE_TOKENS;
use tramontane_types::{FinishReason, RequestId, SamplingParams, TokenId, TokenOutput, Usage};

use crate::kv::{BlockPool, BlockTable, PageKeys, first_visible_page, pages_needed};
use crate::lookup::Lookup;
use crate::masks::Matching;

/// What the router asks an engine to continue.
#[derive(Clone, Debug, PartialEq)]
pub struct NewSequence {
    /// Name of the sequence, unique in this engine while it lives.
    pub id: RequestId,
    /// The tokens to continue, resumed ones included.
    pub prompt: Vec<TokenId>,
    /// How many trailing tokens of `prompt` were sampled earlier, by another engine. They count as
    /// output: for penalties, `max_tokens`, `min_tokens`, [`TokenOutput::index`], the generator and
    /// [`Usage`]. No events are sent for them again. Fewer than the prompt has.
    pub num_resumed: usize,
    /// How to sample.
    pub params: SamplingParams,
    /// Whose it is: only sequences of the same salt share cached pages, and those of different ones share rows and pages
    /// fairly.
    pub cache_salt: u64,
}

/// What happens to a sequence. `Finished` or `Failed` is the last event; an aborted sequence has none.
#[derive(Clone, Debug, PartialEq)]
pub enum SequenceEvent {
    /// Its first rows were computed. Sent once, preempted or not.
    Started {
        /// Prompt tokens that were found in the prefix cache.
        cached_tokens: u32,
    },
    /// What was asked for about the next tokens of the prompt; [`TokenOutput::index`] is the position in the prompt.
    /// Each once, in order, before the first sampled token; again by another engine that the sequence moved to.
    PromptTokens(Vec<TokenOutput>),
    /// A token was sampled. The end-of-sequence or stop id that ends a sequence is reported too, before
    /// `Finished`: the router decides that it is no text.
    Token(TokenOutput),
    /// The sequence ended; its pages are free.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Resumed tokens count as completion tokens; the ending stop id counts as well.
        usage: Usage,
    },
    /// The sequence cannot go on here; its pages are free.
    Failed {
        /// What went wrong: for logs, and for whoever wrote its constraint.
        message: String,
        /// Who may do something about it.
        kind: FailureKind,
    },
}

/// Who may do something about a sequence that cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Another worker may continue it: this one could not compute.
    Step,
    /// Another worker may continue it: this one has no room for it, or its threads are taken.
    Full,
    /// Whoever wrote its constraint: nobody can go on in it.
    Constraint,
    /// Nobody: it cannot be computed here or anywhere.
    Sequence,
}

/// Number of a sequence in order of arrival: the order of service, and the reverse of preemption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceKey(pub(crate) u64);

/// Whose a sequence is.
pub(crate) type OwnerId = u64;

/// All sequences of an engine, oldest first.
pub(crate) type Sequences = BTreeMap<SequenceKey, Sequence>;

/// Which tokens were seen, as far as the penalties ask for it.
#[derive(Debug, Default)]
pub(crate) struct SeenTokens {
    /// Occurrences in the output; empty unless a penalty needs them.
    pub(crate) output: HashMap<TokenId, u32>,
    /// Tokens of the prompt; empty unless the repetition penalty is on.
    pub(crate) prompt: HashSet<TokenId>,
}

/// The rows of a step whose logits a sequence wants, in the order of the step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct WantedLogits {
    /// Positions whose next token is a token of the prompt that is to be reported.
    pub(crate) prompt: Range<usize>,
    /// Rows behind which a token is sampled: the last of the tokens that there are, and one per guessed token.
    pub(crate) num_sampled: usize,
}

impl WantedLogits {
    pub(crate) fn num_rows(&self) -> usize {
        self.prompt.len() + self.num_sampled
    }
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: RequestId,
    pub(crate) owner: OwnerId,
    pub(crate) params: SamplingParams,
    /// Prompt, then output.
    pub(crate) tokens: Vec<TokenId>,
    /// Where the output begins in `tokens`.
    first_output: usize,
    /// Leading tokens whose keys and values are in the pages.
    pub(crate) num_computed: usize,
    pub(crate) table: BlockTable,
    keys: PageKeys,
    pub(crate) seen: SeenTokens,
    /// Its place in the grammar of its output, if it has one.
    pub(crate) matching: Option<Matching>,
    /// Whether its last row is of no use before its mask has come.
    pub(crate) awaits_mask: bool,
    /// Whether it has all its tokens, and only waits to know how it ends: without rows, pages or a place.
    pub(crate) is_full: bool,
    /// Prompt tokens found in the prefix cache at first admission; `None` before.
    pub(crate) cached_tokens: Option<u32>,
    /// `Started` was sent.
    pub(crate) is_started: bool,
    /// The next token of the prompt to report, or its end.
    pub(crate) next_prompt_logprob: usize,
    /// Guesses how it goes on, where that is wanted.
    lookup: Option<Lookup>,
    /// Guessed tokens behind `tokens` whose rows the planned step computes too.
    pub(crate) draft: Vec<TokenId>,
    /// When the scheduler last planned rows of this sequence; only grows.
    pub(crate) last_turn: u64,
}

impl Sequence {
    /// A sequence that was checked, without pages.
    pub(crate) fn new(new: NewSequence, pool: &BlockPool) -> Self {
        let first_output = new.prompt.len().saturating_sub(new.num_resumed);
        let mut sequence = Self {
            id: new.id,
            owner: new.cache_salt,
            params: new.params,
            tokens: new.prompt,
            first_output,
            num_computed: 0,
            table: BlockTable::new(pool.clone()),
            keys: PageKeys::new(new.cache_salt),
            seen: SeenTokens::default(),
            matching: None,
            awaits_mask: false,
            is_full: false,
            cached_tokens: None,
            is_started: false,
            next_prompt_logprob: first_output,
            lookup: None,
            draft: Vec::new(),
            last_turn: 0,
        };
        if sequence.params.prompt_logprobs.is_some() {
            // Nothing says how likely the first one is.
            sequence.next_prompt_logprob = 1;
        }
        if sequence.counts_prompt() {
            sequence.seen.prompt = sequence.tokens[..first_output].iter().copied().collect();
        }
        for i in first_output..sequence.tokens.len() {
            sequence.count_output(sequence.tokens[i]);
        }
        sequence
    }

    /// The same sequence, that guesses up to so many tokens before position `end`.
    pub(crate) fn with_lookup(mut self, tokens_max: usize, end: usize) -> Self {
        self.lookup = (tokens_max > 0).then(|| Lookup::new(tokens_max, end));
        self
    }

    fn counts_prompt(&self) -> bool {
        self.params.repetition_penalty != 1.0
    }

    fn count_output(&mut self, token: TokenId) {
        let params = &self.params;
        if self.counts_prompt() || params.presence_penalty != 0.0 || params.frequency_penalty != 0.0
        {
            *self.seen.output.entry(token).or_default() += 1;
        }
    }

    /// Tokens that are not computed yet: 1 while decoding, never 0 between steps.
    pub(crate) const fn num_remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// Tokens sampled so far, resumed ones included: the position of the next one.
    pub(crate) const fn num_output(&self) -> usize {
        self.tokens.len() - self.first_output
    }

    /// Prompt tokens, without resumed ones.
    pub(crate) const fn num_prompt(&self) -> usize {
        self.first_output
    }

    /// Whether tokens of the prompt are still to be reported.
    pub(crate) const fn reports_prompt(&self) -> bool {
        self.next_prompt_logprob < self.first_output
    }

    /// The logits that a step with the next `num_rows` rows wants.
    pub(crate) fn wanted_logits(&self, num_rows: usize) -> WantedLogits {
        let (begin, end) = (self.num_computed, self.num_computed + num_rows);
        let from = begin.max(self.next_prompt_logprob - 1);
        let to = end.min(self.first_output - 1);
        WantedLogits {
            prompt: from.min(to)..to,
            num_sampled: (end + 1).saturating_sub(self.tokens.len()),
        }
    }

    /// Guesses up to `most` tokens behind the last one, for the step that computes all there are. Returns how many.
    pub(crate) fn guess(&mut self, most: usize) -> usize {
        let room = self.table.capacity().saturating_sub(self.tokens.len());
        // One token comes anyway, and none after the last.
        let wanted = (self.params.max_tokens as usize).saturating_sub(self.num_output() + 1);
        let most = most.min(room).min(wanted);
        self.draft.clear();
        if let Some(lookup) = &mut self.lookup {
            self.draft
                .extend_from_slice(lookup.guess(&self.tokens, most));
        }
        self.draft.len()
    }

    /// Takes the guess, of which the first `num_true` tokens came true.
    pub(crate) fn learn(&mut self, num_true: usize) {
        if let Some(lookup) = &mut self.lookup {
            lookup.learn(self.draft.len(), num_true);
        }
        self.draft.clear();
    }

    /// Appends a sampled token.
    pub(crate) fn push(&mut self, token: TokenId) {
        self.tokens.push(token);
        self.count_output(token);
    }

    /// Why the sequence ends with the tokens it has, if it does: at `length_max` of them at the latest.
    pub(crate) fn finish_reason(
        &self,
        eos_ids: &[TokenId],
        length_max: usize,
    ) -> Option<FinishReason> {
        let last = self.tokens[self.first_output..].last()?;
        let is_eos = !self.params.ignore_eos && eos_ids.contains(last);
        if is_eos || self.params.stop_ids.contains(last) {
            return Some(FinishReason::Stop);
        }
        let is_full =
            self.num_output() >= self.params.max_tokens as usize || self.tokens.len() >= length_max;
        is_full.then_some(FinishReason::Length)
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage {
            prompt_tokens: self.first_output as u32,
            cached_tokens: self
                .cached_tokens
                .unwrap_or(0)
                .min(self.first_output as u32),
            completion_tokens: self.num_output() as u32,
        }
    }

    /// Further pages until all present tokens are computed.
    pub(crate) fn pages_missing(&self, window: Option<usize>) -> usize {
        pages_needed(self.tokens.len(), window).saturating_sub(self.table.num_held())
    }

    /// Makes room for up to `num_rows` further tokens. Returns for how many there is room.
    pub(crate) fn reserve(&mut self, num_rows: usize, window: Option<usize>) -> usize {
        self.table
            .release_behind(first_visible_page(self.num_computed, window));
        while self.table.capacity() < self.num_computed + num_rows && self.table.grow() {}
        (self.table.capacity() - self.num_computed).min(num_rows)
    }

    /// Starts from the longest cached prefix that leaves a token to compute. The table must be empty.
    pub(crate) fn adopt_prefix(&mut self, pool: &BlockPool, window: Option<usize>) {
        let num_pages = (self.tokens.len() - 1) / KV_PAGE_TOKENS;
        let keys = self.keys.first(num_pages, &self.tokens);
        let first_visible = |num_pages| first_visible_page(num_pages * KV_PAGE_TOKENS, window);
        let longest = pool.longest_prefix(keys, first_visible);
        let len = self.table.adopt(&keys[..longest], first_visible(longest));
        debug_assert_eq!(len, longest, "what was found a moment ago is still there");
        self.num_computed = len * KV_PAGE_TOKENS;
    }

    /// Lets others find the full pages among tokens `from..num_computed`.
    pub(crate) fn register_pages(&mut self, from: usize) {
        let num_full = self.num_computed / KV_PAGE_TOKENS;
        let keys = self.keys.first(num_full, &self.tokens);
        for (i, key) in keys.iter().enumerate().skip(from / KV_PAGE_TOKENS) {
            self.table.register(i, *key);
        }
    }

    /// Gives all pages back; every token is to be computed again.
    pub(crate) fn clear_pages(&mut self) {
        self.table.clear();
        self.num_computed = 0;
        self.draft.clear();
        self.awaits_mask = false;
    }
}
