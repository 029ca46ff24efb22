//! Drills: an operator's fault goes to the worker that it is for, and what it did comes back.

use std::time::Duration;

use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tramontane_proto::v1;
use tramontane_proto::v1::worker_client::WorkerClient;
use tramontane_types::WorkerId;

use super::{not_found, refusal};
use crate::error::ApiError;
use crate::run::App;

/// Longest wait for a worker to begin a drill, or to say what drills have done to it.
const DRILL_ANSWER_MAX: Duration = Duration::from_secs(5);

/// Has a worker begin a drill.
pub(super) async fn begin(
    app: &App,
    request: v1::DrillWorkerRequest,
) -> Result<v1::DrillWorkerResponse, Status> {
    let v1::DrillWorkerRequest { worker_id, drill } = request;
    let drill = drill.unwrap_or_default();
    let members = app.cluster.members();
    let is_member = |peer: &&String| members.workers.contains_key(&WorkerId::new(peer));
    if let Some(peer) = drill.peers.iter().find(|peer| !is_member(peer)) {
        return Err(not_found(format!("there is no worker {peer}"), "peers"));
    }
    let (mut worker, unreachable) = worker(app, &worker_id)?;
    match timeout(DRILL_ANSWER_MAX, worker.drill(drill)).await {
        Ok(Ok(report)) => {
            tracing::warn!(worker = worker_id, "an operator's drill begins");
            let report = Some(report.into_inner());
            Ok(v1::DrillWorkerResponse { report })
        }
        Ok(Err(refused)) => Err(forwarded(refused, unreachable)),
        Err(_elapsed) => Err(unreachable("no answer")),
    }
}

/// What drills have done to a worker.
pub(super) async fn report(
    app: &App,
    worker_id: &str,
) -> Result<v1::GetDrillReportResponse, Status> {
    let (mut worker, unreachable) = worker(app, worker_id)?;
    let asked = worker.status(v1::WorkerStatusRequest {});
    match timeout(DRILL_ANSWER_MAX, asked).await {
        Ok(Ok(status)) => {
            let report = status.into_inner().drill;
            Ok(v1::GetDrillReportResponse { report })
        }
        Ok(Err(refused)) => Err(forwarded(refused, unreachable)),
        Err(_elapsed) => Err(unreachable("no answer")),
    }
}

/// A connection to a worker by its id, and what to say when it does not answer.
fn worker(
    app: &App,
    id: &str,
) -> Result<(WorkerClient<Channel>, impl Fn(&str) -> Status + use<>), Status> {
    let id = WorkerId::new(id);
    let members = app.cluster.members();
    let Some(record) = members.workers.get(&id) else {
        return Err(not_found(format!("there is no worker {id}"), "worker_id"));
    };
    let address = record.address.clone();
    let unreachable = move |what: &str| {
        let text = format!("worker {id} at {address}: {what}");
        refusal(&ApiError::unavailable(text))
    };
    let client = app
        .connect
        .client(&record.address)
        .map_err(|error| unreachable(&error.to_string()))?;
    Ok((client, unreachable))
}

/// What a worker says about itself goes to the operator as it is; what the transport says does not.
fn forwarded(refused: Status, unreachable: impl Fn(&str) -> Status) -> Status {
    match refused.code() {
        Code::FailedPrecondition | Code::InvalidArgument => refused,
        _ => unreachable(refused.message()),
    }
}
