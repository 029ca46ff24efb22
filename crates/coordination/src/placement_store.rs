//! The keys of placements: two of each group, and which version takes new requests. Published only by
//! compare-and-swap, and epochs only grow.

use std::sync::Arc;

use bytes::Bytes;
use tramontane_types::Placement;

use crate::Error;
use crate::registry::MODEL_DIMENSION_MAX;
use crate::store::{CasOutcome, Entry, Revision, Store, VALUE_BYTES_MAX, keys};
use crate::version::{GroupKey, PlacementKey, Version};

/// A placement as it is in the store now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The placement.
    pub placement: Arc<Placement>,
    /// Where to swap it from.
    pub revision: Revision,
}

/// Reads and writes the two placement keys of a group, for the planner.
#[derive(Clone, Debug)]
pub struct PlacementStore {
    store: Arc<dyn Store>,
    group: GroupKey,
}

impl PlacementStore {
    /// Over the given store.
    #[must_use]
    pub const fn new(store: Arc<dyn Store>, group: GroupKey) -> Self {
        Self { store, group }
    }

    /// Whose keys.
    #[must_use]
    pub const fn group(&self) -> GroupKey {
        self.group
    }

    /// The published placement.
    ///
    /// # Errors
    /// The store's, or [`Error::Invalid`] for a value that is no placement.
    pub async fn published(&self) -> Result<Option<Stored>, Error> {
        self.read(&self.group.published()).await
    }

    /// The pending placement.
    ///
    /// # Errors
    /// The store's, or [`Error::Invalid`] for a value that is no placement.
    pub async fn pending(&self) -> Result<Option<Stored>, Error> {
        self.read(&self.group.pending()).await
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
        self.write(self.group.pending(), placement, replaces).await
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
            return Err(Error::invalid(self.group.published(), detail));
        }
        let replaces = replaces.map(|old| old.revision);
        self.write(self.group.published(), placement, replaces)
            .await
    }

    /// Removes the pending placement that was read at `revision`; false when it has changed since.
    ///
    /// # Errors
    /// The store's.
    pub async fn drop_pending(&self, revision: Revision) -> Result<bool, Error> {
        self.store.delete_if(&self.group.pending(), revision).await
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
        key: String,
        placement: &Placement,
        expected: Option<Revision>,
    ) -> Result<Revision, Error> {
        check(&key, placement)?;
        let text = serde_json::to_vec(placement);
        let text = text.map_err(|e| Error::invalid(key.as_str(), e.to_string()))?;
        swap(&*self.store, key, expected, Bytes::from(text)).await
    }
}

/// Says which version takes new requests, in place of what was read at `replaces`.
///
/// # Errors
/// [`Error::Conflict`] when somebody else wrote since.
pub async fn set_serving(
    store: &dyn Store,
    version: &Version,
    replaces: Option<Revision>,
) -> Result<Revision, Error> {
    version.validate(keys::SERVING)?;
    let text = serde_json::to_vec(version);
    let text = text.map_err(|e| Error::invalid(keys::SERVING, e.to_string()))?;
    swap(store, keys::SERVING.to_owned(), replaces, text.into()).await
}

async fn swap(
    store: &dyn Store,
    key: String,
    expected: Option<Revision>,
    value: Bytes,
) -> Result<Revision, Error> {
    let outcome = store.compare_and_swap(&key, expected, value, None).await?;
    match outcome {
        CasOutcome::Swapped(revision) => Ok(revision),
        CasOutcome::Conflict(_) => Err(Error::Conflict { key, expected }),
    }
}

/// The version that takes new requests.
pub(crate) fn decode_serving(entry: &Entry) -> Result<Version, Error> {
    let version: Version = read_json(entry)?;
    version.validate(&entry.key)?;
    Ok(version)
}

/// The placement of one of our keys.
pub(crate) fn decode(entry: &Entry) -> Result<Placement, Error> {
    let placement: Placement = read_json(entry)?;
    check(&entry.key, &placement)?;
    Ok(placement)
}

fn read_json<T: serde::de::DeserializeOwned>(entry: &Entry) -> Result<T, Error> {
    let size = entry.value.len();
    if size > VALUE_BYTES_MAX {
        let (what, max) = (entry.key.clone(), VALUE_BYTES_MAX);
        return Err(Error::TooLarge { what, size, max });
    }
    serde_json::from_slice(&entry.value)
        .map_err(|e| Error::invalid(entry.key.clone(), e.to_string()))
}

/// Everything that a reader may rely on.
fn check(key: &str, placement: &Placement) -> Result<(), Error> {
    let group = match PlacementKey::parse(key) {
        Some(PlacementKey::Published(group) | PlacementKey::Pending(group)) => Some(group),
        Some(PlacementKey::Serving) | None => None,
    };
    let version = Version::of_placement(placement);
    if group != Some(version.key()) {
        return Err(Error::invalid(key, format!("placement of {version}")));
    }
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
    use tramontane_types::{Epoch, SegmentRange, SliceHolders, WorkerId};

    use super::*;

    pub(crate) fn placement(epoch: u64) -> Placement {
        placement_of("f1", epoch)
    }

    pub(crate) fn placement_of(model: &str, epoch: u64) -> Placement {
        let whole = SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0],
        };
        Placement {
            epoch: Epoch(epoch),
            numeric_class: "cpu-q8".to_owned(),
            model: model.to_owned(),
            num_layers: 2,
            num_experts: 4,
            workers: vec![WorkerId::new("a")],
            experts: vec![vec![whole]; 8],
        }
    }

    #[test]
    fn hostile_placements_are_refused() {
        let key = Version::of_placement(&placement(1)).key();
        let entry = |edit: fn(&mut serde_json::Value)| {
            let mut value = serde_json::to_value(placement(1)).unwrap();
            edit(&mut value);
            Entry {
                key: key.published(),
                value: Bytes::from(value.to_string()),
                revision: Revision(1),
            }
        };
        decode(&entry(|_| {})).unwrap();
        let edits: [fn(&mut serde_json::Value); 7] = [
            |v| v["num_layers"] = (u64::MAX / 2).into(),
            |v| v["num_experts"] = 0.into(),
            |v| v["experts"][0] = serde_json::json!([]),
            |v| v["experts"][0][0]["holders"] = serde_json::json!([0, 0]),
            |v| v["experts"][0][0]["range"] = serde_json::json!([4, 2]),
            |v| v["model"] = "f2".into(),
            |v| v["numeric_class"] = "cpu-q4".into(),
        ];
        for edit in edits {
            let stored = entry(edit);
            assert!(decode(&stored).is_err(), "{:?}", stored.value);
        }
    }

    #[test]
    fn hostile_versions_are_refused() {
        let entry = |value: &str| Entry {
            key: keys::SERVING.to_owned(),
            value: Bytes::copy_from_slice(value.as_bytes()),
            revision: Revision(1),
        };
        let good = r#"{"model":"f","numeric_class":"c"}"#;
        decode_serving(&entry(good)).unwrap();
        let long = format!(r#"{{"model":"{}","numeric_class":"c"}}"#, "f".repeat(600));
        for bad in [
            "",
            "null",
            r#"{"model":"f"}"#,
            r#"{"model":"","numeric_class":"c"}"#,
            &long,
        ] {
            assert!(decode_serving(&entry(bad)).is_err(), "{bad}");
        }
    }
}
