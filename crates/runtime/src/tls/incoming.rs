//! The connections of one door: accepted, with TLS where the door has it. A handshake holds up nobody else, takes a
//! bounded time, and one that fails is no connection.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep, timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::Stream;
use tokio_util::sync::PollSemaphore;
use tonic::transport::server::Connected;

use super::handshake::{HANDSHAKE_TIMEOUT, explained};
use super::identity::{Clients, Cluster};
use super::name::{BadName, PeerName};
use super::quiet::Quiet;
use crate::Accepted;

/// Handshakes at once at one door; further connections wait in the system's queue.
pub const HANDSHAKES_MAX: usize = 1024;
/// Open connections of one door, where nobody says otherwise; likewise.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Pause when the operating system has no more file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// First byte of every TLS connection: a handshake record.
const TLS_HANDSHAKE: u8 = 0x16;
/// What somebody is told who speaks HTTP to a port of HTTPS.
const PLAIN_HTTP: &[u8] =
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\ncontent-length: 39\r\n\
connection: close\r\n\r\nthis port speaks TLS: use https:// here";
/// Most of such a request that is read.
const PLAIN_BYTES_MAX: u64 = 64 << 10;

/// What a port shows to those who connect, and asks of them.
#[derive(Clone, Debug)]
pub struct Door {
    name: &'static str,
    lock: Lock,
}

#[derive(Clone, Debug)]
enum Lock {
    Plain,
    Clients(Arc<Clients>),
    Mutual(Arc<Cluster>),
    Open(Arc<Cluster>),
}

impl Door {
    /// A door in the clear.
    #[must_use]
    pub const fn plain(name: &'static str) -> Self {
        let lock = Lock::Plain;
        Self { name, lock }
    }

    pub(super) const fn clients(name: &'static str, identity: Arc<Clients>) -> Self {
        let lock = Lock::Clients(identity);
        Self { name, lock }
    }

    pub(super) const fn mutual(name: &'static str, identity: Arc<Cluster>) -> Self {
        let lock = Lock::Mutual(identity);
        Self { name, lock }
    }

    pub(super) const fn open(name: &'static str, identity: Arc<Cluster>) -> Self {
        let lock = Lock::Open(identity);
        Self { name, lock }
    }

    /// The newest identity; `None` in the clear.
    fn config(&self) -> Option<Arc<ServerConfig>> {
        match &self.lock {
            Lock::Plain => None,
            Lock::Clients(identity) => Some(identity.get()),
            Lock::Mutual(cluster) => Some(Arc::clone(&cluster.current.get().mutual)),
            Lock::Open(cluster) => Some(Arc::clone(&cluster.current.get().open)),
        }
    }
}

/// Who is at the other end, as every request of a connection carries it.
#[derive(Clone, Debug)]
pub struct PeerInfo {
    /// Where the connection comes from.
    pub address: Option<SocketAddr>,
    /// What its certificate says; `None` without one.
    pub(super) name: Option<Arc<Result<PeerName, BadName>>>,
}

/// A connection, with TLS or without.
#[derive(Debug)]
pub struct Socket {
    stream: Inner,
    peer: PeerInfo,
    /// Its place among the door's connections.
    _place: OwnedSemaphorePermit,
}

#[derive(Debug)]
enum Inner {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Socket {
    fn plain(stream: TcpStream, address: SocketAddr, place: OwnedSemaphorePermit) -> Self {
        let (address, name) = (Some(address), None);
        Self {
            stream: Inner::Plain(stream),
            peer: PeerInfo { address, name },
            _place: place,
        }
    }

    fn secured(
        stream: TlsStream<TcpStream>,
        address: SocketAddr,
        place: OwnedSemaphorePermit,
    ) -> Self {
        let (_, connection) = stream.get_ref();
        let leaf = connection.peer_certificates().and_then(<[_]>::first);
        let name = leaf.map(|leaf| Arc::new(PeerName::of(leaf)));
        let address = Some(address);
        Self {
            stream: Inner::Tls(Box::new(stream)),
            peer: PeerInfo { address, name },
            _place: place,
        }
    }
}

impl Connected for Socket {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.peer.clone()
    }
}

/// Connections as they are ready to be served. Never ends, and has no errors: what fails is logged.
#[derive(Debug)]
pub struct Incoming {
    listener: TcpListener,
    door: Door,
    places: PollSemaphore,
    handshakes: JoinSet<Result<Socket, Refused>>,
    pause: Option<Pin<Box<Sleep>>>,
    quiet: Quiet,
}

/// A connection that did not come to be.
#[derive(Debug)]
struct Refused {
    peer: SocketAddr,
    why: String,
    /// Somebody only looked whether the port is open.
    looked: bool,
}

impl Incoming {
    /// Accepts at `listener`, which must be of the runtime that polls: at most [`CONNECTIONS_MAX`] at once.
    #[must_use]
    pub fn new(listener: TcpListener, door: Door) -> Self {
        Self {
            listener,
            door,
            places: PollSemaphore::new(Arc::new(Semaphore::new(CONNECTIONS_MAX))),
            handshakes: JoinSet::new(),
            pause: None,
            quiet: Quiet::default(),
        }
    }

    /// At most so many at once. One that ends, or whose handshake fails, makes room for the next.
    #[must_use]
    pub fn at_most(self, connections_max: usize) -> Self {
        let places = PollSemaphore::new(Arc::new(Semaphore::new(connections_max)));
        Self { places, ..self }
    }

    /// Ready with the next connection.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Accepted<Socket>> {
        loop {
            while let Poll::Ready(Some(ended)) = self.handshakes.poll_join_next(cx) {
                match ended {
                    Ok(Ok(socket)) => return Poll::Ready(Accepted::new(socket)),
                    Ok(Err(refused)) => self.report(&refused),
                    Err(error) => {
                        tracing::error!(door = self.door.name, %error, "a handshake did not end well");
                    }
                }
            }
            if self.handshakes.len() >= HANDSHAKES_MAX {
                // The end of one wakes this task.
                return Poll::Pending;
            }
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            // Never closed. Given back at once when nobody is there to take it.
            let Some(place) = ready!(self.places.poll_acquire(cx)) else {
                return Poll::Pending;
            };
            match ready!(self.listener.poll_accept(cx)) {
                Ok((stream, peer)) => {
                    // Without it small events wait for acknowledgements; a socket that refuses is slow, not broken.
                    let _ = stream.set_nodelay(true);
                    let Some(config) = self.door.config() else {
                        let socket = Socket::plain(stream, peer, place);
                        return Poll::Ready(Accepted::new(socket));
                    };
                    self.handshakes.spawn(secured(stream, peer, config, place));
                }
                Err(error) => {
                    tracing::warn!(door = self.door.name, %error, "connection not accepted");
                    self.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }

    fn report(&mut self, refused: &Refused) {
        let (door, peer, why) = (self.door.name, refused.peer, &refused.why);
        if refused.looked {
            tracing::debug!(door, %peer, why, "connection ended before it began");
            return;
        }
        if let Some(unsaid) = self.quiet.may_speak() {
            tracing::warn!(door, %peer, why, unsaid, "connection refused");
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Accepted<Socket>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.poll_accept(cx).map(|socket| Some(Ok(socket)))
    }
}

impl axum::serve::Listener for Incoming {
    type Io = Accepted<Socket>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let socket = std::future::poll_fn(|cx| self.poll_accept(cx)).await;
        let address = socket.connect_info().address;
        let nowhere = SocketAddr::from(([0, 0, 0, 0], 0));
        (socket, address.unwrap_or(nowhere))
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

async fn secured(
    stream: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
    place: OwnedSemaphorePermit,
) -> Result<Socket, Refused> {
    let refused = |why: String| Refused {
        peer,
        why,
        looked: false,
    };
    match timeout(HANDSHAKE_TIMEOUT, begin(stream, peer, config, place)).await {
        Ok(done) => done,
        Err(_elapsed) => Err(refused(format!(
            "no TLS handshake within {HANDSHAKE_TIMEOUT:?}"
        ))),
    }
}

async fn begin(
    mut stream: TcpStream,
    peer: SocketAddr,
    config: Arc<ServerConfig>,
    place: OwnedSemaphorePermit,
) -> Result<Socket, Refused> {
    let refused = |why: String, looked: bool| Refused { peer, why, looked };
    let mut first = [0; 4];
    let seen = stream.peek(&mut first).await;
    let seen = seen.map_err(|error| refused(error.to_string(), true))?;
    match first[..seen] {
        [] => return Err(refused("closed without a word".to_owned(), true)),
        [TLS_HANDSHAKE, ..] => {}
        [letter, ..] => {
            // HTTP/2's hello begins like a method. A gRPC client takes this answer for what it is: no HTTP/2.
            if letter.is_ascii_uppercase() {
                let _told_or_gone = tell_plain(&mut stream).await;
            }
            let why = "expected TLS, got something else: the peer speaks plaintext";
            return Err(refused(why.to_owned(), false));
        }
    }
    let accepted = TlsAcceptor::from(config).accept(stream).await;
    let stream = accepted.map_err(|error| refused(explained(&error), false))?;
    Ok(Socket::secured(stream, peer, place))
}

/// Answers a request in the clear, and reads what is left of it: closing before would take the answer back.
async fn tell_plain(stream: &mut TcpStream) -> io::Result<()> {
    stream.write_all(PLAIN_HTTP).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(PLAIN_BYTES_MAX);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Inner::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Inner::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Inner::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Inner::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Inner::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Inner::Plain(stream) => stream.is_write_vectored(),
            Inner::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Inner::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Inner::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Inner::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
