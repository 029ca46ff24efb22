//! What measured speeds and loads change, and that noise changes nothing.

use super::*;

#[test]
fn a_slow_worker_is_relieved_once_and_only_when_it_pays_and_the_placement_is_not_young() {
    let mut scenario = Scenario::of(&["a", "b"]);
    scenario.intent.slices_per_expert = Some(8);
    let mut scenario = scenario.publish().with(&["a:ns=100000", "b:ns=104000"]);
    assert_eq!(
        scenario.says(),
        "placement fits",
        "within one slice of its share"
    );
    scenario = scenario.with(&["a:ns=100000", "b:ns=300000"]);
    scenario.published_for = REBALANCE_EVERY - Duration::from_secs(1);
    let PlannerAction::Wait { reason, again_in } = scenario.decide().0 else {
        panic!("{}", scenario.says());
    };
    assert!(
        matches!(
            reason,
            WaitReason::Rested {
                gain_percent: 40..=60
            }
        ),
        "{reason:?}"
    );
    assert_eq!(again_in, Some(Duration::from_secs(1)));
    // Who joins does not wait for that.
    let joined = scenario.clone().with(&["a:ns=100000", "b:ns=300000", "c"]);
    assert_eq!(joined.proposes().1, ["a", "b", "c"]);
    scenario.published_for = REBALANCE_EVERY;
    let (plan, _) = scenario.proposes();
    let summary = crate::balance::summarise(&plan, scenario.published.as_ref(), 8);
    let held: Vec<u64> = summary.workers.iter().map(|w| w.segments).collect();
    assert_eq!((held, summary.moved_segments), (vec![47, 17], 15));
    scenario.published = Some(plan);
    assert_eq!(scenario.says(), "placement fits");
}

#[test]
fn a_noise_of_a_fifth_moves_nothing_in_a_thousand_looks() {
    let mut state = 7_u32;
    let mut noisy = |value: f64| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        value * (0.8 + 0.4 * f64::from(state >> 8) / f64::from(1 << 24))
    };
    let mut look = |scenario: Scenario| {
        let text = |id: &str, ns: f64, noisy: &mut dyn FnMut(f64) -> f64| {
            format!("{id}:ns={},hot={}", noisy(ns) as u64, noisy(1.6))
        };
        let workers = [("a", 1e5), ("b", 1e5), ("c", 3e5)];
        let workers = workers.map(|(id, ns)| text(id, ns, &mut noisy));
        scenario.with(&workers.each_ref().map(String::as_str))
    };
    let mut scenario = Scenario::of(&["a", "b", "c"]);
    scenario.intent.slices_per_expert = Some(8);
    let mut scenario = look(scenario.publish());
    let mut moves = 0;
    for _ in 0..1000 {
        scenario = look(scenario);
        if let PlannerAction::Propose(placement) = scenario.decide().0 {
            moves += 1;
            scenario.published = Some((*placement).clone());
        }
    }
    assert_eq!(moves, 1, "c is relieved, and that is all");
}

#[test]
fn a_hot_expert_is_copied_and_a_rebalance_that_is_asked_for_does_not_wait() {
    let mut scenario = Scenario::of(&["a:ns=100000", "b:ns=100000", "c:ns=100000"]).publish();
    let hot = [
        "a:ns=100000,hot=9",
        "b:ns=100000,hot=9",
        "c:ns=100000,hot=9",
    ];
    scenario = scenario.with(&hot);
    scenario.published_for = Duration::ZERO;
    assert!(scenario.says().contains("too young"), "{}", scenario.says());
    let epoch = scenario.published.as_ref().unwrap().epoch;
    scenario.intent.rebalance = Some(epoch);
    let (plan, _) = scenario.proposes();
    let copies: Vec<usize> = plan.experts.iter().map(|s| s[0].holders.len()).collect();
    assert_eq!(copies, [2, 1, 1, 1, 2, 1, 1, 1]);
    // Done: the wish was about the epoch of before.
    scenario.published = Some(plan);
    assert_eq!(scenario.says(), "placement fits");
    // The smallest gain is enough for who asks.
    let mut near = Scenario::of(&["a", "b"]);
    near.intent.slices_per_expert = Some(8);
    let mut near = near.publish().with(&["a:ns=100000", "b:ns=108000"]);
    assert_eq!(near.says(), "placement fits, another would be 0 % faster");
    near.intent.rebalance = near.published.as_ref().map(|p| p.epoch);
    assert_eq!(near.says(), "proposing epoch 2");
    // Cool again: further copies are more to read, and dropping them loads nothing.
    let mut cool = scenario.with(&["a:hot=1", "b:hot=1", "c:hot=1"]);
    assert!(cool.says().contains("too young"), "{}", cool.says());
    cool.published_for = REBALANCE_EVERY;
    let (plan, _) = cool.proposes();
    let summary = crate::balance::summarise(&plan, cool.published.as_ref(), 8);
    assert_eq!((summary.replicas_max, summary.moved_segments), (1, 0));
}

#[test]
fn what_is_explored_is_what_is_decided_and_the_rest_is_for_comparison() {
    let scenario = Scenario::of(&["a:ns=1000", "b:ns=3000"]).publish();
    let report = explore(&scenario.view(), PlanWish::default()).unwrap();
    let cuts: Vec<(u8, usize)> = report
        .candidates
        .iter()
        .map(|c| (c.slices_per_expert, c.replicas))
        .collect();
    let expected: Vec<(u8, usize)> = [1, 2]
        .iter()
        .flat_map(|&r| [1, 2, 4, 8].map(|k| (k, r)))
        .collect();
    assert_eq!(cuts, expected);
    let promise = |n: usize| report.candidates[n].promise.as_ref().unwrap();
    assert_eq!((report.chosen, report.proposes), (0, false));
    assert_eq!(report.now.as_ref(), Some(promise(0)));
    assert_eq!(promise(0).moved_bytes, 0);
    // A second copy of everything: 64 segments of 1000 bytes, and nobody is missed.
    assert_eq!(promise(4).moved_bytes, 64_000);
    assert!(promise(4).survives_one_loss && !promise(3).survives_one_loss);
    let text = report.why.join("\n");
    assert!(text.contains("measured on 2 of 2 workers"), "{text}");
    let wish = PlanWish {
        replicas: NonZeroUsize::new(2),
        slices_per_expert: Some(2),
        rebalance: false,
    };
    let report = explore(&scenario.view(), wish).unwrap();
    assert_eq!((report.candidates.len(), report.proposes), (1, true));
    // Nobody there, and no room.
    assert!(explore(&Scenario::of(&[]).view(), wish).is_err());
    let tight = Scenario::of(&["a:segments=40"]);
    let short = explore(&tight.view(), PlanWish::default()).unwrap_err();
    assert!(matches!(short, WaitReason::NoPlacement(_)), "{short:?}");
}
