//! A store that can be taken away and given back: for tests of everything that must outlive etcd.
//! Never alters a call that it lets through.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream};
use tokio::sync::watch;

use crate::Error;
use crate::store::{CasOutcome, Entry, LeaseId, Listing, Revision, Store, Watch, WatchEvent};

/// Lets calls through to `inner` while it is up; clones share the switch.
#[derive(Clone, Debug)]
pub struct FaultStore {
    inner: Arc<dyn Store>,
    up: Arc<watch::Sender<bool>>,
}

impl FaultStore {
    /// A store that is up.
    #[must_use]
    pub fn new(inner: Arc<dyn Store>) -> Self {
        Self {
            inner,
            up: Arc::new(watch::Sender::new(true)),
        }
    }

    /// Takes the store away (false) or gives it back (true). Watches that are open when it is taken
    /// away end.
    pub fn set_up(&self, up: bool) {
        self.up.send_replace(up);
    }

    fn through(&self, operation: &'static str) -> Result<&dyn Store, Error> {
        if *self.up.borrow() {
            return Ok(self.inner.as_ref());
        }
        Err(away(operation))
    }
}

fn away(operation: &'static str) -> Error {
    Error::Unavailable {
        operation,
        detail: "taken away by a test".to_owned(),
    }
}

#[async_trait]
impl Store for FaultStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        self.through("get")?.get(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        self.through("list")?.list(prefix).await
    }

    async fn put(
        &self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        self.through("put")?.put(key, value, lease).await
    }

    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome, Error> {
        let inner = self.through("compare and swap")?;
        inner.compare_and_swap(key, expected, value, lease).await
    }

    async fn delete(&self, key: &str) -> Result<bool, Error> {
        self.through("delete")?.delete(key).await
    }

    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error> {
        self.through("delete if")?.delete_if(key, revision).await
    }

    fn watch(&self, prefix: &str, from: Revision) -> Watch {
        let state = Some((self.inner.watch(prefix, from), self.up.subscribe()));
        Box::pin(stream::unfold(state, step))
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        self.through("grant lease")?.grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error> {
        self.through("keep alive")?.keep_alive(lease).await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.through("revoke")?.revoke(lease).await
    }
}

type WatchState = Option<(Watch, watch::Receiver<bool>)>;

async fn step(state: WatchState) -> Option<(Result<WatchEvent, Error>, WatchState)> {
    let (mut events, mut up) = state?;
    let event = tokio::select! {
        biased;
        _down = up.wait_for(|up| !up) => return Some((Err(away("watch")), None)),
        event = events.next() => event?,
    };
    Some((event, Some((events, up))))
}
