//! Roles that an operator wants: the planner moves first, the worker's record follows.

use super::*;
use crate::balance::BalanceError;
use crate::registry::Roles;

#[test]
fn a_worker_that_is_to_give_up_experts_is_planned_out_while_its_record_has_them() {
    let scenario = Scenario::of(&["a", "b", "c"]).publish();
    let a = WorkerId::new("a");
    let wanted = |attention, experts| {
        let mut scenario = scenario.clone();
        let roles = Roles { attention, experts };
        scenario.intent.roles.insert(a.clone(), roles);
        scenario
    };
    let record = worker("a");
    let attention = wanted(true, false);
    assert_eq!(attention.proposes().1, ["b", "c"]);
    assert!(attention.intent.may_attend(&record) && !attention.intent.may_hold(&record));
    let experts = wanted(false, true);
    assert_eq!(experts.says(), scenario.says(), "nothing to move");
    assert!(experts.intent.may_hold(&record) && !experts.intent.may_attend(&record));
}

#[test]
fn a_wish_for_no_role_at_all_is_refused() {
    let mut intent = Intent::default();
    intent.roles.insert(WorkerId::new("a"), Roles::default());
    let error = intent.validate().unwrap_err().to_string();
    assert!(error.contains("worker a without a role"), "{error}");
    // What programs of before wrote has no roles, and those read what has some.
    let older: Intent = serde_json::from_str(r#"{"replicas": 2}"#).unwrap();
    assert!(older.roles.is_empty() && older.validate().is_ok());
    let text = serde_json::to_string(&older).unwrap();
    assert!(!text.contains("roles"), "{text}");
}

#[test]
fn a_wish_counts_as_far_as_the_worker_can_have_it() {
    let mut intent = Intent::default();
    let (first, second) = (worker("a:half=first"), worker("b:half=second"));
    for id in ["a", "b"] {
        let roles = Roles {
            attention: true,
            experts: false,
        };
        intent.roles.insert(WorkerId::new(id), roles);
    }
    assert!(intent.may_attend(&first) && !intent.may_hold(&first));
    // It can have nothing of it, and does what it was configured for.
    assert!(intent.may_hold(&second));
}

#[test]
fn a_holder_that_can_hold_other_layers_now_is_planned_out_at_once() {
    let kinds = ["a:half=first", "b:half=second", "c:half=second"];
    let scenario = Scenario::of(&kinds).publish();
    let placement = scenario.published.clone().unwrap();
    for (slice, holders) in placement.iter() {
        let is_first = holders
            .iter()
            .all(|&h| placement.worker(h).unwrap().as_str() == "a");
        assert_eq!(is_first, slice.layer.0 == 0, "{slice}");
    }
    assert_eq!(scenario.says(), "placement fits");
    // The same name, another kind: whatever it would gain, and however young the placement is.
    let mut turned = scenario
        .clone()
        .with(&["a:half=first", "b:half=second", "c:half=first"]);
    turned.published_for = Duration::ZERO;
    turned.settled = Duration::ZERO;
    let (placement, _) = turned.proposes();
    for (slice, holders) in placement.iter() {
        let can = |h: &u16| turned.members.workers[placement.worker(*h).unwrap()].expert_layers();
        assert!(
            holders
                .iter()
                .all(|h| can(h).contains(&usize::from(slice.layer.0))),
            "{slice}"
        );
    }
    // Nobody is left for the second layer: said, with the bytes that it takes and that nobody has.
    let alone = scenario.with(&["a:half=first", "b:half=first", "c:half=first"]);
    let (_, status) = alone.decide();
    let shortage = status.shortage.unwrap();
    assert_eq!(shortage.error, BalanceError::Layers { layer: 1 });
    assert_eq!(shortage.offered_bytes, 0);
}
