//! Products of long batches by panels: rows in the order in which blocks of a cluster share them (`kernels/panels.cu`).
//! Decides when, owns the memory and queues; the bits are those of rows.

use tramontane_types::{ModelGeometry, SEGMENTS_PER_EXPERT};

use super::abi::{Down, GateUp, Linear, Panels as PanelsArgs};
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
/// A part is steps without a rest, and clusters too: every segment and every dense part has a multiple of so many columns.
const PART_COLS: usize = 128;
/// Bytes of a slot in a panel.
const LINE: usize = 128;

/// The kernels.
#[derive(Clone, Copy, Debug)]
pub(super) struct PanelKernels {
    pack: Kernel,
    linear: Kernel,
    gate_up: Kernel,
    down: Kernel,
}

impl PanelKernels {
    /// `None` where there are none for the target, the formats or the model's shape.
    pub(super) fn find(
        device: &dyn Device,
        formats: Formats,
        geometry: &ModelGeometry,
    ) -> Result<Option<Self>, DeviceError> {
        let is_bf16 = formats.dense == Packing::Bf16 && formats.experts == Packing::Bf16;
        if device.info().target != Target::Sm90a || !is_bf16 || !fits(geometry) {
            return Ok(None);
        }
        Ok(Some(Self {
            pack: device.kernel("tr_panels", 0)?,
            linear: device.kernel("tr_linear_bf16_cl_n128", TREE_PANELS_SHARED)?,
            gate_up: device.kernel("tr_gate_up_bf16_cl_n256", GATE_UP_PANELS_SHARED)?,
            down: device.kernel("tr_down_bf16_cl_n128", TREE_PANELS_SHARED)?,
        }))
    }
}

/// Whether every matrix is whole steps, blocks and clusters.
fn fits(g: &ModelGeometry) -> bool {
    let whole = usize::from(SEGMENTS_PER_EXPERT) * PART_COLS;
    let heads = g.num_heads * g.head_dim;
    let qkv = heads + 2 * g.num_kv_heads * g.head_dim;
    let is_whole = [g.hidden, g.ff, heads].into_iter().all(|n| n % whole == 0);
    is_whole
        && [qkv, g.hidden]
            .into_iter()
            .all(|n| n % (TREE.1 * CLUSTER) == 0)
}

/// Memory for panels of rows.
#[derive(Debug)]
pub(super) struct Panels {
    kernels: PanelKernels,
    buffer: Buffer,
    slots: usize,
}

impl Panels {
    /// For as many rows of up to `cols` columns, in `jobs` jobs; `None` where steps are too short, or there are no kernels,
    /// or no memory for them: steps take longer then.
    pub(super) fn new(
        context: &Context,
        max_rows: usize,
        (rows, jobs): (usize, usize),
        cols: usize,
    ) -> Option<Self> {
        let kernels = context.kernels.panels.filter(|_| max_rows >= ROWS_MIN)?;
        let slots = rows.next_multiple_of(JOB_SLOTS) + jobs * JOB_SLOTS + SLACK;
        let bytes = slots * cols * 2;
        let buffer = match context.buffer(bytes) {
            Ok(buffer) => buffer,
            Err(error) => {
                tracing::warn!(bytes, %error, "no memory for panels: long steps take longer");
                return None;
            }
        };
        Some(Self {
            kernels,
            buffer,
            slots,
        })
    }

    /// Whether the dense products of a step of so many rows take them.
    pub(super) const fn are_for(rows: usize) -> bool {
        rows >= ROWS_MIN
    }

    /// Fewest rows of a step whose experts take them.
    pub(super) fn rows_min(geometry: &ModelGeometry) -> usize {
        let of_all = EXPERT_ROWS_MIN * geometry.num_experts;
        ROWS_MIN.max(of_all.div_ceil(geometry.top_k))
    }

    const fn stride(&self) -> usize {
        self.slots * LINE
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
        let args = PanelsArgs {
            out: self.buffer.address(),
            x: rows.address,
            panels: (cols / 64) as i32,
            x_stride: rows.stride as i32,
            slots: self.slots as i32,
            ..source
        };
        let grid = [self.slots.div_ceil(32), (cols / 64).div_ceil(8)].map(|n| n as u32);
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

    /// Both products of whole experts: of `x` into `hidden`, panels too, and of these into `outputs`.
    pub(super) unsafe fn experts(
        &self,
        context: &Context,
        stream: &Stream,
        lists: &Lists,
        x: Rows,
        (hidden_rows, outputs): (&Self, u64),
    ) -> Result<(), DeviceError> {
        let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
        let source = PanelsArgs {
            row_ids: lists.row_ids,
            offsets: lists.offsets,
            jobs: lists.num_jobs as i32,
            ..PanelsArgs::default()
        };
        let gate_up = GateUp {
            out: hidden_rows.buffer.address(),
            experts: lists.entries,
            jobs: lists.jobs,
            offsets: lists.offsets,
            row_ids: lists.row_ids,
            x: self.buffer.address(),
            x_scales: 0,
            hidden: hidden as i32,
            ff: ff as i32,
            x_stride: self.stride() as i32,
            out_stride: hidden_rows.slots as i32,
        };
        let down = Down {
            out: outputs,
            experts: lists.entries,
            jobs: lists.jobs,
            offsets: lists.offsets,
            x: hidden_rows.buffer.address(),
            x_scales: 0,
            hidden: hidden as i32,
            ff: ff as i32,
            x_stride: hidden_rows.stride() as i32,
            pad: 0,
        };
        let grid = |(tokens, rows): (usize, usize), of: usize, shared| {
            let sizes = [lists.most_rows.div_ceil(tokens), of / rows, lists.num_jobs];
            Shape::grid3(sizes.map(|n| n as u32), THREADS, shared)
        };
        // SAFETY: the caller's promise.
        unsafe {
            self.fill(stream, x, hidden, source)?;
            let shape = grid(GATE_UP, ff, GATE_UP_PANELS_SHARED);
            stream.launch(self.kernels.gate_up, shape, Args::new().pod(&gate_up))?;
            let shape = grid(TREE, hidden, TREE_PANELS_SHARED);
            stream.launch(self.kernels.down, shape, Args::new().pod(&down))
        }
    }
}
