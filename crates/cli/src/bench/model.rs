//! `tramontane bench model`: how near a GPU comes to its limits with a model of full size and weights that mean nothing.
//!
//! Weights are made on the device, so nothing is downloaded. A step is what the engine runs: batch up, tokens or logits down.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Context as _;
use clap::ValueEnum as _;
use serde::Serialize;
use tramontane_compute::sampling::Multinomial;
use tramontane_compute::{
    AttentionConfig, KV_PAGE_TOKENS, KvFormat, SequenceSpan, StepBatch, StepOutputs, Wanted,
};
use tramontane_compute_cuda::{
    CudaConfig, DeviceChoice, KernelCache, LibraryDirs, RandomModel, WeightBytes, check_format,
    measure, open,
};
use tramontane_runtime::config::cache_dir;
use tramontane_types::{ModelGeometry, PageId};

use super::args::{BenchModelArgs, BenchSampling, RandomShape};
use crate::output;
use crate::settings::misuse;

/// Steps that are timed, after some that are not: graphs are made and clocks rise.
const STEPS: usize = 20;
const STEPS_BEFORE: usize = 3;
/// Prompts that are timed.
const PROMPTS: usize = 3;

/// What one kind of step measured.
#[derive(Debug, Serialize)]
struct Line {
    kind: &'static str,
    rows: usize,
    context: usize,
    step_ms: f64,
    tokens_per_second: f64,
    gigabytes_per_second: f64,
    percent_of_copy: f64,
    teraflops: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    device: String,
    target: &'static str,
    model: String,
    layers: usize,
    weights: String,
    sampling: String,
    copy_gigabytes_per_second: f64,
    lines: Vec<Line>,
}

/// Runs the benchmark.
pub(crate) fn run(args: &BenchModelArgs) -> anyhow::Result<()> {
    let DeviceChoice::Cuda(ordinal) = args.device else {
        return Err(misuse(format!(
            "bench model measures a GPU: --device must be cuda:N, got {}",
            args.device
        )));
    };
    let config = CudaConfig {
        libraries: LibraryDirs {
            named: args.libraries.clone(),
        },
        cache: args.cache.clone().or_else(cache_dir).map(KernelCache::new),
    };
    let device = open(ordinal, &config).map_err(misuse)?;
    check_format(args.weights, Some(device.info().target)).map_err(misuse)?;
    let copy = measure::copy_bandwidth(&device).context("measuring copies")?;
    let geometry = geometry(args);
    let most = args.batch.iter().chain(&args.prefill).max();
    let max_rows = most.copied().unwrap_or(1).max(1);
    let decode_pages = args.batch.iter().max().map_or(0, |batch| {
        batch * (args.context + STEPS + STEPS_BEFORE + 1).div_ceil(KV_PAGE_TOKENS)
    });
    let attention = AttentionConfig {
        num_pages: decode_pages.max(max_rows.div_ceil(KV_PAGE_TOKENS)),
        max_rows,
        kv_format: KvFormat::F16,
    };
    output::note("making random weights on the device");
    let mut bench = Bench {
        model: RandomModel::new(&device, &geometry, attention, args.weights)?,
        sampling: args.sampling,
        wanted: Vec::new(),
        outputs: StepOutputs::default(),
        copy,
        geometry,
    };
    let mut lines = Vec::new();
    for &batch in &args.batch {
        lines.push(bench.decode(batch, args.context)?);
    }
    for &rows in &args.prefill {
        lines.push(bench.prefill(rows)?);
    }
    let report = Report {
        device: device.info().name.clone(),
        target: device.info().target.name(),
        model: args.random.name().to_owned(),
        layers: bench.geometry.num_layers,
        weights: args.weights.to_string(),
        sampling: args.sampling.name(),
        copy_gigabytes_per_second: copy / 1e9,
        lines,
    };
    if args.output.is_data() {
        return output::data(args.output, &report);
    }
    Ok(report.print()?)
}

/// The published shape, with fewer layers or a shorter context where asked.
fn geometry(args: &BenchModelArgs) -> ModelGeometry {
    let longest = args.prefill.iter().copied().max().unwrap_or(0);
    let positions = longest.max(args.context + STEPS + STEPS_BEFORE + 1);
    let whole = args.random.geometry();
    ModelGeometry {
        num_layers: args.layers.unwrap_or(whole.num_layers),
        max_positions: positions.next_multiple_of(KV_PAGE_TOKENS),
        ..whole
    }
}

struct Bench {
    model: RandomModel,
    sampling: BenchSampling,
    /// Of the last step.
    wanted: Vec<Wanted>,
    outputs: StepOutputs,
    copy: f64,
    geometry: ModelGeometry,
}

impl Bench {
    /// One token of each of `batch` sequences that have `context` tokens.
    fn decode(&mut self, batch: usize, context: usize) -> anyhow::Result<Line> {
        let step = |nth: usize| decode_batch(&self.geometry, batch, context + nth);
        let batches: Vec<StepBatch> = (0..STEPS_BEFORE + STEPS).map(step).collect();
        let (before, timed) = batches.split_at(STEPS_BEFORE);
        for batch in before {
            self.step(batch)?;
        }
        let begin = Instant::now();
        for batch in timed {
            self.step(batch)?;
        }
        let seconds = begin.elapsed().as_secs_f64() / STEPS as f64;
        self.check()?;
        Ok(self.line("decode", (batch, context), seconds, batch))
    }

    /// A prompt in one step, behind whose last token one is wanted.
    fn prefill(&mut self, rows: usize) -> anyhow::Result<Line> {
        let batch = prefill_batch(&self.geometry, rows);
        self.step(&batch)?;
        let begin = Instant::now();
        for _ in 0..PROMPTS {
            self.step(&batch)?;
        }
        let seconds = begin.elapsed().as_secs_f64() / PROMPTS as f64;
        self.check()?;
        Ok(self.line("prefill", (rows, 0), seconds, 1))
    }

    fn step(&mut self, batch: &StepBatch) -> anyhow::Result<()> {
        let experts = Arc::clone(&self.model.experts);
        self.wanted.clear();
        let rows = 0..batch.logits_rows.len();
        self.wanted
            .extend(rows.map(|row| self.sampling.wanted(row)));
        let attention = &mut self.model.attention;
        let done = attention.step(batch, &self.wanted, &*experts, &mut self.outputs)?;
        anyhow::ensure!(done, "the device does not hold all experts");
        Ok(())
    }

    /// Looks at what the last step gave, which takes longer than some steps where that is logits.
    fn check(&self) -> anyhow::Result<()> {
        let is_finite = self.outputs.logits.iter().all(|x| x.is_finite());
        anyhow::ensure!(is_finite, "logits are not finite");
        for choice in &self.outputs.choices {
            (*choice).context("the last step")?;
        }
        Ok(())
    }

    fn line(
        &self,
        kind: &'static str,
        (rows, context): (usize, usize),
        seconds: f64,
        logits: usize,
    ) -> Line {
        let bytes = step_bytes(&self.geometry, self.model.bytes, (rows, context), logits);
        Line {
            kind,
            rows,
            context,
            step_ms: seconds * 1e3,
            tokens_per_second: rows as f64 / seconds,
            gigabytes_per_second: bytes / seconds / 1e9,
            percent_of_copy: 100.0 * bytes / seconds / self.copy,
            teraflops: step_flops(&self.geometry, rows, context, logits) / seconds / 1e12,
        }
    }
}

/// Tokens that repeat nothing soon.
fn token(geometry: &ModelGeometry, i: usize) -> u32 {
    ((i * 7919 + 13) % geometry.vocab) as u32
}

fn decode_batch(geometry: &ModelGeometry, batch: usize, position: usize) -> StepBatch {
    let pages = position / KV_PAGE_TOKENS + 1;
    let sequence = |i: usize| SequenceSpan {
        row_begin: i as u32,
        num_rows: 1,
        block_table: (0..pages)
            .map(|page| PageId((page * batch + i) as u32))
            .collect(),
    };
    StepBatch {
        tokens: (0..batch)
            .map(|i| token(geometry, i + position * 257))
            .collect(),
        positions: vec![position as u32; batch],
        sequences: (0..batch).map(sequence).collect(),
        logits_rows: (0..batch as u32).collect(),
    }
}

fn prefill_batch(geometry: &ModelGeometry, rows: usize) -> StepBatch {
    StepBatch {
        tokens: (0..rows).map(|i| token(geometry, i)).collect(),
        positions: (0..rows as u32).collect(),
        sequences: vec![SequenceSpan {
            row_begin: 0,
            num_rows: rows as u32,
            block_table: (0..rows.div_ceil(KV_PAGE_TOKENS) as u32)
                .map(PageId)
                .collect(),
        }],
        logits_rows: vec![rows as u32 - 1],
    }
}

/// Weights of one layer's attention, of one expert, and of the LM head, in numbers.
fn weights(g: &ModelGeometry) -> [f64; 3] {
    let heads = (2 * g.num_heads + 2 * g.num_kv_heads) * g.head_dim;
    [heads * g.hidden, 3 * g.ff * g.hidden, g.vocab * g.hidden].map(|n| n as f64)
}

/// Bytes that a step cannot but read: weights once, of experts those that are likely to be chosen, and keys and values.
fn step_bytes(
    g: &ModelGeometry,
    bytes: WeightBytes,
    (rows, context): (usize, usize),
    logits: usize,
) -> f64 {
    let experts = g.num_experts as f64;
    let missed = (1.0 - g.top_k as f64 / experts).powi(rows as i32);
    let hit = experts * (1.0 - missed);
    let cached = rows * (context + 1) * 2 * g.num_kv_heads * g.head_dim * size_of::<u16>();
    let layer = (bytes.layer + cached) as f64 + hit * bytes.expert as f64;
    let head = if logits > 0 { bytes.head } else { 0 };
    g.num_layers as f64 * layer + head as f64
}

/// Multiplications and additions of a step; of attention those of a prompt's triangle.
fn step_flops(g: &ModelGeometry, rows: usize, context: usize, logits: usize) -> f64 {
    let [attention, expert, head] = weights(g);
    let seen = if context > 0 {
        (context + 1) as f64
    } else {
        (rows + 1) as f64 / 2.0
    };
    let scores = 2.0 * seen * (g.num_heads * g.head_dim) as f64;
    let row = g.num_layers as f64 * (attention + g.top_k as f64 * expert + scores);
    2.0 * (rows as f64 * row + logits as f64 * head)
}

impl Report {
    fn print(&self) -> std::io::Result<()> {
        output::line(&format!(
            "{} of {} layers, {} weights, sampling {}, on {} ({}); copy {:.0} GB/s\n",
            self.model,
            self.layers,
            self.weights,
            self.sampling,
            self.device,
            self.target,
            self.copy_gigabytes_per_second
        ))?;
        let head = [
            "KIND", "ROWS", "CONTEXT", "MS", "TOK/S", "GB/S", "OF COPY", "TFLOP/S",
        ];
        let row = |line: &Line| {
            vec![
                line.kind.to_owned(),
                line.rows.to_string(),
                line.context.to_string(),
                format!("{:.3}", line.step_ms),
                format!("{:.0}", line.tokens_per_second),
                format!("{:.0}", line.gigabytes_per_second),
                format!("{:.0} %", line.percent_of_copy),
                format!("{:.0}", line.teraflops),
            ]
        };
        let rows: Vec<Vec<String>> = self.lines.iter().map(row).collect();
        output::table(&head, &rows)
    }
}

impl BenchSampling {
    fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What is wanted of a logits row.
    fn wanted(self, row: usize) -> Wanted {
        match self {
            Self::Greedy => Wanted::Best,
            Self::Drawn => Wanted::Drawn(Multinomial {
                temperature: 1.0,
                min_p: 0.0,
                // Another number for each.
                uniform: (row * 7919 % 10_007) as f64 / 10_007.0,
            }),
            Self::Host => Wanted::Logits,
        }
    }
}

impl RandomShape {
    const fn name(self) -> &'static str {
        match self {
            Self::Mixtral8x7b => "mixtral-8x7b",
            Self::Mixtral8x22b => "mixtral-8x22b",
            Self::Mistral7b => "mistral-7b",
        }
    }

    fn geometry(self) -> ModelGeometry {
        let mixtral = ModelGeometry {
            hidden: 4096,
            num_layers: 32,
            num_heads: 32,
            num_kv_heads: 8,
            head_dim: 128,
            ff: 14_336,
            num_experts: 8,
            top_k: 2,
            vocab: 32_000,
            rope_theta: 1e6,
            rms_eps: 1e-5,
            sliding_window: None,
            max_positions: 32_768,
        };
        match self {
            Self::Mixtral8x7b => mixtral,
            Self::Mixtral8x22b => ModelGeometry {
                hidden: 6144,
                num_layers: 56,
                num_heads: 48,
                ff: 16_384,
                vocab: 32_768,
                ..mixtral
            },
            Self::Mistral7b => ModelGeometry {
                num_experts: 1,
                top_k: 1,
                ..mixtral
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of the published configurations: 41.94 M and 176.16 M weights, 12.75 B per token.
    #[test]
    fn bytes_of_a_step_are_those_of_the_model() {
        let g = RandomShape::Mixtral8x7b.geometry();
        let [attention, expert, head] = weights(&g);
        assert_eq!(
            (attention, expert, head),
            (41_943_040.0, 176_160_768.0, 131_072_000.0)
        );
        let [layer, expert, head] = [attention, expert, head].map(|n| 2 * n as usize);
        let bytes = WeightBytes {
            layer,
            expert,
            head,
        };
        let one = step_bytes(&g, bytes, (1, 0), 1) / 2.0;
        assert!((one / 1e9 - 12.75).abs() < 0.01, "{one}");
        let many = step_bytes(&g, bytes, (256, 0), 256) / 2.0;
        assert!((many / 1e9 - 46.6).abs() < 0.1, "{many}");
        assert!((step_flops(&g, 1, 0, 1) / 2e9 - 12.75).abs() < 0.01);
    }

    #[test]
    fn batches_fit_their_pages() {
        let g = RandomShape::Mistral7b.geometry();
        let batch = decode_batch(&g, 3, 130);
        let mut written = Vec::new();
        batch.check_written_pages(&mut written).unwrap();
        assert_eq!(written.len(), 3);
        assert_eq!(batch.sequences[0].block_table.len(), 3);
        prefill_batch(&g, 130)
            .check_written_pages(&mut written)
            .unwrap();
    }
}
