//! `tramontane bench`: a closed-loop load generator for any OpenAI-compatible endpoint.
//!
//! Prompts are random token ids sent to `/v1/completions`, so no tokenizer stands between the numbers.

pub(crate) mod args;
mod model;
mod report;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::openai_client::Client;
use crate::output;
use args::{BenchArgs, BenchCommand};

/// What one request measured.
#[derive(Clone, Debug)]
struct Sample {
    ttft: Duration,
    total: Duration,
    /// Time between consecutive events that carried tokens.
    gaps: Vec<Duration>,
    prompt_tokens: u64,
    output_tokens: u64,
}

/// Runs the load and prints the report.
pub(crate) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    if let Some(BenchCommand::Model(args)) = args.command {
        return tokio::task::spawn_blocking(move || model::run(&args)).await?;
    }
    let (client, model) = Client::with_model(&args.url, &args.endpoint).await?;
    let plan = Arc::new(Plan {
        client,
        model,
        next: AtomicU64::new(0),
        args,
    });
    let begin = Instant::now();
    let mut clients = JoinSet::new();
    for _ in 0..plan.args.concurrency {
        clients.spawn(one_client(Arc::clone(&plan)));
    }
    let mut samples = Vec::new();
    let mut failures = Vec::new();
    while let Some(done) = clients.join_next().await {
        let (measured, errors) = done.context("bench client")?;
        samples.extend(measured);
        failures.extend(errors);
    }
    let report = report::Report::new(&plan.args, &plan.model, begin.elapsed(), &samples, failures);
    if plan.args.output.is_data() {
        output::data(plan.args.output, &report)?;
    } else {
        report.print()?;
    }
    anyhow::ensure!(
        report.failed == 0,
        "{} of {} requests failed",
        report.failed,
        report.requests
    );
    Ok(())
}

struct Plan {
    client: Client,
    model: String,
    next: AtomicU64,
    args: BenchArgs,
}

async fn one_client(plan: Arc<Plan>) -> (Vec<Sample>, Vec<String>) {
    let (mut samples, mut failures) = (Vec::new(), Vec::new());
    loop {
        let index = plan.next.fetch_add(1, Ordering::Relaxed);
        if index >= plan.args.requests {
            return (samples, failures);
        }
        match one_request(&plan, index).await {
            Ok(sample) => samples.push(sample),
            Err(error) => failures.push(format!("request {index}: {error:#}")),
        }
    }
}

async fn one_request(plan: &Plan, index: u64) -> anyhow::Result<Sample> {
    let args = &plan.args;
    let prompt = prompt_ids(args.seed, index, args.prompt_tokens, args.vocab);
    let body = json!({
        "model": plan.model,
        "prompt": prompt,
        "max_tokens": args.max_tokens,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let begin = Instant::now();
    let mut events = plan.client.stream("completions", &body).await?;
    let (mut first, mut last) = (None, begin);
    let mut gaps = Vec::new();
    let mut usage = Value::Null;
    while let Some(event) = events.next().await {
        let event = event?;
        if event["usage"].is_object() {
            usage = event["usage"].clone();
        }
        if event["choices"].as_array().is_none_or(Vec::is_empty) {
            continue;
        }
        let now = Instant::now();
        match first {
            None => first = Some(now - begin),
            Some(_) => gaps.push(now - last),
        }
        last = now;
    }
    Ok(Sample {
        ttft: first.context("no token came")?,
        total: begin.elapsed(),
        gaps,
        prompt_tokens: usage["prompt_tokens"]
            .as_u64()
            .context("no usage in the answer")?,
        output_tokens: usage["completion_tokens"]
            .as_u64()
            .context("no usage in the answer")?,
    })
}

/// Pseudo-random ids in `3..vocab`: the same for the same seed, different for each request.
fn prompt_ids(seed: u64, index: u64, len: u32, vocab: u32) -> Vec<u32> {
    let mut state = seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let span = u64::from(vocab.saturating_sub(3).max(1));
    let next = |_| {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        3 + ((z ^ (z >> 31)) % span) as u32
    };
    (0..len).map(next).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_repeat_by_seed_and_differ_by_request() {
        assert_eq!(prompt_ids(1, 0, 9, 512), prompt_ids(1, 0, 9, 512));
        assert_ne!(prompt_ids(1, 0, 9, 512), prompt_ids(1, 1, 9, 512));
        assert!(
            prompt_ids(7, 3, 500, 40)
                .iter()
                .all(|id| (3..40).contains(id))
        );
    }
}
