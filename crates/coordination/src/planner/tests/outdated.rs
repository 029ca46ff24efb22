//! A placement that is older than what workers hold.

use super::*;

#[test]
fn an_older_placement_is_not_restored_and_does_not_stay() {
    // The store lost epoch 7; this planner has never seen more than epoch 6, but a worker has.
    let mut scenario = Scenario::of(&["a:loaded=5", "b:loaded=5"]).publish();
    scenario.known = scenario.published.take();
    scenario.settled = Duration::ZERO;
    assert_eq!(scenario.says(), "waiting for membership to settle");
    scenario.settled = SETTLE_TIME;
    assert_eq!(scenario.decide().0, PlannerAction::Restore);
    scenario = scenario.with(&["a:loaded=6", "b:loaded=7"]);
    assert_eq!(scenario.proposes().0.epoch, Epoch(8));
    // Written again all the same, before that worker was back: workers on 7 ignore it.
    scenario.published = scenario.known.clone();
    assert_eq!(scenario.proposes().0.epoch, Epoch(8));
    // Another planner wrote it, and this one knows of epoch 9.
    scenario.known.as_mut().unwrap().epoch = Epoch(9);
    assert_eq!(scenario.proposes().0.epoch, Epoch(10));
    scenario = scenario.with(&["a:loaded=10", "b"]).publish();
    assert_eq!(scenario.says(), "placement fits");
    // Measured figures hold a plan back only when it is a matter of speed.
    scenario = scenario.with(&["a:loaded=20,ns=100000", "b:loaded=10,ns=104000"]);
    assert_eq!(scenario.proposes().0.epoch, Epoch(21));
}
