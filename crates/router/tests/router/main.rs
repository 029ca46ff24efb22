//! A whole router over loopback with scripted workers: what clients see when all is well, and when not.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must end"
)]

mod auth;
mod constraints;
mod disconnect;
mod doors;
mod failover;
mod held;
mod idempotency;
mod resume;
mod tenants;
mod tools;
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

/// A message of tokens with log probabilities of their own, as many as asked for.
fn sampled(index: &mut u32, ids: &[u32], top: Option<u32>) -> Kind {
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
    Kind::Tokens(v1::SampledTokens { tokens })
}

#[tonic::async_trait]
impl Worker for FakeWorker {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::SequenceEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateSequenceRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let steps = (self.script)(&request);
        let index = request.num_resumed;
        let top = request.sampling.as_ref().and_then(|s| s.logprobs);
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
                        Step::Token(id) => Ok(sampled(&mut index, &[id], top)),
                        Step::Tokens(ids) => Ok(sampled(&mut index, &ids, top)),
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

// ---- what clients see when all is well ----

#[tokio::test]
async fn a_chat_is_answered_whole_and_as_a_stream() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let response = scene.chat(json!({})).await;
    assert_eq!(response.status(), 200);
    assert!(
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .starts_with("req_")
    );
    let whole: Value = response.json().await.unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let num_tokens = story(&scene.tokenizer).len();
    assert_eq!(whole["usage"]["completion_tokens"], num_tokens);
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    let sent = scene.workers[0].seen.lock()[0].clone();
    assert_eq!(whole["usage"]["prompt_tokens"], sent.prompt_ids.len());
    assert_eq!(sent.prompt_ids[0], scene.tokenizer.bos_id().unwrap());

    let stream = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let mut events = events(scene.chat(stream).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let mut chunks = parse(&events);
    let usage = chunks.pop().unwrap();
    assert_eq!(
        (&usage["choices"], &usage["usage"]["completion_tokens"]),
        (&json!([]), &json!(num_tokens))
    );
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({ "role": "assistant", "content": "" })
    );
    assert!(
        chunks
            .iter()
            .all(|c| c["usage"].is_null() && c["object"] == "chat.completion.chunk")
    );
    assert_eq!(content(&chunks), TEXT);
    let reasons: Vec<&Value> = chunks
        .iter()
        .map(|c| &c["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(reasons.iter().filter(|r| !r.is_null()).count(), 1);
    assert_eq!(**reasons.last().unwrap(), "stop");
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics
            .contains("vllm:request_success_total{model_name=\"demo\",finished_reason=\"stop\"} 2"),
        "{metrics}"
    );
    assert!(metrics.contains("tramontane_router_ready 1"), "{metrics}");
    scene.end().await;
}

#[tokio::test]
async fn three_answers_have_seeds_of_their_own() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    let whole: Value = scene
        .chat(json!({ "n": 3, "seed": 7 }))
        .await
        .json()
        .await
        .unwrap();
    for i in 0..3 {
        assert_eq!(whole["choices"][i]["index"], i);
        assert_eq!(whole["choices"][i]["message"]["content"], TEXT);
    }
    let mut seen = scene.workers[0].seen.lock().clone();
    seen.extend(scene.workers[1].seen.lock().iter().cloned());
    assert!(
        scene.workers.iter().any(|w| w.seen.lock().is_empty()),
        "answers share one worker's cache"
    );
    let mut seeds: Vec<u64> = seen
        .iter()
        .map(|r| r.sampling.as_ref().unwrap().seed)
        .collect();
    assert!(seeds.contains(&7));
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 3);
    let body = json!({ "prompt": ["a", "b"], "echo": true, "stream": true });
    let mut events = events(scene.post("/v1/completions", &body).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let mut texts = [String::new(), String::new()];
    for chunk in parse(&events) {
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    for (text, prompt) in texts.iter().zip(["a", "b"]) {
        assert!(text.starts_with(prompt) && text.ends_with(TEXT), "{text}");
    }
    scene.end().await;
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_its_sequence() {
    let tokenizer = tokenizer();
    let endless = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.pop();
        steps.push(Step::Hang);
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![endless]).await;
    let response = scene
        .chat(json!({ "stop": ["this is a st", "never"] }))
        .await;
    let whole: Value = response.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello world, ");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn log_probabilities_reach_the_client() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let chat: Value = scene
        .chat(json!({ "logprobs": true, "top_logprobs": 2 }))
        .await
        .json()
        .await
        .unwrap();
    let entries = chat["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(entries.len(), story(&scene.tokenizer).len() - 1);
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let spoken: String = entries
        .iter()
        .map(|e| e["token"].as_str().unwrap())
        .collect();
    assert_eq!(spoken.trim_start(), TEXT);
    let body = json!({ "prompt": "x", "logprobs": 1 });
    let whole: Value = scene
        .post("/v1/completions", &body)
        .await
        .json()
        .await
        .unwrap();
    let logprobs = &whole["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(
            logprobs[list].as_array().unwrap().len(),
            entries.len(),
            "{list}"
        );
    }
    scene.end().await;
}

// ---- what clients see when not ----

#[tokio::test]
async fn a_client_that_leaves_aborts_its_sequence() {
    let endless = scripted(|_| Ok(vec![Step::Started(0), Step::Token(300), Step::Hang]));
    let scene = Scene::start(config(), vec![endless]).await;
    let mut body = scene.chat(json!({ "stream": true })).await.bytes_stream();
    body.next().await.unwrap().unwrap();
    assert_eq!(scene.workers[0].open.load(Ordering::SeqCst), 1);
    drop(body);
    scene.until_idle(0).await;
    let whole = scene.client.post(format!("{}/v1/completions", scene.http));
    let whole = whole.json(&json!({ "prompt": "x" })).send();
    let mut whole = Box::pin(whole);
    tokio::select! {
        _ = &mut whole => panic!("the answer never ends"),
        () = until("a stream", async || scene.workers[0].open.load(Ordering::SeqCst) == 1) => {}
    }
    drop(whole);
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn a_lost_worker_is_replaced_and_the_stream_goes_on_without_a_seam() {
    let tokenizer = tokenizer();
    let breaks = scripted(move |request| {
        let resumed = request.num_resumed as usize;
        let ids = story(&tokenizer);
        let mut steps = vec![Step::Started(1)];
        // The first request dies before its first token, later ones after three more.
        let num_tokens = if request.prompt_ids.len() == 1 { 0 } else { 3 };
        steps.extend(
            ids.into_iter()
                .skip(resumed)
                .take(num_tokens)
                .map(Step::Token),
        );
        steps.push(Step::Break);
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![breaks, storyteller()]).await;
    let body = json!({ "prompt": [5] });
    let whole: Value = scene
        .post("/v1/completions", &body)
        .await
        .json()
        .await
        .unwrap();
    assert!(
        whole["choices"][0]["text"]
            .as_str()
            .unwrap()
            .ends_with(TEXT),
        "{whole}"
    );
    assert_eq!(scene.workers[1].seen.lock()[0].num_resumed, 0);

    let stream = json!({ "stream": true, "stream_options": { "include_usage": true }, "seed": 3 });
    let mut events = events(scene.chat(stream).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let chunks = parse(&events);
    assert_eq!(content(&chunks), TEXT);
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], story(&scene.tokenizer).len());
    let broken = scene.workers[0].seen.lock().last().unwrap().clone();
    let replay = scene.workers[1].seen.lock().last().unwrap().clone();
    assert_eq!(replay.num_resumed, 3);
    assert_eq!(replay.sampling, broken.sampling);
    let resumed = replay.prompt_ids.len() - 3;
    assert_eq!(replay.prompt_ids[..resumed], broken.prompt_ids);
    assert_eq!(replay.prompt_ids[resumed..], story(&scene.tokenizer)[..3]);
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics.contains("tramontane_router_replayed_tokens_total 3"),
        "{metrics}"
    );
    scene.end().await;
}

#[tokio::test]
async fn a_worker_that_is_frozen_is_noticed_and_passed_over() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    // Accepts connections, like a paused process, and never says anything.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let frozen = WorkerRecord {
        incarnation: 2,
        ..record("w0", mute.local_addr().unwrap().to_string())
    };
    put(&*scene.store, &frozen.key(), &frozen).await;
    let known = async || {
        let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
        let workers = admin
            .list_workers(v1::ListWorkersRequest {})
            .await
            .unwrap()
            .into_inner();
        workers.workers[0].address == frozen.address
    };
    until("the frozen worker's address", known).await;
    let whole: Value = scene.chat(json!({})).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn a_router_that_plans_makes_the_first_placement_itself() {
    let plans = RouterConfig {
        planner: true,
        settle_time: Duration::ZERO,
        ..config()
    };
    // `start` waits for readiness.
    let scene = Scene::start(plans, vec![storyteller()]).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    let mut admin = admin(&scene).await;
    until("the planner has nothing to do", async || {
        let status = cluster_status(&mut admin).await;
        status.plans && status.settled && status.planner_doing == "placement fits"
    })
    .await;
    scene.end().await;
}

#[tokio::test]
async fn a_stream_that_nobody_can_continue_ends_in_an_error_and_nothing_else() {
    let calls = AtomicUsize::new(0);
    let dies = scripted(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Ok(vec![Step::Token(300), Step::Token(301), Step::Break]),
        _ => Err(Status::unavailable("gone")),
    });
    let scene = Scene::start(config(), vec![dies]).await;
    let events = events(scene.chat(json!({ "stream": true })).await).await;
    let chunks = parse(&events);
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["type"], "overloaded_error");
    assert_eq!(error.as_object().unwrap().len(), 4);
    assert!(
        chunks
            .iter()
            .all(|c| c["choices"][0]["finish_reason"].is_null())
    );
    scene.end().await;
}

#[tokio::test]
async fn workers_that_refuse_are_asked_in_turn_and_full_ones_make_it_429() {
    let full = || scripted(|_| Err(Status::resource_exhausted("full")));
    let scene = Scene::start(config(), vec![full(), storyteller()]).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    scene.end().await;
    let scene = Scene::start(config(), vec![full(), full()]).await;
    let response = scene.chat(json!({ "stream": true })).await;
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
    scene.end().await;
    let invalid = scripted(|_| Err(Status::invalid_argument("too long for this worker")));
    let scene = Scene::start(config(), vec![invalid]).await;
    let response = scene.chat(json!({})).await;
    assert_eq!(response.status(), 400);
    assert_eq!(scene.workers[0].seen.lock().len(), 1);
    scene.end().await;
}

#[tokio::test]
async fn a_full_queue_is_429_and_no_worker_is_503() {
    let (gate, slow) = gated();
    let narrow = RouterConfig {
        sequences_max: 1,
        queue_max: 0,
        ..config()
    };
    let scene = Scene::start(narrow, vec![slow]).await;
    let first = scene.chat(json!({ "stream": true })).await;
    assert_eq!(first.status(), 200);
    let refused = scene.chat(json!({})).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(refused.headers()["retry-after-ms"], "1000");
    assert_eq!(refused.headers()["x-should-retry"], "true");
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    gate.add_permits(1);
    assert_eq!(events(first).await.last().unwrap(), "[DONE]");
    scene.end().await;

    let empty = Scene::start(config(), vec![]).await;
    empty.until_ready(false).await;
    let response = empty.chat(json!({})).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "service_unavailable");
    let ready = empty.get("/health/ready").await;
    assert_eq!(ready.status(), 503);
    assert!(ready.json::<Value>().await.unwrap()["reason"].is_string());
    assert_eq!(empty.get("/health/live").await.status(), 200);
    empty.end().await;
}

#[tokio::test]
async fn what_is_not_a_request_is_refused_in_one_form() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let url = |path: &str| format!("{}{path}", scene.http);
    let chat = url("/v1/chat/completions");
    let huge = vec![b' '; 10 * 1024 * 1024];
    let post = |body: Vec<u8>| {
        scene
            .client
            .post(&chat)
            .header("content-type", "application/json")
            .body(body)
    };
    let mut deep = "[".repeat(5000).into_bytes();
    deep.extend("]".repeat(5000).bytes());
    let table = [
        (post(huge), 413, "request_too_large"),
        (post(b"{\"model\":".to_vec()), 400, ""),
        (post(deep), 400, ""),
        (post(Vec::new()), 400, ""),
        (
            scene.client.post(&chat).body("{}"),
            415,
            "unsupported_media_type",
        ),
        (scene.client.get(&chat), 405, "method_not_allowed"),
        (scene.client.get(url("/nowhere")), 404, "not_found"),
        (
            scene.client.get(url("/v1/models/none")),
            404,
            "model_not_found",
        ),
        (scene.client.get(url("/v1/models/%ff")), 400, ""),
        (
            post(br#"{"model":"x","messages":[{"role":"user","content":"a"}]}"#.to_vec()),
            404,
            "model_not_found",
        ),
    ];
    for (request, status, code) in table {
        let request = request.header("x-request-id", "chosen-by-the-client");
        // A body without a type is text to reqwest.
        let request = if status == 415 {
            request.header("content-type", "text/plain")
        } else {
            request
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status);
        assert_ne!(response.headers()["x-request-id"], "chosen-by-the-client");
        assert_eq!(response.headers()["x-should-retry"], "false");
        let body: Value = response.json().await.unwrap();
        let keys: Vec<&String> = body["error"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert_eq!(body["error"]["code"].as_str().unwrap_or_default(), code);
    }
    assert!(scene.workers[0].seen.lock().is_empty());
    let models: Value = scene.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["data"][1]["id"], "other-name");
    assert_eq!(scene.get("/v1/models/demo").await.status(), 200);
    assert!(scene.get("/version").await.json::<Value>().await.unwrap()["version"].is_string());
    scene.end().await;
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

#[tokio::test]
async fn bodies_that_are_only_announced_hold_up_nobody() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
                content-type: application/json\r\n";
    let mut half_open = Vec::new();
    for i in 0..80 {
        let size = if i % 2 == 0 {
            "content-length: 8388608"
        } else {
            "transfer-encoding: chunked"
        };
        let mut stream = mute_client(&scene, &format!("{head}{size}\r\n\r\n")).await;
        // The router reads the body now.
        assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 100");
        half_open.push(stream);
    }
    let whole: Value = scene.chat(json!({})).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    for size in [8_388_609_u64, 99_999_999_999] {
        let request = format!("{head}content-length: {size}\r\n\r\n").replace("expect", "x");
        let mut stream = mute_client(&scene, &request).await;
        assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 413");
    }
    drop(half_open);
    scene.end().await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_waited_for_no_longer_than_the_limit() {
    let quick = RouterConfig {
        body_timeout: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(quick, vec![storyteller()]).await;
    let half = chat_on_the_wire(&json!({ "messages": [] }));
    let mut stream = mute_client(&scene, &half[..half.len() - 5]).await;
    assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 408");
    scene.end().await;
}

#[tokio::test]
async fn a_finished_answer_gives_its_place_back_though_nobody_reads_it() {
    let calls = AtomicUsize::new(0);
    let first_hangs = scripted(move |_| {
        let end = match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Step::Hang,
            _ => Step::Finish(v1::FinishReason::Length),
        };
        Ok(vec![Step::Started(0), Step::Token(300), end])
    });
    let small = RouterConfig {
        sequences_max: 2,
        ..config()
    };
    let scene = Scene::start(small, vec![first_hangs]).await;
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({ "messages": messages, "stream": true, "n": 2 });
    let mute = mute_client(&scene, &chat_on_the_wire(&body)).await;
    let seen = &scene.workers[0].seen;
    until("two sequences", async || seen.lock().len() == 2).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    assert_eq!(scene.workers[0].open.load(Ordering::SeqCst), 1);
    drop(mute);
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let calls = AtomicUsize::new(0);
    let first_never_end = scripted(move |_| {
        // More than all buffers between here and the client.
        let (num_tokens, end) = match calls.fetch_add(1, Ordering::SeqCst) {
            0..4 => (1900, Step::Hang),
            _ => (1, Step::Finish(v1::FinishReason::Length)),
        };
        let mut steps = vec![Step::Token(300); num_tokens];
        steps.push(end);
        Ok(steps)
    });
    let impatient = RouterConfig {
        sequences_max: 4,
        client_stall_max: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(impatient, vec![first_never_end]).await;
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({
        "messages": messages, "stream": true, "n": 4, "logprobs": true, "top_logprobs": 20,
    });
    let mut mute = mute_client(&scene, &chat_on_the_wire(&body)).await;
    let seen = &scene.workers[0].seen;
    until("four sequences", async || seen.lock().len() == 4).await;
    scene.until_idle(0).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    // When it reads after all, it is told.
    let mut rest = Vec::new();
    let reading = tokio::time::timeout(PATIENCE, mute.read_to_end(&mut rest));
    reading.await.unwrap().unwrap();
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains("data: {\"error\":"), "{} bytes", rest.len());
    assert!(!rest.contains("[DONE]"));
    scene.end().await;
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let (gate, slow) = gated();
    let quick = RouterConfig {
        sse_keepalive: Duration::from_millis(20),
        ..config()
    };
    let scene = Scene::start(quick, vec![slow]).await;
    let mut body = scene.chat(json!({ "stream": true })).await.bytes_stream();
    assert_eq!(
        &body.next().await.unwrap().unwrap()[..13],
        b": keep-alive\n"
    );
    gate.add_permits(1);
    let mut rest = Vec::new();
    while let Some(bytes) = body.next().await {
        rest.extend_from_slice(&bytes.unwrap());
    }
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    scene.end().await;
}

// ---- gRPC ----

fn plain(options: v1::GenerateOptions) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Prompt("x".to_owned())),
        options: Some(options),
        ..v1::GenerateRequest::default()
    }
}

#[tokio::test]
async fn grpc_gives_the_same_answers() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let options = v1::GenerateOptions {
        n: Some(2),
        logprobs: Some(1),
        ..Default::default()
    };
    let stream = client.generate(plain(options)).await.unwrap().into_inner();
    let messages: Vec<v1::GenerateResponse> = stream.map(Result::unwrap).collect().await;
    for index in 0..2 {
        let of_one = || messages.iter().filter(move |m| m.index == index);
        let text: String = of_one().map(|m| m.text.as_str()).collect();
        assert!(text.ends_with(TEXT));
        let ids: Vec<u32> = of_one()
            .flat_map(|m| m.tokens.iter().map(|t| t.id))
            .collect();
        assert_eq!(ids, story(&scene.tokenizer));
        assert_eq!(of_one().filter(|m| m.finish_reason.is_some()).count(), 1);
    }
    let with_usage: Vec<usize> = (0..messages.len())
        .filter(|&i| messages[i].usage.is_some())
        .collect();
    assert_eq!(with_usage, [messages.len() - 1]);
    let once = client
        .generate_once(plain(v1::GenerateOptions::default()))
        .await
        .unwrap()
        .into_inner();
    assert!(once.answers[0].text.ends_with(TEXT));
    assert_eq!(
        once.usage.unwrap().completion_tokens as usize,
        story(&scene.tokenizer).len()
    );

    scene.end().await;
}

#[tokio::test]
async fn grpc_refuses_what_http_refuses_and_says_where() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    for (options, field) in [
        (
            v1::GenerateOptions {
                temperature: Some(f32::NAN),
                ..Default::default()
            },
            "options.temperature",
        ),
        (
            v1::GenerateOptions {
                top_p: Some(f32::INFINITY),
                ..Default::default()
            },
            "options.top_p",
        ),
        (
            v1::GenerateOptions {
                n: Some(1000),
                ..Default::default()
            },
            "options.n",
        ),
        (
            v1::GenerateOptions {
                max_tokens: Some(5000),
                ..Default::default()
            },
            "options.max_tokens",
        ),
        (
            v1::GenerateOptions {
                stop: vec![String::new()],
                ..Default::default()
            },
            "options.stop",
        ),
    ] {
        let refused = client.generate(plain(options)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{field}");
        let details = refused.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
        assert_eq!(details.error_info().unwrap().domain, "tramontane");
    }
    let nothing = client
        .generate_once(v1::GenerateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(nothing.code(), tonic::Code::InvalidArgument);

    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn grpc_tokenizes_and_lists_models() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let ids = client
        .tokenize(v1::TokenizeRequest {
            text: TEXT.to_owned(),
            add_bos: false,
        })
        .await;
    let ids = ids.unwrap().into_inner().ids;
    assert_eq!(ids, scene.tokenizer.encode(TEXT).unwrap());
    let text = client
        .detokenize(v1::DetokenizeRequest { ids })
        .await
        .unwrap()
        .into_inner()
        .text;
    assert_eq!(text, TEXT);
    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(
        (models[0].id.as_str(), models[0].context_length),
        ("demo", 2048)
    );
    scene.end().await;
}

#[tokio::test]
async fn operators_see_the_cluster_and_drain_workers() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let status = admin
        .cluster_status(v1::ClusterStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(status.ready && status.store_available && !status.survives_one_loss);
    assert_eq!(
        (status.epoch, status.workers_ready, status.workers_total),
        (1, 1, 1)
    );
    let workers = admin
        .list_workers(v1::ListWorkersRequest {})
        .await
        .unwrap()
        .into_inner()
        .workers;
    assert_eq!(
        (
            workers[0].state.as_str(),
            workers[0].slices,
            workers[0].segments
        ),
        ("ready", 1, 8)
    );
    let placement = admin
        .get_placement(v1::GetPlacementRequest {})
        .await
        .unwrap()
        .into_inner();
    let placement: Placement = serde_json::from_str(&placement.placement_json).unwrap();
    assert_eq!(placement.epoch, Epoch(1));
    let drain = |id: &str| v1::DrainWorkerRequest {
        worker_id: id.to_owned(),
    };
    admin.drain_worker(drain("w0")).await.unwrap();
    assert_eq!(scene.workers[0].drains.load(Ordering::SeqCst), 1);
    let unknown = admin.drain_worker(drain("w9")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    scene.end().await;
}

// ---- what operators do ----

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

#[tokio::test]
async fn a_cordoned_worker_gets_no_new_sequences_and_finishes_what_it_has() {
    let gate = Arc::new(Semaphore::new(0));
    let (held, tokenizer) = (Arc::clone(&gate), tokenizer());
    let slow = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.insert(2, Step::Gate(Arc::clone(&held)));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![slow, storyteller()]).await;
    let mut admin = admin(&scene).await;
    let seen = |worker: usize| scene.workers[worker].seen.lock().len();
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let running = scene.chat(json!({ "stream": true })).await;
    assert_eq!((seen(0), seen(1)), (1, 0), "w1 is cordoned");

    admin.set_cordon(cordon("w1", false)).await.unwrap();
    let changed = admin.set_cordon(cordon("w0", true)).await.unwrap();
    assert!(changed.into_inner().changed);
    let again = admin.set_cordon(cordon("w0", true)).await.unwrap();
    assert!(!again.into_inner().changed);
    assert_eq!(cluster_status(&mut admin).await.cordoned, ["w0"]);
    let listed = admin.list_workers(v1::ListWorkersRequest {}).await.unwrap();
    let listed: Vec<bool> = listed
        .into_inner()
        .workers
        .iter()
        .map(|w| w.cordoned)
        .collect();
    assert_eq!(listed, [true, false]);
    for _ in 0..4 {
        assert_eq!(scene.chat(json!({})).await.status(), 200);
    }
    assert_eq!((seen(0), seen(1)), (1, 4), "w0 is cordoned");

    gate.add_permits(1);
    let events = events(running).await;
    assert_eq!(content(&parse(&events[..events.len() - 1])), TEXT);
    assert_eq!((seen(0), seen(1)), (1, 4), "the running one stayed");

    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let status = cluster_status(&mut admin).await;
    assert!(
        !status.ready && status.reason.contains("cordoned"),
        "{}",
        status.reason
    );
    assert_eq!(scene.chat(json!({})).await.status(), 503);
    let unknown = admin.set_cordon(cordon("w9", true)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    scene.end().await;
}

#[tokio::test]
async fn an_operator_changes_and_clears_what_is_wanted_of_the_placement() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = admin(&scene).await;
    let wish = |replicas, slices_per_expert| v1::SetIntentRequest {
        replicas,
        slices_per_expert,
    };
    let mut set = async |request| {
        let now = admin.set_intent(request).await?.into_inner();
        Ok::<_, Status>((now.replicas, now.slices_per_expert))
    };
    // What cannot be read is in nobody's way.
    put(&*scene.store, "intent", &json!("junk")).await;
    assert_eq!(set(wish(Some(2), None)).await.unwrap(), (Some(2), None));
    assert_eq!(set(wish(None, Some(4))).await.unwrap(), (Some(2), Some(4)));
    assert_eq!(set(wish(Some(0), None)).await.unwrap(), (None, Some(4)));
    for (request, number) in [
        (wish(Some(65), None), "65"),
        (wish(None, Some(9)), "9"),
        (wish(None, Some(300)), "300"),
    ] {
        let refused = set(request).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{number}");
        assert!(refused.message().contains(number), "{}", refused.message());
    }
    let (stored, _) = planner::intent(&*scene.store).await.unwrap();
    assert_eq!((stored.replicas, stored.slices_per_expert), (None, Some(4)));
    scene.end().await;
}

#[tokio::test]
async fn two_operators_at_once_lose_neither_change() {
    let scripts = vec![storyteller(), storyteller(), storyteller(), storyteller()];
    let scene = Scene::start(config(), scripts).await;
    let channel = channel(&scene.admin).await;
    let cordons = ["w0", "w1", "w2", "w3"].map(|id| {
        let mut admin = AdminClient::new(channel.clone());
        async move { admin.set_cordon(cordon(id, true)).await.unwrap() }
    });
    futures::future::join_all(cordons).await;
    let status = cluster_status(&mut AdminClient::new(channel)).await;
    assert_eq!(status.cordoned, ["w0", "w1", "w2", "w3"]);
    scene.end().await;
}

#[tokio::test]
async fn a_worker_that_is_gone_is_removed_and_a_ready_one_only_by_force() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = admin(&scene).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let gone = record("w1", address);
    put(&*scene.store, &gone.key(), &gone).await;
    until("w1 is listed", async || {
        cluster_status(&mut admin).await.workers_total == 2
    })
    .await;
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let remove = |id: &str, force| v1::RemoveWorkerRequest {
        worker_id: id.to_owned(),
        force,
    };
    let removed = admin.remove_worker(remove("w1", false)).await.unwrap();
    let removed = removed.into_inner();
    assert!(removed.was_listed && !removed.was_alive && removed.slices == 0);
    until("w1 is gone", async || {
        cluster_status(&mut admin).await.workers_total == 1
    })
    .await;
    let status = cluster_status(&mut admin).await;
    assert_eq!(
        status.cordoned,
        Vec::<String>::new(),
        "its cordon goes with it"
    );
    let unknown = admin.remove_worker(remove("w1", true)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);

    let refused = admin.remove_worker(remove("w0", false)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(scene.store.get("workers/w0").await.unwrap().is_some());
    let forced = admin.remove_worker(remove("w0", true)).await.unwrap();
    let forced = forced.into_inner();
    assert!(forced.was_listed && forced.was_alive && forced.slices == 1);
    assert_eq!(scene.store.get("workers/w0").await.unwrap(), None);
    scene.end().await;
}

#[derive(Debug, Default)]
struct FakeScaler {
    asked: Mutex<Vec<u16>>,
}

#[tonic::async_trait]
impl Scaler for FakeScaler {
    async fn scale(&self, count: u16) -> Result<ScaleStarted, ScaleError> {
        self.asked.lock().push(count);
        if count > 10 {
            return Err(ScaleError::Refused(
                "ten machines are all there are".to_owned(),
            ));
        }
        Ok(ScaleStarted {
            from: 1,
            started: vec![WorkerId::new("w1")],
            draining: Vec::new(),
        })
    }
}

#[tokio::test]
async fn workers_are_scaled_by_whoever_can_and_otherwise_refused_with_advice() {
    let count = |count| v1::ScaleWorkersRequest { count };
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut alone = admin(&scene).await;
    assert!(!cluster_status(&mut alone).await.scalable);
    let refused = alone.scale_workers(count(2)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("tramontane worker"), "{refused}");
    scene.end().await;

    let scaler = Arc::new(FakeScaler::default());
    let scene = Scene::start_with(config(), vec![storyteller()], Some(scaler.clone())).await;
    let mut admin = admin(&scene).await;
    assert!(cluster_status(&mut admin).await.scalable);
    let begun = admin.scale_workers(count(2)).await.unwrap().into_inner();
    assert_eq!((begun.from, begun.started), (1, vec!["w1".to_owned()]));
    for wrong in [0, 65, u32::MAX] {
        let refused = admin.scale_workers(count(wrong)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{wrong}");
    }
    let refused = admin.scale_workers(count(11)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert_eq!(*scaler.asked.lock(), [2, 11]);
    scene.end().await;
}

#[tokio::test]
async fn what_happens_is_told_to_those_who_ask_and_to_those_who_watch() {
    let dies = scripted(|_| Ok(vec![Step::Started(0), Step::Break]));
    let scene = Scene::start(config(), vec![dies, storyteller()]).await;
    let mut admin = admin(&scene).await;
    let watch = v1::WatchEventsRequest { after_sequence: 0 };
    let mut stream = admin.watch_events(watch).await.unwrap().into_inner();
    let mut told = async |kind: &str, worker: &str| {
        loop {
            let next = tokio::time::timeout(PATIENCE, stream.message());
            let event = next.await.unwrap().unwrap().unwrap();
            if event.kind == kind && event.worker == worker {
                return event;
            }
        }
    };
    told("router_started", "").await;
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let cordoned = told("worker_cordoned", "w1").await;
    assert_eq!(cordoned.epoch, 1);
    admin.set_cordon(cordon("w1", false)).await.unwrap();
    assert_eq!(
        told("worker_uncordoned", "w1").await.sequence,
        cordoned.sequence + 1
    );

    until("a sequence was lost by w0", async || {
        assert_eq!(scene.chat(json!({})).await.status(), 200);
        !scene.workers[0].seen.lock().is_empty()
    })
    .await;
    let moved = told("sequences_moved", "w0").await;
    assert!(moved.text.starts_with("1 sequences"), "{}", moved.text);
    scene.lose(1).await;
    told("worker_lost", "w1").await;

    let newest = v1::ListEventsRequest { limit: 1 };
    let newest = admin.list_events(newest).await.unwrap().into_inner().events;
    assert_eq!(newest.len(), 1);
    assert_eq!(newest[0].kind, "worker_lost");
    scene.end().await;
    assert!(
        matches!(stream.message().await, Ok(None) | Err(_)),
        "ends with the router"
    );
}

#[tokio::test]
async fn a_drill_goes_to_its_worker_and_a_refusal_comes_back_as_it_is() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let ask = async |worker: &str, kind: v1::DrillKind, peers: &[&str]| {
        let drill = v1::DrillRequest {
            kind: kind.into(),
            delay_ms: 7,
            peers: peers.iter().map(|&peer| peer.to_owned()).collect(),
            ..v1::DrillRequest::default()
        };
        let request = v1::DrillWorkerRequest {
            worker_id: worker.to_owned(),
            drill: Some(drill),
        };
        admin.clone().drill_worker(request).await
    };
    let begun = ask("w0", v1::DrillKind::Slow, &[]).await.unwrap();
    assert_eq!(begun.into_inner().report.unwrap().steps_delayed, 7);
    let off = ask("w0", v1::DrillKind::Kill, &[]).await.unwrap_err();
    assert_eq!(off.code(), tonic::Code::FailedPrecondition);
    assert_eq!(off.message(), "drills are off");
    let broken = ask("w0", v1::DrillKind::Partition, &[]).await.unwrap_err();
    assert_eq!(broken.code(), tonic::Code::Unavailable);
    for unknown in [
        ask("w9", v1::DrillKind::Slow, &[]).await.unwrap_err(),
        ask("w0", v1::DrillKind::Partition, &["w9"])
            .await
            .unwrap_err(),
    ] {
        assert_eq!(unknown.code(), tonic::Code::NotFound);
        assert!(unknown.message().contains("w9"), "{unknown}");
    }
    scene.end().await;
}

#[tokio::test]
async fn operators_plan_before_they_move_and_know_whom_they_need() {
    let config = RouterConfig {
        slices_per_expert: Some(8),
        ..config()
    };
    let scene = Scene::start(config, vec![storyteller(), storyteller()]).await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let workers = admin
        .list_workers(v1::ListWorkersRequest {})
        .await
        .unwrap()
        .into_inner()
        .workers;
    assert_eq!([true, false], [workers[0].essential, workers[1].essential]);

    let plan = admin
        .plan_placement(v1::PlanPlacementRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((plan.candidates.len(), plan.proposes), (8, true));
    let chosen = &plan.candidates[plan.chosen as usize];
    assert_eq!((chosen.slices_per_expert, chosen.replicas), (8, 1));
    assert_eq!(
        chosen.moved_bytes,
        3 << 10,
        "w0 keeps one more than half of the expert"
    );
    assert!(plan.now.unwrap().layer_us > chosen.layer_us);
    assert!(
        plan.why.iter().any(|line| line.contains("by memory")),
        "{:?}",
        plan.why
    );
    let safe = plan.candidates.iter().find(|c| c.replicas == 2).unwrap();
    assert!(safe.survives_one_loss && !chosen.survives_one_loss);
    let too_many = v1::PlanPlacementRequest {
        replicas: 0,
        slices_per_expert: 9,
    };
    let refused = admin.plan_placement(too_many).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);

    let mut rebalance = async |dry_run| {
        let request = v1::RebalanceRequest { dry_run };
        admin.rebalance(request).await.unwrap().into_inner()
    };
    assert_eq!(rebalance(true).await.replaces_epoch, 1);
    assert_eq!(scene.store.get("intent").await.unwrap(), None);
    assert_eq!(rebalance(false).await.moved_bytes, 3 << 10);
    let (intent, _) = planner::intent(&*scene.store).await.unwrap();
    assert_eq!(intent.rebalance, Some(Epoch(1)));

    scene.end().await;
}

#[tokio::test]
async fn a_second_ready_holder_of_everything_makes_the_cluster_safe() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    let gauge = async |value: u8| {
        let metrics = scene.get("/metrics").await.text().await.unwrap();
        metrics.contains(&format!("\ntramontane_survives_one_loss {value}\n"))
    };
    assert!(gauge(0).await, "only w0 holds the expert");
    let both = Placement {
        epoch: Epoch(2),
        numeric_class: "cpu-q8".to_owned(),
        model: "f".to_owned(),
        num_layers: 1,
        num_experts: 1,
        workers: vec![WorkerId::new("w0"), WorkerId::new("w1")],
        experts: vec![vec![SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0, 1],
        }]],
    };
    serve(&*scene.store, &both).await;
    for id in ["w0", "w1"] {
        let entry = scene
            .store
            .get(&format!("workers/{id}"))
            .await
            .unwrap()
            .unwrap();
        let mut record = WorkerRecord::decode(&entry).unwrap();
        record.loaded = Epoch(2);
        put(&*scene.store, &record.key(), &record).await;
    }
    until("any one may be lost", async || gauge(1).await).await;
    scene.end().await;
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    use tonic_reflection::pb::{v1 as new, v1alpha as old};
    let scene = Scene::start(config(), vec![storyteller()]).await;
    for (url, served, elsewhere) in [
        (
            &scene.grpc,
            "tramontane.v1.Inference",
            "tramontane.v1.Admin",
        ),
        (
            &scene.admin,
            "tramontane.v1.Admin",
            "tramontane.v1.Inference",
        ),
    ] {
        let channel = channel(url).await;
        let ask = new::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = new::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client =
            new::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        let answer = answer.into_inner().next().await.unwrap().unwrap();
        let answer = answer.message_response.unwrap();
        let new::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer
        else {
            panic!("a list expected")
        };
        let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
        assert!(names.contains(&served) && names.contains(&"grpc.health.v1.Health"));
        assert!(!names.contains(&elsewhere), "{names:?}");
        let ask = old::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = old::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client = old::server_reflection_client::ServerReflectionClient::new(channel);
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        assert!(answer.into_inner().next().await.unwrap().is_ok());
    }
    let mut outside = AdminClient::new(channel(&scene.grpc).await);
    let asked = outside.cluster_status(v1::ClusterStatusRequest {}).await;
    assert_eq!(asked.unwrap_err().code(), tonic::Code::Unimplemented);
    scene.end().await;
}

#[tokio::test]
async fn a_router_that_stops_says_so_first_and_finishes_what_runs() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let tokenizer = tokenizer();
    let slow = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.insert(2, Step::Gate(Arc::clone(&held)));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    });
    let lingering = RouterConfig {
        unready_grace: Duration::from_secs(2),
        ..config()
    };
    let scene = Scene::start(lingering, vec![slow]).await;
    let mut health = HealthClient::new(channel(&scene.grpc).await);
    let mut check = async |service: &str| {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        health.check(request).await.unwrap().into_inner().status()
    };
    assert_eq!(check("").await, ServingStatus::Serving);
    assert_eq!(
        check("tramontane.v1.Inference").await,
        ServingStatus::Serving
    );
    let running = scene.chat(json!({ "stream": true })).await;
    scene.shutdown.trigger();
    scene.until_ready(false).await;
    until("NOT_SERVING", async || {
        check("").await == ServingStatus::NotServing
    })
    .await;
    assert_eq!(check("liveness").await, ServingStatus::Serving);
    // Refused connections are the sign that the doors are closed, with the request still running.
    until("closed doors", async || {
        reqwest::Client::new()
            .get(&scene.http)
            .send()
            .await
            .is_err()
    })
    .await;
    assert!(!scene.running.is_finished());
    gate.add_permits(1);
    let events = events(running).await;
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert_eq!(content(&parse(&events[..events.len() - 1])), TEXT);
    tokio::time::timeout(PATIENCE, scene.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn what_does_not_end_within_the_drain_is_aborted_with_an_error() {
    let endless = scripted(|_| Ok(vec![Step::Token(300), Step::Hang]));
    let short = RouterConfig {
        drain_deadline: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(short, vec![endless]).await;
    let running = scene.chat(json!({ "stream": true })).await;
    scene.shutdown.trigger();
    let events = events(running).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["message"], "this router is stopping");
    tokio::time::timeout(PATIENCE, scene.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}
