//! The published and the pending placement. Published only by compare-and-swap, and epochs only grow:
//! never shows a reader an older placement after a newer one, not even after the store was emptied.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_types::{Epoch, Placement};

use crate::Error;
use crate::mirror::{View, mirror};
use crate::mutation::{Mutation, is_on};
use crate::registry::MODEL_DIMENSION_MAX;
use crate::store::{CasOutcome, Entry, Revision, Store, VALUE_BYTES_MAX, WatchEvent, keys};

/// What the cluster serves on and what it is about to serve on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placements {
    /// The placement to serve on: the newest that was ever seen.
    pub published: Option<Arc<Placement>>,
    /// The placement to load; its epoch is above the published one's.
    pub pending: Option<Arc<Placement>>,
    /// Whether the store has been read at all.
    pub synced: bool,
    /// Whether the store is out of sight: this is the last that was known.
    pub stale: bool,
}

/// Watches both placements until `stop`, through any outage of the store.
pub fn watch_placements(
    store: Arc<dyn Store>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> watch::Receiver<Arc<Placements>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let view = PlacementsView {
        placements: Placements::default(),
        sender,
    };
    tasks.spawn(mirror(store, keys::PLACEMENT, view, stop));
    receiver
}

struct PlacementsView {
    placements: Placements,
    sender: watch::Sender<Arc<Placements>>,
}

impl PlacementsView {
    fn put(&mut self, entry: &Entry) {
        if entry.key != keys::PLACEMENT && entry.key != keys::PLACEMENT_PENDING {
            return;
        }
        let placement = match decode(entry) {
            Ok(placement) => Arc::new(placement),
            Err(error) => {
                tracing::warn!(key = entry.key, %error, "placement skipped");
                return;
            }
        };
        let seen = self.placements.published_epoch();
        if entry.key == keys::PLACEMENT_PENDING {
            self.placements.pending = Some(placement);
        } else if placement.epoch >= seen || is_on(Mutation::EpochCheckOff) {
            self.placements.published = Some(placement);
        } else {
            tracing::warn!(epoch = %placement.epoch, %seen, "older placement ignored");
        }
    }
}

impl Placements {
    /// Epoch of the published placement; 0 when there is none.
    #[must_use]
    pub fn published_epoch(&self) -> Epoch {
        self.published.as_ref().map_or(Epoch(0), |p| p.epoch)
    }
}

impl View for PlacementsView {
    fn replace(&mut self, entries: Vec<Entry>) {
        // A published placement that is gone from the store is still the one to serve on.
        self.placements.pending = None;
        for entry in &entries {
            self.put(entry);
        }
        self.placements.synced = true;
    }

    fn apply(&mut self, event: WatchEvent) {
        match event {
            WatchEvent::Put(entry) => self.put(&entry),
            WatchEvent::Delete { key, .. } if key == keys::PLACEMENT_PENDING => {
                self.placements.pending = None;
            }
            WatchEvent::Delete { key, .. } => {
                tracing::warn!(key, "deleted, serving on the last placement");
            }
        }
    }

    fn set_stale(&mut self, stale: bool) {
        self.placements.stale = stale;
    }

    fn publish(&mut self) {
        let mut shown = self.placements.clone();
        let published = shown.published_epoch();
        shown.pending = shown.pending.filter(|pending| pending.epoch > published);
        self.sender.send_if_modified(|known| {
            let changed = **known != shown;
            if changed {
                *known = Arc::new(shown);
            }
            changed
        });
    }
}

/// A placement as it is in the store now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The placement.
    pub placement: Arc<Placement>,
    /// Where to swap it from.
    pub revision: Revision,
}

/// Reads and writes the two placement keys, for the planner.
#[derive(Clone, Debug)]
pub struct PlacementStore {
    store: Arc<dyn Store>,
}

impl PlacementStore {
    /// Over the given store.
    #[must_use]
    pub const fn new(store: Arc<dyn Store>) -> Self {
        Self { store }
    }

    /// The published placement.
    ///
    /// # Errors
    /// The store's, or [`Error::Invalid`] for a value that is no placement.
    pub async fn published(&self) -> Result<Option<Stored>, Error> {
        self.read(keys::PLACEMENT).await
    }

    /// The pending placement.
    ///
    /// # Errors
    /// The store's, or [`Error::Invalid`] for a value that is no placement.
    pub async fn pending(&self) -> Result<Option<Stored>, Error> {
        self.read(keys::PLACEMENT_PENDING).await
    }

    /// Makes `placement` pending in place of what was read as `replaces`.
    ///
    /// # Errors
    /// [`Error::Conflict`] when somebody else wrote since.
    pub async fn propose(
        &self,
        placement: &Placement,
        replaces: Option<Revision>,
    ) -> Result<Revision, Error> {
        self.write(keys::PLACEMENT_PENDING, placement, replaces)
            .await
    }

    /// Publishes `placement` in place of what was read as `replaces`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when its epoch is not above the replaced one's; [`Error::Conflict`] when
    /// somebody else wrote since.
    pub async fn publish(
        &self,
        placement: &Placement,
        replaces: Option<&Stored>,
    ) -> Result<Revision, Error> {
        if let Some(old) = replaces.filter(|old| old.placement.epoch >= placement.epoch) {
            let (old, new) = (old.placement.epoch, placement.epoch);
            let detail = format!("epoch {new} does not follow epoch {old}");
            return Err(Error::invalid(keys::PLACEMENT, detail));
        }
        let replaces = replaces.map(|old| old.revision);
        self.write(keys::PLACEMENT, placement, replaces).await
    }

    /// Removes the pending placement that was read at `revision`; false when it has changed since.
    ///
    /// # Errors
    /// The store's.
    pub async fn drop_pending(&self, revision: Revision) -> Result<bool, Error> {
        self.store
            .delete_if(keys::PLACEMENT_PENDING, revision)
            .await
    }

    /// Removes a value that cannot be read, so that planning can go on.
    pub(crate) async fn drop_unreadable(&self, key: &str) -> Result<(), Error> {
        let found = self.store.get(key).await?;
        let Some(entry) = found.filter(|entry| decode(entry).is_err()) else {
            return Ok(());
        };
        tracing::warn!(key, "removing a placement that cannot be read");
        self.store.delete_if(key, entry.revision).await.map(drop)
    }

    async fn read(&self, key: &str) -> Result<Option<Stored>, Error> {
        let Some(entry) = self.store.get(key).await? else {
            return Ok(None);
        };
        Ok(Some(Stored {
            placement: Arc::new(decode(&entry)?),
            revision: entry.revision,
        }))
    }

    async fn write(
        &self,
        key: &'static str,
        placement: &Placement,
        expected: Option<Revision>,
    ) -> Result<Revision, Error> {
        check(key, placement)?;
        let text = serde_json::to_vec(placement).map_err(|e| Error::invalid(key, e.to_string()))?;
        let value = Bytes::from(text);
        match self
            .store
            .compare_and_swap(key, expected, value, None)
            .await?
        {
            CasOutcome::Swapped(revision) => Ok(revision),
            CasOutcome::Conflict(_) => Err(Error::Conflict {
                key: key.to_owned(),
                expected,
            }),
        }
    }
}

fn decode(entry: &Entry) -> Result<Placement, Error> {
    let size = entry.value.len();
    if size > VALUE_BYTES_MAX {
        let (what, max) = (entry.key.clone(), VALUE_BYTES_MAX);
        return Err(Error::TooLarge { what, size, max });
    }
    let placement = serde_json::from_slice(&entry.value)
        .map_err(|e| Error::invalid(entry.key.clone(), e.to_string()))?;
    check(&entry.key, &placement)?;
    Ok(placement)
}

/// Everything that a reader may rely on.
fn check(key: &str, placement: &Placement) -> Result<(), Error> {
    let dimensions = 1..=MODEL_DIMENSION_MAX;
    let (layers, experts) = (placement.num_layers, placement.num_experts);
    if !dimensions.contains(&layers) || !dimensions.contains(&experts) {
        let detail = format!("{layers} layers with {experts} experts");
        return Err(Error::invalid(key, detail));
    }
    placement
        .validate()
        .map_err(|e| Error::invalid(key, e.to_string()))?;
    for (slice, holders) in placement.iter() {
        let twice = (1..holders.len()).any(|i| holders[..i].contains(&holders[i]));
        if twice {
            return Err(Error::invalid(
                key,
                format!("{slice} is held twice by one worker"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use tramontane_types::{SegmentRange, SliceHolders, WorkerId};

    use super::*;
    use crate::MemoryStore;

    pub(crate) fn placement(epoch: u64) -> Placement {
        let whole = SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0],
        };
        Placement {
            epoch: Epoch(epoch),
            numeric_class: "cpu-q8".to_owned(),
            model: "f1".to_owned(),
            num_layers: 2,
            num_experts: 4,
            workers: vec![WorkerId::new("a")],
            experts: vec![vec![whole]; 8],
        }
    }

    #[tokio::test(start_paused = true)]
    async fn readers_see_the_newest_placement_and_never_an_older_one() {
        let memory = MemoryStore::new();
        let store = PlacementStore::new(Arc::new(memory.clone()));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut seen = watch_placements(Arc::new(memory.clone()), &tasks, stop.clone());
        let pending = store.propose(&placement(1), None).await.unwrap();
        store.publish(&placement(1), None).await.unwrap();
        seen.wait_for(|p| p.published_epoch() == Epoch(1))
            .await
            .unwrap();
        assert_eq!(seen.borrow().pending, None, "epoch 1 is no longer pending");
        let first = store.published().await.unwrap().unwrap();
        let again = store.publish(&placement(1), Some(&first)).await;
        assert!(matches!(again, Err(Error::Invalid { .. })), "{again:?}");
        store.publish(&placement(2), Some(&first)).await.unwrap();
        let late = store.publish(&placement(3), Some(&first)).await;
        assert!(matches!(late, Err(Error::Conflict { .. })), "{late:?}");
        seen.wait_for(|p| p.published_epoch() == Epoch(2))
            .await
            .unwrap();
        // Emptied, then an older epoch, then junk: the reader stays at 2.
        memory.delete(keys::PLACEMENT).await.unwrap();
        store.publish(&placement(1), None).await.unwrap();
        memory
            .put(keys::PLACEMENT, Bytes::from_static(b"{"), None)
            .await
            .unwrap();
        store.propose(&placement(3), Some(pending)).await.unwrap();
        seen.wait_for(|p| p.pending.is_some()).await.unwrap();
        assert_eq!(seen.borrow().published_epoch(), Epoch(2));
        stop.cancel();
        tasks.close();
        timeout(Duration::from_secs(5), tasks.wait()).await.unwrap();
    }

    #[test]
    fn hostile_placements_are_refused() {
        let entry = |edit: fn(&mut serde_json::Value)| {
            let mut value = serde_json::to_value(placement(1)).unwrap();
            edit(&mut value);
            Entry {
                key: keys::PLACEMENT.to_owned(),
                value: Bytes::from(value.to_string()),
                revision: Revision(1),
            }
        };
        decode(&entry(|_| {})).unwrap();
        let edits: [fn(&mut serde_json::Value); 5] = [
            |v| v["num_layers"] = (u64::MAX / 2).into(),
            |v| v["num_experts"] = 0.into(),
            |v| v["experts"][0] = serde_json::json!([]),
            |v| v["experts"][0][0]["holders"] = serde_json::json!([0, 0]),
            |v| v["experts"][0][0]["range"] = serde_json::json!([4, 2]),
        ];
        for edit in edits {
            let stored = entry(edit);
            assert!(decode(&stored).is_err(), "{:?}", stored.value);
        }
    }
}
