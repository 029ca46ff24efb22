//! Everybody's view of the placements: of each group the published and the pending one, and which version
//! takes new requests. Never shows an older placement after a newer one, not even after the store was emptied.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_types::{Epoch, Placement};

use crate::mirror::{View, mirror};
use crate::mutation::{Mutation, is_on};
use crate::placement_store::{decode, decode_serving};
use crate::skipped::Skipped;
use crate::store::{Entry, Store, WatchEvent, keys};
use crate::version::{GroupKey, PlacementKey, Version};

/// Most groups that are seen; the planner makes placements for as many. Rolling updates have two.
pub const GROUPS_MAX: usize = 16;

/// What one group serves on and is about to serve on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupPlacements {
    /// The placement to serve on: the newest that was ever seen.
    pub published: Option<Arc<Placement>>,
    /// The placement to load; its epoch is above the published one's.
    pub pending: Option<Arc<Placement>>,
}

impl GroupPlacements {
    /// Epoch of the published placement; 0 when there is none.
    #[must_use]
    pub fn published_epoch(&self) -> Epoch {
        self.published.as_ref().map_or(Epoch(0), |p| p.epoch)
    }

    /// What the placements are for.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        let any = self.published.as_ref().or(self.pending.as_ref());
        any.map(|placement| Version::of_placement(placement))
    }
}

/// What the groups serve on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placements {
    /// Those that have a placement.
    pub groups: BTreeMap<GroupKey, GroupPlacements>,
    /// The version that takes new requests, as the planner has written it.
    pub serving: Option<Arc<Version>>,
    /// Whether the store has been read at all.
    pub synced: bool,
    /// Whether the store is out of sight: this is the last that was known.
    pub stale: bool,
    /// Values that could not be read, or for which there is no room, and are left out.
    pub skipped: usize,
}

impl Placements {
    /// The placements of a version.
    #[must_use]
    pub fn of(&self, version: &Version) -> Option<&GroupPlacements> {
        let is_ours = |group: &&GroupPlacements| group.version().as_ref() == Some(version);
        self.groups.get(&version.key()).filter(is_ours)
    }

    /// The placements of the version that takes new requests.
    #[must_use]
    pub fn serving_group(&self) -> Option<&GroupPlacements> {
        self.of(self.serving.as_deref()?)
    }

    /// The published placement of the version that takes new requests.
    #[must_use]
    pub fn published(&self) -> Option<&Arc<Placement>> {
        self.serving_group()?.published.as_ref()
    }

    /// The pending placement of the version that takes new requests.
    #[must_use]
    pub fn pending(&self) -> Option<&Arc<Placement>> {
        self.serving_group()?.pending.as_ref()
    }

    /// Epoch of the published placement of the version that takes new requests; 0 when there is none.
    #[must_use]
    pub fn published_epoch(&self) -> Epoch {
        self.published().map_or(Epoch(0), |p| p.epoch)
    }
}

/// Whose placements are watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Of all groups, and which version takes new requests.
    All,
    /// Of one group only.
    Group(GroupKey),
}

/// Watches placements until `stop`, through any outage of the store.
pub fn watch_placements(
    store: Arc<dyn Store>,
    scope: Scope,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> watch::Receiver<Arc<Placements>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let view = PlacementsView {
        placements: Placements::default(),
        gone: BTreeSet::new(),
        skipped: Skipped::default(),
        sender,
    };
    let prefix = match scope {
        Scope::All => keys::PLACEMENTS.to_owned(),
        Scope::Group(group) => group.prefix(),
    };
    tasks.spawn(mirror(store, prefix, view, stop));
    receiver
}

struct PlacementsView {
    placements: Placements,
    /// Groups whose published placement the store does not have any more.
    gone: BTreeSet<GroupKey>,
    skipped: Skipped,
    sender: watch::Sender<Arc<Placements>>,
}

impl PlacementsView {
    fn put(&mut self, entry: &Entry) {
        let (group, is_pending) = match PlacementKey::parse(&entry.key) {
            Some(PlacementKey::Published(group)) => (group, false),
            Some(PlacementKey::Pending(group)) => (group, true),
            Some(PlacementKey::Serving) => return self.put_serving(entry),
            None => {
                tracing::warn!(key = entry.key, "key skipped, it is not ours");
                self.skipped.insert(&entry.key);
                return;
            }
        };
        let placement = match decode(entry) {
            Ok(placement) => Arc::new(placement),
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "placement skipped");
                self.skipped.insert(&entry.key);
                return;
            }
        };
        if !self.has_room_for(group) {
            let max = GROUPS_MAX;
            tracing::warn!(key = entry.key, max, "placement skipped, too many groups");
            self.skipped.insert(&entry.key);
            return;
        }
        self.skipped.remove(&entry.key);
        let known = self.placements.groups.entry(group).or_default();
        let seen = known.published_epoch();
        if is_pending {
            known.pending = Some(placement);
        } else if placement.epoch >= seen || is_on(Mutation::EpochCheckOff) {
            known.published = Some(placement);
            self.gone.remove(&group);
        } else {
            tracing::warn!(%group, epoch = %placement.epoch, %seen, "older placement ignored");
        }
    }

    fn put_serving(&mut self, entry: &Entry) {
        match decode_serving(entry) {
            Ok(version) => {
                self.placements.serving = Some(Arc::new(version));
                self.skipped.remove(&entry.key);
            }
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "version skipped, keeping the last one");
                self.skipped.insert(&entry.key);
            }
        }
    }

    /// Forgets a group that the store does not have any more, if need be.
    fn has_room_for(&mut self, group: GroupKey) -> bool {
        let groups = &mut self.placements.groups;
        if groups.contains_key(&group) || groups.len() < GROUPS_MAX {
            return true;
        }
        let serving = self.placements.serving.as_ref().map(|v| v.key());
        let unused = self.gone.iter().find(|gone| Some(**gone) != serving);
        let Some(unused) = unused.copied() else {
            return false;
        };
        self.gone.remove(&unused);
        groups.remove(&unused);
        true
    }

    fn drop_pending(&mut self, group: GroupKey) {
        if let Some(known) = self.placements.groups.get_mut(&group) {
            known.pending = None;
        }
    }
}

impl View for PlacementsView {
    fn replace(&mut self, entries: Vec<Entry>) {
        // What is gone from the store is still what to serve on.
        let listed = |group: GroupKey| {
            let key = group.published();
            entries.iter().any(|entry| entry.key == key)
        };
        for (group, known) in &mut self.placements.groups {
            known.pending = None;
            if !listed(*group) {
                self.gone.insert(*group);
            }
        }
        self.skipped.clear();
        for entry in &entries {
            self.put(entry);
        }
        self.placements.synced = true;
    }

    fn apply(&mut self, event: WatchEvent) {
        let WatchEvent::Delete { key, .. } = event else {
            if let WatchEvent::Put(entry) = event {
                self.put(&entry);
            }
            return;
        };
        self.skipped.remove(&key);
        match PlacementKey::parse(&key) {
            Some(PlacementKey::Pending(group)) => self.drop_pending(group),
            Some(PlacementKey::Published(group)) => {
                tracing::info!(key, "deleted, whoever serves on it goes on");
                self.gone.insert(group);
            }
            Some(PlacementKey::Serving) => {
                tracing::warn!(key, "deleted, keeping the last version");
            }
            None => {}
        }
    }

    fn set_stale(&mut self, stale: bool) {
        self.placements.stale = stale;
    }

    fn publish(&mut self) {
        self.placements
            .groups
            .retain(|_, known| known.published.is_some() || known.pending.is_some());
        self.placements.skipped = self.skipped.len();
        let mut shown = self.placements.clone();
        for known in shown.groups.values_mut() {
            let published = known.published_epoch();
            known.pending = known.pending.take().filter(|p| p.epoch > published);
        }
        shown
            .groups
            .retain(|_, known| known.published.is_some() || known.pending.is_some());
        self.sender.send_if_modified(|known| {
            let changed = **known != shown;
            if changed {
                *known = Arc::new(shown);
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::timeout;

    use super::*;
    use crate::MemoryStore;
    use crate::placement_store::tests::{placement, placement_of};
    use crate::placement_store::{PlacementStore, set_serving};
    use crate::store::check_key;

    struct Scene {
        memory: MemoryStore,
        tasks: TaskTracker,
        stop: CancellationToken,
    }

    impl Scene {
        fn new() -> Self {
            Self {
                memory: MemoryStore::new(),
                tasks: TaskTracker::new(),
                stop: CancellationToken::new(),
            }
        }

        fn watch(&self, scope: Scope) -> watch::Receiver<Arc<Placements>> {
            let store = Arc::new(self.memory.clone());
            watch_placements(store, scope, &self.tasks, self.stop.clone())
        }

        fn store(&self, placement: &Placement) -> PlacementStore {
            let key = Version::of_placement(placement).key();
            PlacementStore::new(Arc::new(self.memory.clone()), key)
        }

        async fn put(&self, key: &str, value: &'static [u8]) {
            check_key(key).unwrap();
            let value = Bytes::from_static(value);
            self.memory.put(key, value, None).await.unwrap();
        }

        async fn end(self) {
            self.stop.cancel();
            self.tasks.close();
            let ended = timeout(Duration::from_secs(5), self.tasks.wait());
            ended.await.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readers_see_the_newest_placement_and_never_an_older_one() {
        let scene = Scene::new();
        let store = scene.store(&placement(1));
        let (group, version) = (store.group(), Version::of_placement(&placement(1)));
        let mut seen = scene.watch(Scope::Group(group));
        let epoch = |p: &Placements| p.of(&version).map_or(Epoch(0), |g| g.published_epoch());
        let pending = store.propose(&placement(1), None).await.unwrap();
        store.publish(&placement(1), None).await.unwrap();
        seen.wait_for(|p| epoch(p) == Epoch(1)).await.unwrap();
        let is_pending = |p: &Placements| p.groups[&group].pending.is_some();
        assert!(!is_pending(&seen.borrow()), "epoch 1 is no longer pending");
        let first = store.published().await.unwrap().unwrap();
        let again = store.publish(&placement(1), Some(&first)).await;
        assert!(again.is_err(), "{again:?}");
        store.publish(&placement(2), Some(&first)).await.unwrap();
        let late = store.publish(&placement(3), Some(&first)).await;
        let is_conflict = matches!(late, Err(crate::Error::Conflict { .. }));
        assert!(is_conflict, "{late:?}");
        seen.wait_for(|p| epoch(p) == Epoch(2)).await.unwrap();
        // Emptied, then an older epoch, then junk: the reader stays at 2.
        scene.memory.delete(&group.published()).await.unwrap();
        store.publish(&placement(1), None).await.unwrap();
        scene.put(&group.published(), b"{").await;
        store.propose(&placement(3), Some(pending)).await.unwrap();
        seen.wait_for(|p| is_pending(p)).await.unwrap();
        assert_eq!(epoch(&seen.borrow()), Epoch(2));
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_group_sees_its_own_and_everybody_else_sees_all() {
        let scene = Scene::new();
        let (a, b) = (placement_of("a", 7), placement_of("b", 2));
        let (of_a, of_b) = (scene.store(&a), scene.store(&b));
        let mut all = scene.watch(Scope::All);
        let mut own = scene.watch(Scope::Group(of_b.group()));
        of_a.publish(&a, None).await.unwrap();
        let serving = Version::of_placement(&a);
        set_serving(&scene.memory, &serving, None).await.unwrap();
        of_b.publish(&b, None).await.unwrap();
        let seen = all.wait_for(|p| p.groups.len() == 2).await.unwrap().clone();
        assert_eq!(seen.published_epoch(), Epoch(7));
        assert_eq!(seen.published().map(|p| &*p.model), Some("a"));
        let seen = own
            .wait_for(|p| !p.groups.is_empty())
            .await
            .unwrap()
            .clone();
        assert_eq!((seen.groups.len(), &seen.serving), (1, &None));
        // The placement of one group under the key of another is none.
        let stolen = serde_json::to_vec(&placement_of("a", 99)).unwrap();
        let key = of_b.group().published();
        scene.memory.put(&key, stolen.into(), None).await.unwrap();
        scene.put(keys::SERVING, b"[]").await;
        scene.put("placement/x/published", b"{}").await;
        let b3 = placement_of("b", 3);
        of_b.propose(&b3, None).await.unwrap();
        let has_pending = |p: &Arc<Placements>| {
            let group = p.groups.get(&of_b.group());
            group.is_some_and(|group| group.pending.is_some())
        };
        let seen = all.wait_for(has_pending).await.unwrap().clone();
        assert_eq!(seen.groups[&of_b.group()].published_epoch(), Epoch(2));
        assert_eq!(seen.published_epoch(), Epoch(7), "the last version stays");
        assert_eq!(seen.skipped, 3);
        scene.memory.delete("placement/x/published").await.unwrap();
        scene.memory.delete(keys::SERVING).await.unwrap();
        let own = serde_json::to_vec(&placement_of("b", 4)).unwrap();
        scene.memory.put(&key, own.into(), None).await.unwrap();
        all.wait_for(|p| p.skipped == 0).await.unwrap();
        assert_eq!(seen.groups.len(), 2);
        scene.end().await;
    }

    #[tokio::test(start_paused = true)]
    async fn many_groups_are_not_seen_and_removed_ones_make_room() {
        let scene = Scene::new();
        let mut seen = scene.watch(Scope::All);
        seen.wait_for(|p| p.synced).await.unwrap();
        for i in 0..=GROUPS_MAX {
            let placement = placement_of(&format!("f{i}"), 1);
            let store = scene.store(&placement);
            store.publish(&placement, None).await.unwrap();
        }
        let full = |p: &Arc<Placements>| p.groups.len() == GROUPS_MAX;
        let shown = seen.wait_for(full).await.unwrap().clone();
        let (first, last) = (
            placement_of("f0", 1),
            placement_of(&format!("f{GROUPS_MAX}"), 1),
        );
        let (first, last) = (scene.store(&first).group(), scene.store(&last).group());
        assert!(!shown.groups.contains_key(&last));
        seen.wait_for(|p| p.skipped == 1).await.unwrap();
        scene.memory.delete(&first.published()).await.unwrap();
        let late = placement_of(&format!("f{GROUPS_MAX}"), 2);
        let known = scene.store(&late).published().await.unwrap();
        scene
            .store(&late)
            .publish(&late, known.as_ref())
            .await
            .unwrap();
        let has_late = |p: &Arc<Placements>| p.groups.contains_key(&last);
        let shown = seen.wait_for(has_late).await.unwrap().clone();
        assert!(!shown.groups.contains_key(&first));
        scene.end().await;
    }
}
