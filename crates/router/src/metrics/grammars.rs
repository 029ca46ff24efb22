//! What the compiler of constraints counts, as metrics. Its own counters are the truth; these follow when they are read.

use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use tramontane_grammar::GrammarStats;

#[derive(Debug, Default)]
pub(super) struct GrammarCounts {
    pub(super) compiled: Counter,
    pub(super) compile_seconds: Counter<f64, AtomicU64>,
    pub(super) cache_hits: Counter,
    pub(super) refused: Counter,
    pub(super) cache_bytes: Gauge,
}

impl GrammarCounts {
    pub(super) fn set(&self, stats: GrammarStats) {
        let counters = [
            (&self.compiled, stats.compiled),
            (&self.cache_hits, stats.cache_hits),
            (&self.refused, stats.refused),
        ];
        for (counter, value) in counters {
            counter.inner().store(value, Ordering::Relaxed);
        }
        let seconds = stats.compile_us as f64 / 1e6;
        let bits = self.compile_seconds.inner();
        bits.store(seconds.to_bits(), Ordering::Relaxed);
        let bytes = i64::try_from(stats.cache_bytes).unwrap_or(i64::MAX);
        self.cache_bytes.set(bytes);
    }
}
