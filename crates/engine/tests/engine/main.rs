//! The engine around a toy language model whose logits depend on every visible token, read from its
//! own paged store: a wrong page, position or row gives wrong tokens. The exchange is the real one.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says so at once"
)]

mod constrained;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use proptest::prelude::*;
use tramontane_compute::combine::add_expert_sums;
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, Contributions,
    DType, Error as ComputeError, ExpertJob, ExpertWeights, Experts, HostTensor, KV_PAGE_TOKENS,
    KvFormat, RoutedRows, RowFormat, StepBatch,
};
use tramontane_engine::{
    Engine, EngineConfig, FailureKind, NewSequence, SequenceEvent, SubmitError,
};
use tramontane_exchange::{
    Error as ExchangeError, Exchange, ExchangeConfig, ExpertExchange, LocalTransport, Ticket,
};
use tramontane_types::{
    Epoch, ExpertId, ExpertSlice, FinishReason, LayerId, ModelGeometry, PageId, Placement,
    RequestId, SamplingParams, SegmentRange, SliceHolders, TokenId, TokenOutput, Usage, WorkerId,
};

const VOCAB: usize = 48;
const HIDDEN: usize = 4;
const EOS: TokenId = 2;
/// A token whose logits are not numbers.
const POISON: TokenId = 47;
/// No scenario takes more steps.
const STEPS_MAX: usize = 20_000;

fn geometry(window: Option<usize>) -> ModelGeometry {
    ModelGeometry {
        hidden: HIDDEN,
        num_layers: 2,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 4,
        ff: 96,
        num_experts: 5,
        top_k: 2,
        vocab: VOCAB,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: window,
        max_positions: 1024,
    }
}

/// One round of splitmix64 over two words.
fn mix(a: u64, b: u64) -> u64 {
    let mut z = (a ^ b.rotate_left(29)).wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The expert's answer to one row.
fn expert_output(layer: LayerId, expert: ExpertId, row: &[u8]) -> [f32; HIDDEN] {
    let seed = row
        .iter()
        .fold(u64::from(layer.0), |h, &byte| mix(h, u64::from(byte)));
    std::array::from_fn(|i| unit(mix(mix(seed, u64::from(expert.0)), i as u64)))
}

/// A number in `[0, 1)`.
fn unit(hash: u64) -> f32 {
    (hash >> 40) as f32 / (1_u32 << 24) as f32
}

/// The row that a state sends, its experts and their weights.
fn route(state: u64) -> ([u8; HIDDEN * 4], [ExpertId; 2], [f32; 2]) {
    let mut row = [0; HIDDEN * 4];
    for (i, bytes) in row.chunks_exact_mut(4).enumerate() {
        bytes.copy_from_slice(&unit(mix(state, i as u64)).to_le_bytes());
    }
    let first = (state % 4) as u16;
    let second = first + 1 + ((state >> 8) % u64::from(4 - first)) as u16;
    let weight = unit(mix(state, 99));
    (
        row,
        [ExpertId(first), ExpertId(second)],
        [weight, 1.0 - weight],
    )
}

fn absorb(state: u64, residual: &[f32]) -> u64 {
    residual
        .iter()
        .fold(state, |h, x| mix(h, u64::from(x.to_bits())))
}

/// The model never says `POISON` itself.
fn logits_of(state: u64) -> impl Iterator<Item = f32> {
    let logit = move |id| unit(mix(state, u64::from(id) + 1000)) * 6.0;
    (0..VOCAB as TokenId).map(move |id| {
        if id == POISON {
            f32::NEG_INFINITY
        } else {
            logit(id)
        }
    })
}

#[derive(Debug)]
struct ToyAttention {
    window: usize,
    /// Per layer, per token of every page.
    store: Vec<Vec<u64>>,
    states: Vec<u64>,
    poisoned: Vec<bool>,
    /// Steps that were computed whole; `None`: it cannot.
    whole_steps: Option<Arc<AtomicU32>>,
}

impl ToyAttention {
    fn new(num_pages: usize, window: Option<usize>) -> Self {
        Self {
            window: window.unwrap_or(usize::MAX),
            store: vec![vec![0xDEAD; num_pages * KV_PAGE_TOKENS]; 2],
            states: Vec::new(),
            poisoned: Vec::new(),
            whole_steps: None,
        }
    }
}

fn slot(block_table: &[PageId], position: usize) -> usize {
    let page = block_table[position / KV_PAGE_TOKENS];
    assert_ne!(page, PageId::RELEASED, "position {position} is visible");
    page.0 as usize * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS
}

impl Attention for ToyAttention {
    fn begin(&mut self, batch: &StepBatch) -> Result<(), ComputeError> {
        assert!(batch.num_rows() > 0 && batch.num_rows() == batch.positions.len());
        let mut written = BTreeSet::new();
        let mut next_row = 0;
        for span in &batch.sequences {
            assert_eq!(span.row_begin, next_row, "rows are covered without gaps");
            next_row += span.num_rows;
            for row in span.row_begin..next_row {
                let position = batch.positions[row as usize] as usize;
                assert!(
                    written.insert(slot(&span.block_table, position)),
                    "written twice"
                );
            }
        }
        assert_eq!(next_row as usize, batch.num_rows());
        let rows = batch.tokens.iter().zip(&batch.positions);
        self.states = rows
            .map(|(&t, &p)| mix(u64::from(t), u64::from(p)))
            .collect();
        self.poisoned = batch.tokens.iter().map(|&t| t == POISON).collect();
        Ok(())
    }

    fn attend(
        &mut self,
        layer: LayerId,
        batch: &StepBatch,
        routed: &mut RoutedRows,
    ) -> Result<(), ComputeError> {
        let store = &mut self.store[usize::from(layer.0)];
        *routed = RoutedRows {
            num_rows: batch.num_rows(),
            ..RoutedRows::default()
        };
        for span in &batch.sequences {
            let rows = span.row_begin as usize..(span.row_begin + span.num_rows) as usize;
            for row in rows.clone() {
                let position = batch.positions[row] as usize;
                store[slot(&span.block_table, position)] = self.states[row];
            }
            for row in rows {
                let end = batch.positions[row] as usize + 1;
                let visible = end.saturating_sub(self.window)..end;
                let seen = visible.fold(0, |h, p| mix(h, store[slot(&span.block_table, p)]));
                self.states[row] = mix(self.states[row], seen);
                let (bytes, experts, weights) = route(self.states[row]);
                routed.rows.extend(bytes);
                routed.topk_ids.extend(experts);
                routed.topk_weights.extend(weights);
            }
        }
        Ok(())
    }

    fn combine(
        &mut self,
        _: LayerId,
        contributions: &Contributions<'_>,
    ) -> Result<(), ComputeError> {
        let mut residual = vec![0.0; self.states.len() * HIDDEN];
        add_expert_sums(&mut residual, HIDDEN, contributions)?;
        for (state, row) in self.states.iter_mut().zip(residual.chunks_exact(HIDDEN)) {
            *state = absorb(*state, row);
        }
        Ok(())
    }

    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), ComputeError> {
        out.clear();
        for &row in &batch.logits_rows {
            let begin = out.len();
            out.extend(logits_of(self.states[row as usize]));
            if self.poisoned[row as usize] {
                out[begin + 3] = f32::NAN;
            }
        }
        Ok(())
    }

    fn step(
        &mut self,
        batch: &StepBatch,
        experts: &dyn Experts,
        logits: &mut Vec<f32>,
    ) -> Result<bool, ComputeError> {
        let Some(count) = &self.whole_steps else {
            return Ok(false);
        };
        count.fetch_add(1, Ordering::Relaxed);
        assert_eq!(experts.held(LayerId(0), ExpertId(0)), 0xff);
        self.begin(batch)?;
        for layer in (0..2).map(LayerId) {
            self.attend(layer, batch, &mut RoutedRows::default())?;
            for state in &mut self.states {
                let (row, experts, weights) = route(*state);
                let mut residual = [0.0_f32; HIDDEN];
                for (expert, weight) in experts.into_iter().zip(weights) {
                    for (r, y) in residual.iter_mut().zip(expert_output(layer, expert, &row)) {
                        *r += weight * y;
                    }
                }
                *state = absorb(*state, &residual);
            }
        }
        self.logits(batch, logits)?;
        Ok(true)
    }
}

#[derive(Debug)]
struct ToyExperts;

impl Experts for ToyExperts {
    fn load(&self, _: ExpertSlice, _: &ExpertWeights<'_>) -> Result<(), ComputeError> {
        Ok(())
    }

    fn unload(&self, _: ExpertSlice) {}

    fn held(&self, _: LayerId, _: ExpertId) -> u8 {
        0xff
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), ComputeError> {
        assert_eq!(rows.len(), num_rows * HIDDEN * 4);
        out.clear();
        for job in jobs {
            assert_eq!(job.range.num_nodes(3), 1, "one worker holds whole experts");
            for &row in job.row_ids {
                let begin = row as usize * HIDDEN * 4;
                out.extend(expert_output(
                    layer,
                    job.expert,
                    &rows[begin..begin + HIDDEN * 4],
                ));
            }
        }
        Ok(())
    }
}

/// The real exchange, which misses its deadline in the n-th layer from now when it is told to.
#[derive(Debug)]
struct FlakyExchange {
    inner: ExpertExchange,
    fail_in: Arc<AtomicU32>,
}

impl Exchange for FlakyExchange {
    fn dispatch(&mut self, layer: LayerId, routed: &RoutedRows) -> Result<Ticket, ExchangeError> {
        self.inner.dispatch(layer, routed)
    }

    fn combine(
        &mut self,
        ticket: Ticket,
        add: &mut dyn FnMut(&Contributions<'_>) -> Result<(), ComputeError>,
    ) -> Result<(), ExchangeError> {
        let count_down = |n: u32| n.checked_sub(1);
        let left = self
            .fail_in
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count_down);
        self.inner.combine(ticket, add)?;
        if left == Ok(1) {
            return Err(ExchangeError::Deadline {
                layer: LayerId(0),
                waited: Duration::from_secs(1),
                slices: Vec::new(),
                workers: Vec::new(),
                last: None,
            });
        }
        Ok(())
    }

    fn whole_model(&mut self) -> Option<Arc<dyn Experts>> {
        self.inner.whole_model()
    }
}

/// One worker that holds everything.
fn placement(geometry: &ModelGeometry, worker: WorkerId) -> Placement {
    let whole = SliceHolders {
        range: SegmentRange::WHOLE,
        holders: vec![0],
    };
    Placement {
        epoch: Epoch(1),
        numeric_class: "toy".to_owned(),
        model: "toy".to_owned(),
        num_layers: geometry.num_layers,
        num_experts: geometry.num_experts,
        workers: vec![worker],
        experts: vec![vec![whole]; geometry.num_layers * geometry.num_experts],
    }
}

/// What one sequence said.
#[derive(Clone, Debug, Default, PartialEq)]
struct Heard {
    cached_tokens: Option<u32>,
    prompt: Vec<TokenOutput>,
    tokens: Vec<TokenOutput>,
    finished: Option<(FinishReason, Usage)>,
    failed: Option<(String, FailureKind)>,
}

impl Heard {
    fn ids(&self) -> Vec<TokenId> {
        self.tokens.iter().map(|t| t.id).collect()
    }

    /// What must not depend on anything but the request.
    fn said(&self) -> (&[TokenOutput], Option<FinishReason>, Option<u32>) {
        let finished = self.finished.as_ref();
        let completion = finished.map(|(_, usage)| usage.completion_tokens);
        (
            &self.tokens,
            finished.map(|(reason, _)| *reason),
            completion,
        )
    }
}

struct Bench {
    engine: Engine,
    heard: BTreeMap<RequestId, Heard>,
    fail_in: Arc<AtomicU32>,
    num_errors: usize,
}

impl Bench {
    fn new(config: EngineConfig, window: Option<usize>) -> Self {
        let attention = Box::new(ToyAttention::new(config.num_pages, window));
        Self::around(config, geometry(window), attention, Arc::new(ToyExperts))
    }

    /// An engine on one worker that holds all experts; rows travel as f32.
    fn around(
        config: EngineConfig,
        geometry: ModelGeometry,
        attention: Box<dyn Attention>,
        experts: Arc<dyn Experts>,
    ) -> Self {
        let worker = WorkerId::new("w");
        let placement = ArcSwapOption::from_pointee(placement(&geometry, worker.clone()));
        let exchange = ExpertExchange::new(
            ExchangeConfig::new(worker, geometry.clone(), RowFormat::F32),
            Some(experts),
            Arc::new(placement),
            Arc::new(LocalTransport::new()),
        );
        let fail_in = Arc::new(AtomicU32::new(0));
        let exchange = Box::new(FlakyExchange {
            inner: exchange,
            fail_in: Arc::clone(&fail_in),
        });
        let engine = Engine::new(config, geometry, attention, exchange).unwrap();
        Self {
            engine,
            heard: BTreeMap::new(),
            fail_in,
            num_errors: 0,
        }
    }

    fn submit(&mut self, new: &NewSequence) {
        self.submits(new).unwrap();
    }

    fn submits(&mut self, new: &NewSequence) -> Result<(), SubmitError> {
        if new.params.constraint.is_none() {
            return self.engine.submit(new.clone());
        }
        let matcher = constrained::matcher(new).unwrap();
        let held = self.engine.matcher_room().hold(matcher)?;
        self.engine.submit_constrained(new.clone(), held)
    }

    fn has_ended(&self, new: &NewSequence) -> bool {
        let heard = self.heard.get(&new.id);
        heard.is_some_and(|h| h.finished.is_some() || h.failed.is_some())
    }

    /// Steps until something is so.
    fn run_until(&mut self, mut is_so: impl FnMut(&mut Self) -> bool) {
        for _ in 0..STEPS_MAX {
            if is_so(self) {
                return;
            }
            self.step();
        }
        panic!("not so after {STEPS_MAX} steps");
    }

    fn step(&mut self) {
        let mut events = Vec::new();
        self.num_errors += usize::from(self.engine.step(&mut events).is_err());
        self.engine.check_integrity().unwrap();
        self.hear(events);
    }

    fn hear(&mut self, events: Vec<(RequestId, SequenceEvent)>) {
        for (id, event) in events {
            let heard = self.heard.entry(id).or_default();
            assert!(
                heard.finished.is_none() && heard.failed.is_none(),
                "silent after its end"
            );
            match event {
                SequenceEvent::Started { cached_tokens } => {
                    assert!(heard.tokens.is_empty());
                    assert_eq!(heard.cached_tokens.replace(cached_tokens), None);
                }
                SequenceEvent::PromptTokens(tokens) => {
                    assert!(heard.tokens.is_empty());
                    heard.prompt.extend(tokens);
                }
                SequenceEvent::Token(token) => heard.tokens.push(token),
                SequenceEvent::Finished { reason, usage } => heard.finished = Some((reason, usage)),
                SequenceEvent::Failed { message, kind } => {
                    heard.failed = Some((message, kind));
                }
            }
        }
    }

    fn run(&mut self) {
        for _ in 0..STEPS_MAX {
            if !self.engine.has_work() {
                let stats = self.engine.stats();
                assert_eq!(stats.pages_free, stats.pages_total);
                return;
            }
            self.step();
        }
        panic!(
            "still busy after {STEPS_MAX} steps: {:?}",
            self.engine.stats()
        );
    }

    fn of(&self, new: &NewSequence) -> &Heard {
        &self.heard[&new.id]
    }
}

fn config() -> EngineConfig {
    EngineConfig {
        num_pages: 64,
        max_prefill_chunk: 512,
        prefix_cache: false,
        eos_ids: vec![EOS],
        ..EngineConfig::default()
    }
}

fn request(name: &str, prompt: Vec<TokenId>, params: SamplingParams) -> NewSequence {
    NewSequence {
        id: RequestId::new(name),
        prompt,
        num_resumed: 0,
        params,
        cache_salt: 0,
    }
}

fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens,
        ..SamplingParams::default()
    }
}

fn prompt(seed: u64, len: usize) -> Vec<TokenId> {
    (0..len as u64)
        .map(|i| 3 + (mix(seed, i) % 40) as TokenId)
        .collect()
}

/// Sixteen requests: every third begins like the others of its kind, and each samples in its own way.
fn requests() -> Vec<NewSequence> {
    (0..16_u64)
        .map(|i| {
            let len = [1, 5, 63, 64, 65, 128, 190, 20][i as usize % 8] + i as usize;
            let mut tokens = prompt(i, len);
            if i % 3 == 0 {
                tokens.splice(..0, prompt(777, 130));
            }
            let mut params = greedy(4 + (i as u32 * 7) % 40);
            match i % 4 {
                0 => {}
                1 => (params.temperature, params.seed, params.top_k) = (0.9, i, 8),
                2 => {
                    (params.temperature, params.seed, params.top_p) = (1.3, i << 40, 0.8);
                    (params.repetition_penalty, params.frequency_penalty) = (1.3, 0.7);
                    params.min_tokens = 3;
                }
                _ => (params.temperature, params.min_p, params.logprobs) = (1.0, 0.2, Some(3)),
            }
            params.ignore_eos = i % 5 == 0;
            request(&format!("r{i:02}"), tokens, params)
        })
        .collect()
}

/// What a request says when nothing else is there and nothing is cut or cached.
fn alone(new: &NewSequence, window: Option<usize>) -> Heard {
    let mut bench = Bench::new(config(), window);
    bench.submit(new);
    bench.run();
    bench.of(new).clone()
}

/// The greedy continuation, computed from scratch for every token, without pages or batches.
fn by_hand(prompt: &[TokenId], num_tokens: usize, window: Option<usize>) -> Vec<TokenId> {
    let mut tokens = prompt.to_vec();
    for _ in 0..num_tokens {
        let rows = tokens.iter().zip(0_u64..);
        let mut states: Vec<u64> = rows.map(|(&t, p)| mix(u64::from(t), p)).collect();
        for layer in (0..2).map(LayerId) {
            let stored = states.clone();
            for (p, state) in states.iter_mut().enumerate() {
                let begin = (p + 1).saturating_sub(window.unwrap_or(usize::MAX));
                let seen = stored[begin..=p].iter().fold(0, |h, &s| mix(h, s));
                *state = mix(*state, seen);
                let (row, experts, weights) = route(*state);
                let mut residual = [0.0_f32; HIDDEN];
                for (expert, weight) in experts.into_iter().zip(weights) {
                    for (r, y) in residual.iter_mut().zip(expert_output(layer, expert, &row)) {
                        *r += weight * y;
                    }
                }
                *state = absorb(*state, &residual);
            }
        }
        let logits: Vec<f32> = logits_of(states[tokens.len() - 1]).collect();
        let best = (0..VOCAB)
            .rev()
            .max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
            .unwrap();
        tokens.push(best as TokenId);
    }
    tokens.split_off(prompt.len())
}

#[test]
fn the_tokens_are_those_of_the_model() {
    for window in [None, Some(50)] {
        for len in [1, 64, 150] {
            let params = SamplingParams {
                ignore_eos: true,
                ..greedy(30)
            };
            let new = request("a", prompt(9, len), params);
            let expected = by_hand(&new.prompt, 30, window);
            assert_eq!(
                alone(&new, window).ids(),
                expected,
                "window {window:?}, prompt of {len}"
            );
        }
    }
}

/// Ways to run the same requests.
fn variants() -> [(&'static str, EngineConfig); 9] {
    let base = config();
    [
        ("together", base.clone()),
        (
            "chunks of 7",
            EngineConfig {
                max_prefill_chunk: 7,
                ..base.clone()
            },
        ),
        (
            "one row a step",
            EngineConfig {
                max_step_rows: 1,
                ..base.clone()
            },
        ),
        (
            "13 rows, 5 running",
            EngineConfig {
                max_step_rows: 13,
                max_running: 5,
                ..base.clone()
            },
        ),
        (
            "prefix cache",
            EngineConfig {
                prefix_cache: true,
                ..base.clone()
            },
        ),
        (
            "few pages",
            EngineConfig {
                num_pages: 7,
                ..base.clone()
            },
        ),
        (
            "few pages, cached",
            EngineConfig {
                num_pages: 7,
                prefix_cache: true,
                ..base.clone()
            },
        ),
        (
            "guesses",
            EngineConfig {
                lookup_tokens: 8,
                ..base.clone()
            },
        ),
        (
            "guesses, few pages, cached",
            EngineConfig {
                num_pages: 7,
                prefix_cache: true,
                lookup_tokens: 8,
                ..base
            },
        ),
    ]
}

#[test]
fn nobody_notices_batches_chunks_or_caches() {
    let all = requests();
    for window in [None, Some(40), Some(64), Some(100)] {
        let expected: Vec<Heard> = all.iter().map(|new| alone(new, window)).collect();
        for (name, config) in &variants() {
            let mut bench = Bench::new(config.clone(), window);
            for new in &all {
                bench.submit(new);
                if *name != "together" {
                    bench.step();
                }
            }
            bench.run();
            for (new, expected) in all.iter().zip(&expected) {
                let got = bench.of(new);
                assert_eq!(
                    got.said(),
                    expected.said(),
                    "{}, {name}, window {window:?}",
                    new.id
                );
            }
            let stats = bench.engine.stats();
            if config.prefix_cache && config.num_pages > 7 {
                assert!(
                    stats.prefix_hit_tokens >= 128,
                    "{name} found nothing: {stats:?}"
                );
            }
        }
    }
}

/// Sixteen requests that can say two words: their last three tokens have always stood there before.
fn two_words() -> Vec<NewSequence> {
    let mut all = requests();
    for new in &mut all {
        new.params.logit_bias = vec![(5, 90.0), (6, 90.0)];
        (new.params.top_k, new.params.max_tokens) = (2, 40);
        (new.params.repetition_penalty, new.params.frequency_penalty) = (1.0, 0.0);
    }
    all
}

#[test]
fn nobody_notices_guesses() {
    let all = two_words();
    for window in [None, Some(40)] {
        let expected: Vec<Heard> = all.iter().map(|new| alone(new, window)).collect();
        for (name, config) in variants() {
            let config = EngineConfig {
                lookup_tokens: 8,
                ..config
            };
            let one_by_one = config.max_step_rows == 1;
            let mut bench = Bench::new(config, window);
            for new in &all {
                bench.submit(new);
                bench.step();
            }
            bench.run();
            for (new, expected) in all.iter().zip(&expected) {
                let got = bench.of(new);
                assert_eq!(got.said(), expected.said(), "{}, {name}", new.id);
            }
            let stats = bench.engine.stats();
            assert!(
                (stats.guesses_true > 20) != one_by_one,
                "{name}, window {window:?}: {stats:?}"
            );
            assert!(stats.guesses_true <= stats.tokens_guessed);
        }
    }
}

#[test]
fn pages_that_rejected_guesses_wrote_are_as_good_as_others() {
    let limits = EngineConfig {
        lookup_tokens: 8,
        prefix_cache: true,
        num_pages: 128,
        ..config()
    };
    let all = two_words();
    let mut bench = Bench::new(limits, None);
    for new in &all {
        bench.submit(new);
        bench.step();
    }
    bench.run();
    let stats = bench.engine.stats();
    assert!(stats.guesses_true < stats.tokens_guessed, "{stats:?}");
    // Prompt and output, of whose pages some begin in the output.
    let mut num_adopted = 0;
    for new in &all {
        let name = format!("again-{}", new.id);
        let whole = [&new.prompt[..], &bench.of(new).ids()].concat();
        let again = request(&name, whole, greedy(5));
        bench.submit(&again);
        bench.run();
        assert_eq!(
            bench.of(&again).said(),
            alone(&again, None).said(),
            "{name}"
        );
        let cached = bench.of(&again).cached_tokens.unwrap() as usize;
        num_adopted += usize::from(cached > new.prompt.len());
    }
    assert!(num_adopted >= 4, "{num_adopted}");
}

#[test]
fn a_sequence_that_guesses_ends_where_it_must() {
    let mut new = request("a", prompt(3, 60), greedy(50));
    new.params.logit_bias = vec![(5, 90.0), (6, 90.0)];
    let guesses = EngineConfig {
        lookup_tokens: 32,
        ..config()
    };
    let limits = EngineConfig {
        num_pages: 1,
        ..guesses.clone()
    };
    let mut bench = Bench::new(limits, None);
    bench.submit(&new);
    bench.run();
    let (reason, usage) = bench.of(&new).finished.unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 4));
    // A stop id ends it also in the midst of guesses that come true: the next of these five words is the best that may follow.
    let mut round = request("round", [5, 6, 7, 8, 9].repeat(12), greedy(50));
    round.params.logit_bias = vec![(5, 100.0), (6, 90.0), (7, 80.0)];
    round.params.bad_words = vec![vec![5, 5], vec![6, 5], vec![6, 6]];
    round.params.stop_ids = vec![7];
    let mut bench = Bench::new(guesses, None);
    bench.submit(&round);
    bench.run();
    let heard = bench.of(&round);
    assert_eq!(heard.ids(), [5, 6, 7]);
    assert_eq!(heard.said(), alone(&round, None).said());
    assert_eq!(heard.finished.unwrap().0, FinishReason::Stop);
    // All were guessed at once, with two words behind the stop id.
    let stats = bench.engine.stats();
    assert_eq!((stats.steps, stats.tokens_guessed), (1, 5));
    assert_eq!(stats.guesses_true, 2);
}

#[test]
fn the_prompt_is_reported_as_if_it_had_been_sampled() {
    let params = SamplingParams {
        logprobs: Some(2),
        prompt_logprobs: Some(2),
        ..greedy(3)
    };
    let new = request("a", prompt(5, 150), params.clone());
    let whole = alone(&new, None);
    assert_eq!(whole.prompt.len(), 149);
    for (i, reported) in whole.prompt.iter().enumerate() {
        let position = i + 1;
        assert_eq!(
            (reported.index as usize, reported.id),
            (position, new.prompt[position])
        );
        // The model's own answer to the tokens before it.
        let mut cut = request("cut", new.prompt[..position].to_vec(), params.clone());
        cut.params.logit_bias = vec![(reported.id, 100.0)];
        let sampled = alone(&cut, None).tokens.swap_remove(0);
        assert_eq!(
            (sampled.id, sampled.logprob, sampled.top_logprobs),
            (reported.id, reported.logprob, reported.top_logprobs.clone()),
            "position {position}"
        );
    }
    // Cut, cached, preempted or resumed: each token of the prompt is told once.
    for (name, config) in variants() {
        let mut bench = Bench::new(config, None);
        let others: Vec<_> = (0..4)
            .map(|i| {
                let id = RequestId::new(&format!("b{i}"));
                NewSequence { id, ..new.clone() }
            })
            .collect();
        for other in &others {
            bench.submit(other);
        }
        bench.run();
        for other in &others {
            assert_eq!(bench.of(other).prompt, whole.prompt, "{name}");
            assert_eq!(bench.of(other).said(), whole.said(), "{name}");
        }
    }
    let mut resumed = new;
    resumed.prompt.push(whole.tokens[0].id);
    resumed.num_resumed = 1;
    let resumed = alone(&resumed, None);
    assert_eq!(resumed.prompt, whole.prompt);
    assert_eq!(resumed.tokens, whole.tokens[1..]);
}

#[test]
fn a_step_that_the_backend_computes_whole_is_the_same() {
    let all = requests();
    let config = config();
    let count = Arc::new(AtomicU32::new(0));
    let attention = ToyAttention {
        whole_steps: Some(Arc::clone(&count)),
        ..ToyAttention::new(config.num_pages, None)
    };
    let experts = Arc::new(ToyExperts);
    let mut bench = Bench::around(config, geometry(None), Box::new(attention), experts);
    // The next exchange would fail: there is none.
    bench.fail_in.store(1, Ordering::Relaxed);
    for new in &all {
        bench.submit(new);
    }
    bench.run();
    assert_eq!(bench.num_errors, 0);
    assert!(count.load(Ordering::Relaxed) > 0);
    for new in &all {
        assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
    }
}

#[test]
fn nobody_notices_preemption() {
    let long = |i: u64| {
        let params = SamplingParams {
            seed: i,
            ignore_eos: true,
            max_tokens: 200,
            frequency_penalty: 0.1,
            ..SamplingParams::default()
        };
        request(&format!("long{i}"), prompt(i, 20 + i as usize), params)
    };
    let all: Vec<_> = (0..5).map(long).collect();
    for (window, prefix_cache) in [(None, false), (None, true), (Some(120), true)] {
        let limits = EngineConfig {
            num_pages: 6,
            prefix_cache,
            ..config()
        };
        let mut bench = Bench::new(limits, window);
        for new in &all {
            bench.submit(new);
        }
        bench.run();
        for new in &all {
            assert_eq!(
                bench.of(new).said(),
                alone(new, window).said(),
                "{}",
                new.id
            );
        }
        let stats = bench.engine.stats();
        assert!(stats.preemptions > 0, "window {window:?}: {stats:?}");
        assert!(
            stats.rows > all.len() as u64 * 200,
            "what was preempted is computed again"
        );
        assert_eq!((stats.tokens_sampled, stats.prompt_tokens), (1000, 110));
    }
}

#[test]
fn a_prompt_is_found_again_but_for_its_last_token_and_not_under_another_salt() {
    let mut bench = Bench::new(
        EngineConfig {
            prefix_cache: true,
            ..config()
        },
        None,
    );
    let first = request("first", prompt(1, 192), greedy(5));
    let again = NewSequence {
        id: RequestId::new("again"),
        ..first.clone()
    };
    let longer = request(
        "longer",
        [&first.prompt[..], &[7, 8, 9]].concat(),
        greedy(5),
    );
    let stranger = NewSequence {
        id: RequestId::new("stranger"),
        cache_salt: 1,
        ..first.clone()
    };
    for new in [&first, &again, &longer, &stranger] {
        bench.submit(new);
        bench.run();
    }
    let cached = |new| bench.of(new).cached_tokens.unwrap();
    assert_eq!(
        [&first, &again, &longer, &stranger].map(cached),
        [0, 128, 192, 0]
    );
    assert_eq!(bench.of(&again).finished.unwrap().1.cached_tokens, 128);
    assert_eq!(bench.of(&again).tokens, bench.of(&first).tokens);
    assert_eq!(bench.of(&stranger).tokens, bench.of(&first).tokens);
    let stats = bench.engine.stats();
    assert_eq!(
        (stats.prefix_query_tokens, stats.prefix_hit_tokens),
        (192 * 3 + 195, 320)
    );
    assert!(stats.pages_cached > 0);
}

#[test]
fn an_aborted_sequence_is_gone_at_once_and_the_others_go_on() {
    let all = requests();
    let mut bench = Bench::new(
        EngineConfig {
            max_prefill_chunk: 16,
            ..config()
        },
        None,
    );
    let new = request("only", prompt(4, 300), greedy(9));
    bench.submit(&new);
    bench.step();
    assert!(bench.engine.stats().pages_free < 64);
    assert!(bench.engine.abort(&new.id), "while its prompt is computed");
    assert_eq!(bench.engine.stats().pages_free, 64);
    assert!(!bench.engine.has_work() && !bench.engine.abort(&new.id));
    for new in &all {
        bench.submit(new);
    }
    for i in [12, 3, 7] {
        bench.step();
        assert!(bench.engine.abort(&all[i].id));
    }
    bench.run();
    for (i, new) in all.iter().enumerate() {
        if ![3, 7, 12].contains(&i) {
            assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
        }
    }
}

#[test]
fn a_step_that_was_not_exchanged_is_simply_tried_again() {
    let all = requests();
    for prefix_cache in [false, true] {
        let mut bench = Bench::new(
            EngineConfig {
                prefix_cache,
                ..config()
            },
            Some(70),
        );
        for (i, new) in all.iter().enumerate() {
            bench.submit(new);
            bench.fail_in.store(1 + i as u32 % 2, Ordering::Relaxed);
            bench.step();
            bench.step();
        }
        bench.run();
        assert_eq!(bench.num_errors, all.len());
        for new in &all {
            assert_eq!(
                bench.of(new).said(),
                alone(new, Some(70)).said(),
                "{}",
                new.id
            );
        }
        assert_eq!(bench.engine.stats().steps_failed, all.len() as u64);
    }
}

#[test]
fn after_too_many_attempts_the_sequences_of_the_step_are_handed_back() {
    let mut bench = Bench::new(
        EngineConfig {
            max_running: 1,
            ..config()
        },
        None,
    );
    let (first, second) = (
        request("a", prompt(1, 9), greedy(5)),
        request("b", prompt(2, 9), greedy(5)),
    );
    bench.submit(&first);
    bench.submit(&second);
    for expected in [1, 2, 2] {
        bench.fail_in.store(2, Ordering::Relaxed);
        bench.step();
        assert_eq!(bench.num_errors, expected);
    }
    let (message, kind) = bench.of(&first).failed.clone().unwrap();
    assert_eq!(kind, FailureKind::Step);
    assert!(message.contains("layer 1"), "{message}");
    bench.run();
    assert_eq!(bench.of(&second).said(), alone(&second, None).said());
}

#[test]
fn all_running_sequences_can_be_handed_back() {
    let mut bench = Bench::new(
        EngineConfig {
            max_running: 2,
            ..config()
        },
        None,
    );
    let all = requests();
    for new in &all[..3] {
        bench.submit(new);
    }
    bench.step();
    let mut events = Vec::new();
    bench.engine.fail_running("device lost", &mut events);
    bench.hear(events);
    for new in &all[..2] {
        let lost = ("device lost".to_owned(), FailureKind::Step);
        assert_eq!(bench.of(new).failed, Some(lost));
    }
    bench.run();
    assert_eq!(bench.of(&all[2]).said(), alone(&all[2], None).said());
}

/// What [`requests`] leave out and a replay could get wrong.
fn requests_with_state() -> Vec<NewSequence> {
    let sampled = |seed| SamplingParams {
        temperature: 1.0,
        seed,
        max_tokens: 24,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let table = [
        SamplingParams {
            presence_penalty: 1.5,
            ..sampled(1)
        },
        SamplingParams {
            frequency_penalty: -1.5,
            presence_penalty: -0.5,
            repetition_penalty: 0.8,
            ..sampled(2)
        },
        SamplingParams {
            logit_bias: vec![(5, 4.0), (6, -100.0), (7, 2.5)],
            logprobs: Some(2),
            ..sampled(3)
        },
        SamplingParams {
            stop_ids: (3..15).collect(),
            min_tokens: 9,
            ..sampled(4)
        },
        SamplingParams {
            repetition_penalty: 1.4,
            ..greedy(24)
        },
    ];
    let request = |(i, params): (usize, SamplingParams)| {
        request(&format!("s{i}"), prompt(i as u64, 60 + i), params)
    };
    table.into_iter().enumerate().map(request).collect()
}

#[test]
fn a_resumed_sequence_goes_on_where_it_was_lost() {
    for new in requests().into_iter().chain(requests_with_state()) {
        let expected = alone(&new, None);
        let (reason, usage) = expected.finished.unwrap();
        for num_resumed in 0..=expected.tokens.len() {
            let mut resumed = NewSequence {
                num_resumed,
                ..new.clone()
            };
            resumed.prompt.extend(&expected.ids()[..num_resumed]);
            let got = alone(&resumed, None);
            assert_eq!(got.tokens, expected.tokens[num_resumed..], "{}", new.id);
            assert_eq!(got.finished, Some((reason, usage)), "{}", new.id);
        }
    }
}

#[test]
fn a_sequence_ends_where_its_request_says() {
    let free = SamplingParams {
        ignore_eos: true,
        ..greedy(40)
    };
    let new = request("a", prompt(5, 10), free.clone());
    let ids = alone(&new, None).ids();
    assert_eq!(ids.len(), 40);
    let ended = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = free.clone();
        change(&mut params);
        let heard = alone(&request("a", new.prompt.clone(), params), None);
        let (reason, usage) = heard.finished.unwrap();
        assert_eq!(usage.completion_tokens as usize, heard.tokens.len());
        assert_eq!(usage.prompt_tokens, 10);
        (heard.ids(), reason)
    };
    // The stop id itself is the last token that is reported.
    let stop = ids[6];
    let first = ids.iter().position(|&id| id == stop).unwrap();
    let until_stop = (ids[..=first].to_vec(), FinishReason::Stop);
    assert_eq!(ended(&|p| p.stop_ids = vec![stop]), until_stop);
    assert_eq!(
        ended(&|p| p.max_tokens = 3),
        (ids[..3].to_vec(), FinishReason::Length)
    );
    // The end of sequence ends it, unless ignored.
    let eos = |ignore_eos| {
        let eos_ids = vec![stop];
        let mut bench = Bench::new(
            EngineConfig {
                eos_ids,
                ..config()
            },
            None,
        );
        let params = SamplingParams {
            ignore_eos,
            ..free.clone()
        };
        bench.submit(&request("a", new.prompt.clone(), params));
        bench.run();
        let heard = bench.of(&new);
        (heard.ids(), heard.finished.unwrap().0)
    };
    assert_eq!(eos(false), until_stop);
    assert_eq!(eos(true), (ids, FinishReason::Length));
    // The model's context is full.
    let heard = alone(&request("b", prompt(5, 1020), free), None);
    assert_eq!(
        (heard.tokens.len(), heard.finished.unwrap().0),
        (4, FinishReason::Length)
    );
}

#[test]
fn what_can_never_run_is_refused_at_the_door() {
    let config = EngineConfig {
        num_pages: 2,
        max_waiting: 2,
        ..config()
    };
    let mut bench = Bench::new(config.clone(), None);
    let mut refused = |new: NewSequence| bench.engine.submit(new).unwrap_err();
    let good = request("good", prompt(1, 10), greedy(4));
    assert_eq!(
        refused(request("a", vec![], greedy(1))),
        SubmitError::EmptyPrompt
    );
    assert_eq!(
        refused(NewSequence {
            num_resumed: 10,
            ..good.clone()
        }),
        SubmitError::ResumedTooMany {
            num_resumed: 10,
            tokens: 10
        }
    );
    assert_eq!(
        refused(request("a", vec![48], greedy(1))),
        SubmitError::TokenOutOfRange { id: 48, vocab: 48 }
    );
    assert_eq!(
        refused(request("a", prompt(1, 1024), greedy(1))),
        SubmitError::TooLong {
            tokens: 1024,
            limit: 1023
        }
    );
    assert_eq!(
        refused(request("a", prompt(1, 128), greedy(1))),
        SubmitError::NeverFits { pages: 3, limit: 2 }
    );
    assert!(matches!(
        refused(request("a", vec![1], greedy(0))),
        SubmitError::InvalidSampling(_)
    ));
    bench.submit(&good);
    let duplicate = bench.engine.submit(good.clone()).unwrap_err();
    assert_eq!(duplicate, SubmitError::Duplicate { id: good.id });
    bench.submit(&request("b", prompt(1, 100), greedy(29)));
    let full = bench
        .engine
        .submit(request("c", vec![1], greedy(1)))
        .unwrap_err();
    assert!(full == SubmitError::QueueFull { limit: 2 } && full.is_retryable());
    bench.run();
    // A window needs its own pages only.
    Bench::new(config, Some(64)).submit(&request("a", prompt(1, 100), greedy(300)));
}

#[test]
fn a_sequence_may_use_the_whole_cache_and_ends_where_it_is_full() {
    let endless = SamplingParams {
        ignore_eos: true,
        ..greedy(100_000)
    };
    let config = EngineConfig {
        num_pages: 2,
        prefix_cache: false,
        ..config()
    };
    let first = request("a", prompt(1, 100), endless.clone());
    let expected = by_hand(&first.prompt, 28, None);
    let mut bench = Bench::new(config.clone(), None);
    bench.submit(&first);
    bench.run();
    let stats = bench.engine.stats();
    assert_eq!((stats.preemptions, stats.pages_free), (0, 2));
    assert_eq!(bench.of(&first).ids(), expected);
    assert_eq!(
        bench.of(&first).finished.unwrap().0,
        FinishReason::Length,
        "100 + 28 tokens fill both pages"
    );
    // Rivals for the whole cache: each comes to the same end, one after the other.
    let requests = [
        first,
        request("b", prompt(2, 60), endless.clone()),
        request("c", prompt(3, 127), endless.clone()),
    ];
    let mut bench = Bench::new(config, None);
    for new in &requests {
        bench.submit(new);
    }
    bench.run();
    for new in &requests {
        let room = 2 * KV_PAGE_TOKENS - new.prompt.len();
        let heard = bench.of(new);
        assert_eq!(heard.ids(), by_hand(&new.prompt, room, None), "{}", new.id);
        assert_eq!(heard.finished.unwrap().0, FinishReason::Length);
    }
    // What a window leaves behind is no limit.
    let windowed = EngineConfig {
        num_pages: 2,
        ..self::config()
    };
    let mut bench = Bench::new(windowed, Some(64));
    let long = request("d", prompt(4, 1000), endless);
    bench.submit(&long);
    bench.run();
    assert_eq!(bench.of(&long).tokens.len(), 24, "the model's context");
}

#[test]
fn logits_that_are_no_numbers_fail_their_sequence_alone_and_are_not_cached() {
    let mut bench = Bench::new(
        EngineConfig {
            prefix_cache: true,
            ..config()
        },
        None,
    );
    let bad = request("bad", [prompt(1, 127), vec![POISON]].concat(), greedy(5));
    let good = request("good", prompt(2, 70), greedy(5));
    bench.submit(&bad);
    bench.submit(&good);
    bench.run();
    let (message, kind) = bench.of(&bad).failed.clone().unwrap();
    assert_eq!(
        (message.as_str(), kind),
        (
            "the logit of token 3 is not a number or infinite",
            FailureKind::Sequence
        )
    );
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
    let next = request("next", [bad.prompt, vec![5]].concat(), greedy(5));
    bench.submit(&next);
    bench.run();
    assert_eq!(bench.of(&next).cached_tokens, Some(0));
}

/// Random weights of a small Mixtral, by name and shape.
fn weights(name: u64, rows: usize, cols: usize) -> Vec<u8> {
    let scale = 2.0 / (cols as f32).sqrt();
    let number = |i: u64| (unit(mix(name, i)) - 0.5) * if rows == 1 { 0.2 } else { scale };
    let bias = if rows == 1 { 1.0 } else { 0.0 };
    (0..(rows * cols) as u64)
        .flat_map(|i| (number(i) + bias).to_le_bytes())
        .collect()
}

fn tensor(rows: usize, cols: usize, data: &[u8]) -> HostTensor<'_> {
    HostTensor {
        dtype: DType::F32,
        rows,
        cols,
        order: Default::default(),
        data,
    }
}

fn load_experts(experts: &dyn Experts) {
    for layer in (0..2).map(LayerId) {
        for expert in (0..5).map(ExpertId) {
            let name = 1000 + u64::from(layer.0) * 100 + u64::from(expert.0) * 10;
            let [w1, w3] = [1, 3].map(|i| weights(name + i, 64, 32));
            let w2 = weights(name + 2, 32, 64);
            let (w1, w3) = (tensor(64, 32, &w1), tensor(64, 32, &w3));
            let tensors = ExpertWeights {
                w1,
                w2: tensor(32, 64, &w2),
                w3,
            };
            let slice = ExpertSlice {
                layer,
                expert,
                range: SegmentRange::WHOLE,
            };
            experts.load(slice, &tensors).unwrap();
        }
    }
}

/// A real model on the reference backend.
fn reference_bench(config: EngineConfig, window: Option<usize>) -> Bench {
    let geometry = ModelGeometry {
        hidden: 32,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        ff: 64,
        ..geometry(window)
    };
    let backend = ReferenceBackend::new(&geometry);
    let (embed, norm) = (weights(1, VOCAB, 32), weights(2, 1, 32));
    let layers: Vec<Vec<Vec<u8>>> = (0..2)
        .map(|layer| {
            let shapes = [
                (1, 32),
                (32, 32),
                (16, 32),
                (16, 32),
                (32, 32),
                (1, 32),
                (5, 32),
            ];
            let named = shapes.iter().zip(10 + layer * 10..);
            named
                .map(|(&(rows, cols), name)| weights(name, rows, cols))
                .collect()
        })
        .collect();
    let attention = AttentionWeights {
        embed: tensor(VOCAB, 32, &embed),
        layers: layers
            .iter()
            .map(|t| AttentionLayerWeights {
                input_norm: tensor(1, 32, &t[0]),
                q: tensor(32, 32, &t[1]),
                k: tensor(16, 32, &t[2]),
                v: tensor(16, 32, &t[3]),
                o: tensor(32, 32, &t[4]),
                post_norm: tensor(1, 32, &t[5]),
                gate: Some(tensor(5, 32, &t[6])),
            })
            .collect(),
        norm: tensor(1, 32, &norm),
        lm_head: tensor(VOCAB, 32, &embed),
    };
    let (num_pages, max_rows) = (config.num_pages, config.max_step_rows);
    let reserved = AttentionConfig {
        num_pages,
        max_rows,
        kv_format: KvFormat::F16,
    };
    let attention = backend.attention(&attention, reserved).unwrap();
    let experts = backend.experts();
    load_experts(&*experts);
    Bench::around(config, geometry, attention, experts)
}

#[test]
fn a_real_model_says_the_same_however_it_is_run() {
    let with_scores = |new: &NewSequence| {
        let mut new = new.clone();
        new.params.logprobs = Some(2);
        new.params.max_tokens = 6;
        new.params.min_tokens = 0;
        new
    };
    let all: Vec<_> = requests()
        .iter()
        .filter(|r| r.prompt.len() < 90)
        .map(with_scores)
        .collect();
    for window in [None, Some(30)] {
        let expected: Vec<Heard> = all
            .iter()
            .map(|new| {
                let mut bench = reference_bench(config(), window);
                bench.submit(new);
                bench.run();
                bench.of(new).clone()
            })
            .collect();
        let limits = EngineConfig {
            num_pages: 5,
            max_step_rows: 40,
            max_prefill_chunk: 17,
            prefix_cache: true,
            ..config()
        };
        let mut bench = reference_bench(limits, window);
        for new in &all {
            bench.submit(new);
        }
        bench.fail_in.store(3, Ordering::Relaxed);
        bench.run();
        assert_eq!(bench.num_errors, 1);
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(
                bench.of(new).said(),
                expected.said(),
                "{}, window {window:?}",
                new.id
            );
        }
    }
}

/// Something that happens to a running engine.
#[derive(Clone, Debug)]
enum Act {
    Submit(usize),
    Abort(usize),
    Step(usize),
    Fail(u32),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..16_usize).prop_map(Act::Submit),
        1 => (0..16_usize).prop_map(Act::Abort),
        4 => (1..12_usize).prop_map(Act::Step),
        1 => (1..3_u32).prop_map(Act::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_tokens_are_the_same(
        acts in prop::collection::vec(act(), 1..60),
        limits in (1..6_usize, 1..80_usize, 1..70_usize, 6..20_usize, any::<bool>()),
        window in prop_oneof![Just(None), Just(Some(33)), Just(Some(128))],
    ) {
        let (max_running, max_step_rows, max_prefill_chunk, num_pages, prefix_cache) = limits;
        let limits = EngineConfig {
            max_running, max_step_rows, max_prefill_chunk, num_pages, prefix_cache,
            step_attempts_max: 1000, ..config()
        };
        let all = requests();
        let mut bench = Bench::new(limits, window);
        let mut submitted = BTreeSet::new();
        let mut aborted = BTreeSet::new();
        for act in acts {
            match act {
                Act::Submit(i) => {
                    if submitted.insert(i) {
                        bench.submit(&all[i]);
                    }
                }
                Act::Abort(i) => {
                    if bench.engine.abort(&all[i].id) {
                        aborted.insert(i);
                    }
                }
                Act::Step(n) => (0..n).for_each(|_| bench.step()),
                Act::Fail(n) => bench.fail_in.store(n, Ordering::Relaxed),
            }
        }
        bench.run();
        for &i in submitted.difference(&aborted) {
            let expected = alone(&all[i], window);
            prop_assert_eq!(bench.of(&all[i]).said(), expected.said(), "{}", i);
        }
        let stats = bench.engine.stats();
        prop_assert_eq!(stats.pages_free, stats.pages_total);
        prop_assert!(!bench.engine.has_work());
    }
}
