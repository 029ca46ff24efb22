//! A worker's whole life, in order: build, listen, register, follow, drain, leave. Decides nothing else.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use indicatif::ProgressBar;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tramontane_coordination::{Registration, Store, WorkerRecord, watch_members, watch_placements};
use tramontane_exchange::{ExpertServiceConfig, HostListener, LocalTransport};
use tramontane_model::Checkpoint;
use tramontane_runtime::ops::Ops;
use tramontane_runtime::{Readiness, ReadinessSetter, Shutdown, metrics::render};
use tramontane_types::WorkerId;

use crate::assemble::{Life, Plan, Serving, Worker, build};
use crate::drain::Drain;
use crate::drill::{Drills, ProcessKind, Setting};
use crate::follower::{Follower, Group};
use crate::host_socket::BoundSocket;
use crate::island::Hub;
use crate::server::Services;
use crate::state::Node;
use crate::{Error, WorkerConfig, device, metrics, peers, registration, server};

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
    config.validate()?;
    let device = device::choose(&mut config, parts.checkpoint.geometry())?;
    let (life, drain) = (Life::default(), CancellationToken::new());
    let (setter, readiness) = Readiness::starting("loading");
    let ops = LateOps::default();
    if let Some(listener) = parts.ops.take() {
        life.serve_ops(listener, readiness, Arc::clone(&ops));
    }
    let address = advertised(&config, &parts.grpc)?;
    let checkpoint = Arc::clone(&parts.checkpoint);
    let halves = build(&config, &device, &checkpoint).await?;
    let name = &parts.model_name;
    let mut record = registration::record(&config, &*halves.backend, &checkpoint, name, address);
    let group = Group {
        numeric_class: record.numeric_class.clone(),
        model: record.model.fingerprint.clone(),
    };
    let (serving, exchange) = (Serving::default(), parts.exchange.clone());
    let drills = Arc::new(life.drills(&config, &parts, record.incarnation));
    let plan = Plan {
        config: &config,
        checkpoint: &checkpoint,
        group: &group,
        exchange: &exchange,
        serving: &serving,
        life: &life,
        drills: &drills,
    };
    let worker = plan.assemble(halves)?;
    let bound = worker.listen_on_host(&config, &group, &parts.exchange, record.incarnation, &life);
    record.socket = bound.as_ref().and_then(BoundSocket::record);
    let registry = metrics::registry(Arc::clone(&worker.node), &worker.steps);
    // Set once, here.
    let _was_empty = ops.set((Arc::clone(&worker.node), registry));

    let services = Services {
        node: Arc::clone(&worker.node),
        cluster: config.cluster.clone(),
        model: group.model.clone(),
        drain: drain.clone(),
        ended: life.ended.clone(),
        tasks: life.tasks.clone(),
    };
    let served = life.serve_grpc(parts.grpc, services, setter)?;
    if let Some(hub) = &worker.node.hub {
        life.tasks.spawn(Arc::clone(hub).run(life.ended.clone()));
        record.capacity_bytes = first_formation(hub, &shutdown).await;
    }
    let joined = worker.join(&config, parts.store, record, &serving, &life)?;
    let follower = Follower {
        node: Arc::clone(&worker.node),
        group,
        checkpoint,
        registration: joined.registration.clone(),
        placements: joined.drain.placements.clone(),
        serving,
        drop_grace: config.drop_grace,
        progress: parts.progress,
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

/// Waits until the ranks of an island have come together for the first time, or nobody wants them any more; what they
/// have for experts.
async fn first_formation(hub: &Hub, shutdown: &Shutdown) -> u64 {
    let mut formations = hub.formations();
    tokio::select! {
        formed = formations.wait_for(|formation| formation.epoch > 0) => {
            formed.map_or(0, |formation| hub.capacity_bytes(*formation))
        }
        () = shutdown.token.cancelled() => 0,
    }
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
    fn serve_ops(&self, listener: TcpListener, ready: Readiness, late: LateOps) {
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
        let served = tramontane_runtime::ops::serve(listener, ops, stopped);
        self.tasks.spawn(async move {
            if let Err(error) = served.await {
                tracing::error!(%error, "the operations port ended");
            }
        });
    }

    fn serve_grpc(
        &self,
        listener: TcpListener,
        services: Services,
        readiness: ReadinessSetter,
    ) -> Result<Served, Error> {
        let (node, ended) = (Arc::clone(&services.node), self.ended.clone());
        let (serve, reporter) = server::serve(listener, services)?;
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
    /// Listens for workers of the same host, where others may be other processes. Without a socket they
    /// come over TCP: slower, but no reason not to serve.
    fn listen_on_host(
        &self,
        config: &WorkerConfig,
        group: &Group,
        exchange: &ExchangeKind,
        incarnation: u64,
        life: &Life,
    ) -> Option<BoundSocket> {
        let (ExchangeKind::Grpc, Some(server)) = (exchange, &self.expert_server) else {
            return None;
        };
        let bound = BoundSocket::bind(&std::env::temp_dir(), incarnation);
        let (bound, listener) = bound
            .map_err(|error| {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "no Unix socket, workers of this host call over TCP");
            })
            .ok()?;
        let me = self.node.id.clone();
        let mut service = ExpertServiceConfig::new(me, config.cluster.clone(), group.model.clone());
        service.faults = self.node.drills.faults();
        let answering = HostListener::new(service, server.handle(), Arc::clone(&self.desk));
        let (stop, tasks) = (life.ended.clone(), life.tasks.clone());
        life.tasks.spawn(answering.serve(listener, stop, tasks));
        Some(bound)
    }

    /// Registers, and follows who else is there.
    fn join(
        &self,
        config: &WorkerConfig,
        store: Arc<dyn Store>,
        record: WorkerRecord,
        serving: &Serving,
        life: &Life,
    ) -> Result<Joined, Error> {
        let node = || Arc::clone(&self.node);
        let (registered, ended) = (Shutdown::new(), || life.ended.clone());
        let (tasks, stop) = (&registered.tasks, registered.token.clone());
        let registration = Registration::start(
            Arc::clone(&store),
            record,
            config.lease_ttl,
            tasks,
            stop.clone(),
        )
        .map_err(Error::Registration)?;
        tasks.spawn(registration::refresh(node(), registration.clone(), stop));
        let placements = watch_placements(Arc::clone(&store), &life.tasks, ended());
        let members = watch_members(store, &life.tasks, ended());
        if let Some(transport) = self.peers.clone() {
            let (me, members) = (self.node.id.clone(), members.clone());
            let serving = Arc::clone(serving);
            life.tasks
                .spawn(peers::follow(me, members, serving, transport, ended()));
        }
        let drain = Drain {
            node: node(),
            placements,
            members,
        };
        Ok(Joined {
            registration,
            registered,
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
        let engine_ended = self
            .engine
            .as_ref()
            .map_or_else(CancellationToken::new, |e| e.ended());
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
        if let Some(engine) = self.engine {
            engine.stop();
            if timeout(STOP_MAX, engine.ended().cancelled()).await.is_err() {
                tracing::warn!(%worker, "the engine's step did not end in time");
            }
        }
        if let ExchangeKind::Local(hub) = exchange {
            hub.remove(worker);
        }
        life.ended.cancel();
        life.tasks.close();
        if timeout(STOP_MAX * 2, life.tasks.wait()).await.is_err() {
            tracing::warn!(%worker, left = life.tasks.len(), "tasks did not end in time");
        }
        if let Some(server) = self.expert_server {
            // Joins its thread.
            let joined = tokio::task::spawn_blocking(move || server.shutdown()).await;
            if let Err(error) = joined {
                tracing::error!(%worker, %error, "the expert server did not end well");
            }
        }
        self.desk.close();
        tracing::info!(%worker, "worker has left");
    }
}
