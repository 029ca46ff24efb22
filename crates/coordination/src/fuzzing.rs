//! What reads values of the store that another version, or nobody of ours, wrote, for fuzzing. Nothing here may panic,
//! whatever comes.

use bytes::Bytes;

use crate::planner::read_intent;
use crate::version::PlacementKey;
use crate::{Entry, Revision, WorkerRecord, placement_store};

/// One value under every key that we read.
pub fn values(bytes: &[u8]) {
    let entry = |key: &str| Entry {
        key: key.to_owned(),
        value: Bytes::copy_from_slice(bytes),
        revision: Revision(1),
    };
    if let Ok(record) = WorkerRecord::decode(&entry("workers/w")) {
        assert_eq!(record.id.as_str(), "w");
    }
    let _ = placement_store::decode(&entry("placements/m/c"));
    let _ = placement_store::decode_serving(&entry("serving"));
    let _ = read_intent(Some(entry("intent")));
    if let Ok(key) = std::str::from_utf8(bytes) {
        let _ = PlacementKey::parse(key);
    }
}
