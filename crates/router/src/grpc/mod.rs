//! The gRPC doors: `tramontane.v1.Inference` for clients with the same requests, limits and errors as over HTTP, and
//! `Admin` for operators at a port of its own. Health and reflection at both.

mod admin;
mod inference;
mod status;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::HealthReporter;
use tramontane_proto::v1::admin_server::AdminServer;
use tramontane_proto::v1::inference_server::InferenceServer;
use tramontane_runtime::Readiness;
use tramontane_runtime::tls::{Guard, Incoming};

use crate::Error;
use crate::run::App;

/// Calls at once on one connection.
const CALLS_PER_CONNECTION: usize = 256;
/// Largest list of headers.
const HEADER_BYTES_MAX: u32 = 64 * 1024;
/// Streams that a client may reset before they are accepted.
const RESET_STREAMS_MAX: usize = 64;
/// Connections are asked for a sign of life this often.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Services that health and reflection name at each door.
const INFERENCE: &str = "tramontane.v1.Inference";
const ADMIN: &str = "tramontane.v1.Admin";
const HEALTH: &str = "grpc.health.v1.Health";

/// What the health of a door follows.
#[derive(Debug)]
pub(crate) struct Health<'a> {
    ready: Readiness,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
}

/// Serves clients until `refuse`, and then until every call has ended.
pub(crate) fn serve(
    incoming: Incoming,
    app: &Arc<App>,
    refuse: CancellationToken,
    health: &Health<'_>,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + use<>, Error> {
    let inference = InferenceServer::new(inference::InferenceService::new(Arc::clone(app)))
        .max_decoding_message_size(app.config.body_bytes_max);
    let reflection_v1 = reflection(INFERENCE)
        .build_v1()
        .map_err(Error::Reflection)?;
    let reflection_v1alpha = reflection(INFERENCE)
        .build_v1alpha()
        .map_err(Error::Reflection)?;
    let server = limited()
        .add_service(inference)
        .add_service(health.serve(INFERENCE))
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    Ok(server.serve_with_incoming_shutdown(incoming, refuse.cancelled_owned()))
}

/// Serves operators, likewise.
pub(crate) fn serve_admin(
    incoming: Incoming,
    app: &Arc<App>,
    guard: &Guard,
    refuse: CancellationToken,
    health: &Health<'_>,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + use<>, Error> {
    let admin = AdminServer::new(admin::AdminService::new(Arc::clone(app)))
        .max_decoding_message_size(app.config.body_bytes_max);
    let reflection_v1 = reflection(ADMIN).build_v1().map_err(Error::Reflection)?;
    let reflection_v1alpha = reflection(ADMIN)
        .build_v1alpha()
        .map_err(Error::Reflection)?;
    let server = limited()
        .add_service(guard.before(admin))
        .add_service(guard.before(health.serve(ADMIN)))
        .add_service(guard.before(reflection_v1))
        .add_service(guard.before(reflection_v1alpha));
    Ok(server.serve_with_incoming_shutdown(incoming, refuse.cancelled_owned()))
}

/// A server with the limits of both doors.
fn limited() -> Server {
    Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .max_concurrent_streams(CALLS_PER_CONNECTION as u32)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
}

fn reflection(service: &'static str) -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tramontane_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(service)
        .with_service_name(HEALTH)
}

impl<'a> Health<'a> {
    pub(crate) fn new(app: &App, tasks: &'a TaskTracker, stop: &'a CancellationToken) -> Self {
        let ready = app.ready.clone();
        Self { ready, tasks, stop }
    }

    /// The health service of the door of `service`.
    fn serve(
        &self,
        service: &'static str,
    ) -> HealthServer<impl tonic_health::pb::health_server::Health> {
        let (reporter, health) = tonic_health::server::health_reporter();
        let (ready, stop) = (self.ready.clone(), self.stop.clone());
        self.tasks
            .spawn(keep_health(reporter, service, ready, stop));
        health
    }
}

/// Keeps the health service true to readiness until `stop`. Liveness is that it answers.
async fn keep_health(
    reporter: HealthReporter,
    service: &'static str,
    mut ready: Readiness,
    stop: CancellationToken,
) {
    loop {
        let is_ready = ready.check().is_ok();
        for name in ["", service, "readiness", "liveness"] {
            let serves = is_ready || name == "liveness";
            let status = if serves {
                ServingStatus::Serving
            } else {
                ServingStatus::NotServing
            };
            reporter.set_service_status(name, status).await;
        }
        tokio::select! {
            changed = ready.changed() => if !changed { return },
            () = stop.cancelled() => return,
        }
    }
}
