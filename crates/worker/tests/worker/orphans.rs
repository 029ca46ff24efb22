//! A router that dies, vanishes or is cut off leaves nothing behind on its workers; one that is only slow
//! loses nothing.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tonic::Streaming;
use tonic::transport::Channel;
use tramontane_compute::WeightFormat;
use tramontane_proto::v1::{self, worker_client::WorkerClient};
use tramontane_types::SamplingParams;
use tramontane_worker::WorkerConfig;

use crate::cluster::{Carrier, Cluster, Said, config, eventually, prompt, request, split};

/// A broken connection is noticed at once and a silent one within two seconds; machines that run other
/// tests beside this one are slow.
const NOTICED: Duration = Duration::from_secs(5);
/// A pause of a router that lives: longer than peers grant each other, shorter than what a worker grants.
const FAULT: Duration = Duration::from_millis(800);
const WORKER: &str = "a";
const NUM: u32 = 4;

/// The network between a router and a worker.
struct Link {
    address: String,
    paused: watch::Sender<bool>,
    _carrying: JoinSet<()>,
}

impl Link {
    async fn to(worker: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (paused, is_paused) = watch::channel(false);
        let mut carrying = JoinSet::new();
        carrying.spawn(async move {
            let (router, _) = listener.accept().await.unwrap();
            let worker = TcpStream::connect(worker).await.unwrap();
            let (from_router, to_router) = router.into_split();
            let (from_worker, to_worker) = worker.into_split();
            tokio::join!(
                carry(from_router, to_worker, is_paused.clone()),
                carry(from_worker, to_router, is_paused),
            );
        });
        Self {
            address,
            paused,
            _carrying: carrying,
        }
    }
}

/// Carries bytes while the link is not paused; keeps both ends open until it is dropped.
async fn carry(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut is_paused: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while is_paused.wait_for(|paused| !paused).await.is_ok() {
        let num = tokio::select! {
            num = from.read(&mut bytes) => num.unwrap_or(0),
            _ = is_paused.wait_for(|paused| *paused) => continue,
        };
        if num == 0 || to.write_all(&bytes[..num]).await.is_err() {
            return;
        }
    }
}

/// Sequences that one router runs on one worker over a link.
struct Scene {
    cluster: Cluster,
    link: Link,
    streams: Vec<(Streaming<v1::SequenceEvent>, Said)>,
    _client: WorkerClient<Channel>,
}

impl Scene {
    async fn start(max_tokens: u32) -> Self {
        let mut cluster = Cluster::new(Carrier::Local);
        cluster
            .start(WorkerConfig {
                prefix_cache: false,
                ..config(WORKER, WeightFormat::Q8)
            })
            .await;
        cluster.publish(&[WORKER], split(1)).await;
        let link = Link::to(cluster.record(WORKER).await.unwrap().address).await;
        let channel = Channel::from_shared(format!("http://{}", link.address)).unwrap();
        let mut client = WorkerClient::new(channel.connect().await.unwrap());
        let mut streams = Vec::new();
        for n in 0..NUM {
            let params = SamplingParams {
                max_tokens,
                ignore_eos: true,
                ..SamplingParams::default()
            };
            let request = request(&format!("r{n}"), prompt(n, 100), &params);
            let mut stream = client.generate(request).await.unwrap().into_inner();
            let mut said = Said::default();
            while said.ids.is_empty() {
                said.note(stream.message().await.unwrap().unwrap());
            }
            streams.push((stream, said));
        }
        Self {
            cluster,
            link,
            streams,
            _client: client,
        }
    }

    async fn until_nothing_is_left(&self) {
        let begin = Instant::now();
        eventually("the orphans are gone", async || {
            let status = self.cluster.status(WORKER).await;
            status.sequences_running == 0 && status.kv_pages_free == status.kv_pages_total
        })
        .await;
        assert!(begin.elapsed() < NOTICED, "{:?}", begin.elapsed());
    }

    async fn is_busy(&self) -> bool {
        let status = self.cluster.status(WORKER).await;
        status.sequences_running == NUM && status.kv_pages_free < status.kv_pages_total
    }
}

/// More than are sampled while a test looks.
const ENDLESS: u32 = 16_000;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_dies_leaves_no_sequence_behind() {
    let mut scene = Scene::start(ENDLESS).await;
    assert!(scene.is_busy().await);
    // As the kernel does for a killed process: the connection is closed, and no stream was.
    scene.link = Link::to(String::new()).await;
    scene.until_nothing_is_left().await;
    drop(scene.streams);
    scene.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_vanishes_leaves_no_sequence_behind() {
    let scene = Scene::start(ENDLESS).await;
    assert!(scene.is_busy().await);
    // As a pulled cable does: no byte, and no end, in either direction.
    scene.link.paused.send_replace(true);
    scene.until_nothing_is_left().await;
    drop(scene.streams);
    scene.cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_that_pauses_loses_nothing() {
    let tokens = 400;
    let mut scene = Scene::start(tokens).await;
    scene.link.paused.send_replace(true);
    tokio::time::sleep(FAULT).await;
    scene.link.paused.send_replace(false);
    for (mut stream, mut said) in std::mem::take(&mut scene.streams) {
        while let Some(event) = stream.message().await.unwrap() {
            said.note(event);
        }
        assert_eq!(said.ids.len(), tokens as usize);
        assert_eq!(said.finish, Some(v1::FinishReason::Length.into()));
    }
    scene.cluster.stop().await;
}
