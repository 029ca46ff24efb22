//! What a worker promises to clients, to its peers and to whoever stops it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Streaming};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;
use tramontane_compute::WeightFormat;
use tramontane_coordination::{FaultStore, MemoryStore, Roles, WorkerState};
use tramontane_proto::v1;
use tramontane_types::SamplingParams;
use tramontane_worker::{RoleSet, WorkerConfig};

use crate::cluster::{
    Carrier, Cluster, EXPERTS, POSITIONS, Said, VOCAB, config, eventually, prompt, request, split,
};

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens,
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    }
}

fn q8(id: &str) -> WorkerConfig {
    config(id, WeightFormat::Q8)
}

/// One ready worker that holds everything.
async fn one_worker(config: WorkerConfig) -> (Cluster, String) {
    let id = config.id.clone();
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start(config).await;
    cluster.publish(&[&id], split(1)).await;
    (cluster, id)
}

/// Reads until the first token was sampled.
async fn first_token(stream: &mut Streaming<v1::SequenceEvent>, said: &mut Said) {
    while said.ids.is_empty() {
        said.note(stream.message().await.unwrap().unwrap());
    }
}

async fn health(cluster: &Cluster, id: &str) -> String {
    let mut client = HealthClient::new(cluster.workers[id].channel.clone());
    let service = "tramontane.v1.Worker".to_owned();
    let answer = client
        .check(HealthCheckRequest { service })
        .await
        .unwrap()
        .into_inner();
    answer.status().as_str_name().to_owned()
}

#[tokio::test]
async fn a_worker_alone_joins_gets_its_slices_and_serves() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    cluster.start(q8("a")).await;
    assert_eq!(health(&cluster, "a").await, "NOT_SERVING");
    let early = cluster
        .generate("a", request("r", prompt(1, 3), &params(1)))
        .await
        .unwrap_err();
    assert_eq!(early.code(), Code::Unavailable);
    assert_eq!(early.get_details_error_info().unwrap().reason, "NOT_READY");

    cluster.publish(&["a"], split(1)).await;
    let said = cluster
        .generate_all("a", &[request("r", prompt(1, 3), &params(5))])
        .await;
    assert_eq!(
        (said[0].ids.len(), said[0].finish),
        (5, Some(v1::FinishReason::Length.into()))
    );
    let status = cluster.status("a").await;
    assert_eq!(
        (status.worker_id.as_str(), status.state.as_str()),
        ("a", "ready")
    );
    assert_eq!((status.tokens_sampled, status.sequences_running), (5, 0));
    assert_eq!(status.expert_segments_held, 2 * 4 * 8);
    assert!(status.expert_bytes > 0 && status.kv_pages_total == 512);
    eventually("health says so", async || {
        health(&cluster, "a").await == "SERVING"
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn what_a_worker_measures_reaches_its_record() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    cluster.start(q8("a")).await;
    cluster.start(q8("b")).await;
    cluster.publish(&["a", "b"], split(2)).await;
    let speed = async |id: &str| cluster.record(id).await?.measured.segment_ns;
    eventually(
        "the checks of loaded slices say how fast they are",
        async || speed("a").await.is_some() && speed("b").await.is_some(),
    )
    .await;
    // More rows than chance needs: two of four experts for each.
    let requests: Vec<_> = (0..4)
        .map(|n| request(&format!("r{n}"), prompt(n, 100), &params(4)))
        .collect();
    cluster.generate_all("a", &requests).await;
    eventually("loads are published", async || {
        let record = cluster.record("a").await;
        record.is_some_and(|record| record.measured.expert_load.is_some())
    })
    .await;
    let measured = cluster.record("a").await.unwrap().measured;
    let load = measured.expert_load.unwrap();
    assert_eq!((load.top_k, load.levels.len()), (2, 2 * EXPERTS));
    assert!((128..=512).contains(&load.rows), "{} rows", load.rows);
    for layer in load.relative().collect::<Vec<_>>().chunks(EXPERTS) {
        let sum: f64 = layer.iter().sum();
        assert!((sum - EXPERTS as f64).abs() < 1.0, "{layer:?}");
    }
    assert!(measured.link_us.is_some(), "b was asked");
    // Nobody asked b for anything to route.
    let idle = cluster.record("b").await.unwrap().measured;
    assert_eq!((idle.expert_load, idle.link_us), (None, None));
    cluster.stop().await;
}

#[tokio::test]
async fn bad_requests_are_refused_by_name_and_the_next_one_works() {
    let (cluster, id) = one_worker(q8("a")).await;
    let with = |change: fn(&mut v1::GenerateSequenceRequest)| {
        let mut request = request("bad", prompt(1, 3), &params(4));
        change(&mut request);
        request
    };
    let too_long = request("bad", prompt(1, POSITIONS), &params(4));
    let table = [
        (with(|r| r.request_id.clear()), "request_id has 0 bytes"),
        (
            with(|r| r.request_id = "r".repeat(300)),
            "request_id has 300 bytes",
        ),
        (with(|r| r.prompt_ids.clear()), "the prompt is empty"),
        (
            with(|r| r.prompt_ids = vec![VOCAB]),
            "token id 97 is not below",
        ),
        (
            with(|r| r.num_resumed = 3),
            "3 resumed tokens in a prompt of 3",
        ),
        (with(|r| r.sampling = None), "sampling is missing"),
        (
            with(|r| r.sampling.as_mut().unwrap().temperature = f32::NAN),
            "temperature must be",
        ),
        (
            with(|r| r.sampling.as_mut().unwrap().max_tokens = 0),
            "max_tokens must be at least 1",
        ),
        (
            with(|r| r.sampling.as_mut().unwrap().stop_ids = vec![1; 65]),
            "stop_ids has 65 entries",
        ),
        (
            with(|r| r.sampling.as_mut().unwrap().stop_ids = vec![VOCAB]),
            "stop_token_ids must be",
        ),
        (too_long, "the prompt has 16384 tokens"),
    ];
    for (request, expected) in table {
        let status = cluster.generate(&id, request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(
            status.message().contains(expected),
            "{expected:?} in {status}"
        );
        assert_eq!(status.get_details_error_info().unwrap().reason, "INVALID");
    }
    let good = cluster
        .generate_all(&id, &[request("good", prompt(1, 3), &params(2))])
        .await;
    assert_eq!(good[0].ids.len(), 2);
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_without_engine_says_so() {
    let mut config = q8("a");
    config.roles = RoleSet(Roles {
        attention: false,
        experts: true,
    });
    let (cluster, id) = one_worker(config).await;
    let status = cluster
        .generate(&id, request("r", prompt(1, 3), &params(1)))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert_eq!(
        status.get_details_error_info().unwrap().reason,
        "NO_ATTENTION"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_full_queue_and_a_second_sequence_of_one_id_are_refused() {
    let (cluster, id) = one_worker(WorkerConfig {
        max_running: 1,
        max_waiting: 1,
        ..q8("a")
    })
    .await;
    let long = |name: &str| request(name, prompt(1, 3), &params(8000));
    let mut running = cluster.generate(&id, long("one")).await.unwrap();
    first_token(&mut running, &mut Said::default()).await;
    let waiting = cluster.generate(&id, long("two")).await.unwrap();
    let full = cluster.generate(&id, long("three")).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted, "{full}");
    assert_eq!(full.get_details_error_info().unwrap().reason, "QUEUE_FULL");
    assert!(full.get_details_retry_info().unwrap().retry_delay.is_some());
    let twice = cluster.generate(&id, long("one")).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists, "{twice}");
    drop((running, waiting));
    eventually("there is room again", async || {
        cluster.generate(&id, long("four")).await.is_ok()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_dropped_stream_frees_its_pages() {
    let (cluster, id) = one_worker(WorkerConfig {
        prefix_cache: false,
        ..q8("a")
    })
    .await;
    let mut streams = Vec::new();
    for n in 0..4 {
        let request = request(&format!("r{n}"), prompt(n, 100), &params(8000));
        let mut stream = cluster.generate(&id, request).await.unwrap();
        first_token(&mut stream, &mut Said::default()).await;
        streams.push(stream);
    }
    let busy = cluster.status(&id).await;
    assert!(
        busy.sequences_running == 4 && busy.kv_pages_free <= 512 - 8,
        "{busy:?}"
    );
    drop(streams);
    eventually("all pages are free", async || {
        let status = cluster.status(&id).await;
        status.sequences_running == 0 && status.kv_pages_free == status.kv_pages_total
    })
    .await;
    cluster.stop().await;
}

/// Sequences that run until they are told to stop.
struct Endless {
    running: JoinSet<(u32, Said)>,
    enough: CancellationToken,
}

impl Endless {
    const NUM: u32 = 2;
    /// Tokens that each must still say after it was told to stop.
    const MORE: usize = 20;

    fn request(n: u32, max_tokens: u32) -> v1::GenerateSequenceRequest {
        request(&format!("endless{n}"), prompt(n, 20), &params(max_tokens))
    }

    /// Starts them and waits until all have begun.
    async fn start(cluster: &Cluster, id: &str) -> Self {
        let (mut running, enough) = (JoinSet::new(), CancellationToken::new());
        for n in 0..Self::NUM {
            let mut stream = cluster
                .generate(id, Self::request(n, 16_000))
                .await
                .unwrap();
            let mut said = Said::default();
            first_token(&mut stream, &mut said).await;
            let enough = enough.clone();
            running.spawn(async move {
                let mut more = 0;
                while more < Self::MORE {
                    let event = stream.message().await.unwrap();
                    said.note(event.expect("still running when it is told to stop"));
                    more += usize::from(enough.is_cancelled());
                }
                (n, said)
            });
        }
        Self { running, enough }
    }

    /// Lets them say a few tokens more, and checks every token against an undisturbed worker.
    async fn stop_and_check(self) {
        self.enough.cancel();
        let said = self.running.join_all().await;
        let (cluster, id) = one_worker(q8("undisturbed")).await;
        for (n, said) in said {
            let request = Self::request(n, said.ids.len() as u32);
            let expected = cluster.generate_all(&id, &[request]).await;
            assert_eq!(said.ids, expected[0].ids);
            assert_eq!(said.logprobs, expected[0].logprobs);
        }
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn placements_change_under_running_sequences() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    for id in ["a", "b", "c"] {
        cluster.start(q8(id)).await;
    }
    cluster.publish(&["a"], split(1)).await;
    let running = Endless::start(&cluster, "a").await;
    cluster.publish(&["a", "b"], split(2)).await;
    cluster
        .publish(&["b", "c"], |_| vec![(0, 3, vec![0]), (3, 8, vec![1])])
        .await;
    cluster
        .publish(&["c", "a"], |_| vec![(0, 5, vec![0, 1]), (5, 8, vec![1])])
        .await;
    // What nobody asks for any more is dropped: `b` holds nothing, `c` five of eight segments.
    for (id, segments) in [("a", 64), ("b", 0), ("c", 40)] {
        eventually("old slices are dropped", async || {
            cluster.status(id).await.expert_segments_held == segments
        })
        .await;
    }
    running.stop_and_check().await;
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_under_load_loses_nothing() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    for id in ["a", "b"] {
        cluster.start(q8(id)).await;
    }
    cluster.publish(&["a", "b"], split(2)).await;
    let (on_a, on_b) = (
        Endless::start(&cluster, "a").await,
        Endless::start(&cluster, "b").await,
    );
    let mut client = cluster.workers["a"].client.clone();
    client.drain(v1::DrainRequest {}).await.unwrap();
    eventually("the router is told", async || {
        cluster.record("a").await.unwrap().state == WorkerState::Draining
    })
    .await;
    let refused = cluster
        .generate("a", request("late", prompt(1, 3), &params(1)))
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert_eq!(refused.get_details_error_info().unwrap().reason, "DRAINING");
    eventually("health says so", async || {
        health(&cluster, "a").await == "NOT_SERVING"
    })
    .await;
    // What runs goes on, on both.
    assert_eq!(cluster.status("a").await.sequences_running, Endless::NUM);
    on_a.stop_and_check().await;
    eventually("nothing runs any more", async || {
        cluster.status("a").await.sequences_running == 0
    })
    .await;
    // `b` still needs the experts of `a`, until a placement without it is there.
    assert!(!cluster.workers["a"].ended.is_finished());
    cluster.publish(&["b"], split(1)).await;
    let gone = cluster.workers.remove("a").unwrap();
    gone.ended.await.unwrap().unwrap();
    assert!(cluster.record("a").await.is_none());
    on_b.stop_and_check().await;
    cluster.stop().await;
}

#[tokio::test]
async fn serving_goes_on_without_the_store() {
    let store = FaultStore::new(Arc::new(MemoryStore::new()));
    let mut cluster = Cluster::with_store(Carrier::Grpc, Arc::new(store.clone()));
    for id in ["a", "b"] {
        let mut config = q8(id);
        config.drain_deadline = Duration::from_secs(1);
        cluster.start(config).await;
    }
    cluster.publish(&["a", "b"], split(2)).await;
    let ask = || [request("r", prompt(1, 9), &params(8))];
    let before = cluster.generate_all("a", &ask()).await;
    store.set_up(false);
    assert_eq!(cluster.generate_all("a", &ask()).await, before);
    assert_eq!(cluster.generate_all("b", &ask()).await, before);
    store.set_up(true);
    cluster.stop().await;
}

/// Status line and body of a plain HTTP request.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> (String, String) {
    let mut connection = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: worker\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test]
async fn the_operations_port_tells_alive_from_ready_and_shows_metrics() {
    let ops = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = ops.local_addr().unwrap();
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start_with_ops(q8("a"), Some(ops)).await;
    assert_eq!(http_get(address, "/health/live").await.0, "HTTP/1.1 200 OK");
    let (status, reason) = http_get(address, "/health/ready").await;
    assert!(
        status.contains("503") && reason.contains("joining"),
        "{status} {reason}"
    );
    cluster.publish(&["a"], split(1)).await;
    eventually("the worker is ready", async || {
        http_get(address, "/health/ready").await.0 == "HTTP/1.1 200 OK"
    })
    .await;
    cluster
        .generate_all("a", &[request("r", prompt(1, 3), &params(5))])
        .await;
    let (_, metrics) = http_get(address, "/metrics").await;
    for line in [
        "tramontane_tokens_sampled_total 5",
        "tramontane_placement_epoch 1",
        "tramontane_expert_segments 64",
        "tramontane_step_seconds_count 5",
    ] {
        assert!(
            metrics.lines().any(|found| found == line),
            "{line} in\n{metrics}"
        );
    }
    cluster.stop().await;
}

#[tokio::test]
async fn a_sequence_that_began_with_other_weights_is_refused() {
    let (cluster, id) = one_worker(q8("a")).await;
    let record = cluster.record(&id).await.unwrap();
    let (model, class) = (
        record.model.fingerprint.as_str(),
        record.numeric_class.as_str(),
    );
    let ask = async |model: &str, class: &str| {
        let asked = v1::GenerateSequenceRequest {
            model: model.to_owned(),
            numeric_class: class.to_owned(),
            ..request("r", prompt(1, 5), &params(4))
        };
        cluster.generate(&id, asked).await
    };
    for (model, class) in [("0123456789abcdef", class), (model, "cpu-q4")] {
        let refused = ask(model, class).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(info.reason, "OTHER_WEIGHTS");
    }
    let stream = ask(model, class).await.unwrap();
    assert_eq!(Said::read(stream).await.unwrap().ids.len(), 4);
    cluster.stop().await;
}
