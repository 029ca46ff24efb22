//! The planner: decisions by scenario, and the whole loop with workers that load at once.

mod measured;
mod outdated;
mod roles;
mod versions;
mod warnings;

use std::num::NonZeroUsize;

use tokio::time::timeout;
use tokio_util::task::TaskTracker;

use super::*;
use crate::registry::record_for_tests as record;
use crate::registry::{
    ExpertLoad, Part, RECORD_SCHEMA_OF_PARTS, Registration, WorkerRecord, WorkerState,
};
use crate::store::Revision;
use crate::{FaultStore, MemoryStore, Scope, watch_members, watch_placements};
use tramontane_types::Epoch;

const LONG: Duration = Duration::from_secs(900);
const TTL: Duration = Duration::from_secs(6);

/// A worker as in `a`, `a:loaded=3`, `a:draining`, `a:class=other`, `a:segments=9`, `a:half=first`.
fn worker(text: &str) -> WorkerRecord {
    let (id, facts) = text.split_once(':').unwrap_or((text, ""));
    let mut worker = record(id);
    for fact in facts.split(',').filter(|fact| !fact.is_empty()) {
        match fact.split_once('=') {
            Some(("loaded", epoch)) => worker.loaded = Epoch(epoch.parse().unwrap()),
            Some(("model", model)) => worker.model.fingerprint = model.to_owned(),
            Some(("class", class)) => worker.numeric_class = class.to_owned(),
            // Of two layers one, in a group of two classes.
            Some(("half", half)) => {
                let attention = half == "first";
                worker.schema = RECORD_SCHEMA_OF_PARTS;
                worker.numeric_class = "one+other@1".to_owned();
                worker.part = Some(Part {
                    attention,
                    first_layer: usize::from(!attention),
                    end_layer: if attention { 1 } else { 2 },
                });
                worker.validate().unwrap();
            }
            Some(("ns", ns)) => worker.measured.segment_ns = Some(ns.parse().unwrap()),
            Some(("hot", n)) => {
                // The first expert of each layer, in times of the others.
                let n: f64 = n.parse().unwrap();
                let counts = [n, 1.0, 1.0, 1.0, n, 1.0, 1.0, 1.0].map(|n| n * 1000.0);
                worker.measured.expert_load = ExpertLoad::of(&counts, 4, 2);
            }
            Some(("segments", n)) => worker.capacity_bytes = n.parse::<u64>().unwrap() * 1000,
            None if fact == "draining" => worker.state = WorkerState::Draining,
            _ => panic!("unknown fact {fact}"),
        }
    }
    worker
}

#[derive(Clone, Default)]
struct Scenario {
    members: Members,
    published: Option<Placement>,
    known: Option<Placement>,
    pending: Option<Placement>,
    intent: Intent,
    config: PlannerConfig,
    settled: Duration,
    published_for: Duration,
    figures: Figures,
    pending_for: Duration,
    behind_for: BTreeMap<WorkerId, Duration>,
    late: BTreeSet<WorkerId>,
}

impl Scenario {
    /// Workers with 64 segments each, which is one copy of the model, settled.
    fn of(workers: &[&str]) -> Self {
        Self {
            settled: SETTLE_TIME,
            published_for: REBALANCE_EVERY,
            ..Self::default()
        }
        .with(workers)
    }

    fn with(mut self, workers: &[&str]) -> Self {
        let workers = workers.iter().map(|text| worker(text));
        self.members = Members {
            workers: workers.map(|w| (w.id.clone(), Arc::new(w))).collect(),
            synced: true,
            ..Members::default()
        };
        self.figures = self.figures.follow(&self.members);
        self
    }

    fn view(&self) -> PlannerView<'_> {
        PlannerView {
            members: &self.members,
            published: self.published.as_ref(),
            known: self.known.as_ref().or(self.published.as_ref()),
            pending: self.pending.as_ref(),
            intent: &self.intent,
            config: &self.config,
            settled_for: self.settled,
            published_for: self.published_for,
            pending_for: self.pending_for,
            behind_for: &self.behind_for,
            late: &self.late,
            figures: &self.figures,
        }
    }

    fn decide(&self) -> (PlannerAction, PlannerStatus) {
        decide(&self.view())
    }

    fn says(&self) -> String {
        self.decide().0.to_string()
    }

    /// The proposed placement, its holders sorted.
    fn proposes(&self) -> (Placement, Vec<String>) {
        let PlannerAction::Propose(placement) = self.decide().0 else {
            panic!("proposes nothing: {}", self.says());
        };
        placement.validate().unwrap();
        let workers = placement.workers.iter().map(ToString::to_string).collect();
        ((*placement).clone(), workers)
    }

    fn publish(mut self) -> Self {
        self.published = Some(self.proposes().0);
        self
    }
}

#[test]
fn the_first_placement_waits_for_enough_workers_that_have_settled() {
    let mut scenario = Scenario::of(&["a"]);
    scenario.config.min_workers = NonZeroUsize::new(2).unwrap();
    assert_eq!(scenario.says(), "1 of 2 workers are there");
    let mut two = scenario.with(&["a", "b"]);
    two.settled = Duration::from_secs(1);
    let PlannerAction::Wait { again_in, reason } = two.decide().0 else {
        panic!("{}", two.says());
    };
    assert_eq!(
        (reason, again_in),
        (WaitReason::Settling, Some(SETTLE_TIME - two.settled))
    );
    two.settled = SETTLE_TIME;
    let (placement, workers) = two.proposes();
    assert_eq!(
        (placement.epoch, workers),
        (Epoch(1), vec!["a".to_owned(), "b".to_owned()])
    );
}

#[test]
fn a_pending_placement_is_published_when_everybody_has_loaded() {
    let mut scenario = Scenario::of(&["a", "b"]);
    scenario.pending = Some(scenario.proposes().0);
    assert_eq!(scenario.says(), "epoch 1 loads on a b");
    scenario = scenario.with(&["a:loaded=1", "b"]);
    assert_eq!(scenario.says(), "epoch 1 loads on b");
    // A newcomer waits for its turn.
    scenario = scenario.with(&["a:loaded=1", "b", "c"]);
    assert_eq!(scenario.says(), "epoch 1 loads on b");
    scenario = scenario.with(&["a:loaded=1", "b:loaded=1", "c"]);
    assert_eq!(scenario.decide().0, PlannerAction::Publish);
    // Published but not yet removed: a planner died in between.
    scenario.published = scenario.pending.clone();
    assert_eq!(scenario.decide().0, PlannerAction::DropPending);
    scenario.pending = None;
    assert_eq!(scenario.proposes().1, ["a", "b", "c"]);
}

#[test]
fn who_vanishes_or_drains_is_planned_out_at_once() {
    let mut scenario = Scenario::of(&["a", "b", "c"]).publish();
    assert_eq!(scenario.says(), "placement fits");
    scenario.settled = Duration::ZERO;
    assert_eq!(scenario.clone().with(&["a", "b"]).proposes().1, ["a", "b"]);
    assert_eq!(
        scenario
            .clone()
            .with(&["a", "b", "c:draining"])
            .proposes()
            .1,
        ["a", "b"]
    );
    let mut cordoned = scenario.clone();
    cordoned.intent.cordoned.insert(WorkerId::new("a"));
    assert_eq!(cordoned.proposes().1, ["b", "c"]);
    // A newcomer waits for the others that may come with it.
    assert_eq!(
        scenario.with(&["a", "b", "c", "d"]).says(),
        "waiting for membership to settle"
    );
    // Nobody else has room: better a draining holder than none.
    let tight = Scenario::of(&["a:segments=32", "b:segments=32"]).publish();
    let tight = tight.with(&["a:segments=32", "b:segments=32,draining"]);
    assert!(
        tight.says().contains("64000 bytes of 32000"),
        "{}",
        tight.says()
    );
}

#[test]
fn a_worker_that_vanishes_while_loading_changes_the_pending_placement() {
    let mut scenario = Scenario::of(&["a", "b"]).publish().with(&["a", "b", "c"]);
    scenario.pending = Some(scenario.proposes().0);
    scenario = scenario.with(&["a:loaded=2", "b:loaded=1"]);
    let (placement, workers) = scenario.proposes();
    assert_eq!(
        (placement.epoch, workers),
        (Epoch(3), vec!["a".to_owned(), "b".to_owned()])
    );
}

#[test]
fn a_worker_that_never_loads_is_left_behind() {
    let mut scenario = Scenario::of(&["a", "b"]);
    scenario.pending = Some(scenario.proposes().0);
    scenario = scenario.with(&["a:loaded=1", "b"]);
    scenario.pending_for = scenario.config.load_timeout;
    let b = WorkerId::new("b");
    assert_eq!(scenario.decide().0, PlannerAction::Late(vec![b.clone()]));
    scenario.late.insert(b);
    assert_eq!(scenario.proposes().1, ["a"]);
}

#[test]
fn a_holder_that_comes_back_and_never_loads_is_planned_out() {
    let mut scenario = Scenario::of(&["a", "b"]).publish();
    scenario = scenario.with(&["a:loaded=1", "b"]);
    let (a, b) = (WorkerId::new("a"), WorkerId::new("b"));
    let timeout = scenario.config.load_timeout;
    scenario.behind_for = [(b.clone(), timeout - Duration::from_secs(1))].into();
    assert_eq!(scenario.says(), "placement fits");
    scenario.behind_for.insert(b.clone(), timeout);
    assert_eq!(scenario.decide().0, PlannerAction::Late(vec![b.clone()]));
    scenario.late.insert(b);
    let (placement, workers) = scenario.proposes();
    assert_eq!((placement.epoch, workers), (Epoch(2), vec![a.to_string()]));
    // Once: while the new placement loads, and where nobody else has room for the slices.
    scenario = scenario.with(&["a:loaded=1,segments=32", "b"]);
    let shortage = scenario.decide().1.shortage.unwrap();
    assert_eq!(
        (shortage.needed_bytes, shortage.offered_bytes),
        (64_000, 32_000)
    );
}

#[test]
fn the_largest_group_is_chosen_and_then_kept() {
    let other = ["x:class=gpu,segments=99", "y:class=gpu"];
    let scenario = Scenario::of(&["a", other[0], other[1]]);
    let (placement, workers) = scenario.proposes();
    assert_eq!(
        (placement.numeric_class.as_str(), workers.len()),
        ("gpu", 2)
    );
    assert_eq!(scenario.decide().1.incompatible, [WorkerId::new("a")]);
    // What serves is not dropped for a larger group that comes later.
    let scenario = Scenario::of(&["a"])
        .publish()
        .with(&["a", other[0], other[1]]);
    assert_eq!(scenario.says(), "placement fits");
    assert_eq!(scenario.decide().1.incompatible.len(), 2);
    assert_eq!(scenario.with(&other).proposes().0.numeric_class, "gpu");
}

#[test]
fn a_lost_store_freezes_and_an_emptied_one_is_written_again() {
    let mut scenario = Scenario::of(&["a"]).publish();
    scenario.members.stale = true;
    assert_eq!(scenario.says(), "store away, membership is frozen");
    scenario.members.stale = false;
    scenario.known = scenario.published.take();
    assert_eq!(scenario.decide().0, PlannerAction::Restore);
    // Nobody remembers the placement, but the workers remember its epoch.
    let amnesia = Scenario::of(&["a:loaded=41"]);
    assert_eq!(amnesia.proposes().0.epoch, Epoch(42));
}

#[test]
fn the_operators_wish_counts() {
    let mut scenario = Scenario::of(&["a", "b"]).publish();
    scenario.intent.replicas = NonZeroUsize::new(2);
    scenario.intent.slices_per_expert = Some(4);
    let (placement, _) = scenario.proposes();
    let status = scenario.decide().1.summary.unwrap();
    assert_eq!((status.replicas_min, status.slices_per_expert), (2, 4));
    assert!(status.workers.iter().all(|worker| worker.n_minus_one));
    assert_eq!(status.moved_segments, 64, "the second copy only");
    assert_eq!(placement.experts[0].len(), 4);
}

/// A cluster whose workers load what is asked of them as soon as they see it.
struct Cluster {
    memory: MemoryStore,
    store: FaultStore,
    tasks: TaskTracker,
    stop: CancellationToken,
    placements: watch::Receiver<Arc<Placements>>,
    planner: Planner,
}

impl Cluster {
    fn new() -> Self {
        let memory = MemoryStore::new();
        let store = FaultStore::new(Arc::new(memory.clone()));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let shared: Arc<dyn Store> = Arc::new(store.clone());
        let members = watch_members(Arc::clone(&shared), &tasks, stop.clone());
        let placements = watch_placements(Arc::clone(&shared), Scope::All, &tasks, stop.clone());
        let config = PlannerConfig::default();
        let planner = Planner::new(shared, config, members, placements.clone());
        Self {
            memory,
            store,
            tasks,
            stop,
            placements,
            planner,
        }
    }

    fn lead(&self) -> CancellationToken {
        let (planner, leadership) = (self.planner.clone(), self.stop.child_token());
        let token = leadership.clone();
        self.tasks.spawn(async move { planner.run(token).await });
        leadership
    }

    fn register(&self, record: WorkerRecord, stop: &CancellationToken) -> Registration {
        let store: Arc<dyn Store> = Arc::new(self.store.clone());
        Registration::start(store, record, TTL, &self.tasks, stop.clone()).unwrap()
    }

    /// Starts a worker; cancel the token to stop it.
    fn start(&self, text: &str) -> CancellationToken {
        let stop = self.stop.child_token();
        let worker = worker(text);
        let version = Version::of(&worker);
        let registration = self.register(worker, &stop);
        let mut placements = self.placements.clone();
        let token = stop.clone();
        self.tasks
            .spawn(token.run_until_cancelled_owned(async move {
                loop {
                    let newest = {
                        let seen = placements.borrow_and_update();
                        let group = seen.of(&version).cloned().unwrap_or_default();
                        let pending = group.pending.as_ref().map(|p| p.epoch);
                        pending.unwrap_or(group.published_epoch())
                    };
                    registration.update(|record| {
                        record.loaded = newest;
                        record.state = WorkerState::Ready;
                    });
                    if placements.changed().await.is_err() {
                        return;
                    }
                }
            }));
        stop
    }

    async fn until_served_by(&mut self, workers: &[&str]) -> Arc<Placement> {
        let served = |placements: &Arc<Placements>| {
            let published = placements.published();
            published.is_some_and(|p| {
                p.workers
                    .iter()
                    .map(WorkerId::as_str)
                    .eq(workers.iter().copied())
            })
        };
        let seen = timeout(LONG, self.placements.wait_for(served)).await;
        let seen = seen
            .unwrap_or_else(|_| panic!("never served by {workers:?}"))
            .unwrap();
        Arc::clone(seen.published().unwrap())
    }
}

#[tokio::test(start_paused = true)]
async fn the_cluster_grows_shrinks_and_survives_its_planner_and_its_store() {
    let mut cluster = Cluster::new();
    let leadership = cluster.lead();
    let _a = cluster.start("a");
    let stop_b = cluster.start("b");
    let first = cluster.until_served_by(&["a", "b"]).await;
    // Another leader goes on where this one stopped.
    leadership.cancel();
    cluster.lead();
    let stop_c = cluster.start("c");
    let second = cluster.until_served_by(&["a", "b", "c"]).await;
    assert!(second.epoch > first.epoch);
    stop_b.cancel();
    let third = cluster.until_served_by(&["a", "c"]).await;
    assert!(third.epoch > second.epoch);
    // An outage and an emptied store: the same placement is written again, nobody is planned out.
    cluster.store.set_up(false);
    let frozen = timeout(LONG, cluster.placements.wait_for(|p| p.stale)).await;
    assert_eq!(frozen.unwrap().unwrap().published(), Some(&third));
    for entry in cluster.memory.list("").await.unwrap().entries {
        cluster.memory.delete(&entry.key).await.unwrap();
    }
    cluster.store.set_up(true);
    let mut watch = cluster.memory.watch(keys::PLACEMENTS, Revision(1));
    let again = timeout(LONG, async {
        loop {
            let event = watch.next().await.unwrap().unwrap();
            let key = Version::of_placement(&third).key();
            let stored = PlacementStore::new(Arc::new(cluster.memory.clone()), key);
            let published = stored.published().await.unwrap();
            if let Some(published) = published {
                return (event, published);
            }
        }
    });
    assert_eq!(again.await.unwrap().1.placement, third);
    // The wish of the operator: cordoning c empties it.
    let (mut wish, revision) = intent(&cluster.memory).await.unwrap();
    wish.cordoned.insert(WorkerId::new("c"));
    set_intent(&cluster.memory, &wish, revision).await.unwrap();
    let last = cluster.until_served_by(&["a"]).await;
    assert!(last.epoch > third.epoch);
    stop_c.cancel();
    cluster.stop.cancel();
    cluster.tasks.close();
    timeout(LONG, cluster.tasks.wait()).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_holder_that_starts_again_and_never_loads_is_not_waited_for_for_ever() {
    let mut cluster = Cluster::new();
    let load_timeout = Duration::from_secs(120);
    cluster.planner.config.load_timeout = load_timeout;
    cluster.lead();
    let _a = cluster.start("a");
    let _b = cluster.start("b");
    let first = cluster.until_served_by(&["a", "b"]).await;
    // Its successor takes the record over before anybody can miss the worker.
    let before = Instant::now();
    let mut again = worker("b");
    (again.incarnation, again.started_ms) = (again.incarnation + 1, again.started_ms + 1);
    let _registration = cluster.register(again, &cluster.stop);
    let second = cluster.until_served_by(&["a"]).await;
    assert!(second.epoch > first.epoch);
    assert!(before.elapsed() >= load_timeout, "{:?}", before.elapsed());
    cluster.stop.cancel();
    cluster.tasks.close();
    timeout(LONG, cluster.tasks.wait()).await.unwrap();
}
