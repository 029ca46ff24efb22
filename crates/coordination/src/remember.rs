//! A store whose last listing survives this process in a file, so that one that starts while the store is
//! away serves on what it knew. Never answers for a store that answers, and never needs the disk: a file
//! that cannot be written or read is logged and done without.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_types::Epoch;

use crate::Error;
use crate::store::{
    CasOutcome, Entry, LIST_ENTRIES_MAX, LeaseId, Listing, Revision, Store, VALUE_BYTES_MAX, Watch,
    WatchEvent, keys,
};

/// What is remembered: what everybody serves on, and what nobody may forget of the operator's wishes.
const PREFIXES: [&str; 3] = [keys::WORKERS, keys::PLACEMENT, keys::INTENT];
/// Shortest time between two writes: workers refresh their records every few seconds.
const WRITE_PAUSE: Duration = Duration::from_secs(1);
/// Largest file that is read: entries of the largest size for a large cluster.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Version of the file; another one is not read.
const FILE_VERSION: u32 = 1;

/// A store and the file that remembers it.
#[derive(Debug)]
pub struct RememberingStore {
    inner: Arc<dyn Store>,
    known: Arc<Known>,
}

/// What was last seen of the store.
#[derive(Debug)]
struct Known {
    /// Values by prefix and key.
    seen: Mutex<BTreeMap<&'static str, BTreeMap<String, Bytes>>>,
    changes: watch::Sender<()>,
}

/// The file: values are the store's, which are JSON text.
#[derive(Debug, Default, Serialize, Deserialize)]
struct File {
    version: u32,
    entries: BTreeMap<String, String>,
}

impl RememberingStore {
    /// Remembers `inner` in `path`, which is read now and written by a task of `tasks` until `stop`.
    #[must_use]
    pub fn new(
        inner: Arc<dyn Store>,
        path: PathBuf,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let mut seen: BTreeMap<_, BTreeMap<_, _>> = BTreeMap::new();
        for (key, value) in read(&path) {
            // Whoever wrote one prefix down had seen them all; some were empty.
            for prefix in PREFIXES {
                seen.entry(prefix).or_default();
            }
            if let Some(prefix) = prefix_of(&key) {
                seen.entry(prefix).or_default().insert(key, value);
            }
        }
        let known = Arc::new(Known {
            seen: Mutex::new(seen),
            changes: watch::Sender::new(()),
        });
        tasks.spawn(keep(Arc::clone(&known), path, stop));
        Self { inner, known }
    }
}

/// The remembered prefix that `key` is below.
fn prefix_of(key: &str) -> Option<&'static str> {
    PREFIXES.into_iter().find(|prefix| key.starts_with(prefix))
}

impl Known {
    fn replace(&self, prefix: &str, entries: &[Entry]) {
        let Some(prefix) = PREFIXES.into_iter().find(|known| *known == prefix) else {
            return;
        };
        let values = entries.iter().map(|e| (e.key.clone(), e.value.clone()));
        let mut values: BTreeMap<_, _> = values.collect();
        let mut seen = self.seen.lock();
        let known = seen
            .get(prefix)
            .and_then(|known| known.get(keys::PLACEMENT));
        if let Some(known) = known.filter(|known| stays(known, values.get(keys::PLACEMENT))) {
            values.insert(keys::PLACEMENT.to_owned(), known.clone());
        }
        seen.insert(prefix, values);
        drop(seen);
        self.changes.send_replace(());
    }

    fn apply(&self, event: &WatchEvent) {
        let Some(prefix) = prefix_of(event.key()) else {
            return;
        };
        let mut seen = self.seen.lock();
        let values = seen.entry(prefix).or_default();
        let (key, new) = match event {
            WatchEvent::Put(entry) => (&entry.key, Some(&entry.value)),
            WatchEvent::Delete { key, .. } => (key, None),
        };
        if key == keys::PLACEMENT && values.get(key).is_some_and(|known| stays(known, new)) {
            return;
        }
        match new {
            Some(value) => values.insert(key.clone(), value.clone()),
            None => values.remove(key),
        };
        drop(seen);
        self.changes.send_replace(());
    }

    fn file(&self) -> File {
        let seen = self.seen.lock();
        let text = |(key, value): (&String, &Bytes)| {
            let value = std::str::from_utf8(value).ok()?;
            Some((key.clone(), value.to_owned()))
        };
        File {
            version: FILE_VERSION,
            entries: seen.values().flatten().filter_map(text).collect(),
        }
    }
}

/// Whether the known placement is kept in place of `new`: who serves on it lets go neither because a store
/// was emptied, nor because it then held an older one, or one that cannot be read.
fn stays(known: &Bytes, new: Option<&Bytes>) -> bool {
    #[derive(Deserialize)]
    struct Dated {
        epoch: Epoch,
    }
    let epoch = |value: &Bytes| serde_json::from_slice::<Dated>(value).map(|dated| dated.epoch);
    let Some(new) = new else { return true };
    match (epoch(new), epoch(known)) {
        (Ok(new), Ok(known)) => new < known,
        (new, known) => new.is_err() && known.is_ok(),
    }
}

#[async_trait]
impl Store for RememberingStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        self.inner.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        let listing = self.inner.list(prefix).await?;
        self.known.replace(prefix, &listing.entries);
        Ok(listing)
    }

    fn remembered(&self, prefix: &str) -> Option<Vec<Entry>> {
        let seen = self.known.seen.lock();
        let entry = |(key, value): (&String, &Bytes)| Entry {
            key: key.clone(),
            value: value.clone(),
            revision: Revision::default(),
        };
        seen.get(prefix)
            .map(|values| values.iter().map(entry).collect())
    }

    async fn put(
        &self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        self.inner.put(key, value, lease).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome, Error> {
        self.inner
            .compare_and_swap(key, expected, value, lease)
            .await
    }

    async fn delete(&self, key: &str) -> Result<bool, Error> {
        self.inner.delete(key).await
    }

    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error> {
        self.inner.delete_if(key, revision).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> Watch {
        let known = Arc::clone(&self.known);
        let watch = self.inner.watch(prefix, from);
        Box::pin(watch.inspect(move |event| {
            if let Ok(event) = event {
                known.apply(event);
            }
        }))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        self.inner.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error> {
        self.inner.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.inner.revoke(lease).await
    }
}

/// Writes what changed, not too often, until `stop`.
async fn keep(known: Arc<Known>, path: PathBuf, stop: CancellationToken) {
    let mut changes = known.changes.subscribe();
    let work = async {
        while changes.changed().await.is_ok() {
            let (file, path) = (known.file(), path.clone());
            let written = tokio::task::spawn_blocking(move || write(&file, &path)).await;
            if let Ok(Err(error)) = written {
                tracing::warn!(%error, "what is known of the cluster cannot be kept on disk");
            }
            sleep(WRITE_PAUSE).await;
        }
    };
    let _stopped = stop.run_until_cancelled(work).await;
}

/// Replaces the file as a whole: a reader sees the old one or the new one.
fn write(file: &File, path: &Path) -> io::Result<()> {
    let text = serde_json::to_vec(file)?;
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory)?;
    let next = path.with_extension("next");
    std::fs::write(&next, text)?;
    std::fs::rename(next, path)
}

/// The entries of the file; none when there is none, and none of one that is not ours.
fn read(path: &Path) -> Vec<(String, Bytes)> {
    let read = || -> io::Result<File> {
        let size = std::fs::metadata(path)?.len();
        if size > FILE_BYTES_MAX {
            let detail = format!("{size} bytes, at most {FILE_BYTES_MAX} expected");
            return Err(io::Error::other(detail));
        }
        let file: File = serde_json::from_slice(&std::fs::read(path)?)?;
        if file.version != FILE_VERSION {
            let detail = format!("version {}, expected {FILE_VERSION}", file.version);
            return Err(io::Error::other(detail));
        }
        Ok(file)
    };
    let file = match read() {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "what was known of the cluster cannot be read");
            return Vec::new();
        }
    };
    let fits = |(_, value): &(String, String)| value.len() <= VALUE_BYTES_MAX;
    let entries = file.entries.into_iter().filter(fits).take(LIST_ENTRIES_MAX);
    entries.map(|(key, value)| (key, value.into())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::placement_store::tests::placement;
    use crate::{
        FaultStore, MemoryStore, PlacementStore, Placements, watch_intent, watch_placements,
    };

    /// One process: a remembering store over `store`, and its view of the placements.
    struct Process {
        placements: watch::Receiver<Arc<Placements>>,
        intent: watch::Receiver<Arc<crate::SeenIntent>>,
        stop: CancellationToken,
    }

    impl Process {
        fn start(store: &FaultStore, path: &Path) -> Self {
            let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
            let inner: Arc<dyn Store> = Arc::new(store.clone());
            let store = RememberingStore::new(inner, path.to_owned(), &tasks, stop.clone());
            let store: Arc<dyn Store> = Arc::new(store);
            let placements = watch_placements(Arc::clone(&store), &tasks, stop.clone());
            let intent = watch_intent(store, &tasks, stop.clone());
            Self {
                placements,
                intent,
                stop,
            }
        }

        async fn sees(&mut self, what: impl FnMut(&Arc<Placements>) -> bool) {
            self.placements.wait_for(what).await.unwrap();
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            self.stop.cancel();
        }
    }

    async fn written(path: &Path, text: &str) {
        while !std::fs::read_to_string(path).is_ok_and(|file| file.contains(text)) {
            sleep(Duration::from_millis(10)).await;
        }
    }

    fn epoch_2(placements: &Arc<Placements>) -> bool {
        placements.published_epoch() == Epoch(2)
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_starts_without_the_store_knows_what_the_last_one_knew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deeper/known.json");
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let store = FaultStore::new(Arc::clone(&memory));
        let placements = PlacementStore::new(Arc::clone(&memory));
        let mut first = Process::start(&store, &path);
        placements.publish(&placement(2), None).await.unwrap();
        first.sees(epoch_2).await;
        written(&path, keys::PLACEMENT).await;
        drop(first);
        store.set_up(false);
        let mut second = Process::start(&store, &path);
        second.sees(|p| epoch_2(p) && p.stale && p.synced).await;
        let is_known = |seen: &Arc<crate::SeenIntent>| seen.synced;
        second.intent.wait_for(is_known).await.unwrap();
        // A store that was emptied makes nobody forget what is served on, now or in the next life.
        memory.delete(keys::PLACEMENT).await.unwrap();
        store.set_up(true);
        second.sees(|p| epoch_2(p) && !p.stale).await;
        let older = serde_json::to_vec(&placement(1)).unwrap();
        memory
            .put(keys::PLACEMENT, older.into(), None)
            .await
            .unwrap();
        memory.put("placement-x", "{}".into(), None).await.unwrap();
        written(&path, "placement-x").await;
        store.set_up(false);
        drop(second);
        Process::start(&store, &path).sees(epoch_2).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_not_ours_is_not_believed_and_written_anew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("known.json");
        for junk in ["{", r#"{"version":9,"entries":{}}"#, "null"] {
            std::fs::write(&path, junk).unwrap();
            assert_eq!(read(&path), vec![], "{junk}");
        }
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let store = FaultStore::new(Arc::clone(&memory));
        let mut process = Process::start(&store, &path);
        PlacementStore::new(memory)
            .publish(&placement(2), None)
            .await
            .unwrap();
        process.sees(epoch_2).await;
        written(&path, keys::PLACEMENT).await;
    }
}
