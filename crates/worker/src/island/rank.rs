//! A rank that follows: loads what the leader says, computes what the leader computes, and comes back when it has lost it.
//! Knows no cluster, and samples nothing.

mod orders;

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use tonic::transport::Endpoint;
use tramontane_compute::{AttentionConfig, Backend as _};
use tramontane_compute_cuda::{CudaBackend, RankAttention};
use tramontane_model::Checkpoint;
use tramontane_proto::v1::{
    self, island_client::IslandClient, lead_message::Kind, rank_message::Kind as Said,
};
use tramontane_runtime::ops::Ops;
use tramontane_runtime::tls::{Incoming, Link, Role, Tls};
use tramontane_runtime::{Readiness, ReadinessSetter, Shutdown};

use super::{BEAT_EVERY, QUEUE_MAX, SILENCE_MAX, message_bytes_max, wire};
use crate::{ConfigError, Error, WorkerConfig, device};
use orders::Orders;

/// How long connecting to the leader and greeting it may take.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Before the next attempt.
const CONNECT_PAUSE: Duration = Duration::from_secs(1);
/// How long tasks may take to end.
const STOP_MAX: Duration = Duration::from_secs(5);

/// What a rank that follows is given by the process that runs it.
#[derive(Debug)]
pub struct RankParts {
    /// The model: that of the leader.
    pub checkpoint: Arc<Checkpoint>,
    /// Where health checks are asked for.
    pub ops: Option<TcpListener>,
    /// What it shows to others, and whom it believes.
    pub tls: Tls,
}

/// Runs a rank that follows the leader of its island until `shutdown` is triggered. A leader that is not there is waited
/// for.
///
/// # Errors
/// When the settings are no rank's, or its device or model cannot be used.
pub async fn run_rank(
    mut config: WorkerConfig,
    mut parts: RankParts,
    shutdown: Shutdown,
) -> Result<(), Error> {
    config.validate()?;
    let Some(leader) = config
        .island_leader
        .clone()
        .filter(|_| config.island_rank > 0)
    else {
        let rule = "above 0, and island_leader set, for a rank that follows";
        return Err(ConfigError::new("island_rank", rule, &config.island_rank).into());
    };
    let device = device::choose(&mut config, parts.checkpoint.geometry())?;
    let (setter, readiness) = Readiness::starting("loading");
    if let Some(listener) = parts.ops.take() {
        let incoming = Incoming::new(listener, parts.tls.ops_door("ops"));
        serve_ops(incoming, readiness, &shutdown);
    }
    let checkpoint = Arc::clone(&parts.checkpoint);
    let loading = config.clone();
    let loaded = tokio::task::spawn_blocking(move || Loaded::new(&loading, &device, &checkpoint));
    let what = "packing the attention weights";
    let loaded = loaded
        .await
        .map_err(|source| Error::Task { what, source })??;
    let rank = Rank {
        leader,
        link: parts.tls.link(Role::Worker),
        hello: hello(&config, &loaded.backend, &parts.checkpoint),
        message_bytes: message_bytes_max(parts.checkpoint.geometry()),
        orders: Orders::start(loaded, parts.checkpoint)?,
        ready: setter,
    };
    rank.run(&shutdown.token).await;
    Ok(())
}

fn serve_ops(incoming: Incoming, ready: Readiness, shutdown: &Shutdown) {
    let ops = Ops {
        live: Arc::new(|| Ok(())),
        ready,
        metrics: Arc::new(|| "# EOF\n".to_owned()),
    };
    let served = tramontane_runtime::ops::serve(incoming, ops, shutdown.clone());
    shutdown.tasks.spawn(async move {
        if let Err(error) = served.await {
            tracing::error!(%error, "the operations port ended");
        }
    });
}

/// What all ranks of an island have alike, and the memory of this one.
pub(crate) fn hello(
    config: &WorkerConfig,
    backend: &CudaBackend,
    checkpoint: &Checkpoint,
) -> v1::RankHello {
    let limits = config.engine(checkpoint.geometry(), Vec::new());
    v1::RankHello {
        cluster: config.cluster.clone(),
        numeric_class: config.kv_format.class_of(backend.numeric_class()),
        model: checkpoint.fingerprint().to_owned(),
        version: tramontane_runtime::build_info::VERSION.to_owned(),
        kv_pages: limits.num_pages as u64,
        step_rows: limits.max_step_rows as u64,
        expert_bytes: config.expert_bytes(),
    }
}

/// The two halves of a rank.
struct Loaded {
    backend: Arc<CudaBackend>,
    device: Arc<dyn device::Device>,
    attention: RankAttention,
}

impl Loaded {
    fn new(
        config: &WorkerConfig,
        device: &device::ChosenDevice,
        checkpoint: &Checkpoint,
    ) -> Result<Self, Error> {
        let geometry = checkpoint.geometry();
        let Some(gpu) = device.gpu() else {
            let rule = "a GPU for a rank of an island";
            return Err(ConfigError::new("device", rule, &config.device).into());
        };
        let backend = CudaBackend::new(gpu, geometry, config.weights).map_err(Error::Backend)?;
        let bytes = checkpoint.attention_weights().map_err(Error::Checkpoint)?;
        let limits = config.engine(geometry, Vec::new());
        let sizes = AttentionConfig {
            num_pages: limits.num_pages,
            max_rows: limits.max_step_rows,
            kv_format: config.kv_format,
        };
        let attention = backend
            .follower(&bytes.weights(), sizes)
            .map_err(Error::Backend)?;
        Ok(Self {
            backend: Arc::new(backend),
            device: Arc::clone(gpu),
            attention,
        })
    }
}

/// A rank between its leaders.
#[derive(Debug)]
struct Rank {
    leader: String,
    link: Link,
    hello: v1::RankHello,
    message_bytes: usize,
    orders: Orders,
    ready: ReadinessSetter,
}

impl Rank {
    async fn run(self, stop: &CancellationToken) {
        loop {
            self.ready.set(Err("there is no leader".to_owned()));
            let ended = tokio::select! {
                ended = self.follow() => ended,
                () = stop.cancelled() => break,
            };
            self.orders.part();
            tracing::warn!(
                leader = self.leader,
                why = ended,
                "the leader is not followed"
            );
            tokio::select! {
                () = tokio::time::sleep(CONNECT_PAUSE) => {}
                () = stop.cancelled() => break,
            }
        }
        self.orders.part();
        if timeout(STOP_MAX, self.orders.end()).await.is_err() {
            tracing::warn!("calls did not end in time");
        }
    }

    /// Follows until the leader is lost; why it is.
    async fn follow(&self) -> String {
        let (said, queue) = mpsc::channel(QUEUE_MAX);
        let hello = wire::rank(Said::Hello(self.hello.clone()));
        // There is room: it is the first one.
        let _empty = said.try_send(hello);
        let connected = timeout(CONNECT_MAX, self.connect(queue)).await;
        let mut messages = match connected {
            Ok(Ok(messages)) => messages,
            Ok(Err(why)) => return why,
            Err(_late) => return format!("no answer within {CONNECT_MAX:?}"),
        };
        tracing::info!(leader = self.leader, "following");
        let mut heard = Instant::now();
        let mut ticks = interval(BEAT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                message = messages.next() => {
                    heard = Instant::now();
                    let kind = match message {
                        Some(Ok(v1::LeadMessage { kind: Some(kind) })) => kind,
                        Some(Ok(_)) => return "a message that says nothing".to_owned(),
                        Some(Err(status)) => return status.message().to_owned(),
                        None => return "the leader has ended the stream".to_owned(),
                    };
                    if let Err(why) = self.on_message(kind, &said) {
                        return why;
                    }
                }
                _at = ticks.tick() => {
                    if heard.elapsed() > SILENCE_MAX {
                        return format!("the leader has said nothing for {SILENCE_MAX:?}");
                    }
                    if said.try_send(wire::rank(Said::Beat(v1::RankBeat {}))).is_err() {
                        return "the leader reads nothing".to_owned();
                    }
                    self.ready.set(self.orders.is_formed());
                }
            }
        }
    }

    async fn connect(
        &self,
        queue: mpsc::Receiver<v1::RankMessage>,
    ) -> Result<Streaming<v1::LeadMessage>, String> {
        let endpoint = Endpoint::from_shared(format!("http://{}", self.leader));
        let endpoint = endpoint.map_err(|error| error.to_string())?;
        let channel = self.link.connect(&endpoint).await;
        let channel = channel.map_err(|error| error.to_string())?;
        let mut client = IslandClient::new(channel)
            .max_decoding_message_size(self.message_bytes)
            .max_encoding_message_size(self.message_bytes);
        let followed = client.follow(ReceiverStream::new(queue)).await;
        let followed = followed.map_err(|status| status.message().to_owned())?;
        Ok(followed.into_inner())
    }

    fn on_message(&self, kind: Kind, said: &mpsc::Sender<v1::RankMessage>) -> Result<(), String> {
        match kind {
            Kind::Form(form) => self.orders.form(form, said.clone()),
            Kind::Step(step) => return self.orders.step(step, said.clone()),
            Kind::Load(load) => return self.orders.load(load, said.clone()),
            Kind::Unload(unload) => return self.orders.unload(unload),
            Kind::Call(call) => return self.orders.call(call, said.clone()),
            Kind::Part(part) => self.orders.part_from(part.epoch),
            Kind::Beat(_) => {}
        }
        Ok(())
    }
}
