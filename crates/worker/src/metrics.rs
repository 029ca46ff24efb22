//! The metrics of a worker: every name in one place. Read when somebody asks, from counters that exist anyway.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tramontane_engine::StepReport;

use crate::state::Node;

/// Seconds of one step: from a decode of a tiny model to a long prompt on a slow machine.
const STEP_SECONDS_BUCKETS: [f64; 14] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0,
];
/// Rows of one step.
const STEP_ROWS_BUCKETS: [f64; 12] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0,
];

/// Histograms that the engine's thread fills.
#[derive(Clone, Debug)]
pub(crate) struct StepMetrics {
    seconds: Histogram,
    rows: Histogram,
}

impl StepMetrics {
    pub(crate) fn new() -> Self {
        Self {
            seconds: Histogram::new(STEP_SECONDS_BUCKETS),
            rows: Histogram::new(STEP_ROWS_BUCKETS),
        }
    }

    /// Counts a step that computed rows.
    pub(crate) fn observe(&self, report: &StepReport) {
        if report.num_rows > 0 {
            self.seconds.observe(report.times.total_us() as f64 / 1e6);
            self.rows.observe(report.num_rows as f64);
        }
    }
}

/// A registry with all metrics of `node`.
pub(crate) fn registry(node: Arc<Node>, steps: &StepMetrics) -> Registry {
    let mut registry = Registry::default();
    let seconds = "Seconds of one engine step";
    registry.register("tramontane_step_seconds", seconds, steps.seconds.clone());
    registry.register(
        "tramontane_step_rows",
        "Rows of one engine step",
        steps.rows.clone(),
    );
    registry.register_collector(Box::new(NodeCollector { node }));
    registry
}

#[derive(Debug)]
struct NodeCollector {
    node: Arc<Node>,
}

impl Collector for NodeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut out = Out {
            encoder: &mut encoder,
        };
        out.gauge(
            "placement_epoch",
            "Epoch that is served on",
            self.node.epoch().0,
        )?;
        self.engine(&mut out)?;
        self.grammars(&mut out)?;
        self.exchange(&mut out)?;
        self.weights(&mut out)?;
        self.experts(&mut out)
    }
}

impl NodeCollector {
    fn engine(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let Some(engine) = self.node.engine() else {
            return Ok(());
        };
        let stats = engine.stats();
        out.gauge(
            "sequences_running",
            "Sequences that hold pages",
            stats.running as u64,
        )?;
        out.gauge(
            "sequences_waiting",
            "Sequences that wait",
            stats.waiting as u64,
        )?;
        out.gauge(
            "kv_pages",
            "Pages of the KV cache",
            stats.pages_total as u64,
        )?;
        out.gauge(
            "kv_pages_free",
            "Pages that can be taken",
            stats.pages_free as u64,
        )?;
        out.gauge(
            "kv_pages_cached",
            "Pages only the prefix cache keeps",
            stats.pages_cached as u64,
        )?;
        out.counter("steps", "Steps computed", stats.steps)?;
        out.counter(
            "steps_failed",
            "Steps that did not complete",
            stats.steps_failed,
        )?;
        out.counter("preemptions", "Sequences preempted", stats.preemptions)?;
        out.counter("rows", "Rows computed", stats.rows)?;
        out.counter("tokens_sampled", "Tokens sampled", stats.tokens_sampled)?;
        out.counter(
            "prompt_tokens",
            "Prompt tokens of started sequences",
            stats.prompt_tokens,
        )?;
        let (guessed, came_true) = (stats.tokens_guessed, stats.guesses_true);
        out.counter("tokens_guessed", "Tokens guessed", guessed)?;
        out.counter("guesses_true", "Guesses that came true", came_true)?;
        let (asked, found) = (stats.prefix_query_tokens, stats.prefix_hit_tokens);
        out.counter(
            "prefix_query_tokens",
            "Prompt tokens looked up in the prefix cache",
            asked,
        )?;
        out.counter(
            "prefix_hit_tokens",
            "Prompt tokens found in the prefix cache",
            found,
        )?;
        let times = stats.times;
        out.seconds("step_attend_seconds", "Time in attention", times.attend_us)?;
        out.seconds(
            "step_exchange_seconds",
            "Time in dispatch and combine",
            times.exchange_us,
        )?;
        out.seconds(
            "step_logits_seconds",
            "Time in the LM head",
            times.logits_us,
        )?;
        out.seconds("step_sample_seconds", "Time in sampling", times.sample_us)
    }

    fn grammars(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        if let Some(engine) = self.node.engine() {
            let stats = engine.stats();
            out.counter(
                "masks",
                "Masks found for constrained sequences",
                stats.masks,
            )?;
            out.seconds("mask_seconds", "Time spent on masks", stats.mask_us)?;
            let late = stats.masks_late;
            out.counter("masks_late", "Masks not there when wanted", late)?;
            let waited = stats.mask_wait_us;
            out.seconds("mask_wait_seconds", "Time steps waited for masks", waited)?;
        }
        let Some(grammars) = &self.node.grammars else {
            return Ok(());
        };
        let stats = grammars.stats();
        out.counter("grammars_compiled", "Constraints compiled", stats.compiled)?;
        out.seconds(
            "grammar_compile_seconds",
            "Time spent compiling constraints",
            stats.compile_us,
        )?;
        out.counter(
            "grammar_cache_hits",
            "Constraints that were compiled already",
            stats.cache_hits,
        )?;
        out.counter("grammars_refused", "Constraints refused", stats.refused)?;
        out.gauge(
            "grammar_cache_bytes",
            "Bytes of compiled constraints that are kept",
            stats.cache_bytes,
        )
    }

    fn exchange(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let carried = self.node.transport.stats();
        out.counter(
            "exchange_bytes_sent",
            "Bytes of rows sent to experts",
            carried.bytes_sent,
        )?;
        let received = carried.bytes_received;
        out.counter(
            "exchange_bytes_received",
            "Bytes of expert outputs received",
            received,
        )?;
        out.counter("exchange_calls", "Expert calls sent", carried.calls)?;
        out.counter(
            "exchange_calls_lost",
            "Expert calls lost with a connection",
            carried.lost,
        )?;
        out.counter(
            "exchange_connects",
            "Connections made to expert workers",
            carried.connects,
        )?;
        let Some(stats) = self.node.exchange() else {
            return Ok(());
        };
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        out.seconds(
            "exchange_wait_seconds",
            "Time waited for experts",
            read(&stats.wait_us_total),
        )?;
        out.counter(
            "exchange_retries",
            "Expert calls planned again",
            read(&stats.retries),
        )?;
        out.counter(
            "exchange_rows_local",
            "Rows of our own experts",
            read(&stats.rows_local),
        )?;
        out.counter(
            "exchange_rows_remote",
            "Rows of others' experts",
            read(&stats.rows_remote),
        )
    }

    fn weights(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let stats = &self.node.weights;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        out.counter(
            "weights_bytes_sent",
            "Bytes of weights given to others",
            read(&stats.sent),
        )?;
        out.counter(
            "weights_bytes_received",
            "Bytes of weights taken from others",
            read(&stats.received),
        )?;
        out.counter(
            "weights_requests_failed",
            "Requests for weights that came to nothing",
            read(&stats.failed),
        )?;
        out.counter(
            "weights_reads_failed",
            "Reads of own weight files made up for by others",
            read(&stats.unreadable),
        )
    }

    fn experts(&self, out: &mut Out<'_, '_>) -> fmt::Result {
        let half = &self.node.experts;
        let (stats, segments) = (half.server.stats(), half.store.num_segments_held());
        // What it held is dropped some time after the role is given up.
        if !self.node.roles().experts && segments == 0 {
            return Ok(());
        }
        out.gauge("expert_segments", "Expert segments held", segments)?;
        out.gauge(
            "expert_bytes",
            "Bytes of experts held",
            segments * half.segment_bytes,
        )?;
        out.gauge(
            "expert_calls_waiting",
            "Expert calls that wait",
            stats.waiting,
        )?;
        out.counter("expert_calls", "Expert calls answered", stats.calls)?;
        out.counter(
            "expert_batches",
            "Batches that they were merged into",
            stats.batches,
        )?;
        out.counter("expert_rows", "Rows of answered expert calls", stats.rows)?;
        out.counter(
            "expert_calls_busy",
            "Expert calls refused for a full queue",
            stats.busy,
        )?;
        out.counter(
            "expert_calls_refused",
            "Expert calls refused otherwise",
            stats.refused,
        )
    }
}

/// Writes one metric after the other.
struct Out<'a, 'b> {
    encoder: &'a mut DescriptorEncoder<'b>,
}

impl Out<'_, '_> {
    fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.write(
            name,
            help,
            &ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)),
        )
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.write(name, help, &ConstCounter::new(value))
    }

    fn seconds(&mut self, name: &str, help: &str, micros: u64) -> fmt::Result {
        self.write(name, help, &ConstCounter::new(micros as f64 / 1e6))
    }

    fn write(&mut self, name: &str, help: &str, metric: &dyn EncodeDyn) -> fmt::Result {
        metric.write(self.encoder, &format!("tramontane_{name}"), help)
    }
}

/// [`EncodeMetric`] behind a pointer.
trait EncodeDyn {
    fn write(&self, encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str) -> fmt::Result;
}

impl<M: EncodeMetric> EncodeDyn for M {
    fn write(&self, encoder: &mut DescriptorEncoder<'_>, name: &str, help: &str) -> fmt::Result {
        self.encode(encoder.encode_descriptor(name, help, None, self.metric_type())?)
    }
}
