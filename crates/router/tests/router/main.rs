//! A whole router over loopback with scripted workers: what clients see when all is well, and when not.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must end"
)]

mod answers;
mod auth;
mod calls;
mod constraints;
mod disconnect;
mod doors;
mod failover;
mod health;
mod held;
mod idempotency;
mod limits;
mod losses;
mod messages;
mod operators;
mod responses;
mod resume;
mod stopping;
mod tenants;
mod texts;
mod tools;
mod traces;
mod versions;

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Channel;
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_types::StatusExt as _;
use tramontane_coordination::planner;
use tramontane_coordination::registry::RECORD_SCHEMA;
use tramontane_coordination::store::keys;
use tramontane_coordination::{
    Measured, MemoryStore, ModelFacts, Placements, Roles, Scope, Store, Version, WorkerLoad,
    WorkerRecord, WorkerState, watch_placements,
};
use tramontane_proto::v1;
use tramontane_proto::v1::admin_client::AdminClient;
use tramontane_proto::v1::inference_client::InferenceClient;
use tramontane_proto::v1::sequence_event::Kind;
use tramontane_proto::v1::worker_server::{Worker, WorkerServer};
use tramontane_router::{
    PolicyKind, RouterConfig, RouterParts, ScaleError, ScaleStarted, Scaler, ServedModel, run,
};
use tramontane_runtime::Shutdown;
use tramontane_runtime::tls::{Link, Tls, install_provider};
use tramontane_tokenizer::Tokenizer;
use tramontane_types::{Epoch, Placement, SegmentRange, SliceHolders, WorkerId};

/// Nothing here takes this long unless it is broken.
const PATIENCE: Duration = Duration::from_secs(20);
const TEXT: &str = "Hello world, this is a story about the sea";

// ---- a scripted worker ----

#[derive(Clone)]
enum Step {
    Started(u32),
    Token(u32),
    /// In one message.
    Tokens(Vec<u32>),
    /// What was asked for about these tokens of the prompt, whose first has this position.
    PromptTokens(u32, Vec<u32>),
    Finish(v1::FinishReason),
    /// Goes on when the test gives a permit.
    Gate(Arc<Semaphore>),
    Break,
    Fail(Status),
    Hang,
}

type Script = Arc<dyn Fn(&v1::GenerateSequenceRequest) -> Result<Vec<Step>, Status> + Send + Sync>;

#[derive(Clone)]
struct FakeWorker {
    script: Script,
    seen: Arc<Mutex<Vec<v1::GenerateSequenceRequest>>>,
    /// The span that each of them was said to be part of.
    parents: Arc<Mutex<Vec<String>>>,
    open: Arc<AtomicUsize>,
    drains: Arc<AtomicUsize>,
    /// Whether it gives no sign of life.
    is_dead: Arc<AtomicBool>,
}

struct OpenStream(Arc<AtomicUsize>);

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Tokens with log probabilities of their own, as many as asked for.
fn sampled(index: &mut u32, ids: &[u32], top: Option<u32>) -> v1::SampledTokens {
    let mut tokens = Vec::new();
    for &id in ids {
        let logprob = -0.5 - *index as f32 / 8.0;
        let best = |n| {
            (0..n).map(|i| v1::TopLogprob {
                id: id + i,
                logprob,
            })
        };
        tokens.push(v1::SampledToken {
            index: *index,
            id,
            logprob: top.map(|_| logprob),
            top_logprobs: top.map_or_else(Vec::new, |n| best(n).collect()),
        });
        *index += 1;
    }
    v1::SampledTokens { tokens }
}

#[tonic::async_trait]
impl Worker for FakeWorker {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::SequenceEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateSequenceRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        if let Some(parent) = request.metadata().get("traceparent") {
            self.parents
                .lock()
                .push(parent.to_str().unwrap().to_owned());
        }
        let request = request.into_inner();
        let steps = (self.script)(&request);
        let index = request.num_resumed;
        let sampling = request.sampling.as_ref();
        let top = sampling.and_then(|s| s.logprobs);
        let prompt_top = sampling.and_then(|s| s.prompt_logprobs);
        self.seen.lock().push(request);
        self.open.fetch_add(1, Ordering::SeqCst);
        let open = OpenStream(Arc::clone(&self.open));
        let state = (VecDeque::from(steps?), index, open);
        let events =
            futures::stream::unfold(state, move |(mut steps, mut index, open)| async move {
                loop {
                    let event = match steps.pop_front()? {
                        Step::Started(cached_tokens) => {
                            Ok(Kind::Started(v1::SequenceStarted { cached_tokens }))
                        }
                        Step::Token(id) => Ok(Kind::Tokens(sampled(&mut index, &[id], top))),
                        Step::Tokens(ids) => Ok(Kind::Tokens(sampled(&mut index, &ids, top))),
                        Step::PromptTokens(mut at, ids) => {
                            Ok(Kind::PromptTokens(sampled(&mut at, &ids, prompt_top)))
                        }
                        Step::Finish(reason) => {
                            let finished = v1::SequenceFinished {
                                reason: reason as i32,
                                usage: None,
                            };
                            Ok(Kind::Finished(finished))
                        }
                        Step::Gate(gate) => {
                            gate.acquire().await.unwrap().forget();
                            continue;
                        }
                        Step::Break => Err(Status::unavailable("broken by the test")),
                        Step::Fail(status) => Err(status),
                        Step::Hang => std::future::pending().await,
                    };
                    let event = event.map(|kind| v1::SequenceEvent { kind: Some(kind) });
                    return Some((event, (steps, index, open)));
                }
            });
        Ok(Response::new(Box::pin(events)))
    }

    async fn status(
        &self,
        _request: Request<v1::WorkerStatusRequest>,
    ) -> Result<Response<v1::WorkerStatus>, Status> {
        if self.is_dead.load(Ordering::SeqCst) {
            return Err(Status::unavailable("dead"));
        }
        Ok(Response::new(v1::WorkerStatus::default()))
    }

    async fn drain(
        &self,
        _request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        self.drains.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(v1::DrainResponse {}))
    }

    /// Allows slow drills only, and reports what it was asked for.
    async fn drill(
        &self,
        request: Request<v1::DrillRequest>,
    ) -> Result<Response<v1::DrillReport>, Status> {
        let asked = request.into_inner();
        match asked.kind() {
            v1::DrillKind::Slow => Ok(Response::new(v1::DrillReport {
                running: asked.kind,
                steps_delayed: asked.delay_ms.into(),
                ..v1::DrillReport::default()
            })),
            v1::DrillKind::Partition => Err(Status::internal("broken by the test")),
            _ => Err(Status::failed_precondition("drills are off")),
        }
    }
}

impl FakeWorker {
    /// Serves until `servers` is dropped; the address.
    async fn serve(self, servers: &mut tokio::task::JoinSet<()>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        servers.spawn(async move {
            let server = tonic::transport::Server::builder().add_service(WorkerServer::new(self));
            server
                .serve_with_incoming(TcpIncoming::from(listener))
                .await
                .unwrap();
        });
        address
    }
}

// ---- a router with workers ----

struct Scene {
    tokenizer: Arc<Tokenizer>,
    http: String,
    grpc: String,
    admin: String,
    client: reqwest::Client,
    shutdown: Shutdown,
    running: JoinHandle<Result<(), tramontane_router::Error>>,
    workers: Vec<FakeWorker>,
    /// The gRPC servers of the workers end with it.
    _servers: tokio::task::JoinSet<()>,
    store: Arc<dyn Store>,
}

fn tokenizer() -> Arc<Tokenizer> {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
    Arc::new(Tokenizer::from_dir(std::path::Path::new(dir)).unwrap())
}

/// An HTTP client; the process needs a choice of cryptography for that, though nothing here is encrypted.
fn client() -> reqwest::Client {
    install_provider();
    reqwest::Client::new()
}

fn config() -> RouterConfig {
    RouterConfig {
        planner: false,
        policy: PolicyKind::LeastLoad,
        unready_grace: Duration::from_millis(50),
        failover_wait: Duration::from_millis(500),
        hold_wait: Duration::ZERO,
        ..RouterConfig::default()
    }
}

fn record(id: &str, address: String) -> WorkerRecord {
    WorkerRecord {
        schema: RECORD_SCHEMA,
        id: WorkerId::new(id),
        address,
        socket: None,
        roles: Roles {
            attention: true,
            experts: true,
        },
        capacity_bytes: 1 << 20,
        segment_bytes: 1 << 10,
        numeric_class: "cpu-q8".to_owned(),
        model: ModelFacts {
            fingerprint: "f".to_owned(),
            name: "demo".to_owned(),
            num_layers: 1,
            num_experts: 1,
            num_segments: 8,
        },
        state: WorkerState::Ready,
        loaded: Epoch(1),
        incarnation: 1,
        started_ms: 1,
        version: "0".to_owned(),
        load: WorkerLoad::default(),
        measured: Measured::default(),
        sequences_max: 0,
        part: None,
    }
}

async fn put(store: &dyn Store, key: &str, value: &impl serde::Serialize) {
    let value = Bytes::from(serde_json::to_vec(value).unwrap());
    store.put(key, value, None).await.unwrap();
}

/// One layer with one expert, which w0 holds.
fn placement_of(model: &str) -> Placement {
    Placement {
        epoch: Epoch(1),
        numeric_class: "cpu-q8".to_owned(),
        model: model.to_owned(),
        num_layers: 1,
        num_experts: 1,
        workers: vec![WorkerId::new("w0")],
        experts: vec![vec![SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0],
        }]],
    }
}

/// Publishes a placement, whose version takes new requests from now on.
async fn serve(store: &dyn Store, placement: &Placement) {
    let version = Version::of_placement(placement);
    put(store, &version.key().published(), placement).await;
    put(store, keys::SERVING, &version).await;
}

/// Says for the first worker that it has loaded what is pending, once.
async fn acknowledge(store: Arc<dyn Store>) {
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let _stop = stop.clone().drop_guard();
    let mut placements = watch_placements(Arc::clone(&store), Scope::All, &tasks, stop);
    let pending = |p: &Placements| p.groups.values().find_map(|group| group.pending.clone());
    let seen = placements.wait_for(|p| pending(p).is_some()).await;
    let epoch = pending(&seen.unwrap()).unwrap().epoch;
    let entry = store.get("workers/w0").await.unwrap().unwrap();
    let mut record = WorkerRecord::decode(&entry).unwrap();
    record.loaded = epoch;
    put(&*store, &record.key(), &record).await;
}

impl Scene {
    async fn start(config: RouterConfig, scripts: Vec<Script>) -> Self {
        Self::start_with(config, scripts, None).await
    }

    async fn start_with(
        config: RouterConfig,
        scripts: Vec<Script>,
        scaler: Option<Arc<dyn Scaler>>,
    ) -> Self {
        Self::start_of(config, scripts, scaler, tokenizer()).await
    }

    async fn start_of(
        config: RouterConfig,
        scripts: Vec<Script>,
        scaler: Option<Arc<dyn Scaler>>,
        tokenizer: Arc<Tokenizer>,
    ) -> Self {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let mut servers = tokio::task::JoinSet::new();
        let mut workers = Vec::new();
        for (i, script) in scripts.into_iter().enumerate() {
            let worker = FakeWorker {
                script,
                seen: Arc::default(),
                parents: Arc::default(),
                open: Arc::default(),
                drains: Arc::default(),
                is_dead: Arc::default(),
            };
            let address = worker.clone().serve(&mut servers).await;
            let record = record(&format!("w{i}"), address);
            put(&*store, &record.key(), &record).await;
            workers.push(worker);
        }
        let placement = placement_of("f");
        if config.planner {
            servers.spawn(acknowledge(Arc::clone(&store)));
        } else {
            serve(&*store, &placement).await;
        }
        let scene = Self::open(config, store, (workers, servers), scaler, tokenizer).await;
        if !scene.workers.is_empty() {
            scene.until_ready(true).await;
        }
        scene
    }

    /// Another router of the same cluster.
    async fn another(&self, config: RouterConfig) -> Self {
        let (store, servers) = (Arc::clone(&self.store), tokio::task::JoinSet::new());
        let tokenizer = Arc::clone(&self.tokenizer);
        let scene = Self::open(config, store, (Vec::new(), servers), None, tokenizer).await;
        scene.until_ready(true).await;
        scene
    }

    async fn open(
        config: RouterConfig,
        store: Arc<dyn Store>,
        (workers, servers): (Vec<FakeWorker>, tokio::task::JoinSet<()>),
        scaler: Option<Arc<dyn Scaler>>,
        tokenizer: Arc<Tokenizer>,
    ) -> Self {
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let admin = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let urls = [&http, &grpc, &admin].map(|l| format!("http://{}", l.local_addr().unwrap()));
        let model = ServedModel {
            id: "demo".to_owned(),
            aliases: vec!["other-name".to_owned()],
            context_length: 2048,
            vocab: tokenizer.vocab_size(),
        };
        let parts = RouterParts {
            store: Arc::clone(&store),
            tokenizer: Arc::clone(&tokenizer),
            model,
            http,
            grpc,
            admin,
            tls: Tls::default(),
            workers: Link::default(),
            scaler,
        };
        let shutdown = Shutdown::new();
        let running = TaskTracker::new().spawn(run(config, parts, shutdown.clone()));
        let [http, grpc, admin] = urls;
        Self {
            tokenizer,
            http,
            grpc,
            admin,
            client: client(),
            shutdown,
            running,
            workers,
            _servers: servers,
            store,
        }
    }

    async fn until_ready(&self, expected: bool) {
        until("readiness", async || {
            self.get("/health/ready").await.status().is_success() == expected
        })
        .await;
    }

    async fn get(&self, path: &str) -> reqwest::Response {
        self.client
            .get(format!("{}{path}", self.http))
            .send()
            .await
            .unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> reqwest::Response {
        self.post_with(path, body, &[]).await
    }

    async fn post_with(
        &self,
        path: &str,
        body: &Value,
        headers: &[(&str, &str)],
    ) -> reqwest::Response {
        let mut request = self.client.post(format!("{}{path}", self.http)).json(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        tokio::time::timeout(PATIENCE, request.send())
            .await
            .unwrap()
            .unwrap()
    }

    async fn chat(&self, extra: Value) -> reqwest::Response {
        let mut body =
            json!({ "model": "demo", "messages": [{ "role": "user", "content": "hi" }] });
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        self.post("/v1/chat/completions", &body).await
    }

    async fn until_idle(&self, worker: usize) {
        let open = &self.workers[worker].open;
        until("no open stream", async || open.load(Ordering::SeqCst) == 0).await;
    }

    async fn end(self) {
        self.shutdown.trigger();
        tokio::time::timeout(PATIENCE, self.running)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }
}

impl Scene {
    /// A worker dies, and its lease ends.
    async fn lose(&self, number: usize) {
        self.workers[number].is_dead.store(true, Ordering::SeqCst);
        let key = format!("workers/w{number}");
        self.store.delete(&key).await.unwrap();
    }
}

async fn channel(url: &str) -> Channel {
    Channel::from_shared(url.to_owned())
        .unwrap()
        .connect()
        .await
        .unwrap()
}

/// Polls a condition of another task, with a deadline.
async fn until(what: &str, mut reached: impl AsyncFnMut() -> bool) {
    let polling = async {
        while !reached().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, polling)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

/// A worker that says `TEXT` and then its end token, going on where it was resumed.
fn storyteller() -> Script {
    let tokenizer = tokenizer();
    Arc::new(move |request| {
        let mut steps = vec![Step::Started(1)];
        steps.extend(
            story(&tokenizer)
                .into_iter()
                .skip(request.num_resumed as usize)
                .map(Step::Token),
        );
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    })
}

/// Ids of `TEXT` and the end token.
fn story(tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ids = tokenizer.encode(TEXT).unwrap();
    ids.push(tokenizer.eos_ids()[0]);
    ids
}

fn scripted(
    script: impl Fn(&v1::GenerateSequenceRequest) -> Result<Vec<Step>, Status> + Send + Sync + 'static,
) -> Script {
    Arc::new(script)
}

/// A worker whose every answer, of one token, waits for a permit of the gate.
fn gated() -> (Arc<Semaphore>, Script) {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let script = scripted(move |_| {
        Ok(vec![
            Step::Gate(Arc::clone(&held)),
            Step::Token(300),
            Step::Finish(v1::FinishReason::Length),
        ])
    });
    (gate, script)
}

/// Data of all events up to the end of the body.
async fn events(response: reqwest::Response) -> Vec<String> {
    let events = events_with_ids(response).await;
    events.into_iter().map(|event| event.data).collect()
}

#[derive(Clone, Debug)]
struct Event {
    id: Option<String>,
    data: String,
}

async fn events_with_ids(response: reqwest::Response) -> Vec<Event> {
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = tokio::time::timeout(PATIENCE, response.text())
        .await
        .unwrap()
        .unwrap();
    assert!(text.ends_with("\n\n"), "{text:?}");
    let blocks = text
        .trim_end_matches("\n\n")
        .split("\n\n")
        .filter(|block| !block.starts_with(':'));
    blocks.map(event).collect()
}

fn event(block: &str) -> Event {
    let field = |name: &str| block.lines().find_map(|line| line.strip_prefix(name));
    let id = field("id: ").map(str::to_owned);
    let data = field("data: ").unwrap().to_owned();
    Event { id, data }
}

fn parse(events: &[String]) -> Vec<Value> {
    events
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect()
}

fn content(chunks: &[Value]) -> String {
    chunks
        .iter()
        .filter_map(|c| c["choices"][0]["delta"]["content"].as_str())
        .collect()
}

/// A connection to the router on which `request` was sent and nothing is read, with a small window.
async fn mute_client(scene: &Scene, request: &str) -> TcpStream {
    let address = scene.http.strip_prefix("http://").unwrap();
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stream = socket.connect(address.parse().unwrap()).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// A chat request as it goes over the wire.
fn chat_on_the_wire(body: &Value) -> String {
    let body = body.to_string();
    let size = body.len();
    format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {size}\r\n\r\n{body}"
    )
}

/// The next bytes that the router says, at least `size` of them.
async fn said(stream: &mut TcpStream, size: usize) -> String {
    let mut bytes = vec![0; size];
    let reading = tokio::time::timeout(PATIENCE, stream.read_exact(&mut bytes));
    reading.await.unwrap().unwrap();
    String::from_utf8(bytes).unwrap()
}

fn plain(options: v1::GenerateOptions) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Prompt("x".to_owned())),
        options: Some(options),
        ..v1::GenerateRequest::default()
    }
}

async fn admin(scene: &Scene) -> AdminClient<Channel> {
    AdminClient::new(channel(&scene.admin).await)
}

fn cordon(id: &str, cordoned: bool) -> v1::SetCordonRequest {
    v1::SetCordonRequest {
        worker_id: id.to_owned(),
        cordoned,
    }
}

async fn cluster_status(admin: &mut AdminClient<Channel>) -> v1::ClusterStatusResponse {
    let status = admin.cluster_status(v1::ClusterStatusRequest {}).await;
    status.unwrap().into_inner()
}
