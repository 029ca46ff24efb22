//! The store of the cluster's few shared facts: keys, leases, watches. Never holds weights or big tables.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;

use crate::Error;

/// Longest key, relative to the root of the cluster.
pub const KEY_BYTES_MAX: usize = 256;
/// Largest value; etcd itself refuses requests above 1.5 MiB.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Most entries of one listing: far above any cluster, so that junk below a prefix cannot eat memory.
pub const LIST_ENTRIES_MAX: usize = 16_384;
/// Most bytes of their values together: placements of all groups and then some.
pub const LIST_BYTES_MAX: usize = 256 << 20;
/// Shortest lease; etcd raises shorter ones to this by itself.
pub const LEASE_TTL_MIN: Duration = Duration::from_secs(2);

/// Names of the keys that the cluster shares, relative to the root.
pub mod keys {
    /// Prefix of the worker records; the id follows.
    pub const WORKERS: &str = "workers/";
    /// Prefix of everything about placements: who watches it sees a version take requests only after it has
    /// seen that version's placement. The group follows, then a slash and [`PUBLISHED`] or [`PENDING`].
    pub const PLACEMENTS: &str = "placement/";
    /// Last part of the key of the placement that a group serves on.
    pub const PUBLISHED: &str = "published";
    /// Last part of the key of the placement that a group's workers are loading.
    pub const PENDING: &str = "pending";
    /// The version that takes new requests; no group's name, which has only digits.
    pub const SERVING: &str = "placement/serving";
    /// What the operator wants.
    pub const INTENT: &str = "intent";
    /// Who plans.
    pub const PLANNER: &str = "planner";
}

/// Version of the whole store; grows with every change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(pub i64);

impl Revision {
    /// The revision that follows this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A promise to be alive; keys bound to it go when it expires.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A key with its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Relative to the root of the cluster.
    pub key: String,
    /// The value.
    pub value: Bytes,
    /// When the key was last written.
    pub revision: Revision,
}

/// Everything below a prefix at one revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Ascending by key.
    pub entries: Vec<Entry>,
    /// The revision they were read at: watch from the next one.
    pub revision: Revision,
}

/// How a compare-and-swap ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CasOutcome {
    /// Written, at this revision.
    Swapped(Revision),
    /// Not written; what the key holds instead.
    Conflict(Option<Entry>),
}

/// One change below a watched prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WatchEvent {
    /// The key was written.
    Put(Entry),
    /// The key was deleted, or its lease ended.
    Delete {
        /// Relative to the root of the cluster.
        key: String,
        /// When.
        revision: Revision,
    },
}

impl WatchEvent {
    /// When the change happened.
    #[must_use]
    pub const fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.revision,
            Self::Delete { revision, .. } => *revision,
        }
    }

    /// The key that changed.
    #[must_use]
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Delete { key, .. } => key,
        }
    }
}

/// Changes in order of revision. After an error the stream has ended and the caller must list again:
/// [`Error::Compacted`] at once, anything else after a pause. [`Error::Replaced`] says that keys may be
/// missing because the store has lost them, not because somebody deleted them.
pub type Watch = Pin<Box<dyn Stream<Item = Result<WatchEvent, Error>> + Send>>;

/// Shared facts of one cluster. Keys are relative: the implementation puts the cluster's root in front.
///
/// Every call ends within the deadline of the implementation. [`Error::is_retryable`] errors leave
/// open whether a write happened.
#[async_trait]
pub trait Store: Send + Sync + fmt::Debug {
    /// The entry of one key.
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error>;

    /// Every entry whose key begins with `prefix`, at one revision.
    async fn list(&self, prefix: &str) -> Result<Listing, Error>;

    /// What was known below `prefix` before this process started, for when the store is away; `None` when
    /// nothing was.
    fn remembered(&self, _prefix: &str) -> Option<Vec<Entry>> {
        None
    }

    /// Writes without looking. Bound to `lease` when given, otherwise kept for ever.
    async fn put(&self, key: &str, value: Bytes, lease: Option<LeaseId>)
    -> Result<Revision, Error>;

    /// Writes if the key was last written at `expected`; `None` means if it does not exist.
    async fn compare_and_swap(
        &self,
        key: &str,
        expected: Option<Revision>,
        value: Bytes,
        lease: Option<LeaseId>,
    ) -> Result<CasOutcome, Error>;

    /// Deletes; false when there was nothing.
    async fn delete(&self, key: &str) -> Result<bool, Error>;

    /// Deletes if the key was last written at `revision`.
    async fn delete_if(&self, key: &str, revision: Revision) -> Result<bool, Error>;

    /// Changes below `prefix` with a revision of `from` or later.
    fn watch(&self, prefix: &str, from: Revision) -> Watch;

    /// A new lease that ends `ttl` from now unless it is kept alive.
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId, Error>;

    /// Starts the time of the lease anew; false when it has already ended.
    async fn keep_alive(&self, lease: LeaseId) -> Result<bool, Error>;

    /// Ends the lease and deletes its keys; fine when it has already ended.
    async fn revoke(&self, lease: LeaseId) -> Result<(), Error>;
}

/// Checks a relative key: not empty, short, and of letters, digits and `._/-` only.
///
/// # Errors
/// [`Error::Invalid`] with the key and the rule.
pub fn check_key(key: &str) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::invalid("key", "is empty"));
    }
    check_prefix(key)
}

/// Checks a prefix: as a key, but may be empty.
///
/// # Errors
/// [`Error::Invalid`] with the prefix and the rule.
pub fn check_prefix(prefix: &str) -> Result<(), Error> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._/-".contains(&b);
    if prefix.len() > KEY_BYTES_MAX {
        return Err(Error::TooLarge {
            what: "key".to_owned(),
            size: prefix.len(),
            max: KEY_BYTES_MAX,
        });
    }
    if prefix.starts_with('/') || !prefix.bytes().all(plain) {
        let rule = "letters, digits and ._/- only, and no leading slash";
        return Err(Error::invalid(format!("key {prefix:?}"), rule));
    }
    Ok(())
}

/// Checks the size of a value.
///
/// # Errors
/// [`Error::TooLarge`] above [`VALUE_BYTES_MAX`].
pub fn check_value(key: &str, value: &Bytes) -> Result<(), Error> {
    if value.len() > VALUE_BYTES_MAX {
        return Err(Error::TooLarge {
            what: format!("value of key {key}"),
            size: value.len(),
            max: VALUE_BYTES_MAX,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_plain_and_bounded() {
        for good in ["placement", "workers/w-1", "a.b_c/D"] {
            check_key(good).unwrap();
        }
        for bad in ["", "/a", "a b", "a\0", "ä", "a\n"] {
            assert!(check_key(bad).is_err(), "{bad:?}");
        }
        check_prefix("").unwrap();
        assert!(matches!(
            check_key(&"k".repeat(KEY_BYTES_MAX + 1)),
            Err(Error::TooLarge { .. })
        ));
    }
}
