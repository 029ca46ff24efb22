//! The expert slices of this worker: checks what is loaded, and knows when retired ones were last asked
//! for. Never decides which slices to hold.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{Backend, ExpertJob, ExpertWeights, Experts, RowFormat, WeightFormat};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, SegmentRange};

use crate::following::Retired;

/// One slice in so many is compared with the reference, the first included: as many as are loaded before a
/// worker looks at the placements again. One segment of Mixtral 8x7B costs it 90 MB and some tenths of a second.
const COMPARE_EVERY: usize = 32;

/// A slice that computes something that is no number, not the same twice, or not what its weights say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{slice} does not compute: {found}")]
struct BadSlice {
    slice: ExpertSlice,
    found: &'static str,
}

/// The expert slices of a backend, watched.
#[derive(Debug)]
pub(crate) struct KeptExperts {
    inner: Arc<dyn Experts>,
    geometry: ModelGeometry,
    row_format: RowFormat,
    weights: WeightFormat,
    /// Slices loaded so far.
    num_loaded: AtomicUsize,
    /// Nanoseconds per segment of the fastest check of a slice; 0 before the first.
    probed_ns: AtomicU64,
    retired: Mutex<Retired>,
    /// Whether `retired` is worth a look: calls are many, retired slices are rare.
    any_retired: AtomicBool,
}

impl KeptExperts {
    pub(crate) fn new(
        inner: Arc<dyn Experts>,
        geometry: ModelGeometry,
        row_format: RowFormat,
        weights: WeightFormat,
    ) -> Self {
        Self {
            inner,
            geometry,
            row_format,
            weights,
            num_loaded: AtomicUsize::new(0),
            probed_ns: AtomicU64::new(0),
            retired: Mutex::new(Retired::new(Instant::now())),
            any_retired: AtomicBool::new(false),
        }
    }

    /// A row of known numbers must give numbers, and the same whether it comes alone or with another.
    fn check(&self, slice: ExpertSlice) -> Result<(), tramontane_compute::Error> {
        let (row, other) = (self.probe(1), self.probe(2));
        let begin = Instant::now();
        let alone = self.outputs(slice, &row, &[0])?;
        self.note_speed(slice, begin);
        let both = self.outputs(slice, &[other, row].concat(), &[0, 1])?;
        let bad = |found| bad(slice, found);
        if !both.iter().all(|x| x.is_finite()) {
            return Err(bad("an output is not finite"));
        }
        let again = both.get(both.len() - alone.len()..).unwrap_or_default();
        let bits = |x: &f32| x.to_bits();
        if !alone.iter().map(bits).eq(again.iter().map(bits)) {
            return Err(bad("a row has other outputs beside another row than alone"));
        }
        Ok(())
    }

    /// The first segment of a slice must give what the reference makes of the checkpoint's weights.
    fn compare(
        &self,
        slice: ExpertSlice,
        weights: &ExpertWeights<'_>,
    ) -> Result<(), tramontane_compute::Error> {
        let begin = slice.range.begin();
        let Ok(range) = SegmentRange::new(begin, begin + 1) else {
            return Ok(());
        };
        let segment = ExpertSlice { range, ..slice };
        let got = self.outputs(segment, &self.probe(1), &[0])?;
        let reference = ReferenceBackend::new(&self.geometry).experts();
        reference.load(segment, weights)?;
        let job = ExpertJob {
            expert: slice.expert,
            range,
            row_ids: &[0],
        };
        let (row, mut expected) = (self.probe_in(RowFormat::F32, 1), Vec::new());
        reference.compute(slice.layer, &row, 1, &[job], &mut expected)?;
        let pairs = || expected.iter().zip(&got);
        let off: f32 = pairs().map(|(e, g)| (e - g).powi(2)).sum();
        let size: f32 = expected.iter().map(|e| e.powi(2)).sum();
        // Not `>`: what is no number is no match.
        let is_near = off.sqrt() <= tolerance(self.weights) * size.sqrt();
        if is_near && expected.len() == got.len() {
            return Ok(());
        }
        Err(bad(slice, "its outputs are not those of its weights"))
    }

    /// What the checks took: the first guess of how fast the experts are here.
    fn note_speed(&self, slice: ExpertSlice, begin: Instant) {
        let end = slice.range.end().min(self.geometry.num_segments());
        let num_segments = u64::from(end.saturating_sub(slice.range.begin()).max(1));
        let ns = (begin.elapsed().as_nanos() as u64 / num_segments).max(1);
        // Others load meanwhile: the fastest one was disturbed least.
        let faster = |known| (known == 0 || ns < known).then_some(ns);
        let _was = self
            .probed_ns
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, faster);
    }

    /// Nanoseconds of one segment of one row as the checks of loaded slices took them.
    pub(crate) fn probed_ns(&self) -> Option<u64> {
        Some(self.probed_ns.load(Ordering::Relaxed)).filter(|ns| *ns > 0)
    }

    fn outputs(
        &self,
        slice: ExpertSlice,
        rows: &[u8],
        row_ids: &[u32],
    ) -> Result<Vec<f32>, tramontane_compute::Error> {
        let job = ExpertJob {
            expert: slice.expert,
            range: slice.range,
            row_ids,
        };
        let mut out = Vec::new();
        self.inner
            .compute(slice.layer, rows, row_ids.len(), &[job], &mut out)?;
        Ok(out)
    }

    /// A normalised row of pseudo-random numbers in -1..1, in the row format.
    fn probe(&self, seed: u32) -> Vec<u8> {
        self.probe_in(self.row_format, seed)
    }

    fn probe_in(&self, format: RowFormat, seed: u32) -> Vec<u8> {
        let mut state = seed;
        let mut next = || {
            // Numerical Recipes' linear congruential generator; the upper bits are good enough.
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1_u32 << 23) as f32 - 1.0
        };
        let row: Vec<f32> = (0..self.geometry.hidden).map(|_| next()).collect();
        let mut bytes = vec![0; format.row_bytes(row.len())];
        format.write_row(&row, &mut bytes);
        bytes
    }

    /// Bits of the segments that have columns.
    fn real_segments(&self) -> u8 {
        SegmentRange::new(0, self.geometry.num_segments()).map_or(0, SegmentRange::mask)
    }

    fn masks(&self) -> impl Iterator<Item = ((LayerId, ExpertId), u8)> + '_ {
        (0..self.geometry.num_layers).flat_map(move |layer| {
            (0..self.geometry.num_experts).map(move |expert| {
                let (layer, expert) = (LayerId(layer as u16), ExpertId(expert as u16));
                ((layer, expert), self.inner.held(layer, expert))
            })
        })
    }

    /// Segments held that have columns.
    pub(crate) fn num_segments_held(&self) -> u64 {
        let real = self.real_segments();
        self.masks()
            .map(|(_, mask)| u64::from((mask & real).count_ones()))
            .sum()
    }

    /// What is held, with the segments that have no columns: nobody needs to load those.
    pub(crate) fn held_slices(&self) -> Vec<ExpertSlice> {
        let empty = !self.real_segments();
        self.single_segments(|mask| mask | empty)
    }

    /// What is held and takes memory.
    pub(crate) fn packed_slices(&self) -> Vec<ExpertSlice> {
        let real = self.real_segments();
        self.single_segments(|mask| mask & real)
    }

    fn single_segments(&self, select: impl Fn(u8) -> u8) -> Vec<ExpertSlice> {
        let mut slices = Vec::new();
        for ((layer, expert), mask) in self.masks() {
            let mask = select(mask);
            for segment in (0..8).filter(|segment| mask >> segment & 1 == 1) {
                if let Ok(range) = SegmentRange::new(segment, segment + 1) {
                    slices.push(ExpertSlice {
                        layer,
                        expert,
                        range,
                    });
                }
            }
        }
        slices
    }

    /// Notes which slices are not asked for any more; says when to drop them if nobody asks before.
    pub(crate) fn retire(&self, slices: &[ExpertSlice], grace: Duration) -> Option<Instant> {
        let mut retired = self.retired.lock();
        retired.set(slices, Instant::now());
        self.any_retired
            .store(!retired.is_empty(), Ordering::Release);
        retired.drop_at(grace)
    }

    fn note_use(&self, layer: LayerId, jobs: &[ExpertJob<'_>]) {
        let (mut retired, now) = (self.retired.lock(), Instant::now());
        for job in jobs {
            retired.used(layer, job.expert, job.range, now);
        }
    }
}

fn bad(slice: ExpertSlice, found: &'static str) -> tramontane_compute::Error {
    tramontane_compute::Error::Library {
        operation: "checking a loaded slice",
        source: Box::new(BadSlice { slice, found }),
    }
}

/// How far outputs may be from the reference's, as a share of their length: about three times what rounding
/// rows and weights to the format costs. A slice of other weights is off by more than 1.
const fn tolerance(weights: WeightFormat) -> f32 {
    match weights {
        WeightFormat::F32 => 1e-4,
        WeightFormat::Bf16 => 0.03,
        WeightFormat::Q8 => 0.05,
        WeightFormat::E4m3 => 0.2,
        WeightFormat::Q4 => 0.3,
    }
}

impl Experts for KeptExperts {
    /// Packs a slice and checks that it computes; one that does not is not held.
    fn load(
        &self,
        slice: ExpertSlice,
        weights: &ExpertWeights<'_>,
    ) -> Result<(), tramontane_compute::Error> {
        self.inner.load(slice, weights)?;
        let nth = self.num_loaded.fetch_add(1, Ordering::Relaxed);
        let mut checked = self.check(slice);
        if checked.is_ok() && nth.is_multiple_of(COMPARE_EVERY) {
            checked = self.compare(slice, weights);
        }
        if checked.is_err() {
            self.inner.unload(slice);
        }
        checked
    }

    fn unload(&self, slice: ExpertSlice) {
        self.inner.unload(slice);
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        self.inner.held(layer, expert)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), tramontane_compute::Error> {
        if self.any_retired.load(Ordering::Acquire) {
            self.note_use(layer, jobs);
        }
        self.inner.compute(layer, rows, num_rows, jobs, out)
    }

    fn on_device(&self) -> Option<&dyn Any> {
        self.inner.on_device()
    }
}

#[cfg(test)]
mod tests;
