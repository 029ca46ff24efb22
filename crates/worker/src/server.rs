//! The gRPC server of a worker: its own service, the expert exchange, weights for others, health and reflection. Decides nothing.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tramontane_coordination::WorkerState;
use tramontane_exchange::{ExpertService, ExpertServiceConfig, LinkSettings};
use tramontane_proto::DESCRIPTORS;
use tramontane_runtime::ReadinessSetter;
use tramontane_runtime::tls::{Guard, Incoming};

use crate::Error;
use crate::generate_service::GenerateService;
use crate::island::IslandService;
use crate::severable::Severable;
use crate::state::{Node, name};
use crate::weights::{WeightsService, WeightsServing};

/// Names by which clients ask for the health of the whole server and of its main service.
const HEALTH_NAMES: [&str; 2] = ["", "tramontane.v1.Worker"];
/// Services that reflection shows.
const SERVICES: [&str; 4] = [
    "tramontane.v1.Worker",
    "tramontane.v1.ExpertExchange",
    "tramontane.v1.Weights",
    "grpc.health.v1.Health",
];
/// How long a caller may be silent after a ping before it counts as gone and its sequences are aborted: with
/// the ping's interval a vanished or stopped router is noticed within two seconds. Longer than what a peer
/// grants an expert call: a router whose cores are throttled for a second is alive, and cutting it off would
/// have all its sequences computed anew.
const CALLER_SILENCE_MAX: Duration = Duration::from_millis(1500);
/// How often health looks at the engine.
const HEALTH_EVERY: Duration = Duration::from_secs(1);

/// What the server serves.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) node: Arc<Node>,
    pub(crate) cluster: String,
    pub(crate) model: String,
    /// Who may call what.
    pub(crate) guard: Guard,
    /// What it gives of its checkpoint.
    pub(crate) weights: WeightsServing,
    /// Cancelled by the Drain call.
    pub(crate) drain: CancellationToken,
    /// Ends the streams of expert calls.
    pub(crate) ended: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// Serves until `ended`, then lets open streams end. Returns the server as a future, and its health.
pub(crate) fn serve(
    incoming: Incoming,
    services: Services,
) -> Result<
    (
        impl Future<Output = Result<(), Error>> + use<>,
        HealthReporter,
    ),
    Error,
> {
    let Services {
        node,
        cluster,
        model,
        guard,
        weights,
        drain,
        ended,
        tasks,
    } = services;
    let island_tasks = tasks.clone();
    let (reporter, health) = tonic_health::server::health_reporter();
    let (crash, faults) = (node.drills.crash(), node.drills.faults());
    let mut config = ExpertServiceConfig::new(node.id.clone(), cluster, model);
    config.faults = faults;
    let experts = node.experts.server.clone();
    let experts = ExpertService::new(config, experts, ended.clone(), tasks).into_service();
    let island = node.hub.clone().map(|hub| {
        let (stop, tasks) = (ended.clone(), island_tasks);
        guard.before(IslandService { hub, stop, tasks }.into_service())
    });
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        SERVICES.iter().fold(builder, |builder, service| {
            builder.with_service_name(*service)
        })
    };
    let link = LinkSettings {
        keepalive_timeout: CALLER_SILENCE_MAX,
        ..LinkSettings::default()
    };
    let router = ExpertService::tune(Server::builder(), link)
        .add_service(guard.before(GenerateService::new(node, drain).into_service()))
        .add_service(guard.before(health))
        .add_service(guard.before(reflection().build_v1().map_err(Error::Reflection)?))
        .add_service(guard.before(reflection().build_v1alpha().map_err(Error::Reflection)?))
        .add_service(guard.before(WeightsService::new(weights).into_service()))
        .add_service(guard.before(experts))
        .add_optional_service(island);
    let incoming =
        incoming.map(move |socket| Ok::<_, std::io::Error>(Severable::new(socket?, crash.clone())));
    let server = async move {
        router
            .serve_with_incoming_shutdown(incoming, ended.cancelled_owned())
            .await
            .map_err(Error::Server)
    };
    Ok((server, reporter))
}

/// Keeps gRPC health and readiness in step with the worker's state and the engine's pulse, until `stop`.
pub(crate) async fn report_health(
    node: Arc<Node>,
    reporter: HealthReporter,
    readiness: ReadinessSetter,
    stop: CancellationToken,
) {
    let mut state = node.state.subscribe();
    loop {
        let serves = serves(&node);
        let status = if serves.is_ok() {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in HEALTH_NAMES {
            reporter.set_service_status(service, status).await;
        }
        readiness.set(serves);
        tokio::select! {
            changed = state.changed() => if changed.is_err() {
                return;
            },
            () = tokio::time::sleep(HEALTH_EVERY) => {}
            () = stop.cancelled() => return,
        }
        state.mark_unchanged();
    }
}

/// Whether new sequences are welcome, and why not.
fn serves(node: &Node) -> Result<(), String> {
    match node.state() {
        WorkerState::Ready => alive(node),
        other => Err(name(other).to_owned()),
    }
}

/// Whether the worker does its work at all: asks nobody but itself.
pub(crate) fn alive(node: &Node) -> Result<(), String> {
    node.engine().map_or(Ok(()), |engine| engine.check())
}
