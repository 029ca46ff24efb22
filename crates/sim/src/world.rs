//! One run: a cluster comes up, things go wrong, everything is healed, and at the end nothing may be left
//! undone. Everything in it follows from the seed.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Builder;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::TaskTracker;
use tramontane_coordination::planner::{intent, set_intent};
use tramontane_coordination::{Intent, Store, seed_this_thread};
use tramontane_router::RouterConfig;
use tramontane_router::simulation::Gauges;
use tramontane_tokenizer::Tokenizer;
use tramontane_types::WorkerId;

use crate::check::{Check, Counts};
use crate::client::{Ask, End};
use crate::engine::node_of;
use crate::faults::{Fault, Plan};
use crate::model::version;
use crate::net::{Net, Node, STORE};
use crate::panics;
use crate::rng::Rng;
use crate::router::SimRouter;
use crate::store::{Client, Server};
use crate::worker::{Build, Shared, SimWorker};

/// Longest time of a request, faults included.
pub const REQUEST_MAX: Duration = Duration::from_secs(120);
/// A cluster without faults serves within this.
const READY_MAX: Duration = Duration::from_secs(30);
/// A healed cluster is at rest within this: members that an outage has hidden, leases, loads and running
/// layers all have their own limits below it.
const SETTLE_MAX: Duration = Duration::from_secs(120);
/// A cluster that looks at rest may be about to plan with newcomers: it is at rest after an election, the
/// time that membership must rest, and some pauses.
const SETTLED: Duration = Duration::from_secs(12);
/// A cluster at rest stays so for this long.
const REST: Duration = Duration::from_secs(8);
/// Requests at the end each finish within this.
const FINAL_MAX: Duration = Duration::from_secs(30);
/// What was given up is forgotten within this.
const FORGET: Duration = Duration::from_secs(6);
/// Faults that have a request just before them.
const ASKS_BY_FAULT: usize = 8;
/// Segments of all experts.
const SEGMENTS: u64 = (crate::model::NUM_LAYERS * crate::model::NUM_EXPERTS * 8) as u64;

/// How a run ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// Of everything that happened.
    pub hash: u64,
    /// What must never happen and did.
    pub violations: Vec<String>,
    /// What happened, if asked for.
    pub trace: Vec<String>,
    /// What was counted.
    pub counts: Counts,
    /// Virtual time.
    pub lasted: Duration,
}

/// Runs one seed.
///
/// # Panics
/// When the machine has no room for a runtime.
#[must_use]
pub fn run_seed(seed: u64, traced: bool, tokenizer: &Arc<Tokenizer>) -> Outcome {
    panics::watch();
    seed_this_thread(Some(seed));
    let panics_before = panics::count();
    let runtime = Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    #[expect(clippy::expect_used, reason = "a simulation without a runtime is none")]
    let runtime = runtime.expect("a runtime without I/O");
    let (check, lasted) = runtime.block_on(async {
        let begin = Instant::now();
        let check = Check::new(traced);
        let mut world = World::new(seed, &check, tokenizer);
        world.run().await;
        (check, begin.elapsed())
    });
    drop(runtime);
    seed_this_thread(None);
    let panics = panics::count() - panics_before;
    if panics > 0 {
        check.violated(format_args!("{panics} tasks panicked"));
    }
    let counts = check.counts();
    let (hash, violations, trace) = check.take();
    Outcome {
        seed,
        hash,
        violations,
        trace,
        counts,
        lasted,
    }
}

/// A cluster and what happens to it.
pub(crate) struct World {
    pub(crate) plan: Plan,
    rng: Rng,
    pub(crate) shared: Shared,
    pub(crate) server: Server,
    tokenizer: Arc<Tokenizer>,
    pub(crate) routers: Arc<Mutex<BTreeMap<Node, Arc<SimRouter>>>>,
    builds: Vec<Build>,
    lives: u32,
    pub(crate) clients: TaskTracker,
    /// Requests of the gentle profile that failed.
    asked: u64,
}

impl World {
    fn new(seed: u64, check: &Check, tokenizer: &Arc<Tokenizer>) -> Self {
        let plan = Plan::of(seed);
        let mut rng = Rng::new(seed, 2);
        let mut builds = Vec::new();
        for index in 0..plan.workers_max + plan.others {
            builds.push(Build {
                version: u8::from(index >= plan.workers_max),
                capacity_segments: rng.range(SEGMENTS, SEGMENTS * 2),
                load_ms: rng.range(1, 40),
                step_ms: rng.range(8, 40),
            });
        }
        let shared = Shared {
            net: Net::new(Rng::new(seed, 3)),
            check: check.clone(),
            peers: Arc::default(),
            sent: TaskTracker::new(),
        };
        Self {
            plan,
            rng,
            server: Server::new(check.clone()),
            shared,
            tokenizer: Arc::clone(tokenizer),
            routers: Arc::default(),
            builds,
            lives: 0,
            clients: TaskTracker::new(),
            asked: 0,
        }
    }

    async fn run(&mut self) {
        let check = self.shared.check.clone();
        check.note(format_args!("{:?}", self.plan));
        (0..self.plan.num_routers).for_each(|i| self.start(Node::router(i)));
        self.plan.workers().for_each(|node| self.start(node));
        if !self.settles(READY_MAX).await {
            return;
        }
        self.suffer().await;
        self.heal().await;
        if !self.settles(SETTLE_MAX).await {
            return;
        }
        let before = check.counts().publishes;
        sleep(REST).await;
        if check.counts().publishes != before {
            check.violated(format_args!("a placement was published at rest"));
        }
        if let Err(why) = self.settled().await {
            check.violated(format_args!("the cluster did not stay at rest: {why}"));
        }
        self.ask_at_the_end().await;
        sleep(FORGET).await;
        self.check_gauges();
        let counts = check.counts();
        if self.plan.is_gentle && counts.failed > 0 {
            check.violated(format_args!(
                "{} requests failed under single faults",
                counts.failed
            ));
        }
    }

    fn start(&mut self, node: Node) {
        if self.shared.net.is_up(node) {
            return;
        }
        self.lives += 1;
        let life = self.shared.net.start(node, self.lives);
        let sent = self.shared.sent.clone();
        let store = Client::new(self.server.clone(), self.shared.net.clone(), life, sent);
        let store: Arc<dyn Store> = Arc::new(store);
        match node_of(&WorkerId::new(&node.to_string())) {
            Some(_) => {
                let index = usize::from(node.0 - Node::worker(0).0);
                let _listed = SimWorker::start(&self.shared, life, self.builds[index], store);
            }
            None => {
                let config = RouterConfig {
                    id: node.to_string(),
                    replicas: NonZeroUsize::new(self.plan.replicas).unwrap_or(NonZeroUsize::MIN),
                    // Its clients come back by themselves, and its views tell nobody that they changed.
                    hold_wait: Duration::ZERO,
                    ..RouterConfig::default()
                };
                let tokenizer = Arc::clone(&self.tokenizer);
                let router = SimRouter::start(&self.shared, life, &config, tokenizer, store);
                self.routers.lock().insert(node, router);
            }
        }
    }

    fn kill(&self, node: Node) {
        let worker = self.shared.peers.lock().get(&node).cloned();
        if let Some(worker) = worker {
            worker.kill();
        }
        if let Some(router) = self.routers.lock().remove(&node) {
            router.kill();
        }
    }

    fn worker(&self, node: Node) -> Option<Arc<SimWorker>> {
        self.shared.peers.lock().get(&node).cloned()
    }

    /// The time of faults, with requests all along.
    async fn suffer(&mut self) {
        let begin = Instant::now();
        let faults = std::mem::take(&mut self.plan.faults);
        let mut events: Vec<(u64, Option<Fault>)> = Vec::new();
        for _ in 0..self.rng.range(1, 4) {
            events.push((self.rng.range(0, self.plan.faults_ms), None));
        }
        // Most requests run when something happens to them.
        for &(at, _) in faults.iter().take(ASKS_BY_FAULT) {
            if self.rng.chance(75) {
                events.push((at.saturating_sub(self.rng.range(1, 1500)), None));
            }
        }
        events.extend(faults.into_iter().map(|(at, fault)| (at, Some(fault))));
        events.sort_by_key(|(at, _)| *at);
        for (at, event) in events {
            sleep_until(begin + Duration::from_millis(at)).await;
            match event {
                Some(fault) => self.inject(fault).await,
                None => drop(self.ask(true)),
            }
        }
        sleep_until(begin + Duration::from_millis(self.plan.faults_ms)).await;
    }

    async fn inject(&mut self, fault: Fault) {
        let (net, check) = (self.shared.net.clone(), &self.shared.check);
        check.note(format_args!("FAULT {fault}"));
        check.count(|counts| counts.faults += 1);
        match fault {
            Fault::Kill(node) => self.kill(node),
            Fault::Start(node) => self.start(node),
            Fault::Pause(node) => net.pause(node, true),
            Fault::Resume(node) => net.pause(node, false),
            Fault::Clog(a, b) => net.clog(a, b, true),
            Fault::Unclog(a, b) => net.clog(a, b, false),
            Fault::StoreDown => self.set_store_up(false),
            Fault::StoreUp => self.set_store_up(true),
            Fault::Wipe => self.server.wipe(),
            Fault::Compact => self.server.compact(),
            Fault::Drain(node) => {
                if let Some(worker) = self.worker(node) {
                    worker.drain();
                }
            }
            Fault::Cordon(node) => {
                let id = WorkerId::new(&node.to_string());
                self.wish(|intent| {
                    intent.cordoned.insert(id);
                })
                .await;
            }
            Fault::Uncordon(node) => {
                let id = WorkerId::new(&node.to_string());
                self.wish(|intent| {
                    intent.cordoned.remove(&id);
                })
                .await;
            }
            Fault::Replicas(count) => {
                self.wish(|intent| intent.replicas = NonZeroUsize::new(count))
                    .await;
            }
            Fault::Use(number) => {
                self.wish(|intent| intent.weights = Some(version(number)))
                    .await;
            }
            Fault::Weather(delay, twice) => net.set_weather(delay, twice),
        }
    }

    fn set_store_up(&self, is_up: bool) {
        if is_up {
            let _same = self.shared.net.start(STORE, 1);
        } else {
            self.shared.net.kill(STORE);
        }
        self.server.set_up(is_up);
    }

    /// What an operator does beside the store.
    async fn wish(&self, change: impl FnOnce(&mut Intent)) {
        let memory = self.server.memory();
        let Ok((mut intent, revision)) = intent(&memory).await else {
            return;
        };
        change(&mut intent);
        // Nobody else writes it.
        let _ = set_intent(&memory, &intent, revision).await;
    }

    fn ask(&mut self, may_abandon: bool) -> Option<tokio::task::JoinHandle<End>> {
        let routers: Vec<Arc<SimRouter>> = self.routers.lock().values().cloned().collect();
        if routers.is_empty() {
            return None;
        }
        let router = Arc::clone(self.rng.pick(&routers));
        self.asked += 1;
        let id = format!("q{}", self.asked);
        let ask = Ask::by_chance(id, &mut self.rng, may_abandon);
        Some(
            self.clients
                .spawn(ask.run(router, self.shared.check.clone())),
        )
    }

    async fn heal(&mut self) {
        self.shared.check.note(format_args!("HEAL"));
        self.shared.net.heal();
        self.set_store_up(true);
        self.wish(|intent| *intent = Intent::default()).await;
        (0..self.plan.num_routers).for_each(|i| self.start(Node::router(i)));
        self.plan.workers().for_each(|node| self.start(node));
    }

    /// Waits until the cluster is at rest.
    async fn settles(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        let mut rests_since = None;
        loop {
            // A worker that was draining when all was healed leaves; another takes its place.
            self.plan.workers().for_each(|node| self.start(node));
            let why = match self.settled().await {
                Err(why) => {
                    rests_since = None;
                    why
                }
                Ok(()) => {
                    let rests: Instant = *rests_since.get_or_insert_with(Instant::now);
                    if rests.elapsed() >= SETTLED && self.shared.check.quiet_for() >= SETTLED {
                        self.shared.check.note(format_args!("at rest"));
                        return true;
                    }
                    "it has not rested for long".to_owned()
                }
            };
            if Instant::now() >= until {
                let check = &self.shared.check;
                check.violated(format_args!("not at rest after {limit:?}: {why}"));
                return false;
            }
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Everybody serves again.
    async fn ask_at_the_end(&mut self) {
        for _ in 0..self.plan.num_routers * 2 {
            let Some(asked) = self.ask(false) else {
                continue;
            };
            let ended = tokio::time::timeout(FINAL_MAX, asked).await;
            if !matches!(ended, Ok(Ok(End::Finished))) {
                let check = &self.shared.check;
                check.violated(format_args!("a request on a healed cluster: {ended:?}"));
            }
        }
    }

    fn check_gauges(&self) {
        let check = &self.shared.check;
        for router in self.routers.lock().values() {
            let gauges = router.core.gauges();
            if gauges != Gauges::default() {
                check.violated(format_args!("{} is left with {gauges:?}", router.life.node));
            }
        }
        for worker in self.shared.peers.lock().values() {
            let open = worker.sequences.lock().len();
            if open > 0 {
                check.violated(format_args!("{} is left with {open} sequences", worker.id));
            }
        }
    }
}
