//! Packs expert slices from a checkpoint into a backend, on all cores. Reads only their bytes.

use std::sync::atomic::{AtomicUsize, Ordering};

use tramontane_compute::Experts;
use tramontane_types::ExpertSlice;

use crate::{Checkpoint, Error, parallel};

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
    parallel::for_each(slices, |slice| {
        let weights = checkpoint.expert_weights(slice.layer, slice.expert)?;
        experts.load(*slice, &weights)?;
        progress(done.fetch_add(1, Ordering::Relaxed) + 1, slices.len());
        Ok(())
    })
}
