//! Roles that an operator wants: the planner moves first, the worker's record follows.

use super::*;
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
    let attention = wanted(true, false);
    assert_eq!(attention.proposes().1, ["b", "c"]);
    assert!(attention.intent.may_attend(&a) && !attention.intent.may_hold(&a));
    let experts = wanted(false, true);
    assert_eq!(experts.says(), scenario.says(), "nothing to move");
    assert!(experts.intent.may_hold(&a) && !experts.intent.may_attend(&a));
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
