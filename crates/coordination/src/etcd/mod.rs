//! The store over etcd 3.4 or later. Never waits past its deadlines and never trusts a stream to live.
//!
//! There is one connection per endpoint and calls stick to the endpoint that answered last: a channel
//! balanced over all of them keeps sending some calls to a dead one. Failed attempts move on to the
//! next endpoint until the deadline of the call.

mod config;
mod status;
mod version;
pub mod watch;

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use etcd_client::{
    Channel, Client, Compare, CompareOp, GetOptions, GetResponse, KeyValue, PutOptions, Txn, TxnOp,
    TxnOpResponse,
};
use tokio::sync::OnceCell;
use tokio::time::{Instant, sleep, timeout};

pub use config::EtcdConfig;
use status::error_of;

use crate::Error;
use crate::backoff::Backoff;
use crate::memory::check_list;
use crate::store::{
    CasOutcome, Entry, LEASE_TTL_MIN, LeaseId, Listing, Revision, Store, VALUE_BYTES_MAX, Watch,
    check_key, check_prefix, check_value,
};

/// Limit of one call, all attempts together: longer than a leader election (1 to 4 s seen).
pub const CALL_DEADLINE: Duration = Duration::from_secs(6);
/// Limit of one attempt, so that a hung endpoint leaves time for the others.
pub const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Limit of connecting to one endpoint.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Pause between HTTP/2 pings; etcd closes connections that ping more often than every 5 s.
pub const PING_EVERY: Duration = Duration::from_secs(10);
/// A connection without an answer to a ping for this long is dead.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause between attempts of a call.
pub const RETRY_PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between attempts of a call.
pub const RETRY_PAUSE_MAX: Duration = Duration::from_millis(500);
/// Entries per page of a listing.
pub const LIST_PAGE_ENTRIES: i64 = 64;
/// Largest answer that is read: a page of the largest values, with some room.
pub const ANSWER_BYTES_MAX: usize = (LIST_PAGE_ENTRIES as usize + 1) * VALUE_BYTES_MAX;
/// Longest cluster name.
pub const CLUSTER_NAME_BYTES_MAX: usize = 63;

/// A cluster's keys in etcd; clones share the connections.
#[derive(Clone, Debug)]
pub struct EtcdStore {
    shared: Arc<Shared>,
}

struct Shared {
    config: EtcdConfig,
    /// `/tramontane/<cluster>/`
    root: String,
    endpoints: Vec<Member>,
    /// Index of the endpoint that calls go to.
    preferred: AtomicUsize,
}

struct Member {
    url: String,
    client: OnceCell<Client>,
    /// Whether it was asked which version it is.
    has_been_asked: AtomicBool,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("config", &self.config)
            .finish()
    }
}

impl Shared {
    /// The endpoint to use now, and its index for [`Shared::leave`].
    fn endpoint(&self) -> Result<(usize, &Member), Error> {
        let index = self.preferred.load(Ordering::Relaxed) % self.endpoints.len().max(1);
        let endpoint = self.endpoints.get(index);
        Ok((
            index,
            endpoint.ok_or_else(|| Error::invalid("etcd endpoints", "none given"))?,
        ))
    }

    /// Moves on to the next endpoint, unless somebody else already did.
    fn leave(&self, index: usize) {
        let next = (index + 1) % self.endpoints.len().max(1);
        let moved =
            self.preferred
                .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
        if moved.is_ok() && next != index {
            let (from, to) = (&self.endpoints[index].url, &self.endpoints[next].url);
            tracing::debug!(from, to, "etcd endpoint left");
        }
    }

    async fn client(&self, operation: &'static str, endpoint: &Member) -> Result<Client, Error> {
        let connect = || async {
            let options = Some(self.config.connect_options());
            match self.config.secured(&endpoint.url)? {
                Some(channel) => Client::from_channel(Channel::Tonic(channel), options).await,
                None => Client::connect([&endpoint.url], options).await,
            }
        };
        let client = endpoint.client.get_or_try_init(connect).await;
        client.cloned().map_err(|e| error_of(operation, &e))
    }

    /// Warns of an etcd with known holes, once per endpoint that has answered. One that does not say which version it is, or not
    /// to our user, is not asked again.
    async fn look_at_version(&self, endpoint: &Member) {
        let Some(client) = endpoint.client.get() else {
            return;
        };
        if endpoint.has_been_asked.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut client = client.clone();
        let Ok(Ok(status)) = timeout(self.config.attempt_timeout, client.status()).await else {
            return;
        };
        let version = status.version();
        if version::is_unsafe(version) {
            let (endpoint, expected) = (&endpoint.url, version::SAFE);
            tracing::warn!(endpoint, version, expected, "etcd has known holes");
        }
    }

    fn absolute(&self, key: &str) -> String {
        format!("{}{key}", self.root)
    }

    /// The entry relative to the root; `None` for a key that is not one of ours.
    fn entry(&self, kv: &KeyValue) -> Option<Entry> {
        let key = self.relative(kv.key())?;
        Some(Entry {
            key,
            value: Bytes::copy_from_slice(kv.value()),
            revision: Revision(kv.mod_revision()),
        })
    }

    fn relative(&self, key: &[u8]) -> Option<String> {
        let key = std::str::from_utf8(key).ok()?.strip_prefix(&self.root)?;
        check_key(key).is_ok().then(|| key.to_owned())
    }
}

impl EtcdStore {
    /// A store on the given endpoints. Connects when first used: etcd may come up later.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a configuration that cannot work.
    pub fn new(config: EtcdConfig) -> Result<Self, Error> {
        config.validate()?;
        let endpoints = config.endpoints.iter().map(|url| Member {
            url: url.clone(),
            client: OnceCell::new(),
            has_been_asked: AtomicBool::new(false),
        });
        let shared = Shared {
            root: format!("/tramontane/{}/", config.cluster),
            endpoints: endpoints.collect(),
            preferred: AtomicUsize::new(0),
            config,
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Tries `attempt(client, whether it was tried before)` until it works, fails for good or the
    /// deadline of the call is near.
    async fn call<T, F, Fut>(&self, operation: &'static str, attempt: F) -> Result<T, Error>
    where
        F: Fn(Client, bool) -> Fut + Send + Sync,
        Fut: Future<Output = Result<T, etcd_client::Error>> + Send,
        T: Send,
    {
        let config = &self.shared.config;
        let ends = Instant::now() + config.call_deadline;
        let mut backoff = Backoff::new(RETRY_PAUSE_MIN, RETRY_PAUSE_MAX);
        let mut again = false;
        loop {
            let (index, endpoint) = self.shared.endpoint()?;
            let one = async {
                let client = self.shared.client(operation, endpoint).await?;
                let answer = attempt(client, again).await;
                answer.map_err(|e| error_of(operation, &e))
            };
            let left = ends.saturating_duration_since(Instant::now());
            let limit = left.min(config.attempt_timeout);
            let error = match timeout(limit, one).await {
                Ok(Ok(answer)) => {
                    self.shared.look_at_version(endpoint).await;
                    return Ok(answer);
                }
                Ok(Err(error)) if !error.is_retryable() => return Err(error),
                Ok(Err(error)) => error,
                Err(_elapsed) => Error::Timeout {
                    operation,
                    after: limit,
                },
            };
            tracing::debug!(operation, url = endpoint.url, %error, "etcd attempt did not work");
            self.shared.leave(index);
            let pause = backoff.pause();
            if Instant::now() + pause >= ends {
                return Err(error);
            }
            sleep(pause).await;
            again = true;
        }
    }

    async fn page(
        &self,
        prefix: &str,
        after: Option<Vec<u8>>,
        at: i64,
    ) -> Result<GetResponse, Error> {
        self.call("list", |client, _again| {
            let from = after.clone().unwrap_or_else(|| prefix.as_bytes().to_vec());
            let options = GetOptions::new()
                .with_range(prefix_end(prefix.as_bytes()))
                .with_limit(LIST_PAGE_ENTRIES)
                .with_revision(at);
            async move {
                let mut kv = client
                    .kv_client()
                    .max_decoding_message_size(ANSWER_BYTES_MAX);
                kv.get(from, Some(options)).await
            }
        })
        .await
    }
}

/// First key behind every key that begins with `prefix`, which ends in a plain ASCII character.
fn prefix_end(prefix: &[u8]) -> Vec<u8> {
    let mut end = prefix.to_vec();
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end
}

#[async_trait]
impl Store for EtcdStore {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        check_key(key)?;
        let key = self.shared.absolute(key);
        let answer = self
            .call("get", |mut client, _again| {
                let key = key.clone();
                async move { client.get(key, None).await }
            })
            .await?;
        Ok(answer.kvs().first().and_then(|kv| self.shared.entry(kv)))
    }

    async fn list(&self, prefix: &str) -> Result<Listing, Error> {
        check_prefix(prefix)?;
        let absolute = self.shared.absolute(prefix);
        let mut entries = Vec::new();
        let (mut after, mut at) = (None, 0);
        loop {
            let answer = self.page(&absolute, after.take(), at).await?;
            if at == 0 {
                at = answer.header().map_or(0, |header| header.revision());
            }
            entries.extend(answer.kvs().iter().filter_map(|kv| self.shared.entry(kv)));
            check_list(prefix, &entries)?;
            let last = answer.kvs().last().filter(|_| answer.more());
            let Some(last) = last else {
                let revision = Revision(at);
                return Ok(Listing { entries, revision });
            };
            let mut next = last.key().to_vec();
            next.push(0);
            after = Some(next);
        }
    }

    async fn put(
        &self,
        key: &str,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<Revision, Error> {
        check_key(key)?;
        check_value(key, &value)?;
        let key = self.shared.absolute(key);
        let answer = self
            .call("put", |mut client, _again| {
                let (key, value) = (key.clone(), value.to_vec());
                async move { client.put(key, value, put_options(lease)).await }
            })
            .await
            .map_err(|e| name_lease(e, lease))?;
        Ok(Revision(answer.header().map_or(0, |h| h.revision())))
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
        let key = self.shared.absolute(key);
        let (answer, again) = self
            .call("compare and swap", |mut client, again| {
                let put = TxnOp::put(key.clone(), value.to_vec(), put_options(lease));
                let txn = Txn::new()
                    .when([unchanged(&key, expected)])
                    .and_then([put])
                    .or_else([TxnOp::get(key.clone(), None)]);
                async move { Ok((client.txn(txn).await?, again)) }
            })
            .await
            .map_err(|e| name_lease(e, lease))?;
        if answer.succeeded() {
            let revision = answer.header().map_or(0, |h| h.revision());
            return Ok(CasOutcome::Swapped(Revision(revision)));
        }
        let found = answer.op_responses().into_iter().find_map(|op| match op {
            TxnOpResponse::Get(get) => get.kvs().first().and_then(|kv| self.shared.entry(kv)),
            _ => None,
        });
        // An earlier attempt without an answer may have written: our own value is no conflict.
        match found {
            Some(entry) if again && entry.value == value && Some(entry.revision) != expected => {
                Ok(CasOutcome::Swapped(entry.revision))
            }
            found => Ok(CasOutcome::Conflict(found)),
        }
    }

    async fn delete(&self, key: &str) -> Result<bool, Error> {
        check_key(key)?;
        let key = self.shared.absolute(key);
        let (answer, again) = self
            .call("delete", |mut client, again| {
                let key = key.clone();
                async move { Ok((client.delete(key, None).await?, again)) }
            })
            .await?;
        Ok(answer.deleted() > 0 || again)
    }

    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error> {
        check_key(key)?;
        let key = self.shared.absolute(key);
        let answer = self
            .call("delete if", |mut client, _again| {
                let txn = Txn::new()
                    .when([unchanged(&key, Some(revision))])
                    .and_then([TxnOp::delete(key.clone(), None)]);
                async move { client.txn(txn).await }
            })
            .await?;
        Ok(answer.succeeded())
    }

    fn watch(&self, prefix: &str, from: Revision) -> Watch {
        watch::watch(Arc::clone(&self.shared), prefix, from)
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let seconds = ttl.max(LEASE_TTL_MIN).as_millis().div_ceil(1000) as i64;
        let answer = self
            .call("grant lease", |mut client, _again| async move {
                client.lease_grant(seconds, None).await
            })
            .await?;
        Ok(LeaseId(answer.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error> {
        let kept = self.call("keep alive", |mut client, _again| async move {
            match client.lease_keep_alive(lease.0).await {
                Ok(_stream) => Ok(true),
                // The crate's only answer of this kind to a first message: the time left is zero.
                Err(etcd_client::Error::LeaseKeepAliveError(text)) if text == "lease not found" => {
                    Ok(false)
                }
                Err(error) => Err(error),
            }
        });
        kept.await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        let revoked = self.call("revoke lease", |mut client, _again| async move {
            client.lease_revoke(lease.0).await
        });
        match revoked.await {
            Ok(_) | Err(Error::LeaseNotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn unchanged(key: &str, expected: Option<Revision>) -> Compare {
    match expected {
        None => Compare::create_revision(key, CompareOp::Equal, 0),
        Some(revision) => Compare::mod_revision(key, CompareOp::Equal, revision.0),
    }
}

fn put_options(lease: Option<LeaseId>) -> Option<PutOptions> {
    lease.map(|lease| PutOptions::new().with_lease(lease.0))
}

fn name_lease(error: Error, lease: Option<LeaseId>) -> Error {
    match (error, lease) {
        (Error::LeaseNotFound { .. }, Some(lease)) => Error::LeaseNotFound { lease },
        (error, _) => error,
    }
}
