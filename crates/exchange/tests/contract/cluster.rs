//! Workers of one group in one process, reached directly or over gRPC on loopback; each can be killed.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::transport::Server;
use tramontane_compute::{Experts, RoutedRows, RowFormat, combine::add_expert_sums};
use tramontane_exchange::{
    CallLimits, Error, Exchange, ExchangeConfig, ExpertExchange, ExpertServer, ExpertServerConfig,
    ExpertService, ExpertServiceConfig, GrpcTransport, GrpcTransportConfig, LinkSettings,
    LocalTransport, TcpDial, Transport,
};
use tramontane_types::{
    Epoch, ExpertId, LayerId, ModelGeometry, Placement, SegmentRange, SliceHolders, WorkerId,
};

use super::fake_experts::FakeExperts;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Local,
    Grpc,
}

pub(crate) struct Cluster {
    pub(crate) geometry: ModelGeometry,
    pub(crate) kind: Kind,
    pub(crate) placement: Arc<ArcSwapOption<Placement>>,
    pub(crate) workers: Vec<Worker>,
    local: Arc<LocalTransport>,
    grpc: Arc<GrpcTransport>,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    runtime: Runtime,
}

pub(crate) struct Worker {
    pub(crate) id: WorkerId,
    pub(crate) experts: Arc<FakeExperts>,
    pub(crate) server: Option<ExpertServer>,
    pub(crate) address: Option<SocketAddr>,
    /// Ends the service, as a drain does.
    pub(crate) drain: CancellationToken,
    runtime: Option<Runtime>,
}

pub(crate) fn geometry(ff: usize) -> ModelGeometry {
    ModelGeometry {
        hidden: 8,
        num_layers: 2,
        num_heads: 1,
        num_kv_heads: 1,
        head_dim: 8,
        ff,
        num_experts: 4,
        top_k: 2,
        vocab: 16,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: None,
        max_positions: 64,
    }
}

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap()
}

pub(crate) fn server_config(geometry: &ModelGeometry) -> ExpertServerConfig {
    ExpertServerConfig::new(geometry.clone(), RowFormat::F32, "fake-f32".to_owned())
}

pub(crate) fn transport_config(geometry: &ModelGeometry) -> GrpcTransportConfig {
    GrpcTransportConfig {
        me: WorkerId::new("w0"),
        cluster: "test".to_owned(),
        numeric_class: "fake-f32".to_owned(),
        model: "demo".to_owned(),
        limits: CallLimits::new(geometry, RowFormat::F32),
        link: LinkSettings::default(),
        dial: Arc::new(TcpDial),
    }
}

impl Worker {
    pub(crate) fn start(name: &str, config: ExpertServerConfig, credits: usize) -> Self {
        let experts = Arc::new(FakeExperts::new(config.geometry.clone()));
        let mut worker = Self {
            id: WorkerId::new(name),
            experts,
            server: None,
            address: None,
            drain: CancellationToken::new(),
            runtime: None,
        };
        worker.revive(config, credits);
        worker
    }

    /// Starts the server again, on the same port when it had one.
    pub(crate) fn revive(&mut self, config: ExpertServerConfig, credits: usize) {
        let epoch = Arc::new(AtomicU64::new(7));
        let server = ExpertServer::start(config, Arc::clone(&self.experts) as _, epoch);
        let service = ExpertService::new(
            ExpertServiceConfig {
                credits,
                streams_max: STREAMS_MAX,
                ..ExpertServiceConfig::new(self.id.clone(), "test".to_owned(), "demo".to_owned())
            },
            server.handle(),
            self.drain.clone(),
            TaskTracker::new(),
        );
        let runtime = runtime();
        let address = self
            .address
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)));
        let listener = runtime.block_on(async {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.set_reuseaddr(true).unwrap();
            socket.bind(address).unwrap();
            socket.listen(16).unwrap()
        });
        self.address = Some(listener.local_addr().unwrap());
        let serving = ExpertService::tune(Server::builder(), LinkSettings::default())
            .add_service(service.into_service())
            .serve_with_incoming(TcpListenerStream::new(listener));
        TaskTracker::new().spawn_on(serving, runtime.handle());
        self.server = Some(server);
        self.runtime = Some(runtime);
    }

    /// As SIGSTOP does, until `resume` is dropped: sockets stay open and nothing answers.
    pub(crate) fn freeze(&self, resume: std::sync::mpsc::Receiver<()>) {
        let runtime = self.runtime.as_ref().unwrap();
        let (frozen, is_frozen) = std::sync::mpsc::sync_channel(1);
        let stop = async move {
            frozen.send(()).unwrap();
            // Blocks the only thread of this runtime.
            let _resumed = resume.recv();
        };
        TaskTracker::new().spawn_on(stop, runtime.handle());
        is_frozen.recv().unwrap();
    }

    /// As SIGKILL does: no goodbye. Sockets close, waiting calls are never computed.
    pub(crate) fn kill(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
        self.server = None;
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.experts.open();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Cluster {
    pub(crate) fn start(kind: Kind, num_workers: usize, geometry: &ModelGeometry) -> Self {
        Self::start_with(kind, num_workers, &server_config(geometry))
    }

    pub(crate) fn start_with(kind: Kind, num_workers: usize, config: &ExpertServerConfig) -> Self {
        let geometry = config.geometry.clone();
        let (shutdown, tasks, runtime) = (CancellationToken::new(), TaskTracker::new(), runtime());
        let start = |i| Worker::start(&format!("w{i}"), config.clone(), 32);
        let workers: Vec<Worker> = (0..num_workers).map(start).collect();
        let grpc = GrpcTransport::new(
            transport_config(&geometry),
            runtime.handle().clone(),
            shutdown.clone(),
            tasks.clone(),
        );
        let (placement, local, grpc) = (Arc::default(), Arc::default(), Arc::new(grpc));
        let cluster = Self {
            geometry,
            kind,
            placement,
            workers,
            local,
            grpc,
            shutdown,
            tasks,
            runtime,
        };
        cluster.announce();
        cluster
    }

    /// Tells the transports where the workers are.
    pub(crate) fn announce(&self) {
        let mut addresses = HashMap::new();
        for worker in &self.workers {
            if let Some(server) = &worker.server {
                self.local.insert(worker.id.clone(), server.handle());
            }
            addresses.insert(worker.id.clone(), worker.address.unwrap().to_string());
        }
        self.grpc.set_peers(addresses);
    }

    pub(crate) fn kill(&mut self, worker: usize) {
        self.workers[worker].kill();
        self.local.remove(&self.workers[worker].id);
    }

    pub(crate) fn revive(&mut self, worker: usize) {
        let config = server_config(&self.geometry);
        self.workers[worker].revive(config, 32);
        self.announce();
    }

    pub(crate) fn transport(&self) -> Arc<dyn Transport> {
        match self.kind {
            Kind::Local => Arc::clone(&self.local) as _,
            Kind::Grpc => Arc::clone(&self.grpc) as _,
        }
    }

    /// The exchange of `me`, with that worker's experts when it is one of the workers.
    pub(crate) fn exchange(&self, me: &str) -> ExpertExchange {
        self.exchange_with(me, |_| {})
    }

    pub(crate) fn exchange_with(
        &self,
        me: &str,
        change: impl FnOnce(&mut ExchangeConfig),
    ) -> ExpertExchange {
        let me = WorkerId::new(me);
        let local = self.workers.iter().find(|w| w.id == me);
        let local = local.map(|w| Arc::clone(&w.experts) as Arc<dyn Experts>);
        let mut config = ExchangeConfig::new(me, self.geometry.clone(), RowFormat::F32);
        config.layer_deadline = super::PATIENCE;
        config.call_timeout = super::PATIENCE;
        change(&mut config);
        ExpertExchange::new(config, local, Arc::clone(&self.placement), self.transport())
    }

    /// Cuts every expert into `num_slices`; `holders` names the workers of (expert, slice). Loads what
    /// they are to hold and publishes the placement.
    pub(crate) fn place(&self, num_slices: u8, holders: impl Fn(usize, usize) -> Vec<u16>) {
        for worker in &self.workers {
            worker.experts.hold_nothing();
        }
        let placement = self.make_placement(num_slices, holders);
        self.load(&placement);
        self.placement.store(Some(Arc::new(placement)));
    }

    pub(crate) fn load(&self, placement: &Placement) {
        for worker in &self.workers {
            for slice in placement.slices_of(&worker.id) {
                worker.experts.hold(slice.layer, slice.expert, slice.range);
            }
        }
    }

    pub(crate) fn make_placement(
        &self,
        num_slices: u8,
        holders: impl Fn(usize, usize) -> Vec<u16>,
    ) -> Placement {
        let cut = |i: u8| (usize::from(i) * 8 / usize::from(num_slices)) as u8;
        let slices = |expert: usize| {
            let slice = |i: u8| SliceHolders {
                range: SegmentRange::new(cut(i), cut(i + 1)).unwrap(),
                holders: holders(expert, usize::from(i)),
            };
            (0..num_slices).map(slice).collect()
        };
        let (num_layers, num_experts) = (self.geometry.num_layers, self.geometry.num_experts);
        let epoch = self
            .placement
            .load()
            .as_ref()
            .map_or(Epoch(1), |p| p.epoch.next());
        let placement = Placement {
            epoch,
            numeric_class: "fake-f32".to_owned(),
            model: "demo".to_owned(),
            num_layers,
            num_experts,
            workers: self.workers.iter().map(|w| w.id.clone()).collect(),
            experts: (0..num_layers * num_experts)
                .map(|i| slices(i % num_experts))
                .collect(),
        };
        placement.validate().unwrap();
        placement
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.shutdown.cancel();
        self.tasks.close();
        // Every task of the transport ends when it is told to.
        let ended = async { tokio::time::timeout(super::PATIENCE, self.tasks.wait()).await };
        assert!(
            self.runtime.block_on(ended).is_ok(),
            "a task of the transport did not end"
        );
    }
}

/// Small deterministic numbers for scenarios.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) as usize % limit
    }

    pub(crate) fn float(&mut self) -> f32 {
        self.below(2_000_003) as f32 / 1_000_001.0 - 1.0
    }

    pub(crate) fn routed(&mut self, num_rows: usize, geometry: &ModelGeometry) -> RoutedRows {
        let mut routed = RoutedRows {
            num_rows,
            ..RoutedRows::default()
        };
        for _ in 0..num_rows {
            for _ in 0..geometry.hidden {
                routed.rows.extend(self.float().to_le_bytes());
            }
            let first = self.below(geometry.num_experts - 1);
            let second = first + 1 + self.below(geometry.num_experts - 1 - first);
            routed
                .topk_ids
                .extend([ExpertId(first as u16), ExpertId(second as u16)]);
            let weight = (self.float() + 1.0) / 2.0;
            routed.topk_weights.extend([weight, 1.0 - weight]);
        }
        routed
    }
}

/// Dispatch and combine; the residual stream that began as zeros.
pub(crate) fn run(
    exchange: &mut ExpertExchange,
    layer: LayerId,
    routed: &RoutedRows,
    hidden: usize,
) -> Result<Vec<f32>, Error> {
    let ticket = exchange.dispatch(layer, routed)?;
    let mut residual = vec![0.0; routed.num_rows * hidden];
    let mut times = 0;
    exchange.combine(ticket, &mut |contributions| {
        times += 1;
        add_expert_sums(&mut residual, hidden, contributions)
    })?;
    assert_eq!(times, 1, "`add` is called once");
    Ok(residual)
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Streams that the service of a worker takes at once.
pub(crate) const STREAMS_MAX: usize = 8;

pub(crate) const SHORT: Duration = Duration::from_millis(60);
