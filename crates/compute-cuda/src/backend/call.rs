//! One expert call: rows up, two products, partial sums down, in passes of bounded size. Holds no weights.

use std::ops::Range;

use tramontane_compute::{Error, ExpertJob, RowFormat};
use tramontane_types::slice;

use super::abi::{Down, GateUp, JobEntry};
use super::context::{Context, Rows, failed};
use super::round::RoundedRows;
use crate::device::{Args, Buffer, DeviceError, Pinned, Stream};

/// (row, expert) pairs of one pass. A call of more takes several; its results do not depend on that.
pub(super) const PAIRS_MAX: usize = 1024;
/// Output vectors of one pass, by the same reason: a range of segments has up to four nodes.
pub(super) const VECTORS_MAX: usize = 2048;
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
    /// The rows as e4m3, where the experts read that.
    rounded: Option<RoundedRows>,
    /// `[PAIRS_MAX, ff]`.
    hidden: Hidden,
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
const fn ff_stride(ff: usize) -> usize {
    ff.next_multiple_of(32)
}

/// What the first product of experts writes, for the second: a row for each (row, expert) pair.
#[derive(Debug)]
pub(super) struct Hidden {
    /// `[pairs, ff rounded up]` bf16.
    rows: Buffer,
    /// The same as e4m3, where the experts read that.
    rounded: Option<RoundedRows>,
}

impl Hidden {
    pub(super) fn new(context: &Context, pairs: usize) -> Result<Self, Error> {
        Ok(Self {
            rows: context.buffer(pairs * ff_stride(context.geometry.ff) * 2)?,
            rounded: RoundedRows::of_segments(context, pairs)?,
        })
    }

    fn as_bf16(&self, context: &Context, pairs: usize) -> Rows {
        Rows {
            address: self.rows.address(),
            num_tokens: pairs,
            stride: ff_stride(context.geometry.ff) * 2,
            scales: 0,
        }
    }
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
            rounded: RoundedRows::new(context, PAIRS_MAX, geometry.hidden)?,
            hidden: Hidden::new(context, PAIRS_MAX)?,
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
        let num_segments = context.geometry.num_segments();
        let is_whole = jobs.iter().all(|job| {
            let range = job.job.range;
            range.begin() == 0 && range.end() >= num_segments
        });
        let mut queued = || -> Result<(), DeviceError> {
            let bytes = self.layout.rows + pairs * self.layout.row_stride;
            // SAFETY: everything lives in `self`, and the wait is below; the input is laid out as the kernels want it.
            unsafe {
                self.stream
                    .upload(&self.input_on_device, &self.input, bytes)?;
                self.products(context, entries, jobs.len(), (pairs, most), is_whole)?;
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
        (pairs, most_rows): (usize, usize),
        is_whole: bool,
    ) -> Result<(), DeviceError> {
        let input = &self.input_on_device;
        let lists = Lists {
            entries,
            jobs: input.address(),
            num_jobs,
            offsets: input.at(self.layout.offsets),
            row_ids: input.at(self.layout.row_ids),
            most_pairs: pairs,
            most_rows,
            usual_rows: most_rows,
            is_whole,
        };
        let mut x = Rows {
            address: input.at(self.layout.rows),
            num_tokens: pairs,
            stride: self.layout.row_stride,
            scales: 0,
        };
        // SAFETY: the caller's promise.
        unsafe {
            if let Some(rounded) = &self.rounded {
                // Each pair has a row of its own.
                rounded.fill(&self.stream, x, lists.num_pairs())?;
                x = rounded.as_rows(pairs);
            }
            let to = (&self.hidden, self.outputs.address());
            expert_products(context, &self.stream, &lists, x, to)
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
    /// Most pairs of all jobs together.
    pub(super) most_pairs: usize,
    /// Most rows that one job may have.
    pub(super) most_rows: usize,
    /// Rows that a job is likely to have: decides the tile.
    pub(super) usual_rows: usize,
    /// Whether every job has all segments of its expert.
    pub(super) is_whole: bool,
}

impl Lists {
    /// Where the device finds the number of pairs: the last offset.
    const fn num_pairs(&self) -> u64 {
        self.offsets + (self.num_jobs * size_of::<i32>()) as u64
    }
}

/// Queues the two products of experts: of `x` into hidden rows, of these into outputs.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn expert_products(
    context: &Context,
    stream: &Stream,
    lists: &Lists,
    x: Rows,
    (hidden_rows, outputs): (&Hidden, u64),
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
    x: Rows,
    hidden_rows: &Hidden,
) -> Result<(), DeviceError> {
    let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
    let gate_up = context.kernels.gate_up.for_tokens(lists.usual_rows);
    let args = GateUp {
        out: hidden_rows.rows.address(),
        experts: lists.entries,
        jobs: lists.jobs,
        offsets: lists.offsets,
        row_ids: lists.row_ids,
        x: x.address,
        x_scales: x.scales,
        hidden: hidden as i32,
        ff: ff as i32,
        x_stride: x.stride as i32,
        out_stride: ff_stride(ff) as i32,
    };
    let columns = slice::segment_len(ff);
    let shape = gate_up.segments_shape(lists.most_rows, columns, lists.num_jobs);
    // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
    unsafe { stream.launch(gate_up.kernel, shape, Args::new().pod(&args)) }?;
    if let Some(rounded) = &hidden_rows.rounded {
        // Segments that no job has are rounded too, and not read.
        let rows = hidden_rows.as_bf16(context, lists.most_pairs);
        // SAFETY: as above.
        unsafe { rounded.fill(stream, rows, lists.num_pairs()) }?;
    }
    Ok(())
}

/// The second: partial sums of the jobs' segments into `outputs`.
///
/// # Safety
/// As [`Stream::launch`].
pub(super) unsafe fn down_product(
    context: &Context,
    stream: &Stream,
    lists: &Lists,
    hidden_rows: &Hidden,
    outputs: u64,
) -> Result<(), DeviceError> {
    let (hidden, ff) = (context.geometry.hidden, context.geometry.ff);
    let x = match &hidden_rows.rounded {
        Some(rounded) => rounded.as_rows(lists.most_pairs),
        None => hidden_rows.as_bf16(context, lists.most_pairs),
    };
    let down = if lists.is_whole {
        &context.kernels.down
    } else {
        &context.kernels.down_of_some
    };
    let down = down.for_tokens(lists.usual_rows);
    let args = Down {
        out: outputs,
        experts: lists.entries,
        jobs: lists.jobs,
        offsets: lists.offsets,
        x: x.address,
        x_scales: x.scales,
        hidden: hidden as i32,
        ff: ff as i32,
        x_stride: x.stride as i32,
        pad: 0,
    };
    let shape = down.shape(lists.most_rows, hidden, lists.num_jobs);
    // SAFETY: the arguments are the kernel's; the rest is the caller's promise.
    unsafe { stream.launch(down.kernel, shape, Args::new().pod(&args)) }
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}
