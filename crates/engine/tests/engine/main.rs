//! The engine around a toy language model whose logits depend on every visible token, read from its
//! own paged store: a wrong page, position or row gives wrong tokens. The exchange is the real one.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says so at once"
)]

mod chosen;
mod constrained;
mod ends;
mod exactness;
mod failures;
mod guesses;
mod pages;
mod reference;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tramontane_compute::combine::add_expert_sums;
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, Contributions,
    DType, Error as ComputeError, ExpertJob, ExpertWeights, Experts, HostTensor, KV_PAGE_TOKENS,
    KvFormat, RoutedRows, RowFormat, StepBatch, StepOutputs, Wanted,
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
    /// Tokens that it has chosen itself.
    chosen: Arc<AtomicU32>,
    /// Whether the words 5 and 6 are far likelier than all others.
    has_two_words: bool,
}

impl ToyAttention {
    fn new(num_pages: usize, window: Option<usize>) -> Self {
        Self {
            window: window.unwrap_or(usize::MAX),
            store: vec![vec![0xDEAD; num_pages * KV_PAGE_TOKENS]; 2],
            states: Vec::new(),
            poisoned: Vec::new(),
            whole_steps: None,
            chosen: Arc::default(),
            has_two_words: false,
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
            if self.has_two_words {
                out[begin + 5..begin + 7]
                    .iter_mut()
                    .for_each(|l| *l += 90.0);
            }
            if self.poisoned[row as usize] {
                out[begin + 3] = f32::NAN;
            }
        }
        Ok(())
    }

    fn step(
        &mut self,
        batch: &StepBatch,
        wanted: &[Wanted],
        experts: &dyn Experts,
        out: &mut StepOutputs,
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
        assert_eq!(batch.logits_rows.len(), wanted.len());
        let mut logits = Vec::new();
        self.logits(batch, &mut logits)?;
        out.clear();
        for (wanted, row) in wanted.iter().zip(logits.chunks_exact(VOCAB)) {
            match wanted.choose(row) {
                None => out.logits.extend(row),
                Some(choice) => out.choices.push(choice),
            }
        }
        self.chosen
            .fetch_add(out.choices.len() as u32, Ordering::Relaxed);
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

    /// Has all of them said to their ends; `steps_between` has each come a step after the one before.
    fn serve(&mut self, all: &[NewSequence], steps_between: bool) {
        for new in all {
            self.submit(new);
            if steps_between {
                self.step();
            }
        }
        self.run();
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

/// A sequence that was lost behind any of its tokens goes on as if it had not been.
fn assert_resumes(new: &NewSequence) {
    let expected = alone(new, None);
    let end = expected.finished.unwrap();
    for num_resumed in 0..=expected.tokens.len() {
        let mut resumed = NewSequence {
            num_resumed,
            ..new.clone()
        };
        resumed.prompt.extend(&expected.ids()[..num_resumed]);
        let got = alone(&resumed, None);
        assert_eq!(got.tokens, expected.tokens[num_resumed..], "{}", new.id);
        assert_eq!(got.finished, Some(end), "{}", new.id);
    }
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
