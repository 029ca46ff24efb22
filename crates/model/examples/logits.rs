//! Writes the logits of every position of a text, for `bench/quality.py`. Samples nothing, scores nothing.
//!
//! ```text
//! logits --model DIR --weights f32|bf16|q8|q4 --tokens IDS [--window 512] [--threads 2] [--kv f16|q8]
//!        [--attention q8|q4|e4m3] [--experts q8|q4|e4m3] [--head q8|q4] >LOGITS
//! ```
//! IDS holds token ids, u32 little-endian. Every window of them is a prompt of its own, computed in one step.
//! LOGITS becomes `[num_tokens, vocab]`, f32 little-endian.
//!
//! With `--weights f32` the last three options round the weights of a part to that format first. The reference
//! then computes with them in f32: what the weights alone cost, without the rounding of rows, keys and values.

use std::error::Error;
use std::io::{BufWriter, Write as _};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use tramontane_compute::quant::{self, BLOCK};
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Backend, Contributions, DType, ExpertJob,
    ExpertSum, ExpertWeights, Experts, HostTensor, KV_PAGE_TOKENS, KvFormat, Piece, RoutedRows,
    RowOrder, SequenceSpan, StepBatch, WeightFormat,
};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_model::{Checkpoint, load_slices};
use tramontane_types::{
    ExpertId, ExpertSlice, LayerId, ModelGeometry, PageId, SegmentRange, TokenId,
};

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let options = Options::parse(std::env::args().skip(1))?;
    let checkpoint = Checkpoint::open(&options.model)?;
    let mut driver = Driver::new(&checkpoint, &options)?;
    let ids = std::fs::read(&options.tokens)?;
    let tokens: Vec<TokenId> = ids
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let mut out = BufWriter::new(std::io::stdout().lock());
    for window in tokens.chunks(options.window.get()) {
        for logit in driver.step(window)? {
            out.write_all(&logit.to_le_bytes())?;
        }
    }
    Ok(out.flush()?)
}

struct Options {
    model: PathBuf,
    tokens: PathBuf,
    weights: WeightFormat,
    window: NonZeroUsize,
    threads: NonZeroUsize,
    kv: KvFormat,
    attention: Rounding,
    experts: Rounding,
    head: Rounding,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Outcome<Self> {
        let two = NonZeroUsize::MIN.saturating_add(1);
        let mut options = Self {
            model: PathBuf::new(),
            tokens: PathBuf::new(),
            weights: WeightFormat::F32,
            window: NonZeroUsize::MIN.saturating_add(511),
            threads: two,
            kv: KvFormat::F16,
            attention: Rounding(None),
            experts: Rounding(None),
            head: Rounding(None),
        };
        while let Some(key) = args.next() {
            let value = args.next().ok_or_else(|| format!("{key} has no value"))?;
            match key.as_str() {
                "--model" => options.model = value.into(),
                "--tokens" => options.tokens = value.into(),
                "--weights" => options.weights = value.parse()?,
                "--window" => options.window = value.parse()?,
                "--threads" => options.threads = value.parse()?,
                "--kv" => options.kv = value.parse()?,
                "--attention" => options.attention = Rounding(Some(value.parse()?)),
                "--experts" => options.experts = Rounding(Some(value.parse()?)),
                "--head" => options.head = Rounding(Some(value.parse()?)),
                _ => return Err(format!("no option {key}").into()),
            }
        }
        let parts = [&options.attention, &options.experts, &options.head];
        if options.weights != WeightFormat::F32 && parts.iter().any(|part| part.0.is_some()) {
            return Err("--attention, --experts and --head want --weights f32".into());
        }
        Ok(options)
    }

    fn backend(&self, geometry: &ModelGeometry) -> Outcome<Box<dyn Backend>> {
        if self.weights == WeightFormat::F32 {
            return Ok(Box::new(ReferenceBackend::new(geometry)));
        }
        let config = CpuConfig {
            threads: self.threads,
            isa: None,
        };
        Ok(Box::new(CpuBackend::new(geometry, self.weights, config)?))
    }
}

/// To which format weights are rounded before the reference sees them; `None` leaves them as they are.
#[derive(Clone, Copy)]
struct Rounding(Option<WeightFormat>);

impl Rounding {
    /// The rounded tensor as f32 bytes.
    fn apply(self, tensor: &HostTensor<'_>) -> Vec<u8> {
        if self.0 == Some(WeightFormat::E4m3) {
            return whole_rows_as_e4m3(tensor);
        }
        let mut bytes = Vec::with_capacity(tensor.rows * tensor.cols * 4);
        for row in 0..tensor.rows {
            for begin in (0..tensor.cols).step_by(BLOCK) {
                let mut block = [0.0; BLOCK];
                tensor.read_row(row, begin, &mut block);
                let rounded = self.block(&block);
                let len = BLOCK.min(tensor.cols - begin);
                bytes.extend(rounded[..len].iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        bytes
    }

    fn block(self, block: &[f32; BLOCK]) -> [f32; BLOCK] {
        match self.0 {
            Some(WeightFormat::Q8) => {
                let quant::Q8Block { q, scale } = quant::q8_weights(block);
                q.map(|q| f32::from(q) * scale.to_f32())
            }
            Some(WeightFormat::Q4) => {
                let quant::Q4Block { q, scale, min } = quant::q4_weights(block);
                q.map(|q| f32::from(q).mul_add(scale.to_f32(), min.to_f32()))
            }
            _ => *block,
        }
    }
}

/// Each row with one scale; the backend has one for each of up to eight parts of a row.
fn whole_rows_as_e4m3(tensor: &HostTensor<'_>) -> Vec<u8> {
    let mut values = tensor.to_f32();
    values
        .chunks_exact_mut(tensor.cols)
        .for_each(quant::round_to_e4m3);
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// `tensor` with other bytes.
fn with_bytes<'a>(tensor: &HostTensor<'_>, bytes: &'a [u8]) -> HostTensor<'a> {
    HostTensor {
        dtype: DType::F32,
        rows: tensor.rows,
        cols: tensor.cols,
        order: RowOrder::Plain,
        data: bytes,
    }
}

/// A model on one machine, one step at a time.
struct Driver {
    geometry: ModelGeometry,
    attention: Box<dyn Attention>,
    experts: Arc<dyn Experts>,
}

impl Driver {
    fn new(checkpoint: &Checkpoint, options: &Options) -> Outcome<Self> {
        let geometry = checkpoint.geometry().clone();
        let backend = options.backend(&geometry)?;
        let sizes = AttentionConfig {
            num_pages: options.window.get().div_ceil(KV_PAGE_TOKENS),
            max_rows: options.window.get(),
            kv_format: options.kv,
        };
        let bytes = checkpoint.attention_weights()?;
        let attention = rounded_attention(&bytes.weights(), options, |weights| {
            Ok(backend.attention(weights, sizes)?)
        })?;
        let experts = backend.experts();
        load_experts(checkpoint, &*experts, options.experts)?;
        Ok(Self {
            geometry,
            attention,
            experts,
        })
    }

    /// Logits of every token of a prompt, `[tokens.len(), vocab]`.
    fn step(&mut self, tokens: &[TokenId]) -> Outcome<Vec<f32>> {
        let num_rows = u32::try_from(tokens.len())?;
        let num_pages = u32::try_from(tokens.len().div_ceil(KV_PAGE_TOKENS))?;
        let batch = StepBatch {
            tokens: tokens.to_vec(),
            positions: (0..num_rows).collect(),
            sequences: vec![SequenceSpan {
                row_begin: 0,
                num_rows,
                block_table: (0..num_pages).map(PageId).collect(),
            }],
            logits_rows: (0..num_rows).collect(),
        };
        let mut routed = RoutedRows::default();
        self.attention.begin(&batch)?;
        for layer in (0..u16::try_from(self.geometry.num_layers)?).map(LayerId) {
            self.attention.attend(layer, &batch, &mut routed)?;
            self.mix(layer, &routed)?;
        }
        let mut logits = Vec::new();
        self.attention.logits(&batch, &mut logits)?;
        Ok(logits)
    }

    /// Computes the chosen experts of every row and adds them.
    fn mix(&mut self, layer: LayerId, routed: &RoutedRows) -> Outcome<()> {
        let (top_k, hidden) = (self.geometry.top_k, self.geometry.hidden);
        let num_segments = self.geometry.num_segments();
        let mut row_ids = vec![Vec::new(); self.geometry.num_experts];
        // Where the answer for each (row, expert) begins, in rows of one expert.
        let mut places = Vec::with_capacity(routed.topk_ids.len());
        for (i, &ExpertId(expert)) in routed.topk_ids.iter().enumerate() {
            let rows = &mut row_ids[usize::from(expert)];
            places.push((usize::from(expert), rows.len()));
            rows.push(u32::try_from(i / top_k)?);
        }
        let jobs: Vec<ExpertJob<'_>> = (0..)
            .zip(&row_ids)
            .map(|(expert, row_ids)| ExpertJob {
                expert: ExpertId(expert),
                range: SegmentRange::WHOLE,
                row_ids,
            })
            .collect();
        let mut answer = Vec::new();
        let (rows, num_rows) = (&routed.rows, routed.num_rows);
        self.experts
            .compute(layer, rows, num_rows, &jobs, &mut answer)?;
        let first_of = |expert: usize| row_ids[..expert].iter().map(Vec::len).sum::<usize>();
        let nodes: Vec<_> = SegmentRange::WHOLE.nodes(num_segments).collect();
        let (mut pieces, mut sums) = (Vec::new(), Vec::new());
        for (i, (expert, at)) in places.into_iter().enumerate() {
            let begin = u32::try_from(pieces.len())?;
            let first = (first_of(expert) + at) * nodes.len();
            pieces.extend((first..).zip(&nodes).map(|(vector, &node)| Piece {
                node,
                buffer: 0,
                offset: vector * hidden,
            }));
            sums.push(ExpertSum {
                row: u32::try_from(i / top_k)?,
                weight: routed.topk_weights[i],
                pieces: begin..u32::try_from(pieces.len())?,
            });
        }
        let contributions = Contributions {
            buffers: &[&answer],
            pieces: &pieces,
            sums: &sums,
            num_segments,
        };
        Ok(self.attention.combine(layer, &contributions)?)
    }
}

/// Calls `pack` with the attention weights, rounded as the options say.
fn rounded_attention<T>(
    weights: &AttentionWeights<'_>,
    options: &Options,
    pack: impl FnOnce(&AttentionWeights<'_>) -> Outcome<T>,
) -> Outcome<T> {
    if options.attention.0.is_none() && options.head.0.is_none() {
        return pack(weights);
    }
    let head = options.head.apply(&weights.lm_head);
    let matrices: Vec<[Vec<u8>; 4]> = weights
        .layers
        .iter()
        .map(|l| [l.q, l.k, l.v, l.o].map(|tensor| options.attention.apply(&tensor)))
        .collect();
    let mut rounded = weights.clone();
    rounded.lm_head = with_bytes(&weights.lm_head, &head);
    for (layer, [q, k, v, o]) in rounded.layers.iter_mut().zip(&matrices) {
        layer.q = with_bytes(&layer.q, q);
        layer.k = with_bytes(&layer.k, k);
        layer.v = with_bytes(&layer.v, v);
        layer.o = with_bytes(&layer.o, o);
    }
    pack(&rounded)
}

/// Loads every expert whole.
fn load_experts(checkpoint: &Checkpoint, experts: &dyn Experts, rounding: Rounding) -> Outcome<()> {
    let geometry = checkpoint.geometry();
    let mut slices = Vec::new();
    for layer in (0..u16::try_from(geometry.num_layers)?).map(LayerId) {
        for expert in (0..u16::try_from(geometry.num_experts)?).map(ExpertId) {
            slices.push(ExpertSlice {
                layer,
                expert,
                range: SegmentRange::WHOLE,
            });
        }
    }
    if rounding.0.is_none() {
        return Ok(load_slices(checkpoint, experts, &slices, &|_, _| {})?);
    }
    for slice in slices {
        let bytes = checkpoint.expert_weights(slice.layer, slice.expert, slice.range)?;
        let plain = bytes.weights();
        let [w1, w2, w3] = [plain.w1, plain.w2, plain.w3].map(|tensor| rounding.apply(&tensor));
        let weights = ExpertWeights {
            w1: with_bytes(&plain.w1, &w1),
            w2: with_bytes(&plain.w2, &w2),
            w3: with_bytes(&plain.w3, &w3),
        };
        experts.load(slice, &weights)?;
    }
    Ok(())
}
