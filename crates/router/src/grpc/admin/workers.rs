//! The workers: who they are, and what an operator does to them. Never ends a process itself.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;
use tramontane_coordination::{
    Intent, Members, Placements, Version, WorkerRecord, WorkerState, essential_workers,
    remove_worker,
};
use tramontane_proto::v1;
use tramontane_types::{Placement, WorkerId};

use super::intent::forget;
use super::roles::names;
use super::{count, not_found, refusal, store_refused};
use crate::error::ApiError;
use crate::run::App;
use crate::scaler::{ScaleError, WORKERS_MAX};

/// Longest wait for a worker to say that it drains.
const DRAIN_ANSWER_MAX: Duration = Duration::from_secs(10);
/// A worker that is to be removed and says nothing for this long is gone.
const PROBE_MAX: Duration = Duration::from_secs(3);

pub(super) fn list(app: &App) -> v1::ListWorkersResponse {
    let (members, placements) = (app.cluster.members(), app.cluster.placements());
    let seen = app.cluster.intent();
    let published = placements
        .groups
        .values()
        .filter_map(|g| g.published.as_deref());
    let essential: BTreeSet<WorkerId> = published
        .flat_map(|placement| essential_workers(&members, placement))
        .collect();
    let workers = members.workers.values().map(|record| v1::WorkerSummary {
        essential: essential.contains(&record.id),
        ..summary(record, &members, &placements, &seen.intent)
    });
    v1::ListWorkersResponse {
        workers: workers.collect(),
    }
}

pub(super) async fn drain(app: &App, id: &str) -> Result<v1::DrainWorkerResponse, Status> {
    let id = WorkerId::new(id);
    let members = app.cluster.members();
    let Some(record) = members.workers.get(&id) else {
        return Err(not_found(format!("there is no worker {id}"), "worker_id"));
    };
    let unreachable = |what: String| {
        refusal(&ApiError::unavailable(format!(
            "worker {id} at {}: {what}",
            record.address
        )))
    };
    let mut worker = app
        .connect
        .client(&record.address)
        .map_err(|error| unreachable(error.to_string()))?;
    match timeout(DRAIN_ANSWER_MAX, worker.drain(v1::DrainRequest {})).await {
        Ok(Ok(_)) => {
            tracing::info!(worker = %id, "worker asked to drain");
            Ok(v1::DrainWorkerResponse {})
        }
        Ok(Err(refused)) => Err(unreachable(refused.message().to_owned())),
        Err(_elapsed) => Err(unreachable("no answer".to_owned())),
    }
}

pub(super) async fn remove(
    app: &App,
    request: &v1::RemoveWorkerRequest,
) -> Result<v1::RemoveWorkerResponse, Status> {
    let id = WorkerId::new(&request.worker_id);
    let (members, placements) = (app.cluster.members(), app.cluster.placements());
    let record = members.workers.get(&id);
    let published = placements
        .groups
        .values()
        .filter_map(|g| g.published.as_deref());
    let slices: usize = published.map(|p| p.slices_of(&id).count()).sum();
    let seen = app.cluster.intent();
    let is_known = seen.intent.cordoned.contains(&id) || seen.intent.roles.contains_key(&id);
    if record.is_none() && slices == 0 && !is_known {
        return Err(not_found(format!("there is no worker {id}"), "worker_id"));
    }
    let was_alive = match record {
        Some(record) => is_alive(app, record).await,
        None => false,
    };
    let is_ready = record.is_some_and(|record| record.state == WorkerState::Ready);
    if was_alive && is_ready && !request.force {
        return Err(refusal(&ApiError::precondition(format!(
            "worker {id} is alive and ready; let it drain first, or force it out"
        ))));
    }
    let unconfirmed = record.filter(|_| members.unconfirmed.contains(&id));
    let was_listed = remove_worker(&*app.store, &id, unconfirmed.map(|record| &**record))
        .await
        .map_err(store_refused)?;
    if is_known {
        forget(app, &id).await?;
    }
    tracing::info!(worker = %id, was_listed, was_alive, "worker removed by an operator");
    Ok(v1::RemoveWorkerResponse {
        was_listed,
        was_alive,
        slices: count(slices),
    })
}

pub(super) async fn scale(app: &App, wanted: u32) -> Result<v1::ScaleWorkersResponse, Status> {
    let in_range = u16::try_from(wanted)
        .ok()
        .filter(|n| (1..=WORKERS_MAX).contains(n));
    let Some(wanted) = in_range else {
        let message = format!("count must be 1 to {WORKERS_MAX}, got {wanted}");
        return Err(refusal(&ApiError::invalid("count", message)));
    };
    let Some(scaler) = &app.scaler else {
        return Err(refusal(&ApiError::precondition(
            "this router starts and ends no workers: start `tramontane worker` where you want one, \
             `tramontane workers drain` one that should go, or use `kubectl scale` on Kubernetes",
        )));
    };
    let started = scaler.scale(wanted).await.map_err(|error| match error {
        ScaleError::Refused(why) => refusal(&ApiError::precondition(why)),
        ScaleError::Failed(_) => refusal(&ApiError::unavailable(error.to_string())),
    })?;
    tracing::info!(
        wanted,
        from = started.from,
        started = started.started.len(),
        draining = started.draining.len(),
        "workers scaled"
    );
    let names = |ids: &[WorkerId]| ids.iter().map(ToString::to_string).collect();
    Ok(v1::ScaleWorkersResponse {
        from: count(started.from),
        started: names(&started.started),
        draining: names(&started.draining),
    })
}

/// Whether the process of a worker answers.
async fn is_alive(app: &App, record: &WorkerRecord) -> bool {
    let Ok(mut worker) = app.connect.client(&record.address) else {
        return false;
    };
    let status = worker.status(v1::WorkerStatusRequest {});
    matches!(timeout(PROBE_MAX, status).await, Ok(Ok(_)))
}

fn summary(
    record: &WorkerRecord,
    members: &Members,
    placements: &Placements,
    intent: &Intent,
) -> v1::WorkerSummary {
    let id = &record.id;
    let version = Version::of(record);
    let published = placements.of(&version).and_then(|g| g.published.as_deref());
    let (slices, segments) = held(published, id);
    let state = match record.state {
        WorkerState::Joining => "joining",
        WorkerState::Ready => "ready",
        WorkerState::Draining => "draining",
        WorkerState::Leaving => "leaving",
    };
    v1::WorkerSummary {
        id: id.to_string(),
        address: record.address.clone(),
        roles: names(record.roles),
        wanted_roles: intent.roles.get(id).map_or_else(Vec::new, |r| names(*r)),
        state: state.to_owned(),
        numeric_class: record.numeric_class.clone(),
        capacity_bytes: record.capacity_bytes,
        loaded_epoch: record.loaded.0,
        slices,
        segments,
        sequences_running: record.load.running,
        sequences_waiting: record.load.waiting,
        kv_pages_free: record.load.kv_pages_free,
        version: record.version.clone(),
        essential: false,
        segment_ns: record.measured.segment_ns.unwrap_or(0),
        link_us: record.measured.link_us.unwrap_or(0),
        cordoned: intent.cordoned.contains(id),
        unconfirmed: members.unconfirmed.contains(id),
        started_ms: record.started_ms,
        weights: record.model.fingerprint.clone(),
        first_layer: record.expert_layers().start as u32,
        end_layer: record.expert_layers().end as u32,
    }
}

/// Slices and segments that a worker holds.
fn held(placement: Option<&Placement>, id: &WorkerId) -> (u32, u32) {
    let (mut slices, mut segments) = (0, 0);
    for slice in placement.into_iter().flat_map(|p| p.slices_of(id)) {
        slices += 1;
        segments += u32::from(slice.range.len());
    }
    (slices, segments)
}
