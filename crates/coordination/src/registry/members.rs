//! Everybody's view of who is there. Never shrinks because the store is away or was emptied: whoever
//! is missing after an outage gets time to register again.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_types::WorkerId;

use super::record::WorkerRecord;
use crate::mirror::{View, mirror};
use crate::skipped::Skipped;
use crate::store::{Entry, Store, WatchEvent, keys};
use crate::version::Version;

/// After an outage of the store, workers that are missing from it count as members for this long:
/// longer than a lease and the longest pause before registering again.
pub const REJOIN_GRACE: Duration = Duration::from_secs(20);

/// The workers of the cluster at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Members {
    /// By id.
    pub workers: BTreeMap<WorkerId, Arc<WorkerRecord>>,
    /// Members that the store does not list since an outage and that may yet register again.
    pub unconfirmed: BTreeSet<WorkerId>,
    /// Whether the store has been read at all.
    pub synced: bool,
    /// Whether the store is out of sight: this is the last that was known.
    pub stale: bool,
    /// Records that could not be read and are left out.
    pub skipped: usize,
}

impl Members {
    /// The workers of one group; of the rest, what is known of the store.
    #[must_use]
    pub fn of(&self, version: &Version) -> Self {
        let ours = self.workers.iter().filter(|(_, w)| version.has(w));
        let workers: BTreeMap<_, _> = ours.map(|(id, w)| (id.clone(), Arc::clone(w))).collect();
        let is_ours = |id: &&WorkerId| workers.contains_key(*id);
        Self {
            unconfirmed: self.unconfirmed.iter().filter(is_ours).cloned().collect(),
            workers,
            synced: self.synced,
            stale: self.stale,
            skipped: self.skipped,
        }
    }
}

/// Watches the worker records until `stop`, through any outage of the store.
pub fn watch_members(
    store: Arc<dyn Store>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> watch::Receiver<Arc<Members>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let view = MembersView {
        members: Members::default(),
        skipped: Skipped::default(),
        gone_at: BTreeMap::new(),
        sender,
    };
    tasks.spawn(mirror(store, keys::WORKERS.to_owned(), view, stop));
    receiver
}

struct MembersView {
    members: Members,
    skipped: Skipped,
    /// When each unconfirmed member stops being one.
    gone_at: BTreeMap<WorkerId, Instant>,
    sender: watch::Sender<Arc<Members>>,
}

impl MembersView {
    fn put(&mut self, entry: &Entry) {
        let id = id_of(&entry.key);
        self.gone_at.remove(&id);
        match WorkerRecord::decode(entry) {
            Ok(record) => {
                self.skipped.remove(&entry.key);
                self.members.workers.insert(id, Arc::new(record));
            }
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "worker record skipped");
                self.skipped.insert(&entry.key);
                self.members.workers.remove(&id);
            }
        }
    }

    fn remove(&mut self, key: &str) {
        let id = id_of(key);
        self.skipped.remove(key);
        self.gone_at.remove(&id);
        self.members.workers.remove(&id);
    }
}

fn id_of(key: &str) -> WorkerId {
    WorkerId::new(key.strip_prefix(keys::WORKERS).unwrap_or(key))
}

impl View for MembersView {
    fn replace(&mut self, entries: Vec<Entry>) {
        let outage = self.members.stale;
        let listed: BTreeSet<WorkerId> = entries.iter().map(|entry| id_of(&entry.key)).collect();
        let gone = |id: &&WorkerId| !listed.contains(*id);
        let gone: Vec<WorkerId> = self.members.workers.keys().filter(gone).cloned().collect();
        for id in gone {
            if outage {
                tracing::warn!(worker = %id, "worker missing after an outage of the store");
                let until = Instant::now() + REJOIN_GRACE;
                self.gone_at.entry(id).or_insert(until);
            } else if !self.gone_at.contains_key(&id) {
                self.members.workers.remove(&id);
            }
        }
        self.skipped.clear();
        for entry in &entries {
            self.put(entry);
        }
        self.members.synced = true;
    }

    fn apply(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Put(entry) => self.put(&entry),
            WatchEvent::Delete { key, .. } => self.remove(&key),
        }
    }

    fn set_stale(&mut self, stale: bool) {
        self.members.stale = stale;
    }

    fn deadline(&self) -> Option<Instant> {
        self.gone_at.values().min().copied()
    }

    fn publish(&mut self) {
        let now = Instant::now();
        // While the store is out of sight nobody leaves.
        if !self.members.stale {
            self.gone_at.retain(|id, until| {
                let waiting = *until > now;
                if !waiting {
                    self.members.workers.remove(id);
                }
                waiting
            });
        }
        self.members.unconfirmed = self.gone_at.keys().cloned().collect();
        self.members.skipped = self.skipped.len();
        self.sender.send_if_modified(|known| {
            let changed = **known != self.members;
            if changed {
                *known = Arc::new(self.members.clone());
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio::time::timeout;
    use tramontane_types::Epoch;

    use super::super::record::tests::record;
    use super::super::{Registration, WorkerState};
    use super::*;
    use crate::store::LIST_ENTRIES_MAX;
    use crate::{FaultStore, MemoryStore};

    const TTL: Duration = Duration::from_secs(6);
    const LONG: Duration = Duration::from_secs(600);

    struct Scene {
        memory: MemoryStore,
        store: FaultStore,
        tasks: TaskTracker,
        stop: CancellationToken,
        members: watch::Receiver<Arc<Members>>,
    }

    impl Scene {
        fn new() -> Self {
            let memory = MemoryStore::new();
            let store = FaultStore::new(Arc::new(memory.clone()));
            let tasks = TaskTracker::new();
            let stop = CancellationToken::new();
            let members = watch_members(Arc::new(store.clone()), &tasks, stop.clone());
            Self {
                memory,
                store,
                tasks,
                stop,
                members,
            }
        }

        fn register(&self, record: WorkerRecord, stop: &CancellationToken) -> Registration {
            let store = Arc::new(self.store.clone());
            Registration::start(store, record, TTL, &self.tasks, stop.clone()).unwrap()
        }

        async fn until(&mut self, what: &str, reached: impl Fn(&Members) -> bool) -> Arc<Members> {
            let wait = self.members.wait_for(|members| reached(members));
            let members = timeout(LONG, wait).await;
            Arc::clone(&members.unwrap_or_else(|_| panic!("never: {what}")).unwrap())
        }

        async fn end(self) {
            self.stop.cancel();
            self.tasks.close();
            timeout(LONG, self.tasks.wait()).await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_comes_changes_and_leaves() {
        let mut scene = Scene::new();
        let stop = scene.stop.child_token();
        let registration = scene.register(record("a"), &stop);
        scene.until("a registered", |m| m.workers.len() == 1).await;
        registration.update(|r| {
            r.id = WorkerId::new("somebody-else");
            r.state = WorkerState::Ready;
            r.loaded = Epoch(4);
        });
        let id = WorkerId::new("a");
        let members = scene
            .until("a loaded 4", |m| m.workers[&id].loaded == Epoch(4))
            .await;
        assert_eq!(members.workers[&id].state, WorkerState::Ready);
        // Kept alive far beyond its time to live.
        let ended = scene.members.wait_for(|m| m.workers.is_empty());
        let ended = timeout(TTL * 20, ended).await.is_ok();
        assert!(!ended, "the record ended although its worker lives");
        stop.cancel();
        scene.until("a gone", |m| m.workers.is_empty()).await;
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_abandoned_record_stays_until_its_lease_ends() {
        let mut scene = Scene::new();
        let stop = scene.stop.child_token();
        let registration = scene.register(record("a"), &stop);
        scene.until("a registered", |m| m.workers.len() == 1).await;
        registration.abandon();
        let begin = Instant::now();
        stop.cancel();
        scene.until("a gone", |m| m.workers.is_empty()).await;
        let kept = begin.elapsed();
        assert!(kept >= TTL / 2 && kept <= TTL, "{kept:?}");
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_freezes_membership_and_an_emptied_store_fills_again() {
        let mut scene = Scene::new();
        let (stop_a, stop_b) = (scene.stop.child_token(), scene.stop.child_token());
        let mut registered = scene.register(record("a"), &stop_a).registered();
        scene.register(record("b"), &stop_b);
        scene.until("both", |m| m.workers.len() == 2).await;
        scene.store.set_up(false);
        let frozen = scene.until("stale", |m| m.stale).await;
        assert_eq!(frozen.workers.len(), 2);
        // Both leases end behind the outage; b really dies meanwhile.
        registered.wait_for(|r| !r).await.unwrap();
        stop_b.cancel();
        assert!(
            scene
                .memory
                .list(keys::WORKERS)
                .await
                .unwrap()
                .entries
                .is_empty()
        );
        assert_eq!(scene.members.borrow().workers.len(), 2);
        scene.store.set_up(true);
        let back = scene.until("seen again", |m| !m.stale).await;
        assert_eq!(back.workers.len(), 2, "nobody is evicted at once");
        registered.wait_for(|&r| r).await.unwrap();
        let id = WorkerId::new("a");
        scene
            .until("a confirmed", |m| !m.unconfirmed.contains(&id))
            .await;
        let after = scene.until("b gone", |m| m.workers.len() == 1).await;
        assert!(after.workers.contains_key(&id));
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_deleted_record_is_written_again_and_a_bad_one_is_counted() {
        let mut scene = Scene::new();
        let stop = scene.stop.child_token();
        scene.register(record("a"), &stop);
        scene.until("a", |m| m.workers.len() == 1).await;
        scene.memory.delete("workers/a").await.unwrap();
        scene.until("a deleted", |m| m.workers.is_empty()).await;
        scene.until("a again", |m| m.workers.len() == 1).await;
        let junk = Bytes::from_static(b"{\"schema\": 1}");
        scene.memory.put("workers/junk", junk, None).await.unwrap();
        let members = scene.until("junk counted", |m| m.skipped == 1).await;
        assert_eq!(members.workers.len(), 1);
        scene.end().await;
    }

    /// More than a listing or the history of a watch may have: what is known stays, and costs no more.
    #[tokio::test(start_paused = true)]
    async fn a_hundred_thousand_keys_of_junk_are_survived() {
        let mut scene = Scene::new();
        let stop = scene.stop.child_token();
        scene.register(record("a"), &stop);
        scene.until("a", |m| m.workers.len() == 1).await;
        let key = |i: usize| format!("workers/junk-{i}");
        for i in 0..100_000 {
            let junk = Bytes::from_static(b"\xff");
            scene.memory.put(&key(i), junk, None).await.unwrap();
        }
        let members = scene.until("out of sight", |m| m.stale).await;
        assert!(members.skipped <= LIST_ENTRIES_MAX, "{}", members.skipped);
        assert_eq!(members.workers.len(), 1);
        for i in 0..100_000 {
            scene.memory.delete(&key(i)).await.unwrap();
        }
        let members = scene.until("seen again", |m| !m.stale).await;
        assert_eq!((members.workers.len(), members.skipped), (1, 0));
        scene.end().await;
    }

    /// Clocks of other machines: times of records order processes of one id and are shown, nothing else.
    #[tokio::test(start_paused = true)]
    async fn times_far_off_are_taken_as_they_are() {
        let mut scene = Scene::new();
        for (id, started_ms) in [("past", 0), ("future", u64::MAX)] {
            let record = WorkerRecord {
                started_ms,
                ..record(id)
            };
            let stored = record.encode().unwrap();
            scene.memory.put(&record.key(), stored, None).await.unwrap();
        }
        let members = scene.until("both", |m| m.workers.len() == 2).await;
        assert_eq!(members.skipped, 0);
        // A process that begins now is younger than one of the past, and leaves the id to one of the future.
        let stop = scene.stop.child_token();
        let now = |id| WorkerRecord {
            started_ms: 1_800_000_000_000,
            incarnation: 2,
            ..record(id)
        };
        let mut taken = scene.register(now("past"), &stop).registered();
        taken.wait_for(|&registered| registered).await.unwrap();
        let mut waits = scene.register(now("future"), &stop).registered();
        let registered = timeout(TTL * 10, waits.wait_for(|&registered| registered));
        assert!(
            registered.await.is_err(),
            "the id of a younger process was taken"
        );
        stop.cancel();
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_younger_process_takes_the_id_and_keeps_it() {
        let mut scene = Scene::new();
        let stop = scene.stop.child_token();
        let id = WorkerId::new("a");
        let mut old = scene.register(record("a"), &stop).registered();
        old.wait_for(|&r| r).await.unwrap();
        let mut young = record("a");
        (young.incarnation, young.started_ms) = (2, 2);
        scene.register(young, &stop);
        scene
            .until("young", |m| {
                m.workers.get(&id).is_some_and(|r| r.incarnation == 2)
            })
            .await;
        old.wait_for(|r| !r).await.unwrap();
        let back = scene
            .members
            .wait_for(|m| m.workers.get(&id).is_none_or(|r| r.incarnation == 1));
        assert!(
            timeout(TTL * 10, back).await.is_err(),
            "the old process took the id back"
        );
        stop.cancel();
        scene.until("gone", |m| m.workers.is_empty()).await;
        scene.end().await;
    }
}
