//! A worker's whole life, in order: build, listen, register, follow, drain, leave. Decides nothing else.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use indicatif::ProgressBar;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tramontane_coordination::{
    Registration, Roles, Scope, Store, Version, WorkerRecord, watch_placements,
};
use tramontane_exchange::{ExpertServiceConfig, HostListener, LocalTransport};
use tramontane_grammar::{Grammars, Vocabulary};
use tramontane_model::Checkpoint;
use tramontane_runtime::ops::Ops;
use tramontane_runtime::tls::{Guard, Incoming, Role, Tls};
use tramontane_runtime::{Readiness, ReadinessSetter, Shutdown, metrics::render};
use tramontane_types::WorkerId;

use crate::assemble::{Life, Plan, Serving, Worker};
use crate::backend::Computing;
use crate::drain::Drain;
use crate::drill::{Drills, ProcessKind, Setting};
use crate::follower::Follower;
use crate::host_socket::BoundSocket;
use crate::roles::RoleKeeper;
use crate::server::Services;
use crate::state::Node;
use crate::watched::Watched;
use crate::weights::WeightsServing;
use crate::{Error, WorkerConfig, device, metrics, peers, registration, roles, server};

/// How long each part may take to stop once nothing is left to do.
const STOP_MAX: Duration = Duration::from_secs(5);

/// What a worker is given by the process that runs it.
#[derive(Debug)]
pub struct WorkerParts {
    /// The cluster's shared facts.
    pub store: Arc<dyn Store>,
    /// The model.
    pub checkpoint: Arc<Checkpoint>,
    /// The model's name as clients use it.
    pub model_name: String,
    /// What its tokens stand for: without it, no sequence has a constraint here.
    pub vocabulary: Option<Vocabulary>,
    /// Where routers and other workers connect.
    pub grpc: TcpListener,
    /// Where health checks and metrics are asked for.
    pub ops: Option<TcpListener>,
    /// Shows how many expert slices are loaded.
    pub progress: Option<ProgressBar>,
    /// How rows travel to the experts of other workers.
    pub exchange: ExchangeKind,
    /// Whose process it runs in.
    pub process: ProcessKind,
    /// What it shows to others, and whom it believes.
    pub tls: Tls,
}

/// How rows travel between workers.
#[derive(Clone, Debug)]
pub enum ExchangeKind {
    /// Over gRPC, between machines.
    Grpc,
    /// In memory, between the workers of one process that share the transport.
    Local(Arc<LocalTransport>),
}

/// Where peers and routers reach this worker.
fn advertised(config: &WorkerConfig, grpc: &TcpListener) -> Result<String, Error> {
    match &config.advertise {
        Some(address) => Ok(address.clone()),
        None => Ok(grpc.local_addr().map_err(Error::Address)?.to_string()),
    }
}

/// Runs a worker until `shutdown` is triggered or somebody asks it to drain, and it has drained.
///
/// # Errors
/// When it cannot start, or its engine or server ended by itself. An absent store, peer or planner is
/// no error: the worker waits for them.
pub async fn run(
    mut config: WorkerConfig,
    mut parts: WorkerParts,
    shutdown: Shutdown,
) -> Result<(), Error> {
    config.validate_worker()?;
    let device = device::choose(&mut config, parts.checkpoint.geometry())?;
    let (life, drain) = (Life::default(), CancellationToken::new());
    let _ended = life.ended.clone().drop_guard();
    let (setter, readiness) = Readiness::starting("loading");
    let ops = LateOps::default();
    life.serve_ops((parts.ops.take(), &parts.tls), readiness, Arc::clone(&ops));
    let address = advertised(&config, &parts.grpc)?;
    let watched = Watched::start(&parts.store, &life);
    let weights = Arc::default();
    let checkpoint = watched.back(&parts, &config, &weights, &life);
    let computing = Computing::make(&config, &device, &checkpoint).await?;
    let part = computing.place.part;
    let roles = roles::initial(&config, part, watched.intent.clone()).await;
    let name = (parts.model_name.as_str(), address);
    let mut record = registration::record(&config, roles, &computing, &checkpoint, name);
    let version = Version::of(&record);
    let (serving, exchange) = (Serving::default(), parts.exchange.clone());
    let drills = Arc::new(life.drills(&config, &parts, record.incarnation));
    let plan = Plan {
        config: &config,
        checkpoint: &checkpoint,
        computing: &computing,
        version: &version,
        roles,
        exchange: &exchange,
        serving: &serving,
        life: &life,
        drills: &drills,
        weights: &weights,
        link: parts.tls.link(Role::Worker),
        grammars: parts.vocabulary.take().map(Grammars::new),
    };
    let worker = plan.assemble();
    let begun = worker.begin(roles, &shutdown).await;
    if !matches!(begun, Ok(true)) {
        worker.leave(life, &exchange).await;
        return begun.map(|_stopped| ());
    }
    let bound = worker.listen_on_host(&config, &parts.exchange, record.incarnation, &life);
    record.socket = bound.as_ref().and_then(BoundSocket::record);
    worker.show(&ops);

    let services = worker.services((&config, parts.tls.guard()), &checkpoint, &drain, &life);
    let (grpc, store, progress) = (parts.grpc, parts.store, parts.progress);
    let grpc = Incoming::new(grpc, parts.tls.cluster_door("worker"));
    let served = life.serve_grpc(grpc, services, setter)?;
    worker.come_together(&life, &shutdown).await;
    record.capacity_bytes = worker.node.capacity(&config, roles);
    let joined = worker.join(&config, store, record, watched, (&serving, &life))?;
    let follower = Follower {
        node: Arc::clone(&worker.node),
        checkpoint,
        registration: joined.registration.clone(),
        placements: joined.drain.placements.clone(),
        serving,
        drop_grace: config.drop_grace,
        progress,
        tasks: life.tasks.clone(),
        formations: worker.node.hub.as_ref().map(|hub| hub.formations()),
    };
    life.tasks.spawn(follower.run(life.ended.clone()));

    let end = worker.serve(served, &shutdown, &drain).await;
    joined
        .end(&end, config.drain_deadline, &worker, &life)
        .await;
    worker.leave(life, &exchange).await;
    drop(bound);
    end.map(|_asked_or_crashed| ())
}

/// Why a worker stops serving when nothing of it is broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Somebody asked it to.
    Asked,
    /// A drill: it leaves as if its process had died.
    Crashed,
}

/// A worker that is listed in the cluster.
#[derive(Debug)]
struct Joined {
    registration: Registration,
    /// Triggered, it deregisters.
    registered: Shutdown,
    /// Triggered, the worker keeps the roles that it has.
    roles: CancellationToken,
    drain: Drain,
}

impl Joined {
    /// Leaves the cluster, in the way in which the worker ends.
    async fn end(
        self,
        end: &Result<End, Error>,
        drain_limit: Duration,
        worker: &Worker,
        life: &Life,
    ) {
        self.roles.cancel();
        match end {
            Ok(End::Asked) => self.drain.run(drain_limit).await,
            Ok(End::Crashed) => {
                self.registration.abandon();
                worker.break_off(life);
            }
            Err(_) => {}
        }
        self.registered.trigger();
        self.registered.finish(STOP_MAX).await;
    }
}

type LateOps = Arc<OnceLock<(Arc<Node>, Registry)>>;
type Served = JoinHandle<Result<(), Error>>;

impl Life {
    fn drills(&self, config: &WorkerConfig, parts: &WorkerParts, incarnation: u64) -> Drills {
        let setting = Setting {
            allowed: config.drills,
            process: parts.process,
            calls_travel: matches!(parts.exchange, ExchangeKind::Grpc),
            incarnation,
        };
        let (me, ended) = (WorkerId::new(&config.id), self.ended.clone());
        Drills::new(me, setting, ended, self.tasks.clone())
    }

    /// Serves the operations port: alive while loading, with metrics from when there are any.
    fn serve_ops(
        &self,
        (listener, tls): (Option<TcpListener>, &Tls),
        ready: Readiness,
        late: LateOps,
    ) {
        let Some(listener) = listener else { return };
        let incoming = Incoming::new(listener, tls.ops_door("ops"));
        let node = Arc::clone(&late);
        let ops = Ops {
            live: Arc::new(move || node.get().map_or(Ok(()), |(node, _)| server::alive(node))),
            ready,
            metrics: Arc::new(move || {
                late.get()
                    .map_or_else(|| "# EOF\n".to_owned(), |(_, registry)| render(registry))
            }),
        };
        let stopped = Shutdown {
            token: self.ended.clone(),
            tasks: self.tasks.clone(),
        };
        let served = tramontane_runtime::ops::serve(incoming, ops, stopped);
        self.tasks.spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "the operations port ended");
            }
        });
    }

    fn serve_grpc(
        &self,
        incoming: Incoming,
        services: Services,
        readiness: ReadinessSetter,
    ) -> Result<Served, Error> {
        let (node, ended) = (Arc::clone(&services.node), self.ended.clone());
        let (serve, reporter) = server::serve(incoming, services)?;
        self.tasks.spawn(server::report_health(
            node,
            reporter,
            readiness,
            ended.clone(),
        ));
        Ok(self.tasks.spawn(async move {
            let too_late = async {
                ended.cancelled().await;
                tokio::time::sleep(STOP_MAX).await;
            };
            tokio::select! {
                result = serve => result,
                // Somebody keeps a stream open, such as a health watch.
                () = too_late => Ok(()),
            }
        }))
    }
}

impl Worker {
    /// Liveness and metrics are those of this worker from now on.
    fn show(&self, ops: &LateOps) {
        let registry = metrics::registry(Arc::clone(&self.node), &self.maker.steps);
        // Set once, here.
        let _was_empty = ops.set((Arc::clone(&self.node), registry));
    }

    /// Makes the attention half if that is to begin with; false when the worker is to stop meanwhile.
    async fn begin(&self, roles: Roles, shutdown: &Shutdown) -> Result<bool, Error> {
        if !roles.attention {
            return Ok(true);
        }
        let made = self.maker.make(&self.node);
        let Some(made) = shutdown.token.run_until_cancelled(made).await else {
            return Ok(false);
        };
        self.slot.put(made?);
        Ok(true)
    }

    /// Looks after the ranks of an island from now on; waits until they have come together.
    async fn come_together(&self, life: &Life, shutdown: &Shutdown) {
        if let Some(hub) = &self.node.hub {
            life.tasks.spawn(Arc::clone(hub).run(life.ended.clone()));
            hub.first_formation(shutdown).await;
        }
    }

    /// Listens for workers of the same host, where others may be other processes. Without a socket they
    /// come over TCP: slower, but no reason not to serve.
    fn listen_on_host(
        &self,
        config: &WorkerConfig,
        exchange: &ExchangeKind,
        incarnation: u64,
        life: &Life,
    ) -> Option<BoundSocket> {
        if !matches!(exchange, ExchangeKind::Grpc) {
            return None;
        }
        let bound = BoundSocket::bind(&std::env::temp_dir(), incarnation);
        let (bound, listener) = bound
            .map_err(|error| {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "no Unix socket, workers of this host call over TCP");
            })
            .ok()?;
        let (me, model) = (self.node.id.clone(), self.node.version.model.to_string());
        let mut service = ExpertServiceConfig::new(me, config.cluster.clone(), model);
        service.faults = self.node.drills.faults();
        let answering =
            HostListener::new(service, self.expert_server.handle(), Arc::clone(&self.desk));
        let (stop, tasks) = (life.ended.clone(), life.tasks.clone());
        life.tasks.spawn(answering.serve(listener, stop, tasks));
        Some(bound)
    }

    fn services(
        &self,
        (config, guard): (&WorkerConfig, Guard),
        checkpoint: &Arc<Checkpoint>,
        drain: &CancellationToken,
        life: &Life,
    ) -> Services {
        let grammars = self.node.grammars.as_ref();
        Services {
            node: Arc::clone(&self.node),
            cluster: config.cluster.clone(),
            model: self.node.version.model.to_string(),
            guard,
            weights: WeightsServing {
                me: self.node.id.clone(),
                cluster: config.cluster.clone(),
                checkpoint: Arc::clone(checkpoint),
                vocabulary: grammars.map(|grammars| grammars.vocabulary().clone()),
                rate: config.weights_rate,
                stats: Arc::clone(&self.node.weights),
                ended: life.ended.clone(),
                tasks: life.tasks.clone(),
            },
            drain: drain.clone(),
            ended: life.ended.clone(),
            tasks: life.tasks.clone(),
        }
    }

    /// Registers, and follows who else is there and what is wanted.
    fn join(
        &self,
        config: &WorkerConfig,
        store: Arc<dyn Store>,
        record: WorkerRecord,
        watched: Watched,
        (serving, life): (&Serving, &Life),
    ) -> Result<Joined, Error> {
        let node = || Arc::clone(&self.node);
        let (registered, roles) = (Shutdown::new(), life.ended.child_token());
        let (tasks, stop) = (&registered.tasks, registered.token.clone());
        let (ttl, part) = (config.lease_ttl, record.part);
        let scope = Scope::Group(self.node.version.key());
        let placements =
            watch_placements(Arc::clone(&store), scope, &life.tasks, life.ended.clone());
        let registration = Registration::start(store, record, ttl, tasks, stop.clone())
            .map_err(Error::Registration)?;
        tasks.spawn(registration::refresh(node(), registration.clone(), stop));
        let Watched { members, intent } = watched;
        if let Some(transport) = self.peers.clone() {
            let (node, members) = (node(), members.clone());
            let (serving, ended) = (Arc::clone(serving), life.ended.clone());
            life.tasks
                .spawn(peers::follow(node, members, serving, transport, ended));
        }
        let keeper = RoleKeeper {
            node: node(),
            config: config.clone(),
            part,
            maker: self.maker.clone(),
            slot: Arc::clone(&self.slot),
            registration: registration.clone(),
            placements: placements.clone(),
            intent,
        };
        life.tasks.spawn(keeper.run(roles.clone()));
        let drain = Drain {
            node: node(),
            placements,
            members,
        };
        Ok(Joined {
            registration,
            registered,
            roles,
            drain,
        })
    }

    /// Waits until somebody wants the worker to end, or something of it has.
    async fn serve(
        &self,
        grpc: Served,
        shutdown: &Shutdown,
        drain: &CancellationToken,
    ) -> Result<End, Error> {
        let crash = self.node.drills.crash().unwrap_or_default();
        let engine_ended = self.slot.broken();
        tokio::select! {
            () = shutdown.token.cancelled() => Ok(End::Asked),
            () = drain.cancelled() => Ok(End::Asked),
            () = crash.cancelled() => Ok(End::Crashed),
            () = engine_ended.cancelled() => Err(Error::EngineEnded),
            result = grpc => {
                let what = "the gRPC server";
                result.map_err(|source| Error::Task { what, source })??;
                Ok(End::Asked)
            }
        }
    }

    /// Breaks all connections at once, in the middle of whatever they carry. Those of clients and of gRPC
    /// peers break with the drill's token.
    fn break_off(&self, life: &Life) {
        tracing::warn!(worker = %self.node.id, "worker dies, as the drill wants it");
        life.ended.cancel();
        self.desk.close();
    }

    /// Ends everything that is left.
    async fn leave(self, life: Life, exchange: &ExchangeKind) {
        let worker = &self.node.id;
        if !self.slot.take_out(STOP_MAX).await {
            tracing::warn!(%worker, "the engine's step did not end in time");
        }
        if let ExchangeKind::Local(hub) = exchange {
            hub.remove(worker);
        }
        life.ended.cancel();
        life.tasks.close();
        if timeout(STOP_MAX * 2, life.tasks.wait()).await.is_err() {
            tracing::warn!(%worker, left = life.tasks.len(), "tasks did not end in time");
        }
        // Joins its thread.
        let server = self.expert_server;
        let joined = tokio::task::spawn_blocking(move || server.shutdown()).await;
        if let Err(error) = joined {
            tracing::error!(%worker, %error, "the expert server did not end well");
        }
        self.desk.close();
        tracing::info!(%worker, "worker has left");
    }
}
