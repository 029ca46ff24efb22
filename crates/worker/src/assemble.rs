//! Makes a worker's parts and connects them: experts, exchange, what engines are made from. Nothing runs for the
//! cluster before `run` says so.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwapOption;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_compute::Experts;
use tramontane_coordination::{Roles, Version, WorkerState};
use tramontane_exchange::{
    CallLimits, Desk, ExpertServer, ExpertServerConfig, GrpcTransportConfig, HostTransport,
    LinkSettings, Transport,
};
use tramontane_grammar::Grammars;
use tramontane_model::Checkpoint;
use tramontane_runtime::tls::Link;
use tramontane_types::{Placement, WorkerId};

use crate::WorkerConfig;
use crate::attention::{AttentionMaker, EngineSlot};
use crate::backend::Computing;
use crate::dial::LinkDial;
use crate::drill::Drills;
use crate::expert_keeper::KeptExperts;
use crate::metrics::StepMetrics;
use crate::run::ExchangeKind;
use crate::state::{ExpertHalf, Node};
use crate::weights::WeightStats;

/// When all parts of a worker end, and who waits for them.
#[derive(Debug, Default)]
pub(crate) struct Life {
    pub(crate) ended: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

/// The placement that is served on.
pub(crate) type Serving = Arc<ArcSwapOption<Placement>>;

/// A worker whose expert half serves; the attention half comes and goes.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) node: Arc<Node>,
    pub(crate) maker: AttentionMaker,
    pub(crate) slot: Arc<EngineSlot>,
    pub(crate) expert_server: ExpertServer,
    /// Whom to tell where the peers are; `None` when they are in this process.
    pub(crate) peers: Option<Arc<HostTransport>>,
    /// Where the threads of both halves meet.
    pub(crate) desk: Arc<Desk>,
}

/// What the parts of a worker are made from.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    pub(crate) config: &'a WorkerConfig,
    pub(crate) checkpoint: &'a Arc<Checkpoint>,
    pub(crate) computing: &'a Computing,
    pub(crate) version: &'a Version,
    pub(crate) roles: Roles,
    pub(crate) exchange: &'a ExchangeKind,
    pub(crate) serving: &'a Serving,
    pub(crate) life: &'a Life,
    pub(crate) drills: &'a Arc<Drills>,
    pub(crate) weights: &'a Arc<WeightStats>,
    /// The way to other workers.
    pub(crate) link: Link,
    pub(crate) grammars: Option<Grammars>,
}

impl Plan<'_> {
    fn id(&self) -> WorkerId {
        WorkerId::new(&self.config.id)
    }

    /// Starts the thread of the expert half. Without the experts role it holds nothing.
    pub(crate) fn assemble(&self) -> Worker {
        let (geometry, computing) = (self.checkpoint.geometry(), self.computing);
        let epoch = Arc::new(AtomicU64::new(0));
        let desk = Arc::new(self.desk());
        let (peers, transport) = self.transport(&desk);
        let transport = self.drills.on_the_way(transport);
        let (inner, format) = (Arc::clone(&computing.experts), computing.place.row_format);
        let weights = self.config.weights;
        let store = Arc::new(KeptExperts::new(inner, geometry.clone(), format, weights));
        let class = self.version.numeric_class.to_string();
        let config = ExpertServerConfig::new(geometry.clone(), format, class);
        let experts = Arc::clone(&store) as Arc<dyn Experts>;
        let expert_server =
            ExpertServer::start_at(Arc::clone(&desk), config, experts, Arc::clone(&epoch));
        if let ExchangeKind::Local(hub) = self.exchange {
            hub.insert(self.id(), expert_server.handle());
        }
        let node = Arc::new(Node {
            id: self.id(),
            version: self.version.clone(),
            geometry: geometry.clone(),
            roles: watch::Sender::new(self.roles),
            attention: ArcSwapOption::empty(),
            experts: ExpertHalf {
                store,
                server: expert_server.handle(),
                segment_bytes: computing.backend.segment_bytes(),
            },
            transport,
            weights: Arc::clone(self.weights),
            grammars: self.grammars.clone(),
            epoch,
            state: watch::Sender::new(WorkerState::Joining),
            drills: Arc::clone(self.drills),
            hub: computing.hub.clone(),
        });
        let maker = AttentionMaker {
            config: self.config.clone(),
            checkpoint: Arc::clone(self.checkpoint),
            backend: Arc::clone(&computing.backend),
            desk: Arc::clone(&desk),
            serving: Arc::clone(self.serving),
            steps: StepMetrics::new(),
        };
        let slot = EngineSlot::new(Arc::clone(&node), self.life.tasks.clone());
        Worker {
            node,
            maker,
            slot: Arc::new(slot),
            expert_server,
            peers,
            desk,
        }
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

    fn transport(&self, desk: &Arc<Desk>) -> (Option<Arc<HostTransport>>, Arc<dyn Transport>) {
        if let ExchangeKind::Local(hub) = self.exchange {
            return (None, Arc::clone(hub) as _);
        }
        let config = GrpcTransportConfig {
            me: self.id(),
            cluster: self.config.cluster.clone(),
            numeric_class: self.version.numeric_class.to_string(),
            model: self.version.model.to_string(),
            limits: CallLimits::new(self.checkpoint.geometry(), self.computing.place.row_format),
            link: LinkSettings::default(),
            dial: Arc::new(LinkDial(self.link.clone())),
        };
        let (ended, tasks) = (self.life.ended.clone(), self.life.tasks.clone());
        let (desk, runtime) = (Arc::clone(desk), Handle::current());
        let transport = Arc::new(HostTransport::new(config, desk, runtime, ended, tasks));
        (Some(Arc::clone(&transport)), transport as _)
    }
}
