//! A router from start to end: watch the cluster, open both doors, and at the end close them in order.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{
    Members, Planner, PlannerStatuses, Scope, Store, Version, run_elected, survives_one_loss,
    watch_intent, watch_members, watch_placements,
};
use tramontane_grammar::Grammars;
use tramontane_runtime::tls::{Incoming, Link, Tls};
use tramontane_runtime::{Readiness, Shutdown};
use tramontane_tokenizer::Tokenizer;

use crate::admission::Admission;
use crate::answer_room::AnswerRoom;
use crate::auth::{Auth, Known};
use crate::body::ARRIVING_BYTES;
use crate::body_room::BodyRoom;
use crate::cluster::{ClusterView, attention_workers};
use crate::dispatch::Dispatcher;
use crate::events::{self, EventLog};
use crate::follow::{keep_places, keep_ready};
use crate::hold::Hold;
use crate::http_server::Versions;
use crate::journal::Journal;
use crate::kept::KeptAnswers;
use crate::metrics::{Metrics, Reading};
use crate::preparing::{PREPARE_WAITING_MAX, Preparing};
use crate::roster::{PulseTasks, Roster};
use crate::scaler::Scaler;
use crate::sequence::Patience;
pub use crate::served::ServedModel;
use crate::tenants::{Quotas, Tenants};
use crate::worker_link::GrpcConnect;
use crate::worker_pool::WorkerPool;
use crate::{Error, RouterConfig, constraint, grpc, http_server, routes};

/// Bodies that are parsed and tokenized at once, per core.
const PREPARING_PER_CORE: usize = 2;
/// Largest bodies that are held at once, with what their JSON becomes: memory of requests that are read is bounded by
/// it, at both doors together.
const BODIES_MAX: usize = 64;
/// Whole answers that wait for their clients take so many of the largest bodies together.
const ANSWERS_MAX: usize = 32;
/// Connections get this long to close once nothing runs, or when everything was aborted.
const CONNECTIONS_CLOSE_MAX: Duration = Duration::from_secs(2);
/// While draining, running requests are counted this often.
const DRAIN_LOOK: Duration = Duration::from_millis(50);

/// What a router is made of.
#[derive(Debug)]
pub struct RouterParts {
    /// The cluster's few shared facts.
    pub store: Arc<dyn Store>,
    /// Of the served model.
    pub tokenizer: Arc<Tokenizer>,
    /// What clients are told about the model.
    pub model: ServedModel,
    /// Bound socket of the OpenAI API.
    pub http: TcpListener,
    /// Bound socket of the gRPC API.
    pub grpc: TcpListener,
    /// Bound socket of the operators' gRPC API.
    pub admin: TcpListener,
    /// What it shows to clients and operators, and which of these it believes.
    pub tls: Tls,
    /// The way to workers.
    pub workers: Link,
    /// Who starts and ends workers on an operator's word, if anybody does.
    pub scaler: Option<Arc<dyn Scaler>>,
}

/// What both doors share.
#[derive(Debug)]
pub(crate) struct App {
    pub(crate) config: RouterConfig,
    pub(crate) dispatcher: Arc<Dispatcher>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) cluster: ClusterView,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) scaler: Option<Arc<dyn Scaler>>,
    /// The way to workers.
    pub(crate) connect: GrpcConnect,
    pub(crate) events: Arc<EventLog>,
    pub(crate) planning: Option<Planning>,
    pub(crate) model: Arc<ServedModel>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) grammars: Grammars,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) ready: Readiness,
    pub(crate) body_room: Arc<BodyRoom>,
    pub(crate) answer_room: AnswerRoom,
    /// Unix time of the start in seconds.
    pub(crate) started: u64,
}

/// What the planner inside this router does, while it is the elected one.
#[derive(Clone, Debug)]
pub(crate) struct Planning {
    status: watch::Receiver<Arc<PlannerStatuses>>,
    leads: Arc<AtomicBool>,
}

/// This router's time as the elected one; ends however its work ends.
struct Term(Arc<AtomicBool>);

impl Term {
    fn begin(leads: Arc<AtomicBool>) -> Self {
        leads.store(true, Ordering::Relaxed);
        Self(leads)
    }
}

impl Drop for Term {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

impl Planning {
    /// `None` while another router plans.
    pub(crate) fn status(&self) -> Option<Arc<PlannerStatuses>> {
        let leads = self.leads.load(Ordering::Relaxed);
        leads.then(|| Arc::clone(&self.status.borrow()))
    }
}

impl App {
    /// All metrics as text.
    pub(crate) fn render_metrics(&self) -> String {
        let (members, placements) = (self.cluster.members(), self.cluster.placements());
        let (seen, serving) = (self.cluster.intent(), self.cluster.serving());
        let ready = serving.as_ref().map_or(0, |version| {
            attention_workers(&members, version, &seen.intent).count()
        });
        let versions: BTreeSet<Version> =
            members.workers.values().map(|w| Version::of(w)).collect();
        self.metrics.render(Reading {
            running: self.dispatcher.admission.running(),
            waiting: self.dispatcher.admission.waiting(),
            waiting_bytes: self.dispatcher.admission.waiting_bytes(),
            held: self.dispatcher.hold.num_held(),
            journal_entries: self.dispatcher.journal.num_entries(),
            journal_tokens: self.dispatcher.journal.num_tokens(),
            kept_answers: self.dispatcher.kept.num_answers(),
            kept_bytes: self.dispatcher.kept.num_bytes(),
            workers_ready: ready,
            workers: members.workers.len(),
            epoch: placements.published_epoch().0,
            ready: self.ready.check().is_ok(),
            store_available: !members.stale && !placements.stale,
            store_values_skipped: members.skipped + placements.skipped + seen.skipped,
            survives_one_loss: placements
                .published()
                .is_some_and(|p| survives_one_loss(&members, p)),
            serving,
            versions: versions.len(),
            grammars: self.grammars.stats(),
        })
    }
}

/// Serves until `shutdown`, then: not ready, refuse, finish what runs within the drain deadline, end.
///
/// # Errors
/// When the configuration breaks a rule or a server cannot go on.
pub async fn run(
    config: RouterConfig,
    parts: RouterParts,
    shutdown: Shutdown,
) -> Result<(), Error> {
    config.validate()?;
    let background = Background::default();
    let _stop_background = background.stop.clone().drop_guard();
    let known = Known::read(&config, &background.tasks, &background.stop)?;
    let followed = background.start(&config, &parts, shutdown.token.clone());
    let doors = Doors::default();
    let RouterParts {
        store,
        tokenizer,
        model,
        http,
        grpc,
        admin,
        tls,
        workers,
        scaler,
    } = parts;
    let vocabulary = constraint::vocabulary(&tokenizer).map_err(Error::Vocabulary)?;
    let given = Given {
        grammars: Grammars::new(vocabulary),
        store,
        tokenizer,
        model,
        scaler,
        connect: GrpcConnect(workers),
    };
    let app = app(config.clone(), (given, known), followed, &doors);
    let health = grpc::Health::new(&app, &background.tasks, &background.stop);
    let grpc = Incoming::new(grpc, tls.clients_door("grpc")).at_most(config.connections_max);
    let grpc = grpc::serve(grpc, &app, doors.clone(), &health)?;
    let admin = Incoming::new(admin, tls.cluster_door("admin"));
    let roles = tls.guard();
    let roles = tls.has_cluster().then_some(&roles);
    let admin = grpc::serve_admin(admin, &app, roles, doors.clone(), &health)?;
    let http = http_server::serve(
        Incoming::new(http, tls.clients_door("http")).at_most(config.connections_max),
        (routes::routes(&app), Versions::All),
        doors.clone(),
    );
    let places = keep_places(Arc::clone(&app.dispatcher), background.stop.clone());
    background.tasks.spawn(places);
    let serve = async { tokio::join!(grpc, admin, http) };
    tokio::pin!(serve);
    tracing::info!(model = app.model.id, "router serves");
    tokio::select! {
        ((), (), ()) = &mut serve => {}
        () = drain(&app, &doors, shutdown.token.clone()) => {
            // The last answers are told why they end; idle health watches just end.
            doors.abort.cancel();
            let _late = timeout(CONNECTIONS_CLOSE_MAX, &mut serve).await;
        }
    }
    background.stop.cancel();
    doors.abort.cancel();
    let requests = &app.dispatcher.tasks;
    background.tasks.close();
    requests.close();
    let ending = async { tokio::join!(background.tasks.wait(), requests.wait()) };
    let _ = timeout(CONNECTIONS_CLOSE_MAX, ending).await;
    Ok(())
}

/// Waits for the stop signal, closes the doors in order and returns when nobody should be waited for any
/// longer. The servers may well have ended before.
async fn drain(app: &App, doors: &Doors, stop: CancellationToken) {
    stop.cancelled().await;
    let admission = &app.dispatcher.admission;
    tracing::info!(running = admission.running(), "router drains");
    // Load balancers see "not ready" while requests are still taken.
    sleep(app.config.unready_grace).await;
    doors.refuse.cancel();
    let idle = async {
        while admission.running() > 0 {
            sleep(DRAIN_LOOK).await;
        }
    };
    if timeout(app.config.drain_deadline, idle).await.is_err() {
        tracing::warn!(
            left = admission.running(),
            "requests did not end in time and are aborted"
        );
        return;
    }
    // The last answers are on their way out.
    sleep(CONNECTIONS_CLOSE_MAX).await;
}

/// How both servers are told to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Doors {
    /// Take no new connections, finish what runs.
    pub(crate) refuse: CancellationToken,
    /// End whatever still runs.
    pub(crate) abort: CancellationToken,
}

/// What is left of [`RouterParts`] without the sockets.
struct Given {
    store: Arc<dyn Store>,
    tokenizer: Arc<Tokenizer>,
    grammars: Grammars,
    model: ServedModel,
    scaler: Option<Arc<dyn Scaler>>,
    connect: GrpcConnect,
}

/// What [`Background`] keeps.
struct Followed {
    cluster: ClusterView,
    ready: Readiness,
    events: Arc<EventLog>,
    planning: Option<Planning>,
    roster: Roster,
}

fn app(
    config: RouterConfig,
    (given, known): (Given, Known),
    followed: Followed,
    doors: &Doors,
) -> Arc<App> {
    let Known { auth, tenants } = known;
    let Given {
        store,
        tokenizer,
        grammars,
        model,
        scaler,
        connect,
    } = given;
    let Followed {
        cluster,
        ready,
        events,
        planning,
        roster,
    } = followed;
    let metrics = Arc::new(Metrics::new(&model.id, Arc::clone(&tenants)));
    let pool = WorkerPool::new(cluster.clone(), config.policy, Arc::clone(&events), roster);
    let dispatcher = Arc::new(dispatcher(
        &config,
        (pool, tenants),
        Arc::clone(&tokenizer),
        Arc::clone(&metrics),
        doors,
    ));
    Arc::new(App {
        body_room: Arc::new(BodyRoom::new(
            BODIES_MAX * (config.body_bytes_max + ARRIVING_BYTES),
        )),
        answer_room: AnswerRoom::new(
            ANSWERS_MAX * config.body_bytes_max,
            cores(),
            config.body_timeout,
        ),
        config,
        dispatcher,
        auth,
        cluster,
        store,
        scaler,
        connect,
        events,
        planning,
        model: Arc::new(model),
        tokenizer,
        grammars,
        metrics,
        ready,
        started: unix_seconds(),
    })
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Unix time in seconds.
pub(crate) fn unix_seconds() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// What runs sequences.
pub(crate) fn dispatcher(
    config: &RouterConfig,
    (pool, tenants): (WorkerPool, Arc<Tenants>),
    tokenizer: Arc<Tokenizer>,
    metrics: Arc<Metrics>,
    doors: &Doors,
) -> Dispatcher {
    Dispatcher {
        pool: Arc::new(pool),
        admission: Admission::new(config.admission(), doors.refuse.clone()),
        hold: Hold::new(config.hold_wait, config.queue(), doors.refuse.clone()),
        quotas: Arc::new(Quotas::new(Arc::clone(&tenants))),
        tenants,
        journal: Journal::default(),
        kept: KeptAnswers::new(config.keep_limits()),
        metrics,
        tokenizer,
        patience: Patience {
            attempts_max: config.attempts_max,
            failover_wait: config.failover_wait,
            silence_max: config.stream_silence_max,
        },
        preparing: Preparing::new(
            cores() * PREPARING_PER_CORE,
            PREPARE_WAITING_MAX,
            config.queue_wait,
        ),
        client_stall_max: config.client_stall_max,
        tasks: TaskTracker::new(),
        abort: doors.abort.clone(),
    }
}

/// What runs beside the servers, from before the first request to after the last.
#[derive(Debug, Default)]
struct Background {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    /// Watches the cluster, writes down what happens, keeps readiness, and plans when elected.
    fn start(
        &self,
        config: &RouterConfig,
        parts: &RouterParts,
        stopping: CancellationToken,
    ) -> Followed {
        let (store, tasks, stop) = (&parts.store, &self.tasks, &self.stop);
        let listed = watch_members(Arc::clone(store), tasks, stop.clone());
        let connect = Arc::new(GrpcConnect(parts.workers.clone()));
        let pulses = PulseTasks {
            tasks: tasks.clone(),
            stop: stop.clone(),
        };
        let roster = Roster::follow(listed.clone(), connect, pulses);
        let cluster = ClusterView {
            members: roster.members(),
            placements: watch_placements(Arc::clone(store), Scope::All, tasks, stop.clone()),
            intent: watch_intent(Arc::clone(store), tasks, stop.clone()),
        };
        let planning = config
            .planner
            .then(|| self.plan(config, Arc::clone(store), listed, &cluster));
        let events = Arc::new(EventLog::default());
        tasks.spawn(events::record(
            Arc::clone(&events),
            cluster.clone(),
            stop.clone(),
        ));
        let (setter, ready) = Readiness::starting("the coordination store has not been read yet");
        tasks.spawn(keep_ready(cluster.clone(), setter, stopping, stop.clone()));
        Followed {
            cluster,
            ready,
            events,
            planning,
            roster,
        }
    }

    fn plan(
        &self,
        config: &RouterConfig,
        store: Arc<dyn Store>,
        listed: watch::Receiver<Arc<Members>>,
        cluster: &ClusterView,
    ) -> Planning {
        let planner = Planner::new(
            Arc::clone(&store),
            config.planner(),
            listed,
            cluster.placements.clone(),
        );
        let leads = Arc::new(AtomicBool::new(false));
        let planning = Planning {
            status: planner.status(),
            leads: Arc::clone(&leads),
        };
        let (id, ttl, stop) = (config.id.clone(), config.election_ttl, self.stop.clone());
        self.tasks.spawn(async move {
            run_elected(store, &id, ttl, stop, |leading| {
                let (planner, leads) = (planner.clone(), Arc::clone(&leads));
                async move {
                    let _term = Term::begin(leads);
                    planner.run(leading).await;
                }
            })
            .await;
        });
        planning
    }
}
