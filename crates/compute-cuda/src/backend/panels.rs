//! Products of long batches by panels: rows in the order in which blocks of a cluster share them (`kernels/panels.cu`).
//! Decides when, owns the memory and queues; the bits are those of rows.

use tramontane_types::{ModelGeometry, SEGMENTS_PER_EXPERT, slice};

use super::abi::{Down, GateUp, Linear, Panels as PanelsArgs, RoundPanels};
use super::call::Lists;
use super::context::{Context, Matrix, Out, Rows};
use super::format::{Formats, Packing};
use super::products::{GATE_UP_PANELS_SHARED, TREE_PANELS_SHARED};
use crate::device::{Args, Buffer, Device, DeviceError, Kernel, Shape, Stream};
use crate::target::Target;

/// From so many rows of a step on they are worth the copy, and from so many for each expert.
const ROWS_MIN: usize = 512;
const EXPERT_ROWS_MIN: usize = 64;
/// Slots behind the last one that a tile may read, and does not use.
const SLACK: usize = 128;
/// Jobs begin at multiples of it.
const JOB_SLOTS: usize = 8;
/// Tokens of a tile, rows of a block (gate_up: columns of ff), blocks of a cluster, threads.
const GATE_UP: (usize, usize) = (256, 64);
const TREE: (usize, usize) = (128, 128);
const CLUSTER: usize = 2;
const THREADS: u32 = 384;
/// Bytes of a slot in a panel.
const LINE: usize = 128;
/// Scales of a slot at most, one for each part of its row.
const PARTS: usize = SEGMENTS_PER_EXPERT as usize;

/// The kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct PanelKernels {
    /// Of the weights, and so of the rows.
    packing: Packing,
    pack: Kernel,
    linear: Kernel,
    gate_up: Kernel,
    /// Makes what `down` reads of what `gate_up` writes, where that is not the same.
    round: Option<Kernel>,
    down: Kernel,
}

impl PanelKernels {
    /// `None` where there are none for the target, the formats or the model's shape.
    pub(super) fn find(
        device: &dyn Device,
        formats: Formats,
        geometry: &ModelGeometry,
    ) -> Result<Option<Self>, DeviceError> {
        let packing = formats.experts;
        let ([linear, gate_up, down], round) = match (formats.dense, packing) {
            (Packing::Bf16, Packing::Bf16) => (BF16, None),
            (Packing::E4m3, Packing::E4m3) => (E4M3, Some("tr_round_panels_e4m3")),
            _ => return Ok(None),
        };
        if device.info().target != Target::Sm90a || !fits(geometry, packing) {
            return Ok(None);
        }
        Ok(Some(Self {
            packing,
            pack: device.kernel("tr_panels", 0)?,
            linear: device.kernel(linear, TREE_PANELS_SHARED)?,
            gate_up: device.kernel(gate_up, GATE_UP_PANELS_SHARED)?,
            round: round.map(|name| device.kernel(name, 0)).transpose()?,
            down: device.kernel(down, TREE_PANELS_SHARED)?,
        }))
    }
}

/// Linear, gate_up and down.
const BF16: [&str; 3] = [
    "tr_linear_bf16_cl_n128",
    "tr_gate_up_bf16_cl_n256",
    "tr_down_bf16_cl_n128",
];
const E4M3: [&str; 3] = [
    "tr_linear_e4m3_cl_n128",
    "tr_gate_up_e4m3_cl_n256",
    "tr_down_e4m3_cl_n128",
];

/// Whether every matrix is whole steps, blocks and clusters. A part has an even number of steps, and none of them may be empty: in
/// panels the next part's columns would stand there.
fn fits(g: &ModelGeometry, packing: Packing) -> bool {
    let whole = PARTS * 2 * packing.step_cols();
    let heads = g.num_heads * g.head_dim;
    let qkv = heads + 2 * g.num_kv_heads * g.head_dim;
    let is_whole = [g.hidden, g.ff, heads].into_iter().all(|n| n % whole == 0);
    is_whole
        && [qkv, g.hidden]
            .into_iter()
            .all(|n| n % (TREE.1 * CLUSTER) == 0)
}

/// Slots of so many rows in so many jobs.
const fn slots(rows: usize, jobs: usize) -> usize {
    rows.next_multiple_of(JOB_SLOTS) + jobs * JOB_SLOTS
}

/// `None` where there is no memory: steps take longer then.
fn memory(context: &Context, bytes: usize) -> Option<Buffer> {
    let buffer = context.buffer(bytes);
    if let Err(error) = &buffer {
        tracing::warn!(bytes, %error, "no memory for panels: long steps take longer");
    }
    buffer.ok()
}

/// Memory for panels of rows.
#[derive(Debug)]
pub(super) struct Panels {
    kernels: PanelKernels,
    /// The panels, then the scales of e4m3: `[PARTS, slots]` f32.
    buffer: Buffer,
    scales_at: usize,
    slots: usize,
}

impl Panels {
    /// For as many rows of up to `cols` columns, in `jobs` jobs; `None` where steps are too short, or there are no kernels,
    /// or no memory for them.
    pub(super) fn new(
        context: &Context,
        max_rows: usize,
        (rows, jobs): (usize, usize),
        cols: usize,
    ) -> Option<Self> {
        let kernels = context.kernels.panels.filter(|_| max_rows >= ROWS_MIN)?;
        let slots = slots(rows, jobs) + SLACK;
        let scales_at = slots * cols / kernels.packing.step_cols() * LINE;
        let scales = match kernels.packing {
            Packing::Bf16 | Packing::Q4 => 0,
            Packing::E4m3 => slots * PARTS * size_of::<f32>(),
        };
        Some(Self {
            kernels,
            buffer: memory(context, scales_at + scales)?,
            scales_at,
            slots,
        })
    }

    /// Whether the dense products of a step of so many rows take them.
    pub(super) const fn are_for(rows: usize) -> bool {
        rows >= ROWS_MIN
    }

    const fn stride(&self) -> usize {
        self.slots * LINE
    }

    /// Where scales begin; the end where there are none.
    fn scales(&self) -> u64 {
        self.buffer.at(self.scales_at)
    }

    /// # Safety
    /// As [`Stream::launch`], and so below.
    unsafe fn fill(
        &self,
        stream: &Stream,
        rows: Rows,
        cols: usize,
        source: PanelsArgs,
    ) -> Result<(), DeviceError> {
        let panels = cols / self.kernels.packing.step_cols();
        let args = PanelsArgs {
            out: self.buffer.address(),
            x: rows.address,
            x_scales: rows.scales,
            scales: self.scales(),
            panels: panels as i32,
            x_stride: rows.stride as i32,
            slots: self.slots as i32,
            ..source
        };
        let grid = [self.slots.div_ceil(32), panels.div_ceil(8)].map(|n| n as u32);
        let shape = Shape::grid2(grid[0], grid[1], 256, 0);
        // SAFETY: the caller's promise.
        unsafe { stream.launch(self.kernels.pack, shape, Args::new().pod(&args)) }
    }

    /// As [`Context::linear`]; the device finds the number of rows at `num_rows`.
    pub(super) unsafe fn linear(
        &self,
        stream: &Stream,
        matrix: &Matrix,
        (rows, num_rows): (Rows, u64),
        out: Out,
    ) -> Result<(), DeviceError> {
        let source = PanelsArgs {
            num_rows,
            ..PanelsArgs::default()
        };
        let panels = Rows {
            address: self.buffer.address(),
            stride: self.stride(),
            scales: self.scales(),
            ..rows
        };
        let args: Linear = matrix.product(panels, out);
        let grid = [rows.num_tokens.div_ceil(TREE.0), matrix.rows() / TREE.1].map(|n| n as u32);
        let shape = Shape::grid2(grid[0], grid[1], THREADS, TREE_PANELS_SHARED);
        // SAFETY: the caller's promise.
        unsafe {
            self.fill(stream, rows, matrix.cols(), source)?;
            stream.launch(self.kernels.linear, shape, Args::new().pod(&args))
        }
    }
}

/// Memory for both products of experts.
#[derive(Debug)]
pub(super) struct ExpertPanels {
    /// What products read: rows, and when the first has read these, hidden rows where they are rounded.
    rows: Panels,
    /// What the first product writes: hidden rows, panels of bf16.
    hidden: Buffer,
}

impl ExpertPanels {
    /// `None` as [`Panels::new`].
    pub(super) fn new(context: &Context, max_rows: usize) -> Option<Self> {
        let (g, kernels) = (&context.geometry, context.kernels.panels?);
        if max_rows < Self::rows_min(g) {
            return None;
        }
        let cols = match kernels.round {
            Some(_) => g.hidden.max(g.ff),
            None => g.hidden,
        };
        let sizes = (max_rows * g.top_k, g.num_experts);
        let rows = Panels::new(context, max_rows, sizes, cols)?;
        let hidden = memory(context, rows.slots * g.ff * size_of::<u16>())?;
        Some(Self { rows, hidden })
    }

    /// Fewest rows of a step that take them.
    pub(super) fn rows_min(geometry: &ModelGeometry) -> usize {
        let of_all = EXPERT_ROWS_MIN * geometry.num_experts;
        ROWS_MIN.max(of_all.div_ceil(geometry.top_k))
    }

    /// Both products of whole experts: of `x`, and of what comes of it, into `outputs`.
    pub(super) unsafe fn products(
        &self,
        context: &Context,
        stream: &Stream,
        lists: &Lists,
        x: Rows,
        outputs: u64,
    ) -> Result<(), DeviceError> {
        let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
        let Self { rows, .. } = self;
        let source = PanelsArgs {
            row_ids: lists.row_ids,
            offsets: lists.offsets,
            jobs: lists.num_jobs as i32,
            ..PanelsArgs::default()
        };
        let gate_up = GateUp {
            out: self.hidden.address(),
            experts: lists.entries,
            jobs: lists.jobs,
            offsets: lists.offsets,
            row_ids: lists.row_ids,
            x: rows.buffer.address(),
            x_scales: rows.scales(),
            hidden: hidden as i32,
            ff: ff as i32,
            x_stride: rows.stride() as i32,
            out_stride: rows.slots as i32,
        };
        let shape = grid(lists, GATE_UP, ff, GATE_UP_PANELS_SHARED);
        // SAFETY: the caller's promise.
        unsafe {
            rows.fill(stream, x, hidden, source)?;
            stream.launch(rows.kernels.gate_up, shape, Args::new().pod(&gate_up))?;
        }
        let mut read = &self.hidden;
        if let Some(round) = rows.kernels.round {
            // SAFETY: the caller's promise; the first product has read what lies there.
            unsafe { self.round(stream, round, lists, ff)? };
            read = &rows.buffer;
        }
        let down = Down {
            out: outputs,
            experts: lists.entries,
            jobs: lists.jobs,
            offsets: lists.offsets,
            x: read.address(),
            x_scales: rows.scales(),
            hidden: hidden as i32,
            ff: ff as i32,
            x_stride: rows.stride() as i32,
            pad: 0,
        };
        let shape = grid(lists, TREE, hidden, TREE_PANELS_SHARED);
        // SAFETY: the caller's promise.
        unsafe { stream.launch(rows.kernels.down, shape, Args::new().pod(&down)) }
    }

    /// Rounds the hidden rows to where the rows were.
    unsafe fn round(
        &self,
        stream: &Stream,
        kernel: Kernel,
        lists: &Lists,
        ff: usize,
    ) -> Result<(), DeviceError> {
        let args = RoundPanels {
            out: self.rows.buffer.address(),
            scales: self.rows.scales(),
            panels: self.hidden.address(),
            part_cols: slice::segment_len(ff) as u32,
            slots: self.rows.slots as u32,
        };
        let blocks = slots(lists.most_pairs, lists.num_jobs) / JOB_SLOTS;
        let shape = Shape::grid2(blocks as u32, PARTS as u32, 256, 0);
        // SAFETY: the caller's promise.
        unsafe { stream.launch(kernel, shape, Args::new().pod(&args)) }
    }
}

/// Blocks of a product of experts: tokens of a tile, rows of a block, of so many rows.
fn grid(lists: &Lists, (tokens, rows): (usize, usize), of: usize, shared: u32) -> Shape {
    let sizes = [lists.most_rows.div_ceil(tokens), of / rows, lists.num_jobs];
    Shape::grid3(sizes.map(|n| n as u32), THREADS, shared)
}
