//! Further copies of the experts that are chosen most, where memory is left. Never takes memory from the
//! copies that the operator asked for, and never moves them.

use tramontane_types::{Placement, SegmentRange, WorkerId};

use super::{BalanceInput, Plan, usable_current};

/// An expert is hot when each of its copies has more than this many times the mean load of a copy.
pub const HOT_LOAD: f64 = 2.0;
/// It keeps further copies until it would be below this many times the mean without one of them: between
/// the two bounds nothing is loaded or dropped.
pub const WARM_LOAD: f64 = 1.5;
/// Most further copies of one expert.
pub const HOT_COPIES_MAX: usize = 3;
/// Further copies take at most one part in this many of one copy of the model.
pub const HOT_MEMORY_PARTS: usize = 4;

/// The current placement without copies beyond those that were asked for, so that these stay where they
/// are. `None` when it has no such copies, or all are to lose one: then balance chooses which.
pub(super) fn without_hot_copies(input: &BalanceInput<'_>) -> Option<Placement> {
    let replicas = input.policy.replicas.get();
    let mut current = usable_current(input)?.clone();
    let is_here = |holder: u16| {
        let id = current.workers.get(usize::from(holder));
        id.is_some_and(|id| input.workers.iter().any(|w| w.id == *id))
    };
    let here: Vec<bool> = (0..current.workers.len() as u16).map(is_here).collect();
    let fewest = current.iter().map(|(_, holders)| holders.len()).min()?;
    let most = current.iter().map(|(_, holders)| holders.len()).max()?;
    if fewest > replicas || most <= replicas {
        return None;
    }
    for slice in current.experts.iter_mut().flatten() {
        if slice.holders.len() > replicas {
            // Who is gone makes room for who is there: stable, so that the preferred ones come first.
            slice.holders.sort_by_key(|&h| !here[usize::from(h)]);
            slice.holders.truncate(replicas);
        }
    }
    Some(current)
}

/// Further copies of each expert, layer-major: the most used ones first, as far as memory goes. `now` is
/// the current placement with all its copies.
pub(super) fn wanted(plan: &Plan<'_>, now: Option<&Placement>) -> Vec<usize> {
    let (input, num_workers) = (plan.input, plan.workers.len());
    let copies = input.policy.replicas.get().min(num_workers);
    let mut extra = vec![0; input.num_layers * input.num_experts];
    let Some(loads) = &input.expert_load else {
        return extra;
    };
    let offered: usize = plan.capacity.iter().sum();
    let spare = offered.saturating_sub(plan.copy_slices() * copies);
    let mut budget = spare.min(plan.copy_slices().div_ceil(HOT_MEMORY_PARTS));
    let most = HOT_COPIES_MAX.min(num_workers - copies);
    let mut hot = Vec::new();
    for (layer, loads) in loads.chunks(input.num_experts).enumerate() {
        let mean = loads.iter().map(|&l| f64::from(l)).sum::<f64>() / loads.len() as f64;
        for (expert, &load) in loads.iter().enumerate() {
            let index = layer * input.num_experts + expert;
            let load = f64::from(load) * copies as f64 / mean.max(f64::MIN_POSITIVE);
            let until = |limit: f64| ((load / limit).ceil() as usize).saturating_sub(copies);
            let kept = copies_now(now, index).saturating_sub(copies);
            let wanted = until(HOT_LOAD).max(kept.min(until(WARM_LOAD))).min(most);
            if wanted > 0 {
                hot.push((index, load, wanted));
            }
        }
    }
    hot.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    for (index, _, wanted) in hot {
        extra[index] = wanted.min(budget / plan.cut.len());
        budget -= extra[index] * plan.cut.len();
    }
    extra
}

fn copies_now(now: Option<&Placement>, index: usize) -> usize {
    let slices = now.and_then(|now| now.experts.get(index));
    let holders = slices.into_iter().flatten().map(|s| s.holders.len());
    holders.min().unwrap_or(0)
}

/// Adds the `extra` copies behind the other holders: where they are now, or else on the least busy
/// workers with room.
pub(super) fn add(
    placement: &mut Placement,
    plan: &Plan<'_>,
    extra: &[usize],
    (weights, now): (&[f64], Option<&Placement>),
) {
    let place = |id: &WorkerId| plan.workers.iter().position(|w| w.id == *id);
    let known: Vec<usize> = placement.workers.iter().filter_map(place).collect();
    let mut room: Vec<usize> = known.iter().map(|&w| plan.capacity[w]).collect();
    for holder in placement.iter().flat_map(|(_, holders)| holders.to_vec()) {
        room[usize::from(holder)] = room[usize::from(holder)].saturating_sub(1);
    }
    let load = |index: usize| {
        let loads = plan.input.expert_load.as_ref();
        loads.map_or(1.0, |loads| f64::from(loads[index]))
    };
    let num_experts = plan.input.num_experts;
    for layer in 0..plan.input.num_layers {
        let experts = layer * num_experts..(layer + 1) * num_experts;
        let mut busy = vec![0.0; known.len()];
        for index in experts.clone() {
            for slice in &placement.experts[index] {
                let share = load(index) / (slice.holders.len() + extra[index]) as f64;
                for &holder in &slice.holders {
                    busy[usize::from(holder)] += share / weights[known[usize::from(holder)]];
                }
            }
        }
        for index in experts.filter(|&index| extra[index] > 0) {
            for part in 0..placement.experts[index].len() {
                let slice = &mut placement.experts[index][part];
                let share = load(index) / (slice.holders.len() + extra[index]) as f64;
                let had = holders_now(now, index, slice.range);
                for _ in 0..extra[index] {
                    let free = |h: &usize| room[*h] > 0 && !slice.holders.contains(&(*h as u16));
                    let has = |h: usize| had.contains(&&placement.workers[h]);
                    let best = (0..known.len())
                        .filter(free)
                        .min_by(|&a, &b| has(b).cmp(&has(a)).then(busy[a].total_cmp(&busy[b])));
                    let Some(holder) = best else { break };
                    slice.holders.push(holder as u16);
                    room[holder] -= 1;
                    busy[holder] += share / weights[known[holder]];
                }
            }
        }
    }
}

/// Who holds a slice of the same cut now.
fn holders_now(now: Option<&Placement>, index: usize, range: SegmentRange) -> Vec<&WorkerId> {
    let Some(now) = now else { return Vec::new() };
    let slices = now.experts.get(index).into_iter().flatten();
    let same = slices.filter(|slice| slice.range == range);
    same.flat_map(|slice| slice.holders.iter().filter_map(|&h| now.worker(h)))
        .collect()
}
