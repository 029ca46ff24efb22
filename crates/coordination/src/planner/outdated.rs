//! What to do when the store has lost the placement, or somebody wrote an older one after such a loss. Pure.

use std::sync::Arc;

use tramontane_types::{Epoch, Placement};

use super::decide::{Group, PlannerAction, PlannerView, WaitReason, wait};

impl PlannerView<'_> {
    /// The store has lost the placement. Who comes back after such a loss knows best what was published:
    /// that is waited for, and a known placement that is older than theirs is not written again.
    pub(super) fn after_loss(&self, known: &Placement, group: Option<&Group>) -> PlannerAction {
        let left = self.config.settle_time.saturating_sub(self.settled_for);
        if !left.is_zero() {
            return wait(WaitReason::Settling, Some(left));
        }
        if self.newest_loaded() <= known.epoch {
            return PlannerAction::Restore;
        }
        match self.plan(group) {
            Ok(placement) => PlannerAction::Propose(Arc::new(placement)),
            Err(reason) => wait(reason, None),
        }
    }

    /// The newest epoch that a worker has loaded.
    pub(super) fn newest_loaded(&self) -> Epoch {
        let loaded = self.members.workers.values().map(|worker| worker.loaded);
        loaded
            .filter(|&epoch| is_sane(epoch))
            .max()
            .unwrap_or(Epoch(0))
    }

    /// Whether somebody has seen a newer placement than the published one: then the store was emptied, and
    /// somebody who had missed that placement wrote an older one. Whoever knows the newer one ignores it, so
    /// a still newer one must bring all together again.
    pub(super) fn is_outdated(&self, published: &Placement) -> bool {
        let known = self.known.map_or(Epoch(0), |known| known.epoch);
        self.newest_loaded().max(known) > published.epoch
    }
}

/// A hostile record must not use the epochs up.
pub(super) const fn is_sane(epoch: Epoch) -> bool {
    epoch.0 < u64::MAX / 2
}
