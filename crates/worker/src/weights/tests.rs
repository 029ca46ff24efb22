//! Peers over real sockets: good ones, and each way of not giving what was asked for.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures::{Stream, StreamExt as _, stream};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::{Server, server::TcpIncoming};
use tonic::{Request, Response, Status};
use tramontane_coordination::registry::RECORD_SCHEMA;
use tramontane_coordination::{
    Measured, Members, ModelFacts, Roles, WorkerLoad, WorkerRecord, WorkerState,
};
use tramontane_model::{Checkpoint, Part, Source};
use tramontane_proto::v1::weights_server::{Weights, WeightsServer};
use tramontane_proto::v1::{self, weights_chunk::Kind};
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::{Epoch, WorkerId};

use super::*;
use crate::config::WEIGHTS_RATE;

const CLUSTER: &str = "c";

/// A checkpoint, and servers that say that they have it.
struct Scene {
    folder: TempDir,
    checkpoint: Arc<Checkpoint>,
    members: watch::Sender<Arc<Members>>,
    stats: Arc<WeightStats>,
    ended: CancellationToken,
    tasks: TaskTracker,
}

/// How a peer does not give what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// A byte is another one than the digest was made of.
    Byte,
    /// The stream ends early, and well.
    Short,
    /// More comes than was asked for.
    Long,
    /// It breaks off.
    Broken,
    /// What should be a digest is a megabyte.
    Digest,
}

/// A peer that lies about every range.
#[derive(Clone, Debug)]
struct Liar {
    inner: WeightsService,
    lie: Lie,
}

type Chunks = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

fn data(bytes: Vec<u8>) -> v1::WeightsChunk {
    v1::WeightsChunk {
        kind: Some(Kind::Data(bytes.into())),
    }
}

#[tonic::async_trait]
impl Weights for Liar {
    type ReadWeightsStream = Chunks;

    async fn describe_checkpoint(
        &self,
        request: Request<v1::DescribeCheckpointRequest>,
    ) -> Result<Response<v1::CheckpointDescription>, Status> {
        self.inner.describe_checkpoint(request).await
    }

    async fn read_weights(
        &self,
        request: Request<v1::ReadWeightsRequest>,
    ) -> Result<Response<Chunks>, Status> {
        let whole = self.inner.read_weights(request).await?.into_inner();
        let mut chunks: Vec<Result<v1::WeightsChunk, Status>> = whole.collect().await;
        let first = match &chunks[0].as_ref().unwrap().kind {
            Some(Kind::Data(bytes)) => bytes.to_vec(),
            other => panic!("{other:?} came first"),
        };
        match self.lie {
            Lie::Byte => {
                let mut bytes = first;
                bytes[0] ^= 1;
                chunks[0] = Ok(data(bytes));
            }
            Lie::Short => {
                chunks.truncate(1);
                chunks[0] = Ok(data(first[1..].to_vec()));
            }
            Lie::Long => chunks.insert(1, Ok(data(vec![0]))),
            Lie::Broken => {
                chunks.truncate(1);
                chunks.push(Err(Status::unavailable("broken off")));
            }
            Lie::Digest => {
                chunks.pop();
                let kind = Some(Kind::Sha256(vec![0xab; 1 << 20]));
                chunks.push(Ok(v1::WeightsChunk { kind }));
            }
        }
        Ok(Response::new(Box::pin(stream::iter(chunks))))
    }
}

impl Scene {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = TinyModel::mixtral().experts(4).hidden(64).ff(256).shards(2);
        model.write(folder.path()).unwrap();
        let checkpoint = Arc::new(Checkpoint::open(folder.path()).unwrap());
        Self {
            folder,
            checkpoint,
            members: watch::Sender::new(Arc::default()),
            stats: Arc::default(),
            ended: CancellationToken::new(),
            tasks: TaskTracker::new(),
        }
    }

    fn service(&self, checkpoint: &Arc<Checkpoint>) -> WeightsService {
        WeightsService::new(WeightsServing {
            me: WorkerId::new("peer"),
            cluster: CLUSTER.to_owned(),
            checkpoint: Arc::clone(checkpoint),
            vocabulary: None,
            rate: WEIGHTS_RATE,
            stats: Arc::default(),
            ended: self.ended.clone(),
            tasks: self.tasks.clone(),
        })
    }

    /// A member that serves `service`, and what ends it.
    async fn serve<S: Weights>(&self, id: &str, service: WeightsServer<S>) -> CancellationToken {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        self.list(id, &listener.local_addr().unwrap().to_string());
        let stop = self.ended.child_token();
        let server = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(
                TcpIncoming::from(listener),
                stop.clone().cancelled_owned(),
            );
        self.tasks.spawn(server);
        stop
    }

    async fn honest(&self, id: &str) -> CancellationToken {
        let service = self.service(&self.checkpoint).into_service();
        self.serve(id, service).await
    }

    async fn liar(&self, id: &str, lie: Lie) {
        let inner = self.service(&self.checkpoint);
        self.serve(id, WeightsServer::new(Liar { inner, lie }))
            .await;
    }

    fn list(&self, id: &str, address: &str) {
        let mut workers: BTreeMap<_, _> = self.members.borrow().workers.clone();
        let record = record(id, address, self.checkpoint.fingerprint());
        workers.insert(record.id.clone(), Arc::new(record));
        self.members.send_replace(Arc::new(Members {
            workers,
            synced: true,
            ..Members::default()
        }));
    }

    fn peers(&self) -> Arc<PeerWeights> {
        self.peers_of(CLUSTER)
    }

    fn peers_of(&self, cluster: &str) -> Arc<PeerWeights> {
        let asker = v1::WeightsAsker {
            worker_id: "me".to_owned(),
            cluster: cluster.to_owned(),
            model: self.checkpoint.fingerprint().to_owned(),
        };
        let (members, stats) = (self.members.subscribe(), Arc::clone(&self.stats));
        let link = tramontane_runtime::tls::Link::default();
        Arc::new(PeerWeights::new(
            asker,
            link,
            members,
            stats,
            self.ended.clone(),
        ))
    }

    /// The first bytes of a file, as peers give them.
    async fn read(&self, peers: &Arc<PeerWeights>, len: usize) -> Result<Vec<u8>, String> {
        let (peers, file) = (Arc::clone(peers), self.file());
        let read = move || {
            let mut out = vec![0; len];
            let part = Part::whole(&file, "lm_head.weight", 0, len);
            peers.read(&part, &mut out).map(|()| out)
        };
        let read = tokio::task::spawn_blocking(read).await.unwrap();
        read.map_err(|error| {
            let source = std::error::Error::source(&error).unwrap();
            format!("{error}: {source}")
        })
    }

    fn file(&self) -> String {
        self.checkpoint.describe().files[0].name.clone()
    }

    fn expected(&self, len: usize) -> Vec<u8> {
        let mut bytes = std::fs::read(self.folder.path().join(self.file())).unwrap();
        bytes.truncate(len);
        bytes
    }
}

pub(super) fn record(id: &str, address: &str, model: &str) -> WorkerRecord {
    WorkerRecord {
        schema: RECORD_SCHEMA,
        id: WorkerId::new(id),
        address: address.to_owned(),
        socket: None,
        roles: Roles::default(),
        capacity_bytes: 0,
        segment_bytes: 1,
        numeric_class: "cpu-q8".to_owned(),
        model: ModelFacts {
            fingerprint: model.to_owned(),
            name: "tiny".to_owned(),
            num_layers: 1,
            num_experts: 1,
            num_segments: 8,
        },
        state: WorkerState::Ready,
        loaded: Epoch(0),
        incarnation: 1,
        started_ms: 1,
        version: "0".to_owned(),
        load: WorkerLoad::default(),
        measured: Measured::default(),
        sequences_max: 0,
        part: None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_come_in_chunks_and_a_peer_that_does_not_give_them_is_left_for_another() {
    for lie in [Lie::Byte, Lie::Short, Lie::Long, Lie::Broken] {
        let scene = Scene::new();
        scene.liar("a-liar", lie).await;
        scene.honest("b").await;
        let peers = scene.peers();
        let len = CHUNK_BYTES_MAX + 17;
        // The turn goes round: at least one of two begins with the liar.
        for _ in 0..2 {
            let read = scene.read(&peers, len).await.unwrap();
            assert!(read == scene.expected(len), "{lie:?}");
        }
        assert_eq!(scene.stats.failed.load(Ordering::Relaxed), 1, "{lie:?}");
        let received = scene.stats.received.load(Ordering::Relaxed);
        assert_eq!(received, 2 * len as u64, "what was wrong is not counted");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_gives_is_an_error_that_says_who_what_expected_and_got() {
    for (lie, part) in [
        (Lie::Byte, "sha-256 is "),
        (Lie::Short, "ended after 99 bytes, expected 100"),
        (Lie::Long, "more than the 100 bytes"),
        (Lie::Broken, "Unavailable: broken off"),
        (Lie::Digest, "expected abab"),
    ] {
        let scene = Scene::new();
        scene.liar("liar", lie).await;
        let error = scene.read(&scene.peers(), 100).await.unwrap_err();
        for part in [
            part,
            "liar at 127.0.0.1:",
            "tensor lm_head.weight",
            &scene.file(),
        ] {
            assert!(
                error.contains(part),
                "{lie:?}: {error:?} does not say {part:?}"
            );
        }
        assert!(error.len() < 1000, "{lie:?}: {} bytes", error.len());
        let tried = scene.stats.failed.load(Ordering::Relaxed);
        assert_eq!(tried as usize, client::ATTEMPTS_MAX);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_is_gone_is_left_for_another() {
    let scene = Scene::new();
    let stop = scene.honest("a").await;
    let peers = scene.peers();
    assert!(scene.read(&peers, 1000).await.is_ok());
    stop.cancel();
    // Listed still: its lease has not ended.
    scene.honest("b").await;
    for _ in 0..3 {
        assert!(scene.read(&peers, 1000).await.unwrap() == scene.expected(1000));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn others_get_nothing_and_nobody_gives_what_is_not_there() {
    let scene = Scene::new();
    scene.honest("a").await;
    let error = scene.read(&scene.peers_of("other"), 10).await.unwrap_err();
    assert!(
        error.contains("cluster is \"other\", expected \"c\""),
        "{error}"
    );

    let alone = Scene::new();
    let error = alone.read(&alone.peers(), 10).await.unwrap_err();
    assert!(error.contains("no other worker with model"), "{error}");

    // A worker that itself has no files: what it holds is packed.
    let borrowed = {
        let (peers, description) = (scene.peers(), scene.checkpoint.describe());
        let open = move || Checkpoint::open_described(&description, None, peers);
        Arc::new(tokio::task::spawn_blocking(open).await.unwrap().unwrap())
    };
    let second = Scene::new();
    let service = second.service(&borrowed).into_service();
    second.serve("empty", service).await;
    let error = second.read(&second.peers(), 10).await.unwrap_err();
    assert!(
        error.contains("NotFound") && error.contains("not here"),
        "{error}"
    );
}

#[tokio::test]
async fn a_request_beyond_its_limits_is_refused() {
    let scene = Scene::new();
    let service = scene.service(&scene.checkpoint);
    let refused = async |change: fn(&mut v1::ReadWeightsRequest)| {
        let mut request = v1::ReadWeightsRequest {
            asker: Some(scene.peers().asker()),
            file: scene.file(),
            tensor: "t".to_owned(),
            begin: 0,
            piece_bytes: 16,
            stride: 16,
            pieces: 2,
        };
        change(&mut request);
        match service.read_weights(Request::new(request)).await {
            Err(status) => status.code(),
            Ok(answer) => {
                let first = answer.into_inner().next().await.unwrap();
                first.map_or_else(|status| status.code(), |_chunk| Code::Ok)
            }
        }
    };
    use tonic::Code;
    type Change = fn(&mut v1::ReadWeightsRequest);
    let cases: [(Change, Code); 11] = [
        (|_| {}, Code::Ok),
        (|r| r.asker = None, Code::InvalidArgument),
        (|r| r.pieces = 0, Code::InvalidArgument),
        (|r| r.pieces = 1 << 20, Code::InvalidArgument),
        (|r| r.stride = 15, Code::InvalidArgument),
        (|r| r.piece_bytes = u64::MAX, Code::InvalidArgument),
        (
            |r| r.piece_bytes = RANGE_BYTES_MAX as u64,
            Code::InvalidArgument,
        ),
        (|r| r.begin = u64::MAX - 8, Code::OutOfRange),
        (|r| r.stride = u64::MAX / 2, Code::OutOfRange),
        (|r| r.file = "../secret".to_owned(), Code::NotFound),
        // Whoever answers would have to repeat it.
        (|r| r.file = "x".repeat(20_000), Code::InvalidArgument),
    ];
    for (change, expected) in cases {
        assert_eq!(refused(change).await, expected);
    }
}

#[tokio::test]
async fn more_transfers_than_places_wait_and_more_than_may_wait_are_refused() {
    let scene = Scene::new();
    let service = scene.service(&scene.checkpoint);
    let mut places = Vec::new();
    for _ in 0..TRANSFERS_MAX {
        places.push(service.take_place().await.unwrap());
    }
    let waiting: Vec<_> = (0..TRANSFERS_WAITING_MAX)
        .map(|_| {
            let service = service.clone();
            scene
                .tasks
                .spawn(async move { service.take_place().await.map(drop) })
        })
        .collect();
    while service.has_room() {
        tokio::task::yield_now().await;
    }
    let refused = service.take_place().await.map(drop).unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    drop(places);
    for waiting in waiting {
        waiting.await.unwrap().unwrap();
    }
}
