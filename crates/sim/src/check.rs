//! The history checker: what must never happen, what has happened, and a hash of all of it.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::time::Instant;
use tramontane_coordination::GroupKey;
use tramontane_coordination::version::PlacementKey;
use tramontane_types::{Epoch, Placement};

use crate::net::Life;
use crate::rng::mix;

/// Violations that are kept: what follows the first is mostly its consequence.
const VIOLATIONS_MAX: usize = 16;

/// What one run counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests that routers took.
    pub requests: u64,
    /// Of those, how many ended with their whole answer.
    pub finished: u64,
    /// Of those, how many ended with a typed error.
    pub failed: u64,
    /// Of those, how many the client gave up, or lost with its router.
    pub abandoned: u64,
    /// Tokens that clients received.
    pub tokens: u64,
    /// Sequences that were opened again from the journal.
    pub replays: u64,
    /// Placements that were published.
    pub publishes: u64,
    /// Expert calls that another worker answered.
    pub calls: u64,
    /// Expert calls that were refused as stale.
    pub stale: u64,
    /// Slices that were dropped.
    pub drops: u64,
    /// Faults that were injected.
    pub faults: u64,
    /// Requests that the second version of the weights has answered.
    pub updated: u64,
}

/// The checker of one run; clones share it.
#[derive(Clone, Debug)]
pub struct Check(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    begin: Instant,
    hash: u64,
    trace: Option<Vec<String>>,
    violations: Vec<String>,
    counts: Counts,
    published: BTreeMap<GroupKey, Epoch>,
    published_at: Instant,
    /// The newest epoch that each life served on.
    served: BTreeMap<Life, Epoch>,
}

impl Check {
    /// A new history, kept as text when `traced`.
    #[must_use]
    pub fn new(traced: bool) -> Self {
        let now = Instant::now();
        Self(Arc::new(Mutex::new(State {
            begin: now,
            hash: 0,
            trace: traced.then(Vec::new),
            violations: Vec::new(),
            counts: Counts::default(),
            published: BTreeMap::new(),
            published_at: now,
            served: BTreeMap::new(),
        })))
    }

    /// Something happened.
    pub fn note(&self, what: fmt::Arguments<'_>) {
        self.0.lock().note(what);
    }

    /// Something happened that is not worth a line: a number that the hash depends on.
    pub fn mix(&self, number: u64) {
        let mut state = self.0.lock();
        state.hash = mix(state.hash ^ number);
    }

    /// Something happened that must never happen.
    pub fn violated(&self, what: fmt::Arguments<'_>) {
        let mut state = self.0.lock();
        state.note(format_args!("VIOLATION {what}"));
        if state.violations.len() < VIOLATIONS_MAX {
            let at = state.begin.elapsed().as_millis();
            state.violations.push(format!("at {at} ms: {what}"));
        }
    }

    /// Counts.
    pub fn count(&self, add: impl FnOnce(&mut Counts)) {
        add(&mut self.0.lock().counts);
    }

    /// What was counted.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.0.lock().counts
    }

    /// The store has lost its data: whoever writes first may not know what was published before.
    pub fn wiped(&self) {
        self.0.lock().published.clear();
    }

    /// A value was written. Epochs of the published placements of a group only grow.
    pub fn written(&self, by: Life, key: &str, value: &Bytes) {
        match PlacementKey::parse(key) {
            Some(PlacementKey::Published(group)) => self.published(by, group, value),
            Some(PlacementKey::Serving) => {
                let version = String::from_utf8_lossy(value);
                self.note(format_args!("{} lets {version} serve", by.node));
                self.0.lock().published_at = Instant::now();
            }
            Some(PlacementKey::Pending(_)) | None => {}
        }
    }

    fn published(&self, by: Life, group: GroupKey, value: &Bytes) {
        let Ok(placement) = serde_json::from_slice::<Placement>(value) else {
            self.violated(format_args!("{} published what is no placement", by.node));
            return;
        };
        let before = self.0.lock().published.get(&group).copied();
        let (epoch, before) = (placement.epoch, before.unwrap_or(Epoch(0)));
        let workers: Vec<&str> = placement.workers.iter().map(|w| w.as_str()).collect();
        self.note(format_args!(
            "{} publishes epoch {epoch} of {} on {workers:?}",
            by.node, placement.model
        ));
        if epoch <= before {
            self.violated(format_args!(
                "{} published epoch {epoch} after {before}",
                by.node
            ));
        }
        let mut state = self.0.lock();
        state.counts.publishes += 1;
        state.published.insert(group, before.max(epoch));
        state.published_at = Instant::now();
    }

    /// How long nothing has been published.
    #[must_use]
    pub fn quiet_for(&self) -> Duration {
        self.0.lock().published_at.elapsed()
    }

    /// A worker serves on a placement from now on.
    pub fn serving(&self, life: Life, epoch: Epoch) {
        let before = self.0.lock().served.insert(life, epoch);
        self.note(format_args!("{} serves on epoch {epoch}", life.node));
        if let Some(before) = before.filter(|&before| before >= epoch) {
            self.violated(format_args!(
                "{} went from epoch {before} to {epoch}",
                life.node
            ));
        }
    }

    /// Whether anything was violated.
    #[must_use]
    pub fn is_violated(&self) -> bool {
        !self.0.lock().violations.is_empty()
    }

    /// Hash, violations and trace.
    #[must_use]
    pub fn take(&self) -> (u64, Vec<String>, Vec<String>) {
        let mut state = self.0.lock();
        let violations = std::mem::take(&mut state.violations);
        (
            state.hash,
            violations,
            state.trace.take().unwrap_or_default(),
        )
    }
}

impl State {
    fn note(&mut self, what: fmt::Arguments<'_>) {
        let at = self.begin.elapsed();
        let text = what.to_string();
        let mut hash = mix(self.hash ^ at.as_micros() as u64);
        for byte in text.bytes() {
            hash = mix(hash ^ u64::from(byte));
        }
        self.hash = hash;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>9.3} {text}", at.as_secs_f64()));
        }
    }
}
