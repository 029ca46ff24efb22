//! Attention over the paged cache: decode against the bandwidth of its keys and values, prefill against f32 FMA.
//! Not a test of results.
//!
//! `cargo bench -p tramontane-compute-cpu --bench attention [-- THREADS]`. The matrices around attention are
//! thin (hidden 32), so that next to nothing else is measured.
#![expect(clippy::print_stdout, reason = "a table is what this program is for")]

use std::error::Error;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, DType,
    HostTensor, KV_PAGE_TOKENS, KvFormat, RoutedRows, RowOrder, SequenceSpan, StepBatch,
    WeightFormat,
};
use tramontane_compute_cpu::{CpuBackend, CpuConfig, Isa};
use tramontane_types::{LayerId, ModelGeometry, PageId};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// How long one figure is measured.
const MEASURE: Duration = Duration::from_millis(800);
/// Layers of the model: together their caches are far larger than the processor's.
const NUM_LAYERS: usize = 16;
/// Longest context.
const TOKENS_MAX: usize = 16_384;
/// Rows of one prefill step.
const CHUNK_ROWS: usize = 512;

/// The attention of a small Mixtral of 1.5 billion parameters.
fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: 32,
        num_layers: NUM_LAYERS,
        num_heads: 16,
        num_kv_heads: 4,
        head_dim: 64,
        ff: 32,
        num_experts: 1,
        top_k: 1,
        vocab: 32,
        rope_theta: 1e6,
        rms_eps: 1e-5,
        sliding_window: None,
        max_positions: TOKENS_MAX + CHUNK_ROWS,
    }
}

fn main() -> Outcome<()> {
    let threads = std::env::args()
        .filter_map(|arg| arg.parse().ok())
        .next()
        .or_else(|| std::thread::available_parallelism().ok())
        .unwrap_or(NonZeroUsize::MIN);
    println!("{} with {threads} threads", Isa::detect());
    for format in [KvFormat::F16, KvFormat::Q8] {
        let mut cached = Cached::new(threads, format)?;
        for context in [512, 1024, 4096, TOKENS_MAX] {
            cached.prefill_to(context)?;
            cached.decode(context)?;
        }
    }
    Ok(())
}

/// One sequence in the cache.
struct Cached {
    attention: Box<dyn Attention>,
    kv_format: KvFormat,
    routed: RoutedRows,
    len: usize,
}

impl Cached {
    fn new(threads: NonZeroUsize, kv_format: KvFormat) -> Outcome<Self> {
        let geometry = geometry();
        let config = CpuConfig { threads, isa: None };
        let backend = CpuBackend::new(&geometry, WeightFormat::Q8, config)?;
        let data = noise(geometry.num_heads * geometry.head_dim * geometry.hidden);
        let tensor = |rows: usize, cols: usize| HostTensor {
            dtype: DType::F32,
            rows,
            cols,
            order: RowOrder::default(),
            data: &data[..rows * cols * 4],
        };
        let (hidden, dim) = (geometry.hidden, geometry.head_dim);
        let layer = AttentionLayerWeights {
            input_norm: tensor(1, hidden),
            q: tensor(geometry.num_heads * dim, hidden),
            k: tensor(geometry.num_kv_heads * dim, hidden),
            v: tensor(geometry.num_kv_heads * dim, hidden),
            o: tensor(hidden, geometry.num_heads * dim),
            post_norm: tensor(1, hidden),
            gate: None,
        };
        let weights = AttentionWeights {
            embed: tensor(geometry.vocab, hidden),
            layers: vec![layer; geometry.num_layers],
            norm: tensor(1, hidden),
            lm_head: tensor(geometry.vocab, hidden),
        };
        let config = AttentionConfig {
            num_pages: geometry.max_positions.div_ceil(KV_PAGE_TOKENS),
            max_rows: CHUNK_ROWS,
            kv_format,
        };
        Ok(Self {
            attention: backend.attention(&weights, config)?,
            kv_format,
            routed: RoutedRows::default(),
            len: 0,
        })
    }

    /// One step of all layers; the seconds that attention took.
    fn step(&mut self, position: usize, num_rows: usize) -> Outcome<f64> {
        let num_pages = (position + num_rows).div_ceil(KV_PAGE_TOKENS);
        let batch = StepBatch {
            tokens: (0..num_rows as u32).map(|i| i * 7 % 32).collect(),
            positions: (position as u32..(position + num_rows) as u32).collect(),
            sequences: vec![SequenceSpan {
                row_begin: 0,
                num_rows: num_rows as u32,
                block_table: (0..num_pages as u32).map(PageId).collect(),
            }],
            logits_rows: vec![],
        };
        self.attention.begin(&batch)?;
        let begin = Instant::now();
        for layer in 0..NUM_LAYERS as u16 {
            self.attention
                .attend(LayerId(layer), &batch, &mut self.routed)?;
        }
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Fills the cache up to `len` and shows the last chunk's speed.
    fn prefill_to(&mut self, len: usize) -> Outcome<()> {
        let mut seconds = 0.0;
        while self.len < len {
            seconds = self.step(self.len, CHUNK_ROWS)?;
            self.len += CHUNK_ROWS;
        }
        let geometry = geometry();
        let seen = (len - CHUNK_ROWS / 2) * CHUNK_ROWS;
        let ops = 4.0 * (seen * geometry.num_heads * geometry.head_dim * NUM_LAYERS) as f64;
        println!(
            "{} prefill {CHUNK_ROWS} up to {len:>5}: {:>8.2} ms, {:>7.1} us a token, {:>5.0} Gop/s",
            self.kv_format,
            seconds * 1e3,
            seconds * 1e6 / CHUNK_ROWS as f64,
            ops / seconds / 1e9
        );
        Ok(())
    }

    fn decode(&mut self, context: usize) -> Outcome<()> {
        let mut times = Vec::new();
        let begin = Instant::now();
        while begin.elapsed() < MEASURE {
            times.push(self.step(context - 1, 1)?);
        }
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let geometry = geometry();
        let (dim, format) = (geometry.head_dim, self.kv_format);
        let head_page = format.key_bytes(dim) + format.value_bytes(dim);
        let pages = context.div_ceil(KV_PAGE_TOKENS) * geometry.num_kv_heads * NUM_LAYERS;
        let bytes = (head_page * pages) as f64;
        println!(
            "{format:<4} decode at {context:>5}:         {:>8.3} ms, {:>5.1} GB/s",
            seconds * 1e3,
            bytes / seconds / 1e9
        );
        Ok(())
    }
}

/// Numbers between -0.5 and 0.5.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252_u64;
    let mut bytes = Vec::with_capacity(4 * len);
    for _ in 0..len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let x = (state >> 40) as f32 / (1 << 24) as f32 - 0.5;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}
