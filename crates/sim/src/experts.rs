//! The slices that a simulated worker holds, and what they compute. Never answers for one it does not hold.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::time::Instant;
use tramontane_compute::{Error, ExpertJob, ExpertWeights, Experts};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, SEGMENTS_PER_EXPERT, SegmentRange};
use tramontane_worker::following::Retired;

use crate::model::segment;

/// Segments by layer and expert.
#[derive(Debug)]
pub struct Held {
    version: u8,
    masks: Mutex<BTreeMap<(LayerId, ExpertId), u8>>,
    /// Segments that no placement asks for any more.
    pub retired: Mutex<Retired>,
}

impl Held {
    /// Nothing yet, of a version of the weights.
    #[must_use]
    pub fn of(version: u8) -> Self {
        Self {
            version,
            masks: Mutex::default(),
            retired: Mutex::new(Retired::new(Instant::now().into_std())),
        }
    }

    /// Has loaded a slice.
    pub fn hold(&self, slice: ExpertSlice) {
        *self
            .masks
            .lock()
            .entry((slice.layer, slice.expert))
            .or_default() |= slice.range.mask();
    }

    /// What is held, as single segments.
    #[must_use]
    pub fn slices(&self) -> Vec<ExpertSlice> {
        let mut slices = Vec::new();
        for (&(layer, expert), &mask) in &*self.masks.lock() {
            for begin in (0..SEGMENTS_PER_EXPERT).filter(|s| mask >> s & 1 == 1) {
                if let Ok(range) = SegmentRange::new(begin, begin + 1) {
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

    /// Whether all of a slice is held.
    #[must_use]
    pub fn has(&self, slice: ExpertSlice) -> bool {
        let mask = slice.range.mask();
        self.held(slice.layer, slice.expert) & mask == mask
    }
}

impl Experts for Held {
    fn load(&self, slice: ExpertSlice, _weights: &ExpertWeights<'_>) -> Result<(), Error> {
        self.hold(slice);
        Ok(())
    }

    fn unload(&self, slice: ExpertSlice) {
        if let Some(mask) = self.masks.lock().get_mut(&(slice.layer, slice.expert)) {
            *mask &= !slice.range.mask();
        }
    }

    fn held(&self, layer: LayerId, expert: ExpertId) -> u8 {
        self.masks
            .lock()
            .get(&(layer, expert))
            .copied()
            .unwrap_or(0)
    }

    fn compute(
        &self,
        layer: LayerId,
        rows: &[u8],
        _num_rows: usize,
        jobs: &[ExpertJob<'_>],
        out: &mut Vec<f32>,
    ) -> Result<(), Error> {
        out.clear();
        let now = Instant::now().into_std();
        for job in jobs {
            self.retired.lock().used(layer, job.expert, job.range, now);
            let (expert, range) = (job.expert, job.range);
            let slice = ExpertSlice {
                layer,
                expert,
                range,
            };
            if !self.has(slice) {
                return Err(Error::NotHeld { slice });
            }
        }
        let rows: Vec<u32> = rows
            .chunks_exact(4)
            .map(|row| u32::from_le_bytes([row[0], row[1], row[2], row[3]]))
            .collect();
        for job in jobs {
            for &row in job.row_ids {
                for node in job.range.nodes(SEGMENTS_PER_EXPERT) {
                    let segments = node.begin..node.begin + node.len;
                    let place = |s| (layer, job.expert, s);
                    let value = |s| segment(self.version, place(s), rows[row as usize]);
                    // Exact: a sum of few small integers.
                    out.push(segments.map(value).sum::<u64>() as f32);
                }
            }
        }
        Ok(())
    }
}
