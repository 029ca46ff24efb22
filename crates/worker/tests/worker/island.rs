//! A worker that is an island of two processes: it says what one device says, and goes on when a rank is killed. Devices are
//! emulated.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::TcpListener;
use tonic::{Code, Status, Streaming};
use tramontane_compute::WeightFormat;
use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::emulator::Emulator;
use tramontane_compute_cuda::{DeviceChoice, Target};
use tramontane_coordination::MemoryStore;
use tramontane_proto::v1::island_client::IslandClient;
use tramontane_proto::v1::{self, rank_message, sequence_event::Kind};
use tramontane_runtime::Shutdown;
use tramontane_runtime::tls::Tls;
use tramontane_types::SamplingParams;
use tramontane_worker::{
    ExchangeKind, ProcessKind, RankParts, WorkerConfig, WorkerParts, run, run_rank,
};

use crate::cluster::{
    Carrier, Cluster, checkpoint, checkpoint_dir, config, eventually, prompt, request, split,
};
use crate::roles::{ATTENTION, BOTH, EXPERTS, does, want};

/// Says to a process of the tests that it is a rank that follows, and whom: `host:port`, a space, the model's directory.
const FOLLOW: &str = "TRAMONTANE_TEST_FOLLOW";

pub(crate) fn emulator() -> Arc<dyn Device> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    Emulator::new(&dir, Target::Sm80).unwrap()
}

/// A worker on an emulated device in place of the GPU of this number.
pub(crate) fn on_device(id: &str, ordinal: u32) -> WorkerConfig {
    WorkerConfig {
        device: DeviceChoice::Cuda(ordinal),
        max_step_rows: 256,
        num_pages: std::num::NonZeroUsize::new(300),
        ..config(id, WeightFormat::Bf16)
    }
}

/// What a rank that follows has for experts: less than the leader.
const FOLLOWER_BYTES: u64 = 3 << 28;

fn ranks(config: WorkerConfig, rank: u32, leader: Option<String>) -> WorkerConfig {
    WorkerConfig {
        island_ranks: 2,
        island_rank: rank,
        island_leader: leader,
        island_form_wait: Duration::from_secs(60),
        ..config
    }
}

/// Follows as a process of its own, until it is killed.
#[test]
fn rank_process() {
    #[expect(
        clippy::disallowed_methods,
        reason = "the test that starts it says what it is"
    )]
    let Ok(said) = std::env::var(FOLLOW) else {
        println!("skipped: no process of a rank");
        return;
    };
    let (leader, directory) = said.split_once(' ').unwrap();
    let device = emulator();
    tramontane_worker::device::provide(1, &device);
    let parts = RankParts {
        tls: Tls::default(),
        checkpoint: Arc::new(tramontane_model::Checkpoint::open(directory.as_ref()).unwrap()),
        ops: None,
    };
    let config = WorkerConfig {
        expert_memory: Some(FOLLOWER_BYTES),
        ..ranks(on_device("island", 1), 1, Some(leader.to_owned()))
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime
        .block_on(run_rank(config, parts, Shutdown::new()))
        .unwrap();
}

/// A process that does not outlive its test.
struct Follower(Child);

impl Follower {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may be dead already, as it should.
        let _dead = self.0.kill();
        let _dead = self.0.wait();
    }
}

fn follower(leader: SocketAddr) -> Follower {
    let directory = checkpoint_dir().display();
    let started = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "island::rank_process", "--nocapture"])
        .env(FOLLOW, format!("{leader} {directory}"))
        .stdout(Stdio::null())
        .spawn();
    Follower(started.unwrap())
}

/// Three sequences of one batch: a long prompt, a short one, and one that is sampled.
fn requests() -> Vec<v1::GenerateSequenceRequest> {
    let one = |index: u32, len: usize, temperature: f32| {
        let params = SamplingParams {
            temperature,
            seed: 7,
            max_tokens: 5,
            ignore_eos: true,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        request(&format!("r{index}"), prompt(index, len), &params)
    };
    vec![one(0, 80, 0.0), one(1, 5, 0.0), one(2, 20, 0.9)]
}

/// A sequence that outlasts whatever a test does.
fn endless() -> v1::GenerateSequenceRequest {
    let params = SamplingParams {
        max_tokens: 10_000,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    request("endless", prompt(9, 12), &params)
}

/// A sequence with a token.
async fn begun(cluster: &Cluster) -> Streaming<v1::SequenceEvent> {
    let mut stream = cluster.generate("island", endless()).await.unwrap();
    let is_token = |event: v1::SequenceEvent| matches!(event.kind, Some(Kind::Tokens(_)));
    while !stream.message().await.unwrap().is_some_and(is_token) {}
    stream
}

/// How it ends.
async fn failure(mut stream: Streaming<v1::SequenceEvent>) -> Status {
    loop {
        match stream.message().await {
            Ok(event) => assert!(event.is_some(), "the sequence came to its end"),
            Err(status) => return status,
        }
    }
}

/// Steps that both ranks have computed.
async fn steps(cluster: &Cluster) -> u64 {
    cluster.status("island").await.island_steps
}

/// Bytes that the island offers for experts.
async fn offered(cluster: &Cluster) -> u64 {
    cluster.record("island").await.unwrap().capacity_bytes
}

async fn formed(cluster: &Cluster, num_ranks: u32) {
    eventually("the ranks have come together", async || {
        cluster.status("island").await.island_ranks == num_ranks
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_island_says_what_one_device_says_and_survives_a_killed_rank() {
    let (own, other) = (emulator(), emulator());
    tramontane_worker::device::provide(0, &own);
    tramontane_worker::device::provide(2, &other);
    let mut alone = Cluster::new(Carrier::Grpc);
    alone.start(on_device("alone", 2)).await;
    alone.publish(&["alone"], split(1)).await;
    let expected = alone.generate_all("alone", &requests()).await;
    alone.stop().await;

    let mut cluster = Cluster::new(Carrier::Grpc);
    let leader = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = leader.local_addr().unwrap();
    let mut rank = follower(address);
    cluster
        .start_at(
            ranks(on_device("island", 0), 0, None),
            None,
            (leader, checkpoint()),
        )
        .await;
    assert_eq!(cluster.status("island").await.island_ranks, 2);
    assert_eq!(
        offered(&cluster).await,
        2 * FOLLOWER_BYTES,
        "twice what the smaller rank has"
    );
    cluster.publish(&["island"], split(1)).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert_eq!(steps(&cluster).await, cluster.status("island").await.steps);

    // In the middle of a sequence: it is handed back, as by a worker that is lost.
    let lost = begun(&cluster).await;
    rank.kill();
    assert_eq!(failure(lost).await.code(), Code::Unavailable);

    // Alone, with what the other one had: the same memory has room for the tiny model.
    formed(&cluster, 1).await;
    eventually("the leader offers its own memory", async || {
        offered(&cluster).await == 1 << 30
    })
    .await;
    assert!(cluster.generate_all("island", &requests()).await == expected);

    // A new process in its place: pages that the prefix cache knows are there as well.
    let rank = follower(address);
    formed(&cluster, 2).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert_eq!(cluster.status("island").await.island_epoch, 3);
    let before = steps(&cluster).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert!(steps(&cluster).await > before);

    // One that hangs is found silent.
    let lost = begun(&cluster).await;
    rank.signal(Signal::STOP);
    assert_eq!(failure(lost).await.code(), Code::Unavailable);
    formed(&cluster, 1).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    rank.signal(Signal::CONT);
    formed(&cluster, 2).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    cluster.stop().await;
}

#[tokio::test]
async fn an_island_without_gpus_and_a_rank_without_a_leader_are_refused_by_name() {
    let parts = || RankParts {
        tls: Tls::default(),
        checkpoint: checkpoint(),
        ops: None,
    };
    let refused = async |config: WorkerConfig| {
        let ended = run_rank(config, parts(), Shutdown::new())
            .await
            .unwrap_err();
        std::error::Error::source(&ended).unwrap().to_string()
    };
    let on_cpu = WorkerConfig {
        device: DeviceChoice::Cpu,
        ..config("island", WeightFormat::Bf16)
    };
    let leader = Some("127.0.0.1:1".to_owned());
    assert_eq!(
        refused(ranks(on_cpu.clone(), 1, leader)).await,
        "device must be a GPU for a rank of an island, got cpu"
    );
    assert_eq!(
        refused(on_cpu.clone()).await,
        "island_rank must be above 0, and island_leader set, for a rank that follows, got 0"
    );
    // And the other way round.
    let parts = WorkerParts {
        tls: Tls::default(),
        store: Arc::new(MemoryStore::new()),
        checkpoint: checkpoint(),
        model_name: "tiny".to_owned(),
        vocabulary: None,
        grpc: TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ops: None,
        progress: None,
        exchange: ExchangeKind::Grpc,
        process: ProcessKind::Shared,
    };
    let follows = ranks(on_cpu, 1, Some("127.0.0.1:1".to_owned()));
    let ended = run(follows, parts, Shutdown::new()).await.unwrap_err();
    assert_eq!(
        std::error::Error::source(&ended).unwrap().to_string(),
        "island_rank must be 0 for a worker: the other ranks of an island follow one, got 1"
    );
}

/// Experts that others hold as well: rows travel, and the island's part of each call is both ranks'.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_island_shares_experts_with_other_workers() {
    let (own, other) = (emulator(), emulator());
    tramontane_worker::device::provide(3, &own);
    tramontane_worker::device::provide(4, &other);
    let mut cluster = Cluster::new(Carrier::Grpc);
    cluster.start(on_device("other", 4)).await;
    cluster.publish(&["other"], split(1)).await;
    let expected = cluster.generate_all("other", &requests()).await;

    let leader = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = leader.local_addr().unwrap();
    let _rank = follower(address);
    cluster
        .start_at(
            ranks(on_device("island", 3), 0, None),
            None,
            (leader, checkpoint()),
        )
        .await;
    // Half of each expert, cut where no rank's segments end, and some experts whole.
    let cuts = |index: usize| match index % 3 {
        0 => vec![(0, 3, vec![0]), (3, 8, vec![1])],
        1 => vec![(0, 8, vec![1])],
        _ => vec![(0, 6, vec![1]), (6, 8, vec![0])],
    };
    cluster.publish(&["other", "island"], cuts).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert!(cluster.generate_all("other", &requests()).await == expected);
    assert_eq!(steps(&cluster).await, 0, "layer by layer");
    // The whole model again: what rank 0 has computed alone is copied to the other one.
    cluster.publish(&["island"], split(1)).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert!(steps(&cluster).await > 0);
    cluster.stop().await;
}

/// A worker `other`, and an island whose rank follows from the files; both hold what `publish` says.
async fn beside_another(cluster: &mut Cluster, (island, other): (u32, u32)) -> Follower {
    cluster.start(on_device("other", other)).await;
    cluster.publish(&["other"], split(1)).await;
    let leader = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let rank = follower(leader.local_addr().unwrap());
    // Nothing of the model is at rank 0: it takes what it packs from `other`.
    let config = ranks(on_device("island", island), 0, None);
    let from_peers = cluster.checkpoint_of_peers(&config).await;
    cluster.start_at(config, None, (leader, from_peers)).await;
    rank
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn roles_of_an_island_without_files_change_while_it_serves() {
    let (own, other) = (emulator(), emulator());
    tramontane_worker::device::provide(5, &own);
    tramontane_worker::device::provide(6, &other);
    let mut cluster = Cluster::new(Carrier::Grpc);
    let _rank = beside_another(&mut cluster, (5, 6)).await;
    let expected = cluster.generate_all("other", &requests()).await;
    assert_eq!(
        offered(&cluster).await,
        2 * FOLLOWER_BYTES,
        "twice what the smaller rank has"
    );
    cluster.publish(&["island"], split(1)).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    let (whole, epoch) = (
        steps(&cluster).await,
        cluster.status("island").await.island_epoch,
    );
    assert!(whole > 0);

    // Experts for others: both ranks' part of each call, and no memory more than before, since ranks keep their pages.
    want(&cluster, "island", EXPERTS).await;
    does(&cluster, "island", EXPERTS).await;
    assert_eq!(offered(&cluster).await, 2 * FOLLOWER_BYTES);
    assert!(cluster.generate_all("other", &requests()).await == expected);
    assert_eq!(steps(&cluster).await, whole);

    // A new engine: the ranks have come together again, and compute whole steps with it.
    want(&cluster, "island", BOTH).await;
    does(&cluster, "island", BOTH).await;
    eventually("the ranks have come together again", async || {
        cluster.status("island").await.island_epoch == epoch + 1
    })
    .await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    let whole_again = steps(&cluster).await;
    assert!(whole_again > whole);

    // Attention alone, with the experts of others.
    want(&cluster, "island", ATTENTION).await;
    cluster.publish(&["other"], split(1)).await;
    does(&cluster, "island", ATTENTION).await;
    assert_eq!(offered(&cluster).await, 0);
    eventually("all ranks have dropped their slices", async || {
        cluster.status("island").await.expert_segments_held == 0
    })
    .await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert_eq!(steps(&cluster).await, whole_again, "layer by layer");

    want(&cluster, "island", BOTH).await;
    does(&cluster, "island", BOTH).await;
    assert_eq!(offered(&cluster).await, 2 * FOLLOWER_BYTES);
    cluster.publish(&["island"], split(1)).await;
    assert!(cluster.generate_all("island", &requests()).await == expected);
    assert!(steps(&cluster).await > whole_again);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_rank_of_another_version_is_refused() {
    let own = emulator();
    tramontane_worker::device::provide(7, &own);
    let mut cluster = Cluster::new(Carrier::Grpc);
    let leader = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = leader.local_addr().unwrap();
    let alone = WorkerConfig {
        island_form_wait: Duration::from_millis(1),
        ..ranks(on_device("island", 7), 0, None)
    };
    cluster.start_at(alone, None, (leader, checkpoint())).await;
    let hello = v1::RankHello {
        model: "another".to_owned(),
        ..v1::RankHello::default()
    };
    let said = v1::RankMessage {
        kind: Some(rank_message::Kind::Hello(hello)),
    };
    let mut client = IslandClient::connect(format!("http://{address}"))
        .await
        .unwrap();
    let refused = client.follow(tokio_stream::once(said)).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    let (model, message) = (checkpoint(), refused.message());
    assert!(message.contains("another"), "{message}");
    assert!(message.contains(model.fingerprint()), "{message}");
    assert_eq!(cluster.status("island").await.island_ranks, 1);
    cluster.stop().await;
}
