//! The answering side: greets who connects to this worker's Unix socket and hands the socket to the desk.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{sleep, timeout};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::greeting::{hear_hello, say_hello};
use super::link::{Link, Service, Side};
use crate::faults::Gate;
use crate::grpc::{CONNECT_TIMEOUT, Group, codec};
use crate::rhythm::Caller;
use crate::{Desk, ExpertServerHandle, ExpertServiceConfig};

/// Pause after the system refused a connection, for example for want of file descriptors.
const ACCEPT_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);

/// Accepts connections for an [`ExpertServer`](crate::ExpertServer).
#[derive(Clone, Debug)]
pub struct HostListener {
    config: ExpertServiceConfig,
    server: ExpertServerHandle,
    desk: Arc<Desk>,
    places: Arc<Semaphore>,
}

impl HostListener {
    /// A listener for `server`, whose thread sits at `desk`.
    #[must_use]
    pub fn new(config: ExpertServiceConfig, server: ExpertServerHandle, desk: Arc<Desk>) -> Self {
        let places = Arc::new(Semaphore::new(config.streams_max));
        Self {
            config,
            server,
            desk,
            places,
        }
    }

    /// Accepts until `stop`. The connections themselves last until [`Desk::close`].
    pub async fn serve(self, listener: UnixListener, stop: CancellationToken, tasks: TaskTracker) {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = stop.cancelled() => return,
            };
            let socket = match accepted {
                Ok((socket, _address)) => socket,
                Err(error) => {
                    tracing::warn!(%error, "a connection to the Unix socket was refused");
                    sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
                let max = self.config.streams_max;
                tracing::warn!(
                    max,
                    "a stream of expert calls was refused, too many are open"
                );
                continue;
            };
            let (greeter, stop) = (self.clone(), stop.clone());
            tasks.spawn(async move {
                let greeted = stop.run_until_cancelled(greeter.greet(socket, place)).await;
                match greeted {
                    // A process of this host that starts looks whether somebody answers here, and says nothing.
                    Some(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                        tracing::debug!(%error, "a connection to the Unix socket came to nothing");
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, "a connection to the Unix socket came to nothing");
                    }
                    Some(Ok(())) | None => {}
                }
            });
        }
    }

    async fn greet(&self, socket: UnixStream, place: OwnedSemaphorePermit) -> io::Result<()> {
        let group = Group {
            cluster: &self.config.cluster,
            numeric_class: self.server.numeric_class(),
            model: &self.config.model,
        };
        let greeting = async {
            let theirs = hear_hello(&socket).await?;
            let gate = Gate::new(self.config.faults.as_ref(), &theirs.worker_id);
            if let Some(gate) = &gate {
                gate.hear(CONNECT_TIMEOUT).await?;
            }
            say_hello(
                &socket,
                group.hello(self.config.me.as_str(), self.config.credits),
            )
            .await?;
            group.check(&theirs).map_err(io::Error::other)?;
            Ok::<_, io::Error>((theirs.worker_id, gate))
        };
        let (worker, gate) = timeout(CONNECT_TIMEOUT, greeting).await??;
        tracing::info!(worker = %codec::clip(worker), "expert calls accepted on the Unix socket");
        let service = Service {
            server: self.server.clone(),
            caller: new_caller(),
            gate,
            credits: self.config.credits,
            num_open: Arc::default(),
            _place: place,
        };
        let limits = self.server.limits();
        self.desk
            .open(socket.into_std()?, Side::Service(service), &limits)?;
        Ok(())
    }
}

/// A number for a stream of calls that no other stream of this process has.
pub(crate) fn new_caller() -> Caller {
    static NEXT: AtomicU64 = AtomicU64::new(Caller::OWN.0 + 1);
    Caller(NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Desk {
    /// Has a greeted socket read here.
    pub(super) fn open(
        &self,
        socket: std::os::unix::net::UnixStream,
        side: Side,
        limits: &crate::CallLimits,
    ) -> io::Result<Arc<Link>> {
        let Some(doorbell) = self.doorbell() else {
            return Err(io::Error::other("this desk reads no sockets"));
        };
        Link::open(socket, side, limits, doorbell)
    }
}
