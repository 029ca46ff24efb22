//! Percentiles of a load run, as a table or as JSON.

use std::time::Duration;

use serde::Serialize;

use super::Sample;
use super::args::BenchArgs;
use crate::output;

/// Failures listed in a report; the rest is only counted.
const FAILURES_SHOWN: usize = 5;

/// Figures of one run. Times in milliseconds, rates in tokens per second.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) concurrency: u32,
    pub(super) requests: u64,
    pub(super) failed: u64,
    pub(super) failures: Vec<String>,
    pub(super) seconds: f64,
    pub(super) prompt_tokens: u64,
    pub(super) output_tokens: u64,
    /// Output tokens over wall time, prompts included in the time.
    pub(super) output_tokens_per_s: f64,
    /// Prompt and output tokens over wall time.
    pub(super) total_tokens_per_s: f64,
    pub(super) ttft_ms: Percentiles,
    pub(super) itl_ms: Percentiles,
    /// A request's time after its first token over the tokens of that time: unlike `itl_ms` it does
    /// not mind tokens that arrive several at once.
    pub(super) tpot_ms: Percentiles,
    pub(super) latency_ms: Percentiles,
}

/// Order statistics of one quantity.
#[derive(Debug, Default, Serialize)]
pub(super) struct Percentiles {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

impl Report {
    pub(super) fn new(
        args: &BenchArgs,
        model: &str,
        wall: Duration,
        samples: &[Sample],
        mut failures: Vec<String>,
    ) -> Self {
        let seconds = wall.as_secs_f64();
        let prompt_tokens = samples.iter().map(|s| s.prompt_tokens).sum();
        let output_tokens = samples.iter().map(|s| s.output_tokens).sum();
        let failed = failures.len() as u64;
        failures.truncate(FAILURES_SHOWN);
        Self {
            model: model.to_owned(),
            concurrency: args.concurrency,
            requests: args.requests,
            failed,
            failures,
            seconds,
            prompt_tokens,
            output_tokens,
            output_tokens_per_s: output_tokens as f64 / seconds,
            total_tokens_per_s: (prompt_tokens + output_tokens) as f64 / seconds,
            ttft_ms: percentiles(samples.iter().map(|s| s.ttft)),
            itl_ms: percentiles(samples.iter().flat_map(|s| s.gaps.iter().copied())),
            tpot_ms: percentiles(samples.iter().filter_map(time_per_output_token)),
            latency_ms: percentiles(samples.iter().map(|s| s.total)),
        }
    }

    pub(super) fn print(&self) -> std::io::Result<()> {
        output::line(&format!(
            "{}: {} requests, {} at once, {:.1} s, {} failed",
            self.model, self.requests, self.concurrency, self.seconds, self.failed
        ))?;
        for failure in &self.failures {
            output::line(&format!("  {failure}"))?;
        }
        output::line(&format!(
            "prompt {} tokens, output {} tokens: {:.1} output tok/s, {:.1} total tok/s",
            self.prompt_tokens,
            self.output_tokens,
            self.output_tokens_per_s,
            self.total_tokens_per_s
        ))?;
        let row = |name: &str, p: &Percentiles| {
            let cell = |x: f64| format!("{x:.1}");
            vec![
                name.to_owned(),
                cell(p.p50),
                cell(p.p90),
                cell(p.p99),
                cell(p.max),
            ]
        };
        output::table(
            &["ms", "p50", "p90", "p99", "max"],
            &[
                row("time to first token", &self.ttft_ms),
                row("inter-token latency", &self.itl_ms),
                row("time per output token", &self.tpot_ms),
                row("request latency", &self.latency_ms),
            ],
        )
    }
}

/// None for an answer of one token.
fn time_per_output_token(sample: &Sample) -> Option<Duration> {
    let gaps = u32::try_from(sample.output_tokens.checked_sub(1)?).ok()?;
    sample.total.saturating_sub(sample.ttft).checked_div(gaps)
}

/// Nearest-rank percentiles; zeros when there is nothing.
fn percentiles(values: impl Iterator<Item = Duration>) -> Percentiles {
    let mut ms: Vec<f64> = values.map(|d| d.as_secs_f64() * 1e3).collect();
    ms.sort_by(f64::total_cmp);
    let at = |q: f64| {
        let rank = (q * ms.len() as f64).ceil() as usize;
        ms.get(rank.saturating_sub(1)).copied().unwrap_or_default()
    };
    Percentiles {
        p50: at(0.5),
        p90: at(0.9),
        p99: at(0.99),
        max: at(1.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_that_arrive_together_share_their_time() {
        let sample = |output_tokens| Sample {
            ttft: Duration::from_millis(100),
            total: Duration::from_millis(400),
            gaps: Vec::new(),
            prompt_tokens: 8,
            output_tokens,
        };
        let tpot = |tokens| time_per_output_token(&sample(tokens));
        assert_eq!(tpot(4), Some(Duration::from_millis(100)));
        assert_eq!((tpot(1), tpot(0)), (None, None));
    }

    #[test]
    fn percentiles_are_values_that_occurred() {
        let p = percentiles((1..=100).rev().map(Duration::from_millis));
        assert_eq!((p.p50, p.p90, p.p99, p.max), (50.0, 90.0, 99.0, 100.0));
        let none = percentiles(std::iter::empty());
        assert_eq!((none.p50, none.max), (0.0, 0.0));
    }
}
