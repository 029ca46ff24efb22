//! The stateful half: residual stream and KV cache of one attention worker. It never calls an expert.

mod attend;
mod gate;
mod steps;
mod weights;

use std::fmt;
use std::sync::{Arc, OnceLock};

use half::bf16;
use tramontane_compute::combine::add_expert_sums_from;
use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Contributions, Error, RoutedRows, StepBatch,
};
use tramontane_types::{ExpertId, LayerId, ModelGeometry, PageId};

use crate::cache::KvCache;
use crate::context::{Context, check_index, check_size};
use crate::disjoint::Disjoint;
use crate::linear::{Linear, Write};
use crate::rows::Rows;
use attend::Attend;
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
    attend: Attend,
    /// `theta^(-2i / head_dim)`, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    /// Angles of each row's position, `[num_rows, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
    /// `[num_rows, num_experts]`.
    gate: Vec<f32>,
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
            cache: KvCache::new(&context.geometry, config)?,
            batch: StepBatch::default(),
            written: Vec::with_capacity(config.max_rows),
            scratch: Scratch::new(&context, config),
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
    fn new(context: &Context, config: AttentionConfig) -> Self {
        let max_rows = config.max_rows;
        let geometry = &context.geometry;
        let heads = geometry.num_heads;
        let qkv = (heads + 2 * geometry.num_kv_heads) * geometry.head_dim;
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
            attend: Attend::new(context, config),
            frequencies: frequencies(geometry),
            cos: vec![0.0; max_rows * geometry.head_dim / 2],
            sin: vec![0.0; max_rows * geometry.head_dim / 2],
            gate: vec![0.0; max_rows * geometry.num_experts],
        }
    }
}

/// The frequencies of the rotary embedding, computed in f32 as the published implementation does.
fn frequencies(geometry: &ModelGeometry) -> Vec<f32> {
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / geometry.head_dim as f32;
        1.0 / (libm::pow(geometry.rope_theta, f64::from(exponent)) as f32)
    };
    (0..geometry.head_dim / 2).map(frequency).collect()
}

impl Attention for CpuAttention {
    fn begin(&mut self, batch: &StepBatch) -> Result<(), Error> {
        batch.check(&self.context.geometry, self.config, &mut self.written)?;
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
        self.scratch.attend.plan(&self.context.geometry, batch);
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
            num_rows,
            out: &mut scratch.qkv[..num_rows * weights.qkv.rows()],
            write: Write::Store,
        });
        scratch.rotate_and_cache(context, batch, layer, &mut self.cache);
        let queries = &scratch.qkv[..num_rows * weights.qkv.rows()];
        scratch
            .attend
            .run(context, batch, (layer, &self.cache), queries);
        scratch.outputs_to_rows(context, num_rows);
        context.linear(Linear {
            matrix: &weights.o,
            rows: &scratch.attended,
            num_rows,
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
        add_sums(&self.context, residual, contributions)
    }

    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), Error> {
        self.check_same_batch(batch)?;
        let (context, scratch) = (&*self.context, &mut self.scratch);
        let num_rows = batch.logits_rows.len();
        scratch.norm_to_rows(context, &self.weights.norm, num_rows, &|i| {
            batch.logits_rows[i] as usize
        });
        // What is there already is overwritten.
        out.resize(num_rows * context.geometry.vocab, 0.0);
        context.linear(Linear {
            matrix: &self.weights.lm_head,
            rows: &scratch.rows,
            num_rows,
            out,
            write: Write::Store,
        });
        Ok(())
    }
}

/// Rows that one item adds expert outputs to.
const COMBINE_ROWS: usize = 8;

/// Adds the expert outputs of all rows over the pool; every row has `top_k` sums.
fn add_sums(
    context: &Context,
    residual: &mut [f32],
    contributions: &Contributions<'_>,
) -> Result<(), Error> {
    let (hidden, top_k) = (context.geometry.hidden, context.geometry.top_k);
    let num_rows = residual.len() / hidden;
    let residual = Disjoint::new(residual);
    let failed = OnceLock::new();
    context.pool.run(num_rows.div_ceil(COMBINE_ROWS), &|item| {
        let begin = item * COMBINE_ROWS;
        let end = (begin + COMBINE_ROWS).min(num_rows);
        // SAFETY: this item alone has the rows.
        let rows = unsafe { residual.range_mut(begin * hidden..end * hidden) };
        let sums = &contributions.sums[begin * top_k..end * top_k];
        let own = Contributions {
            sums,
            ..*contributions
        };
        if let Err(error) = add_expert_sums_from(begin, rows, hidden, &own) {
            // One of them is enough to say.
            let _later = failed.set(error);
        }
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// The experts of a dense model's row: the only one, with weight 1.
const DENSE: (ExpertId, f32) = (ExpertId(0), 1.0);
