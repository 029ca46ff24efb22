//! The seam between the engine and what computes: coarse, so that a backend may fuse between exchanges.

use std::any::Any;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use half::bf16;
use serde::{Deserialize, Serialize};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, SegmentRange};

use crate::{Contributions, Error, HostTensor, KvFormat, StepBatch, StepOutputs, Wanted, quant};

/// How weights are stored after loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// binary32, reference backend only: slow and exact, for checking.
    F32,
    /// bfloat16.
    Bf16,
    /// Blocks of 32 signed bytes with one f16 scale, see [`quant`].
    Q8,
    /// Experts in blocks of 32 four-bit numbers with an f16 scale and minimum, see [`quant`]; the rest in q8, on GPUs in
    /// bf16.
    Q4,
    /// Attention and experts as 8-bit floating point with an f32 scale for each row of a part, see [`quant`]; embedding,
    /// norms, gate and LM head as in bf16. On GPUs from sm_89 on.
    E4m3,
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8 => "q8",
            Self::Q4 => "q4",
            Self::E4m3 => "e4m3",
        })
    }
}

impl FromStr for WeightFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "q8" => Ok(Self::Q8),
            "q4" => Ok(Self::Q4),
            "e4m3" => Ok(Self::E4m3),
            other => Err(format!(
                "weight format must be f32, bf16, q8, q4 or e4m3, got {other:?}"
            )),
        }
    }
}

/// How a dispatched row is stored: exactly what the expert kernel consumes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowFormat {
    /// `hidden` binary32, little-endian.
    F32,
    /// `hidden` bfloat16, little-endian.
    Bf16,
    /// `hidden` rounded up to blocks of 32: all signed bytes, then one f32 scale per block.
    Q8,
}

impl RowFormat {
    /// Bytes of one row of `hidden` elements.
    #[must_use]
    pub const fn row_bytes(self, hidden: usize) -> usize {
        match self {
            Self::F32 => hidden * 4,
            Self::Bf16 => hidden * 2,
            Self::Q8 => quant::q8_row_bytes(hidden),
        }
    }

    /// Rounds `row` into `out`, which has [`row_bytes`](Self::row_bytes) of it.
    pub fn write_row(self, row: &[f32], out: &mut [u8]) {
        match self {
            Self::F32 => {
                for (out, x) in out.chunks_exact_mut(4).zip(row) {
                    out.copy_from_slice(&x.to_le_bytes());
                }
            }
            Self::Bf16 => {
                for (out, &x) in out.chunks_exact_mut(2).zip(row) {
                    out.copy_from_slice(&bf16::from_f32(x).to_le_bytes());
                }
            }
            Self::Q8 => quant::q8_row(row, out),
        }
    }
}

/// Makes the two halves of a worker for one model geometry.
pub trait Backend: Send + Sync + fmt::Debug {
    /// What decides the bits of a result, such as `reference-f32` or `cpu-q8`. Workers of one group agree on it.
    fn numeric_class(&self) -> &str;

    /// The format of dispatched rows.
    fn row_format(&self) -> RowFormat;

    /// Bytes that one segment of one expert takes once loaded (all three matrices).
    fn segment_bytes(&self) -> u64;

    /// Packs the attention weights and reserves the KV cache.
    ///
    /// # Errors
    /// When a tensor does not have the shape that the geometry asks for.
    fn attention(
        &self,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Box<dyn Attention>, Error>;

    /// An empty store of expert slices.
    fn experts(&self) -> Arc<dyn Experts>;
}

/// Sizes that an attention worker reserves at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionConfig {
    /// Pages of the KV cache, of [`KV_PAGE_TOKENS`](crate::KV_PAGE_TOKENS) tokens in every layer.
    pub num_pages: usize,
    /// Most rows of one step.
    pub max_rows: usize,
    /// How keys and values are kept.
    pub kv_format: KvFormat,
}

/// Everything of a checkpoint but the experts.
#[derive(Clone, Debug)]
pub struct AttentionWeights<'a> {
    /// `[vocab, hidden]`.
    pub embed: HostTensor<'a>,
    /// One entry per layer.
    pub layers: Vec<AttentionLayerWeights<'a>>,
    /// Final norm, `[1, hidden]`.
    pub norm: HostTensor<'a>,
    /// `[vocab, hidden]`; the embedding itself when the model ties them.
    pub lm_head: HostTensor<'a>,
}

/// The tensors of one layer that stay with the attention worker.
#[derive(Clone, Debug)]
pub struct AttentionLayerWeights<'a> {
    /// `[1, hidden]`.
    pub input_norm: HostTensor<'a>,
    /// `[num_heads * head_dim, hidden]`.
    pub q: HostTensor<'a>,
    /// `[num_kv_heads * head_dim, hidden]`.
    pub k: HostTensor<'a>,
    /// `[num_kv_heads * head_dim, hidden]`.
    pub v: HostTensor<'a>,
    /// `[hidden, num_heads * head_dim]`.
    pub o: HostTensor<'a>,
    /// `[1, hidden]`.
    pub post_norm: HostTensor<'a>,
    /// `[num_experts, hidden]`; `None` for a dense model.
    pub gate: Option<HostTensor<'a>>,
}

/// The three matrices of one expert: `w2(silu(w1 x) * (w3 x))`.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    /// Gate projection, `[ff, hidden]`.
    pub w1: HostTensor<'a>,
    /// Down projection, `[hidden, ff]`.
    pub w2: HostTensor<'a>,
    /// Up projection, `[ff, hidden]`.
    pub w3: HostTensor<'a>,
}

/// What [`Attention::attend`] hands to the exchange: rows in wire format and where they go.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoutedRows {
    /// Rows of the step.
    pub num_rows: usize,
    /// `[num_rows * row_bytes]`: the normalised rows in the backend's [`RowFormat`].
    pub rows: Vec<u8>,
    /// `[num_rows * top_k]`: the chosen experts of each row, ascending by expert id, distinct.
    pub topk_ids: Vec<ExpertId>,
    /// `[num_rows * top_k]`: their renormalised weights, f32.
    pub topk_weights: Vec<f32>,
}

/// The stateful half: KV cache and the residual stream of the running step. One thread owns it.
///
/// A step is `begin`, then for every layer `attend` and `combine`, then `logits`.
///
/// Exactness: every row's result depends only on its own sequence's tokens and the weights, never on
/// which other rows are in the batch, on how the prompt was cut, or on page ids.
pub trait Attention: Send + fmt::Debug {
    /// Looks up the embeddings of the batch's tokens: the residual stream, `[num_rows, hidden]` f32.
    ///
    /// # Errors
    /// When a token, page or row is out of range, or one page is written through two entries of the block
    /// tables; then nothing was changed.
    fn begin(&mut self, batch: &StepBatch) -> Result<(), Error>;

    /// Attention half of a layer: norm, QKV, RoPE, KV write, paged attention, O, residual, norm, gate,
    /// top-k. Leaves the rows for the experts in `routed`.
    ///
    /// # Errors
    /// When the layer does not exist or the batch is not the one given to `begin`.
    fn attend(
        &mut self,
        layer: LayerId,
        batch: &StepBatch,
        routed: &mut RoutedRows,
    ) -> Result<(), Error>;

    /// Adds the weighted expert outputs to the residual stream, see [`combine`](crate::combine).
    ///
    /// # Errors
    /// When the contributions do not cover each row's experts.
    fn combine(&mut self, layer: LayerId, contributions: &Contributions<'_>) -> Result<(), Error>;

    /// Final norm and LM head of `batch.logits_rows`: `[logits_rows.len() * vocab]` f32 into `out`
    /// (cleared first).
    ///
    /// # Errors
    /// When a row is out of range.
    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), Error>;

    /// Computes a whole step in one call, from the embeddings to the logits, with `experts` that are all of the
    /// model's: a backend that has both halves on one device need not come back between layers. Has the bits that
    /// `begin`, `attend`, `combine` and `logits` would give.
    ///
    /// `wanted` says of each of `batch.logits_rows` what goes into `out` (cleared first): its logits, or the token that
    /// [`sampling`](crate::sampling) would choose from them.
    ///
    /// `false`, and nothing was done: not with these experts, or not on this backend.
    ///
    /// # Errors
    /// As `begin` and `logits`, and when `wanted` is not as long as the logits rows.
    fn step(
        &mut self,
        batch: &StepBatch,
        wanted: &[Wanted],
        experts: &dyn Experts,
        out: &mut StepOutputs,
    ) -> Result<bool, Error> {
        let (_, _, _, _) = (batch, wanted, experts, out);
        Ok(false)
    }

    /// How often rows of [`step`](Self::step) chose each expert since this was asked last, `[num_layers * num_experts]`,
    /// layer-major, into `chosen` (cleared first); empty when nobody counts.
    ///
    /// # Errors
    /// When the counts cannot be fetched.
    fn take_chosen(&mut self, chosen: &mut Vec<u64>) -> Result<(), Error> {
        chosen.clear();
        Ok(())
    }
}

/// Rows that one expert slice is to compute.
#[derive(Clone, Copy, Debug)]
pub struct ExpertJob<'a> {
    /// The expert.
    pub expert: ExpertId,
    /// Which part of it.
    pub range: SegmentRange,
    /// Indices of rows in the call's `rows`, in any order.
    pub row_ids: &'a [u32],
}

/// The pure half: expert slices. Any number of threads may call it.
///
/// Exactness: the vector of (row, expert, node) depends only on the row's bytes and the weights.
pub trait Experts: Send + Sync + fmt::Debug {
    /// Packs a slice; segments already held are kept as they are.
    ///
    /// # Errors
    /// When the slice or a tensor does not fit the geometry; then nothing was changed.
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error>;

    /// Drops the segments of a slice; a call that runs keeps them until it ends.
    fn unload(&self, slice: ExpertSlice);

    /// Bit `i` is set when segment `i` of the expert is loaded (empty segments count as loaded).
    fn held(&self, layer: LayerId, expert: ExpertId) -> u8;

    /// Computes `jobs` of one layer. `rows` holds `num_rows` rows in the backend's [`RowFormat`].
    ///
    /// `out` (cleared first) receives, job after job, for each of its `row_ids` in order, for each
    /// node of its range ([`SegmentRange::nodes`]) ascending, `hidden` f32: the partial output
    /// `w2[:, node] (silu(w1[node] x) * (w3[node] x))`, not yet weighted.
    ///
    /// # Errors
    /// When a slice is not held, a row does not exist or `rows` has the wrong size.
    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error>;

    /// The store itself, for the [`Attention`] half of the same backend: see [`Attention::step`]. One that watches
    /// another hands on the other's.
    fn on_device(&self) -> Option<&dyn Any> {
        None
    }
}

/// Length in f32 of what [`Experts::compute`] returns for one job.
#[must_use]
pub fn job_output_len(geometry: &ModelGeometry, range: SegmentRange, num_rows: usize) -> usize {
    num_rows * range.num_nodes(geometry.num_segments()) * geometry.hidden
}
