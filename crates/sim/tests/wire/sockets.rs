//! The simulated network under tonic: how a connection is dialled and accepted. Nothing else of gRPC differs
//! from what serves.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures::{Stream, stream};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::async_trait;
use tonic::codegen::Service;
use tonic::transport::server::Connected;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tramontane_exchange::Dial;
use tramontane_proto::v1::worker_client::WorkerClient;
use tramontane_router::simulation::{Connect, GrpcLink, WorkerLink, endpoint};
use tramontane_runtime::Accepted;
use turmoil::net::{TcpListener, TcpStream};

/// The port of every server.
pub(crate) const PORT: u16 = 7000;

/// Dials as the transport of expert calls and as a router does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SimulatedTcp;

#[async_trait]
impl Dial for SimulatedTcp {
    async fn dial(&self, endpoint: Endpoint) -> Result<Channel, Error> {
        endpoint.connect_with_connector(*self).await
    }
}

impl Connect for SimulatedTcp {
    fn connect(&self, address: &str) -> Result<Arc<dyn WorkerLink>, Error> {
        let channel = endpoint(address)?.connect_with_connector_lazy(*self);
        Ok(Arc::new(GrpcLink(WorkerClient::new(channel))))
    }
}

impl Service<Uri> for SimulatedTcp {
    type Response = TokioIo<TcpStream>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, to: Uri) -> Self::Future {
        Box::pin(async move {
            let host = to.host().unwrap_or_default().to_owned();
            let socket = TcpStream::connect((host, to.port_u16().unwrap_or(PORT))).await?;
            Ok(TokioIo::new(socket))
        })
    }
}

/// The socket of an accepted connection.
#[derive(Debug)]
pub(crate) struct Socket(TcpStream);

impl Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(context, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

/// Listens on [`PORT`] of the host that calls this, as servers do.
pub(crate) async fn listen() -> io::Result<impl Stream<Item = io::Result<Accepted<Socket>>>> {
    let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
    Ok(stream::unfold(listener, |listener| async {
        let accepted = listener.accept().await;
        let accepted = accepted.map(|(socket, _)| Accepted::new(Socket(socket)));
        Some((accepted, listener))
    }))
}
