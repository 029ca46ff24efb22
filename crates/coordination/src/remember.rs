//! A store whose last listing survives this process in a file, so that one that starts while the store is
//! away serves on what it knew. Never answers for a store that answers, and never needs the disk: a file
//! that cannot be written or read is logged and done without.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::placements::GROUPS_MAX;
use crate::store::{
    CasOutcome, Entry, LIST_ENTRIES_MAX, LeaseId, Listing, Revision, Store, VALUE_BYTES_MAX, Watch,
    WatchEvent, keys,
};
use crate::version::PlacementKey;

/// What is remembered: what everybody serves on, and what nobody may forget of the operator's wishes.
const PREFIXES: [&str; 3] = [keys::WORKERS, keys::PLACEMENTS, keys::INTENT];
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
    seen: Mutex<Seen>,
    changes: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Seen {
    /// Values by prefix and key.
    values: BTreeMap<&'static str, BTreeMap<String, Bytes>>,
    /// Published placements that are kept although the store has them no more.
    gone: BTreeSet<String>,
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
        let mut seen = Seen::default();
        for (key, value) in read(&path) {
            // Whoever wrote one prefix down had seen them all; some were empty.
            for prefix in PREFIXES {
                seen.values.entry(prefix).or_default();
            }
            if let Some(prefix) = prefix_of(&key) {
                let values = seen.values.entry(prefix).or_default();
                values.insert(key, value);
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

/// The remembered prefix that `key`, or a longer prefix, is below.
fn prefix_of(key: &str) -> Option<&'static str> {
    PREFIXES.into_iter().find(|prefix| key.starts_with(prefix))
}

impl Seen {
    /// Notes the value of a key below `prefix`, or that it is gone.
    fn note(&mut self, prefix: &'static str, key: &str, new: Option<&Bytes>) {
        let values = self.values.entry(prefix).or_default();
        if values.get(key).is_some_and(|known| stays(key, known, new)) {
            self.gone.insert(key.to_owned());
            self.forget_beyond_limit();
            return;
        }
        self.gone.remove(key);
        match new {
            Some(value) => values.insert(key.to_owned(), value.clone()),
            None => values.remove(key),
        };
    }

    /// Of placements that the store has no more, only as many are kept as there may be groups.
    fn forget_beyond_limit(&mut self) {
        while self.gone.len() > GROUPS_MAX {
            let Some(key) = self.gone.pop_first() else {
                return;
            };
            if let Some(values) = self.values.get_mut(keys::PLACEMENTS) {
                values.remove(&key);
            }
        }
    }
}

impl Known {
    fn replace(&self, below: &str, entries: &[Entry]) {
        let Some(prefix) = prefix_of(below) else {
            return;
        };
        let new: BTreeMap<&str, &Bytes> = entries.iter().map(|e| (&*e.key, &e.value)).collect();
        let mut seen = self.seen.lock();
        let known = seen.values.entry(prefix).or_default().keys();
        let lost = known.filter(|key| key.starts_with(below) && !new.contains_key(key.as_str()));
        for key in lost.cloned().collect::<Vec<_>>() {
            seen.note(prefix, &key, None);
        }
        for (key, value) in new {
            seen.note(prefix, key, Some(value));
        }
        drop(seen);
        self.changes.send_replace(());
    }

    fn apply(&self, event: &WatchEvent) {
        let Some(prefix) = prefix_of(event.key()) else {
            return;
        };
        let (key, new) = match event {
            WatchEvent::Put(entry) => (&entry.key, Some(&entry.value)),
            WatchEvent::Delete { key, .. } => (key, None),
        };
        self.seen.lock().note(prefix, key, new);
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
            entries: seen.values.values().flatten().filter_map(text).collect(),
        }
    }
}

/// Whether the known value of a key is kept in place of `new`: who serves on a placement lets go neither
/// because a store was emptied, nor because it then held an older one, or one that cannot be read. So it is
/// with the version that takes new requests, which has no age.
fn stays(key: &str, known: &Bytes, new: Option<&Bytes>) -> bool {
    match PlacementKey::parse(key) {
        Some(PlacementKey::Published(_)) => is_newer(known, new),
        Some(PlacementKey::Serving) => new.is_none(),
        Some(PlacementKey::Pending(_)) | None => false,
    }
}

fn is_newer(known: &Bytes, new: Option<&Bytes>) -> bool {
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
        let values = seen.values.get(prefix_of(prefix)?)?;
        let below = values.iter().filter(|(key, _)| key.starts_with(prefix));
        Some(below.map(entry).collect())
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
    use crate::placements::Scope;
    use crate::version::{GroupKey, Version};
    use crate::{
        FaultStore, MemoryStore, PlacementStore, Placements, watch_intent, watch_placements,
    };

    fn group() -> GroupKey {
        Version::of_placement(&placement(1)).key()
    }

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
            let scope = Scope::Group(group());
            let placements = watch_placements(Arc::clone(&store), scope, &tasks, stop.clone());
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
        let group = placements.groups.get(&group());
        group.is_some_and(|group| group.published_epoch() == Epoch(2))
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_that_starts_without_the_store_knows_what_the_last_one_knew() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deeper/known.json");
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::new());
        let store = FaultStore::new(Arc::clone(&memory));
        let placements = PlacementStore::new(Arc::clone(&memory), group());
        let mut first = Process::start(&store, &path);
        placements.publish(&placement(2), None).await.unwrap();
        first.sees(epoch_2).await;
        written(&path, keys::PLACEMENTS).await;
        drop(first);
        store.set_up(false);
        let mut second = Process::start(&store, &path);
        second.sees(|p| epoch_2(p) && p.stale && p.synced).await;
        let is_known = |seen: &Arc<crate::SeenIntent>| seen.synced;
        second.intent.wait_for(is_known).await.unwrap();
        // A store that was emptied makes nobody forget what is served on, now or in the next life.
        memory.delete(&group().published()).await.unwrap();
        store.set_up(true);
        second.sees(|p| epoch_2(p) && !p.stale).await;
        let older = serde_json::to_vec(&placement(1)).unwrap();
        let key = group().published();
        memory.put(&key, older.into(), None).await.unwrap();
        let marker = format!("{}x", group().prefix());
        memory.put(&marker, "{}".into(), None).await.unwrap();
        written(&path, &marker).await;
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
        PlacementStore::new(memory, group())
            .publish(&placement(2), None)
            .await
            .unwrap();
        process.sees(epoch_2).await;
        written(&path, keys::PLACEMENTS).await;
    }

    #[test]
    fn placements_of_groups_that_are_gone_are_not_kept_for_ever() {
        let (mut seen, prefix) = (Seen::default(), keys::PLACEMENTS);
        let serving = Bytes::from_static(br#"{"model":"f","numeric_class":"c"}"#);
        seen.note(prefix, keys::SERVING, Some(&serving));
        seen.note(prefix, keys::SERVING, None);
        for i in 0..GROUPS_MAX + 3 {
            let placement = crate::placement_store::tests::placement_of(&i.to_string(), 1);
            let key = Version::of_placement(&placement).key().published();
            let value = Bytes::from(serde_json::to_vec(&placement).unwrap());
            seen.note(prefix, &key, Some(&value));
            seen.note(prefix, &key, None);
        }
        let kept = &seen.values[prefix];
        assert!(kept.contains_key(keys::SERVING));
        assert_eq!(kept.len(), seen.gone.len());
        assert!(kept.len() <= GROUPS_MAX, "{kept:?}");
    }
}
