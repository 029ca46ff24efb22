//! Expert slices: packed segment by segment, computed expert-major. Keeps nothing of a call but its memory.
//!
//! A call has two parallel phases. In the first, an item is 32 `ff` columns of one segment: gate and up
//! products for all rows of the expert, the activation, and its rounding to the row format. In the
//! second, an item is 32 `hidden` outputs of one expert: the down products of its segments, summed along
//! the tree of [`tramontane_types::slice`].

mod call;
mod plan;
mod segment;

use std::fmt;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use tramontane_compute::{Error, ExpertJob, ExpertWeights, Experts};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, SEGMENTS_PER_EXPERT, SegmentRange, slice};

use crate::context::{Context, check_index, check_size, check_tensor};
use call::Call;
pub(crate) use segment::Segment;

/// The store of slices.
pub(crate) struct CpuExperts {
    context: Arc<Context>,
    /// `[layer][expert][segment]`.
    segments: RwLock<Vec<Option<Arc<Segment>>>>,
    /// The memory of the running call; calls take turns.
    call: Mutex<Call>,
}

impl fmt::Debug for CpuExperts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.segments.read().iter().flatten().count();
        f.debug_struct("CpuExperts")
            .field("segments_held", &held)
            .finish_non_exhaustive()
    }
}

impl CpuExperts {
    pub(crate) fn new(context: Arc<Context>) -> Self {
        let geometry = &context.geometry;
        let slots = geometry.num_layers * geometry.num_experts * usize::from(SEGMENTS_PER_EXPERT);
        Self {
            segments: RwLock::new(vec![None; slots]),
            call: Mutex::new(Call::new(&context)),
            context,
        }
    }

    /// Where the segments of an expert begin.
    fn slot(&self, layer: LayerId, expert: ExpertId) -> Result<usize, Error> {
        let geometry = &self.context.geometry;
        check_index("layer", geometry.num_layers, usize::from(layer.0))?;
        check_index("expert", geometry.num_experts, usize::from(expert.0))?;
        let index = usize::from(layer.0) * geometry.num_experts + usize::from(expert.0);
        Ok(index * usize::from(SEGMENTS_PER_EXPERT))
    }

    /// The non-empty segments of a range.
    fn segments_of(&self, range: SegmentRange) -> std::ops::Range<u8> {
        let end = range.end().min(self.context.geometry.num_segments());
        range.begin().min(end)..end
    }

    fn check_job(&self, layer: LayerId, job: &ExpertJob<'_>, num_rows: usize) -> Result<(), Error> {
        let slot = self.slot(layer, job.expert)?;
        for &row in job.row_ids {
            check_index("row", num_rows, row as usize)?;
        }
        let table = self.segments.read();
        for segment in self.segments_of(job.range) {
            if table[slot + usize::from(segment)].is_none() {
                return Err(not_held(layer, job));
            }
        }
        Ok(())
    }
}

fn not_held(layer: LayerId, job: &ExpertJob<'_>) -> Error {
    Error::NotHeld {
        slice: ExpertSlice {
            layer,
            expert: job.expert,
            range: job.range,
        },
    }
}

impl Experts for CpuExperts {
    fn load(&self, slice: ExpertSlice, weights: &ExpertWeights<'_>) -> Result<(), Error> {
        let slot = self.slot(slice.layer, slice.expert)?;
        let geometry = &self.context.geometry;
        let (hidden, ff) = (geometry.hidden, geometry.ff);
        check_tensor("w1", &weights.w1, (ff, hidden))?;
        check_tensor("w2", &weights.w2, (hidden, ff))?;
        check_tensor("w3", &weights.w3, (ff, hidden))?;
        let missing = |segment: &u8| self.segments.read()[slot + usize::from(*segment)].is_none();
        for segment in self.segments_of(slice.range).filter(missing) {
            let columns = slice::segment_columns(ff, segment);
            let packed = Segment::pack(&self.context, weights, columns)?;
            self.segments.write()[slot + usize::from(segment)].get_or_insert(Arc::new(packed));
        }
        Ok(())
    }

    fn unload(&self, slice: ExpertSlice) {
        let Ok(slot) = self.slot(slice.layer, slice.expert) else {
            return;
        };
        for segment in self.segments_of(slice.range) {
            // Dropped after the lock: freeing a large segment takes time.
            let dropped = self.segments.write()[slot + usize::from(segment)].take();
            drop(dropped);
        }
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        let Ok(slot) = self.slot(layer, expert) else {
            return 0;
        };
        let table = self.segments.read();
        let num_segments = self.context.geometry.num_segments();
        (0..SEGMENTS_PER_EXPERT)
            .filter(|&s| s >= num_segments || table[slot + usize::from(s)].is_some())
            .fold(0, |mask, s| mask | 1 << s)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        let context = &*self.context;
        check_index("layer", context.geometry.num_layers, usize::from(layer.0))?;
        let row_bytes = context.row_format().row_bytes(context.geometry.hidden);
        check_size("bytes of expert rows", num_rows * row_bytes, rows.len())?;
        for job in jobs {
            self.check_job(layer, job, num_rows)?;
        }
        let mut call = self.call.lock();
        let total = call.plan.arrange(context, jobs);
        // A slice may have been unloaded since the check: what is found now is kept until the end.
        let table = self.segments.read();
        let found = call.plan.take_segments(context, |expert, segment| {
            let slot = self.slot(layer, expert).ok()?;
            table[slot + usize::from(segment)].clone()
        });
        drop(table);
        if let Err(job) = found {
            return Err(not_held(layer, &jobs[job]));
        }
        out.clear();
        out.resize(total, 0.0);
        call.compute(context, rows, out);
        Ok(())
    }
}
