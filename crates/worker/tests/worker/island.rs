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
use tramontane_proto::v1::{self, sequence_event::Kind};
use tramontane_runtime::Shutdown;
use tramontane_types::SamplingParams;
use tramontane_worker::{RankParts, WorkerConfig, run_rank};

use crate::cluster::{
    Carrier, Cluster, checkpoint, checkpoint_dir, config, eventually, prompt, request, split,
};

/// Says to a process of the tests that it is a rank that follows, and whom: `host:port`, a space, the model's directory.
const FOLLOW: &str = "TRAMONTANE_TEST_FOLLOW";

fn emulator() -> Arc<dyn Device> {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    Emulator::new(&dir, Target::Sm80).unwrap()
}

/// A worker on an emulated device in place of the GPU of this number.
fn on_device(id: &str, ordinal: u32) -> WorkerConfig {
    WorkerConfig {
        device: DeviceChoice::Cuda(ordinal),
        max_step_rows: 256,
        num_pages: std::num::NonZeroUsize::new(300),
        ..config(id, WeightFormat::Bf16)
    }
}

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
        checkpoint: Arc::new(tramontane_model::Checkpoint::open(directory.as_ref()).unwrap()),
        ops: None,
    };
    let config = ranks(on_device("island", 1), 1, Some(leader.to_owned()));
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
    let capacity = async || cluster.record("island").await.unwrap().capacity_bytes;
    assert_eq!(capacity().await, 2 << 30, "both ranks' memory");
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
        cluster.record("island").await.unwrap().capacity_bytes == 1 << 30
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
        refused(on_cpu).await,
        "island_rank must be above 0, and island_leader set, for a rank that follows, got 0"
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
