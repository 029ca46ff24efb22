//! The scheduler decides which rows the next step computes, and takes the pages for them. It never
//! reads a clock, does I/O, or looks at a token.
//!
//! - Decodes first, the longest not served first; then prompts in progress, then new ones, by arrival.
//! - A step has at most `max_step_rows` rows; a prompt is cut into chunks that fit rows and pages.
//! - When no page is left, the latest arrival gives up its pages and waits again (at its place by
//!   arrival, so before everything younger); its sampled tokens are kept and computed again later.
//! - Nobody overtakes the head of the queue: whatever waits is served in order of arrival.

use std::collections::BTreeSet;

use crate::EngineConfig;
use crate::kv::BlockPool;
use crate::sequence::{Sequence, SequenceKey, Sequences};

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
    waiting: BTreeSet<SequenceKey>,
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
            waiting: BTreeSet::new(),
            turn: 0,
        }
    }

    /// Queues a new sequence; keys only grow.
    pub(crate) fn enqueue(&mut self, key: SequenceKey) {
        self.waiting.insert(key);
    }

    /// Forgets a sequence that ended. Its pages go back when it is dropped.
    pub(crate) fn remove(&mut self, key: SequenceKey) {
        self.running.remove(&key);
        self.waiting.remove(&key);
    }

    pub(crate) const fn running(&self) -> &BTreeSet<SequenceKey> {
        &self.running
    }

    pub(crate) fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Chooses the rows of the next step. Empty only when no sequence could do anything with one.
    pub(crate) fn next_step(&mut self, sequences: &mut Sequences) -> Plan {
        let mut plan = Plan {
            rows_left: self.max_step_rows,
            ..Plan::default()
        };
        for key in self.service_order(sequences) {
            if plan.rows_left == 0 {
                break;
            }
            // A sequence may have been preempted by one before it.
            if self.running.contains(&key) {
                self.continue_running(key, sequences, &mut plan);
            }
        }
        // Who just lost pages comes first again, and there is nothing for it yet.
        if plan.num_preempted == 0 {
            self.admit(sequences, &mut plan);
        }
        guess(sequences, &mut plan);
        for chunk in &plan.chunks {
            self.turn += 1;
            if let Some(sequence) = sequences.get_mut(&chunk.key) {
                sequence.last_turn = self.turn;
            }
        }
        plan
    }

    /// Running sequences: decodes by how long they were not served, then prompts by arrival. Without those that could not
    /// sample yet.
    fn service_order(&self, sequences: &Sequences) -> Vec<SequenceKey> {
        let mut order: Vec<_> = self
            .running
            .iter()
            .filter_map(|key| {
                let sequence = sequences.get(key).filter(|s| !s.awaits_mask)?;
                let is_prompt = sequence.num_remaining() > 1;
                Some((
                    is_prompt,
                    if is_prompt { 0 } else { sequence.last_turn },
                    *key,
                ))
            })
            .collect();
        order.sort_unstable();
        order.into_iter().map(|(_, _, key)| key).collect()
    }

    /// Plans rows of a running sequence; takes pages away from younger ones when there are none.
    fn continue_running(&mut self, key: SequenceKey, sequences: &mut Sequences, plan: &mut Plan) {
        while let Some(sequence) = sequences.get_mut(&key) {
            let wanted = plan.rows_max(sequence, self.max_prefill_chunk);
            let num_rows = sequence.reserve(wanted, self.window);
            if num_rows > 0 {
                plan.push(key, num_rows);
                return;
            }
            let Some(youngest) = self.running.pop_last() else {
                return;
            };
            if let Some(victim) = sequences.get_mut(&youngest) {
                victim.clear_pages();
            }
            self.waiting.insert(youngest);
            plan.remove(youngest);
            plan.num_preempted += 1;
            if youngest == key {
                return;
            }
        }
    }

    /// Starts waiting sequences in order while there are rows, places and pages.
    fn admit(&mut self, sequences: &mut Sequences, plan: &mut Plan) {
        let mut pages_promised = self.pages_promised(sequences);
        while plan.rows_left > 0 && self.running.len() < self.max_running {
            let Some(&key) = self.waiting.first() else {
                return;
            };
            let Some(sequence) = sequences.get_mut(&key) else {
                self.waiting.remove(&key);
                continue;
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
                return;
            }
            let cached_tokens = sequence.num_computed as u32;
            let wanted = plan.rows_max(sequence, self.max_prefill_chunk);
            let num_rows = sequence.reserve(wanted, self.window);
            if num_rows == 0 {
                sequence.clear_pages();
                return;
            }
            sequence.cached_tokens.get_or_insert(cached_tokens);
            pages_promised += sequence.pages_missing(self.window);
            self.waiting.remove(&key);
            self.running.insert(key);
            plan.push(key, num_rows);
        }
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
    /// `+a 100` submits 100 tokens, `-a` ends a sequence, `step 3` plans that many steps and computes
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
                let (name, len) = rest.split_once(' ').unwrap();
                let key = SequenceKey(u64::from(name.as_bytes()[0]));
                let new = NewSequence {
                    id: RequestId::new(name),
                    prompt: vec![0; len.parse().unwrap()],
                    num_resumed: 0,
                    params: SamplingParams::default(),
                    cache_salt: 0,
                };
                sequences.insert(key, Sequence::new(new, &pool));
                scheduler.enqueue(key);
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
}
