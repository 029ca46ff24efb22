//! Packs expert slices from a checkpoint into a backend, on all cores. Reads only their bytes.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};

use tramontane_compute::Experts;
use tramontane_types::{ExpertSlice, SEGMENTS_PER_EXPERT};

use crate::{Checkpoint, Error, parallel};

/// Bytes of experts that are read and not yet packed, at most (one slice may have more): eleven whole experts
/// of Mixtral 8x7B.
pub const UNPACKED_BYTES_MAX: u64 = 4 << 30;

/// Loads `slices` with as many threads as there are cores. `progress` is told `(slices done, slices in all)`.
///
/// # Errors
/// The first error; slices loaded before it stay loaded.
pub fn load_slices(
    checkpoint: &Checkpoint,
    experts: &dyn Experts,
    slices: &[ExpertSlice],
    progress: &(dyn Fn(usize, usize) + Sync),
) -> Result<(), Error> {
    let done = AtomicUsize::new(0);
    let mut largest = 1;
    for slice in slices {
        largest = largest.max(checkpoint.slice_bytes(*slice)?);
    }
    let at_once = NonZeroUsize::new((UNPACKED_BYTES_MAX / largest) as usize);
    parallel::for_each_of(at_once.unwrap_or(NonZeroUsize::MIN), slices, |slice| {
        let bytes = checkpoint.expert_weights(slice.layer, slice.expert, slice.range)?;
        experts.load(*slice, &bytes.weights())?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, slices.len());
        Ok(())
    })
}

impl Checkpoint {
    /// Bytes that a slice has in the files, about.
    fn slice_bytes(&self, slice: ExpertSlice) -> Result<u64, Error> {
        let mut bytes = 0;
        for name in self.expert_names(slice.layer, slice.expert)? {
            let (_, entry) = self.find(&name)?;
            bytes += (entry.end - entry.begin) as u64;
        }
        Ok(bytes * u64::from(slice.range.len()) / u64::from(SEGMENTS_PER_EXPERT))
    }
}
