//! Whether the cluster could lose any one worker, and whom it could not. Never counts on a worker that is
//! leaving or has not loaded.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use tramontane_types::{ExpertSlice, LayerId, Placement, WorkerId};

use crate::planner::Intent;
use crate::registry::{Members, WorkerRecord, WorkerState};
use crate::version::Version;

/// Whether losing any one worker leaves every slice on a ready worker, an attention worker that is ready,
/// and memory for a copy of the model on those who stay.
#[must_use]
pub fn survives_one_loss(members: &Members, published: &Placement) -> bool {
    let version = Version::of_placement(published);
    let is_of = |worker: &&Arc<WorkerRecord>| version.has(worker);
    let of_group = || members.workers.values().filter(is_of);
    let attends = |w: &&Arc<WorkerRecord>| w.roles.attention && w.state == WorkerState::Ready;
    let held = published.iter().all(|(slice, holders)| {
        let ready = holders
            .iter()
            .filter(|&&h| is_ready_holder(members, published, h, slice.layer));
        ready.count() > 1
    });
    if !held || of_group().filter(attends).count() < 2 {
        return false;
    }
    let counted = of_group().filter(|w| w.roles.experts && w.state.is_staying());
    let rooms: Vec<Room> = counted.map(|w| Room::of(w)).collect();
    let num_segments = of_group().map(|w| w.model.num_segments).max().unwrap_or(0);
    leaves_room(&rooms, published, num_segments)
}

/// What a worker has room for.
pub(crate) struct Room {
    segments: u64,
    layers: Range<usize>,
}

impl Room {
    pub(crate) fn of(worker: &WorkerRecord) -> Self {
        Self {
            segments: worker.capacity_segments(),
            layers: worker.expert_layers(),
        }
    }
}

/// Whether a copy of the model fits on these workers without any one of them, in slices as they are cut now. The layers of two
/// workers are the same, or have none in common: each range is by itself.
pub(crate) fn leaves_room(rooms: &[Room], placement: &Placement, num_segments: u8) -> bool {
    let mut ranges: Vec<&Range<usize>> = rooms.iter().map(|room| &room.layers).collect();
    ranges.sort_by_key(|range| range.start);
    ranges.dedup();
    let in_none = |(slice, _): (ExpertSlice, &[u16])| {
        let layer = usize::from(slice.layer.0);
        !ranges.iter().any(|range| range.contains(&layer))
    };
    let has_room = |range: &&Range<usize>| {
        let slices = placement.iter().map(|(slice, _)| slice);
        let slices = slices.filter(|slice| range.contains(&usize::from(slice.layer.0)));
        let lengths = slices.map(|s| {
            s.range
                .end()
                .min(num_segments)
                .saturating_sub(s.range.begin())
        });
        let (count, longest) =
            lengths.fold((0, 1), |(n, most): (u64, u8), len| (n + 1, most.max(len)));
        let of_range = rooms.iter().filter(|room| room.layers == **range);
        let offered: Vec<u64> = of_range
            .map(|room| room.segments / u64::from(longest))
            .collect();
        let all = offered.iter().fold(0_u64, |sum, n| sum.saturating_add(*n));
        all.saturating_sub(offered.into_iter().max().unwrap_or(0)) >= count
    };
    !placement.iter().any(in_none) && ranges.iter().all(has_room)
}

/// Whether every slice is on a worker that serves it, and somebody would take a new sequence.
#[must_use]
pub fn is_complete(members: &Members, published: &Placement, intent: &Intent) -> bool {
    let version = Version::of_placement(published);
    let mut takers = members.workers.values().filter(|w| version.has(w));
    let takes =
        takers.any(|w| w.roles.attention && w.state == WorkerState::Ready && intent.may_attend(w));
    let is_held = |(slice, holders): (ExpertSlice, &[u16])| {
        let mut holders = holders.iter();
        holders.any(|&h| is_ready_holder(members, published, h, slice.layer))
    };
    takes && published.iter().all(is_held)
}

/// Workers that alone hold some slice: losing one of them stops the model.
#[must_use]
pub fn essential_workers(members: &Members, published: &Placement) -> BTreeSet<WorkerId> {
    let mut essential = BTreeSet::new();
    for (slice, holders) in published.iter() {
        let mut ready = holders
            .iter()
            .filter(|&&h| is_ready_holder(members, published, h, slice.layer));
        if let (Some(&only), None) = (ready.next(), ready.next()) {
            essential.extend(published.worker(only).cloned());
        }
    }
    essential
}

fn is_ready_holder(members: &Members, published: &Placement, holder: u16, layer: LayerId) -> bool {
    let worker = published
        .worker(holder)
        .and_then(|id| members.workers.get(id));
    worker.is_some_and(|w| {
        // A name may have been taken over by a process of other weights, roles or layers.
        w.state == WorkerState::Ready
            && w.roles.experts
            && w.expert_layers().contains(&usize::from(layer.0))
            && w.loaded >= published.epoch
            && *w.model.fingerprint == *published.model
            && w.numeric_class == published.numeric_class
    })
}

#[cfg(test)]
mod tests {
    use tramontane_types::{Epoch, SegmentRange, SliceHolders};

    use super::*;
    use crate::registry::{Part, record_for_tests as record};

    /// One layer of experts that these holders of a, b and c hold whole.
    fn placement(experts: &[&[u16]]) -> Placement {
        let slice = |holders: &&[u16]| {
            vec![SliceHolders {
                range: SegmentRange::WHOLE,
                holders: holders.to_vec(),
            }]
        };
        Placement {
            epoch: Epoch(3),
            numeric_class: "cpu-q8".to_owned(),
            model: "f1".to_owned(),
            num_layers: 1,
            num_experts: experts.len(),
            workers: ["a", "b", "c"].map(WorkerId::new).to_vec(),
            experts: experts.iter().map(slice).collect(),
        }
    }

    /// a, b and c, ready, with memory for two experts each.
    fn members(edit: impl Fn(&mut WorkerRecord)) -> Members {
        let worker = |id| {
            let mut worker = record(id);
            worker.state = WorkerState::Ready;
            worker.loaded = Epoch(3);
            worker.capacity_bytes = 16_000;
            edit(&mut worker);
            (worker.id.clone(), Arc::new(worker))
        };
        Members {
            workers: ["a", "b", "c"].map(worker).into(),
            synced: true,
            ..Members::default()
        }
    }

    #[test]
    fn a_second_ready_holder_a_second_attention_worker_and_room_make_it_safe() {
        let replicated = placement(&[&[0, 1], &[1, 2], &[2, 0], &[0, 1]]);
        let survives = |edit: fn(&mut WorkerRecord)| survives_one_loss(&members(edit), &replicated);
        assert!(survives(|_| {}));
        let single = placement(&[&[0, 1], &[1, 2], &[2], &[0, 1]]);
        assert!(!survives_one_loss(&members(|_| {}), &single));
        assert!(!survives(|w| if w.id.as_str() == "c" {
            w.state = WorkerState::Draining;
        }));
        assert!(!survives(|w| if w.id.as_str() == "c" {
            w.loaded = Epoch(2);
        }));
        assert!(!survives(|w| w.roles.attention = w.id.as_str() == "a"));
        assert!(survives(|w| w.roles.attention = w.id.as_str() != "a"));
        // Four experts do not fit on two workers with room for one and a half.
        assert!(!survives(|w| w.capacity_bytes = 12_000));
        // The largest one is the one that must not be needed.
        assert!(!survives(|w| if w.id.as_str() != "a" {
            w.capacity_bytes = 8_000;
        }));
    }

    #[test]
    fn room_counts_only_with_those_who_can_hold_the_layer() {
        let replicated = placement(&[&[0, 1], &[1, 2], &[2, 0], &[0, 1]]);
        // Room enough, but only a can hold anything.
        let only_a = members(|w| {
            w.capacity_bytes = 64_000;
            let end_layer = if w.id.as_str() == "a" { 1 } else { 0 };
            w.part = Some(Part {
                attention: true,
                first_layer: 0,
                end_layer,
            });
        });
        assert!(!survives_one_loss(&only_a, &replicated));
    }

    #[test]
    fn each_range_of_layers_is_counted_in_its_own_slices() {
        let whole = vec![SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0, 1],
        }];
        let halves = [(0, 4), (4, 8)].map(|(begin, end)| SliceHolders {
            range: SegmentRange::new(begin, end).unwrap(),
            holders: vec![2, 3],
        });
        let mut placement = placement(&[]);
        (placement.num_layers, placement.num_experts) = (2, 1);
        placement.experts = vec![whole, halves.to_vec()];
        let room = |segments, layers| Room { segments, layers };
        let rooms = |second: u64| {
            [
                room(8, 0..1),
                room(8, 0..1),
                room(second, 1..2),
                room(second, 1..2),
                room(second, 1..2),
            ]
        };
        // Two of three with room for one half each: enough, although neither has room for a whole expert.
        assert!(leaves_room(&rooms(4), &placement, 8));
        assert!(!leaves_room(&rooms(3), &placement, 8));
        assert!(
            !leaves_room(&rooms(4)[1..], &placement, 8),
            "one of the first kind"
        );
    }

    #[test]
    fn who_holds_a_slice_alone_is_essential() {
        let ids = |set: BTreeSet<WorkerId>| -> Vec<String> {
            set.iter().map(ToString::to_string).collect()
        };
        let placement = placement(&[&[0, 1], &[1, 2], &[2]]);
        assert_eq!(ids(essential_workers(&members(|_| {}), &placement)), ["c"]);
        // b holds two slices with others; one of these leaves.
        let leaving = members(|w| {
            if w.id.as_str() == "a" {
                w.state = WorkerState::Leaving;
            }
        });
        assert_eq!(ids(essential_workers(&leaving, &placement)), ["b", "c"]);
    }
}
