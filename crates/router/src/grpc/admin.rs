//! `tramontane.v1.Admin`: what the router knows of the cluster, and what an operator asks of a worker.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tonic::{Request, Response, Status};
use tramontane_coordination::{Placements, WorkerRecord, WorkerState};
use tramontane_proto::v1;
use tramontane_proto::v1::admin_server::Admin;
use tramontane_runtime::build_info;
use tramontane_types::{Placement, WorkerId};

use super::status::{not_found, status};
use crate::cluster::attention_workers;
use crate::error::ApiError;
use crate::run::App;
use crate::worker_link::client;

/// Longest wait for a worker to say that it drains.
const DRAIN_ANSWER_MAX: Duration = Duration::from_secs(10);

/// The service over what both doors share.
#[derive(Debug)]
pub(crate) struct AdminService {
    app: Arc<App>,
}

impl AdminService {
    pub(crate) const fn new(app: Arc<App>) -> Self {
        Self { app }
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn cluster_status(
        &self,
        _request: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusResponse>, Status> {
        let (members, placements) = (self.app.cluster.members(), self.app.cluster.placements());
        let published = placements.published.as_deref();
        let admission = &self.app.dispatcher.admission;
        let ready = self.app.ready.check();
        let workers_ready = members
            .workers
            .values()
            .filter(|w| w.state == WorkerState::Ready);
        let attention_left = attention_workers(&members, &placements)
            .count()
            .saturating_sub(1);
        Ok(Response::new(v1::ClusterStatusResponse {
            model: self.app.model.id.clone(),
            numeric_class: published
                .map(|p| p.numeric_class.clone())
                .unwrap_or_default(),
            epoch: placements.published_epoch().0,
            pending_epoch: placements.pending.as_ref().map_or(0, |p| p.epoch.0),
            workers_ready: count(workers_ready.count()),
            workers_total: count(members.workers.len()),
            requests_running: count(admission.running()),
            requests_queued: count(admission.waiting()),
            ready: ready.is_ok(),
            store_available: members.synced && !members.stale && !placements.stale,
            reason: ready.err().unwrap_or_default(),
            version: build_info::VERSION.to_owned(),
            survives_one_loss: attention_left > 0 && published.is_some_and(is_replicated),
        }))
    }

    async fn list_workers(
        &self,
        _request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        let (members, placements) = (self.app.cluster.members(), self.app.cluster.placements());
        let workers = members
            .workers
            .iter()
            .map(|(id, record)| summary(id, record, &placements));
        Ok(Response::new(v1::ListWorkersResponse {
            workers: workers.collect(),
        }))
    }

    async fn get_placement(
        &self,
        _request: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::GetPlacementResponse>, Status> {
        let placements = self.app.cluster.placements();
        let Some(published) = placements.published.as_deref() else {
            return Err(not_found(
                "no placement is published".to_owned(),
                "placement",
            ));
        };
        let placement_json = serde_json::to_string(published).map_err(|error| {
            tracing::error!(%error, "placement cannot be written");
            status(&ApiError::internal())
        })?;
        Ok(Response::new(v1::GetPlacementResponse {
            placement_json,
            epoch: published.epoch.0,
        }))
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let id = WorkerId::new(&request.into_inner().worker_id);
        let members = self.app.cluster.members();
        let Some(record) = members.workers.get(&id) else {
            return Err(not_found(format!("there is no worker {id}"), "worker_id"));
        };
        let unreachable = |what: String| {
            status(&ApiError::unavailable(format!(
                "worker {id} at {}: {what}",
                record.address
            )))
        };
        let mut worker = client(&record.address).map_err(|error| unreachable(error.to_string()))?;
        match timeout(DRAIN_ANSWER_MAX, worker.drain(v1::DrainRequest {})).await {
            Ok(Ok(_)) => {
                tracing::info!(worker = %id, "worker asked to drain");
                Ok(Response::new(v1::DrainWorkerResponse {}))
            }
            Ok(Err(refused)) => Err(unreachable(refused.message().to_owned())),
            Err(_elapsed) => Err(unreachable("no answer".to_owned())),
        }
    }
}

/// Whether every slice has a second holder.
fn is_replicated(placement: &Placement) -> bool {
    placement.iter().all(|(_, holders)| holders.len() > 1)
}

fn summary(id: &WorkerId, record: &WorkerRecord, placements: &Placements) -> v1::WorkerSummary {
    let (mut slices, mut segments) = (0, 0);
    if let Some(published) = placements.published.as_deref() {
        for slice in published.slices_of(id) {
            slices += 1;
            segments += u32::from(slice.range.len());
        }
    }
    let roles = [
        ("attention", record.roles.attention),
        ("experts", record.roles.experts),
    ];
    let roles = roles
        .iter()
        .filter(|(_, has)| *has)
        .map(|(name, _)| (*name).to_owned());
    let state = match record.state {
        WorkerState::Joining => "joining",
        WorkerState::Ready => "ready",
        WorkerState::Draining => "draining",
        WorkerState::Leaving => "leaving",
    };
    v1::WorkerSummary {
        id: id.to_string(),
        address: record.address.clone(),
        roles: roles.collect(),
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
    }
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
