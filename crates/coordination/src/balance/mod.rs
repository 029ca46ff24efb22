//! Decides who holds which expert slice: capacities in, placement out. Pure: it never reads a clock,
//! a store or chance, and equal inputs give equal placements.
//!
//! In order: choose how finely experts are cut, give every worker a number of slices in proportion to
//! what it offers, spread that number over the layers, choose slices, even out loads, choose preferred
//! holders, and copy hot experts into memory that is left.
//! Every step starts from what the workers already hold and changes as little as it can.

mod assign;
mod by_layers;
mod even;
mod flow;
mod hot;
pub mod predict;
mod quota;
mod summary;

use std::num::NonZeroUsize;
use std::ops::Range;

use tramontane_types::{Epoch, Placement, SEGMENTS_PER_EXPERT, SegmentRange, WorkerId};

pub use hot::{HOT_COPIES_MAX, HOT_LOAD, HOT_MEMORY_PARTS, WARM_LOAD};
pub use predict::{Costs, predict};
pub use summary::{Summary, WorkerSummary, summarise};

/// Most workers of one placement: holders are named by a `u16`.
pub const PLACEMENT_WORKERS_MAX: usize = 4096;

/// Everything that a placement depends on.
#[derive(Clone, Debug)]
pub struct BalanceInput<'a> {
    /// The workers to use, in any order.
    pub workers: Vec<WorkerShare>,
    /// Layers of the model.
    pub num_layers: usize,
    /// Experts per layer.
    pub num_experts: usize,
    /// Non-empty segments per expert, `1..=8`.
    pub num_segments: u8,
    /// How often each expert is chosen, `[num_layers * num_experts]`, layer-major, in any unit;
    /// `None` means equally.
    pub expert_load: Option<Vec<f32>>,
    /// What the operator wants.
    pub policy: PlacementPolicy,
    /// The placement to move as little as possible from.
    pub current: Option<&'a Placement>,
    /// Epoch of the result.
    pub epoch: Epoch,
    /// Numeric class of the result.
    pub numeric_class: String,
    /// Model fingerprint of the result.
    pub model: String,
}

/// What one worker offers.
#[derive(Clone, Debug, PartialEq)]
pub struct WorkerShare {
    /// Its id.
    pub id: WorkerId,
    /// Expert segments that fit into its memory.
    pub capacity_segments: u64,
    /// The layers whose experts it can hold. Those of two workers are the same, or have none in common.
    pub layers: Range<usize>,
    /// How fast it is, in any unit: shares are in proportion to it, within capacity. Who has none among
    /// others that do is taken for the median; where nobody has one, shares are in proportion to capacity.
    pub speed: Option<f32>,
}

/// What the operator wants of a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlacementPolicy {
    /// Workers that hold each slice. Fewer where workers or memory do not suffice; see [`Summary`].
    pub replicas: NonZeroUsize,
    /// Slices per expert, `1..=8`; `None` takes the fewest that give every worker work in each layer
    /// and fit, but never fewer than there are now.
    pub slices_per_expert: Option<u8>,
}

/// Why there is no placement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BalanceError {
    /// Nobody to place anything on.
    #[error("no worker offers memory for experts")]
    NoWorkers,
    /// Not even one copy of the model fits.
    #[error(
        "one copy of the experts needs {needed_segments} segments, {num_workers} workers offer \
         {offered_segments} in slices of {slice_segments}"
    )]
    Capacity {
        /// The first layer of those that do not fit.
        layer: usize,
        /// Segments of one copy.
        needed_segments: u64,
        /// Segments that fit, counted in whole slices.
        offered_segments: u64,
        /// Segments per slice of the finest cut that was tried.
        slice_segments: u8,
        /// Workers that offer anything.
        num_workers: usize,
    },
    /// Experts that nobody can hold, or that only workers can hold who differ in others.
    #[error("none of the workers that are there can hold the experts of layer {layer}")]
    Layers {
        /// The first such layer.
        layer: usize,
    },
    /// An argument that breaks its rule.
    #[error("{what}: got {got}, expected {expected}")]
    Invalid {
        /// The argument.
        what: &'static str,
        /// Its value.
        got: String,
        /// The rule.
        expected: &'static str,
    },
    /// A defect: the parts of the plan do not fit together.
    #[error("placement plan is inconsistent: {detail}")]
    Inconsistent {
        /// Where.
        detail: String,
    },
}

/// Slices of one model, cut evenly, and the workers to put them on.
struct Plan<'a> {
    input: &'a BalanceInput<'a>,
    /// Ascending by id, without those that offer nothing.
    workers: Vec<&'a WorkerShare>,
    /// The slices of every expert, ascending.
    cut: Vec<SegmentRange>,
    /// Slices that fit on each worker, at most one copy of the model.
    capacity: Vec<usize>,
    /// The placement in force, with copies of hot experts that `input.current` leaves out.
    now: Option<&'a Placement>,
}

/// A valid placement of one copy or more: proportional to what workers offer, spread inside each
/// layer, close to `current`.
///
/// # Errors
/// See [`BalanceError`].
pub fn balance(input: &BalanceInput<'_>) -> Result<Placement, BalanceError> {
    check(input)?;
    let ranges = by_layers::ranges(input)?;
    if ranges.len() == 1 {
        return balance_all(input);
    }
    by_layers::place(input, &ranges)
}

/// The same where all workers can hold all layers.
fn balance_all(input: &BalanceInput<'_>) -> Result<Placement, BalanceError> {
    let now = usable_current(input);
    let bare = hot::without_hot_copies(input);
    let input = &BalanceInput {
        current: bare.as_ref().or(input.current),
        ..input.clone()
    };
    let mut workers: Vec<&WorkerShare> = input.workers.iter().collect();
    workers.retain(|worker| worker.capacity_segments > 0 && !worker.layers.is_empty());
    workers.sort_by(|a, b| a.id.cmp(&b.id));
    if workers.is_empty() {
        return Err(BalanceError::NoWorkers);
    }
    let mut refused = BalanceError::NoWorkers;
    for slices in cuts(input, workers.len()) {
        let plan = Plan::new(input, now, workers.clone(), slices);
        match plan.check_capacity() {
            Ok(()) => return assign::place(&plan),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

impl<'a> Plan<'a> {
    fn new(
        input: &'a BalanceInput<'a>,
        now: Option<&'a Placement>,
        workers: Vec<&'a WorkerShare>,
        slices: u8,
    ) -> Self {
        let cut = cut(input.num_segments, slices);
        // Uneven cuts are counted as if all slices were of the largest size.
        let largest = u64::from(input.num_segments.div_ceil(slices));
        let copy = input.num_layers * input.num_experts * cut.len();
        let fits = |w: &&WorkerShare| {
            let slices = usize::try_from(w.capacity_segments / largest).unwrap_or(usize::MAX);
            slices.min(copy)
        };
        Self {
            capacity: workers.iter().map(fits).collect(),
            input,
            workers,
            cut,
            now,
        }
    }

    /// What shares are in proportion to.
    fn weights(&self) -> Vec<f64> {
        let measured = || self.workers.iter().filter_map(|w| w.speed.map(f64::from));
        let Some(usual) = predict::median(measured()) else {
            return self
                .workers
                .iter()
                .map(|w| w.capacity_segments as f64)
                .collect();
        };
        let speed = |w: &&WorkerShare| w.speed.map_or(usual, f64::from);
        self.workers.iter().map(speed).collect()
    }

    /// Slices in each layer.
    fn layer_slices(&self) -> usize {
        self.input.num_experts * self.cut.len()
    }

    /// Slices of one copy of the model.
    fn copy_slices(&self) -> usize {
        self.input.num_layers * self.layer_slices()
    }

    fn check_capacity(&self) -> Result<(), BalanceError> {
        let offered: usize = self.capacity.iter().sum();
        if offered >= self.copy_slices() {
            return Ok(());
        }
        let slice_segments = self.input.num_segments.div_ceil(self.cut.len() as u8);
        let experts = (self.input.num_layers * self.input.num_experts) as u64;
        Err(BalanceError::Capacity {
            layer: 0,
            needed_segments: experts * u64::from(self.input.num_segments),
            offered_segments: offered as u64 * u64::from(slice_segments),
            slice_segments,
            num_workers: self.workers.len(),
        })
    }
}

/// Numbers of slices per expert to try, in order of preference.
fn cuts(input: &BalanceInput<'_>, num_workers: usize) -> Vec<u8> {
    let finest = input.num_segments;
    if let Some(slices) = input.policy.slices_per_expert {
        return vec![slices.min(finest)];
    }
    let now = current_cut(input).unwrap_or(1).min(finest);
    // Only a cut of the present slices moves nothing; others serve where there is none.
    let nested = |k: &u8| finest.is_multiple_of(*k) && k.is_multiple_of(now);
    let mut cuts: Vec<u8> = (1..=finest).filter(nested).collect();
    if cuts.is_empty() {
        cuts = (now..=finest)
            .filter(|k| finest.is_multiple_of(*k))
            .collect();
    }
    let enough = |k: u8| usize::from(k) * input.num_experts >= num_workers;
    let first = cuts.iter().position(|&k| enough(k));
    // Finer cuts follow in case the chosen one does not fit.
    cuts.drain(..first.unwrap_or(cuts.len().saturating_sub(1)));
    cuts
}

/// Slices per expert of the current placement, if it is of this model.
fn current_cut(input: &BalanceInput<'_>) -> Option<u8> {
    let current = usable_current(input)?;
    current.experts.iter().map(|s| s.len() as u8).max()
}

/// The current placement, if its slices mean the same weights as ours.
fn usable_current<'a>(input: &BalanceInput<'a>) -> Option<&'a Placement> {
    input.current.filter(|current| {
        current.num_layers == input.num_layers
            && current.num_experts == input.num_experts
            && current.model == input.model
            && current.numeric_class == input.numeric_class
            && current.validate().is_ok()
    })
}

/// `slices` ranges of nearly equal length over the non-empty segments; the last one ends at 8.
fn cut(num_segments: u8, slices: u8) -> Vec<SegmentRange> {
    let border = |i: u8| (u16::from(num_segments) * u16::from(i) / u16::from(slices)) as u8;
    let range = |i: u8| {
        let end = if i + 1 == slices {
            SEGMENTS_PER_EXPERT
        } else {
            border(i + 1)
        };
        // `slices <= num_segments`, so borders grow and no range is empty.
        SegmentRange::new(border(i), end).ok()
    };
    (0..slices).filter_map(range).collect()
}

fn check(input: &BalanceInput<'_>) -> Result<(), BalanceError> {
    let refuse = |what, got: String, expected| {
        Err(BalanceError::Invalid {
            what,
            got,
            expected,
        })
    };
    let (layers, experts) = (input.num_layers, input.num_experts);
    let dimensions = 1..=crate::registry::MODEL_DIMENSION_MAX;
    if !dimensions.contains(&layers) || !dimensions.contains(&experts) {
        return refuse(
            "layers and experts",
            format!("{layers}, {experts}"),
            "1..=4096",
        );
    }
    let segments = 1..=SEGMENTS_PER_EXPERT;
    if !segments.contains(&input.num_segments) {
        return refuse("segments", input.num_segments.to_string(), "1..=8");
    }
    let slices = input.policy.slices_per_expert;
    if let Some(slices) = slices.filter(|slices| !segments.contains(slices)) {
        return refuse("slices per expert", slices.to_string(), "1..=8");
    }
    if input.workers.len() > PLACEMENT_WORKERS_MAX {
        return refuse("workers", input.workers.len().to_string(), "at most 4096");
    }
    if let Some(bad) = input.workers.iter().find(|w| w.layers.end > layers) {
        return refuse(
            "layers of a worker",
            format!("{:?}", bad.layers),
            "the model's",
        );
    }
    let mut ids: Vec<&WorkerId> = input.workers.iter().map(|worker| &worker.id).collect();
    ids.sort_unstable();
    if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        return refuse("worker id", twice[0].to_string(), "each worker once");
    }
    let mut speeds = input.workers.iter().filter_map(|worker| worker.speed);
    if let Some(speed) = speeds.find(|speed| !(*speed > 0.0 && speed.is_finite())) {
        return refuse("speed", speed.to_string(), "a positive number");
    }
    let Some(load) = &input.expert_load else {
        return Ok(());
    };
    if load.len() != layers * experts {
        return refuse(
            "expert loads",
            load.len().to_string(),
            "layers times experts",
        );
    }
    if let Some(bad) = load
        .iter()
        .find(|load| !(**load >= 0.0 && load.is_finite()))
    {
        return refuse("expert load", bad.to_string(), "a number from 0");
    }
    Ok(())
}

#[cfg(test)]
mod tests;
