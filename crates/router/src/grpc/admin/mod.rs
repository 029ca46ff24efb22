//! `tramontane.v1.Admin`: what the router knows of the cluster, and what an operator asks of it. Each verb
//! stands in the file of its subject.

mod drill;
mod events;
mod intent;
mod plan;
mod roles;
mod status;
mod weights;
mod workers;

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use tonic::{Request, Response, Status};
use tramontane_proto::v1;
use tramontane_proto::v1::admin_server::Admin;

use super::status::{not_found, status as refusal};
use crate::error::ApiError;
use crate::run::App;

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

type EventStream = Pin<Box<dyn Stream<Item = Result<v1::ClusterEvent, Status>> + Send>>;

#[tonic::async_trait]
impl Admin for AdminService {
    type WatchEventsStream = EventStream;

    async fn cluster_status(
        &self,
        _request: Request<v1::ClusterStatusRequest>,
    ) -> Result<Response<v1::ClusterStatusResponse>, Status> {
        Ok(Response::new(status::cluster_status(&self.app)))
    }

    async fn list_workers(
        &self,
        _request: Request<v1::ListWorkersRequest>,
    ) -> Result<Response<v1::ListWorkersResponse>, Status> {
        Ok(Response::new(workers::list(&self.app)))
    }

    async fn get_placement(
        &self,
        _request: Request<v1::GetPlacementRequest>,
    ) -> Result<Response<v1::GetPlacementResponse>, Status> {
        status::placement(&self.app).map(Response::new)
    }

    async fn drain_worker(
        &self,
        request: Request<v1::DrainWorkerRequest>,
    ) -> Result<Response<v1::DrainWorkerResponse>, Status> {
        let id = request.into_inner().worker_id;
        workers::drain(&self.app, &id).await.map(Response::new)
    }

    async fn set_cordon(
        &self,
        request: Request<v1::SetCordonRequest>,
    ) -> Result<Response<v1::SetCordonResponse>, Status> {
        let request = request.into_inner();
        intent::set_cordon(&self.app, &request)
            .await
            .map(Response::new)
    }

    async fn set_intent(
        &self,
        request: Request<v1::SetIntentRequest>,
    ) -> Result<Response<v1::SetIntentResponse>, Status> {
        let request = request.into_inner();
        intent::set_intent(&self.app, request)
            .await
            .map(Response::new)
    }

    async fn set_worker_roles(
        &self,
        request: Request<v1::SetWorkerRolesRequest>,
    ) -> Result<Response<v1::SetWorkerRolesResponse>, Status> {
        let request = request.into_inner();
        roles::set_roles(&self.app, &request)
            .await
            .map(Response::new)
    }

    async fn remove_worker(
        &self,
        request: Request<v1::RemoveWorkerRequest>,
    ) -> Result<Response<v1::RemoveWorkerResponse>, Status> {
        let request = request.into_inner();
        workers::remove(&self.app, &request)
            .await
            .map(Response::new)
    }

    async fn scale_workers(
        &self,
        request: Request<v1::ScaleWorkersRequest>,
    ) -> Result<Response<v1::ScaleWorkersResponse>, Status> {
        let count = request.into_inner().count;
        workers::scale(&self.app, count).await.map(Response::new)
    }

    async fn drill_worker(
        &self,
        request: Request<v1::DrillWorkerRequest>,
    ) -> Result<Response<v1::DrillWorkerResponse>, Status> {
        let request = request.into_inner();
        drill::begin(&self.app, request).await.map(Response::new)
    }

    async fn get_drill_report(
        &self,
        request: Request<v1::GetDrillReportRequest>,
    ) -> Result<Response<v1::GetDrillReportResponse>, Status> {
        let id = request.into_inner().worker_id;
        drill::report(&self.app, &id).await.map(Response::new)
    }

    async fn plan_placement(
        &self,
        request: Request<v1::PlanPlacementRequest>,
    ) -> Result<Response<v1::PlanPlacementResponse>, Status> {
        let planned = plan::plan_placement(&self.app, request.into_inner());
        planned.await.map(Response::new)
    }

    async fn rebalance(
        &self,
        request: Request<v1::RebalanceRequest>,
    ) -> Result<Response<v1::RebalanceResponse>, Status> {
        let asked = plan::rebalance(&self.app, request.into_inner());
        asked.await.map(Response::new)
    }

    async fn list_weights(
        &self,
        _request: Request<v1::ListWeightsRequest>,
    ) -> Result<Response<v1::ListWeightsResponse>, Status> {
        Ok(Response::new(weights::list(&self.app)))
    }

    async fn use_weights(
        &self,
        request: Request<v1::UseWeightsRequest>,
    ) -> Result<Response<v1::UseWeightsResponse>, Status> {
        let request = request.into_inner();
        weights::use_weights(&self.app, &request)
            .await
            .map(Response::new)
    }

    async fn list_events(
        &self,
        request: Request<v1::ListEventsRequest>,
    ) -> Result<Response<v1::ListEventsResponse>, Status> {
        let limit = request.into_inner().limit;
        Ok(Response::new(events::list(&self.app, limit)))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let after = request.into_inner().after_sequence;
        Ok(Response::new(events::watch(&self.app, after)))
    }
}

/// The store's error as an operator should read it.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
fn store_refused(error: tramontane_coordination::Error) -> Status {
    use tramontane_coordination::Error;
    refusal(&match &error {
        Error::Invalid { .. } | Error::TooLarge { .. } => {
            ApiError::new(crate::error::ErrorKind::Invalid, error.to_string())
        }
        Error::Conflict { .. } => {
            ApiError::precondition(format!("{error}; somebody else changes it now, try again"))
        }
        _ => {
            tracing::warn!(%error, "the store refused an operator's change");
            ApiError::unavailable(format!("the change was not written: {error}"))
        }
    })
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
