//! The store as one process reaches it: late, held back, away, emptied. Retries as the etcd client does; the
//! data and the watches are those of [`MemoryStore`]. Never loses a write that was answered, but for a wipe.

use std::fmt;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::TaskTracker;
use tramontane_coordination::etcd::watch::WATCH_BLIND_MAX;
use tramontane_coordination::etcd::{ATTEMPT_TIMEOUT, CALL_DEADLINE};
use tramontane_coordination::{
    CasOutcome, Entry, Error, LeaseId, Listing, MemoryStore, Revision, Store, Watch, WatchEvent,
};

use crate::check::Check;
use crate::net::{Life, Net, STORE};

/// Pause between two attempts of a call.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// Lease ids of different stores differ: etcd's are random.
const LEASES_PER_STORE: i64 = 1_000_000;

/// The store's process; clones share it.
#[derive(Clone, Debug)]
pub struct Server {
    state: Arc<Mutex<Data>>,
    /// It started, stopped or was wiped.
    changed: Arc<Notify>,
    check: Check,
}

#[derive(Debug)]
struct Data {
    memory: MemoryStore,
    is_up: bool,
    /// Counts wipes.
    generation: i64,
}

impl Server {
    /// An empty store that is up.
    #[must_use]
    pub fn new(check: Check) -> Self {
        let data = Data {
            memory: MemoryStore::new(),
            is_up: true,
            generation: 0,
        };
        Self {
            state: Arc::new(Mutex::new(data)),
            changed: Arc::default(),
            check,
        }
    }

    /// Takes it away or gives it back.
    pub fn set_up(&self, is_up: bool) {
        {
            let mut data = self.state.lock();
            data.is_up = is_up;
            // As etcd: whoever leads after an outage gives every lease its full time.
            data.memory.hold_leases(!is_up);
        }
        self.changed.notify_waiters();
    }

    /// All data is gone.
    pub fn wipe(&self) {
        {
            let mut data = self.state.lock();
            data.memory = MemoryStore::new();
            data.memory.hold_leases(!data.is_up);
            data.generation += 1;
        }
        self.check.wiped();
        self.changed.notify_waiters();
    }

    /// Forgets its history.
    pub fn compact(&self) {
        self.state.lock().memory.compact(Revision(i64::MAX - 1));
    }

    /// What it holds now, without the network.
    #[must_use]
    pub fn memory(&self) -> MemoryStore {
        self.state.lock().memory.clone()
    }

    fn open(&self) -> Option<(MemoryStore, i64)> {
        let data = self.state.lock();
        data.is_up.then(|| (data.memory.clone(), data.generation))
    }
}

/// The store as one process reaches it.
#[derive(Clone)]
pub struct Client {
    server: Server,
    net: Net,
    me: Life,
    /// What is on its way, and arrives also when nobody waits for the answer any more.
    sent: TaskTracker,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("me", &self.me)
            .finish_non_exhaustive()
    }
}

type Answer<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

impl Client {
    /// The store as `me` reaches it.
    #[must_use]
    pub const fn new(server: Server, net: Net, me: Life, sent: TaskTracker) -> Self {
        Self {
            server,
            net,
            me,
            sent,
        }
    }

    /// Tries until it works, fails for good, or the deadline of the call is near.
    async fn call<T, F>(&self, operation: &'static str, run: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Fn(MemoryStore, i64, bool) -> Answer<T> + Send + Sync + Clone + 'static,
    {
        let ends = Instant::now() + CALL_DEADLINE;
        let mut again = false;
        loop {
            if !self.net.is_alive(self.me) {
                return Err(away(operation, "this process is dead"));
            }
            let answer =
                timeout(ATTEMPT_TIMEOUT, self.attempt(operation, run.clone(), again)).await;
            let error = match answer {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) if !error.is_retryable() => return Err(error),
                Ok(Err(error)) => error,
                Err(_elapsed) => Error::Timeout {
                    operation,
                    after: ATTEMPT_TIMEOUT,
                },
            };
            if Instant::now() + RETRY_PAUSE >= ends {
                return Err(error);
            }
            sleep(RETRY_PAUSE).await;
            again = true;
        }
    }

    async fn attempt<T, F>(&self, operation: &'static str, run: F, again: bool) -> Result<T, Error>
    where
        T: Send + 'static,
        F: Fn(MemoryStore, i64, bool) -> Answer<T> + Send + Sync + 'static,
    {
        let (tell, told) = oneshot::channel();
        let (net, server, me) = (self.net.clone(), self.server.clone(), self.me.node);
        self.sent.spawn(async move {
            net.carry(me, STORE).await;
            let answer = match server.open() {
                Some((memory, generation)) => run(memory, generation, again).await,
                None => Err(away(operation, "connection refused")),
            };
            net.carry(STORE, me).await;
            // Nobody may wait any more.
            let _ = tell.send(answer);
        });
        told.await
            .unwrap_or_else(|_| Err(away(operation, "answer lost")))
    }
}

fn away(operation: &'static str, detail: &str) -> Error {
    Error::Unavailable {
        operation,
        detail: detail.to_owned(),
    }
}

/// The lease inside the present store; `None` for one of an earlier store.
fn inner(lease: LeaseId, generation: i64) -> Option<LeaseId> {
    (lease.0 / LEASES_PER_STORE == generation).then_some(LeaseId(lease.0 % LEASES_PER_STORE))
}

fn inner_or_error(lease: Option<LeaseId>, generation: i64) -> Result<Option<LeaseId>, Error> {
    let Some(lease) = lease else { return Ok(None) };
    let found = inner(lease, generation).ok_or(Error::LeaseNotFound { lease })?;
    Ok(Some(found))
}

#[async_trait]
impl Store for Client {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        let key = key.to_owned();
        let run = move |memory: MemoryStore, _, _| -> Answer<_> {
            let key = key.clone();
            Box::pin(async move { memory.get(&key).await })
        };
        self.call("get", run).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        let prefix = prefix.to_owned();
        let run = move |memory: MemoryStore, _, _| -> Answer<_> {
            let prefix = prefix.clone();
            Box::pin(async move { memory.list(&prefix).await })
        };
        self.call("list", run).await
    }

    async fn put(
        &self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        let key = key.to_owned();
        let run = move |memory: MemoryStore, generation, _| -> Answer<_> {
            let (key, value) = (key.clone(), value.clone());
            Box::pin(async move {
                let lease = inner_or_error(lease, generation)?;
                memory.put(&key, value, lease).await
            })
        };
        self.call("put", run).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome, Error> {
        let (key, check, me) = (key.to_owned(), self.server.check.clone(), self.me);
        let run = move |memory: MemoryStore, generation, again: bool| -> Answer<_> {
            let (key, value, check) = (key.clone(), value.clone(), check.clone());
            Box::pin(async move {
                let lease = inner_or_error(lease, generation)?;
                let outcome = memory
                    .compare_and_swap(&key, expected, value.clone(), lease)
                    .await?;
                match outcome {
                    CasOutcome::Swapped(_) => check.written(me, &key, &value),
                    // An earlier attempt without an answer may have written: our own value is no conflict.
                    CasOutcome::Conflict(Some(found))
                        if again && found.value == value && Some(found.revision) != expected =>
                    {
                        return Ok(CasOutcome::Swapped(found.revision));
                    }
                    CasOutcome::Conflict(_) => {}
                }
                Ok(outcome)
            })
        };
        self.call("compare and swap", run).await
    }

    async fn delete(&self, key: &str) -> Result<bool, Error> {
        let key = key.to_owned();
        let run = move |memory: MemoryStore, _, again: bool| -> Answer<_> {
            let key = key.clone();
            Box::pin(async move { Ok(memory.delete(&key).await? || again) })
        };
        self.call("delete", run).await
    }

    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error> {
        let key = key.to_owned();
        let run = move |memory: MemoryStore, _, _| -> Answer<_> {
            let key = key.clone();
            Box::pin(async move { memory.delete_if(&key, revision).await })
        };
        self.call("delete if", run).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> Watch {
        let watcher = Watcher {
            client: self.clone(),
            prefix: prefix.to_owned(),
            next: from,
            generation: None,
            open: None,
            ended: false,
        };
        Box::pin(stream::unfold(watcher, Watcher::step))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let run = move |memory: MemoryStore, generation, _| -> Answer<_> {
            Box::pin(async move {
                let lease = memory.grant_lease(ttl).await?;
                Ok(LeaseId(lease.0 + generation * LEASES_PER_STORE))
            })
        };
        self.call("grant lease", run).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error> {
        let run = move |memory: MemoryStore, generation, _| -> Answer<_> {
            Box::pin(async move {
                match inner(lease, generation) {
                    Some(lease) => memory.keep_alive(lease).await,
                    None => Ok(false),
                }
            })
        };
        self.call("keep alive", run).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        let run = move |memory: MemoryStore, generation, _| -> Answer<_> {
            Box::pin(async move {
                match inner(lease, generation) {
                    Some(lease) => memory.revoke(lease).await,
                    None => Ok(()),
                }
            })
        };
        self.call("revoke lease", run).await
    }
}

/// A watch over the network. As the etcd client's: it resumes behind the last revision, says when the store
/// is another one, and ends when it has been blind for too long.
struct Watcher {
    client: Client,
    prefix: String,
    next: Revision,
    generation: Option<i64>,
    open: Option<Watch>,
    ended: bool,
}

impl Watcher {
    async fn step(mut self) -> Option<(Result<WatchEvent, Error>, Self)> {
        if self.ended {
            return None;
        }
        loop {
            let server = Arc::clone(&self.client.server.changed);
            let mut changed = pin!(server.notified());
            changed.as_mut().enable();
            // Something may have happened while nobody looked.
            let now = self.client.server.open().map(|(_, generation)| generation);
            if now.is_none() || now != self.generation {
                self.open = None;
            }
            if self.open.is_none()
                && let Err(error) = self.reopen().await
            {
                self.ended = true;
                return Some((Err(error), self));
            }
            let watch = self.open.as_mut()?;
            let (net, me) = (&self.client.net, self.client.me.node);
            let clogged = net.until(|net| !net.talks(me, STORE));
            let event = tokio::select! {
                biased;
                () = changed => None,
                () = clogged => None,
                event = watch.next() => event,
            };
            match event {
                None => self.open = None,
                Some(Ok(event)) => {
                    net.carry(STORE, me).await;
                    self.next = event.revision().next();
                    return Some((Ok(event), self));
                }
                Some(Err(error)) => {
                    self.ended = true;
                    return Some((Err(error), self));
                }
            }
        }
    }

    async fn reopen(&mut self) -> Result<(), Error> {
        let client = &self.client;
        let reached = async {
            loop {
                let mut changed = pin!(client.server.changed.notified());
                changed.as_mut().enable();
                client
                    .net
                    .until(|net| net.talks(client.me.node, STORE))
                    .await;
                if let Some(open) = client.server.open() {
                    return open;
                }
                changed.await;
            }
        };
        let reached = timeout(WATCH_BLIND_MAX, reached).await;
        let (memory, generation) = reached.map_err(|_| away("watch", "out of sight"))?;
        let found = memory.list("").await?.revision;
        if *self.generation.get_or_insert(generation) != generation || found.next() < self.next {
            let expected = Revision(self.next.0 - 1);
            return Err(Error::Replaced { expected, found });
        }
        self.open = Some(memory.watch(&self.prefix, self.next));
        Ok(())
    }
}
