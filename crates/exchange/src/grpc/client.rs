//! The calling side: one task per peer that connects when there is something to send, and again after a
//! loss. The engine's thread only ever touches a bounded queue.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{self, error::TrySendError};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status, Streaming, transport::Endpoint};
use tramontane_proto::v1::{
    self, expert_exchange_client::ExpertExchangeClient, expert_frame::Kind,
};
use tramontane_types::WorkerId;

use super::{CREDITS_MAX, Dial, Group, HTTP2_FRAME_BYTES, LinkSettings, codec};
use crate::local::Counters;
use crate::mutation::{Mutation, NO_PING, is_on};
use crate::stats::add;
use crate::{CallLimits, ExpertCall, Refusal, Reply, ReplySender, Transport, TransportStats};

/// Calls that wait for a connection or for credit, per peer; the next one is refused as busy.
pub const PEER_QUEUE_MAX: usize = 256;
/// First pause after a connection that could not be made; doubles with every further one.
const CONNECT_PAUSE: Duration = Duration::from_millis(20);
/// Longest pause between attempts to connect.
const CONNECT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Who calls, and how.
#[derive(Clone, Debug)]
pub struct GrpcTransportConfig {
    /// The calling worker.
    pub me: WorkerId,
    /// Name of the cluster.
    pub cluster: String,
    /// What decides the bits of a result.
    pub numeric_class: String,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Limits of one call.
    pub limits: CallLimits,
    /// How connections are kept.
    pub link: LinkSettings,
    /// How they are made.
    pub dial: Arc<dyn Dial>,
}

/// One long-lived stream per peer.
#[derive(Debug)]
pub struct GrpcTransport {
    shared: Arc<Shared>,
    runtime: Handle,
    tasks: TaskTracker,
    peers: RwLock<HashMap<WorkerId, Peer>>,
}

#[derive(Debug)]
struct Shared {
    config: GrpcTransportConfig,
    shutdown: CancellationToken,
    counters: Counters,
}

#[derive(Debug)]
struct Peer {
    address: String,
    queue: mpsc::Sender<Queued>,
}

#[derive(Debug)]
struct Queued {
    call: ExpertCall,
    reply: ReplySender,
}

impl GrpcTransport {
    /// A transport without peers. Its tasks run on `runtime`, are counted by `tasks` and end with `shutdown`.
    #[must_use]
    pub fn new(
        config: GrpcTransportConfig,
        runtime: Handle,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        let shared = Shared {
            config,
            shutdown,
            counters: Counters::default(),
        };
        Self {
            shared: Arc::new(shared),
            runtime,
            tasks,
            peers: RwLock::default(),
        }
    }

    /// Replaces the peers, `host:port` each. A peer that stays where it is keeps its connection; what is
    /// open at one that leaves is still awaited.
    pub fn set_peers(&self, mut addresses: HashMap<WorkerId, String>) {
        let mut peers = self.peers.write();
        peers.retain(|worker, peer| addresses.get(worker) == Some(&peer.address));
        addresses.retain(|worker, _| !peers.contains_key(worker));
        // In one order, so that a simulation repeats itself.
        let mut added: Vec<_> = addresses.into_iter().collect();
        added.sort_unstable();
        for (worker, address) in added {
            let (queue, waiting) = mpsc::channel(PEER_QUEUE_MAX);
            let task = PeerTask {
                shared: Arc::clone(&self.shared),
                worker: worker.clone(),
                address: address.clone(),
                waiting,
            };
            self.tasks.spawn_on(task.run(), &self.runtime);
            peers.insert(worker, Peer { address, queue });
        }
    }
}

impl Transport for GrpcTransport {
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
        let queue = self.peers.read().get(to).map(|peer| peer.queue.clone());
        let Some(queue) = queue else {
            add(&self.shared.counters.lost, 1);
            reply.send(Err(Refusal::Lost(format!(
                "no address is known for worker {to}"
            ))));
            return;
        };
        match queue.try_send(Queued { call, reply }) {
            Ok(()) => {}
            Err(TrySendError::Full(queued)) => queued.reply.send(Err(Refusal::Busy)),
            Err(TrySendError::Closed(queued)) => {
                add(&self.shared.counters.lost, 1);
                queued
                    .reply
                    .send(Err(Refusal::Lost("this worker is stopping".to_owned())));
            }
        }
    }

    fn stats(&self) -> TransportStats {
        self.shared.counters.read()
    }
}

/// Everything that one peer's task owns.
struct PeerTask {
    shared: Arc<Shared>,
    worker: WorkerId,
    address: String,
    waiting: mpsc::Receiver<Queued>,
}

/// A greeted stream.
struct Link {
    outgoing: mpsc::Sender<v1::ExpertFrame>,
    incoming: Streaming<v1::ExpertFrame>,
    credits: usize,
}

impl PeerTask {
    async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        // Dropping the queue answers what waits in it.
        let _cancelled = shutdown.run_until_cancelled(self.serve()).await;
    }

    async fn serve(&mut self) {
        let mut pause = CONNECT_PAUSE;
        let mut next_attempt = Instant::now();
        let mut last = Refusal::Lost("never connected".to_owned());
        while let Some(first) = self.waiting.recv().await {
            if Instant::now() < next_attempt {
                self.lose(first, last.clone());
                continue;
            }
            match self.connect().await {
                Ok(link) => {
                    add(&self.shared.counters.connects, 1);
                    tracing::info!(worker = %self.worker, address = %self.address, "connected to expert worker");
                    let why = self.run_link(link, first).await;
                    tracing::warn!(worker = %self.worker, %why, "connection to expert worker ended");
                    pause = CONNECT_PAUSE;
                }
                Err(why) => {
                    tracing::debug!(worker = %self.worker, %why, "no connection to expert worker");
                    next_attempt = Instant::now() + pause;
                    pause = (pause * 2).min(CONNECT_PAUSE_MAX);
                    self.lose(first, why.clone());
                    last = why;
                }
            }
        }
    }

    fn lose(&self, queued: Queued, why: Refusal) {
        add(&self.shared.counters.lost, 1);
        queued.reply.send(Err(why));
    }

    async fn connect(&self) -> Result<Link, Refusal> {
        let limit = self.shared.config.link.connect_timeout;
        match tokio::time::timeout(limit, self.greet()).await {
            Ok(link) => link,
            Err(_elapsed) => {
                let address = &self.address;
                Err(Refusal::Lost(format!(
                    "{address} did not answer within {limit:?}"
                )))
            }
        }
    }

    async fn greet(&self) -> Result<Link, Refusal> {
        let config = &self.shared.config;
        let endpoint = endpoint(&self.address, config.link)
            .map_err(|error| Refusal::Lost(format!("address {}: {error}", self.address)))?;
        let channel = config
            .dial
            .dial(endpoint)
            .await
            .map_err(|error| Refusal::Lost(format!("{}: {}", self.address, causes(&error))))?;
        let group = config.group();
        // Room for the hello and for as many calls as may ever be open: sending never waits.
        let (outgoing, frames) = mpsc::channel(CREDITS_MAX + 1);
        let hello = codec::frame(Kind::Hello(group.hello(config.me.as_str(), 0)));
        outgoing.try_send(hello).map_err(|_full| Refusal::Busy)?;
        let mut incoming = ExpertExchangeClient::new(channel)
            .max_decoding_message_size(config.limits.reply_bytes_max())
            .max_encoding_message_size(config.limits.request_bytes_max())
            .exchange(ReceiverStream::new(frames))
            .await
            .map_err(|status| refusal_of(&status))?
            .into_inner();
        let first = incoming
            .message()
            .await
            .map_err(|status| refusal_of(&status))?;
        let Some(Kind::Hello(theirs)) = first.and_then(|frame| frame.kind) else {
            return Err(Refusal::Lost("the first frame is not a hello".to_owned()));
        };
        group.check(&theirs).map_err(Refusal::Mismatch)?;
        if theirs.worker_id != self.worker.as_str() {
            let (address, theirs) = (&self.address, codec::clip(theirs.worker_id));
            let text = format!(
                "{address} is worker {theirs:?}, expected {:?}",
                self.worker.as_str()
            );
            return Err(Refusal::Mismatch(text));
        }
        let credits = (theirs.credits as usize).clamp(1, CREDITS_MAX);
        Ok(Link {
            outgoing,
            incoming,
            credits,
        })
    }

    /// Carries calls until the connection is lost, or until the peer was removed and all is answered.
    async fn run_link(&mut self, mut link: Link, first: Queued) -> String {
        // In the order in which they were sent: so are they lost.
        let mut open = BTreeMap::new();
        let mut next_id = 0;
        let mut removed = false;
        let mut queued = Some(first);
        let why = loop {
            if let Some(Queued { call, reply }) = queued.take() {
                add(&self.shared.counters.calls, 1);
                add(&self.shared.counters.bytes_sent, call.rows.len());
                open.insert(next_id, reply);
                if link
                    .outgoing
                    .try_send(codec::call_to_wire(next_id, call))
                    .is_err()
                {
                    break "the stream is closed".to_owned();
                }
                next_id += 1;
            }
            if removed && open.is_empty() {
                break "the peer was removed".to_owned();
            }
            tokio::select! {
                biased;
                frame = link.incoming.message() => match frame {
                    Ok(Some(frame)) => self.on_frame(frame, &mut open),
                    Ok(None) => break "the peer ended the stream".to_owned(),
                    Err(status) => break refusal_of(&status).to_string(),
                },
                next = self.waiting.recv(), if !removed && open.len() < link.credits => {
                    removed = next.is_none();
                    queued = next;
                }
            }
        };
        for (_, reply) in open {
            add(&self.shared.counters.lost, 1);
            reply.send(Err(Refusal::Lost(why.clone())));
        }
        why
    }

    fn on_frame(&self, frame: v1::ExpertFrame, open: &mut BTreeMap<u64, ReplySender>) {
        let (call_id, answer) = match frame.kind {
            Some(Kind::Reply(v1::ExpertReply {
                call_id,
                outputs,
                service_us,
            })) => (
                call_id,
                Ok(Reply {
                    outputs,
                    service_us,
                }),
            ),
            Some(Kind::Refusal(refusal)) => {
                (refusal.call_id, Err(codec::refusal_from_wire(refusal)))
            }
            // A newer worker may say more than we know.
            Some(Kind::Hello(_) | Kind::Call(_) | Kind::Credit(_)) | None => return,
        };
        let found = if is_on(Mutation::AnyCallAnswered) {
            open.pop_first().map(|(_, reply)| reply)
        } else {
            open.remove(&call_id)
        };
        let Some(reply) = found else {
            tracing::warn!(worker = %self.worker, call_id, "answer to a call that is not open");
            return;
        };
        if let Ok(Reply { outputs, .. }) = &answer {
            add(&self.shared.counters.bytes_received, outputs.len());
        }
        reply.send(answer);
    }
}

impl GrpcTransportConfig {
    pub(crate) fn group(&self) -> Group<'_> {
        let Self {
            cluster,
            numeric_class,
            model,
            ..
        } = self;
        Group {
            cluster,
            numeric_class,
            model,
        }
    }
}

fn endpoint(address: &str, link: LinkSettings) -> Result<Endpoint, tonic::transport::Error> {
    let pinged_every = if is_on(Mutation::NoPings) {
        NO_PING
    } else {
        link.keepalive_interval
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(link.connect_timeout)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(pinged_every)
        .keep_alive_timeout(link.keepalive_timeout)
        .keep_alive_while_idle(true)
        .max_frame_size(HTTP2_FRAME_BYTES)
        .initial_stream_window_size(link.stream_window_bytes)
        .initial_connection_window_size(link.connection_window_bytes);
    Ok(endpoint)
}

/// Only the greeting answers with `FAILED_PRECONDITION`; whatever else ends a stream is a loss.
fn refusal_of(status: &Status) -> Refusal {
    let text = codec::clip(status.message().to_owned());
    if status.code() == Code::FailedPrecondition {
        return Refusal::Mismatch(text);
    }
    Refusal::Lost(format!("{:?}: {text}", status.code()))
}

/// The error with what lies beneath it: tonic's own text is "transport error".
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    codec::clip(text)
}
