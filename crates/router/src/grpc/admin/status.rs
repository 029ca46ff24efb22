//! How the cluster is, in one answer, and its placement. Reads only what the watches last showed.

use std::collections::BTreeMap;

use tonic::Status;
use tramontane_coordination::{
    Intent, Members, Placements, Version, WorkerState, survives_one_loss,
};
use tramontane_proto::v1;
use tramontane_runtime::build_info;
use tramontane_types::{Epoch, Placement, WorkerId};

use super::{count, not_found, refusal};
use crate::error::ApiError;
use crate::run::App;

pub(super) fn cluster_status(app: &App) -> v1::ClusterStatusResponse {
    let (members, placements) = (app.cluster.members(), app.cluster.placements());
    let seen = app.cluster.intent();
    let published = placements.published().map(|p| &**p);
    let admission = &app.dispatcher.admission;
    let ready = app.ready.check();
    let workers_ready = members
        .workers
        .values()
        .filter(|w| w.state == WorkerState::Ready);
    let (replicas_min, replicas_max) = replicas(published);
    let slices_per_expert =
        published.map_or(0, |p| p.experts.iter().map(Vec::len).max().unwrap_or(0));
    let plan = Plan::new(app, &placements, &seen.intent);
    v1::ClusterStatusResponse {
        model: app.model.id.clone(),
        numeric_class: published
            .map(|p| p.numeric_class.clone())
            .unwrap_or_default(),
        epoch: placements.published_epoch().0,
        pending_epoch: pending_epoch(&placements),
        workers_ready: count(workers_ready.count()),
        workers_total: count(members.workers.len()),
        requests_running: count(admission.running()),
        requests_queued: count(admission.waiting()),
        ready: ready.is_ok(),
        store_available: members.synced && !members.stale && !placements.stale,
        reason: ready.err().unwrap_or_default(),
        version: build_info::VERSION.to_owned(),
        survives_one_loss: published.is_some_and(|p| survives_one_loss(&members, p)),
        plans: plan.is_here,
        planner_doing: plan.doing,
        shortage: plan.shortage,
        settled: plan.settled,
        incompatible: names(incompatible(&members, &placements)),
        cordoned: names(seen.intent.cordoned.iter()),
        intent_replicas: seen.intent.replicas.map(|n| count(n.get())),
        intent_slices_per_expert: seen.intent.slices_per_expert.map(u32::from),
        tokens_sampled: app.metrics.tokens_sampled(),
        replicas_min: count(replicas_min),
        replicas_max: count(replicas_max),
        slices_per_expert: count(slices_per_expert),
        scalable: app.scaler.is_some(),
        weights: model(placements.serving.as_deref()),
        weights_wanted: model(seen.intent.weights.as_ref()),
        other_weights: others(&members, &placements),
    }
}

fn model(version: Option<&Version>) -> String {
    version.map_or_else(String::new, |version| version.model.to_string())
}

/// Of the version that serves or, before one does, of any.
fn pending_epoch(placements: &Placements) -> u64 {
    let any = || placements.groups.values().find_map(|g| g.pending.as_ref());
    let pending = match &placements.serving {
        Some(_) => placements.pending(),
        None => any(),
    };
    pending.map_or(0, |p| p.epoch.0)
}

/// Versions that do not serve, with who has them.
fn others(members: &Members, placements: &Placements) -> Vec<String> {
    let Some(serving) = placements.serving.as_deref() else {
        return Vec::new();
    };
    let mut others: BTreeMap<Version, Vec<&str>> = BTreeMap::new();
    for worker in members.workers.values().filter(|w| !serving.has(w)) {
        let ids = others.entry(Version::of(worker)).or_default();
        ids.push(worker.id.as_str());
    }
    let shown = |(version, ids): (Version, Vec<&str>)| {
        let epoch = placements
            .of(&version)
            .map_or(Epoch(0), |g| g.published_epoch());
        let state = match epoch {
            Epoch(0) => "not placed".to_owned(),
            epoch => format!("epoch {epoch}"),
        };
        format!("{version} on {}: {state}", ids.join(" "))
    };
    others.into_iter().map(shown).collect()
}

pub(super) fn placement(app: &App) -> Result<v1::GetPlacementResponse, Status> {
    let placements = app.cluster.placements();
    let Some(published) = placements.published() else {
        return Err(not_found(
            "no placement is published".to_owned(),
            "placement",
        ));
    };
    let placement_json = serde_json::to_string(&**published).map_err(|error| {
        tracing::error!(%error, "placement cannot be written");
        refusal(&ApiError::internal())
    })?;
    Ok(v1::GetPlacementResponse {
        placement_json,
        epoch: published.epoch.0,
    })
}

/// What the planner says, where it is in this router.
#[derive(Debug, Default)]
struct Plan {
    is_here: bool,
    doing: String,
    shortage: String,
    settled: bool,
}

impl Plan {
    fn new(app: &App, placements: &Placements, intent: &Intent) -> Self {
        let Some(statuses) = app.planning.as_ref().and_then(|p| p.status()) else {
            return Self::default();
        };
        let Some(status) = statuses.first() else {
            return Self {
                is_here: true,
                ..Self::default()
            };
        };
        let shortage = status.shortage.as_ref().map(|shortage| {
            format!(
                "{}: {} bytes are needed, the workers offer {}",
                shortage.error, shortage.needed_bytes, shortage.offered_bytes
            )
        });
        let wanted = intent.weights.as_ref();
        let serves = wanted.is_none_or(|wanted| placements.serving.as_deref() == Some(wanted));
        let fulfilled = serves && status.fulfilled.as_ref() == Some(intent);
        Self {
            is_here: true,
            doing: status.doing.clone(),
            shortage: shortage.unwrap_or_default(),
            settled: fulfilled && placements.pending().is_none(),
        }
    }
}

/// Fewest and most holders of any slice.
fn replicas(placement: Option<&Placement>) -> (usize, usize) {
    let holders = || {
        placement
            .into_iter()
            .flat_map(Placement::iter)
            .map(|(_, holders)| holders.len())
    };
    (holders().min().unwrap_or(0), holders().max().unwrap_or(0))
}

/// Workers with memory for experts that the version that serves cannot use.
fn incompatible<'a>(
    members: &'a Members,
    placements: &'a Placements,
) -> impl Iterator<Item = &'a WorkerId> {
    let other = move |record: &&'a std::sync::Arc<tramontane_coordination::WorkerRecord>| {
        let serving = placements.serving.as_deref();
        record.roles.experts && serving.is_some_and(|version| !version.has(record))
    };
    members
        .workers
        .values()
        .filter(other)
        .map(|record| &record.id)
}

fn names<'a>(ids: impl Iterator<Item = &'a WorkerId>) -> Vec<String> {
    ids.map(ToString::to_string).collect()
}
