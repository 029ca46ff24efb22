//! The calling side: a Unix socket to every peer of this host, gRPC to all others and until the socket
//! is connected.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::{Mutex, RwLock};
use tokio::net::UnixStream;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tramontane_types::WorkerId;

use super::greeting::{hear_hello, say_hello};
use super::link::{Calls, Link, Side};
use super::{PeerAddress, Sockets};
use crate::grpc::{CREDITS_MAX, codec};
use crate::local::Counters;
use crate::{
    Desk, ExpertCall, GrpcTransport, GrpcTransportConfig, Refusal, ReplySender, Transport,
    TransportStats,
};

/// First pause after a connection that could not be made; doubles with every further one.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause between attempts: calls have another way.
const CONNECT_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Unix sockets on this host, gRPC beyond.
#[derive(Debug)]
pub struct HostTransport {
    grpc: GrpcTransport,
    dialer: Arc<Dialer>,
    peers: RwLock<HashMap<WorkerId, Peer>>,
    runtime: Handle,
    tasks: TaskTracker,
    shutdown: CancellationToken,
}

#[derive(Debug)]
struct Dialer {
    config: GrpcTransportConfig,
    desk: Arc<Desk>,
    counters: Arc<Counters>,
}

#[derive(Debug)]
struct Peer {
    socket: PathBuf,
    link: Arc<ArcSwapOption<Link>>,
    removed: CancellationToken,
}

impl HostTransport {
    /// A transport without peers. Answers on sockets are read at `desk`; tasks run on `runtime`, are
    /// counted by `tasks` and end with `shutdown`.
    #[must_use]
    pub fn new(
        config: GrpcTransportConfig,
        desk: Arc<Desk>,
        runtime: Handle,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        let grpc = GrpcTransport::new(
            config.clone(),
            runtime.clone(),
            shutdown.clone(),
            tasks.clone(),
        );
        let counters = Arc::default();
        let dialer = Arc::new(Dialer {
            config,
            desk,
            counters,
        });
        Self {
            grpc,
            dialer,
            peers: RwLock::default(),
            runtime,
            tasks,
            shutdown,
        }
    }

    /// Replaces the peers. A peer that stays where it is keeps its connections; what is open at one that
    /// leaves is still awaited.
    pub fn set_peers(&self, peers: HashMap<WorkerId, PeerAddress>) {
        let addresses = peers
            .iter()
            .map(|(worker, peer)| (worker.clone(), peer.address.clone()));
        self.grpc.set_peers(addresses.collect());
        let mut known = self.peers.write();
        known.retain(|worker, peer| {
            let stays = peers.get(worker).and_then(|new| new.socket.as_ref()) == Some(&peer.socket);
            if !stays {
                peer.removed.cancel();
            }
            stays
        });
        for (worker, peer) in peers {
            if let Some(socket) = peer.socket
                && !known.contains_key(&worker)
            {
                let peer = self.dial(worker.clone(), socket);
                known.insert(worker, peer);
            }
        }
    }

    fn dial(&self, worker: WorkerId, socket: PathBuf) -> Peer {
        let peer = Peer {
            socket: socket.clone(),
            link: Arc::default(),
            removed: self.shutdown.child_token(),
        };
        let (dialer, link, removed) = (
            Arc::clone(&self.dialer),
            Arc::clone(&peer.link),
            peer.removed.clone(),
        );
        let task = async move {
            let _removed = removed
                .run_until_cancelled(dialer.keep_connected(&worker, &socket, &link))
                .await;
            if let Some(link) = link.swap(None) {
                link.retire();
            }
        };
        self.tasks.spawn_on(task, &self.runtime);
        peer
    }
}

impl Transport for HostTransport {
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
        let link = self
            .peers
            .read()
            .get(to)
            .and_then(|peer| peer.link.load_full());
        let Some(link) = link else {
            return self.grpc.send(to, call, reply);
        };
        if let Err((call, reply)) = link.call(call, reply) {
            self.grpc.send(to, call, reply);
        }
    }

    fn stats(&self) -> TransportStats {
        let (grpc, host) = (self.grpc.stats(), self.dialer.counters.read());
        TransportStats {
            bytes_sent: grpc.bytes_sent + host.bytes_sent,
            bytes_received: grpc.bytes_received + host.bytes_received,
            calls: grpc.calls + host.calls,
            lost: grpc.lost + host.lost,
            connects: grpc.connects + host.connects,
        }
    }
}

impl Dialer {
    /// Connects, and again after a loss, for ever.
    async fn keep_connected(&self, worker: &WorkerId, path: &Path, link: &ArcSwapOption<Link>) {
        let mut pause = CONNECT_PAUSE;
        loop {
            match self.connect(worker, path).await {
                Ok((connected, lost)) => {
                    crate::stats::add(&self.counters.connects, 1);
                    tracing::info!(%worker, path = %path.display(), "connected to expert worker on this host");
                    link.store(Some(connected));
                    lost.cancelled().await;
                    link.store(None);
                    tracing::warn!(%worker, "connection to expert worker on this host ended");
                    pause = CONNECT_PAUSE;
                }
                Err(why) => {
                    tracing::debug!(%worker, path = %path.display(), %why, "no Unix socket, calls go over gRPC");
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(CONNECT_PAUSE_MAX);
        }
    }

    async fn connect(
        &self,
        worker: &WorkerId,
        path: &Path,
    ) -> Result<(Arc<Link>, CancellationToken), Refusal> {
        let lost = |error: std::io::Error| Refusal::Lost(error.to_string());
        let limit = self.config.link.connect_timeout;
        let (socket, credits) = timeout(limit, self.greet(worker, path))
            .await
            .map_err(|_elapsed| Refusal::Lost(format!("no answer within {limit:?}")))??;
        let gone = CancellationToken::new();
        let calls = Calls {
            worker: worker.clone(),
            credits,
            counters: Arc::clone(&self.counters),
            lost: gone.clone(),
            open: Mutex::default(),
        };
        let socket = socket.into_std().map_err(lost)?;
        let link = self
            .desk
            .open(socket, Side::Calls(calls), &self.config.limits)
            .map_err(lost)?;
        Ok((link, gone))
    }

    async fn greet(&self, worker: &WorkerId, path: &Path) -> Result<(UnixStream, usize), Refusal> {
        let lost = |error: std::io::Error| Refusal::Lost(error.to_string());
        let socket = UnixStream::connect(path).await.map_err(lost)?;
        let group = self.config.group();
        let hello = group.hello(self.config.me.as_str(), 0);
        say_hello(&socket, hello).await.map_err(lost)?;
        let theirs = hear_hello(&socket).await.map_err(lost)?;
        group.check(&theirs).map_err(Refusal::Mismatch)?;
        if theirs.worker_id != worker.as_str() {
            let theirs = codec::clip(theirs.worker_id);
            let text = format!("worker {theirs:?}, expected {:?}", worker.as_str());
            return Err(Refusal::Mismatch(text));
        }
        Ok((socket, (theirs.credits as usize).clamp(1, CREDITS_MAX)))
    }
}

impl Desk {
    /// A desk whose sitter also reads the Unix sockets of this host.
    ///
    /// # Errors
    /// When the system refuses what it takes to wait for sockets.
    pub fn with_sockets() -> std::io::Result<Self> {
        Sockets::new().map(|sockets| Self::new(Some(sockets)))
    }
}
