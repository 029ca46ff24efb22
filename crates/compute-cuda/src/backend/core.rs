//! One attention worker's side of the device: its memory, and what a step queues for each layer. Decides nothing.

use std::ops::Range;
use std::sync::Arc;

use tramontane_compute::{AttentionConfig, AttentionWeights, Error, StepBatch, Wanted};
use tramontane_types::PageId;

use super::abi::{AttendArgs, GateArgs, RopeArgs, RouteArgs};
use super::call::row_stride;
use super::context::{Context, Matrix, Out, Rows, failed};
use super::input::StepInput;
use super::kernels::{AttendKernels, Kernels, ROUTE_ROWS_MAX};
use super::norms::Norm;
use super::outputs::Outputs;
use super::panels::Panels;
use super::plan::{AttendPlan, COUNTERS_MAX, SLOTS_MAX};
use super::round::RoundedRows;
use super::weights::{LayerWeights, Weights};
use crate::collective::Collective;
use crate::device::{Args, Buffer, DeviceError, Kernel, Shape, Stream};

/// Logits that are computed at once; a step that wants more takes several turns.
pub(super) const LOGITS_ROWS: usize = 256;
/// Blocks of the attention kernels per multiprocessor.
const ATTEND_BLOCKS: usize = 4;

/// Buffers of a step, reserved for `max_rows` rows.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The residual stream, `[rows, hidden]` f32.
    pub(super) residual: Buffer,
    /// Normalised rows, `[rows, x_stride]` bf16.
    pub(super) x: Buffer,
    /// The same as e4m3, where products of layers read that.
    pub(super) rounded_x: Option<RoundedRows>,
    /// Queries, keys and values, `[rows, (num_heads + 2 num_kv_heads) * head_dim]` f32.
    qkv: Buffer,
    /// Rotated queries, `[rows, num_heads, padded head]`.
    q: Buffer,
    /// Attention outputs, `[rows, num_heads * head_dim]` bf16.
    attended: Buffer,
    rounded_attended: Option<RoundedRows>,
    /// Of normalised rows, then of attention outputs, for long steps.
    panels: Option<Panels>,
    /// `[rows, num_experts]` f32.
    scores: Buffer,
    /// `[rows, top_k]`, as the next three.
    pub(super) topk_ids: Buffer,
    pub(super) topk_weights: Buffer,
    pub(super) row_of: Buffer,
    pub(super) slot_of: Buffer,
    /// `[num_experts + 1]`.
    pub(super) offsets: Buffer,
    /// How often whole steps chose each expert, modulo 2^32: `[num_layers, num_experts]`.
    pub(super) chosen: Buffer,
    /// Keys and values of all layers.
    cache: Buffer,
    cache_layer_bytes: usize,
    slot_outputs: Buffer,
    slot_softmax: Buffer,
    counters: Buffer,
}

impl Buffers {
    fn new(
        context: &Context,
        config: AttentionConfig,
        attend: &AttendKernels,
    ) -> Result<Self, Error> {
        let (g, rows) = (&context.geometry, config.max_rows);
        let padded = attend.padded_dim;
        let heads = g.num_heads * g.head_dim;
        let choices = rows * g.top_k * 4;
        let cache_layer_bytes = config.num_pages * g.num_kv_heads * attend.page_bytes;
        let zeros = |len: usize| context.upload(&vec![0; len]);
        Ok(Self {
            residual: context.buffer(rows * g.hidden * 4)?,
            x: context.buffer(rows * row_stride(g.hidden))?,
            rounded_x: RoundedRows::new(context, rows, g.hidden)?,
            qkv: context.buffer(rows * (heads + 2 * g.num_kv_heads * g.head_dim) * 4)?,
            q: context.buffer(rows * g.num_heads * padded * 2)?,
            attended: context.buffer(rows * row_stride(heads))?,
            rounded_attended: RoundedRows::new(context, rows, heads)?,
            panels: Panels::new(context, rows, (rows, 0), g.hidden.max(heads)),
            scores: context.buffer(rows * g.num_experts * 4)?,
            topk_ids: context.buffer(choices)?,
            topk_weights: context.buffer(choices)?,
            row_of: context.buffer(choices)?,
            slot_of: context.buffer(choices)?,
            offsets: context.buffer((g.num_experts + 1) * 4)?,
            chosen: zeros(g.num_layers * g.num_experts * 4)?,
            cache: context.buffer(g.num_layers * cache_layer_bytes)?,
            cache_layer_bytes,
            slot_outputs: context.buffer(SLOTS_MAX * g.num_heads * padded * 4)?,
            slot_softmax: context.buffer(SLOTS_MAX * g.num_heads * 2 * 4)?,
            counters: zeros(COUNTERS_MAX * g.num_kv_heads * 4)?,
        })
    }
}

/// One attention worker's side of the device.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) context: Arc<Context>,
    config: AttentionConfig,
    pub(super) stream: Stream,
    pub(super) weights: Weights,
    pub(super) buffers: Buffers,
    attend: AttendKernels,
    input: StepInput,
    plan: AttendPlan,
    pub(super) outputs: Outputs,
    /// The batch that was sent.
    batch: StepBatch,
    /// Pages that the step writes.
    written: Vec<PageId>,
}

impl Core {
    pub(super) fn new(
        context: Arc<Context>,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        let weights = Weights::load(&context, weights)?;
        Self::with_weights(context, weights, config)
    }

    /// With weights that are on the device already.
    pub(super) fn with_weights(
        context: Arc<Context>,
        weights: Weights,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        let (head_dim, kv_format) = (context.geometry.head_dim, config.kv_format);
        let attend = AttendKernels::find(&*context.device, head_dim, kv_format);
        let attend = attend.map_err(failed("finding the attention kernels"))?;
        let buffers = Buffers::new(&context, config, &attend)?;
        Ok(Self {
            attend,
            stream: context.stream()?,
            weights,
            input: StepInput::new(&context, config)?,
            plan: AttendPlan::default(),
            outputs: Outputs::new(&context, config.max_rows.min(LOGITS_ROWS))?,
            batch: StepBatch::default(),
            written: Vec::with_capacity(config.max_rows),
            buffers,
            config,
            context,
        })
    }

    /// Keys and values of zeros everywhere, as if that had been computed.
    pub(super) fn clear_cache(&self) -> Result<(), Error> {
        let filled = self.stream.fill(&self.buffers.cache, 0);
        filled.map_err(failed("clearing the cache"))?;
        self.wait()
    }

    pub(super) const fn num_pages(&self) -> usize {
        self.config.num_pages
    }

    pub(super) const fn max_rows(&self) -> usize {
        self.config.max_rows
    }

    /// Logits rows of one turn.
    pub(super) fn logits_max(&self) -> usize {
        self.config.max_rows.min(LOGITS_ROWS)
    }

    /// The batch of the running step.
    pub(super) const fn batch(&self) -> &StepBatch {
        &self.batch
    }

    /// Checks a batch, plans it and queues its copy to the device; what was there before is done. `wanted` is empty where
    /// no tokens are chosen.
    pub(super) fn send(&mut self, batch: &StepBatch, wanted: &[Wanted]) -> Result<(), Error> {
        batch.check(&self.context.geometry, self.config, &mut self.written)?;
        // A step that failed half-way may still be running, and reads what is written now.
        self.wait()?;
        self.batch.clone_from(batch);
        let blocks = attend_blocks(&self.context);
        self.plan.plan(&self.context.geometry, batch, blocks);
        self.input.send(&self.stream, (batch, wanted), &self.plan)
    }

    /// Pages that the running step writes.
    pub(super) fn written(&self) -> &[PageId] {
        &self.written
    }

    /// Queues copying ranges of pages, keys and values of all layers, from rank 0 to the others.
    pub(super) fn copy_pages(
        &self,
        collective: &dyn Collective,
        pages: &[Range<u32>],
    ) -> Result<(), DeviceError> {
        let page_bytes = self.context.geometry.num_kv_heads * self.attend.page_bytes;
        let layers = 0..self.context.geometry.num_layers;
        for (layer, run) in layers.flat_map(|layer| pages.iter().map(move |run| (layer, run))) {
            let begin = (run.start as usize).min(self.config.num_pages);
            let end = (run.end as usize).clamp(begin, self.config.num_pages);
            let layer_at = layer * self.buffers.cache_layer_bytes;
            let at = self.buffers.cache.at(layer_at + begin * page_bytes);
            // SAFETY: the pages lie in the cache, which lives as long as the stream.
            unsafe { collective.broadcast(at, (end - begin) * page_bytes, self.stream.handle())? };
        }
        Ok(())
    }

    /// Waits until everything that is queued is done.
    pub(super) fn wait(&self) -> Result<(), Error> {
        let waited = self.stream.synchronize();
        waited.map_err(failed("computing a step"))
    }

    /// For queueing the step that was sent, with grids for so many rows.
    pub(super) fn queue(&self, rows: usize) -> Queue<'_> {
        Queue {
            context: &self.context,
            stream: &self.stream,
            weights: &self.weights,
            buffers: &self.buffers,
            attend: &self.attend,
            input: &self.input,
            outputs: &self.outputs,
            rows,
            has_narrow: !self.plan.narrow.is_empty(),
            wide_items: self.plan.wide.len(),
        }
    }
}

/// One step on its way: everything that launches read, and for how many rows.
#[derive(Clone, Copy)]
pub(super) struct Queue<'a> {
    pub(super) context: &'a Context,
    pub(super) stream: &'a Stream,
    pub(super) weights: &'a Weights,
    pub(super) buffers: &'a Buffers,
    pub(super) attend: &'a AttendKernels,
    pub(super) input: &'a StepInput,
    pub(super) outputs: &'a Outputs,
    /// Rows that grids have blocks for: those of the step, or more.
    pub(super) rows: usize,
    /// Whether there may be narrow tiles.
    pub(super) has_narrow: bool,
    /// Items of wide ones. Later steps of a graph may have more, which its blocks share.
    pub(super) wide_items: usize,
}

impl Queue<'_> {
    /// # Safety
    /// As [`Stream::launch`], and so for all functions here: buffers, weights and input outlive what is queued.
    pub(super) unsafe fn launch(
        &self,
        kernel: Kernel,
        shape: Shape,
        args: Args,
    ) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { self.stream.launch(kernel, shape, args) }
    }

    /// The embeddings of the step's tokens become the residual stream.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn embed(&self) -> Result<(), DeviceError> {
        let args = Args::new()
            .address(self.buffers.residual.address())
            .address(self.weights.embed.address())
            .address(self.input.tokens())
            .address(self.input.num_rows())
            .size(self.context.geometry.hidden);
        let shape = Shape::new(self.rows as u32, 256, 0);
        // SAFETY: the caller's promise.
        unsafe { self.launch(self.context.kernels.embed, shape, args) }
    }

    /// Attention of a layer on normalised rows, added to the residual stream.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn attention(&self, layer: usize) -> Result<(), DeviceError> {
        let (weights, buffers) = (&self.weights.layers[layer], self.buffers);
        let geometry = &self.context.geometry;
        let out = |buffer: &Buffer, is_added| Out {
            address: buffer.address(),
            is_added,
        };
        let mut attended = Rows {
            address: buffers.attended.address(),
            num_tokens: self.rows,
            stride: row_stride(geometry.num_heads * geometry.head_dim),
            scales: 0,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let (x, qkv) = (self.rows_for_layers(), out(&buffers.qkv, false));
            self.linear(&weights.qkv, x, qkv)?;
            self.rope(layer)?;
            self.attend_pages(layer)?;
            if let Some(rounded) = &buffers.rounded_attended {
                rounded.fill(self.stream, attended, self.input.num_rows())?;
                attended = rounded.as_rows(self.rows);
            }
            self.linear(&weights.o, attended, out(&buffers.residual, true))
        }
    }

    /// A product with a matrix of a layer.
    unsafe fn linear(&self, matrix: &Matrix, rows: Rows, out: Out) -> Result<(), DeviceError> {
        let panels = self.buffers.panels.as_ref();
        // SAFETY: the caller's promise.
        unsafe {
            match panels.filter(|_| Panels::are_for(self.rows)) {
                Some(panels) => {
                    let rows = (rows, self.input.num_rows());
                    panels.linear(self.stream, matrix, rows, out)
                }
                None => self.context.linear(self.stream, matrix, rows, out),
            }
        }
    }

    fn pages(&self, layer: usize) -> u64 {
        self.buffers
            .cache
            .at(layer * self.buffers.cache_layer_bytes)
    }

    unsafe fn rope(&self, layer: usize) -> Result<(), DeviceError> {
        let geometry = &self.context.geometry;
        let args = RopeArgs {
            q: self.buffers.q.address(),
            pages: self.pages(layer),
            qkv: self.buffers.qkv.address(),
            angles: self.weights.angles.address(),
            positions: self.input.positions(),
            sequences: self.input.sequences(),
            tables: self.input.tables(),
            num_rows: self.input.num_rows(),
            q_scale: std::f32::consts::LOG2_E / (geometry.head_dim as f32).sqrt(),
            table_stride: self.input.table_stride() as u32,
            num_heads: geometry.num_heads as u32,
            num_kv_heads: geometry.num_kv_heads as u32,
            head_dim: geometry.head_dim as u32,
            pad: 0,
        };
        // A few rows alone would leave most of the device idle.
        let heads = geometry.num_heads + 2 * geometry.num_kv_heads;
        let shares = if self.rows < 64 {
            heads.div_ceil(4) as u32
        } else {
            2
        };
        let shape = Shape::grid2(self.rows as u32, shares, 128, 0);
        // SAFETY: the caller's promise.
        unsafe { self.launch(self.attend.rope, shape, Args::new().pod(&args)) }
    }

    unsafe fn attend_pages(&self, layer: usize) -> Result<(), DeviceError> {
        let (geometry, kernels) = (&self.context.geometry, self.attend);
        let args = AttendArgs {
            out: self.buffers.attended.address(),
            q: self.buffers.q.address(),
            pages: self.pages(layer),
            positions: self.input.positions(),
            tables: self.input.tables(),
            items: self.input.narrow(),
            num_items: self.input.num_narrow(),
            slot_outputs: self.buffers.slot_outputs.address(),
            slot_softmax: self.buffers.slot_softmax.address(),
            counters: self.buffers.counters.address(),
            out_stride: (row_stride(geometry.num_heads * geometry.head_dim) / 2) as u32,
            table_stride: self.input.table_stride() as u32,
            num_heads: geometry.num_heads as u32,
            num_kv_heads: geometry.num_kv_heads as u32,
            head_dim: geometry.head_dim as u32,
            window: geometry
                .sliding_window
                .map_or(u32::MAX, |window| u32::try_from(window).unwrap_or(u32::MAX)),
        };
        let wide = AttendArgs {
            items: self.input.wide(),
            num_items: self.input.num_wide(),
            ..args
        };
        let kv_heads = geometry.num_kv_heads;
        let blocks = attend_blocks(self.context);
        // SAFETY: the caller's promise.
        unsafe {
            if self.has_narrow {
                let blocks = blocks.div_ceil(kv_heads) as u32;
                let shape = AttendKernels::narrow_shape(blocks, kv_heads as u32);
                self.launch(kernels.narrow, shape, Args::new().pod(&args))?;
            }
            if self.wide_items > 0 {
                // A block each: the device begins one where another has ended, the long ones first.
                let blocks = blocks.max(self.wide_items * kv_heads) as u32;
                let shape = kernels.wide_shape(blocks);
                self.launch(kernels.wide, shape, Args::new().pod(&wide))?;
            }
        }
        Ok(())
    }

    /// The norm before the experts, the gate, and which expert gets which row; counted at `chosen` unless that is 0.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn route(
        &self,
        weights: &LayerWeights,
        norm: Norm<'_>,
        chosen: u64,
    ) -> Result<(), DeviceError> {
        let (geometry, kernels) = (&self.context.geometry, &self.context.kernels);
        let buffers = self.buffers;
        let args = RouteArgs {
            topk_ids: buffers.topk_ids.address(),
            topk_weights: buffers.topk_weights.address(),
            offsets: buffers.offsets.address(),
            row_of: buffers.row_of.address(),
            slot_of: buffers.slot_of.address(),
            scores: weights
                .gate
                .as_ref()
                .map_or(0, |_| buffers.scores.address()),
            num_rows: self.input.num_rows(),
            chosen,
            num_experts: geometry.num_experts as u32,
            top_k: geometry.top_k as u32,
        };
        let args = || Args::new().pod(&args);
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(gate) = &weights.gate {
                let gate = GateArgs {
                    gate: gate.address(),
                    scores: buffers.scores.address(),
                    num_experts: geometry.num_experts as u32,
                    pad: 0,
                };
                let (kernel, shape) = norm.kernels.norm_gate(self.rows);
                self.launch(kernel, shape, Args::new().pod(&norm.args).pod(&gate))?;
            } else {
                self.norm(norm)?;
            }
            if self.rows <= ROUTE_ROWS_MAX {
                return self.launch(kernels.route, Kernels::route_shape(), args());
            }
            let shape = Kernels::choose_shape(self.rows);
            self.launch(kernels.choose, shape, args())?;
            let shape = Kernels::lists_shape();
            self.launch(kernels.lists, shape, args())
        }
    }

    /// Logits of normalised rows.
    ///
    /// # Safety
    /// As `launch`.
    pub(super) unsafe fn lm_head(&self) -> Result<(), DeviceError> {
        let out = Out {
            address: self.outputs.logits(),
            is_added: false,
        };
        // SAFETY: the caller's promise.
        unsafe {
            self.context
                .linear(self.stream, &self.weights.lm_head, self.bf16_rows(), out)
        }
    }
}

/// Blocks of attention that keep the device busy.
fn attend_blocks(context: &Context) -> usize {
    ATTEND_BLOCKS * context.device.info().multiprocessors.max(1) as usize
}
