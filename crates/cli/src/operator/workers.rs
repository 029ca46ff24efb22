//! `tramontane workers ...`: who they are, and what an operator does to them.

use serde_json::{Value, json};
use tramontane_proto::v1;

use super::wait::{Look, Progress, wait};
use super::{Admin, SEE_STATUS, SEE_WORKERS, connect, events, refused, status};
use crate::args::{ChangeArgs, ReadArgs, WorkersCommand};
use crate::exit::{Exit, refusal};
use crate::output;

/// Events that `describe` looks through for those of its worker.
const DESCRIBED_EVENTS_MAX: u32 = 1024;

/// `tramontane workers ...`
pub(crate) async fn workers(command: WorkersCommand) -> anyhow::Result<()> {
    match command {
        WorkersCommand::List(args) => list(&args).await,
        WorkersCommand::Describe { worker, read } => describe(&worker, &read).await,
        WorkersCommand::Cordon { worker, change } => cordon(&worker, true, &change).await,
        WorkersCommand::Uncordon { worker, change } => cordon(&worker, false, &change).await,
        WorkersCommand::Drain { worker, change } => drain(&worker, &change).await,
        WorkersCommand::Scale { count, change } => scale(u32::from(count), &change).await,
        WorkersCommand::SetRoles {
            worker,
            roles,
            force,
            change,
        } => set_roles(&worker, roles, force, &change).await,
        WorkersCommand::Remove {
            worker,
            force,
            change,
        } => remove(&worker, force, &change).await,
    }
}

pub(super) async fn read(admin: &mut Admin) -> anyhow::Result<Vec<v1::WorkerSummary>> {
    let answer = admin.list_workers(v1::ListWorkersRequest {}).await;
    Ok(answer.map_err(refused(SEE_STATUS))?.into_inner().workers)
}

/// One worker, or exit status 3.
async fn find(admin: &mut Admin, id: &str) -> anyhow::Result<v1::WorkerSummary> {
    let workers = read(admin).await?;
    let found = workers.into_iter().find(|worker| worker.id == id);
    found.ok_or_else(|| {
        let message = format!("no worker is called {id:?}");
        refusal(Exit::NotFound, message, SEE_WORKERS)
    })
}

async fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let workers = read(&mut admin).await?;
    if args.output.is_data() {
        let rows: Vec<Value> = workers.iter().map(worker_json).collect();
        return output::data(args.output, &rows);
    }
    let header = [
        "ID", "STATE", "ROLES", "ADDRESS", "WEIGHTS", "CLASS", "SLICES", "EPOCH", "RUNNING",
        "WAITING", "VERSION",
    ];
    let rows: Vec<Vec<String>> = workers
        .into_iter()
        .map(|w| {
            vec![
                w.id.clone(),
                state(&w),
                w.roles.join(","),
                w.address,
                w.weights,
                w.numeric_class,
                w.slices.to_string(),
                w.loaded_epoch.to_string(),
                w.sequences_running.to_string(),
                w.sequences_waiting.to_string(),
                w.version,
            ]
        })
        .collect();
    Ok(output::table(&header, &rows)?)
}

/// State and what is special about it.
pub(super) fn state(worker: &v1::WorkerSummary) -> String {
    let mut state = worker.state.clone();
    if worker.cordoned {
        state.push_str(",cordoned");
    }
    if worker.unconfirmed {
        state.push_str(",unconfirmed");
    }
    state
}

/// Keys are documented in docs/cli.md and stable.
pub(super) fn worker_json(worker: &v1::WorkerSummary) -> Value {
    json!({
        "id": worker.id,
        "state": worker.state,
        "cordoned": worker.cordoned,
        "unconfirmed": worker.unconfirmed,
        "roles": worker.roles,
        "wanted_roles": worker.wanted_roles,
        "address": worker.address,
        "numeric_class": worker.numeric_class,
        "expert_layers": [worker.first_layer, worker.end_layer],
        "weights": worker.weights,
        "capacity_bytes": worker.capacity_bytes,
        "slices": worker.slices,
        "segments": worker.segments,
        "loaded_epoch": worker.loaded_epoch,
        "sequences_running": worker.sequences_running,
        "sequences_waiting": worker.sequences_waiting,
        "kv_pages_free": worker.kv_pages_free,
        "started": events::time_text(worker.started_ms),
        "version": worker.version,
        "essential": worker.essential,
        "segment_ns": worker.segment_ns,
        "link_us": worker.link_us,
    })
}

async fn describe(id: &str, args: &ReadArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let worker = find(&mut admin, id).await?;
    let mut happened = events::read(&mut admin, DESCRIBED_EVENTS_MAX).await?;
    happened.retain(|event| event.worker == id);
    let mut described = worker_json(&worker);
    if args.output.is_data() {
        let happened: Vec<Value> = happened.iter().map(events::event_json).collect();
        described["events"] = Value::Array(happened);
        return output::data(args.output, &described);
    }
    let mut rows = Vec::new();
    for (key, value) in described.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => text.clone(),
            Value::Array(list) => list
                .iter()
                .filter_map(Value::as_str)
                .collect::<Vec<_>>()
                .join(","),
            other => other.to_string(),
        };
        rows.push(vec![key.replace('_', " "), value]);
    }
    for event in &happened {
        rows.push(vec![events::time_text(event.time_ms), event.text.clone()]);
    }
    Ok(output::table(&["", ""], &rows)?)
}

async fn cordon(id: &str, cordoned: bool, change: &ChangeArgs) -> anyhow::Result<()> {
    let mut admin = connect(&change.router).await?;
    if change.dry_run {
        let worker = find(&mut admin, id).await?;
        output::note(&match (worker.cordoned, cordoned) {
            (true, true) => format!("{id} is cordoned already"),
            (false, false) => format!("{id} is not cordoned"),
            (false, true) => format!(
                "would cordon {id}: no new sequences, its {} slices move; {} running and {} waiting \
                 sequences go on",
                worker.slices, worker.sequences_running, worker.sequences_waiting
            ),
            (true, false) => format!("would uncordon {id}: it may get sequences and slices again"),
        });
        return Ok(());
    }
    let request = v1::SetCordonRequest {
        worker_id: id.to_owned(),
        cordoned,
    };
    let answer = admin.set_cordon(request).await;
    let changed = answer.map_err(refused(SEE_WORKERS))?.into_inner().changed;
    output::note(&match (cordoned, changed) {
        (true, true) => {
            format!("{id} is cordoned; undo it with `tramontane workers uncordon {id}`")
        }
        (true, false) => format!("{id} was cordoned already"),
        (false, true) => format!("{id} is not cordoned any more"),
        (false, false) => format!("{id} was not cordoned"),
    });
    let what = if cordoned { "cordoned" } else { "not cordoned" };
    wait(&mut admin, change, &format!("{id} is {what}"), |look| {
        cordon_progress(look, id, cordoned)
    })
    .await
}

fn cordon_progress(look: &Look, id: &str, cordoned: bool) -> Progress {
    if cordoned && look.is_placed(id) {
        let slices = look.worker(id).map_or(0, |worker| worker.slices);
        return Progress::Waiting(format!("{slices} slices are still on {id}"));
    }
    // Without its slices it is cordoned, whatever else the planner has in mind.
    if cordoned {
        Progress::Done
    } else {
        look.settled()
    }
}

async fn drain(id: &str, change: &ChangeArgs) -> anyhow::Result<()> {
    let mut admin = connect(&change.router).await?;
    if change.dry_run {
        let worker = find(&mut admin, id).await?;
        output::note(&format!(
            "would drain {id}: {} running and {} waiting sequences end first, {} slices move",
            worker.sequences_running, worker.sequences_waiting, worker.slices
        ));
        return Ok(());
    }
    let request = v1::DrainWorkerRequest {
        worker_id: id.to_owned(),
    };
    let answer = admin.drain_worker(request).await;
    answer.map_err(refused(SEE_WORKERS))?;
    output::note(&format!(
        "{id} is draining; follow it with `tramontane events --follow`"
    ));
    wait(
        &mut admin,
        change,
        &format!("{id} has left"),
        |look| match look.worker(id) {
            Some(worker) => Progress::Waiting(format!(
                "{id} is {} with {} sequences and {} slices",
                worker.state, worker.sequences_running, worker.slices
            )),
            None => Progress::Done,
        },
    )
    .await
}

async fn scale(count: u32, change: &ChangeArgs) -> anyhow::Result<()> {
    let mut admin = connect(&change.router).await?;
    if change.dry_run {
        return would_scale(&mut admin, count).await;
    }
    let answer = admin.scale_workers(v1::ScaleWorkersRequest { count }).await;
    let begun = answer.map_err(refused(SEE_WORKERS))?.into_inner();
    let mut parts = Vec::new();
    for (what, ids) in [("starting", &begun.started), ("draining", &begun.draining)] {
        if !ids.is_empty() {
            parts.push(format!("{what} {}", ids.join(" ")));
        }
    }
    output::note(&if parts.is_empty() {
        format!("there are {count} workers already")
    } else {
        format!(
            "from {} to {count} workers: {}",
            begun.from,
            parts.join(", ")
        )
    });
    wait(&mut admin, change, &format!("{count} workers"), |look| {
        scale_progress(look, count, &begun)
    })
    .await
}

async fn would_scale(admin: &mut Admin, count: u32) -> anyhow::Result<()> {
    if !status::read(admin).await?.scalable {
        let message = "this router starts and ends no workers";
        let next = "start `tramontane worker` where you want one, `tramontane workers drain` one that \
                    should go, or `kubectl scale` on Kubernetes";
        return Err(refusal(Exit::Conflict, message, next));
    }
    let workers = read(admin).await?;
    let staying = workers.iter().filter(|w| is_staying(w)).count();
    let count = count as usize;
    output::note(&match count.checked_sub(staying) {
        Some(0) => format!("there are {count} workers already"),
        Some(more) => format!("would start {more} workers beside {staying}"),
        None => format!("would drain {} of {staying} workers", staying - count),
    });
    Ok(())
}

fn is_staying(worker: &v1::WorkerSummary) -> bool {
    matches!(worker.state.as_str(), "joining" | "ready")
}

fn scale_progress(look: &Look, count: u32, begun: &v1::ScaleWorkersResponse) -> Progress {
    for id in &begun.draining {
        if look.worker(id).is_some() {
            return Progress::Waiting(format!("{id} has not left"));
        }
    }
    let ready = look.workers.iter().filter(|w| w.state == "ready").count();
    if ready != count as usize || look.workers.len() != ready {
        return Progress::Waiting(format!(
            "{ready} workers are ready of {}",
            look.workers.len()
        ));
    }
    look.settled()
}

async fn set_roles(
    id: &str,
    roles: Vec<String>,
    force: bool,
    change: &ChangeArgs,
) -> anyhow::Result<()> {
    let mut admin = connect(&change.router).await?;
    let wanted = RoleNames::of(&roles);
    let request = v1::SetWorkerRolesRequest {
        worker_id: id.to_owned(),
        roles,
        force,
        dry_run: change.dry_run,
    };
    let answer = admin.set_worker_roles(request).await.map_err(|status| {
        let next = match status.code() {
            tonic::Code::FailedPrecondition => {
                format!("tramontane workers set-roles {id} {wanted} --force")
            }
            _ => SEE_WORKERS.to_owned(),
        };
        refused(&next)(status)
    })?;
    let answer = answer.into_inner();
    let now = RoleNames::of(&answer.roles);
    output::note(&match (change.dry_run, answer.changed) {
        (_, false) => format!("{id} is to do {wanted} already"),
        (true, true) => {
            let worker = find(&mut admin, id).await?;
            format!(
                "would have {id} do {wanted} instead of {now}: it has {} running and {} waiting sequences, {} slices",
                worker.sequences_running, worker.sequences_waiting, worker.slices
            )
        }
        (false, true) => {
            format!(
                "{id} is to do {wanted}, does {now}; undo it with `tramontane workers set-roles {id} {now}`"
            )
        }
    });
    if change.dry_run {
        return Ok(());
    }
    wait(&mut admin, change, &format!("{id} does {wanted}"), |look| {
        roles_progress(look, id, &wanted)
    })
    .await
}

/// Roles in the order in which they are shown.
#[derive(Debug, PartialEq, Eq)]
struct RoleNames(Vec<String>);

impl RoleNames {
    fn of(roles: &[String]) -> Self {
        let mut names = roles.to_vec();
        names.sort_unstable();
        names.dedup();
        Self(names)
    }
}

impl std::fmt::Display for RoleNames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

fn roles_progress(look: &Look, id: &str, wanted: &RoleNames) -> Progress {
    let Some(worker) = look.worker(id) else {
        return Progress::Waiting(format!("{id} is not listed"));
    };
    let now = RoleNames::of(&worker.roles);
    if now != *wanted {
        return Progress::Waiting(format!(
            "{id} does {now} with {} sequences and {} slices",
            worker.sequences_running, worker.slices
        ));
    }
    look.settled()
}

async fn remove(id: &str, force: bool, change: &ChangeArgs) -> anyhow::Result<()> {
    let mut admin = connect(&change.router).await?;
    if change.dry_run {
        let worker = find(&mut admin, id).await?;
        output::note(&format!(
            "would remove {id} ({}) with {} slices; {}",
            state(&worker),
            worker.slices,
            if worker.state == "ready" {
                "refused without --force if it answers"
            } else {
                "its process is left alone"
            }
        ));
        return Ok(());
    }
    let request = v1::RemoveWorkerRequest {
        worker_id: id.to_owned(),
        force,
    };
    let answer = admin.remove_worker(request).await.map_err(|status| {
        let next = match status.code() {
            tonic::Code::FailedPrecondition => {
                format!("tramontane workers drain {id}, or tramontane workers remove {id} --force")
            }
            _ => SEE_WORKERS.to_owned(),
        };
        refused(&next)(status)
    })?;
    let removed = answer.into_inner();
    let mut text = if removed.was_listed {
        format!("{id} is out of the records")
    } else {
        format!("{id} had no record")
    };
    if removed.slices > 0 {
        text.push_str(&format!("; its {} slices move", removed.slices));
    }
    if removed.was_alive {
        text.push_str("; its process is alive and registers again unless you end it");
    }
    output::note(&text);
    wait(&mut admin, change, &format!("{id} is gone"), |look| {
        if look.worker(id).is_some() {
            return Progress::Waiting(format!("{id} is listed"));
        }
        if look.is_placed(id) {
            return Progress::Waiting(format!("the placement names {id}"));
        }
        Progress::Done
    })
    .await
}

#[cfg(test)]
mod tests {
    use tramontane_types::{Epoch, Placement, WorkerId};

    use super::*;

    fn worker(id: &str, state: &str) -> v1::WorkerSummary {
        v1::WorkerSummary {
            id: id.to_owned(),
            state: state.to_owned(),
            ..v1::WorkerSummary::default()
        }
    }

    #[test]
    fn a_scale_is_done_when_all_are_ready_and_the_leaving_have_left() {
        let begun = v1::ScaleWorkersResponse {
            from: 3,
            started: Vec::new(),
            draining: vec!["w-2".to_owned()],
        };
        let mut look = Look {
            workers: vec![
                worker("w-0", "ready"),
                worker("w-1", "ready"),
                worker("w-2", "draining"),
            ],
            ..Look::default()
        };
        let not_left = Progress::Waiting("w-2 has not left".to_owned());
        assert_eq!(scale_progress(&look, 2, &begun), not_left);
        look.workers.pop();
        assert_eq!(scale_progress(&look, 2, &begun), Progress::Done);
        look.workers[1].state = "joining".to_owned();
        let joining = Progress::Waiting("1 workers are ready of 2".to_owned());
        assert_eq!(scale_progress(&look, 2, &begun), joining);
    }

    #[test]
    fn a_cordon_is_done_when_no_slice_is_left() {
        let placement = Placement {
            epoch: Epoch(1),
            numeric_class: String::new(),
            model: String::new(),
            num_layers: 0,
            num_experts: 0,
            workers: vec![WorkerId::new("w-0")],
            experts: Vec::new(),
        };
        let look = Look {
            workers: vec![worker("w-0", "ready")],
            placement: Some(placement),
            ..Look::default()
        };
        assert!(matches!(
            cordon_progress(&look, "w-0", true),
            Progress::Waiting(_)
        ));
        assert_eq!(cordon_progress(&look, "w-1", true), Progress::Done);
    }

    #[test]
    fn roles_are_set_when_the_worker_does_what_is_wanted_and_the_planner_agrees() {
        let names = |roles: &[&str]| roles.iter().map(|r| (*r).to_owned()).collect::<Vec<_>>();
        let wanted = RoleNames::of(&names(&["experts", "attention", "experts"]));
        assert_eq!(wanted.to_string(), "attention,experts");
        let mut look = Look {
            workers: vec![worker("w-0", "ready")],
            ..Look::default()
        };
        look.workers[0].roles = names(&["experts"]);
        let waiting = "w-0 does experts with 0 sequences and 0 slices".to_owned();
        assert_eq!(
            roles_progress(&look, "w-0", &wanted),
            Progress::Waiting(waiting)
        );
        look.workers[0].roles = names(&["attention", "experts"]);
        assert_eq!(roles_progress(&look, "w-0", &wanted), Progress::Done);
        look.status.pending_epoch = 2;
        assert!(matches!(
            roles_progress(&look, "w-0", &wanted),
            Progress::Waiting(_)
        ));
        assert!(matches!(
            roles_progress(&look, "w-1", &wanted),
            Progress::Waiting(_)
        ));
    }

    #[test]
    fn states_say_what_is_special() {
        let mut one = worker("w-0", "ready");
        assert_eq!(state(&one), "ready");
        one.cordoned = true;
        assert_eq!(state(&one), "ready,cordoned");
    }
}
