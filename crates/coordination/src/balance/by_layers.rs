//! Workers that can hold experts of some layers only: the model falls into ranges of layers, each placed among those
//! who can hold it, as if it were a model of its own. Balances nothing itself.

use std::collections::BTreeMap;
use std::ops::Range;

use tramontane_types::{Placement, SliceHolders, WorkerId};

use super::{BalanceError, BalanceInput, WorkerShare, balance_all};

/// The ranges of layers that workers can hold, ascending, together all layers.
///
/// # Errors
/// [`BalanceError::Layers`] where they leave a gap or overlap.
pub(super) fn ranges(input: &BalanceInput<'_>) -> Result<Vec<Range<usize>>, BalanceError> {
    let offering = input.workers.iter().filter(|w| w.capacity_segments > 0);
    let bounds = offering.map(|w| (w.layers.start, w.layers.end));
    let mut bounds: Vec<(usize, usize)> = bounds.filter(|(start, end)| start < end).collect();
    bounds.sort_unstable();
    bounds.dedup();
    if bounds.is_empty() {
        return Err(BalanceError::NoWorkers);
    }
    let mut next = 0;
    for &(start, end) in &bounds {
        if start != next {
            let layer = next.min(start);
            return Err(BalanceError::Layers { layer });
        }
        next = end;
    }
    if next != input.num_layers {
        return Err(BalanceError::Layers { layer: next });
    }
    Ok(bounds.into_iter().map(|(start, end)| start..end).collect())
}

/// Places every range by itself.
///
/// # Errors
/// Those of the first range that has no placement.
pub(super) fn place(
    input: &BalanceInput<'_>,
    ranges: &[Range<usize>],
) -> Result<Placement, BalanceError> {
    let mut whole = Placement {
        epoch: input.epoch,
        numeric_class: input.numeric_class.clone(),
        model: input.model.clone(),
        num_layers: input.num_layers,
        num_experts: input.num_experts,
        workers: Vec::new(),
        experts: Vec::new(),
    };
    for range in ranges {
        let current = input.current.and_then(|current| part_of(current, range));
        let part = BalanceInput {
            workers: workers_of(input, range),
            num_layers: range.len(),
            expert_load: input.expert_load.as_ref().map(|load| {
                load[range.start * input.num_experts..range.end * input.num_experts].to_vec()
            }),
            current: current.as_ref(),
            ..input.clone()
        };
        let placed = balance_all(&part).map_err(|error| at(error, range.start));
        append(&mut whole, &placed?);
    }
    Ok(whole)
}

/// An error of a range of layers that begins here.
fn at(mut error: BalanceError, first_layer: usize) -> BalanceError {
    if let BalanceError::Capacity { layer, .. } = &mut error {
        *layer = first_layer;
    }
    error
}

fn workers_of(input: &BalanceInput<'_>, range: &Range<usize>) -> Vec<WorkerShare> {
    let mine = input.workers.iter().filter(|w| w.layers == *range);
    let share = |w: &WorkerShare| WorkerShare {
        layers: 0..range.len(),
        ..w.clone()
    };
    mine.map(share).collect()
}

/// Some layers of a placement as one of their own; `None` where it does not have them.
fn part_of(placement: &Placement, layers: &Range<usize>) -> Option<Placement> {
    let experts = layers.start * placement.num_experts..layers.end * placement.num_experts;
    let experts = placement.experts.get(experts)?;
    // Who holds nothing there is not named: all of a placement's workers are asked for their slices.
    let mut part = Placement {
        num_layers: layers.len(),
        workers: Vec::new(),
        experts: Vec::new(),
        ..placement.clone()
    };
    let mut places = Places::default();
    let renamed = experts
        .iter()
        .map(|slices| places.renamed(slices, &placement.workers, &mut part.workers));
    part.experts = renamed.collect();
    Some(part)
}

fn append(whole: &mut Placement, part: &Placement) {
    let mut places = Places::default();
    let workers = &mut whole.workers;
    let renamed = part
        .experts
        .iter()
        .map(|slices| places.renamed(slices, &part.workers, workers));
    whole.experts.extend(renamed);
}

/// Where workers of one table stand in another.
#[derive(Default)]
struct Places(BTreeMap<u16, u16>);

impl Places {
    /// Slices whose holders are named by another table, which takes those that it lacks.
    fn renamed(
        &mut self,
        slices: &[SliceHolders],
        from: &[WorkerId],
        to: &mut Vec<WorkerId>,
    ) -> Vec<SliceHolders> {
        let mut place = |holder: &u16| {
            let known = self.0.get(holder).copied();
            known.or_else(|| {
                let worker = from.get(usize::from(*holder))?;
                let place = to.iter().position(|w| w == worker).unwrap_or(to.len());
                if place == to.len() {
                    to.push(worker.clone());
                }
                // In range: a placement has at most 4,096 workers.
                let place = place as u16;
                self.0.insert(*holder, place);
                Some(place)
            })
        };
        let renamed = slices.iter().map(|slice| SliceHolders {
            range: slice.range,
            holders: slice.holders.iter().filter_map(&mut place).collect(),
        });
        renamed.collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::tests::{check_placement, input, segments, with_replicas};
    use super::super::{Summary, balance, summarise};
    use super::*;

    /// The second half of the workers can hold the layers from `border` on, the first half those before.
    fn two_kinds(
        capacities: &[u64],
        shape: (usize, usize, u8),
        border: usize,
    ) -> BalanceInput<'static> {
        let mut input = input(capacities, shape);
        let half = capacities.len() / 2;
        for (index, worker) in input.workers.iter_mut().enumerate() {
            worker.layers = if index < half {
                0..border
            } else {
                border..shape.0
            };
        }
        input
    }

    fn check_layers(input: &BalanceInput<'_>, placement: &Placement) -> Summary {
        for (slice, holders) in placement.iter() {
            for &holder in holders {
                let id = placement.worker(holder).unwrap();
                let worker = input.workers.iter().find(|w| w.id == *id).unwrap();
                let layer = usize::from(slice.layer.0);
                assert!(worker.layers.contains(&layer), "{slice} on {worker:?}");
            }
        }
        check_placement(input, placement)
    }

    #[test]
    fn layers_go_to_those_who_can_hold_them() {
        // A quarter of the layers on one worker, the rest on two: 8 x 64 segments, 24 x 64.
        let mut input = two_kinds(&[4000, 4000], (32, 8, 8), 8);
        let mut third = input.workers[1].clone();
        third.id = WorkerId::new("w002");
        input.workers.push(third);
        let first = balance(&input).unwrap();
        let summary = check_layers(&input, &first);
        assert_eq!(segments(&summary), [512, 768, 768]);
        // The same again moves nothing; without the third its slices go to the second.
        input.current = Some(&first);
        let again = balance(&input).unwrap();
        assert_eq!(summarise(&again, Some(&first), 8).moved_segments, 0);
        input.workers.pop();
        let fewer = balance(&input).unwrap();
        let summary = check_layers(&input, &fewer);
        assert_eq!(segments(&summary)[..2], [512, 1536]);
        assert_eq!(summary.moved_segments, 768);
    }

    #[test]
    fn layers_that_nobody_can_hold_are_named() {
        let refused = |layers: [Range<usize>; 2]| {
            let mut input = input(&[4000, 4000], (4, 8, 8));
            let [first, second] = layers;
            (input.workers[0].layers, input.workers[1].layers) = (first, second);
            balance(&input).unwrap_err()
        };
        assert_eq!(refused([0..2, 3..4]), BalanceError::Layers { layer: 2 });
        assert_eq!(refused([0..0, 1..4]), BalanceError::Layers { layer: 0 });
        assert_eq!(refused([0..2, 2..3]), BalanceError::Layers { layer: 3 });
        assert_eq!(refused([0..2, 1..4]), BalanceError::Layers { layer: 1 });
        assert_eq!(refused([0..0, 0..0]), BalanceError::NoWorkers);
        let error = refused([0..2, 2..5]).to_string();
        assert_eq!(error, "layers of a worker: got 2..5, expected the model's");
        let short = two_kinds(&[4000, 100], (4, 8, 8), 2);
        assert!(matches!(
            balance(&short),
            Err(BalanceError::Capacity {
                needed_segments: 128,
                ..
            })
        ));
    }

    proptest! {
        /// Two kinds of workers are placed as two models would be.
        #[test]
        fn every_range_of_layers_is_placed_by_itself(
            capacities in prop::collection::vec(200_u64..600, 2..7),
            border in 1_usize..4,
            replicas in 1_usize..3,
            load in prop::collection::vec(0.0_f32..4.0, 16),
        ) {
            let mut input = with_replicas(two_kinds(&capacities, (4, 4, 8), border), replicas);
            input.expert_load = Some(load.clone());
            let half = capacities.len() / 2;
            let placement = balance(&input).unwrap();
            placement.validate().unwrap();
            for (workers, layers) in [(0..half, 0..border), (half..capacities.len(), border..4)] {
                let mut alone = input.clone();
                alone.workers = input.workers[workers].to_vec();
                for worker in &mut alone.workers {
                    worker.layers = 0..layers.len();
                }
                alone.num_layers = layers.len();
                alone.expert_load = Some(load[layers.start * 4..layers.end * 4].to_vec());
                let alone = balance(&alone).unwrap();
                let named = |placement: &Placement, experts: Range<usize>| -> Vec<Vec<WorkerId>> {
                    let slices = placement.experts[experts].iter().flatten();
                    let holders = slices.map(|s| s.holders.iter().map(|&h| placement.worker(h).unwrap().clone()));
                    holders.map(Iterator::collect).collect()
                };
                let here = named(&placement, layers.start * 4..layers.end * 4);
                prop_assert_eq!(here, named(&alone, 0..layers.len() * 4));
            }
        }
    }
}
