//! The stateful half of the backend: residual stream and KV cache of one attention worker. It calls no expert but in a
//! whole step.

use std::fmt;
use std::sync::Arc;

use tramontane_compute::error::{check_index, check_size};
use tramontane_compute::{
    Attention, AttentionConfig, AttentionWeights, Contributions, Error, Experts, RoutedRows,
    RowFormat, StepBatch, StepOutputs, Wanted,
};
use tramontane_types::{ExpertId, LayerId, SegmentRange};

use super::call::row_stride;
use super::combine::{Combine, Target};
use super::context::{Context, failed};
use super::core::Core;
use super::experts::{CudaExperts, Held};
use super::island::{Behind, Island, RankStep};
use super::step::{Answer, WholeStep};
use crate::device::{DeviceError, Pinned};

/// See the module; made by [`CudaBackend`](super::CudaBackend).
pub(super) struct CudaAttention {
    /// From the first step that is computed whole on. Before `core`: graphs end before what they read.
    whole: Option<WholeStep>,
    core: Core,
    /// Rows and choices on their way to other workers.
    routed: Pinned,
    combine: Combine,
    /// What whole steps chose, and what of that was taken already.
    chosen: Chosen,
    /// The ranks of the last whole step.
    island: Option<Arc<Island>>,
    /// What they have of the cache.
    behind: Behind,
}

/// Counters of the device.
struct Chosen {
    counts: Pinned,
    taken: Vec<u32>,
}

impl Chosen {
    fn new(core: &Core) -> Result<Self, Error> {
        let bytes = core.buffers.chosen.bytes();
        Ok(Self {
            counts: core.context.pinned(bytes)?,
            taken: vec![0; bytes / size_of::<u32>()],
        })
    }
}

impl fmt::Debug for CudaAttention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CudaAttention")
            .field("max_rows", &self.core.max_rows())
            .finish_non_exhaustive()
    }
}

impl CudaAttention {
    pub(super) fn new(
        context: Arc<Context>,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        Self::with_core(Core::new(context, weights, config)?)
    }

    /// With everything on the device already.
    pub(super) fn with_core(core: Core) -> Result<Self, Error> {
        let context = &core.context;
        let geometry = &context.geometry;
        let per_row = row_stride(geometry.hidden) + 8 * geometry.top_k;
        Ok(Self {
            whole: None,
            routed: context.pinned(core.max_rows() * per_row)?,
            combine: Combine::new(context)?,
            chosen: Chosen::new(&core)?,
            island: None,
            behind: Behind::new(core.num_pages()),
            core,
        })
    }

    /// The ranks that this step is computed with. Others than those of the last one begin with nothing.
    fn meet(&mut self) -> Option<Arc<Island>> {
        let island = self.core.context.island();
        if island.as_ref().map(Arc::as_ptr) != self.island.as_ref().map(Arc::as_ptr) {
            self.whole = None;
            self.behind.all();
            self.island.clone_from(&island);
        }
        island
    }

    /// A whole step; the ranks know of it, and one of them gives an answer.
    fn compute(
        &mut self,
        held: &Held,
        step: RankStep<'_>,
        answer: Option<Answer<'_>>,
    ) -> Result<(), Error> {
        let (core, island) = (&mut self.core, self.island.as_ref());
        let made = match &mut self.whole {
            Some(whole) => Ok(whole),
            none => {
                let new = WholeStep::new(&core.context, core.max_rows(), island);
                new.map(|new| none.insert(new))
            }
        };
        let mut done = made.and_then(|whole| whole.run(core, held, step, answer));
        if let Some(island) = island {
            done = island.end(done);
        }
        if done.is_err() {
            // Whatever is queued still reads the experts.
            let _ = self.core.wait();
            if self.island.is_some() {
                // Ranks that are ended are let go of by their graphs first.
                self.whole = None;
            }
            return done;
        }
        let is_alone = self.island.is_none();
        self.behind.note(self.core.written(), is_alone);
        if !is_alone {
            self.behind.none();
        }
        Ok(())
    }

    /// Computes a step as one of the ranks that follow: all of it but the logits.
    pub(super) fn follow(
        &mut self,
        step: RankStep<'_>,
        experts: &dyn Experts,
    ) -> Result<(), Error> {
        let Some(island) = self.meet() else {
            return Err(Error::Shape {
                what: "islands that this rank is in".to_owned(),
                expected: 1,
                got: 0,
            });
        };
        let Some(experts) = self.on_this_device(experts) else {
            return island.end(Err(Error::Shape {
                what: "stores of experts on the device of a rank".to_owned(),
                expected: 1,
                got: 0,
            }));
        };
        let held = experts.hold();
        let num_segments = self.core.context.geometry.num_segments();
        if !held.has_all(island.segments(), num_segments) {
            return island.end(Err(Error::Shape {
                what: "ranks whose segments of all experts are loaded".to_owned(),
                expected: 1,
                got: 0,
            }));
        }
        self.compute(&held, step, None)
    }

    fn on_this_device<'a>(&self, experts: &'a dyn Experts) -> Option<&'a CudaExperts> {
        let experts = experts.on_device()?.downcast_ref::<CudaExperts>()?;
        Arc::ptr_eq(experts.context(), &self.core.context).then_some(experts)
    }

    fn layer_index(&self, layer: LayerId) -> Result<usize, Error> {
        let layer = usize::from(layer.0);
        check_index("layer", self.core.context.geometry.num_layers, layer)?;
        Ok(layer)
    }

    fn check_same_batch(&self, batch: &StepBatch) -> Result<(), Error> {
        if batch == self.core.batch() {
            return Ok(());
        }
        Err(Error::Shape {
            what: "batch other than the one given to begin, rows".to_owned(),
            expected: self.core.batch().num_rows(),
            got: batch.num_rows(),
        })
    }

    /// Copies rows and choices to the host and waits for them.
    fn fetch_routed(&mut self, num_rows: usize, routed: &mut RoutedRows) -> Result<(), Error> {
        let (core, buffers) = (&self.core, &self.core.buffers);
        let geometry = &core.context.geometry;
        let stride = row_stride(geometry.hidden);
        let rows_bytes = num_rows * stride;
        let ids_bytes = num_rows * geometry.top_k * size_of::<u32>();
        let weights_at = rows_bytes + ids_bytes;
        let copies = [
            (buffers.x.address(), 0, rows_bytes),
            (buffers.topk_ids.address(), rows_bytes, ids_bytes),
            (buffers.topk_weights.address(), weights_at, ids_bytes),
        ];
        let to = self.routed.as_mut_slice::<u8>();
        let mut fetch = || -> Result<(), DeviceError> {
            for (from, at, bytes) in copies {
                let (to, stream) = (to[at..at + bytes].as_mut_ptr(), core.stream.handle());
                // SAFETY: both ranges exist, and the wait below ends before anybody reads.
                unsafe { core.context.device.copy_out(to, from, bytes, stream)? };
            }
            core.stream.synchronize()
        };
        fetch().map_err(failed("computing attention"))?;
        let bytes = self.routed.as_slice::<u8>();
        let row_bytes = RowFormat::Bf16.row_bytes(geometry.hidden);
        routed.num_rows = num_rows;
        routed.rows.clear();
        for row in bytes[..rows_bytes].chunks_exact(stride) {
            routed.rows.extend_from_slice(&row[..row_bytes]);
        }
        let numbers = |at: usize| bytes[at..at + ids_bytes].as_chunks::<4>().0.iter();
        let ids = numbers(rows_bytes).map(|b| u32::from_ne_bytes(*b));
        routed.topk_ids.clear();
        // In range: there are at most `EXPERTS_MAX`.
        routed.topk_ids.extend(ids.map(|id| ExpertId(id as u16)));
        let weights = numbers(weights_at).map(|b| f32::from_ne_bytes(*b));
        routed.topk_weights.clear();
        routed.topk_weights.extend(weights);
        Ok(())
    }
}

impl Attention for CudaAttention {
    fn begin(&mut self, batch: &StepBatch) -> Result<(), Error> {
        self.core.send(batch, &[])?;
        self.behind.note(self.core.written(), true);
        // SAFETY: everything lives in `core`, which waits before it changes anything; and so below.
        let queued = unsafe { self.core.queue(batch.num_rows()).embed() };
        queued.map_err(failed("looking up embeddings"))
    }

    fn attend(
        &mut self,
        layer: LayerId,
        batch: &StepBatch,
        routed: &mut RoutedRows,
    ) -> Result<(), Error> {
        let layer = self.layer_index(layer)?;
        self.check_same_batch(batch)?;
        let queue = self.core.queue(batch.num_rows());
        let weights = &queue.weights.layers[layer];
        let norm = queue.norm_for_layers(&weights.input_norm);
        let to_experts = queue.norm_as_bf16(&weights.post_norm);
        // SAFETY: as in `begin`.
        let queued = unsafe {
            queue
                .norm(norm)
                .and_then(|()| queue.attention(layer))
                .and_then(|()| queue.route(weights, to_experts, 0))
        };
        queued.map_err(failed("computing attention"))?;
        self.fetch_routed(batch.num_rows(), routed)
    }

    fn combine(&mut self, layer: LayerId, contributions: &Contributions<'_>) -> Result<(), Error> {
        self.layer_index(layer)?;
        let target = Target {
            context: &self.core.context,
            stream: &self.core.stream,
            residual: &self.core.buffers.residual,
            num_rows: self.core.batch().num_rows(),
        };
        self.combine.run(&target, contributions)
    }

    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), Error> {
        self.check_same_batch(batch)?;
        out.clear();
        let (num_logits, most) = (batch.logits_rows.len(), self.core.logits_max());
        for first in (0..num_logits).step_by(most) {
            let rows = most.min(num_logits - first);
            let queue = self.core.queue(rows);
            let norm = queue.norm_of_logits(first);
            // SAFETY: as in `begin`.
            let queued = unsafe { queue.norm(norm).and_then(|()| queue.lm_head()) };
            queued.map_err(failed("computing logits"))?;
            self.core.take_logits(rows, out)?;
        }
        Ok(())
    }

    fn step(
        &mut self,
        batch: &StepBatch,
        wanted: &[Wanted],
        experts: &dyn Experts,
        out: &mut StepOutputs,
    ) -> Result<bool, Error> {
        check_size(
            "outputs of logits rows",
            batch.logits_rows.len(),
            wanted.len(),
        )?;
        let Some(experts) = self.on_this_device(experts) else {
            return Ok(false);
        };
        let held = experts.hold();
        let island = self.meet();
        let own = island.as_ref().map(|island| island.segments());
        let num_segments = self.core.context.geometry.num_segments();
        if !held.has_all(own.unwrap_or(SegmentRange::WHOLE), num_segments) {
            return Ok(false);
        }
        let runs = island.as_ref().map(|_| self.behind.runs());
        let pages = &runs.unwrap_or_default()[..];
        let step = RankStep { batch, pages };
        if let Some(island) = island
            && !island.begin(step)?
        {
            return Ok(false);
        }
        let answer = Answer { wanted, out };
        self.compute(&held, step, Some(answer)).map(|()| true)
    }

    fn take_chosen(&mut self, chosen: &mut Vec<u64>) -> Result<(), Error> {
        let bytes = self.chosen.counts.bytes();
        let (stream, counter) = (&self.core.stream, &self.core.buffers.chosen);
        // SAFETY: both live in `self`, and the wait is below.
        let fetched = unsafe { stream.download(&mut self.chosen.counts, counter, 0, bytes) };
        let fetched = fetched.and_then(|()| stream.synchronize());
        fetched.map_err(failed("counting chosen experts"))?;
        let counts = self.chosen.counts.as_slice::<u32>().iter();
        let taken = counts.zip(&mut self.chosen.taken).map(|(&count, taken)| {
            // Counters run over.
            u64::from(count.wrapping_sub(std::mem::replace(taken, count)))
        });
        chosen.clear();
        chosen.extend(taken);
        Ok(())
    }
}
