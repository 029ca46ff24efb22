//! The store of one process: for one machine without etcd, and for tests. Never survives its process.
//!
//! There is no background task: leases end when somebody looks, and a watch looks at the moment the
//! next lease would end. Time is tokio's, so tests with a paused clock work.

use std::collections::{BTreeMap, VecDeque};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio::time::{Instant, sleep_until};

use crate::Error;
use crate::store::{
    CasOutcome, Entry, LIST_BYTES_MAX, LIST_ENTRIES_MAX, LeaseId, Listing, Revision, Store, Watch,
    WatchEvent, check_key, check_prefix, check_value,
};

/// Events kept for watches; a watch that lags further behind must list again.
pub const HISTORY_EVENTS_MAX: usize = 4096;

/// A store in the memory of this process; clones share it.
#[derive(Clone, Debug)]
pub struct MemoryStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Something was written. Wakes watches in the order in which they wait.
    written: Notify,
}

#[derive(Debug)]
struct State {
    revision: Revision,
    entries: BTreeMap<String, Stored>,
    leases: BTreeMap<LeaseId, Lease>,
    /// No lease ends for now.
    leases_held: bool,
    lease_last: i64,
    /// Ascending by revision.
    history: VecDeque<WatchEvent>,
    /// Oldest revision that a watch may ask for.
    oldest: Revision,
}

#[derive(Debug)]
struct Stored {
    value: Bytes,
    revision: Revision,
    lease: Option<LeaseId>,
}

#[derive(Debug)]
struct Lease {
    ttl: Duration,
    ends: Instant,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        let revision = Revision(1);
        let state = State {
            revision,
            entries: BTreeMap::new(),
            leases: BTreeMap::new(),
            leases_held: false,
            lease_last: 0,
            history: VecDeque::new(),
            oldest: Revision(1),
        };
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                written: Notify::new(),
            }),
        }
    }

    /// Forgets all history before `revision`, as etcd's compaction does.
    pub fn compact(&self, revision: Revision) {
        self.with(|state| {
            let revision = revision.min(state.revision.next());
            state.history.retain(|event| event.revision() >= revision);
            state.oldest = state.oldest.max(revision);
        });
    }

    /// While held no lease ends, and then all begin anew: as in an etcd without a leader until it has one.
    pub fn hold_leases(&self, held: bool) {
        let mut state = self.shared.state.lock();
        state.leases_held = held;
        let now = Instant::now();
        for lease in state.leases.values_mut() {
            lease.ends = now + lease.ttl;
        }
    }

    /// Runs `change` on a state without ended leases, and wakes the watches if it changed anything.
    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.shared.state.lock();
        let before = state.revision;
        if !state.leases_held {
            state.end_leases(Instant::now());
        }
        let result = change(&mut state);
        let grew = state.revision > before;
        drop(state);
        if grew {
            self.shared.written.notify_waiters();
        }
        result
    }
}

impl State {
    fn entry(&self, key: &str) -> Option<Entry> {
        self.entries.get(key).map(|stored| stored.entry(key))
    }

    fn write(
        &mut self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        if let Some(lease) = lease.filter(|lease| !self.leases.contains_key(lease)) {
            return Err(Error::LeaseNotFound { lease });
        }
        self.revision = self.revision.next();
        let stored = Stored {
            value,
            revision: self.revision,
            lease,
        };
        self.remember(WatchEvent::Put(stored.entry(key)));
        self.entries.insert(key.to_owned(), stored);
        Ok(self.revision)
    }

    fn delete_all(&mut self, keys: Vec<String>) {
        if keys.is_empty() {
            return;
        }
        self.revision = self.revision.next();
        let revision = self.revision;
        for key in keys {
            self.entries.remove(&key);
            self.remember(WatchEvent::Delete { key, revision });
        }
    }

    fn end_lease(&mut self, lease: LeaseId) {
        self.leases.remove(&lease);
        let bound = self.entries.iter().filter(|(_, s)| s.lease == Some(lease));
        let keys = bound.map(|(key, _)| key.clone()).collect();
        self.delete_all(keys);
    }

    fn end_leases(&mut self, now: Instant) {
        let ended = self.leases.iter().filter(|(_, lease)| lease.ends <= now);
        let mut ended: Vec<(Instant, LeaseId)> = ended.map(|(&id, l)| (l.ends, id)).collect();
        ended.sort_unstable();
        for (_, lease) in ended {
            self.end_lease(lease);
        }
    }

    fn remember(&mut self, event: WatchEvent) {
        self.history.push_back(event);
        while self.history.len() > HISTORY_EVENTS_MAX {
            if let Some(gone) = self.history.pop_front() {
                self.oldest = gone.revision().next();
            }
        }
    }

    /// The events below `prefix` from `from` on.
    fn events(&self, prefix: &str, from: Revision) -> Result<VecDeque<WatchEvent>, Error> {
        if from < self.oldest {
            let oldest = self.oldest;
            return Err(Error::Compacted { from, oldest });
        }
        let begin = self.history.partition_point(|e| e.revision() < from);
        let wanted = self.history.range(begin..);
        Ok(wanted
            .filter(|e| e.key().starts_with(prefix))
            .cloned()
            .collect())
    }
}

impl Stored {
    fn entry(&self, key: &str) -> Entry {
        Entry {
            key: key.to_owned(),
            value: self.value.clone(),
            revision: self.revision,
        }
    }
}

#[async_trait]
impl Store for MemoryStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        check_key(key)?;
        Ok(self.with(|state| state.entry(key)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        check_prefix(prefix)?;
        self.with(|state| {
            let from = state.entries.range(prefix.to_owned()..);
            let below = from.take_while(|(key, _)| key.starts_with(prefix));
            let entries: Vec<Entry> = below.map(|(key, s)| s.entry(key)).collect();
            check_list(prefix, &entries)?;
            let revision = state.revision;
            Ok(Listing { entries, revision })
        })
    }

    async fn put(
        &self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        check_key(key)?;
        check_value(key, &value)?;
        self.with(|state| state.write(key, value, lease))
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome, Error> {
        check_key(key)?;
        check_value(key, &value)?;
        self.with(|state| {
            let found = state.entry(key);
            if found.as_ref().map(|entry| entry.revision) != expected {
                return Ok(CasOutcome::Conflict(found));
            }
            state.write(key, value, lease).map(CasOutcome::Swapped)
        })
    }

    async fn delete(&self, key: &str) -> Result<bool, Error> {
        check_key(key)?;
        Ok(self.with(|state| {
            let found = state.entries.contains_key(key);
            if found {
                state.delete_all(vec![key.to_owned()]);
            }
            found
        }))
    }

    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error> {
        check_key(key)?;
        Ok(self.with(|state| {
            let found = state.entries.get(key).map(|stored| stored.revision) == Some(revision);
            if found {
                state.delete_all(vec![key.to_owned()]);
            }
            found
        }))
    }

    fn watch(&self, prefix: &str, from: Revision) -> Watch {
        if let Err(error) = check_prefix(prefix) {
            return Box::pin(stream::iter([Err(error)]));
        }
        let watcher = Watcher {
            store: self.clone(),
            prefix: prefix.to_owned(),
            from,
            ready: VecDeque::new(),
            ended: false,
        };
        Box::pin(stream::unfold(watcher, Watcher::step))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        Ok(self.with(|state| {
            state.lease_last += 1;
            let id = LeaseId(state.lease_last);
            let ends = Instant::now() + ttl;
            state.leases.insert(id, Lease { ttl, ends });
            id
        }))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error> {
        Ok(self.with(|state| {
            let Some(lease) = state.leases.get_mut(&lease) else {
                return false;
            };
            lease.ends = Instant::now() + lease.ttl;
            true
        }))
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.with(|state| state.end_lease(lease));
        Ok(())
    }
}

/// Refuses a listing above [`LIST_ENTRIES_MAX`] or [`LIST_BYTES_MAX`].
pub(crate) fn check_list(prefix: &str, entries: &[Entry]) -> Result<(), Error> {
    let bytes = entries.iter().map(|entry| entry.value.len()).sum();
    for (of, size, max) in [
        ("listing", entries.len(), LIST_ENTRIES_MAX),
        ("bytes of the listing", bytes, LIST_BYTES_MAX),
    ] {
        if size > max {
            let what = format!("{of} of {prefix:?}");
            return Err(Error::TooLarge { what, size, max });
        }
    }
    Ok(())
}

struct Watcher {
    store: MemoryStore,
    prefix: String,
    from: Revision,
    ready: VecDeque<WatchEvent>,
    ended: bool,
}

impl Watcher {
    async fn step(mut self) -> Option<(Result<WatchEvent, Error>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            if self.ended {
                return None;
            }
            let shared = Arc::clone(&self.store.shared);
            let mut written = pin!(shared.written.notified());
            // What is written from here on wakes us.
            written.as_mut().enable();
            let looked = self.store.with(|state| {
                let events = state.events(&self.prefix, self.from)?;
                let leases = state.leases.values().filter(|_| !state.leases_held);
                let lease_ends = leases.map(|lease| lease.ends).min();
                Ok((events, state.revision.next(), lease_ends))
            });
            let (events, next, lease_ends) = match looked {
                Ok(looked) => looked,
                Err(error) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
            };
            self.from = self.from.max(next);
            self.ready = events;
            if self.ready.is_empty() {
                wait(written, lease_ends).await;
            }
        }
    }
}

/// Until something is written or a lease may have ended.
async fn wait(written: Pin<&mut Notified<'_>>, lease_ends: Option<Instant>) {
    let lease = async {
        match lease_ends {
            Some(ends) => sleep_until(ends).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = written => {}
        () = lease => {}
    }
}
