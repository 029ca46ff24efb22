//! Every metric of the router. Labels come from closed sets; text of a client is never one.
//!
//! Names with the prefix `vllm:` mean what they mean in vLLM, so that existing dashboards work.

mod grammars;
mod labels;
mod tenants;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tramontane_coordination::Version;
use tramontane_grammar::GrammarStats;
use tramontane_runtime::metrics as shared;
use tramontane_types::{FinishReason, Usage};

use crate::error::ErrorKind;
use crate::tenants::Tenants;
use grammars::GrammarCounts;
use labels::{LossLabels, OutcomeLabels, RefusalLabels, RequestLabels, WeightsLabels};
pub(crate) use labels::{LossReason, Route};
use tenants::TenantMetrics;

/// Metrics of one router.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    refusals: Family<RefusalLabels, Counter>,
    losses: Family<LossLabels, Counter>,
    moves: Counter,
    replayed_tokens: Counter,
    attached: Counter,
    resumed: Counter,
    queue_seconds: Histogram,
    finished: Family<OutcomeLabels, Counter>,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generation_tokens: Counter,
    first_token_seconds: Histogram,
    inter_token_seconds: Histogram,
    token_pace_seconds: Histogram,
    request_seconds: Histogram,
    gauges: Gauges,
    pub(crate) tenants: TenantMetrics,
    /// Of all answers, those that still run included.
    tokens_sampled: AtomicU64,
}

/// What is set just before the metrics are read.
#[derive(Debug, Default)]
struct Gauges {
    running: Gauge,
    waiting: Gauge,
    journal_entries: Gauge,
    journal_tokens: Gauge,
    kept_answers: Gauge,
    kept_bytes: Gauge,
    workers_ready: Gauge,
    workers: Gauge,
    epoch: Gauge,
    ready: Gauge,
    store_available: Gauge,
    store_values_skipped: Gauge,
    survives_one_loss: Gauge,
    weights: Family<WeightsLabels, Gauge>,
    versions: Gauge,
    grammars: GrammarCounts,
}

/// Values of the gauges at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) waiting_bytes: usize,
    pub(crate) held: usize,
    pub(crate) journal_entries: usize,
    pub(crate) journal_tokens: usize,
    pub(crate) kept_answers: usize,
    pub(crate) kept_bytes: usize,
    pub(crate) workers_ready: usize,
    pub(crate) workers: usize,
    pub(crate) epoch: u64,
    pub(crate) ready: bool,
    pub(crate) store_available: bool,
    /// Values of the store that cannot be read.
    pub(crate) store_values_skipped: usize,
    pub(crate) survives_one_loss: bool,
    /// The version that takes new requests.
    pub(crate) serving: Option<Arc<Version>>,
    /// Versions that workers have.
    pub(crate) versions: usize,
    /// What the compiler of constraints counts.
    pub(crate) grammars: GrammarStats,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Outcome {
    Stop,
    Length,
    Abort,
    Error,
}

impl From<FinishReason> for Outcome {
    fn from(reason: FinishReason) -> Self {
        match reason {
            FinishReason::Stop => Self::Stop,
            FinishReason::Length => Self::Length,
            FinishReason::Aborted => Self::Abort,
        }
    }
}

impl Gauges {
    /// All but those with vLLM's names.
    fn register(&self, own: &mut Registry) {
        own.register(
            "journal_entries",
            "Running sequences",
            self.journal_entries.clone(),
        );
        own.register(
            "journal_tokens",
            "Sampled tokens kept for them",
            self.journal_tokens.clone(),
        );
        own.register(
            "kept_answers",
            "Answers kept for retries",
            self.kept_answers.clone(),
        );
        own.register(
            "kept_bytes",
            "Memory that they take",
            self.kept_bytes.clone(),
        );
        own.register("workers", "Registered workers", self.workers.clone());
        own.register(
            "workers_ready",
            "Attention workers that take requests",
            self.workers_ready.clone(),
        );
        own.register("placement_epoch", "Published placement", self.epoch.clone());
        own.register(
            "weights",
            "1 for the version that takes new requests",
            self.weights.clone(),
        );
        own.register(
            "versions",
            "Versions of the weights that workers have",
            self.versions.clone(),
        );
        own.register("ready", "1 when requests can be served", self.ready.clone());
        own.register(
            "store_available",
            "1 when the store answers",
            self.store_available.clone(),
        );
        own.register(
            "store_values_skipped",
            "Values of the store that cannot be read and are left out",
            self.store_values_skipped.clone(),
        );
        self.register_grammars(own);
    }

    fn register_grammars(&self, own: &mut Registry) {
        let grammars = &self.grammars;
        own.register(
            "grammars_compiled",
            "Constraints compiled",
            grammars.compiled.clone(),
        );
        own.register(
            "grammar_compile_seconds",
            "Time spent compiling constraints",
            grammars.compile_seconds.clone(),
        );
        own.register(
            "grammar_cache_hits",
            "Constraints that were compiled already",
            grammars.cache_hits.clone(),
        );
        own.register(
            "grammars_refused",
            "Constraints refused",
            grammars.refused.clone(),
        );
        own.register(
            "grammar_cache_bytes",
            "Bytes of compiled constraints that are kept",
            grammars.cache_bytes.clone(),
        );
    }
}

impl Metrics {
    /// All metrics at zero, labelled with the served model.
    pub(crate) fn new(model: &str, tenants: Arc<Tenants>) -> Self {
        let mut metrics = Self {
            registry: Registry::default(),
            requests: Family::default(),
            refusals: Family::default(),
            losses: Family::default(),
            moves: Counter::default(),
            replayed_tokens: Counter::default(),
            attached: Counter::default(),
            resumed: Counter::default(),
            queue_seconds: Histogram::new(shared::TTFT_BUCKETS),
            finished: Family::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            first_token_seconds: Histogram::new(shared::TTFT_BUCKETS),
            inter_token_seconds: Histogram::new(shared::ITL_BUCKETS),
            token_pace_seconds: Histogram::new(shared::ITL_BUCKETS),
            request_seconds: Histogram::new(shared::LATENCY_BUCKETS),
            gauges: Gauges::default(),
            tenants: TenantMetrics::new(tenants),
            tokens_sampled: AtomicU64::new(0),
        };
        metrics.register_own();
        metrics.register_vllm(model);
        metrics
    }

    fn register_own(&mut self) {
        self.registry.register(
            "tramontane_survives_one_loss",
            "1 when any one worker may be lost",
            self.gauges.survives_one_loss.clone(),
        );
        let own = self.registry.sub_registry_with_prefix("tramontane_router");
        own.register(
            "requests",
            "Requests by route and HTTP status",
            self.requests.clone(),
        );
        own.register(
            "refusals",
            "Requests refused at admission",
            self.refusals.clone(),
        );
        own.register(
            "worker_losses",
            "Sequences that a worker could not go on with",
            self.losses.clone(),
        );
        own.register(
            "moves",
            "Sequences opened on another worker",
            self.moves.clone(),
        );
        own.register(
            "replayed_tokens",
            "Sampled tokens replayed elsewhere",
            self.replayed_tokens.clone(),
        );
        own.register(
            "attached_requests",
            "Requests that got a kept answer",
            self.attached.clone(),
        );
        own.register(
            "resumed_streams",
            "Streams that go on after an event",
            self.resumed.clone(),
        );
        own.register(
            "queue_seconds",
            "Wait for admission",
            self.queue_seconds.clone(),
        );
        self.gauges.register(own);
        self.tenants.register(own);
    }

    fn register_vllm(&mut self, model: &str) {
        let label = ("model_name".into(), model.to_owned().into());
        let vllm = self.registry.sub_registry_with_label(label);
        vllm.register(
            "vllm:num_requests_running",
            "Requests that run",
            self.gauges.running.clone(),
        );
        vllm.register(
            "vllm:num_requests_waiting",
            "Requests that wait",
            self.gauges.waiting.clone(),
        );
        vllm.register(
            "vllm:prompt_tokens",
            "Prompt tokens",
            self.prompt_tokens.clone(),
        );
        vllm.register(
            "vllm:prompt_tokens_cached",
            "Prompt tokens from a cache",
            self.cached_tokens.clone(),
        );
        vllm.register(
            "vllm:generation_tokens",
            "Sampled tokens",
            self.generation_tokens.clone(),
        );
        vllm.register(
            "vllm:request_success",
            "Ended answers by reason",
            self.finished.clone(),
        );
        let histograms = [
            (
                "vllm:time_to_first_token_seconds",
                "Request to first token",
                &self.first_token_seconds,
            ),
            (
                "vllm:inter_token_latency_seconds",
                "Between two tokens",
                &self.inter_token_seconds,
            ),
            (
                "vllm:request_time_per_output_token_seconds",
                "Mean time per token of an answer",
                &self.token_pace_seconds,
            ),
            (
                "vllm:e2e_request_latency_seconds",
                "Whole requests",
                &self.request_seconds,
            ),
        ];
        for (name, help, histogram) in histograms {
            vllm.register(name, help, histogram.clone());
        }
    }

    /// All metrics as text, with the gauges at `reading`.
    pub(crate) fn render(&self, reading: Reading) -> String {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let gauges = &self.gauges;
        gauges.running.set(count(reading.running));
        gauges.waiting.set(count(reading.waiting));
        self.tenants.set(reading.held, reading.waiting_bytes);
        gauges.journal_entries.set(count(reading.journal_entries));
        gauges.journal_tokens.set(count(reading.journal_tokens));
        gauges.kept_answers.set(count(reading.kept_answers));
        gauges.kept_bytes.set(count(reading.kept_bytes));
        gauges.workers_ready.set(count(reading.workers_ready));
        gauges.workers.set(count(reading.workers));
        gauges
            .epoch
            .set(i64::try_from(reading.epoch).unwrap_or(i64::MAX));
        gauges.ready.set(i64::from(reading.ready));
        gauges
            .store_available
            .set(i64::from(reading.store_available));
        let skipped = count(reading.store_values_skipped);
        gauges.store_values_skipped.set(skipped);
        gauges
            .survives_one_loss
            .set(i64::from(reading.survives_one_loss));
        gauges.versions.set(count(reading.versions));
        gauges.grammars.set(reading.grammars);
        // One series: those that served before would only pile up.
        gauges.weights.clear();
        if let Some(version) = reading.serving {
            let labels = WeightsLabels::of(&version);
            gauges.weights.get_or_create(&labels).set(1);
        }
        shared::render(&self.registry)
    }

    /// A request was answered with this HTTP status, or its gRPC equal.
    pub(crate) fn answered(&self, route: Route, code: http::StatusCode) {
        let labels = RequestLabels {
            route: route.name(),
            code: code.as_u16(),
        };
        self.requests.get_or_create(&labels).inc();
    }

    /// A request was refused at admission.
    pub(crate) fn refused(&self, kind: ErrorKind) {
        self.refusals
            .get_or_create(&RefusalLabels {
                reason: kind.reason(),
            })
            .inc();
    }

    /// A worker could not go on with a sequence.
    pub(crate) fn lost(&self, reason: LossReason) {
        let reason = match reason {
            LossReason::Busy => "busy",
            LossReason::Broken => "broken",
            LossReason::Silent => "silent",
            LossReason::Aborted => "aborted",
            LossReason::Confused => "confused",
            LossReason::Refused => "refused",
        };
        self.losses.get_or_create(&LossLabels { reason }).inc();
    }

    /// A sequence goes on elsewhere.
    pub(crate) fn moved(&self, num_replayed: usize) {
        self.moves.inc();
        self.replayed_tokens.inc_by(num_replayed as u64);
    }

    /// A request got the answer that its idempotency key already had.
    pub(crate) fn attached(&self) {
        self.attached.inc();
    }

    /// A stream goes on after the last event that its client has seen.
    pub(crate) fn resumed(&self) {
        self.resumed.inc();
    }

    /// A request waited this long for admission.
    pub(crate) fn queued_for(&self, waited: Duration) {
        self.queue_seconds.observe(waited.as_secs_f64());
    }

    /// An answer ended.
    pub(crate) fn finished(&self, outcome: Outcome) {
        let finished_reason = match outcome {
            Outcome::Stop => "stop",
            Outcome::Length => "length",
            Outcome::Abort => "abort",
            Outcome::Error => "error",
        };
        self.finished
            .get_or_create(&OutcomeLabels { finished_reason })
            .inc();
    }

    /// Tokens of an answer came.
    pub(crate) fn sampled(&self, num_tokens: u32) {
        self.tokens_sampled
            .fetch_add(u64::from(num_tokens), Ordering::Relaxed);
    }

    /// Tokens that have come so far.
    pub(crate) fn tokens_sampled(&self) -> u64 {
        self.tokens_sampled.load(Ordering::Relaxed)
    }

    /// The first token of an answer came.
    pub(crate) fn first_token(&self, after: Duration) {
        self.first_token_seconds.observe(after.as_secs_f64());
    }

    /// More tokens of an answer came at once, this long after the last.
    pub(crate) fn next_tokens(&self, after: Duration, num_tokens: u32) {
        self.inter_token_seconds
            .observe(after.as_secs_f64() / f64::from(num_tokens.max(1)));
    }

    /// An answer of so many tokens took this long from its first to its last.
    pub(crate) fn token_pace(&self, took: Duration, num_tokens: u32) {
        if num_tokens > 1 {
            self.token_pace_seconds
                .observe(took.as_secs_f64() / f64::from(num_tokens - 1));
        }
    }

    /// A request that was admitted has ended.
    pub(crate) fn request_ended(&self, took: Duration, usage: Usage) {
        self.request_seconds.observe(took.as_secs_f64());
        self.prompt_tokens.inc_by(u64::from(usage.prompt_tokens));
        self.cached_tokens.inc_by(u64::from(usage.cached_tokens));
        self.generation_tokens
            .inc_by(u64::from(usage.completion_tokens));
    }
}
