//! The way to another process: TCP, with TLS where the process has an identity. Makes a connection, and never keeps one.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::codegen::Service;
use tonic::transport::{Channel, Endpoint, Error};

use super::handshake::{HANDSHAKE_TIMEOUT, explained};
use super::identity::{Cluster, Outgoing};
use super::name::Role;

/// Port of an address without one.
const HTTPS_PORT: u16 = 443;

/// How connections to other processes are made.
#[derive(Clone, Debug)]
pub struct Link(Way);

#[derive(Clone, Debug)]
enum Way {
    /// In the clear, and only to this machine.
    Here,
    /// In the clear.
    Plain,
    Peer(Arc<Cluster>, Role),
    Named(Arc<Outgoing>),
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0} names no host")]
    NoHost(Uri),
    #[error(
        "{0} is beyond this machine and this process has no cluster certificate: expected TLS (tls.cluster_cert, see `tramontane certs init`) or --insecure"
    )]
    Beyond(String),
    #[error("{0} is no address")]
    Unknown(String),
    #[error("{to}: {source}")]
    Tcp { to: String, source: io::Error },
    #[error("{to}: {why}")]
    Tls { to: String, why: String },
}

impl Default for Link {
    fn default() -> Self {
        Self(Way::Here)
    }
}

impl Link {
    /// In the clear, wherever to.
    #[must_use]
    pub const fn plain() -> Self {
        Self(Way::Plain)
    }

    pub(super) const fn peer(cluster: Arc<Cluster>, role: Role) -> Self {
        Self(Way::Peer(cluster, role))
    }

    pub(super) const fn named(outgoing: Arc<Outgoing>) -> Self {
        Self(Way::Named(outgoing))
    }

    /// Connects to `endpoint`, whose scheme must be `http`: what is around it is this link's.
    ///
    /// # Errors
    /// When there is no connection.
    pub async fn connect(&self, endpoint: &Endpoint) -> Result<Channel, Error> {
        endpoint.connect_with_connector(self.clone()).await
    }

    /// Connects when first used, and again when the connection is lost.
    #[must_use]
    pub fn connect_lazy(&self, endpoint: &Endpoint) -> Channel {
        endpoint.connect_with_connector_lazy(self.clone())
    }

    fn config(&self) -> Option<Arc<ClientConfig>> {
        match &self.0 {
            Way::Here | Way::Plain => None,
            Way::Peer(cluster, role) => Some(cluster.to(*role)),
            Way::Named(outgoing) => Some(outgoing.get()),
        }
    }

    async fn open(self, uri: Uri) -> Result<TokioIo<Opened>, LinkError> {
        let Some(host) = uri.host() else {
            return Err(LinkError::NoHost(uri));
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let to = uri
            .authority()
            .map_or_else(String::new, ToString::to_string);
        let failed = |source| LinkError::Tcp {
            to: to.clone(),
            source,
        };
        let port = uri.port_u16().unwrap_or(HTTPS_PORT);
        let found = lookup_host((host, port)).await.map_err(failed)?;
        let found: Vec<SocketAddr> = found.collect();
        if matches!(self.0, Way::Here) && !found.iter().all(is_here) {
            return Err(LinkError::Beyond(to));
        }
        let stream = TcpStream::connect(&found[..]).await.map_err(failed)?;
        // A socket that refuses is slow, not broken.
        let _ = stream.set_nodelay(true);
        let Some(config) = self.config() else {
            return Ok(TokioIo::new(Opened::Plain(stream)));
        };
        let name = ServerName::try_from(host.to_owned());
        let name = name.map_err(|_invalid| LinkError::Unknown(to.clone()))?;
        let secured = TlsConnector::from(config).connect(name, stream);
        let why = match timeout(HANDSHAKE_TIMEOUT, secured).await {
            Ok(Ok(stream)) => return Ok(TokioIo::new(Opened::Tls(Box::new(stream)))),
            Ok(Err(error)) => explained(&error),
            Err(_elapsed) => format!("no TLS handshake within {HANDSHAKE_TIMEOUT:?}"),
        };
        Err(LinkError::Tls { to, why })
    }
}

/// Whether an address is of this machine and no other.
#[must_use]
pub fn is_here(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

impl Service<Uri> for Link {
    type Response = TokioIo<Opened>;
    type Error = Box<dyn std::error::Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let link = self.clone();
        Box::pin(async move { Ok(link.open(uri).await?) })
    }
}

/// A connection that we opened.
#[derive(Debug)]
pub enum Opened {
    /// In the clear.
    Plain(TcpStream),
    /// With TLS.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Opened {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Opened {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(stream) => stream.is_write_vectored(),
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
