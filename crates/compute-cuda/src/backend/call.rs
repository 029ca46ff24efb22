//! One expert call: rows up, two products, partial sums down, in passes of bounded size. Holds no weights.

use std::ops::Range;

use tramontane_compute::{Error, ExpertJob, RowFormat};
use tramontane_types::slice;

use super::abi::{Down, GateUp, JobEntry};
use super::context::{Context, failed};
use crate::device::{Args, Buffer, DeviceError, Pinned, Stream};

/// (row, expert) pairs of one pass. A call of more takes several; its results do not depend on that.
const PAIRS_MAX: usize = 1024;
/// Output vectors of one pass, by the same reason: a range of segments has up to four nodes.
const VECTORS_MAX: usize = 2048;
/// Jobs of one pass.
const JOBS_MAX: usize = 512;

/// The memory of calls, and their stream.
#[derive(Debug)]
pub(super) struct Call {
    stream: Stream,
    /// What a pass needs to know, then its rows: one copy up.
    input: Pinned,
    input_on_device: Buffer,
    /// Row of each pair, `[PAIRS_MAX]`; behind the jobs and their offsets.
    layout: Layout,
    /// `[PAIRS_MAX, ff rounded up]` bf16.
    hidden_rows: Buffer,
    /// `[VECTORS_MAX, hidden]` f32.
    outputs: Buffer,
    outputs_on_host: Pinned,
}

/// Where things are in the input, in bytes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    offsets: usize,
    row_ids: usize,
    rows: usize,
    row_stride: usize,
    bytes: usize,
}

impl Layout {
    fn new(hidden: usize) -> Self {
        let align = |bytes: usize| bytes.next_multiple_of(256);
        let offsets = align(JOBS_MAX * size_of::<JobEntry>());
        let row_ids = offsets + align((JOBS_MAX + 1) * size_of::<i32>());
        let rows = row_ids + align(PAIRS_MAX * size_of::<i32>());
        let row_stride = row_stride(hidden);
        Self {
            offsets,
            row_ids,
            rows,
            row_stride,
            bytes: rows + PAIRS_MAX * row_stride,
        }
    }
}

/// Bytes from row to row of bf16 rows that a product reads.
pub(super) const fn row_stride(cols: usize) -> usize {
    cols.next_multiple_of(8) * 2
}

/// Elements from row to row of what the gate and up product writes.
pub(super) const fn ff_stride(ff: usize) -> usize {
    ff.next_multiple_of(32)
}

/// Some rows of a job.
struct PassJob<'a> {
    job: &'a ExpertJob<'a>,
    rows: Range<usize>,
    num_nodes: usize,
}

impl Call {
    pub(super) fn new(context: &Context) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let layout = Layout::new(geometry.hidden);
        let outputs = VECTORS_MAX * geometry.hidden * size_of::<f32>();
        Ok(Self {
            stream: context.stream()?,
            input: context.pinned(layout.bytes)?,
            input_on_device: context.buffer(layout.bytes)?,
            layout,
            hidden_rows: context.buffer(PAIRS_MAX * ff_stride(geometry.ff) * 2)?,
            outputs: context.buffer(outputs)?,
            outputs_on_host: context.pinned(outputs)?,
        })
    }

    /// Computes jobs that were checked, with the experts at `entries`.
    pub(super) fn run(
        &mut self,
        context: &Context,
        entries: u64,
        rows: &[u8],
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let num_segments = context.geometry.num_segments();
        let mut pass: Vec<PassJob<'_>> = Vec::new();
        let (mut pairs, mut vectors) = (0, 0);
        for job in jobs {
            let num_nodes = job.range.num_nodes(num_segments);
            let mut begin = 0;
            // A range behind the last column has no node, and no output.
            while begin < job.row_ids.len() && num_nodes > 0 {
                let room = (PAIRS_MAX - pairs).min((VECTORS_MAX - vectors) / num_nodes);
                if room == 0 || pass.len() == JOBS_MAX {
                    self.pass(context, entries, rows, &pass, out)?;
                    pass.clear();
                    (pairs, vectors) = (0, 0);
                    continue;
                }
                let end = job.row_ids.len().min(begin + room);
                pass.push(PassJob {
                    job,
                    rows: begin..end,
                    num_nodes,
                });
                pairs += end - begin;
                vectors += (end - begin) * num_nodes;
                begin = end;
            }
        }
        self.pass(context, entries, rows, &pass, out)
    }

    fn pass(
        &mut self,
        context: &Context,
        entries: u64,
        rows: &[u8],
        jobs: &[PassJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        if jobs.is_empty() {
            return Ok(());
        }
        let (pairs, vectors) = self.fill(context, rows, jobs);
        let most = jobs.iter().map(|job| job.rows.len()).max().unwrap_or(0);
        let values = vectors * context.geometry.hidden;
        let mut queued = || -> Result<(), DeviceError> {
            let bytes = self.layout.rows + pairs * self.layout.row_stride;
            // SAFETY: everything lives in `self`, and the wait is below; the input is laid out as the kernels want it.
            unsafe {
                self.stream
                    .upload(&self.input_on_device, &self.input, bytes)?;
                self.products(context, entries, jobs.len(), most)?;
                let bytes = values * size_of::<f32>();
                self.stream
                    .download(&mut self.outputs_on_host, &self.outputs, 0, bytes)?;
            }
            self.stream.synchronize()
        };
        queued().map_err(failed("computing experts"))?;
        out.extend_from_slice(&self.outputs_on_host.as_slice::<f32>()[..values]);
        Ok(())
    }

    /// Writes what a pass reads; how many pairs and vectors it has.
    fn fill(&mut self, context: &Context, rows: &[u8], jobs: &[PassJob<'_>]) -> (usize, usize) {
        let row_bytes = RowFormat::Bf16.row_bytes(context.geometry.hidden);
        let layout = self.layout;
        let input = self.input.as_mut_slice::<u8>();
        let (mut pairs, mut vectors) = (0, 0);
        for (
            i,
            PassJob {
                job,
                rows: some,
                num_nodes,
            },
        ) in jobs.iter().enumerate()
        {
            let entry = JobEntry {
                expert: i32::from(job.expert.0),
                begin: i32::from(job.range.begin()),
                end: i32::from(job.range.end()),
                out: vectors as i32,
            };
            put(input, i * size_of::<JobEntry>(), bytemuck::bytes_of(&entry));
            put(input, layout.offsets + 4 * i, &(pairs as i32).to_ne_bytes());
            for &row in &job.row_ids[some.clone()] {
                // Rows lie in the order of the pairs: a row of two experts lies there twice.
                put(
                    input,
                    layout.row_ids + 4 * pairs,
                    &(pairs as i32).to_ne_bytes(),
                );
                let from = &rows[row as usize * row_bytes..][..row_bytes];
                put(input, layout.rows + pairs * layout.row_stride, from);
                pairs += 1;
            }
            vectors += some.len() * num_nodes;
        }
        let end = layout.offsets + 4 * jobs.len();
        put(input, end, &(pairs as i32).to_ne_bytes());
        (pairs, vectors)
    }

    /// Queues both products.
    ///
    /// # Safety
    /// As [`Stream::launch`].
    unsafe fn products(
        &self,
        context: &Context,
        entries: u64,
        num_jobs: usize,
        most_rows: usize,
    ) -> Result<(), DeviceError> {
        let input = &self.input_on_device;
        let lists = Lists {
            entries,
            jobs: input.address(),
            num_jobs,
            offsets: input.at(self.layout.offsets),
            row_ids: input.at(self.layout.row_ids),
            most_rows,
            usual_rows: most_rows,
        };
        let x = (input.at(self.layout.rows), self.layout.row_stride);
        // SAFETY: the caller's promise.
        unsafe {
            expert_products(
                context,
                &self.stream,
                &lists,
                x,
                (self.hidden_rows.address(), self.outputs.address()),
            )
        }
    }
}

/// Which rows go to which experts, on the device.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lists {
    /// The layer's experts.
    pub(super) entries: u64,
    pub(super) jobs: u64,
    pub(super) num_jobs: usize,
    pub(super) offsets: u64,
    pub(super) row_ids: u64,
    /// Most rows that one job may have.
    pub(super) most_rows: usize,
    /// Rows that a job is likely to have: decides the tile.
    pub(super) usual_rows: usize,
}

/// Queues the two products of experts: of `x` (address and stride in bytes) into `hidden` rows, of these into `outputs`.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn expert_products(
    context: &Context,
    stream: &Stream,
    lists: &Lists,
    x: (u64, usize),
    (hidden_rows, outputs): (u64, u64),
) -> Result<(), DeviceError> {
    // SAFETY: the caller's promise.
    unsafe {
        gate_up_product(context, stream, lists, x, hidden_rows)?;
        down_product(context, stream, lists, hidden_rows, outputs)
    }
}

/// The first of them: the columns of the jobs' segments of `hidden` rows.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn gate_up_product(
    context: &Context,
    stream: &Stream,
    lists: &Lists,
    (x, x_stride): (u64, usize),
    hidden_rows: u64,
) -> Result<(), DeviceError> {
    let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
    let gate_up = context.kernels.gate_up.for_tokens(lists.usual_rows);
    let args = GateUp {
        out: hidden_rows,
        experts: lists.entries,
        jobs: lists.jobs,
        offsets: lists.offsets,
        row_ids: lists.row_ids,
        x,
        x_scales: 0,
        hidden: hidden as i32,
        ff: ff as i32,
        x_stride: x_stride as i32,
        out_stride: ff_stride(ff) as i32,
    };
    let columns = slice::segment_len(ff);
    let shape = gate_up.segments_shape(lists.most_rows, columns, lists.num_jobs);
    // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
    unsafe { stream.launch(gate_up.kernel, shape, Args::new().pod(&args)) }
}

/// The second: partial sums of the jobs' segments into `outputs`.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn down_product(
    context: &Context,
    stream: &Stream,
    lists: &Lists,
    hidden_rows: u64,
    outputs: u64,
) -> Result<(), DeviceError> {
    let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
    let down = context.kernels.down.for_tokens(lists.usual_rows);
    let args = Down {
        out: outputs,
        experts: lists.entries,
        jobs: lists.jobs,
        offsets: lists.offsets,
        x: hidden_rows,
        x_scales: 0,
        hidden: hidden as i32,
        ff: ff as i32,
        x_stride: (ff_stride(ff) * 2) as i32,
        pad: 0,
    };
    let shape = down.shape(lists.most_rows, hidden, lists.num_jobs);
    // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
    unsafe { stream.launch(down.kernel, shape, Args::new().pod(&args)) }
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}
