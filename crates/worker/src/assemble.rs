//! Makes a worker's parts and connects them: backend, experts, exchange, engine. Nothing runs for the
//! cluster before `run` says so.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwapOption;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_compute::{Attention, AttentionConfig, Backend, Experts};
use tramontane_compute_cuda::CudaBackend;
use tramontane_coordination::WorkerState;
use tramontane_engine::{Engine, StepReport};
use tramontane_exchange::{
    CallLimits, Desk, ExchangeConfig, ExpertExchange, ExpertServer, ExpertServerConfig,
    GrpcTransportConfig, HostTransport, LinkSettings, Transport,
};
use tramontane_model::Checkpoint;
use tramontane_types::{Placement, WorkerId};

use crate::device::ChosenDevice;
use crate::drill::Drills;
use crate::engine_thread::EngineThread;
use crate::expert_keeper::KeptExperts;
use crate::follower::Group;
use crate::island::rank::hello;
use crate::island::{Hub, HubConfig, IslandExperts};
use crate::metrics::StepMetrics;
use crate::run::ExchangeKind;
use crate::state::{ExpertHalf, Node};
use crate::{ConfigError, Error, WorkerConfig, backend};

/// When all parts of a worker end, and who waits for them.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) ended: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// The placement that is served on.
pub(crate) type Serving = Arc<ArcSwapOption<Placement>>;

/// The two halves of a worker, packed.
#[derive(Debug)]
pub(crate) struct Halves {
    pub(crate) backend: Arc<dyn Backend>,
    attention: Option<Box<dyn Attention>>,
    experts: Option<Arc<KeptExperts>>,
    /// Of a worker that is an island.
    pub(crate) hub: Option<Arc<Hub>>,
}

/// Packs the attention weights, on a thread that may take its time.
pub(crate) async fn build(
    config: &WorkerConfig,
    device: &ChosenDevice,
    checkpoint: &Arc<Checkpoint>,
) -> Result<Halves, Error> {
    let (config, checkpoint) = (config.clone(), Arc::clone(checkpoint));
    let device = device.clone();
    let what = "packing the attention weights";
    tokio::task::spawn_blocking(move || {
        let geometry = checkpoint.geometry();
        let on_gpu = backend::on_gpu(&device, geometry)?;
        let backend: Arc<dyn Backend> = match &on_gpu {
            Some(backend) => Arc::clone(backend) as _,
            None => backend::on_cpu(&config, geometry)?,
        };
        let roles = config.roles.0;
        let attention = if roles.attention {
            let weights = checkpoint.attention_weights().map_err(Error::Checkpoint)?;
            let limits = config.engine(geometry, Vec::new());
            let sizes = AttentionConfig {
                num_pages: limits.num_pages,
                max_rows: limits.max_step_rows,
                kv_format: config.kv_format,
            };
            Some(backend.attention(&weights, sizes).map_err(Error::Backend)?)
        } else {
            None
        };
        let (mut hub, format) = (None, backend.row_format());
        let experts = roles.experts.then(|| backend.experts());
        let mut experts: Option<Arc<dyn Experts>> = experts;
        if config.leads() {
            let made = lead(&config, &device, &checkpoint, on_gpu, experts.clone())?;
            experts = experts.map(|own| {
                Arc::new(IslandExperts::new(Arc::clone(&made), own, format)) as Arc<dyn Experts>
            });
            hub = Some(made);
        }
        let experts = experts.map(|inner| {
            let weights = config.weights;
            Arc::new(KeptExperts::new(inner, geometry.clone(), format, weights))
        });
        Ok(Halves {
            backend,
            attention,
            experts,
            hub,
        })
    })
    .await
    .map_err(|source| Error::Task { what, source })?
}

/// The leader's side of an island.
fn lead(
    config: &WorkerConfig,
    device: &ChosenDevice,
    checkpoint: &Checkpoint,
    backend: Option<Arc<CudaBackend>>,
    experts: Option<Arc<dyn Experts>>,
) -> Result<Arc<Hub>, Error> {
    let (Some(gpu), Some(backend), Some(experts)) = (device.gpu(), backend, experts) else {
        let rule = "a GPU for an island";
        return Err(ConfigError::new("device", rule, &config.device).into());
    };
    let config = HubConfig {
        num_ranks: config.island_ranks,
        form_wait: config.island_form_wait,
        step_max: config.island_step_deadline,
        expert_bytes: config.expert_bytes(),
        hello: hello(config, &backend, checkpoint),
        geometry: checkpoint.geometry().clone(),
    };
    Ok(Hub::new(config, backend, Arc::clone(gpu), experts))
}

/// A worker whose threads run.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) node: Arc<Node>,
    pub(crate) engine: Option<EngineThread>,
    pub(crate) expert_server: Option<ExpertServer>,
    /// Whom to tell where the peers are; `None` when they are in this process.
    pub(crate) peers: Option<Arc<HostTransport>>,
    /// Where the threads of both halves meet.
    pub(crate) desk: Arc<Desk>,
    pub(crate) steps: StepMetrics,
}

/// What the parts of a worker are made from.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a WorkerConfig,
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) group: &'a Group,
    pub(crate) exchange: &'a ExchangeKind,
    pub(crate) serving: &'a Serving,
    pub(crate) life: &'a Life,
    pub(crate) drills: &'a Arc<Drills>,
}

impl Plan<'_> {
    fn id(&self) -> WorkerId {
        WorkerId::new(&self.config.id)
    }

    /// Starts the threads of both halves.
    pub(crate) fn assemble(&self, halves: Halves) -> Result<Worker, Error> {
        let Halves {
            backend,
            attention,
            experts,
            hub,
        } = halves;
        let geometry = self.checkpoint.geometry();
        let epoch = Arc::new(AtomicU64::new(0));
        let desk = Arc::new(self.desk());
        let (peers, transport) = self.transport(&*backend, &desk);
        let transport = self.drills.on_the_way(transport);
        let expert_server = experts.clone().map(|experts| {
            let (geometry, class) = (geometry.clone(), self.group.numeric_class.clone());
            let config = ExpertServerConfig::new(geometry, backend.row_format(), class);
            let (desk, epoch) = (Arc::clone(&desk), Arc::clone(&epoch));
            ExpertServer::start_at(desk, config, experts as Arc<dyn Experts>, epoch)
        });
        if let (ExchangeKind::Local(hub), Some(server)) = (self.exchange, &expert_server) {
            hub.insert(self.id(), server.handle());
        }
        let steps = StepMetrics::new();
        let (mut engine, mut exchange) = (None, None);
        if let Some(attention) = attention {
            let local = experts.clone().map(|experts| experts as Arc<dyn Experts>);
            let server = expert_server.as_ref().map(ExpertServer::handle);
            let carrier = self
                .exchange(&*backend, local, Arc::clone(&transport))
                .at(Arc::clone(&desk), server);
            exchange = Some(carrier.stats());
            engine = Some(self.engine(attention, carrier, &steps)?);
        }
        let experts = experts
            .zip(expert_server.as_ref())
            .map(|(store, server)| ExpertHalf {
                store,
                server: server.handle(),
                segment_bytes: backend.segment_bytes(),
            });
        let node = Node {
            id: self.id(),
            geometry: geometry.clone(),
            engine: engine.as_ref().map(EngineThread::handle),
            experts,
            transport,
            exchange,
            epoch,
            state: watch::Sender::new(WorkerState::Joining),
            drills: Arc::clone(self.drills),
            hub,
        };
        Ok(Worker {
            node: Arc::new(node),
            engine,
            expert_server,
            peers,
            desk,
            steps,
        })
    }

    /// Where the engine and the expert server meet; with sockets when peers may be other processes.
    fn desk(&self) -> Desk {
        if let ExchangeKind::Local(_) = self.exchange {
            return Desk::default();
        }
        Desk::with_sockets().unwrap_or_else(|error| {
            tracing::warn!(%error, "no Unix sockets, calls to workers of this host go over TCP");
            Desk::default()
        })
    }

    fn transport(
        &self,
        backend: &dyn Backend,
        desk: &Arc<Desk>,
    ) -> (Option<Arc<HostTransport>>, Arc<dyn Transport>) {
        if let ExchangeKind::Local(hub) = self.exchange {
            return (None, Arc::clone(hub) as _);
        }
        let config = GrpcTransportConfig {
            me: self.id(),
            cluster: self.config.cluster.clone(),
            numeric_class: self.group.numeric_class.clone(),
            model: self.group.model.clone(),
            limits: CallLimits::new(self.checkpoint.geometry(), backend.row_format()),
            link: LinkSettings::default(),
        };
        let (ended, tasks) = (self.life.ended.clone(), self.life.tasks.clone());
        let (desk, runtime) = (Arc::clone(desk), Handle::current());
        let transport = Arc::new(HostTransport::new(config, desk, runtime, ended, tasks));
        (Some(Arc::clone(&transport)), transport as _)
    }

    fn exchange(
        &self,
        backend: &dyn Backend,
        local: Option<Arc<dyn Experts>>,
        transport: Arc<dyn Transport>,
    ) -> ExpertExchange {
        let geometry = self.checkpoint.geometry().clone();
        let mut config = ExchangeConfig::new(self.id(), geometry, backend.row_format());
        config.layer_deadline = self.config.layer_deadline;
        ExpertExchange::new(config, local, Arc::clone(self.serving), transport)
    }

    fn engine(
        &self,
        attention: Box<dyn Attention>,
        exchange: ExpertExchange,
        steps: &StepMetrics,
    ) -> Result<EngineThread, Error> {
        let geometry = self.checkpoint.geometry();
        let limits = self
            .config
            .engine(geometry, self.checkpoint.config().eos_token_ids.clone());
        let engine = Engine::new(limits, geometry.clone(), attention, Box::new(exchange))
            .map_err(Error::Engine)?;
        let (observed, drills) = (steps.clone(), Arc::clone(self.drills));
        let on_step = move |report: &StepReport| {
            observed.observe(report);
            drills.after_step();
        };
        EngineThread::start(engine, Box::new(on_step))
    }
}
