//! Keys of the store whose values cannot be read and are left out. Remembers no more of them than a listing may have.

use std::collections::BTreeSet;

use crate::store::LIST_ENTRIES_MAX;

/// The keys that a view leaves out.
#[derive(Debug, Default)]
pub(crate) struct Skipped(BTreeSet<String>);

impl Skipped {
    pub(crate) fn insert(&mut self, key: &str) {
        if self.0.len() < LIST_ENTRIES_MAX {
            self.0.insert(key.to_owned());
        }
    }

    pub(crate) fn remove(&mut self, key: &str) {
        self.0.remove(key);
    }

    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}
