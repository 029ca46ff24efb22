//! Whether another placement is worth its moves. Pure; never asks who wanted it.
//!
//! A plan that members or intent call for is made at once. One that only suits loads and speeds better is
//! made when it is faster by more than a share and the present one is not young: measuring is noisy, and
//! every move loads weights while requests run.

use std::time::Duration;

use tramontane_types::{Placement, WorkerId};

use crate::balance::{Costs, HOT_MEMORY_PARTS, predict, summarise};
use crate::registry::WorkerRecord;

/// Share of a layer's predicted time that a placement must save to be moved to for load or speed alone.
pub const REBALANCE_GAIN: f64 = 0.10;
/// A placement is not changed for load or speed alone before it is this old.
pub const REBALANCE_EVERY: Duration = Duration::from_secs(5 * 60);
/// Tokens of the decode batch that placements are compared at: a busy group. In small batches hot experts do
/// not show, since reading the weights is all that counts.
pub const PLAN_TOKENS: usize = 64;

/// The share of a layer's time that `plan` saves.
pub(super) fn gain(published: &Placement, plan: &Placement, costs: &Costs) -> f64 {
    let (now, then) = (
        predict(published, costs, PLAN_TOKENS),
        predict(plan, costs, PLAN_TOKENS),
    );
    1.0 - then / now.max(f64::MIN_POSITIVE)
}

/// Whether members or intent call for `plan`: a newcomer, another cut, other replicas, less memory.
/// All workers of `published` are candidates.
pub(super) fn is_needed(
    published: &Placement,
    plan: &Placement,
    (candidates, replicas): (&[&WorkerRecord], usize),
) -> bool {
    let is_new = |id: &WorkerId| !published.workers.contains(id);
    let (now, then) = (Copies::of(published, replicas), Copies::of(plan, replicas));
    plan.workers.iter().any(is_new)
        || now.slices != then.slices
        || now.fewest != then.fewest
        || now.asked != then.asked
        || now.further > now.slices.div_ceil(HOT_MEMORY_PARTS)
        || is_too_large(published, candidates)
}

/// Copies of slices, counted.
struct Copies {
    /// Of one copy of the model.
    slices: usize,
    fewest: usize,
    /// Copies up to as many as were asked for.
    asked: usize,
    /// Copies beyond.
    further: usize,
}

impl Copies {
    fn of(placement: &Placement, replicas: usize) -> Self {
        let copies: Vec<usize> = placement.iter().map(|(_, h)| h.len()).collect();
        let asked = copies.iter().map(|n| n.min(&replicas)).sum();
        Self {
            slices: copies.len(),
            fewest: copies.iter().copied().min().unwrap_or(0),
            asked,
            further: copies.iter().sum::<usize>() - asked,
        }
    }
}

/// Whether some worker holds more than it offers by now.
fn is_too_large(published: &Placement, candidates: &[&WorkerRecord]) -> bool {
    let num_segments = candidates.iter().map(|w| w.model.num_segments).max();
    let summary = summarise(published, None, num_segments.unwrap_or(1));
    candidates.iter().any(|worker| {
        let held = summary.workers.iter().find(|held| held.id == worker.id);
        held.is_some_and(|held| held.segments > worker.capacity_segments())
    })
}
