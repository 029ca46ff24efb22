//! Which weights, and computed how: what divides the workers of a cluster into groups that can hold one
//! placement together. Never trusts a text: what stands in keys of the store is a digest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tramontane_types::Placement;

use crate::Error;
use crate::registry::{RECORD_TEXT_BYTES_MAX, WorkerRecord};
use crate::store::keys;

/// Hexadecimal digits of a written key.
const KEY_DIGITS: usize = 16;

/// One version of a model's weights in one numeric class: equal versions give equal bits. The workers of
/// one version are a group.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// Fingerprint of the checkpoint.
    pub model: Arc<str>,
    /// Decides the bits of results, such as `cpu-q8`.
    pub numeric_class: Arc<str>,
}

impl Version {
    /// What a worker computes with.
    #[must_use]
    pub fn of(worker: &WorkerRecord) -> Self {
        Self {
            model: Arc::from(worker.model.fingerprint.as_str()),
            numeric_class: Arc::from(worker.numeric_class.as_str()),
        }
    }

    /// What a placement is for.
    #[must_use]
    pub fn of_placement(placement: &Placement) -> Self {
        Self {
            model: Arc::from(placement.model.as_str()),
            numeric_class: Arc::from(placement.numeric_class.as_str()),
        }
    }

    /// Whether a worker is of this group.
    #[must_use]
    pub fn has(&self, worker: &WorkerRecord) -> bool {
        *self.model == *worker.model.fingerprint && *self.numeric_class == *worker.numeric_class
    }

    /// The group's name in the store.
    #[must_use]
    pub fn key(&self) -> GroupKey {
        let mut digest = Sha256::new();
        digest.update(Sha256::digest(self.model.as_bytes()));
        digest.update(self.numeric_class.as_bytes());
        let digest: [u8; 32] = digest.finalize().into();
        let (head, _) = digest.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        GroupKey(u64::from_be_bytes(*head))
    }

    /// Checks that both texts are there and short.
    ///
    /// # Errors
    /// [`Error::Invalid`] with `what` and the rule.
    pub fn validate(&self, what: &str) -> Result<(), Error> {
        for (name, text) in [
            ("fingerprint", &self.model),
            ("numeric class", &self.numeric_class),
        ] {
            if text.is_empty() || text.len() > RECORD_TEXT_BYTES_MAX {
                let got = text.len();
                let rule = format!("{name} of {got} bytes, expected 1 to {RECORD_TEXT_BYTES_MAX}");
                return Err(Error::invalid(what, rule));
            }
        }
        Ok(())
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.model, self.numeric_class)
    }
}

/// A group's name in the store: a digest of its version, 16 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupKey(u64);

impl GroupKey {
    /// Prefix of all keys of the group.
    #[must_use]
    pub fn prefix(self) -> String {
        format!("{}{self}/", keys::PLACEMENTS)
    }

    /// Key of the placement that the group serves on.
    #[must_use]
    pub fn published(self) -> String {
        self.prefix() + keys::PUBLISHED
    }

    /// Key of the placement that the group's workers are loading.
    #[must_use]
    pub fn pending(self) -> String {
        self.prefix() + keys::PENDING
    }
}

impl fmt::Display for GroupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0KEY_DIGITS$x}", self.0)
    }
}

impl FromStr for GroupKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = u64::from_str_radix(text, 16).ok();
        let number = number.filter(|_| is_hex && text.len() == KEY_DIGITS);
        number.map(Self).ok_or_else(|| {
            let rule = format!("{KEY_DIGITS} hexadecimal digits expected");
            Error::invalid(format!("group {text:?}"), rule)
        })
    }
}

/// What a key below [`keys::PLACEMENTS`] is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PlacementKey {
    /// The placement that a group serves on.
    Published(GroupKey),
    /// The placement that a group's workers are loading.
    Pending(GroupKey),
    /// The version that takes new requests.
    Serving,
}

impl PlacementKey {
    /// `None` for a key that is not ours.
    #[must_use]
    pub fn parse(key: &str) -> Option<Self> {
        if key == keys::SERVING {
            return Some(Self::Serving);
        }
        let (group, name) = key.strip_prefix(keys::PLACEMENTS)?.split_once('/')?;
        let group = group.parse().ok()?;
        match name {
            keys::PUBLISHED => Some(Self::Published(group)),
            keys::PENDING => Some(Self::Pending(group)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::check_key;

    fn version(model: &str, class: &str) -> Version {
        Version {
            model: Arc::from(model),
            numeric_class: Arc::from(class),
        }
    }

    #[test]
    fn whatever_a_version_is_called_its_keys_are_plain_and_its_own() {
        let names = [
            ("f1", "cpu-q8"),
            ("f1c", "pu-q8"),
            ("", "f1cpu-q8"),
            ("../../planner", "\0\n"),
            ("serving", "published"),
        ];
        let keys: std::collections::BTreeSet<GroupKey> =
            names.iter().map(|(m, c)| version(m, c).key()).collect();
        assert_eq!(keys.len(), names.len());
        for key in keys {
            check_key(&key.published()).unwrap();
            let parsed = PlacementKey::parse(&key.published());
            assert_eq!(parsed, Some(PlacementKey::Published(key)));
            let parsed = PlacementKey::parse(&key.pending());
            assert_eq!(parsed, Some(PlacementKey::Pending(key)));
        }
    }

    #[test]
    fn keys_that_are_not_ours_are_nothing() {
        let good = version("f", "c").key().published();
        for key in [
            "placement",
            "placement-pending",
            "placement/",
            "placement/published",
            "placement/serving/published",
            &good.to_uppercase(),
            &good[..good.len() - 1],
            &format!("{good}/x"),
            &good.replace("placement/", "placement/+"),
        ] {
            assert_eq!(PlacementKey::parse(key), None, "{key}");
        }
        let serving = PlacementKey::parse("placement/serving");
        assert_eq!(serving, Some(PlacementKey::Serving));
    }
}
