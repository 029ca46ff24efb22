//! The stateful half: residual stream and KV cache of one attention worker. It never calls an expert.

mod gate;
mod steps;
mod weights;

use std::fmt;
use std::sync::Arc;

use half::bf16;
use tramontane_compute::combine::add_expert_sums;
use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Contributions, Error, RoutedRows, StepBatch,
};
use tramontane_types::{ExpertId, LayerId, ModelGeometry, PageId};

use crate::batch_check::check_batch;
use crate::cache::KvCache;
use crate::context::{Context, check_index, check_size};
use crate::linear::{Linear, Write};
use crate::rows::Rows;
use steps::AttendItem;
use weights::Weights;

/// See the module; made by [`CpuBackend`](crate::CpuBackend).
pub(crate) struct CpuAttention {
    context: Arc<Context>,
    config: AttentionConfig,
    weights: Weights,
    cache: KvCache,
    /// The batch given to `begin`.
    batch: StepBatch,
    /// Pages that the step writes.
    written: Vec<PageId>,
    scratch: Scratch,
}

/// Buffers of a step, reserved for `max_rows` rows.
struct Scratch {
    /// The residual stream, `[num_rows, hidden]`.
    residual: Vec<f32>,
    /// Normalised rows, `[num_rows, hidden]`.
    normed: Vec<f32>,
    /// What the products read, `hidden` columns.
    rows: Rows,
    /// Queries, keys and values, `[num_rows, (num_heads + 2 num_kv_heads) * head_dim]`.
    qkv: Vec<f32>,
    /// Attention outputs as the O product reads them.
    attended: Rows,
    /// Running softmax of attention: `m` and `l`, `[num_rows, num_heads]`.
    maxima: Vec<f32>,
    sums: Vec<f32>,
    /// `o`, `[num_rows, num_heads, head_dim rounded up to 16]`.
    outputs: Vec<f32>,
    /// `theta^(-2i / head_dim)`, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    /// Angles of each row's position, `[num_rows, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[num_rows, num_experts]`.
    gate: Vec<f32>,
    /// `0..max_rows`.
    ids: Vec<u32>,
    items: Vec<AttendItem>,
}

impl fmt::Debug for CpuAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CpuAttention")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl CpuAttention {
    pub(crate) fn new(
        context: Arc<Context>,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        let weights = Weights::pack(&context, weights)?;
        Ok(Self {
            config,
            weights,
            cache: KvCache::new(&context.geometry, config.num_pages),
            batch: StepBatch::default(),
            written: Vec::with_capacity(config.max_rows),
            scratch: Scratch::new(&context, config.max_rows),
            context,
        })
    }

    fn layer_index(&self, layer: LayerId) -> Result<usize, Error> {
        let layer = usize::from(layer.0);
        check_index("layer", self.context.geometry.num_layers, layer)?;
        Ok(layer)
    }

    fn check_same_batch(&self, batch: &StepBatch) -> Result<(), Error> {
        if *batch == self.batch {
            return Ok(());
        }
        Err(Error::Shape {
            what: "batch other than the one given to begin, rows".to_owned(),
            expected: self.batch.num_rows(),
            got: batch.num_rows(),
        })
    }
}

impl Scratch {
    fn new(context: &Context, max_rows: usize) -> Self {
        let geometry = &context.geometry;
        let heads = geometry.num_heads;
        let qkv = (heads + 2 * geometry.num_kv_heads) * geometry.head_dim;
        let padded_dim = geometry.head_dim.next_multiple_of(crate::simd::LANES);
        let mut rows = Rows::new(context.row_format(), geometry.hidden);
        rows.reserve(max_rows);
        let mut attended = Rows::new(context.row_format(), heads * geometry.head_dim);
        attended.reserve(max_rows);
        Self {
            residual: vec![0.0; max_rows * geometry.hidden],
            normed: vec![0.0; max_rows * geometry.hidden],
            rows,
            qkv: vec![0.0; max_rows * qkv],
            attended,
            maxima: vec![0.0; max_rows * heads],
            sums: vec![0.0; max_rows * heads],
            outputs: vec![0.0; max_rows * heads * padded_dim],
            frequencies: frequencies(geometry),
            cos: vec![0.0; max_rows * geometry.head_dim / 2],
            sin: vec![0.0; max_rows * geometry.head_dim / 2],
            gate: vec![0.0; max_rows * geometry.num_experts],
            ids: (0..max_rows).map(|row| row as u32).collect(),
            items: Vec::with_capacity(max_rows * geometry.num_kv_heads),
        }
    }
}

/// The frequencies of the rotary embedding, computed in f32 as the published implementation does.
fn frequencies(geometry: &ModelGeometry) -> Vec<f32> {
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / geometry.head_dim as f32;
        1.0 / (geometry.rope_theta.powf(f64::from(exponent)) as f32)
    };
    (0..geometry.head_dim / 2).map(frequency).collect()
}

impl Attention for CpuAttention {
    fn begin(&mut self, batch: &StepBatch) -> Result<(), Error> {
        check_batch(
            &self.context.geometry,
            self.config,
            batch,
            &mut self.written,
        )?;
        self.batch.clone_from(batch);
        let hidden = self.context.geometry.hidden;
        let residual = self.scratch.residual.chunks_exact_mut(hidden);
        for (row, &token) in residual.zip(&batch.tokens) {
            let embedding = &self.weights.embed[token as usize * hidden..][..hidden];
            for (x, &bits) in row.iter_mut().zip(embedding) {
                *x = bf16::from_bits(bits).to_f32();
            }
        }
        self.scratch
            .compute_angles(&self.context.geometry, &batch.positions);
        self.scratch
            .list_attend_items(&self.context.geometry, batch);
        Ok(())
    }

    fn attend(
        &mut self,
        layer: LayerId,
        batch: &StepBatch,
        routed: &mut RoutedRows,
    ) -> Result<(), Error> {
        let layer = self.layer_index(layer)?;
        self.check_same_batch(batch)?;
        let num_rows = batch.num_rows();
        let (context, scratch) = (&*self.context, &mut self.scratch);
        let weights = &self.weights.layers[layer];
        scratch.norm_to_rows(context, &weights.input_norm, num_rows, &|row| row);
        context.linear(Linear {
            matrix: &weights.qkv,
            rows: &scratch.rows,
            ids: &scratch.ids[..num_rows],
            out: &mut scratch.qkv[..num_rows * weights.qkv.rows()],
            write: Write::Store,
        });
        scratch.rotate_and_cache(context, batch, layer, &mut self.cache);
        scratch.attend_pages(context, batch, layer, &self.cache);
        scratch.outputs_to_rows(context, num_rows);
        context.linear(Linear {
            matrix: &weights.o,
            rows: &scratch.attended,
            ids: &scratch.ids[..num_rows],
            out: &mut scratch.residual[..num_rows * weights.o.rows()],
            write: Write::Add,
        });
        scratch.route(context, weights, num_rows, routed);
        Ok(())
    }

    fn combine(&mut self, layer: LayerId, contributions: &Contributions<'_>) -> Result<(), Error> {
        self.layer_index(layer)?;
        let geometry = &self.context.geometry;
        let num_rows = self.batch.num_rows();
        let num_sums = num_rows * geometry.top_k;
        check_size("expert sums", num_sums, contributions.sums.len())?;
        for (i, sum) in contributions.sums.iter().enumerate() {
            check_size("row of an expert sum", i / geometry.top_k, sum.row as usize)?;
        }
        let residual = &mut self.scratch.residual[..num_rows * geometry.hidden];
        add_expert_sums(residual, geometry.hidden, contributions)
    }

    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), Error> {
        self.check_same_batch(batch)?;
        let (context, scratch) = (&*self.context, &mut self.scratch);
        let num_rows = batch.logits_rows.len();
        scratch.norm_to_rows(context, &self.weights.norm, num_rows, &|i| {
            batch.logits_rows[i] as usize
        });
        out.clear();
        out.resize(num_rows * context.geometry.vocab, 0.0);
        context.linear(Linear {
            matrix: &self.weights.lm_head,
            rows: &scratch.rows,
            ids: &scratch.ids[..num_rows],
            out,
            write: Write::Store,
        });
        Ok(())
    }
}

/// The experts of a dense model's row: the only one, with weight 1.
const DENSE: (ExpertId, f32) = (ExpertId(0), 1.0);
