//! A whole step on the device, when all experts are there: the host sends a batch and gets logits. Short steps are graphs.
//!
//! Grids of a graph are those of its bucket, the next larger number of rows of a list; kernels read the true number
//! on the device, and rows behind it change nothing. So a row has the same bits in every bucket.

use std::collections::BTreeMap;

use tramontane_compute::{Error, StepBatch};

use super::abi::{ExpertOutputs, JobEntry};
use super::call::{Hidden, Lists, expert_products};
use super::context::{Context, failed};
use super::core::{Core, Queue};
use super::experts::Held;
use super::norms::Norm;
use crate::device::{Args, Buffer, DeviceError, Graph};

/// Numbers of rows that graphs are made for. Longer steps are launched kernel by kernel: they take long enough to
/// hide that.
const BUCKETS: [usize; 14] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256];
/// Graphs that are kept; one is some hundred kilobytes of the driver's memory.
const GRAPHS_MAX: usize = 64;

/// What decides the launches of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Form {
    rows: usize,
    logits: usize,
    has_narrow: bool,
    has_wide: bool,
    /// The table of experts: made at the first load, and then the same as long as they live.
    entries: u64,
}

/// The memory of whole steps, and their graphs.
#[derive(Debug)]
pub(super) struct WholeStep {
    graphs: BTreeMap<Form, Graph>,
    /// `[rows * top_k, ff]`.
    hidden: Hidden,
    /// `[rows * top_k, hidden]` f32.
    outputs: Buffer,
    /// One per expert, each for all of it.
    jobs: Buffer,
}

/// The smallest bucket for so many rows, if the buffers have `most`; `None` when no graph is made for them.
fn bucket(rows: usize, most: usize) -> Option<usize> {
    let bucket = BUCKETS.into_iter().find(|&bucket| rows <= bucket)?;
    (bucket <= most).then_some(bucket)
}

impl WholeStep {
    pub(super) fn new(context: &Context, max_rows: usize) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let pairs = max_rows * geometry.top_k;
        let job = |expert: usize| JobEntry {
            expert: expert as i32,
            begin: 0,
            end: 8,
            out: -1,
        };
        let jobs: Vec<JobEntry> = (0..geometry.num_experts).map(job).collect();
        Ok(Self {
            graphs: BTreeMap::new(),
            hidden: Hidden::new(context, pairs)?,
            outputs: context.buffer(pairs * geometry.hidden * size_of::<f32>())?,
            jobs: context.upload(bytemuck::cast_slice(&jobs))?,
        })
    }

    /// Computes a step; `logits` is cleared first. `held` is all experts, kept until the device has finished.
    pub(super) fn run(
        &mut self,
        core: &mut Core,
        held: &Held,
        batch: &StepBatch,
        logits: &mut Vec<f32>,
    ) -> Result<(), Error> {
        core.send(batch)?;
        logits.clear();
        let num_logits = batch.logits_rows.len();
        let rows = bucket(batch.num_rows(), core.max_rows());
        let logits_rows = match num_logits {
            0 => Some(0),
            some => bucket(some, core.logits_max()),
        };
        if let Some((rows, logits_rows)) = rows.zip(logits_rows) {
            self.run_graph(core, held, (rows, logits_rows))?;
            return core.take_logits(num_logits, logits);
        }
        let queue = core.queue(batch.num_rows());
        // SAFETY: everything lives in `core`, `self` and `held` until the waits below.
        let queued = unsafe { self.layers(&queue, held) };
        queued.map_err(failed("computing a step"))?;
        for first in (0..num_logits).step_by(core.logits_max()) {
            let rows = core.logits_max().min(num_logits - first);
            // SAFETY: as above.
            let queued = unsafe { self.logits(&core.queue(rows), first) };
            queued.map_err(failed("computing logits"))?;
            core.take_logits(rows, logits)?;
        }
        core.wait()
    }

    /// Launches the graph of a bucket, made when it is first needed.
    fn run_graph(
        &mut self,
        core: &Core,
        held: &Held,
        (rows, logits): (usize, usize),
    ) -> Result<(), Error> {
        let queue = core.queue(rows);
        let form = Form {
            rows,
            logits,
            has_narrow: queue.has_narrow,
            has_wide: queue.has_wide,
            entries: held.entries(0, core.context.geometry.num_experts),
        };
        if !self.graphs.contains_key(&form) {
            if self.graphs.len() >= GRAPHS_MAX {
                // Those that are needed come back one by one.
                self.graphs.clear();
            }
            let queued = || -> Result<(), DeviceError> {
                // SAFETY: nothing is done now; what the graph reads lives in `core`, `self` and `held`, and `self`
                // drops the graph before its buffers.
                unsafe {
                    self.layers(&queue, held)?;
                    if logits > 0 {
                        self.logits(
                            &Queue {
                                rows: logits,
                                ..queue
                            },
                            0,
                        )?;
                    }
                }
                Ok(())
            };
            let graph = core.stream.capture(queued);
            let graph = graph.map_err(failed("capturing a step"))?;
            self.graphs.insert(form, graph);
        }
        let launched = match self.graphs.get(&form) {
            // SAFETY: as above; the caller waits before it lets go of `held`.
            Some(graph) => unsafe { core.stream.launch_graph(graph) },
            None => Ok(()),
        };
        launched.map_err(failed("launching a step"))
    }

    /// Queues everything up to the last layer's experts, whose outputs are not added yet.
    ///
    /// # Safety
    /// As [`Stream::launch`](crate::device::Stream::launch), and so below.
    unsafe fn layers(&self, queue: &Queue<'_>, held: &Held) -> Result<(), DeviceError> {
        // SAFETY: the caller's promise.
        unsafe { queue.embed()? };
        for (layer, weights) in queue.weights.layers.iter().enumerate() {
            let norm = queue.norm_for_layers(&weights.input_norm);
            let to_experts = queue.norm_for_layers(&weights.post_norm);
            // SAFETY: the caller's promise.
            unsafe {
                if layer == 0 {
                    queue.norm(norm)?;
                } else {
                    self.combine_norm(queue, norm)?;
                }
                queue.attention(layer)?;
                queue.route(weights, to_experts)?;
                self.experts(queue, held, layer)?;
            }
        }
        Ok(())
    }

    /// Queues the last layer's sums, the final norm and the LM head for the logits rows from the `first` on.
    unsafe fn logits(&self, queue: &Queue<'_>, first: usize) -> Result<(), DeviceError> {
        let norm = queue.norm_of_logits(first);
        // SAFETY: the caller's promise.
        unsafe {
            self.combine_norm(queue, norm)?;
            queue.lm_head()
        }
    }

    unsafe fn combine_norm(&self, queue: &Queue<'_>, norm: Norm<'_>) -> Result<(), DeviceError> {
        let experts = ExpertOutputs {
            outputs: self.outputs.address(),
            slot_of: queue.buffers.slot_of.address(),
            weights: queue.buffers.topk_weights.address(),
            top_k: queue.context.geometry.top_k as u32,
            pad: 0,
        };
        let (kernel, shape) = norm.kernels.combine_norm(queue.rows);
        let args = Args::new().pod(&norm.args).pod(&experts);
        // SAFETY: the caller's promise.
        unsafe { queue.stream.launch(kernel, shape, args) }
    }

    unsafe fn experts(
        &self,
        queue: &Queue<'_>,
        held: &Held,
        layer: usize,
    ) -> Result<(), DeviceError> {
        let geometry = &queue.context.geometry;
        let mean = (queue.rows * geometry.top_k).div_ceil(geometry.num_experts);
        let lists = Lists {
            entries: held.entries(layer, geometry.num_experts),
            jobs: self.jobs.address(),
            num_jobs: geometry.num_experts,
            offsets: queue.buffers.offsets.address(),
            row_ids: queue.buffers.row_of.address(),
            most_pairs: queue.rows * geometry.top_k,
            most_rows: queue.rows,
            // Few experts have much more than the mean, and those take a second tile.
            usual_rows: (mean + mean.div_ceil(4)).min(queue.rows),
        };
        let (x, out) = (queue.rows_for_layers(), self.outputs.address());
        let to = (&self.hidden, out);
        // SAFETY: the caller's promise.
        unsafe { expert_products(queue.context, queue.stream, &lists, x, to) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_is_the_next_that_the_buffers_have() {
        assert_eq!(bucket(1, 512), Some(1));
        assert_eq!(bucket(17, 512), Some(24));
        assert_eq!(bucket(256, 512), Some(256));
        assert_eq!(bucket(257, 512), None);
        assert_eq!(bucket(33, 40), None);
    }
}
