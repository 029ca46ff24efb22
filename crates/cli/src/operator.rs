//! The operator's verbs: ask a router over gRPC and print what it says.

use std::time::Duration;

use anyhow::Context as _;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};
use tramontane_proto::v1;
use tramontane_proto::v1::admin_client::AdminClient;
use tramontane_types::Placement;

use crate::args::{PlacementCommand, ReadArgs, RouterAddress, WorkersCommand};
use crate::operator_plan;
use crate::output::{self, Format};

/// Longest wait for a connection to the router.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for an answer.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// `tramontane status`; `Ok(false)` when the cluster does not serve.
pub(crate) async fn status(args: &ReadArgs) -> anyhow::Result<bool> {
    let mut admin = connect(&args.router).await?;
    let status = admin
        .cluster_status(v1::ClusterStatusRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    match args.output {
        Format::Json => output::json(&status_json(&status))?,
        Format::Table => {
            let state = if status.ready {
                "ready".to_owned()
            } else {
                format!("not ready: {}", status.reason)
            };
            let pending = match status.pending_epoch {
                0 => String::new(),
                epoch => format!(" (loading for {epoch})"),
            };
            let row = |key: &str, value: String| vec![key.to_owned(), value];
            let rows = [
                row("state", state),
                row("model", status.model),
                row("numeric class", status.numeric_class),
                row("placement epoch", format!("{}{pending}", status.epoch)),
                row(
                    "workers",
                    format!("{} ready of {}", status.workers_ready, status.workers_total),
                ),
                row(
                    "requests",
                    format!(
                        "{} running, {} queued",
                        status.requests_running, status.requests_queued
                    ),
                ),
                row("survives one loss", yes(status.survives_one_loss)),
                row("store available", yes(status.store_available)),
                row("version", status.version),
            ];
            output::table(&["", ""], &rows)?;
        }
    }
    Ok(status.ready)
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.to_owned()
}

fn status_json(status: &v1::ClusterStatusResponse) -> Value {
    json!({
        "ready": status.ready,
        "reason": status.reason,
        "model": status.model,
        "numeric_class": status.numeric_class,
        "epoch": status.epoch,
        "pending_epoch": status.pending_epoch,
        "workers_ready": status.workers_ready,
        "workers_total": status.workers_total,
        "requests_running": status.requests_running,
        "requests_queued": status.requests_queued,
        "survives_one_loss": status.survives_one_loss,
        "store_available": status.store_available,
        "version": status.version,
    })
}

/// `tramontane workers ...`
pub(crate) async fn workers(command: WorkersCommand) -> anyhow::Result<()> {
    match command {
        WorkersCommand::List(args) => list_workers(&args).await,
        WorkersCommand::Drain {
            worker,
            dry_run,
            router,
        } => drain(worker, dry_run, &router).await,
    }
}

async fn list_workers(args: &ReadArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let workers = admin
        .list_workers(v1::ListWorkersRequest {})
        .await
        .map_err(refused)?
        .into_inner()
        .workers;
    if args.output == Format::Json {
        let rows: Vec<Value> = workers.iter().map(worker_json).collect();
        return output::json(&rows);
    }
    let header = [
        "ID", "STATE", "ROLES", "ADDRESS", "CLASS", "SLICES", "EPOCH", "RUNNING", "WAITING",
        "VERSION",
    ];
    let rows: Vec<Vec<String>> = workers
        .into_iter()
        .map(|w| {
            vec![
                w.id,
                w.state,
                w.roles.join(","),
                w.address,
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

fn worker_json(worker: &v1::WorkerSummary) -> Value {
    json!({
        "id": worker.id,
        "state": worker.state,
        "roles": worker.roles,
        "address": worker.address,
        "numeric_class": worker.numeric_class,
        "capacity_bytes": worker.capacity_bytes,
        "slices": worker.slices,
        "segments": worker.segments,
        "loaded_epoch": worker.loaded_epoch,
        "sequences_running": worker.sequences_running,
        "sequences_waiting": worker.sequences_waiting,
        "kv_pages_free": worker.kv_pages_free,
        "version": worker.version,
        "essential": worker.essential,
        "segment_ns": worker.segment_ns,
        "link_us": worker.link_us,
    })
}

async fn drain(worker_id: String, dry_run: bool, router: &RouterAddress) -> anyhow::Result<()> {
    let mut admin = connect(router).await?;
    if dry_run {
        let workers = admin
            .list_workers(v1::ListWorkersRequest {})
            .await
            .map_err(refused)?
            .into_inner();
        let worker = workers.workers.iter().find(|w| w.id == worker_id);
        let worker = worker.with_context(|| {
            format!("no worker is called {worker_id:?}; see `tramontane workers list`")
        })?;
        output::note(&format!(
            "would drain {worker_id}: {} running and {} waiting sequences end first, {} slices move",
            worker.sequences_running, worker.sequences_waiting, worker.slices
        ));
        return Ok(());
    }
    admin
        .drain_worker(v1::DrainWorkerRequest {
            worker_id: worker_id.clone(),
        })
        .await
        .map_err(refused)?;
    output::note(&format!(
        "{worker_id} is draining; follow it with `tramontane workers list`"
    ));
    Ok(())
}

/// `tramontane placement ...`
pub(crate) async fn placement(command: PlacementCommand) -> anyhow::Result<()> {
    let args = match command {
        PlacementCommand::Show(args) => args,
        PlacementCommand::Plan(args) => return operator_plan::plan(&args).await,
        PlacementCommand::Rebalance(args) => return operator_plan::rebalance(&args).await,
    };
    let mut admin = connect(&args.router).await?;
    let answer = admin
        .get_placement(v1::GetPlacementRequest {})
        .await
        .map_err(refused)?
        .into_inner();
    let placement: Placement =
        serde_json::from_str(&answer.placement_json).context("placement that the router sent")?;
    if args.output == Format::Json {
        return output::json(&placement);
    }
    output::line(&format!(
        "epoch {}, {}, model {}, {} layers x {} experts",
        placement.epoch,
        placement.numeric_class,
        placement.model,
        placement.num_layers,
        placement.num_experts
    ))?;
    let rows: Vec<Vec<String>> = placement
        .iter()
        .map(|(slice, holders)| {
            let names: Vec<&str> = holders
                .iter()
                .filter_map(|&h| placement.worker(h))
                .map(|w| w.as_str())
                .collect();
            vec![
                slice.layer.to_string(),
                slice.expert.to_string(),
                slice.range.to_string(),
                names.join(","),
            ]
        })
        .collect();
    Ok(output::table(
        &["LAYER", "EXPERT", "SEGMENTS", "WORKERS"],
        &rows,
    )?)
}

pub(crate) async fn connect(address: &RouterAddress) -> anyhow::Result<AdminClient<Channel>> {
    let url = if address.router.contains("://") {
        address.router.clone()
    } else {
        format!("http://{}", address.router)
    };
    let endpoint = Endpoint::from_shared(url.clone())
        .with_context(|| {
            format!("--router must be an address such as http://127.0.0.1:8001, got {url:?}")
        })?
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(REQUEST_TIMEOUT);
    let channel = endpoint.connect().await.with_context(|| {
        format!("no router at {url}; start one with `tramontane serve`, or name it with --router")
    })?;
    Ok(AdminClient::new(channel))
}

/// The router's words without gRPC's decoration.
#[expect(clippy::needless_pass_by_value, reason = "the form that map_err wants")]
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!(
        "the router answered {:?}: {}",
        status.code(),
        status.message()
    )
}
