//! The exchange over Unix sockets: the same bits, the same end of calls whose worker is gone, gRPC where
//! there is no socket, and one batch out of one's own rows and a peer's.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::net::UnixListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tramontane_compute::Experts;
use tramontane_exchange::{
    Desk, Error, ExchangeConfig, ExpertExchange, ExpertServer, ExpertServiceConfig, HostListener,
    HostTransport, PeerAddress, Transport,
};
use tramontane_types::{Epoch, ModelGeometry, Placement, SegmentRange, SliceHolders, WorkerId};

use super::cluster::{self, Random, bits, geometry, run, runtime, server_config, transport_config};
use super::fake_experts::FakeExperts;
use super::{LAYER, PATIENCE, until};

/// Nobody listens there: what arrives has come through a socket.
const NOWHERE: &str = "127.0.0.1:1";

/// One worker: its experts, and its own exchange.
struct Worker {
    id: WorkerId,
    desk: Arc<Desk>,
    experts: Arc<FakeExperts>,
    server: Option<ExpertServer>,
    transport: Arc<HostTransport>,
    socket: PathBuf,
    stop: CancellationToken,
    tasks: TaskTracker,
    runtime: tokio::runtime::Runtime,
}

impl Worker {
    fn start(name: &str, directory: &tempfile::TempDir, geometry: &ModelGeometry) -> Self {
        let (stop, tasks, runtime) = (CancellationToken::new(), TaskTracker::new(), runtime());
        let desk = Arc::new(Desk::with_sockets().unwrap());
        let experts = Arc::new(FakeExperts::new(geometry.clone()));
        let epoch = Arc::new(AtomicU64::new(7));
        let config = server_config(geometry);
        let server =
            ExpertServer::start_at(Arc::clone(&desk), config, Arc::clone(&experts) as _, epoch);
        let id = WorkerId::new(name);
        let service = ExpertServiceConfig::new(id.clone(), "test".to_owned(), "demo".to_owned());
        let listener = HostListener::new(service, server.handle(), Arc::clone(&desk));
        let socket = directory.path().join(name);
        let bound = runtime.block_on(async { UnixListener::bind(&socket).unwrap() });
        tasks.spawn_on(
            listener.serve(bound, stop.clone(), tasks.clone()),
            runtime.handle(),
        );
        let mut config = transport_config(geometry);
        config.me = id.clone();
        let handle = runtime.handle().clone();
        let transport = HostTransport::new(
            config,
            Arc::clone(&desk),
            handle,
            stop.clone(),
            tasks.clone(),
        );
        Self {
            id,
            desk,
            experts,
            server: Some(server),
            transport: Arc::new(transport),
            socket,
            stop,
            tasks,
            runtime,
        }
    }

    fn meet(&self, peers: &[&Self]) {
        let address = |peer: &&Self| PeerAddress {
            address: NOWHERE.to_owned(),
            socket: Some(peer.socket.clone()),
        };
        let peers: HashMap<_, _> = peers.iter().map(|p| (p.id.clone(), address(p))).collect();
        let num_peers = peers.len() as u64;
        self.transport.set_peers(peers);
        until("a connection", || {
            self.transport.stats().connects == num_peers
        });
    }

    /// Its engine's exchange, which shares the desk with the server.
    fn exchange(&self, placement: &Placement, geometry: &ModelGeometry) -> ExpertExchange {
        for slice in placement.slices_of(&self.id) {
            self.experts.hold(slice.layer, slice.expert, slice.range);
        }
        let format = tramontane_compute::RowFormat::F32;
        let mut config = ExchangeConfig::new(self.id.clone(), geometry.clone(), format);
        (config.layer_deadline, config.call_timeout) = (PATIENCE, PATIENCE);
        let experts = Arc::clone(&self.experts) as Arc<dyn Experts>;
        let placement = Arc::new(arc_swap::ArcSwapOption::from_pointee(placement.clone()));
        let transport = Arc::clone(&self.transport) as _;
        let server = self.server.as_ref().map(ExpertServer::handle);
        ExpertExchange::new(config, Some(experts), placement, transport)
            .at(Arc::clone(&self.desk), server)
    }

    /// As SIGKILL does: connections end, nothing that waits is computed.
    fn kill(&mut self) {
        self.stop.cancel();
        self.desk.close();
        self.server = None;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.experts.open();
        self.stop.cancel();
        self.tasks.close();
        let ended = async { tokio::time::timeout(PATIENCE, self.tasks.wait()).await };
        assert!(
            self.runtime.block_on(ended).is_ok(),
            "a task of the transport did not end"
        );
    }
}

/// Every expert in two halves: the first with worker 0, the second with the `holders`.
fn halves(geometry: &ModelGeometry, workers: &[&str], holders: &[u16]) -> Placement {
    let half = |begin, end, holders: &[u16]| SliceHolders {
        range: SegmentRange::new(begin, end).unwrap(),
        holders: holders.to_vec(),
    };
    let (num_layers, num_experts) = (geometry.num_layers, geometry.num_experts);
    Placement {
        epoch: Epoch(1),
        numeric_class: "fake-f32".to_owned(),
        model: "demo".to_owned(),
        num_layers,
        num_experts,
        workers: workers.iter().map(|&id| WorkerId::new(id)).collect(),
        experts: vec![vec![half(0, 4, &[0]), half(4, 8, holders)]; num_layers * num_experts],
    }
}

#[test]
fn rows_go_through_the_socket_and_come_back_with_the_same_bits() {
    let (directory, geometry) = (tempfile::tempdir().unwrap(), geometry(256));
    let (a, b) = (
        Worker::start("a", &directory, &geometry),
        Worker::start("b", &directory, &geometry),
    );
    a.meet(&[&b]);
    let placement = halves(&geometry, &["a", "b"], &[1]);
    let mut exchange = a.exchange(&placement, &geometry);
    let _loaded = b.exchange(&placement, &geometry);
    // The last one does not fit a socket's buffer, nor one call.
    for num_rows in [0, 1, 7, 40, 1500] {
        let routed = Random(num_rows as u64).routed(num_rows, &geometry);
        let got = run(&mut exchange, LAYER, &routed, geometry.hidden).unwrap();
        assert_eq!(bits(&got), bits(&a.experts.direct(LAYER, &routed)));
    }
    let (stats, carried) = (exchange.stats(), a.transport.stats());
    assert_eq!(stats.retries.load(Ordering::Relaxed), 0);
    assert_eq!(carried.calls, stats.frames.load(Ordering::Relaxed));
    assert_eq!((carried.connects, carried.lost), (1, 0));
    assert_eq!(
        carried.bytes_received,
        stats.bytes_received.load(Ordering::Relaxed)
    );
    let local = stats.rows_local.load(Ordering::Relaxed);
    assert_eq!(local, stats.rows_remote.load(Ordering::Relaxed));
}

#[test]
fn a_worker_that_is_gone_is_replaced_by_its_replica() {
    let (directory, geometry) = (tempfile::tempdir().unwrap(), geometry(256));
    let start = |name| Worker::start(name, &directory, &geometry);
    let (a, mut b, c) = (start("a"), start("b"), start("c"));
    a.meet(&[&b, &c]);
    let placement = halves(&geometry, &["a", "b", "c"], &[1, 2]);
    let mut exchange = a.exchange(&placement, &geometry);
    for worker in [&b, &c] {
        let _loaded = worker.exchange(&placement, &geometry);
    }
    b.experts.close();
    let routed = Random(3).routed(9, &geometry);
    let expected = a.experts.direct(LAYER, &routed);
    std::thread::scope(|scope| {
        let (exchange, routed, expected) = (&mut exchange, &routed, &expected);
        let step = scope.spawn(move || {
            for _ in 0..4 {
                let got = run(exchange, LAYER, routed, 8).unwrap();
                assert_eq!(bits(&got), bits(expected));
            }
        });
        b.experts.wait_entered(1);
        b.stop.cancel();
        b.desk.close();
        b.experts.open();
        step.join().unwrap();
    });
    b.kill();
    assert!(exchange.stats().retries.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_lost_peer_without_replica_runs_into_the_deadline() {
    let (directory, geometry) = (tempfile::tempdir().unwrap(), geometry(256));
    let (a, mut b) = (
        Worker::start("a", &directory, &geometry),
        Worker::start("b", &directory, &geometry),
    );
    a.meet(&[&b]);
    let placement = halves(&geometry, &["a", "b"], &[1]);
    let _loaded = b.exchange(&placement, &geometry);
    let mut exchange = a.exchange(&placement, &geometry);
    let routed = Random(3).routed(2, &geometry);
    run(&mut exchange, LAYER, &routed, 8).unwrap();
    b.kill();
    drop(exchange);
    let mut config =
        ExchangeConfig::new(a.id.clone(), geometry, tramontane_compute::RowFormat::F32);
    config.layer_deadline = cluster::SHORT;
    let placement = Arc::new(arc_swap::ArcSwapOption::from_pointee(placement));
    let transport = Arc::clone(&a.transport) as _;
    let mut exchange = ExpertExchange::new(
        config,
        Some(Arc::clone(&a.experts) as _),
        placement,
        transport,
    )
    .at(Arc::clone(&a.desk), None);
    let error = run(&mut exchange, LAYER, &routed, 8).unwrap_err();
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
}

#[test]
fn without_a_socket_calls_go_over_grpc() {
    let geometry = geometry(256);
    let cluster = cluster::Cluster::start(cluster::Kind::Grpc, 2, &geometry);
    cluster.place(1, |_, _| vec![1]);
    let directory = tempfile::tempdir().unwrap();
    let me = Worker::start("w0", &directory, &geometry);
    let peer = PeerAddress {
        address: cluster.workers[1].address.unwrap().to_string(),
        socket: Some(directory.path().join("no such socket")),
    };
    me.transport
        .set_peers(HashMap::from([(WorkerId::new("w1"), peer)]));
    let placement = cluster.placement.load_full().unwrap();
    let mut exchange = me.exchange(&placement, &geometry);
    let routed = Random(3).routed(30, &geometry);
    let got = run(&mut exchange, LAYER, &routed, 8).unwrap();
    assert_eq!(bits(&got), bits(&me.experts.direct(LAYER, &routed)));
    assert_eq!(me.transport.stats().connects, 1);
}

#[test]
fn two_engines_that_ask_each_other_both_go_on() {
    let (directory, geometry) = (tempfile::tempdir().unwrap(), geometry(256));
    let (a, b) = (
        Worker::start("a", &directory, &geometry),
        Worker::start("b", &directory, &geometry),
    );
    a.meet(&[&b]);
    b.meet(&[&a]);
    let placement = halves(&geometry, &["a", "b"], &[1]);
    std::thread::scope(|scope| {
        for (worker, seed) in [(&a, 1), (&b, 2)] {
            let mut exchange = worker.exchange(&placement, &geometry);
            let geometry = &geometry;
            scope.spawn(move || {
                for step in 0..200_u16 {
                    let layer = tramontane_types::LayerId(step % 2);
                    let routed = Random(seed * 1000 + u64::from(step)).routed(5, geometry);
                    let got = run(&mut exchange, layer, &routed, 8).unwrap();
                    assert_eq!(bits(&got), bits(&worker.experts.direct(layer, &routed)));
                }
            });
        }
    });
    // Each computed for the other.
    for worker in [&a, &b] {
        let stats = worker.server.as_ref().unwrap().handle().stats();
        assert!(
            stats.calls >= 200 && stats.batches <= stats.calls,
            "{stats:?}"
        );
    }
}
