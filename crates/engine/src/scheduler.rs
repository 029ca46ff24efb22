//! The scheduler decides which rows the next step computes, and takes the pages for them. It never
//! reads a clock, does I/O, or looks at a token.
//!
//! - Decodes first, the longest not served first; then prompts in progress, then new ones, by arrival.
//! - A step has at most `max_step_rows` rows; a prompt is cut into chunks that fit rows and pages. Each owner's first
//!   prompt has an equal share of the rows for prompts, and the others have what is left.
//! - When no page is left, the latest arrival of the owner with most running sequences gives up its pages and waits again
//!   (at its place by arrival, so before everything younger); its sampled tokens are kept and computed again later.
//! - Of what waits, the next is the head of the owner with fewest running sequences, of several the one that came first.
//!   Nobody overtakes it: others wait until it has its pages.

use std::collections::{BTreeMap, BTreeSet};

use crate::EngineConfig;
use crate::kv::BlockPool;
use crate::sequence::{OwnerId, Sequence, SequenceKey, Sequences};

/// One page is kept free per this many running sequences when a new one is admitted, so that it is
/// not preempted at once by those that grow.
const RUNNING_PER_HEADROOM_PAGE: usize = 4;

/// Rows of one sequence in a step whose logits report its prompt: what bounds the memory of the logits.
const PROMPT_LOGPROB_ROWS_MAX: usize = 64;
/// Rows of a step beyond which nothing is guessed: more of them would cost more than guesses win.
const LOOKUP_STEP_ROWS_MAX: usize = 64;

/// Rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) key: SequenceKey,
    pub(crate) num_rows: usize,
}

/// What the next step computes. Pages for all its rows are taken.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) chunks: Vec<Chunk>,
    /// Sequences that lost their pages while planning.
    pub(crate) num_preempted: usize,
    rows_left: usize,
    /// Of those that report prompts.
    prompt_logprob_rows: usize,
}

impl Plan {
    fn push(&mut self, key: SequenceKey, num_rows: usize) {
        self.chunks.push(Chunk { key, num_rows });
        self.rows_left -= num_rows;
    }

    /// Rows that a sequence may have, at least one.
    fn rows_max(&mut self, sequence: &Sequence, chunk_max: usize) -> usize {
        let mut wanted = sequence.num_remaining().min(chunk_max).min(self.rows_left);
        if sequence.reports_prompt() {
            let left = PROMPT_LOGPROB_ROWS_MAX.saturating_sub(self.prompt_logprob_rows);
            wanted = wanted.min(left.max(1));
            self.prompt_logprob_rows += wanted;
        }
        wanted
    }

    /// Takes back the rows of a sequence that is preempted after it was planned.
    fn remove(&mut self, key: SequenceKey) {
        let rows_left = &mut self.rows_left;
        self.chunks.retain(|chunk| {
            *rows_left += if chunk.key == key { chunk.num_rows } else { 0 };
            chunk.key != key
        });
    }
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    max_running: usize,
    max_step_rows: usize,
    max_prefill_chunk: usize,
    prefix_cache: bool,
    window: Option<usize>,
    pool: BlockPool,
    running: BTreeSet<SequenceKey>,
    /// By owner; never an empty set.
    waiting: BTreeMap<OwnerId, BTreeSet<SequenceKey>>,
    /// Counts every chunk ever planned.
    turn: u64,
}

impl Scheduler {
    pub(crate) const fn new(config: &EngineConfig, window: Option<usize>, pool: BlockPool) -> Self {
        Self {
            max_running: config.max_running,
            max_step_rows: config.max_step_rows,
            max_prefill_chunk: config.max_prefill_chunk,
            prefix_cache: config.prefix_cache,
            window,
            pool,
            running: BTreeSet::new(),
            waiting: BTreeMap::new(),
            turn: 0,
        }
    }

    /// Queues a sequence of an owner; keys of new ones only grow.
    pub(crate) fn enqueue(&mut self, key: SequenceKey, owner: OwnerId) {
        self.waiting.entry(owner).or_default().insert(key);
    }

    /// Forgets a sequence that ended. Its pages go back when it is dropped.
    pub(crate) fn remove(&mut self, key: SequenceKey) {
        self.running.remove(&key);
        self.leave_queue(key);
    }

    fn leave_queue(&mut self, key: SequenceKey) {
        self.waiting.retain(|_, keys| {
            keys.remove(&key);
            !keys.is_empty()
        });
    }

    pub(crate) const fn running(&self) -> &BTreeSet<SequenceKey> {
        &self.running
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.values().map(BTreeSet::len).sum()
    }

    /// Chooses the rows of the next step. Empty only when no sequence could do anything with one.
    pub(crate) fn next_step(&mut self, sequences: &mut Sequences) -> Plan {
        let mut plan = Plan {
            rows_left: self.max_step_rows,
            ..Plan::default()
        };
        for key in self.decodes(sequences) {
            self.continue_running((key, 1), sequences, &mut plan);
        }
        self.plan_prompts(sequences, &mut plan);
        guess(sequences, &mut plan);
        for chunk in &plan.chunks {
            self.turn += 1;
            if let Some(sequence) = sequences.get_mut(&chunk.key) {
                sequence.last_turn = self.turn;
            }
        }
        plan
    }

    /// Running sequences that can use a row: not those that could not sample yet.
    fn able<'a>(
        &self,
        sequences: &'a Sequences,
    ) -> impl Iterator<Item = (SequenceKey, &'a Sequence)> {
        let known = |key: &SequenceKey| Some((*key, sequences.get(key)?));
        let running = self.running.iter().filter_map(known);
        running.filter(|(_, sequence)| !sequence.awaits_mask)
    }

    /// Those that lack the row of their last token alone, by how long they were not served.
    fn decodes(&self, sequences: &Sequences) -> Vec<SequenceKey> {
        let mut order: Vec<_> = self
            .able(sequences)
            .filter(|(_, sequence)| sequence.num_remaining() <= 1)
            .map(|(key, sequence)| (sequence.last_turn, key))
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(_, key)| key).collect()
    }

    /// Plans rows of prompts: the first of each owner, then the others, running ones before new ones.
    fn plan_prompts(&mut self, sequences: &mut Sequences, plan: &mut Plan) {
        let prompts = self.able(sequences);
        let prompts = prompts.filter(|(_, sequence)| sequence.num_remaining() > 1);
        let mut owners = BTreeSet::new();
        let (firsts, others): (Vec<_>, Vec<_>) = prompts
            .map(|(key, sequence)| (key, sequence.owner))
            .partition(|(_, owner)| owners.insert(*owner));
        let newcomers = self.newcomers(&owners, sequences);
        let mut sharers = firsts.len() + newcomers.len();
        let mut share = |plan: &Plan| {
            let share = plan.rows_left.div_ceil(sharers);
            sharers -= 1;
            share
        };
        for (key, _) in firsts {
            self.continue_running((key, share(plan)), sequences, plan);
        }
        for key in newcomers {
            if !self.admit((key, share(plan)), sequences, plan) {
                break;
            }
        }
        for (key, _) in others {
            self.continue_running((key, self.max_prefill_chunk), sequences, plan);
        }
        while let Some(key) = self.next_waiting(sequences) {
            if !self.admit((key, self.max_prefill_chunk), sequences, plan) {
                break;
            }
        }
    }

    /// Plans up to so many rows of a running sequence; takes pages away from others when there are none.
    fn continue_running(
        &mut self,
        (key, rows_max): (SequenceKey, usize),
        sequences: &mut Sequences,
        plan: &mut Plan,
    ) {
        // It may have been preempted by one before it.
        while plan.rows_left > 0 && self.running.contains(&key) {
            let Some(sequence) = sequences.get_mut(&key) else {
                return;
            };
            let wanted = plan.rows_max(sequence, self.max_prefill_chunk.min(rows_max));
            let num_rows = sequence.reserve(wanted, self.window);
            if num_rows > 0 {
                plan.push(key, num_rows);
                return;
            }
            self.preempt(sequences, plan);
        }
    }

    /// Takes the pages of the latest arrival of whoever has most sequences running.
    fn preempt(&mut self, sequences: &mut Sequences, plan: &mut Plan) {
        let counts = self.counts(sequences);
        let running = self.running.iter().rev();
        let known = running.filter_map(|key| Some((*key, sequences.get(key)?.owner)));
        // Of equals the first, which came last.
        let victim = known.min_by_key(|(_, owner)| std::cmp::Reverse(counts.get(owner)));
        let Some((key, owner)) = victim else {
            return;
        };
        self.running.remove(&key);
        if let Some(victim) = sequences.get_mut(&key) {
            victim.clear_pages();
        }
        self.enqueue(key, owner);
        plan.remove(key);
        plan.num_preempted += 1;
    }

    /// How many sequences of each owner run.
    fn counts(&self, sequences: &Sequences) -> BTreeMap<OwnerId, usize> {
        let mut counts = BTreeMap::new();
        for sequence in self.running.iter().filter_map(|key| sequences.get(key)) {
            *counts.entry(sequence.owner).or_default() += 1;
        }
        counts
    }

    /// The heads of what waits, in the order in which they are next.
    fn heads(&self, sequences: &Sequences) -> Vec<(usize, SequenceKey, OwnerId)> {
        // Most steps: what runs need not be counted.
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let counts = self.counts(sequences);
        let heads = self.waiting.iter().filter_map(|(owner, keys)| {
            let num_running = counts.get(owner).copied().unwrap_or(0);
            Some((num_running, *keys.first()?, *owner))
        });
        let mut heads: Vec<_> = heads.collect();
        heads.sort_unstable();
        heads
    }

    fn next_waiting(&self, sequences: &Sequences) -> Option<SequenceKey> {
        let heads = self.heads(sequences);
        heads.first().map(|(_, key, _)| *key)
    }

    /// The heads of those without a prompt under way, as far as there are places.
    fn newcomers(&self, owners: &BTreeSet<OwnerId>, sequences: &Sequences) -> Vec<SequenceKey> {
        let places = self.max_running.saturating_sub(self.running.len());
        let heads = self.heads(sequences).into_iter();
        let newcomers = heads.filter(|(_, _, owner)| !owners.contains(owner));
        newcomers.map(|(_, key, _)| key).take(places).collect()
    }

    /// Starts a waiting sequence with up to so many rows, if there are rows, a place and pages.
    fn admit(
        &mut self,
        (key, rows_max): (SequenceKey, usize),
        sequences: &mut Sequences,
        plan: &mut Plan,
    ) -> bool {
        // Who just lost pages comes first again, and there is nothing for it yet.
        let has_room = plan.num_preempted == 0 && self.running.len() < self.max_running;
        if !has_room || plan.rows_left == 0 {
            return false;
        }
        let pages_promised = self.pages_promised(sequences);
        let Some(sequence) = sequences.get_mut(&key) else {
            self.leave_queue(key);
            return true;
        };
        // What is reported is computed.
        if self.prefix_cache && !sequence.reports_prompt() {
            sequence.adopt_prefix(&self.pool, self.window);
        }
        // Alone, a sequence always fits, up to its last token: the engine ends it where the pages do.
        let missing = sequence.pages_missing(self.window);
        let headroom = self.running.len().div_ceil(RUNNING_PER_HEADROOM_PAGE);
        if !self.running.is_empty()
            && self.pool.num_available() < missing + pages_promised + headroom
        {
            sequence.clear_pages();
            return false;
        }
        let cached_tokens = sequence.num_computed as u32;
        let wanted = plan.rows_max(sequence, self.max_prefill_chunk.min(rows_max));
        let num_rows = sequence.reserve(wanted, self.window);
        if num_rows == 0 {
            sequence.clear_pages();
            return false;
        }
        sequence.cached_tokens.get_or_insert(cached_tokens);
        self.leave_queue(key);
        self.running.insert(key);
        plan.push(key, num_rows);
        true
    }

    /// Pages that running sequences still need for the tokens they have.
    fn pages_promised(&self, sequences: &Sequences) -> usize {
        let running = self.running.iter().filter_map(|key| sequences.get(key));
        running
            .map(|sequence| sequence.pages_missing(self.window))
            .sum()
    }
}

/// Adds rows of guessed tokens where there is room: they take neither rows nor pages from anybody.
fn guess(sequences: &mut Sequences, plan: &mut Plan) {
    let num_rows: usize = plan.chunks.iter().map(|chunk| chunk.num_rows).sum();
    let mut rows_left = plan
        .rows_left
        .min(LOOKUP_STEP_ROWS_MAX.saturating_sub(num_rows));
    for chunk in &mut plan.chunks {
        if let Some(sequence) = sequences.get_mut(&chunk.key)
            && sequence.num_remaining() == chunk.num_rows
        {
            let num_guessed = sequence.guess(rows_left);
            chunk.num_rows += num_guessed;
            rows_left -= num_guessed;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use tramontane_types::{RequestId, SamplingParams};

    use super::*;
    use crate::sequence::NewSequence;

    /// A scenario: the first line sets limits (`rows chunk pages running window`, 0 is no window).
    /// `+a 100` submits 100 tokens, `+a 100 7` those of owner 7, `-a` ends a sequence, `step 3` plans that many steps and computes
    /// them, `skip 3` does so without printing,
    /// `limit 3` changes the rows of a step. A step prints `name:rows` in order, `!` in front when somebody was preempted; then the
    /// pages that are available.
    fn check(limits: &str, scenario: &str, expected: &str) {
        let limits: Vec<usize> = limits.split(' ').map(|n| n.parse().unwrap()).collect();
        let config = EngineConfig {
            max_step_rows: limits[0],
            max_prefill_chunk: limits[1],
            num_pages: limits[2],
            max_running: limits[3],
            prefix_cache: false,
            ..EngineConfig::default()
        };
        let window = Some(limits[4]).filter(|&w| w > 0);
        let pool = BlockPool::new(config.num_pages);
        let mut scheduler = Scheduler::new(&config, window, pool.clone());
        let mut sequences = Sequences::new();
        let mut got = String::new();
        for line in scenario.split(';').map(str::trim) {
            if let Some(rest) = line.strip_prefix('+') {
                let words: Vec<&str> = rest.split(' ').collect();
                let (name, len) = (words[0], words[1]);
                let owner = words.get(2).map_or(0, |owner| owner.parse().unwrap());
                let key = SequenceKey(u64::from(name.as_bytes()[0]));
                let new = NewSequence {
                    id: RequestId::new(name),
                    prompt: vec![0; len.parse().unwrap()],
                    num_resumed: 0,
                    params: SamplingParams::default(),
                    cache_salt: owner,
                };
                sequences.insert(key, Sequence::new(new, &pool));
                scheduler.enqueue(key, owner);
            } else if let Some(name) = line.strip_prefix('-') {
                let key = SequenceKey(u64::from(name.as_bytes()[0]));
                scheduler.remove(key);
                drop(sequences.remove(&key));
            } else if let Some(rows) = line.strip_prefix("limit ") {
                scheduler.max_step_rows = rows.parse().unwrap();
            } else {
                let (verb, steps) = line.split_once(' ').unwrap();
                for _ in 0..steps.parse().unwrap() {
                    let plan = scheduler.next_step(&mut sequences);
                    for chunk in &plan.chunks {
                        let sequence = sequences.get_mut(&chunk.key).unwrap();
                        sequence.num_computed += chunk.num_rows;
                        if sequence.num_remaining() == 0 {
                            sequence.push(0);
                        }
                        let name = char::from(chunk.key.0 as u8);
                        write!(got, "{name}:{} ", chunk.num_rows).unwrap();
                    }
                    if verb == "skip" {
                        got.clear();
                        continue;
                    }
                    let mark = "!".repeat(plan.num_preempted);
                    writeln!(got, "{mark}free {}", pool.num_available()).unwrap();
                    let tables = sequences.values().map(|s| s.table.pages());
                    pool.check_integrity(tables).unwrap();
                }
            }
        }
        let expected: Vec<&str> = expected.lines().map(str::trim).collect();
        assert_eq!(got.lines().collect::<Vec<_>>(), expected, "got:\n{got}");
    }

    #[test]
    fn decodes_go_first_and_prompts_share_the_rest_by_arrival() {
        check(
            "40 30 99 9 0",
            "+a 10; step 1; +b 50; +c 5; step 3; step 1",
            "a:10 free 98
             a:1 b:30 c:5 free 96
             a:1 c:1 b:20 free 96
             a:1 c:1 b:1 free 96
             a:1 c:1 b:1 free 96",
        );
    }

    #[test]
    fn a_budget_of_one_row_is_enough_for_everybody_one_after_the_other() {
        check(
            "1 8 99 9 0",
            "+a 2; +b 2; step 3; -a; step 3",
            "a:1 free 98
             a:1 free 98
             a:1 free 98
             b:1 free 98
             b:1 free 98
             b:1 free 98",
        );
    }

    #[test]
    fn more_decodes_than_rows_take_turns() {
        // A prompt chunk of one row turns into a decode: four decodes share three rows.
        check(
            "3 8 99 9 0",
            "+a 2; +b 2; step 1; +c 2; step 1; step 4",
            "a:2 b:1 free 97
             a:1 b:1 c:1 free 96
             a:1 b:1 c:1 free 96
             a:1 b:1 c:1 free 96
             a:1 b:1 c:1 free 96
             a:1 b:1 c:1 free 96",
        );
        check(
            "4 1 99 9 0",
            "+a 2; +b 2; +c 2; +d 2; step 2; limit 3; step 4",
            "a:1 b:1 c:1 d:1 free 95
             a:1 b:1 c:1 d:1 free 95
             a:1 b:1 c:1 free 95
             d:1 a:1 b:1 free 95
             c:1 d:1 a:1 free 95
             b:1 c:1 d:1 free 95",
        );
    }

    #[test]
    fn the_youngest_is_preempted_and_comes_back_before_anyone_else() {
        // Two prompts of one page each, three pages: both grow, b loses. Then c finds no headroom.
        check(
            "200 99 3 9 0",
            "+a 64; +b 64; step 1; +c 1; step 2; -a; step 2; -b; step 1",
            "a:64 b:64 free 1
             a:1 !free 1
             a:1 free 1
             b:65 free 1
             b:1 free 1
             c:1 free 2",
        );
    }

    #[test]
    fn a_long_prompt_takes_what_pages_there_are() {
        check(
            "512 512 4 9 0",
            "+a 10; step 1; +b 200; step 1; -a; step 2",
            "a:10 free 3
             a:1 free 3
             b:200 free 0
             b:1 free 0",
        );
    }

    #[test]
    fn an_old_prompt_takes_the_pages_of_a_younger_decode_that_was_already_planned() {
        // While a crawls through its prompt, b decodes into its third page; a needs a fourth.
        check(
            "9 1 6 9 0",
            "+a 250; skip 40; +b 2; skip 151; step 3",
            "b:1 a:1 free 0
             a:1 !free 2
             a:1 free 2",
        );
    }

    #[test]
    fn a_sequence_that_ends_while_prefilling_gives_its_pages_back() {
        check(
            "64 64 4 9 0",
            "+a 200; +b 1; step 2; -a; step 1",
            "a:64 free 3
             a:64 free 2
             b:1 free 3",
        );
    }

    #[test]
    fn no_more_run_at_once_than_allowed() {
        check(
            "9 9 9 1 0",
            "+a 1; +b 1; step 2; -a; step 1",
            "a:1 free 8
             a:1 free 8
             b:1 free 8",
        );
    }

    #[test]
    fn pages_behind_the_window_are_given_back_while_running() {
        check(
            "100 100 4 9 64",
            "+a 400; step 6",
            "a:100 free 2
             a:100 free 0
             a:100 free 1
             a:100 free 0
             a:1 free 2
             a:1 free 2",
        );
    }

    #[test]
    fn owners_share_the_rows_for_prompts_and_the_rest_goes_by_arrival() {
        check(
            "40 40 99 9 0",
            "+a 100 1; +b 100 1; +c 10 2; step 3; +d 50 3; step 2",
            "a:20 c:10 b:10 free 96
             c:1 a:39 free 96
             c:1 a:39 free 95
             c:1 a:2 d:37 free 94
             c:1 a:1 b:19 d:13 free 94",
        );
    }

    #[test]
    fn who_has_fewest_running_is_next() {
        check(
            "9 9 9 3 0",
            "+a 1 1; +b 1 1; +c 1 1; +d 1 1; step 1; +e 1 2; -a; step 1; -b; step 1",
            "a:1 b:1 c:1 free 6
             b:1 c:1 e:1 free 6
             c:1 e:1 d:1 free 6",
        );
    }

    #[test]
    fn a_head_that_needs_pages_is_not_overtaken() {
        check(
            "900 900 6 9 0",
            "+a 128 1; step 1; +b 250 2; +c 10 3; step 1; -a; step 1",
            "a:128 free 4
             a:1 free 3
             b:250 c:10 free 1",
        );
    }

    #[test]
    fn who_has_most_running_is_preempted() {
        check(
            "200 99 4 9 0",
            "+a 64 1; +b 64 1; +c 64 2; step 1; step 2",
            "a:64 c:64 b:64 free 1
             a:1 c:1 !free 0
             a:1 c:1 free 0",
        );
    }
}
