//! What workers are to do: written into the intent, which they follow themselves. Never leaves the cluster
//! without attention or experts unless an operator insists.

use tonic::Status;
use tramontane_coordination::{Intent, Members, Roles, Version, WorkerRecord};
use tramontane_proto::v1;
use tramontane_types::WorkerId;

use super::intent::{change_intent, until_seen};
use super::{not_found, refusal};
use crate::cluster::attention_workers;
use crate::error::ApiError;
use crate::run::App;

/// The roles and what they are called.
const NAMES: [&str; 2] = ["attention", "experts"];

pub(super) async fn set_roles(
    app: &App,
    request: &v1::SetWorkerRolesRequest,
) -> Result<v1::SetWorkerRolesResponse, Status> {
    let id = WorkerId::new(&request.worker_id);
    let wish = parse(&request.roles)?;
    let (members, seen) = (app.cluster.members(), app.cluster.intent());
    let Some(record) = members.workers.get(&id) else {
        return Err(not_found(format!("there is no worker {id}"), "worker_id"));
    };
    let can = record.possible_roles();
    if (wish.attention && !can.attention) || (wish.experts && !can.experts) {
        let (can, class) = (names(can).join(","), &record.numeric_class);
        let message = format!(
            "worker {id} of {class} can have the roles {can}, got {}",
            names(wish).join(",")
        );
        return Err(refusal(&ApiError::invalid("roles", message)));
    }
    let mut after = seen.intent.clone();
    let before = after.roles.insert(id.clone(), wish).unwrap_or(record.roles);
    let lacks = lacking(record, wish, &after, &members);
    if let Some(role) = lacks.filter(|_| !request.force) {
        return Err(refusal(&ApiError::precondition(format!(
            "no other worker that is ready has the role {role}; give it to another one first, or force it"
        ))));
    }
    if !request.dry_run {
        let change = |intent: &mut Intent| intent.roles.insert(id.clone(), wish) != Some(wish);
        change_intent(app, change).await?;
        until_seen(app, |intent| intent.roles.get(&id) == Some(&wish)).await?;
        tracing::info!(worker = %id, roles = names(wish).join(","), force = request.force, "roles wanted");
    }
    Ok(v1::SetWorkerRolesResponse {
        changed: before != wish,
        roles: names(record.roles),
    })
}

fn parse(roles: &[String]) -> Result<Roles, Status> {
    let mut wish = Roles::default();
    for role in roles {
        match role.as_str() {
            "attention" => wish.attention = true,
            "experts" => wish.experts = true,
            other => return Err(invalid(&format!("{other:?}"))),
        }
    }
    if wish == Roles::default() {
        return Err(invalid("none"));
    }
    Ok(wish)
}

fn invalid(got: &str) -> Status {
    let message = format!("roles must be attention, experts or both, got {got}");
    refusal(&ApiError::invalid("roles", message))
}

/// The role that nobody else with the same weights has, of those that the worker is to give up.
fn lacking(
    worker: &WorkerRecord,
    wish: Roles,
    after: &Intent,
    members: &Members,
) -> Option<&'static str> {
    let version = Version::of(worker);
    let mut attend = attention_workers(members, &version, after);
    if !wish.attention && attend.next().is_none() {
        return Some(NAMES[0]);
    }
    let holds = members.workers.values().any(|other| {
        other.id != worker.id
            && other.roles.experts
            && other.state.is_staying()
            && after.may_hold(other)
            && version.has(other)
            && other.expert_layers() == worker.expert_layers()
    });
    (!wish.experts && !holds).then_some(NAMES[1])
}

/// Roles as they are shown.
pub(super) fn names(roles: Roles) -> Vec<String> {
    let has = [roles.attention, roles.experts];
    let named = NAMES.iter().zip(has).filter(|(_, has)| *has);
    named.map(|(name, _)| (*name).to_owned()).collect()
}
