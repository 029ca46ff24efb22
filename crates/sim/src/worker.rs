//! A worker: its registration, watches, rules about slices and expert exchange are the real ones; weights,
//! attention and transport are not. Never outlives its life on the network.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_compute::Experts as _;
use tramontane_coordination::registry::RECORD_SCHEMA;
use tramontane_coordination::{
    Members, ModelFacts, Placements, Registration, Roles, Scope, Store, Version, WorkerLoad,
    WorkerRecord, WorkerState, watch_members, watch_placements,
};
use tramontane_types::{Epoch, ExpertSlice, Placement, SEGMENTS_PER_EXPERT, WorkerId};
use tramontane_worker::config::{DROP_GRACE, LEASE_TTL};
use tramontane_worker::following::{Need, need, next_load, supersedes, unwanted};

use crate::check::Check;
use crate::engine::Running;
use crate::experts::Held;
use crate::model::{NUM_EXPERTS, NUM_LAYERS, version};
use crate::net::{Life, Net, Node, STORE};

/// Bytes of a segment.
const SEGMENT_BYTES: u64 = 1000;
/// Segments that are loaded before the placements are looked at again.
const LOAD_BATCH: usize = 16;
/// How often the gauges of a record are refreshed.
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// How often a draining worker looks whether it is needed.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Nobody may have asked for this long before a drained worker goes.
const QUIET: Duration = Duration::from_secs(2);
/// Longest drain.
const DRAIN_MAX: Duration = Duration::from_secs(60);
/// A view that was fresh for this long has seen what there is to see.
const FRESH: Duration = Duration::from_secs(7);

/// What distinguishes a worker.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Segments that it has room for.
    pub capacity_segments: u64,
    /// Time to load a segment.
    pub load_ms: u64,
    /// Time of a step.
    pub step_ms: u64,
    /// Of its weights.
    pub version: u8,
}

/// All workers that run, by node.
pub type Peers = Arc<Mutex<BTreeMap<Node, Arc<SimWorker>>>>;

/// What all processes share.
#[derive(Clone, Debug)]
pub struct Shared {
    /// The network.
    pub net: Net,
    /// The history.
    pub check: Check,
    /// All workers that run.
    pub peers: Peers,
    /// What is on its way.
    pub sent: TaskTracker,
}

/// One life of a worker.
#[derive(Debug)]
pub struct SimWorker {
    /// Its life.
    pub life: Life,
    /// Its name.
    pub id: WorkerId,
    /// What all share.
    pub shared: Shared,
    /// What it is made of.
    pub build: Build,
    /// The name of its weights.
    pub version: Version,
    /// Its slices.
    pub held: Arc<Held>,
    /// Where it is in its life.
    pub state: watch::Sender<WorkerState>,
    /// What its exchange plans with.
    pub serving: Arc<ArcSwapOption<Placement>>,
    /// Its sequences.
    pub sequences: Mutex<Vec<Running>>,
    /// Something for the engine came.
    pub woken: Arc<Notify>,
    asked_to_leave: Notify,
    /// Expert calls that it was asked.
    pub calls: AtomicU64,
    /// Since when it has reached the store without a break.
    fresh_since: Mutex<Option<Instant>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl SimWorker {
    /// Starts a worker and lists it among its peers.
    pub fn start(shared: &Shared, life: Life, build: Build, store: Arc<dyn Store>) -> Arc<Self> {
        let worker = Arc::new(Self {
            life,
            id: WorkerId::new(&life.node.to_string()),
            shared: shared.clone(),
            build,
            version: version(build.version),
            held: Arc::new(Held::of(build.version)),
            state: watch::Sender::new(WorkerState::Joining),
            serving: Arc::default(),
            sequences: Mutex::default(),
            woken: Arc::default(),
            asked_to_leave: Notify::new(),
            calls: AtomicU64::new(0),
            fresh_since: Mutex::new(None),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        });
        shared.peers.lock().insert(life.node, Arc::clone(&worker));
        let (tasks, stop) = (&worker.tasks, || worker.stop.clone());
        let record = worker.record();
        let registration =
            Registration::start(Arc::clone(&store), record, LEASE_TTL, tasks, stop());
        let Ok(registration) = registration else {
            shared
                .check
                .violated(format_args!("the record of {} was refused", worker.id));
            return worker;
        };
        let members = watch_members(Arc::clone(&store), tasks, stop());
        let scope = Scope::Group(worker.version.key());
        let placements = watch_placements(store, scope, tasks, stop());
        tasks.spawn(
            Arc::clone(&worker).while_alive(Arc::clone(&worker).refresh(registration.clone())),
        );
        tasks.spawn(Arc::clone(&worker).while_alive(Arc::clone(&worker).watch_freshness()));
        let follow = Arc::clone(&worker).follow(placements.clone(), registration);
        tasks.spawn(Arc::clone(&worker).while_alive(follow));
        tasks.spawn(Arc::clone(&worker).while_alive(Arc::clone(&worker).run_engine()));
        tasks.spawn(
            Arc::clone(&worker).while_alive(Arc::clone(&worker).drained(members, placements)),
        );
        worker
    }

    async fn while_alive(self: Arc<Self>, work: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            () = work => {}
        }
    }

    fn record(&self) -> WorkerRecord {
        WorkerRecord {
            schema: RECORD_SCHEMA,
            id: self.id.clone(),
            address: format!("{}:7000", self.id),
            socket: None,
            roles: Roles {
                attention: true,
                experts: true,
            },
            capacity_bytes: self.build.capacity_segments * SEGMENT_BYTES,
            segment_bytes: SEGMENT_BYTES,
            numeric_class: self.version.numeric_class.to_string(),
            model: ModelFacts {
                fingerprint: self.version.model.to_string(),
                name: "sim".to_owned(),
                num_layers: NUM_LAYERS,
                num_experts: NUM_EXPERTS,
                num_segments: SEGMENTS_PER_EXPERT,
            },
            state: WorkerState::Joining,
            loaded: Epoch(0),
            incarnation: u64::from(self.life.number),
            started_ms: u64::from(self.life.number),
            version: "sim".to_owned(),
            measured: tramontane_coordination::Measured::default(),
            sequences_max: 0,
            part: None,
            load: WorkerLoad::default(),
        }
    }

    /// Dies at once: nobody is told.
    pub fn kill(&self) {
        self.shared.net.kill(self.life.node);
        self.shared.peers.lock().remove(&self.life.node);
        self.sequences.lock().clear();
        self.stop.cancel();
        self.tasks.close();
    }

    /// Asks it to leave.
    pub fn drain(&self) {
        let before = [WorkerState::Joining, WorkerState::Ready];
        self.advance(&before, WorkerState::Draining);
        self.asked_to_leave.notify_one();
    }

    fn advance(&self, from: &[WorkerState], to: WorkerState) {
        self.state.send_if_modified(|state| {
            let is_next = from.contains(state) && *state != to;
            if is_next {
                self.shared
                    .check
                    .note(format_args!("{} is {to:?}", self.id));
                *state = to;
            }
            is_next
        });
    }

    async fn running(&self) {
        let node = self.life.node;
        self.shared.net.until(|net| !net.is_paused(node)).await;
    }

    async fn refresh(self: Arc<Self>, registration: Registration) {
        let mut state = self.state.subscribe();
        let mut ticks = interval(LOAD_EVERY);
        loop {
            tokio::select! {
                biased;
                _at = ticks.tick() => {}
                _changed = state.changed() => {}
            }
            self.running().await;
            let now = *state.borrow_and_update();
            let running = self.sequences.lock().len() as u32;
            registration.update(|record| {
                record.state = now;
                record.load.running = running;
            });
        }
    }

    async fn watch_freshness(self: Arc<Self>) {
        let (net, node) = (&self.shared.net, self.life.node);
        loop {
            net.until(|net| net.is_up(STORE) && net.talks(node, STORE))
                .await;
            *self.fresh_since.lock() = Some(Instant::now());
            net.until(|net| !net.is_up(STORE) || !net.talks(node, STORE))
                .await;
            *self.fresh_since.lock() = None;
        }
    }

    /// Whether its view of the placements is the newest there is.
    fn is_fresh(&self) -> bool {
        self.fresh_since
            .lock()
            .is_some_and(|since| since.elapsed() >= FRESH)
    }

    /// As the worker's follower: serve, load, say so, drop.
    async fn follow(
        self: Arc<Self>,
        mut placements: watch::Receiver<Arc<Placements>>,
        registration: Registration,
    ) {
        let mut loading: Option<(Instant, Vec<ExpertSlice>)> = None;
        loop {
            self.running().await;
            let seen = placements.borrow_and_update().clone();
            let group = seen.of(&self.version).cloned().unwrap_or_default();
            let (published, pending) = (group.published.as_ref(), group.pending.as_deref());
            let serving = self.serving.load().as_ref().map(|p| p.epoch);
            if let Some(newer) = published.filter(|p| supersedes(serving, p.epoch)) {
                self.serving.store(Some(Arc::clone(newer)));
                self.shared.check.serving(self.life, newer.epoch);
                self.woken.notify_one();
            }
            let published = published.map(|p| &**p);
            let drop_at = self.retire(published, pending);
            if loading.is_none() {
                loading = self.load(published, pending, &registration);
            }
            let load_at = loading.as_ref().map(|(at, _)| *at);
            let timer = [load_at, drop_at].into_iter().flatten().min();
            let wait = async {
                match timer {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                changed = placements.changed() => if changed.is_err() {
                    return;
                },
                () = wait => {}
            }
            self.running().await;
            let now = Instant::now();
            if let Some((_, slices)) = loading.take_if(|(at, _)| *at <= now) {
                slices.iter().for_each(|slice| self.held.hold(*slice));
                self.woken.notify_one();
            }
            if self.retire(published, pending).is_some_and(|at| at <= now) {
                self.drop_unused(published, pending);
            }
        }
    }

    fn load(
        &self,
        published: Option<&Placement>,
        pending: Option<&Placement>,
        registration: &Registration,
    ) -> Option<(Instant, Vec<ExpertSlice>)> {
        let next = next_load(&self.id, published, pending, Some(&self.held.slices()));
        for (epoch, is_published) in next.complete {
            registration.update(|record| record.loaded = record.loaded.max(epoch));
            if is_published {
                self.advance(&[WorkerState::Joining], WorkerState::Ready);
            }
        }
        let mut missing = next.missing;
        missing.truncate(LOAD_BATCH);
        let segments: u64 = missing
            .iter()
            .map(|slice| u64::from(slice.range.len()))
            .sum();
        let takes = Duration::from_millis(segments * self.build.load_ms);
        (!missing.is_empty()).then(|| (Instant::now() + takes, missing))
    }

    fn retire(
        &self,
        published: Option<&Placement>,
        pending: Option<&Placement>,
    ) -> Option<Instant> {
        let unwanted = unwanted(&self.id, published, pending, &self.held.slices());
        let mut retired = self.held.retired.lock();
        retired.set(&unwanted, Instant::now().into_std());
        retired.drop_at(DROP_GRACE).map(Instant::from_std)
    }

    fn drop_unused(&self, published: Option<&Placement>, pending: Option<&Placement>) {
        let unwanted = unwanted(&self.id, published, pending, &self.held.slices());
        for slice in &unwanted {
            self.held.unload(*slice);
        }
        let (check, count) = (&self.shared.check, unwanted.len() as u64);
        check.note(format_args!("{} drops {count} slices", self.id));
        check.count(|counts| counts.drops += count);
        for asker in self.shared.peers.lock().values() {
            if asker.version == self.version {
                self.check_drop(&unwanted, asker);
            }
        }
    }

    /// Whoever sees the newest placement and runs sequences must not be left without a holder that its
    /// placement names, by a drop of ours.
    fn check_drop(&self, dropped: &[ExpertSlice], asker: &Self) {
        let Some(placement) = asker.serving.load_full().filter(|_| asker.is_fresh()) else {
            return;
        };
        let named: Vec<_> = placement.iter().collect();
        for slice in dropped {
            let asked = named.iter().find(|(s, _)| {
                s.layer == slice.layer
                    && s.expert == slice.expert
                    && s.range.mask() & slice.range.mask() != 0
            });
            let Some((_, holders)) = asked else { continue };
            let names = |id: &WorkerId| holders.iter().any(|&h| placement.worker(h) == Some(id));
            if !names(&self.id) {
                continue;
            }
            self.shared.check.violated(format_args!(
                "{} dropped {slice}, which {} may ask of it on epoch {}",
                self.id, asker.id, placement.epoch
            ));
            return;
        }
    }

    async fn drained(
        self: Arc<Self>,
        members: watch::Receiver<Arc<Members>>,
        placements: watch::Receiver<Arc<Placements>>,
    ) {
        self.asked_to_leave.notified().await;
        let not_needed = async {
            while !self.sequences.lock().is_empty() {
                sleep(LOOK_EVERY).await;
            }
            let (mut calls, mut quiet_since) = (self.calls.load(Ordering::Relaxed), Instant::now());
            loop {
                sleep(LOOK_EVERY).await;
                self.running().await;
                let now = self.calls.load(Ordering::Relaxed);
                if now != calls {
                    (calls, quiet_since) = (now, Instant::now());
                }
                let (placements, members) = (placements.borrow().clone(), members.borrow().clone());
                match need((&self.id, &self.version), &placements, &members) {
                    Need::Nobody => return,
                    Need::Unlikely if quiet_since.elapsed() >= QUIET => return,
                    Need::Unlikely | Need::Likely => {}
                }
            }
        };
        let in_time = timeout(DRAIN_MAX, not_needed).await.is_ok();
        self.shared
            .check
            .note(format_args!("{} has drained, in time: {in_time}", self.id));
        self.advance(&[WorkerState::Draining], WorkerState::Leaving);
        let leaving = Arc::clone(&self);
        // Not a task of ours: it ends them.
        self.shared.sent.spawn(async move {
            // Deregisters first, as the process does.
            leaving.stop.cancel();
            leaving.tasks.close();
            leaving.tasks.wait().await;
            leaving.kill();
        });
        std::future::pending::<()>().await;
    }
}
