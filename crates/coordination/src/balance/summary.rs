//! What a placement means to an operator, before it is applied. Never decides anything.

use std::collections::BTreeMap;

use tramontane_types::{ExpertId, LayerId, Placement, WorkerId};

/// A placement in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// By worker id: the holders, and those that held something before.
    pub workers: Vec<WorkerSummary>,
    /// Slices per expert of the finest cut expert.
    pub slices_per_expert: usize,
    /// Fewest holders of any slice.
    pub replicas_min: usize,
    /// Most holders of any slice.
    pub replicas_max: usize,
    /// Segments that workers must load.
    pub moved_segments: u64,
    /// Segments that are held, all copies together.
    pub total_segments: u64,
}

/// One worker of a placement in numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSummary {
    /// The worker.
    pub id: WorkerId,
    /// Segments that it holds.
    pub segments: u64,
    /// Of those, the ones for which it is the preferred holder.
    pub preferred_segments: u64,
    /// Of those that it holds, the ones that it must load.
    pub moved_segments: u64,
    /// Layers in which it holds nothing.
    pub idle_layers: usize,
    /// Whether losing it loses no slice: everything that it holds has another holder.
    pub n_minus_one: bool,
}

/// Describes `placement`, and the way to it from `current`. `num_segments` are the non-empty ones.
#[must_use]
pub fn summarise(placement: &Placement, current: Option<&Placement>, num_segments: u8) -> Summary {
    let real = |mask: u8| u64::from((u16::from(mask) & ((1 << num_segments) - 1)).count_ones());
    let before = current.map(masks).unwrap_or_default();
    let blank = |id: &WorkerId| WorkerSummary {
        id: id.clone(),
        segments: 0,
        preferred_segments: 0,
        moved_segments: 0,
        idle_layers: placement.num_layers,
        n_minus_one: true,
    };
    let mut workers: BTreeMap<&WorkerId, WorkerSummary> = BTreeMap::new();
    for id in placement.workers.iter().chain(before.keys().copied()) {
        workers.entry(id).or_insert_with(|| blank(id));
    }
    let (mut replicas_min, mut replicas_max) = (usize::MAX, 0);
    for (slice, holders) in placement.iter() {
        replicas_min = replicas_min.min(holders.len());
        replicas_max = replicas_max.max(holders.len());
        for (rank, &holder) in holders.iter().enumerate() {
            let worker = placement.worker(holder).and_then(|id| workers.get_mut(id));
            let Some(worker) = worker else { continue };
            let segments = real(slice.range.mask());
            worker.preferred_segments += if rank == 0 { segments } else { 0 };
            worker.n_minus_one &= holders.len() > 1;
        }
    }
    for (id, experts) in masks(placement) {
        let Some(worker) = workers.get_mut(id) else {
            continue;
        };
        let mut layers: Vec<LayerId> = experts.keys().map(|(layer, _)| *layer).collect();
        layers.dedup();
        worker.idle_layers = placement.num_layers.saturating_sub(layers.len());
        for (expert, &mask) in &experts {
            let had = before.get(id).and_then(|had| had.get(expert));
            worker.segments += real(mask);
            worker.moved_segments += real(mask & !had.copied().unwrap_or(0));
        }
    }
    let workers: Vec<WorkerSummary> = workers.into_values().collect();
    Summary {
        slices_per_expert: placement.experts.iter().map(Vec::len).max().unwrap_or(0),
        replicas_min: if replicas_max == 0 { 0 } else { replicas_min },
        replicas_max,
        moved_segments: workers.iter().map(|w| w.moved_segments).sum(),
        total_segments: workers.iter().map(|w| w.segments).sum(),
        workers,
    }
}

/// Segments held of each expert, one bit each.
pub(super) type ExpertMasks = BTreeMap<(LayerId, ExpertId), u8>;

/// What each worker holds.
pub(super) fn masks(placement: &Placement) -> BTreeMap<&WorkerId, ExpertMasks> {
    let mut masks: BTreeMap<&WorkerId, ExpertMasks> = BTreeMap::new();
    for (slice, holders) in placement.iter() {
        for id in holders.iter().filter_map(|&h| placement.worker(h)) {
            let experts = masks.entry(id).or_default();
            *experts.entry((slice.layer, slice.expert)).or_default() |= slice.range.mask();
        }
    }
    masks
}
