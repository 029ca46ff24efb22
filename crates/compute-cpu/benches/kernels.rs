//! How near the kernels come to the machine: experts by rows and format, then whole steps. Not a test of results.
//!
//! `cargo bench -p tramontane-compute-cpu --bench kernels [-- [THREADS] [bf16 q8 q4] [experts steps] ['prefill 512' ..]]`:
//! what is not named is left out where anything of its kind is. Weights are random and more than the caches hold.
#![expect(clippy::print_stdout, reason = "a table is what this program is for")]

use std::error::Error;
use std::num::NonZeroUsize;
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, Contributions,
    DType, ExpertJob, ExpertSum, ExpertWeights, Experts, HostTensor, KvFormat, Piece, RoutedRows,
    RowFormat, SequenceSpan, StepBatch, WeightFormat,
};
use tramontane_compute_cpu::{CpuBackend, CpuConfig, Isa};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, Node, PageId, SegmentRange};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long one figure is measured.
const MEASURE: Duration = Duration::from_millis(1_000);
/// Bytes read by the bandwidth figure.
const BANDWIDTH_BYTES: usize = 512 << 20;
/// How many reads that is.
const BANDWIDTH_PARTS: usize = 32;
const FORMATS: [WeightFormat; 3] = [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4];

/// Steps of the whole model: name, sequences, first position, rows of each.
const STEPS: [(&str, u32, u32, u32); 5] = [
    ("prefill 512", 1, 0, 512),
    ("decode 1 at 128", 1, 128, 1),
    ("decode 1 at 4000", 1, 4000, 1),
    ("decode 8 at 128", 8, 128, 1),
    ("decode 32 at 128", 32, 128, 1),
];

/// A small Mixtral of 1.5 billion parameters.
fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: 1024,
        num_layers: 16,
        num_heads: 16,
        num_kv_heads: 4,
        head_dim: 64,
        ff: 3584,
        num_experts: 8,
        top_k: 2,
        vocab: 32_000,
        rope_theta: 1e6,
        rms_eps: 1e-5,
        sliding_window: None,
        max_positions: 4096,
    }
}

fn main() -> Outcome<()> {
    let threads = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .next()
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN);
    let formats = FORMATS
        .into_iter()
        .filter(|f| is_asked(&f.to_string(), &["bf16", "q8", "q4"]));
    let formats: Vec<WeightFormat> = formats.collect();
    let tables = ["experts", "steps"].map(|table| is_asked(table, &["experts", "steps"]));
    let bandwidth = read_bandwidth(threads.get());
    println!("{} with {threads} threads", Isa::detect());
    println!("read bandwidth {bandwidth:.1} GB/s\n");
    let noise = Noise::new();
    println!("one expert, hidden 1024 x ff 3584, GB/s, of read, Gop/s");
    for isa in Isa::ALL {
        // Plain Rust is the specification and not meant to be fast.
        if !tables[0] || !isa.is_supported() || isa == Isa::Scalar {
            continue;
        }
        for &format in &formats {
            let backend = backend(&experts_geometry(), format, threads, Some(isa))?;
            experts_table(&noise, &format!("{isa} {format}"), &backend, bandwidth)?;
        }
    }
    println!("\nsteps of the whole model");
    for format in formats.into_iter().filter(|_| tables[1]) {
        model_table(&noise, format, threads)?;
    }
    Ok(())
}

/// Whether an argument names `what`, or none names any of `all`.
fn is_asked(what: &str, all: &[&str]) -> bool {
    let named = |name: &str| std::env::args().any(|arg| arg == name);
    named(what) || !all.iter().any(|name| named(name))
}

/// Calls `work` until the time is up and returns the shortest run, after one to warm up.
fn shortest(mut work: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
    work()?;
    let begin = Instant::now();
    let mut best = f64::MAX;
    while begin.elapsed() < MEASURE {
        let run = Instant::now();
        work()?;
        best = best.min(run.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// The fastest of many short reads, each of memory that was not read lately; all threads start together.
fn read_bandwidth(threads: usize) -> f64 {
    let data = vec![1_u64; BANDWIDTH_BYTES / 8];
    let parts: Vec<&[u64]> = data.chunks(data.len() / BANDWIDTH_PARTS).collect();
    let start = Barrier::new(threads);
    let seconds: Vec<Vec<f64>> = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..threads)
            .map(|thread| {
                let (parts, start) = (&parts, &start);
                scope.spawn(move || {
                    let mut seconds = Vec::new();
                    for part in parts.iter().cycle().take(4 * BANDWIDTH_PARTS) {
                        let len = part.len().div_ceil(threads);
                        let own = part.chunks(len).nth(thread).unwrap_or_default();
                        start.wait();
                        let begin = Instant::now();
                        std::hint::black_box(sum_of(own));
                        seconds.push(begin.elapsed().as_secs_f64());
                    }
                    seconds
                })
            })
            .collect();
        let read = readers.into_iter().filter_map(|reader| reader.join().ok());
        read.collect()
    });
    let slowest = |run: usize| seconds.iter().map(|s| s[run]).fold(0.0, f64::max);
    let best = (0..4 * BANDWIDTH_PARTS)
        .map(slowest)
        .fold(f64::MAX, f64::min);
    (BANDWIDTH_BYTES / BANDWIDTH_PARTS) as f64 / best / 1e9
}

fn sum_of(data: &[u64]) -> [u64; 32] {
    let mut sums = [0_u64; 32];
    for line in data.as_chunks::<32>().0 {
        for (sum, x) in sums.iter_mut().zip(line) {
            *sum = sum.wrapping_add(*x);
        }
    }
    sums
}

/// One buffer of random bf16 that every tensor is cut from.
struct Noise(Vec<u8>);

impl Noise {
    fn new() -> Self {
        let mut state = 88_172_645_463_325_252_u64;
        let mut bytes = Vec::new();
        for _ in 0..32_000 * 1024 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // Sign, exponent of 2^-5, random mantissa: 0.03 to 0.06.
            let bits = ((state >> 48) as u16 & 0x807f) | 0x3d00;
            bytes.extend_from_slice(&bits.to_le_bytes());
        }
        Self(bytes)
    }

    fn tensor(&self, rows: usize, cols: usize) -> HostTensor<'_> {
        HostTensor {
            dtype: DType::Bf16,
            rows,
            cols,
            order: Default::default(),
            data: &self.0[..rows * cols * 2],
        }
    }

    /// Other numbers than those of [`tensor`](Self::tensor), of both signs: rows of a gate that prefer different experts.
    fn rest(&self, rows: usize, cols: usize) -> HostTensor<'_> {
        let end = self.0.len();
        HostTensor {
            data: &self.0[end - rows * cols * 2..],
            ..self.tensor(rows, cols)
        }
    }

    fn load_experts(
        &self,
        geometry: &ModelGeometry,
        backend: &CpuBackend,
    ) -> Outcome<Arc<dyn Experts>> {
        let experts = backend.experts();
        let up = self.tensor(geometry.ff, geometry.hidden);
        let weights = ExpertWeights {
            w1: up,
            w2: self.tensor(geometry.hidden, geometry.ff),
            w3: up,
        };
        for layer in 0..geometry.num_layers {
            for expert in 0..geometry.num_experts {
                let slice = ExpertSlice {
                    layer: LayerId(layer as u16),
                    expert: ExpertId(expert as u16),
                    range: SegmentRange::WHOLE,
                };
                experts.load(slice, &weights)?;
            }
        }
        Ok(experts)
    }
}

fn backend(
    geometry: &ModelGeometry,
    format: WeightFormat,
    threads: NonZeroUsize,
    isa: Option<Isa>,
) -> Outcome<CpuBackend> {
    let config = CpuConfig { threads, isa };
    Ok(CpuBackend::new(geometry, format, config)?)
}

/// One layer of many experts: more than the largest caches hold, of which servers have half a gigabyte.
fn experts_geometry() -> ModelGeometry {
    ModelGeometry {
        num_layers: 1,
        num_experts: 96,
        ..geometry()
    }
}

/// Rows in their wire form, of numbers that are neither tiny nor all the same.
fn wire_rows(format: RowFormat, num_rows: usize, cols: usize) -> Vec<u8> {
    let mut row = vec![0; format.row_bytes(cols)];
    let (values, scales) = match format {
        RowFormat::Q8 => row.split_at_mut(cols.next_multiple_of(32)),
        RowFormat::Bf16 | RowFormat::F32 => (&mut row[..], &mut [][..]),
    };
    for (i, pair) in values.as_chunks_mut::<2>().0.iter_mut().enumerate() {
        // As bfloat16 1.0 to 1.9; as bytes, 63 and changing ones.
        *pair = [128 | (i * 37 % 128) as u8, 63];
    }
    for scale in scales.as_chunks_mut::<4>().0 {
        *scale = 0.01_f32.to_le_bytes();
    }
    row.repeat(num_rows)
}

fn experts_table(noise: &Noise, name: &str, backend: &CpuBackend, bandwidth: f64) -> Outcome<()> {
    let geometry = experts_geometry();
    let begin = Instant::now();
    let experts = noise.load_experts(&geometry, backend)?;
    let expert_bytes = backend.segment_bytes() as f64 * 8.0;
    let load_seconds = begin.elapsed().as_secs_f64() / geometry.num_experts as f64;
    for num_rows in [1, 2, 4, 8, 16, 32, 128, 512] {
        let rows = wire_rows(backend.row_format(), num_rows, geometry.hidden);
        let row_ids: Vec<u32> = (0..num_rows as u32).collect();
        let mut out = Vec::new();
        let mut next = 0_u16;
        // One expert after another, so that none comes from the caches.
        let seconds = shortest(|| {
            let job = ExpertJob {
                expert: ExpertId(next % geometry.num_experts as u16),
                range: SegmentRange::WHOLE,
                row_ids: &row_ids,
            };
            next = next.wrapping_add(1);
            experts.compute(LayerId(0), &rows, num_rows, &[job], &mut out)?;
            Ok(())
        })?;
        let rate = expert_bytes / seconds / 1e9;
        let ops = 6.0 * (geometry.hidden * geometry.ff * num_rows) as f64 / seconds / 1e9;
        println!(
            "{name:<16} {num_rows:>4} rows {:>8.0} us {:>12.1}   {:>5.0} %   {ops:>8.0}",
            seconds * 1e6,
            rate,
            100.0 * rate / bandwidth
        );
    }
    println!("      packing {:.0} ms an expert", load_seconds * 1e3);
    Ok(())
}

/// A worker that has everything.
struct Model {
    geometry: ModelGeometry,
    attention: Box<dyn Attention>,
    experts: Arc<dyn Experts>,
    routed: RoutedRows,
    out: Vec<f32>,
    logits: Vec<f32>,
    /// Time in attend, experts, combine, logits.
    seconds: [f64; 4],
}

impl Model {
    fn new(noise: &Noise, backend: &CpuBackend) -> Outcome<Self> {
        let geometry = geometry();
        let (hidden, head_dim) = (geometry.hidden, geometry.head_dim);
        let (q, kv) = (
            geometry.num_heads * head_dim,
            geometry.num_kv_heads * head_dim,
        );
        let layer = AttentionLayerWeights {
            input_norm: noise.tensor(1, hidden),
            q: noise.tensor(q, hidden),
            k: noise.tensor(kv, hidden),
            v: noise.tensor(kv, hidden),
            o: noise.tensor(hidden, q),
            post_norm: noise.tensor(1, hidden),
            gate: Some(noise.rest(geometry.num_experts, hidden)),
        };
        let weights = AttentionWeights {
            embed: noise.tensor(geometry.vocab, hidden),
            layers: vec![layer; geometry.num_layers],
            norm: noise.tensor(1, hidden),
            lm_head: noise.tensor(geometry.vocab, hidden),
        };
        let config = AttentionConfig {
            num_pages: 256,
            max_rows: 512,
            kv_format: KvFormat::F16,
        };
        Ok(Self {
            attention: backend.attention(&weights, config)?,
            experts: noise.load_experts(&geometry, backend)?,
            geometry,
            routed: RoutedRows::default(),
            out: Vec::new(),
            logits: Vec::new(),
            seconds: [0.0; 4],
        })
    }

    fn step(&mut self, batch: &StepBatch) -> Outcome<()> {
        self.attention.begin(batch)?;
        for layer in 0..self.geometry.num_layers as u16 {
            let layer = LayerId(layer);
            let begin = Instant::now();
            self.attention.attend(layer, batch, &mut self.routed)?;
            self.seconds[0] += begin.elapsed().as_secs_f64();
            self.exchange(layer)?;
        }
        let begin = Instant::now();
        self.attention.logits(batch, &mut self.logits)?;
        self.seconds[3] += begin.elapsed().as_secs_f64();
        Ok(())
    }

    fn exchange(&mut self, layer: LayerId) -> Outcome<()> {
        let begin = Instant::now();
        let (top_k, hidden) = (self.geometry.top_k, self.geometry.hidden);
        let mut rows = vec![vec![]; self.geometry.num_experts];
        let mut places = Vec::new();
        for (i, id) in self.routed.topk_ids.iter().enumerate() {
            let rows = &mut rows[usize::from(id.0)];
            places.push((usize::from(id.0), rows.len()));
            rows.push((i / top_k) as u32);
        }
        let mut offsets = vec![0];
        for rows in &rows {
            offsets.push(offsets[offsets.len() - 1] + rows.len() * hidden);
        }
        let job = |(expert, row_ids)| ExpertJob {
            expert: ExpertId(expert as u16),
            range: SegmentRange::WHOLE,
            row_ids,
        };
        let jobs: Vec<ExpertJob<'_>> = rows
            .iter()
            .map(Vec::as_slice)
            .enumerate()
            .map(job)
            .collect();
        let num_rows = self.routed.num_rows;
        self.experts
            .compute(layer, &self.routed.rows, num_rows, &jobs, &mut self.out)?;
        self.seconds[1] += begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        let pieces: Vec<Piece> = places
            .iter()
            .map(|&(expert, at)| Piece {
                node: Node::ROOT,
                buffer: 0,
                offset: offsets[expert] + at * hidden,
            })
            .collect();
        let sums: Vec<ExpertSum> = (0..places.len() as u32)
            .map(|i| ExpertSum {
                row: i / top_k as u32,
                weight: self.routed.topk_weights[i as usize],
                pieces: i..i + 1,
            })
            .collect();
        let contributions = Contributions {
            buffers: &[&self.out],
            pieces: &pieces,
            sums: &sums,
            num_segments: geometry().num_segments(),
        };
        self.attention.combine(layer, &contributions)?;
        self.seconds[2] += begin.elapsed().as_secs_f64();
        Ok(())
    }
}

/// A batch of `num_sequences` sequences, each with `num_rows` rows from `position` on.
fn batch(num_sequences: u32, position: u32, num_rows: u32) -> StepBatch {
    let mut batch = StepBatch::default();
    for s in 0..num_sequences {
        let num_pages = (position + num_rows).div_ceil(64);
        batch.sequences.push(SequenceSpan {
            row_begin: s * num_rows,
            num_rows,
            block_table: (0..num_pages).map(|p| PageId(s * num_pages + p)).collect(),
        });
        for i in 0..num_rows {
            batch.tokens.push((s * 977 + i * 131 + position) % 32_000);
            batch.positions.push(position + i);
        }
        batch.logits_rows.push((s + 1) * num_rows - 1);
    }
    batch
}

fn model_table(noise: &Noise, format: WeightFormat, threads: NonZeroUsize) -> Outcome<()> {
    let backend = backend(&geometry(), format, threads, None)?;
    let mut model = Model::new(noise, &backend)?;
    for (name, num_sequences, position, num_rows) in STEPS {
        if !is_asked(name, &STEPS.map(|step| step.0)) {
            continue;
        }
        let mut batch = batch(num_sequences, position, num_rows);
        let mut split = [0.0; 4];
        let mut best = f64::MAX;
        let mut total = (0.0, 0);
        shortest(|| {
            // Other tokens go to other experts, or the same ones would stay in the caches.
            for token in &mut batch.tokens {
                *token = (*token + 7_919) % model.geometry.vocab as u32;
            }
            model.seconds = [0.0; 4];
            let begin = Instant::now();
            model.step(&batch)?;
            let seconds = begin.elapsed().as_secs_f64();
            total = (total.0 + seconds, total.1 + 1);
            if seconds < best {
                best = seconds;
                split = model.seconds;
            }
            Ok(())
        })?;
        let rate = batch.num_rows() as f64 / best;
        let [attend, experts, combine, logits] = split.map(|s| s * 1e3);
        let mean = batch.num_rows() as f64 * f64::from(total.1) / total.0;
        println!(
            "{format:<5} {name:<17} {mean:>7.1} tok/s; best step {rate:.1}: {:.2} ms = attend {attend:.2} + experts \
             {experts:.2} + combine {combine:.2} + logits {logits:.2}",
            best * 1e3
        );
    }
    Ok(())
}
