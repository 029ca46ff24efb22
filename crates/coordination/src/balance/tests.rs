//! Balance, by example and by property.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

fn share(id: usize, capacity_segments: u64, num_layers: usize) -> WorkerShare {
    WorkerShare {
        id: WorkerId::new(&format!("w{id:03}")),
        capacity_segments,
        layers: 0..num_layers,
        speed: None,
    }
}

pub(super) fn input(
    capacities: &[u64],
    (layers, experts, segments): (usize, usize, u8),
) -> BalanceInput<'static> {
    BalanceInput {
        workers: capacities
            .iter()
            .enumerate()
            .map(|(i, &c)| share(i, c, layers))
            .collect(),
        num_layers: layers,
        num_experts: experts,
        num_segments: segments,
        expert_load: None,
        policy: PlacementPolicy {
            replicas: NonZeroUsize::MIN,
            slices_per_expert: None,
        },
        current: None,
        epoch: Epoch(1),
        numeric_class: "c".to_owned(),
        model: "m".to_owned(),
    }
}

pub(super) fn with_replicas(mut input: BalanceInput<'_>, replicas: usize) -> BalanceInput<'_> {
    input.policy.replicas = NonZeroUsize::new(replicas).unwrap();
    input
}

pub(super) fn segments(summary: &Summary) -> Vec<u64> {
    summary.workers.iter().map(|w| w.segments).collect()
}

/// Everything that must hold of every placement.
pub(super) fn check_placement(input: &BalanceInput<'_>, placement: &Placement) -> Summary {
    placement.validate().unwrap();
    let summary = summarise(placement, input.current, input.num_segments);
    for (slice, holders) in placement.iter() {
        let distinct: BTreeSet<_> = holders.iter().collect();
        assert_eq!(distinct.len(), holders.len(), "{slice} twice on one worker");
        assert!(slice.range.begin() < input.num_segments, "{slice} is empty");
        assert!(holders.len() <= input.policy.replicas.get());
    }
    for worker in &summary.workers {
        let offered = input.workers.iter().find(|w| w.id == worker.id);
        let offered = offered.map_or(0, |w| w.capacity_segments);
        assert!(worker.segments <= offered, "{worker:?} offers {offered}");
    }
    summary
}

#[test]
fn one_worker_holds_everything() {
    let input = input(&[10_000], (2, 4, 8));
    let placement = balance(&input).unwrap();
    let summary = check_placement(&input, &placement);
    assert_eq!(summary.slices_per_expert, 1);
    assert_eq!(segments(&summary), [64]);
    assert!(!summary.workers[0].n_minus_one);
}

#[test]
fn mixtral_on_three_unequal_workers() {
    // 8x7B: 32 layers, 8 experts, 8 segments; 2048 segments. Memory 1 : 2 : 5.
    let input = input(&[400, 800, 2000], (32, 8, 8));
    let summary = check_placement(&input, &balance(&input).unwrap());
    assert_eq!(segments(&summary), [256, 512, 1280]);
    assert!(summary.workers.iter().all(|w| w.idle_layers == 0));
}

#[test]
fn a_large_cluster_is_planned_quickly() {
    // 8x22B on 24 workers, two copies, then one leaves.
    let before = with_replicas(input(&[2000; 24], (56, 8, 8)), 2);
    let old = balance(&before).unwrap();
    let mut after = before.clone();
    after.workers.remove(7);
    after.current = Some(&old);
    let summary = check_placement(&after, &balance(&after).unwrap());
    assert_eq!((summary.replicas_min, summary.slices_per_expert), (2, 4));
    assert!(
        summary
            .workers
            .iter()
            .all(|w| w.idle_layers == 0 || w.segments == 0)
    );
}

#[test]
fn a_dense_model_is_cut_as_far_as_workers_need() {
    for (workers, slices) in [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8)] {
        let input = input(&vec![1000; workers], (4, 1, 8));
        let summary = check_placement(&input, &balance(&input).unwrap());
        assert_eq!(summary.slices_per_expert, slices, "{workers} workers");
        assert!(summary.workers.iter().all(|w| w.idle_layers == 0));
    }
}

#[test]
fn empty_segments_ride_with_the_last_real_one() {
    let input = input(&[1000; 3], (2, 1, 3));
    let placement = balance(&input).unwrap();
    check_placement(&input, &placement);
    let ranges: Vec<String> = placement.experts[0]
        .iter()
        .map(|s| s.range.to_string())
        .collect();
    assert_eq!(ranges, ["0..1", "1..2", "2..8"]);
}

#[test]
fn a_finer_cut_is_taken_when_whole_experts_do_not_fit() {
    // 2 x 12 segments for 3 experts of 8: one whole expert each leaves a third without a place.
    let input = input(&[12, 12], (1, 3, 8));
    let summary = check_placement(&input, &balance(&input).unwrap());
    assert_eq!(
        (summary.slices_per_expert, segments(&summary)),
        (2, vec![12, 12])
    );
}

#[test]
fn shortage_is_named_in_numbers() {
    let few = input(&[10, 20], (2, 4, 8));
    let text = balance(&few).unwrap_err().to_string();
    assert!(
        text.contains("needs 64 segments, 2 workers offer 30"),
        "{text}"
    );
    assert_eq!(
        balance(&input(&[0], (1, 1, 8))),
        Err(BalanceError::NoWorkers)
    );
    let mut twice = input(&[99, 99], (1, 1, 8));
    twice.workers[1].id = twice.workers[0].id.clone();
    assert!(matches!(balance(&twice), Err(BalanceError::Invalid { .. })));
}

#[test]
fn replicas_are_distinct_and_fewer_where_workers_or_memory_lack() {
    let two = with_replicas(input(&[1000; 2], (2, 4, 8)), 3);
    let summary = check_placement(&two, &balance(&two).unwrap());
    assert_eq!((summary.replicas_min, summary.replicas_max), (2, 2));
    assert!(summary.workers.iter().all(|w| w.n_minus_one));
    assert_eq!(summary.workers[0].preferred_segments, 32);
    // Memory for one and a half copies: the most used experts get the second one.
    let mut hot = with_replicas(input(&[48; 2], (2, 4, 8)), 2);
    hot.expert_load = Some(vec![9.0, 9.0, 1.0, 1.0, 1.0, 9.0, 9.0, 1.0]);
    let placement = balance(&hot).unwrap();
    check_placement(&hot, &placement);
    let copies: Vec<usize> = placement
        .experts
        .iter()
        .map(|s| s[0].holders.len())
        .collect();
    assert_eq!(copies, [2, 2, 1, 1, 1, 2, 2, 1]);
}

#[test]
fn used_experts_are_spread_over_workers() {
    let mut input = input(&[1000; 2], (1, 4, 8));
    input.expert_load = Some(vec![8.0, 8.0, 1.0, 1.0]);
    let placement = balance(&input).unwrap();
    assert_ne!(
        placement.experts[0][0].holders,
        placement.experts[1][0].holders
    );
}

#[test]
fn a_faster_worker_gets_more() {
    let mut input = input(&[4000; 2], (4, 8, 8));
    input.workers[0].speed = Some(1.0);
    input.workers[1].speed = Some(3.0);
    let summary = check_placement(&input, &balance(&input).unwrap());
    assert_eq!(segments(&summary), [64, 192]);
}

#[test]
fn a_ninth_worker_cuts_experts_and_leaving_does_not_join_them_again() {
    let eight = input(&[1000; 8], (4, 8, 8));
    let old = balance(&eight).unwrap();
    let mut nine = input(&[1000; 9], (4, 8, 8));
    nine.current = Some(&old);
    let new = balance(&nine).unwrap();
    let summary = check_placement(&nine, &new);
    assert_eq!(summary.slices_per_expert, 2);
    assert_eq!(summary.moved_segments, summary.workers[8].segments);
    let mut back = input(&[1000; 8], (4, 8, 8));
    back.current = Some(&new);
    let summary = check_placement(&back, &balance(&back).unwrap());
    assert_eq!(summary.slices_per_expert, 2);
    assert!(summary.moved_segments <= 28, "{}", summary.moved_segments);
}

/// Who holds the only slice of each expert, as digits.
fn holders(placement: &Placement) -> Vec<String> {
    let digit = |h: &u16| placement.workers[usize::from(*h)].as_str()[3..].to_owned();
    let of = |slices: &Vec<tramontane_types::SliceHolders>| {
        slices[0].holders.iter().map(digit).collect()
    };
    placement.experts.iter().map(of).collect()
}

#[test]
fn speed_decides_within_capacity_and_the_unmeasured_are_taken_for_usual() {
    // Twice as fast and little memory: full, and the others share the rest by speed.
    let mut input = input(&[64, 4000, 4000, 4000], (4, 8, 8));
    for (worker, speed) in [(0, 8.0), (1, 1.0), (2, 2.0)] {
        input.workers[worker].speed = Some(speed);
    }
    let summary = check_placement(&input, &balance(&input).unwrap());
    assert_eq!(segments(&summary), [64, 40, 80, 72]);
}

#[test]
fn a_hot_expert_gets_copies_where_memory_is_left_and_keeps_them_while_warm() {
    let mut input = input(&[64; 3], (1, 8, 8));
    input.expert_load = Some(vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]);
    let first = balance(&input).unwrap();
    first.validate().unwrap();
    // 4.5 times the mean: three copies would be right, a quarter of the model's memory is two more.
    let copies: Vec<usize> = holders(&first).iter().map(String::len).collect();
    assert_eq!(copies, [1, 1, 1, 1, 1, 1, 1, 3]);
    // Cooler than what copies it, hotter than what drops one of them: nothing changes.
    input.current = Some(&first);
    input.expert_load = Some(vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.5]);
    assert_eq!(holders(&balance(&input).unwrap()), holders(&first));
    input.expert_load = Some(vec![1.0; 8]);
    let cool = balance(&input).unwrap();
    assert!(holders(&cool).iter().all(|h| h.len() == 1));
    assert_eq!(summarise(&cool, Some(&first), 8).moved_segments, 0);
    // No memory beyond one copy: no further copies.
    input.current = None;
    input.expert_load = Some(vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]);
    input.workers = vec![share(0, 24, 1), share(1, 24, 1), share(2, 16, 1)];
    assert!(
        holders(&balance(&input).unwrap())
            .iter()
            .all(|h| h.len() == 1)
    );
}

#[test]
fn a_hot_copy_takes_the_place_of_a_lost_holder() {
    let mut input = input(&[64; 3], (1, 8, 8));
    input.expert_load = Some(vec![1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]);
    let before = balance(&input).unwrap();
    let first = usize::from(before.experts[7][0].holders[0]);
    input.workers.remove(first);
    input.current = Some(&before);
    let after = balance(&input).unwrap();
    let hot = |p: &Placement| p.experts[7][0].holders.len();
    assert_eq!((hot(&before), hot(&after)), (3, 2));
    let held = summarise(&before, None, 8).workers[first].segments;
    let moved = summarise(&after, Some(&before), 8).moved_segments;
    assert_eq!(moved, held - 8, "the hot expert is there already");
}

#[test]
fn loads_are_evened_out_by_swaps_and_what_is_even_stays() {
    let even = input(&[1000; 2], (1, 4, 8));
    let old = balance(&even).unwrap();
    let mine: Vec<usize> = (0..4).filter(|&e| holders(&old)[e] == "0").collect();
    let mut skewed = even.clone();
    let mut loads = vec![1.0; 4];
    for expert in mine {
        loads[expert] = 1.8;
    }
    skewed.current = Some(&old);
    skewed.expert_load = Some(loads);
    let new = balance(&skewed).unwrap();
    assert_eq!(
        summarise(&new, Some(&old), 8).moved_segments,
        16,
        "one swap"
    );
    skewed.current = Some(&new);
    assert_eq!(holders(&balance(&skewed).unwrap()), holders(&new));
}

fn shapes() -> impl Strategy<Value = (usize, usize, u8)> {
    (1_usize..6, 1_usize..9, 1_u8..=8)
}

/// Capacities that always suffice for one copy, in unequal parts.
fn cluster() -> impl Strategy<Value = (Vec<u64>, (usize, usize, u8))> {
    (prop::collection::vec(1_u64..100, 1..10), shapes()).prop_map(|(parts, shape)| {
        let copy = (shape.0 * shape.1) as u64 * u64::from(shape.2);
        let sum: u64 = parts.iter().sum();
        let grow = |part: u64| (part * copy * 5).div_ceil(sum * 4) + u64::from(shape.2);
        (parts.into_iter().map(grow).collect(), shape)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn every_placement_is_valid_and_repeatable(
        (capacities, shape) in cluster(),
        replicas in 1_usize..4,
        cut in prop::option::of(1_u8..=8),
    ) {
        let mut input = with_replicas(input(&capacities, shape), replicas);
        input.policy.slices_per_expert = cut;
        let Ok(placement) = balance(&input) else {
            // Only a coarse cut that was asked for may not fit.
            prop_assert!(cut.is_some());
            return Ok(());
        };
        let summary = check_placement(&input, &placement);
        let mut shuffled = input.clone();
        shuffled.workers.reverse();
        prop_assert_eq!(&balance(&shuffled).unwrap(), &placement);
        input.current = Some(&placement);
        let mut again = balance(&input).unwrap();
        again.epoch = placement.epoch;
        prop_assert_eq!(&again, &placement, "not stable");
        prop_assert!(summary.replicas_max - summary.replicas_min <= 1);
    }

    #[test]
    fn shares_are_within_one_slice_of_proportional((capacities, shape) in cluster()) {
        let input = input(&capacities, shape);
        let summary = check_placement(&input, &balance(&input).unwrap());
        let slice = f64::from(shape.2) / summary.slices_per_expert as f64;
        let sum: u64 = capacities.iter().sum();
        for (worker, &capacity) in summary.workers.iter().zip(&capacities) {
            let fair = summary.total_segments as f64 * capacity as f64 / sum as f64;
            let fits = (capacity as f64 / slice).floor() * slice;
            // Where memory is tight, whole slices decide.
            if summary.workers.len() == capacities.len() && fits > fair + slice {
                let off = (worker.segments as f64 - fair).abs();
                prop_assert!(off <= slice * (1.0 + capacities.len() as f64 * 0.25), "{} off", off);
            }
        }
    }

    #[test]
    fn measured_placements_are_valid_stable_and_move_only_what_they_must(
        (capacities, shape) in cluster(),
        speeds in prop::collection::vec(prop::option::of(1.0_f32..9.0), 10),
        loads in prop::collection::vec(0.0_f32..1.0, 48),
        hot in 0_usize..48,
        replicas in 1_usize..3,
    ) {
        let mut input = with_replicas(input(&capacities, shape), replicas);
        for (worker, speed) in input.workers.iter_mut().zip(speeds) {
            worker.speed = speed;
        }
        let mut loads = loads[..shape.0 * shape.1].to_vec();
        loads[hot % (shape.0 * shape.1)] += 20.0;
        input.expert_load = Some(loads);
        let placement = balance(&input).unwrap();
        let summary = summarise(&placement, None, shape.2);
        placement.validate().unwrap();
        for (slice, holders) in placement.iter() {
            let distinct: BTreeSet<_> = holders.iter().collect();
            prop_assert_eq!(distinct.len(), holders.len(), "{} twice on one worker", slice);
            prop_assert!(holders.len() <= replicas + HOT_COPIES_MAX);
        }
        for worker in &summary.workers {
            let offered = input.workers.iter().find(|w| w.id == worker.id).unwrap();
            prop_assert!(worker.segments <= offered.capacity_segments);
        }
        let copy = (shape.0 * shape.1) as u64 * u64::from(shape.2);
        let hot_most = copy.div_ceil(HOT_MEMORY_PARTS as u64) + u64::from(shape.2);
        prop_assert!(summary.total_segments <= copy * replicas as u64 + hot_most);
        input.current = Some(&placement);
        let again = balance(&input).unwrap();
        prop_assert_eq!(&again, &placement, "not stable");
        // Without loads nothing is loaded anew, hot copies are only dropped.
        input.expert_load = None;
        let bare = balance(&input).unwrap();
        prop_assert_eq!(summarise(&bare, Some(&placement), shape.2).moved_segments, 0);
    }

    #[test]
    fn a_join_moves_little(workers in 1_usize..9, shape in shapes(), replicas in 1_usize..3) {
        let roomy = |n: usize| with_replicas(input(&vec![100_000; n], shape), replicas);
        let old = balance(&roomy(workers)).unwrap();
        let mut after = roomy(workers + 1);
        after.current = Some(&old);
        let summary = check_placement(&after, &balance(&after).unwrap());
        let copies = replicas.min(workers + 1) - replicas.min(workers);
        let copy = (shape.0 * shape.1) as u64 * u64::from(shape.2);
        let fair = summary.total_segments.div_ceil(workers as u64 + 1);
        // With replicas, a worker that must not hold a slice twice swaps one for it.
        let swaps = if replicas == 1 { 0 } else { fair / 2 };
        let small = 2 * u64::from(shape.2) + swaps;
        let most = fair.max(copies as u64 * copy) + small;
        prop_assert!(summary.moved_segments <= most, "{} > {}", summary.moved_segments, most);
    }

    #[test]
    fn a_leave_moves_only_what_the_leaver_held(
        workers in 2_usize..9,
        leaver in 0_usize..9,
        shape in shapes(),
        parts in prop::collection::vec(1_u64..5, 9),
        replicas in 1_usize..3,
    ) {
        let capacities: Vec<u64> = parts[..workers].iter().map(|p| p * 100_000).collect();
        let before = with_replicas(input(&capacities, shape), replicas);
        let old = balance(&before).unwrap();
        let mut after = before.clone();
        let gone = after.workers.remove(leaver % workers);
        after.current = Some(&old);
        let summary = check_placement(&after, &balance(&after).unwrap());
        let held = summarise(&old, None, shape.2);
        let held = held.workers.iter().find(|w| w.id == gone.id).map_or(0, |w| w.segments);
        // With replicas, a worker that must not hold a slice twice swaps one for it.
        let most = held * replicas as u64;
        prop_assert!(summary.moved_segments <= most, "{} > {}", summary.moved_segments, most);
    }
}
