//! Workers of one process, and a planner's hand that publishes placements. Never sleeps for a fixed time.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tramontane_compute::WeightFormat;
use tramontane_coordination::planner::{Intent, intent, set_intent};
use tramontane_coordination::store::keys;
use tramontane_coordination::{Entry, MemoryStore, Store, Version, WorkerRecord};
use tramontane_exchange::LocalTransport;
use tramontane_model::Checkpoint;
use tramontane_proto::v1::{self, sequence_event::Kind, worker_client::WorkerClient};
use tramontane_runtime::Shutdown;
use tramontane_runtime::tls::{Link, Tls};
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::{Epoch, Placement, SamplingParams, SegmentRange, SliceHolders, WorkerId};
use tramontane_worker::{
    Error, ExchangeKind, PeerModel, PeerOpened, ProcessKind, WorkerConfig, WorkerParts,
    open_from_peers, run,
};

/// How long a condition may take to come true.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Experts of the test model.
pub(crate) const EXPERTS: usize = 4;
/// Its context: a sequence of this length outlasts what a test does meanwhile.
pub(crate) const POSITIONS: usize = 16_384;
/// Its vocabulary.
pub(crate) const VOCAB: u32 = 97;

/// Two layers of four experts of eight segments; written once per process.
pub(crate) fn checkpoint() -> Arc<Checkpoint> {
    Arc::clone(&written().0)
}

/// Where it lies.
pub(crate) fn checkpoint_dir() -> &'static Path {
    written().1.path()
}

fn written() -> &'static (Arc<Checkpoint>, tempfile::TempDir) {
    static SHARED: OnceLock<(Arc<Checkpoint>, tempfile::TempDir)> = OnceLock::new();
    SHARED.get_or_init(|| {
        let directory = new_files();
        (
            Arc::new(Checkpoint::open(directory.path()).unwrap()),
            directory,
        )
    })
}

/// The files of the test model.
pub(crate) fn new_files() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let model = TinyModel::mixtral().experts(EXPERTS).hidden(64).ff(256);
    let model = model.max_positions(POSITIONS);
    model.write(directory.path()).unwrap();
    directory
}

/// How the workers of a cluster reach each other's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Carrier {
    Local,
    Grpc,
}

/// One worker that runs.
pub(crate) struct Running {
    pub(crate) client: WorkerClient<Channel>,
    pub(crate) channel: Channel,
    pub(crate) shutdown: Shutdown,
    pub(crate) ended: JoinHandle<Result<(), Error>>,
}

/// Workers that share a store.
pub(crate) struct Cluster {
    pub(crate) store: Arc<dyn Store>,
    carrier: Carrier,
    hub: Arc<LocalTransport>,
    pub(crate) workers: BTreeMap<String, Running>,
    epoch: u64,
}

/// Settings for tests: one thread, small pages, quick leases and drops.
pub(crate) fn config(id: &str, weights: WeightFormat) -> WorkerConfig {
    WorkerConfig {
        id: id.to_owned(),
        weights,
        threads: Some(NonZeroUsize::MIN),
        expert_memory: Some(1 << 30),
        num_pages: NonZeroUsize::new(512),
        max_running: 32,
        lease_ttl: Duration::from_secs(2),
        drain_deadline: PATIENCE,
        drop_grace: Duration::from_millis(100),
        ..WorkerConfig::default()
    }
}

/// Cuts and holders of one expert: `(begin, end, holders)`.
pub(crate) type Cuts = Vec<(u8, u8, Vec<u16>)>;

impl Cluster {
    pub(crate) fn new(carrier: Carrier) -> Self {
        Self::with_store(carrier, Arc::new(MemoryStore::new()))
    }

    pub(crate) fn with_store(carrier: Carrier, store: Arc<dyn Store>) -> Self {
        let (hub, workers) = (Arc::new(LocalTransport::new()), BTreeMap::new());
        Self {
            store,
            carrier,
            hub,
            workers,
            epoch: 0,
        }
    }

    /// Starts a worker and waits until it has registered.
    pub(crate) async fn start(&mut self, config: WorkerConfig) {
        self.start_with_ops(config, None).await;
    }

    pub(crate) async fn start_with_ops(&mut self, config: WorkerConfig, ops: Option<TcpListener>) {
        self.start_with(config, ops, checkpoint()).await;
    }

    /// Starts a worker with the checkpoint that the others have.
    pub(crate) async fn start_from_peers(&mut self, config: WorkerConfig) {
        let checkpoint = self.checkpoint_of_peers(&config).await;
        self.start_with(config, None, checkpoint).await;
    }

    /// The checkpoint that the others have, of which nothing is here.
    pub(crate) async fn checkpoint_of_peers(&self, config: &WorkerConfig) -> Arc<Checkpoint> {
        let wish = PeerModel {
            link: Link::default(),
            store: Arc::clone(&self.store),
            cluster: config.cluster.clone(),
            id: config.id.clone(),
            name: None,
            directory: None,
        };
        let opened = open_from_peers(wish, CancellationToken::new()).await;
        let PeerOpened {
            checkpoint, name, ..
        } = opened.unwrap().unwrap();
        assert_eq!((checkpoint.files_here().0, name.as_str()), (0, "tiny"));
        Arc::new(checkpoint)
    }

    pub(crate) async fn start_with(
        &mut self,
        config: WorkerConfig,
        ops: Option<TcpListener>,
        checkpoint: Arc<Checkpoint>,
    ) {
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.start_at(config, ops, (grpc, checkpoint)).await;
    }

    /// Starts a worker where others know it to be.
    pub(crate) async fn start_at(
        &mut self,
        config: WorkerConfig,
        ops: Option<TcpListener>,
        (grpc, checkpoint): (TcpListener, Arc<Checkpoint>),
    ) {
        let id = config.id.clone();
        let address = grpc.local_addr().unwrap();
        let parts = WorkerParts {
            tls: Tls::default(),
            store: Arc::clone(&self.store),
            checkpoint,
            model_name: "tiny".to_owned(),
            vocabulary: None,
            grpc,
            ops,
            progress: None,
            exchange: match self.carrier {
                Carrier::Local => ExchangeKind::Local(Arc::clone(&self.hub)),
                Carrier::Grpc => ExchangeKind::Grpc,
            },
            process: ProcessKind::Shared,
        };
        let shutdown = Shutdown::new();
        let ended = shutdown.tasks.spawn(run(config, parts, shutdown.clone()));
        let channel = Channel::from_shared(format!("http://{address}"))
            .unwrap()
            .connect_lazy();
        let client = WorkerClient::new(channel.clone());
        self.workers.insert(
            id.clone(),
            Running {
                client,
                channel,
                shutdown,
                ended,
            },
        );
        eventually("the worker registers", async || {
            self.record(&id).await.is_some()
        })
        .await;
    }

    pub(crate) async fn record(&self, id: &str) -> Option<WorkerRecord> {
        let entry = self
            .store
            .get(&format!("{}{id}", keys::WORKERS))
            .await
            .unwrap()?;
        Some(WorkerRecord::decode(&entry).unwrap())
    }

    /// A placement of the next epoch in which `cut` says how each expert is held.
    pub(crate) async fn placement(
        &mut self,
        workers: &[&str],
        cut: impl Fn(usize) -> Cuts,
    ) -> Placement {
        self.epoch += 1;
        let (checkpoint, any) = (checkpoint(), self.workers.keys().next().unwrap());
        let geometry = checkpoint.geometry();
        let experts = (0..geometry.num_layers * geometry.num_experts).map(|index| {
            let slice = |(begin, end, holders): (u8, u8, Vec<u16>)| SliceHolders {
                range: SegmentRange::new(begin, end).unwrap(),
                holders,
            };
            cut(index).into_iter().map(slice).collect()
        });
        let placement = Placement {
            epoch: Epoch(self.epoch),
            numeric_class: self.record(any).await.unwrap().numeric_class,
            model: checkpoint.fingerprint().to_owned(),
            num_layers: geometry.num_layers,
            num_experts: geometry.num_experts,
            workers: workers.iter().map(|id| WorkerId::new(id)).collect(),
            experts: experts.collect(),
        };
        placement.validate().unwrap();
        placement
    }

    /// Publishes a placement, whether anybody can load it or not.
    pub(crate) async fn put(&self, placement: &Placement) {
        let value = Bytes::from(serde_json::to_vec(placement).unwrap());
        let key = Version::of_placement(placement).key().published();
        self.store.put(&key, value, None).await.unwrap();
    }

    /// What the operator wants, from now on.
    pub(crate) async fn want(&self, change: impl FnOnce(&mut Intent)) {
        let (mut wish, revision) = intent(&*self.store).await.unwrap();
        change(&mut wish);
        set_intent(&*self.store, &wish, revision).await.unwrap();
    }

    /// Both phases of a change: pending, loaded by all its workers, published, served on by all.
    pub(crate) async fn publish(&mut self, workers: &[&str], cut: impl Fn(usize) -> Cuts) {
        let placement = self.placement(workers, cut).await;
        let value = Bytes::from(serde_json::to_vec(&placement).unwrap());
        let group = Version::of_placement(&placement).key();
        let (published, pending) = (group.published(), group.pending());
        self.store.put(&pending, value.clone(), None).await.unwrap();
        for id in workers {
            let loaded = async || self.record(id).await.unwrap().loaded >= placement.epoch;
            eventually("the pending slices are loaded", loaded).await;
        }
        self.store.put(&published, value, None).await.unwrap();
        self.store.delete(&pending).await.unwrap();
        for id in self.workers.keys() {
            // One that leaves may be gone by now.
            let record = self.record(id).await;
            if !record.is_some_and(|record| record.state.is_staying()) {
                continue;
            }
            let serves = async || self.status(id).await.epoch == placement.epoch.0;
            eventually("the placement is served on", serves).await;
            eventually("the worker is not joining any more", async || {
                self.status(id).await.state != "joining"
            })
            .await;
        }
    }

    pub(crate) async fn status(&self, id: &str) -> v1::WorkerStatus {
        let mut client = self.workers[id].client.clone();
        client
            .status(v1::WorkerStatusRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Starts a sequence on one worker.
    pub(crate) async fn generate(
        &self,
        id: &str,
        request: v1::GenerateSequenceRequest,
    ) -> Result<Streaming<v1::SequenceEvent>, Status> {
        let mut client = self.workers[id].client.clone();
        Ok(client.generate(request).await?.into_inner())
    }

    /// Runs all requests at once on one worker; what they said, in the order of the requests.
    pub(crate) async fn generate_all(
        &self,
        id: &str,
        requests: &[v1::GenerateSequenceRequest],
    ) -> Vec<Said> {
        let mut running = JoinSet::new();
        for (index, request) in requests.iter().cloned().enumerate() {
            let mut client = self.workers[id].client.clone();
            running.spawn(async move {
                let stream = client.generate(request).await.unwrap().into_inner();
                (index, Said::read(stream).await.unwrap())
            });
        }
        let mut said = running.join_all().await;
        said.sort_by_key(|(index, _)| *index);
        said.into_iter().map(|(_, said)| said).collect()
    }

    /// Stops all workers at once; all must end well.
    pub(crate) async fn stop(mut self) {
        let workers = std::mem::take(&mut self.workers);
        for worker in workers.values() {
            worker.shutdown.trigger();
        }
        for (_, worker) in workers {
            worker.ended.await.unwrap().unwrap();
        }
        let left = self.store.list(keys::WORKERS).await.unwrap().entries;
        assert_eq!(left, Vec::<Entry>::new(), "stopped workers deregister");
    }
}

/// Ids and log probabilities of the best tokens.
type Top = Vec<(u32, u32)>;

/// Everything that a sequence said, in bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) ids: Vec<u32>,
    /// Of each token: its own log probability and the best ones with their ids.
    pub(crate) logprobs: Vec<(Option<u32>, Top)>,
    pub(crate) finish: Option<i32>,
}

impl Said {
    /// Reads a stream to its end.
    pub(crate) async fn read(mut stream: Streaming<v1::SequenceEvent>) -> Result<Self, Status> {
        let mut said = Self::default();
        while let Some(event) = stream.message().await? {
            said.note(event);
        }
        Ok(said)
    }

    pub(crate) fn note(&mut self, event: v1::SequenceEvent) {
        match event.kind.unwrap() {
            Kind::Started(_) | Kind::PromptTokens(_) => {}
            Kind::Tokens(tokens) => {
                for token in tokens.tokens {
                    assert_eq!(token.index as usize, self.ids.len(), "no gaps");
                    self.ids.push(token.id);
                    let top = |t: &v1::TopLogprob| (t.id, t.logprob.to_bits());
                    let top = token.top_logprobs.iter().map(top).collect();
                    self.logprobs.push((token.logprob.map(f32::to_bits), top));
                }
            }
            Kind::Finished(finished) => {
                assert_eq!(
                    finished.usage.unwrap().completion_tokens as usize,
                    self.ids.len()
                );
                self.finish = Some(finished.reason);
            }
        }
    }
}

/// A request with log probabilities.
pub(crate) fn request(
    id: &str,
    prompt_ids: Vec<u32>,
    params: &SamplingParams,
) -> v1::GenerateSequenceRequest {
    v1::GenerateSequenceRequest {
        request_id: id.to_owned(),
        prompt_ids,
        sampling: Some(params.into()),
        num_resumed: 0,
        ..v1::GenerateSequenceRequest::default()
    }
}

/// A prompt of `len` pseudo-random tokens.
pub(crate) fn prompt(seed: u32, len: usize) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        3 + (state >> 8) % (VOCAB - 3)
    };
    (0..len).map(next).collect()
}

/// Waits until the condition holds.
pub(crate) async fn eventually(what: &str, condition: impl AsyncFn() -> bool) {
    let begin = Instant::now();
    while !condition().await {
        assert!(
            begin.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Every expert whole on one worker, in turn.
pub(crate) fn split(num_workers: usize) -> impl Fn(usize) -> Cuts {
    move |index| vec![(0, 8, vec![(index % num_workers) as u16])]
}
