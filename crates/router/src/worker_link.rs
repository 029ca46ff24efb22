//! The seam between a sequence and the attention worker that runs it: one request out, events back.
//! gRPC stands behind it, and in simulations a worker of the same process. Never retries.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::BoxStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, async_trait};
use tramontane_proto::v1::worker_client::WorkerClient;
use tramontane_proto::v1::{
    GenerateSequenceRequest, SequenceEvent, WorkerStatus, WorkerStatusRequest,
};
use tramontane_runtime::tls::Link;
use tramontane_runtime::trace_context;

/// Longest wait for a connection to a worker.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection is pinged this often.
pub const PING_INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait for the answer to a ping. Only for connections that lead nowhere any more: sequences have
/// left a worker without a pulse long before, if there was another.
pub const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Token events are small: a window of this size never stops a stream.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// What a worker says about one sequence. Dropping it aborts the sequence there.
pub type SequenceEvents = BoxStream<'static, Result<SequenceEvent, Status>>;

/// The way to one worker.
#[async_trait]
pub trait WorkerLink: Send + Sync + Debug {
    /// Opens a sequence there. Returns when the worker has taken or refused it.
    async fn generate(&self, request: GenerateSequenceRequest) -> Result<SequenceEvents, Status>;

    /// Asks how it is: a sign of life.
    async fn status(&self) -> Result<WorkerStatus, Status>;
}

/// Makes the ways to workers. Must not wait: what needs a connection makes it when first used.
pub trait Connect: Send + Sync + Debug {
    /// The way to the worker at `address`, `host:port`.
    ///
    /// # Errors
    /// When it is no address.
    fn connect(&self, address: &str) -> Result<Arc<dyn WorkerLink>, tonic::transport::Error>;
}

/// gRPC over a link.
#[derive(Clone, Debug, Default)]
pub struct GrpcConnect(pub Link);

impl Connect for GrpcConnect {
    fn connect(&self, address: &str) -> Result<Arc<dyn WorkerLink>, tonic::transport::Error> {
        Ok(Arc::new(GrpcLink(self.client(address)?)))
    }
}

impl GrpcConnect {
    /// A client that connects when first used, and again when the connection is lost.
    pub(crate) fn client(
        &self,
        address: &str,
    ) -> Result<WorkerClient<Channel>, tonic::transport::Error> {
        let channel = self.0.connect_lazy(&endpoint(address)?);
        Ok(WorkerClient::new(channel))
    }
}

/// The way to a worker over a gRPC channel.
#[derive(Clone, Debug)]
pub struct GrpcLink(pub WorkerClient<Channel>);

#[async_trait]
impl WorkerLink for GrpcLink {
    async fn generate(&self, request: GenerateSequenceRequest) -> Result<SequenceEvents, Status> {
        let mut request = Request::new(request);
        trace_context::tell(request.metadata_mut().as_mut());
        let answer = self.0.clone().generate(request).await?;
        Ok(answer.into_inner().boxed())
    }

    async fn status(&self) -> Result<WorkerStatus, Status> {
        let answer = self.0.clone().status(WorkerStatusRequest {}).await?;
        Ok(answer.into_inner())
    }
}

/// How every connection to a worker is made.
///
/// # Errors
/// When `address` is no address.
pub fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES))
}
