//! A whole step on the device, when all experts are there, or on all ranks of an island together: the host sends a batch and
//! gets logits, or tokens. Short steps are graphs.
//!
//! Grids of a graph are those of its bucket, the next larger number of rows of a list; kernels read the true number
//! on the device, and rows behind it change nothing. So a row has the same bits in every bucket.

use std::collections::BTreeMap;
use std::sync::Arc;

use tramontane_compute::{Error, StepOutputs, Wanted};
use tramontane_types::SegmentRange;

use super::abi::{ExpertOutputs, JobEntry, NodeParts};
use super::call::{Hidden, Lists, down_product, expert_products, gate_up_product};
use super::context::{Context, Rows, failed};
use super::core::{Core, Queue};
use super::experts::Held;
use super::island::{Island, Nodes, RankStep};
use super::kernels::Kernels;
use super::norms::Norm;
use super::panels::ExpertPanels;
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

/// What the rank that answers gives of a step.
#[derive(Debug)]
pub(super) struct Answer<'a> {
    /// Of each logits row.
    pub(super) wanted: &'a [Wanted],
    pub(super) out: &'a mut StepOutputs,
}

/// The memory of whole steps, and their graphs.
#[derive(Debug)]
pub(super) struct WholeStep {
    graphs: BTreeMap<Form, Graph>,
    /// `[rows * top_k, ff]`.
    hidden: Hidden,
    /// `[rows * top_k, hidden]` f32.
    outputs: Buffer,
    /// One per expert, each for all segments that are computed here.
    jobs: Buffer,
    /// Those who compute the other segments.
    ranks: Option<Ranks>,
    /// For long steps.
    panels: Option<ExpertPanels>,
}

/// What a rank of an island has beside.
#[derive(Debug)]
struct Ranks {
    island: Arc<Island>,
    nodes: Nodes,
    /// For each node that is computed here, one job per expert.
    jobs: Vec<Buffer>,
    /// `[rank][node][slot, hidden]` f32.
    vectors: Buffer,
}

/// The smallest bucket for so many rows, if the buffers have `most`; `None` when no graph is made for them.
fn bucket(rows: usize, most: usize) -> Option<usize> {
    let bucket = BUCKETS.into_iter().find(|&bucket| rows <= bucket)?;
    (bucket <= most).then_some(bucket)
}

impl WholeStep {
    pub(super) fn new(
        context: &Context,
        max_rows: usize,
        island: Option<&Arc<Island>>,
    ) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let pairs = max_rows * geometry.top_k;
        let own = island.map_or(SegmentRange::WHOLE, |island| island.segments());
        let vectors = pairs * geometry.hidden * size_of::<f32>();
        // Ranks of an island have parts of experts, for which there are rows only.
        let panels = match island {
            None => ExpertPanels::new(context, max_rows),
            Some(_) => None,
        };
        // Longer steps have their hidden rows in panels.
        let hidden_pairs = match panels {
            Some(_) => pairs.min((ExpertPanels::rows_min(geometry) - 1) * geometry.top_k),
            None => pairs,
        };
        let ranks = island.map(|island| Ranks::new(context, island, vectors));
        Ok(Self {
            graphs: BTreeMap::new(),
            hidden: Hidden::new(context, hidden_pairs)?,
            outputs: context.buffer(vectors)?,
            jobs: jobs_for(context, own)?,
            ranks: ranks.transpose()?,
            panels,
        })
    }

    /// Computes a step, and what is wanted of its logits rows where this rank is to answer. `held` is all experts, or
    /// this rank's segments of them, kept until the device has finished.
    pub(super) fn run(
        &mut self,
        core: &mut Core,
        held: &Held,
        RankStep { batch, pages }: RankStep<'_>,
        mut answer: Option<Answer<'_>>,
    ) -> Result<(), Error> {
        core.send(batch, answer.as_ref().map_or(&[], |answer| answer.wanted))?;
        if let Some(answer) = &mut answer {
            answer.out.clear();
        }
        if let Some(ranks) = &self.ranks {
            let copied = core.copy_pages(&**ranks.island.collective(), pages);
            copied.map_err(failed("copying pages to the other ranks"))?;
        }
        let num_logits = batch.logits_rows.len();
        let rows = bucket(batch.num_rows(), core.max_rows());
        let logits_rows = match num_logits {
            0 => Some(0),
            some => bucket(some, core.logits_max()),
        };
        if let Some((rows, logits_rows)) = rows.zip(logits_rows) {
            self.run_graph(core, held, (rows, logits_rows), answer.is_some())?;
            return match answer {
                Some(Answer { wanted, out }) => core.take_outputs(wanted, out),
                None => core.wait(),
            };
        }
        let queue = core.queue(batch.num_rows());
        // SAFETY: everything lives in `core`, `self` and `held` until the waits below.
        let queued = unsafe { self.layers(&queue, held) };
        queued.map_err(failed("computing a step"))?;
        let Some(Answer { wanted, out }) = answer else {
            return core.wait();
        };
        for (turn, wanted) in wanted.chunks(core.logits_max()).enumerate() {
            let first = turn * core.logits_max();
            // SAFETY: as above.
            let queued = unsafe { self.logits(&core.queue(wanted.len()), first) };
            queued.map_err(failed("computing logits"))?;
            core.take_outputs(wanted, out)?;
        }
        core.wait()
    }

    /// Launches the graph of a bucket, made when it is first needed.
    fn run_graph(
        &mut self,
        core: &Core,
        held: &Held,
        (rows, logits): (usize, usize),
        answers: bool,
    ) -> Result<(), Error> {
        let queue = core.queue(rows);
        // Ranks that give none make their graphs in the same steps as the one that does: NCCL may have to connect.
        let form = Form {
            rows,
            logits,
            has_narrow: queue.has_narrow,
            has_wide: queue.wide_items > 0,
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
                    if logits > 0 && answers {
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
            let line = queue.context.geometry.num_experts * size_of::<u32>();
            let chosen = queue.buffers.chosen.at(layer * line);
            // SAFETY: the caller's promise.
            unsafe {
                if layer == 0 {
                    queue.norm(norm)?;
                } else {
                    self.combine_norm(queue, norm)?;
                }
                queue.attention(layer)?;
                queue.route(weights, to_experts, chosen)?;
                self.experts(queue, held, layer)?;
            }
        }
        Ok(())
    }

    /// Queues the last layer's sums, the final norm, the LM head and the choice of tokens, for the logits rows from the `first` on.
    unsafe fn logits(&self, queue: &Queue<'_>, first: usize) -> Result<(), DeviceError> {
        let norm = queue.norm_of_logits(first);
        // SAFETY: the caller's promise.
        unsafe {
            self.combine_norm(queue, norm)?;
            queue.lm_head()?;
            queue.choose_tokens(first)
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
            is_whole: self.ranks.is_none(),
        };
        let (x, out) = (queue.rows_for_layers(), self.outputs.address());
        let to = (&self.hidden, out);
        // SAFETY: the caller's promise.
        unsafe {
            let panels = self.panels.as_ref();
            let is_long = queue.rows >= ExpertPanels::rows_min(geometry);
            if let Some(panels) = panels.filter(|_| is_long) {
                return panels.products(queue.context, queue.stream, &lists, x, out);
            }
            match &self.ranks {
                None => expert_products(queue.context, queue.stream, &lists, x, to),
                Some(ranks) => ranks.experts(queue, &lists, x, to),
            }
        }
    }
}

/// One job per expert, each for these segments of it, whose outputs begin at the expert's first slot.
fn jobs_for(context: &Context, range: SegmentRange) -> Result<Buffer, Error> {
    let job = |expert: usize| JobEntry {
        expert: expert as i32,
        begin: i32::from(range.begin()),
        end: i32::from(range.end()),
        out: -1,
    };
    let jobs: Vec<JobEntry> = (0..context.geometry.num_experts).map(job).collect();
    context.upload(bytemuck::cast_slice(&jobs))
}

impl Ranks {
    fn new(context: &Context, island: &Arc<Island>, place_bytes: usize) -> Result<Self, Error> {
        let nodes = Nodes::new(context, island);
        let jobs = nodes.own.iter().map(|node| jobs_for(context, *node));
        Ok(Self {
            island: Arc::clone(island),
            jobs: jobs.collect::<Result<_, _>>()?,
            vectors: context.buffer(nodes.places() * place_bytes)?,
            nodes,
        })
    }

    /// Queues the products of this rank's segments, the exchange of the sums, and the rest of the tree, which all ranks
    /// compute alike.
    ///
    /// # Safety
    /// As [`Stream::launch`](crate::device::Stream::launch).
    unsafe fn experts(
        &self,
        queue: &Queue<'_>,
        lists: &Lists,
        x: Rows,
        (hidden_rows, outputs): (&Hidden, u64),
    ) -> Result<(), DeviceError> {
        let (context, nodes) = (queue.context, &self.nodes);
        let (hidden, top_k) = (context.geometry.hidden, context.geometry.top_k);
        let slots = queue.rows * top_k;
        let place_bytes = slots * hidden * size_of::<f32>();
        let own = nodes.rank * nodes.most;
        let args = NodeParts {
            out: outputs,
            vectors: self.vectors.address(),
            num_rows: queue.input.num_rows(),
            top_k: top_k as u32,
            hidden: hidden as u32,
            ..nodes.parts(slots)
        };
        // SAFETY: the caller's promise; every place has room for the slots of `max_rows` rows.
        unsafe {
            if !self.jobs.is_empty() {
                gate_up_product(context, queue.stream, lists, x, hidden_rows)?;
            }
            for (i, jobs) in self.jobs.iter().enumerate() {
                let lists = Lists {
                    jobs: jobs.address(),
                    ..*lists
                };
                let out = self.vectors.at((own + i) * place_bytes);
                down_product(context, queue.stream, &lists, hidden_rows, out)?;
            }
            let (all, bytes) = (self.vectors.address(), nodes.most * place_bytes);
            let stream = queue.stream.handle();
            self.island.collective().all_gather(all, bytes, stream)?;
            let shape = Kernels::combine_shape(slots, hidden);
            let args = Args::new().pod(&args);
            queue.stream.launch(context.kernels.sum_nodes, shape, args)
        }
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
