//! The gRPC door: `tramontane.v1.Inference` and `Admin`, health and reflection. The same requests, limits
//! and errors as over HTTP.

mod admin;
mod conversation;
mod inference;
mod status;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use tramontane_proto::v1::admin_server::AdminServer;
use tramontane_proto::v1::inference_server::InferenceServer;
use tramontane_runtime::Accepted;

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
/// Health answers for these names: the whole, and each service.
const HEALTH_NAMES: [&str; 5] = [
    "",
    "tramontane.v1.Inference",
    "tramontane.v1.Admin",
    "readiness",
    "liveness",
];

/// Serves until `refuse`, and then until every call has ended.
pub(crate) fn serve(
    listener: TcpListener,
    app: Arc<App>,
    refuse: CancellationToken,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>>, Error> {
    let message_bytes_max = app.config.body_bytes_max;
    let inference = InferenceServer::new(inference::InferenceService::new(Arc::clone(&app)))
        .max_decoding_message_size(message_bytes_max);
    let admin = AdminServer::new(admin::AdminService::new(Arc::clone(&app)))
        .max_decoding_message_size(message_bytes_max);
    let (reporter, health) = tonic_health::server::health_reporter();
    tasks.spawn(keep_health(reporter, app, stop.clone()));
    let reflection_v1 = reflection().build_v1().map_err(Error::Reflection)?;
    let reflection_v1alpha = reflection().build_v1alpha().map_err(Error::Reflection)?;
    let incoming = TcpIncoming::from(listener)
        .with_nodelay(Some(true))
        .map(|socket| socket.map(Accepted::new));
    let server = Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .max_concurrent_streams(CALLS_PER_CONNECTION as u32)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_max_pending_accept_reset_streams(Some(RESET_STREAMS_MAX))
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .add_service(inference)
        .add_service(admin)
        .add_service(health)
        .add_service(reflection_v1)
        .add_service(reflection_v1alpha);
    Ok(server.serve_with_incoming_shutdown(incoming, refuse.cancelled_owned()))
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(tramontane_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

/// Keeps the health service true to readiness until `stop`. Liveness is that it answers.
async fn keep_health(reporter: HealthReporter, app: Arc<App>, stop: CancellationToken) {
    let mut ready = app.ready.clone();
    drop(app);
    loop {
        let is_ready = ready.check().is_ok();
        for name in HEALTH_NAMES {
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
