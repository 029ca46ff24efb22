//! Compiled grammars, and refusals, by their constraint: the least recently used go first when bytes or entries are full.
//! Never compiles.

use std::collections::HashMap;
use std::sync::Arc;

use tramontane_types::Constraint;

use crate::limits::{CACHE_BYTES_MAX, CACHE_ENTRIES_MAX};
use crate::{Grammar, GrammarError};

/// What an entry takes beside its grammar and the text of its constraint.
const ENTRY_BYTES: usize = 1024;

/// What became of a constraint.
pub(crate) type Compiled = Result<Arc<Grammar>, GrammarError>;

#[derive(Debug, Default)]
pub(crate) struct Cache {
    entries: HashMap<Arc<Constraint>, Entry>,
    num_bytes: usize,
    /// Counts every use.
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    compiled: Compiled,
    num_bytes: usize,
    used: u64,
}

impl Cache {
    pub(crate) fn get(&mut self, constraint: &Arc<Constraint>) -> Option<Compiled> {
        let entry = self.entries.get_mut(constraint)?;
        self.clock += 1;
        entry.used = self.clock;
        Some(entry.compiled.clone())
    }

    pub(crate) fn insert(&mut self, constraint: &Arc<Constraint>, compiled: Compiled) {
        let grammar_bytes = compiled
            .as_ref()
            .map_or(0, |grammar: &Arc<Grammar>| grammar.num_bytes());
        let num_bytes = grammar_bytes + constraint.source().len() + ENTRY_BYTES;
        if num_bytes > CACHE_BYTES_MAX {
            return;
        }
        self.remove(&Arc::clone(constraint));
        while self.num_bytes + num_bytes > CACHE_BYTES_MAX
            || self.entries.len() >= CACHE_ENTRIES_MAX
        {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(oldest) = oldest.map(|(constraint, _)| Arc::clone(constraint)) else {
                break;
            };
            self.remove(&oldest);
        }
        self.clock += 1;
        self.num_bytes += num_bytes;
        let entry = Entry {
            compiled,
            num_bytes,
            used: self.clock,
        };
        self.entries.insert(Arc::clone(constraint), entry);
    }

    pub(crate) const fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn remove(&mut self, constraint: &Arc<Constraint>) {
        if let Some(entry) = self.entries.remove(constraint) {
            self.num_bytes -= entry.num_bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regex(text: &str) -> Arc<Constraint> {
        Arc::new(Constraint::Regex(text.into()))
    }

    fn refused() -> Compiled {
        Err(GrammarError::Empty)
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = Cache::default();
        for i in 0..CACHE_ENTRIES_MAX {
            cache.insert(&regex(&i.to_string()), refused());
        }
        assert!(cache.get(&regex("0")).is_some());
        cache.insert(&regex("new"), refused());
        assert!(cache.get(&regex("1")).is_none());
        assert!(cache.get(&regex("0")).is_some());
        assert_eq!(cache.entries.len(), CACHE_ENTRIES_MAX);
        let sum: usize = cache.entries.values().map(|entry| entry.num_bytes).sum();
        assert_eq!(cache.num_bytes(), sum);
    }

    #[test]
    fn bytes_are_bounded_whatever_comes() {
        let mut cache = Cache::default();
        for i in 0..400 {
            let long = format!("{i}{}", "x".repeat(CACHE_BYTES_MAX / 100));
            cache.insert(&regex(&long), refused());
            assert!(cache.num_bytes() <= CACHE_BYTES_MAX);
        }
        assert!(cache.entries.len() > 90);
        cache.insert(&regex(&"x".repeat(CACHE_BYTES_MAX)), refused());
        assert!(cache.entries.len() > 90, "what never fits evicts nobody");
    }
}
