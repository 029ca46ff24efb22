//! A small model with random weights, and a driver that runs it step by step on any backend. Asserts nothing of its own.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

pub(crate) mod devices;

use std::sync::Arc;

use half::bf16;
use tramontane_compute::quant::{self, BLOCK};
use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, Contributions,
    DType, Error, ExpertJob, ExpertSum, ExpertWeights, Experts, HostTensor, KvFormat, Piece,
    RoutedRows, SequenceSpan, StepBatch, StepOutputs, Wanted, WeightFormat,
};
use tramontane_types::{
    ExpertId, ExpertSlice, LayerId, ModelGeometry, PageId, SegmentRange, slice,
};

pub(crate) const NUM_PAGES: usize = 64;
pub(crate) const ATTENTION: AttentionConfig = AttentionConfig {
    num_pages: NUM_PAGES,
    max_rows: 600,
    kv_format: KvFormat::F16,
};

/// Odd on purpose: columns that fill no block, seven segments of which the last is short, a window that
/// ends inside a page.
pub(crate) fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: 72,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 24,
        ff: 200,
        num_experts: 4,
        top_k: 2,
        vocab: 75,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: Some(100),
        max_positions: 2048,
    }
}

fn noise(seed: u64, len: usize, scale: f32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(4 * len);
    for _ in 0..len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let x = ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale;
        // A number of bf16: the reference has the same weights.
        let x = bf16::from_f32(x).to_f32();
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

struct Owned {
    rows: usize,
    cols: usize,
    data: Vec<u8>,
}

impl Owned {
    fn new(seed: u64, rows: usize, cols: usize) -> Self {
        let scale = 2.0 / (cols as f32).sqrt();
        let data = noise(seed, rows * cols, scale);
        Self { rows, cols, data }
    }

    /// Rounds each row, so many columns at a time.
    fn round(&mut self, round: fn(&mut [f32]), cols: usize) {
        let numbers = self.data.as_chunks::<4>().0;
        let mut values: Vec<f32> = numbers.iter().map(|b| f32::from_le_bytes(*b)).collect();
        for row in values.chunks_exact_mut(self.cols) {
            row.chunks_mut(cols).for_each(round);
        }
        self.data = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    }

    fn view(&self) -> HostTensor<'_> {
        HostTensor {
            dtype: DType::F32,
            rows: self.rows,
            cols: self.cols,
            order: Default::default(),
            data: &self.data,
        }
    }
}

fn e4m3(part: &mut [f32]) {
    quant::round_to_e4m3(part);
}

/// A block as the kernels have it: scale and minimum as bf16, and the number too.
fn q4(block: &mut [f32]) {
    let mut whole = [0.0; BLOCK];
    whole[..block.len()].copy_from_slice(block);
    let quant::Q4Block { q, scale, min } = quant::q4_weights(&whole);
    let [scale, min] = [scale, min].map(|x| bf16::from_f32(x.to_f32()).to_f32());
    for (x, q) in block.iter_mut().zip(q) {
        *x = bf16::from_f32(f32::from(q).mul_add(scale, min)).to_f32();
    }
}

/// The tensors of a checkpoint, by layer.
pub(crate) struct Checkpoint {
    geometry: ModelGeometry,
    embed: Owned,
    norm: Owned,
    lm_head: Owned,
    /// input norm, q, k, v, o, post norm, gate.
    layers: Vec<[Owned; 7]>,
    /// w1, w2, w3 by layer and expert.
    experts: Vec<[Owned; 3]>,
}

impl Checkpoint {
    pub(crate) fn new(geometry: ModelGeometry) -> Self {
        let g = &geometry;
        let (q, kv) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        let layer = |l: u64| {
            [
                Owned::new(100 * l + 1, 1, g.hidden),
                Owned::new(100 * l + 2, q, g.hidden),
                Owned::new(100 * l + 3, kv, g.hidden),
                Owned::new(100 * l + 4, kv, g.hidden),
                Owned::new(100 * l + 5, g.hidden, q),
                Owned::new(100 * l + 6, 1, g.hidden),
                Owned::new(100 * l + 7, g.num_experts, g.hidden),
            ]
        };
        let expert = |e: u64| {
            [
                Owned::new(5000 + 10 * e, g.ff, g.hidden),
                Owned::new(5001 + 10 * e, g.hidden, g.ff),
                Owned::new(5002 + 10 * e, g.ff, g.hidden),
            ]
        };
        Self {
            embed: Owned::new(1, g.vocab, g.hidden),
            norm: Owned::new(2, 1, g.hidden),
            lm_head: Owned::new(3, g.vocab, g.hidden),
            layers: (1..=g.num_layers as u64).map(layer).collect(),
            experts: (0..(g.num_layers * g.num_experts) as u64)
                .map(expert)
                .collect(),
            geometry,
        }
    }

    /// With weights that were rounded as the CUDA backend packs them: what the reference computes with is then the same.
    pub(crate) fn rounded(geometry: ModelGeometry, format: WeightFormat) -> Self {
        let mut checkpoint = Self::new(geometry);
        let dense = |owned: &mut Owned| owned.round(e4m3, slice::segment_len(owned.cols));
        let round = |w1: &mut Owned, w2: &mut Owned, w3: &mut Owned| match format {
            WeightFormat::E4m3 => {
                w1.round(e4m3, w1.cols);
                w3.round(e4m3, w3.cols);
                w2.round(e4m3, slice::segment_len(w2.cols));
            }
            WeightFormat::Q4 => [w1, w2, w3].into_iter().for_each(|w| w.round(q4, BLOCK)),
            _ => {}
        };
        if format == WeightFormat::E4m3 {
            for [_, q, k, v, o, ..] in &mut checkpoint.layers {
                [q, k, v, o].into_iter().for_each(dense);
            }
        }
        for [w1, w2, w3] in &mut checkpoint.experts {
            round(w1, w2, w3);
        }
        checkpoint
    }

    /// Fills one token's row of the LM head.
    pub(crate) fn set_lm_head(&mut self, id: usize, value: f32) {
        let row_bytes = self.lm_head.cols * size_of::<f32>();
        let row = &mut self.lm_head.data[id * row_bytes..][..row_bytes];
        row.copy_from_slice(&value.to_le_bytes().repeat(self.lm_head.cols));
    }

    pub(crate) fn attention(&self) -> AttentionWeights<'_> {
        let layers = self.layers.iter();
        AttentionWeights {
            embed: self.embed.view(),
            layers: layers
                .map(
                    |[input_norm, q, k, v, o, post_norm, gate]| AttentionLayerWeights {
                        input_norm: input_norm.view(),
                        q: q.view(),
                        k: k.view(),
                        v: v.view(),
                        o: o.view(),
                        post_norm: post_norm.view(),
                        gate: self.geometry.has_gate().then(|| gate.view()),
                    },
                )
                .collect(),
            norm: self.norm.view(),
            lm_head: self.lm_head.view(),
        }
    }

    fn expert(&self, layer: usize, expert: usize) -> ExpertWeights<'_> {
        let [w1, w2, w3] = &self.experts[layer * self.geometry.num_experts + expert];
        ExpertWeights {
            w1: w1.view(),
            w2: w2.view(),
            w3: w3.view(),
        }
    }
}

/// A model whose experts are cut at the given segments and spread over that many workers.
pub(crate) struct Model {
    geometry: ModelGeometry,
    pub(crate) attention: Box<dyn Attention>,
    /// Whether steps are computed in one call.
    pub(crate) is_whole: bool,
    /// Experts of every row of the last step, layer after layer.
    pub(crate) chosen: Vec<Vec<ExpertId>>,
    workers: Vec<(SegmentRange, Arc<dyn Experts>)>,
}

impl Model {
    pub(crate) fn new(checkpoint: &Checkpoint, backend: &dyn Backend, cuts: &[u8]) -> Self {
        Self::with_kv(checkpoint, backend, cuts, KvFormat::F16)
    }

    pub(crate) fn with_kv(
        checkpoint: &Checkpoint,
        backend: &dyn Backend,
        cuts: &[u8],
        kv_format: KvFormat,
    ) -> Self {
        let geometry = checkpoint.geometry.clone();
        let config = AttentionConfig {
            kv_format,
            ..ATTENTION
        };
        let attention = backend.attention(&checkpoint.attention(), config).unwrap();
        let ranges = cuts
            .windows(2)
            .map(|w| SegmentRange::new(w[0], w[1]).unwrap());
        let workers = ranges
            .map(|range| {
                let experts = backend.experts();
                load(checkpoint, &*experts, range);
                (range, experts)
            })
            .collect();
        Self {
            geometry,
            attention,
            is_whole: false,
            chosen: vec![],
            workers,
        }
    }

    /// The logits of one step.
    pub(crate) fn step(&mut self, batch: &StepBatch) -> Vec<f32> {
        let mut routed = RoutedRows::default();
        self.chosen.clear();
        if self.is_whole {
            return self.try_whole(batch).unwrap();
        }
        self.attention.begin(batch).unwrap();
        for layer in 0..self.geometry.num_layers as u16 {
            let layer = LayerId(layer);
            self.attention.attend(layer, batch, &mut routed).unwrap();
            self.exchange(layer, &routed);
            self.chosen.push(routed.topk_ids.clone());
        }
        let mut logits = vec![];
        self.attention.logits(batch, &mut logits).unwrap();
        logits
    }

    /// The logits of one step in one call, or why it failed.
    pub(crate) fn try_whole(&mut self, batch: &StepBatch) -> Result<Vec<f32>, Error> {
        let wanted = vec![Wanted::Logits; batch.logits_rows.len()];
        let outputs = self.try_outputs(batch, &wanted)?;
        assert_eq!(outputs.choices, []);
        Ok(outputs.logits)
    }

    /// What is wanted of the logits rows of one step in one call.
    pub(crate) fn try_outputs(
        &mut self,
        batch: &StepBatch,
        wanted: &[Wanted],
    ) -> Result<StepOutputs, Error> {
        // Of another step.
        let mut out = StepOutputs {
            logits: vec![1.0; 3],
            choices: vec![Ok(7); 3],
        };
        let experts = &self.workers[0].1;
        assert!(self.attention.step(batch, wanted, &**experts, &mut out)?);
        Ok(out)
    }

    /// The experts of whole steps.
    pub(crate) fn own(&self) -> &dyn Experts {
        &*self.workers[0].1
    }

    fn exchange(&mut self, layer: LayerId, routed: &RoutedRows) {
        let top_k = self.geometry.top_k;
        let num_segments = self.geometry.num_segments();
        let hidden = self.geometry.hidden;
        let rows_of = |expert: usize| -> Vec<u32> {
            let chosen = routed.topk_ids.iter().enumerate();
            chosen
                .filter(|(_, id)| usize::from(id.0) == expert)
                .map(|(i, _)| (i / top_k) as u32)
                .collect()
        };
        let rows: Vec<Vec<u32>> = (0..self.geometry.num_experts).map(rows_of).collect();
        let mut buffers = vec![];
        // (row, expert, piece) of every vector.
        let mut pieces = vec![];
        for (range, experts) in &self.workers {
            let jobs: Vec<ExpertJob<'_>> = rows
                .iter()
                .enumerate()
                .map(|(expert, row_ids)| ExpertJob {
                    expert: ExpertId(expert as u16),
                    range: *range,
                    row_ids,
                })
                .collect();
            let mut out = vec![1.0; 3];
            experts
                .compute(layer, &routed.rows, routed.num_rows, &jobs, &mut out)
                .unwrap();
            let mut offset = 0;
            for job in &jobs {
                for &row in job.row_ids {
                    for node in range.nodes(num_segments) {
                        let buffer = buffers.len() as u32;
                        let piece = Piece {
                            node,
                            buffer,
                            offset,
                        };
                        pieces.push((row, job.expert, piece));
                        offset += hidden;
                    }
                }
            }
            assert_eq!(offset, out.len());
            buffers.push(out);
        }
        pieces.sort_by_key(|(row, expert, piece)| (*row, *expert, piece.node));
        let sums: Vec<ExpertSum> = (0..routed.topk_ids.len())
            .map(|i| {
                let key = ((i / top_k) as u32, routed.topk_ids[i]);
                let begin = pieces.partition_point(|p| (p.0, p.1) < key) as u32;
                let end = pieces.partition_point(|p| (p.0, p.1) <= key) as u32;
                ExpertSum {
                    row: key.0,
                    weight: routed.topk_weights[i],
                    pieces: begin..end,
                }
            })
            .collect();
        let pieces: Vec<Piece> = pieces.into_iter().map(|p| p.2).collect();
        let buffers: Vec<&[f32]> = buffers.iter().map(Vec::as_slice).collect();
        let contributions = Contributions {
            buffers: &buffers,
            pieces: &pieces,
            sums: &sums,
            num_segments,
        };
        self.attention.combine(layer, &contributions).unwrap();
    }

    /// The bits of the logits of every position, the prompt cut into chunks.
    pub(crate) fn prompt(&mut self, prompt: &Prompt, chunk: usize) -> Vec<u32> {
        let mut bits = vec![];
        let mut begin = 0;
        while begin < prompt.tokens.len() {
            let end = (begin + chunk).min(prompt.tokens.len());
            let mut batch = StepBatch::default();
            prompt.add_to(&mut batch, begin..end, true);
            bits.extend(self::bits(&self.step(&batch)));
            begin = end;
        }
        bits
    }
}

/// The bits of numbers.
pub(crate) fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub(crate) fn load(checkpoint: &Checkpoint, experts: &dyn Experts, range: SegmentRange) {
    for layer in 0..checkpoint.geometry.num_layers {
        for expert in 0..checkpoint.geometry.num_experts {
            let slice = ExpertSlice {
                layer: LayerId(layer as u16),
                expert: ExpertId(expert as u16),
                range,
            };
            experts
                .load(slice, &checkpoint.expert(layer, expert))
                .unwrap();
        }
    }
}

pub(crate) struct Prompt {
    pub(crate) tokens: Vec<u32>,
    pages: Vec<PageId>,
}

impl Prompt {
    pub(crate) fn new(seed: u32, len: usize, first_page: u32) -> Self {
        let num_pages = len.div_ceil(64) as u32;
        Self {
            tokens: (0..len as u32)
                .map(|i| (i * i + 7 * i + seed) % 75)
                .collect(),
            // Not in order.
            pages: (0..num_pages)
                .rev()
                .map(|p| PageId(first_page + p))
                .collect(),
        }
    }

    pub(crate) fn add_to(
        &self,
        batch: &mut StepBatch,
        rows: std::ops::Range<usize>,
        wants_logits: bool,
    ) {
        let row_begin = batch.num_rows() as u32;
        batch.tokens.extend(&self.tokens[rows.clone()]);
        batch.positions.extend(rows.clone().map(|p| p as u32));
        batch.sequences.push(SequenceSpan {
            row_begin,
            num_rows: rows.len() as u32,
            block_table: self.pages.clone(),
        });
        if wants_logits {
            let end = batch.num_rows() as u32;
            batch.logits_rows.extend(row_begin..end);
        }
    }
}
