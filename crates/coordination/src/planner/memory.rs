//! What the planner reads before it decides, and what it remembers between two looks. Decides nothing.

use std::collections::BTreeMap;

use tokio::time::Instant;
use tramontane_types::{Epoch, Placement, WorkerId};

use super::figures::Figures;
use super::{Intent, PLAN_PAUSE_MAX, PLAN_PAUSE_MIN};
use crate::Error;
use crate::backoff::Backoff;
use crate::placement_store::{Stored, decode, decode_serving};
use crate::placements::GroupPlacements;
use crate::registry::Members;
use crate::store::{Entry, Revision};
use crate::version::{GroupKey, PlacementKey, Version};

/// What is in the store, read just before deciding.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) groups: BTreeMap<GroupKey, SeenGroup>,
    /// The version that takes new requests; `None` also when it cannot be read.
    pub(super) serving: Option<Version>,
    /// Where to swap it from.
    pub(super) serving_at: Option<Revision>,
    pub(super) intent: Intent,
    /// Our keys whose values cannot be read, and where they stand.
    pub(super) unreadable: Vec<(String, Revision)>,
}

/// The placements of one group.
#[derive(Clone, Debug, Default)]
pub(super) struct SeenGroup {
    pub(super) published: Option<Stored>,
    pub(super) pending: Option<Stored>,
}

impl Seen {
    /// Takes what stands under one key.
    pub(super) fn take(&mut self, entry: &Entry) {
        let (group, is_pending) = match PlacementKey::parse(&entry.key) {
            Some(PlacementKey::Published(group)) => (group, false),
            Some(PlacementKey::Pending(group)) => (group, true),
            Some(PlacementKey::Serving) => return self.take_serving(entry),
            None => return,
        };
        let stored = match decode(entry) {
            Ok(placement) => Stored {
                placement: placement.into(),
                revision: entry.revision,
            },
            // It must not stop planning for ever: it is removed.
            Err(Error::Invalid { .. } | Error::TooLarge { .. }) => {
                self.unreadable.push((entry.key.clone(), entry.revision));
                return;
            }
            Err(_) => return,
        };
        let group = self.groups.entry(group).or_default();
        if is_pending {
            group.pending = Some(stored);
        } else {
            group.published = Some(stored);
        }
    }

    fn take_serving(&mut self, entry: &Entry) {
        self.serving_at = Some(entry.revision);
        match decode_serving(entry) {
            Ok(version) => self.serving = Some(version),
            Err(error) => tracing::warn!(key = entry.key, %error, "version cannot be read"),
        }
    }

    /// The placements without where they stand.
    pub(super) fn placements(&self) -> BTreeMap<GroupKey, GroupPlacements> {
        let bare = |stored: &Option<Stored>| stored.as_ref().map(|s| s.placement.clone());
        let group = |(key, seen): (&GroupKey, &SeenGroup)| {
            let placements = GroupPlacements {
                published: bare(&seen.published),
                pending: bare(&seen.pending),
            };
            (*key, placements)
        };
        self.groups.iter().map(group).collect()
    }
}

/// What the planner remembers between two looks; lost with leadership, without harm.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub(super) groups: BTreeMap<GroupKey, GroupMemory>,
    pub(super) intent: Intent,
}

/// What it remembers of one group.
#[derive(Debug)]
pub(super) struct GroupMemory {
    /// Ids and lives that the last plan would have been made from, and since when they are so.
    candidates: Vec<(WorkerId, u64)>,
    pub(super) changed: Instant,
    /// The published epoch and since when it has been seen.
    pub(super) published: (Epoch, Instant),
    /// The pending epoch and since when it has been seen.
    pub(super) pending: (Epoch, Instant),
    /// Workers that did not load in time, with the incarnation that did not and the epoch.
    pub(super) late: BTreeMap<WorkerId, (u64, Epoch)>,
    /// Holders that do not hold all of the published epoch, and since when they have been seen so.
    /// Starting again does not reset it: a worker that keeps crashing must not be waited for.
    pub(super) behind: BTreeMap<WorkerId, (Epoch, Instant)>,
    /// Measured figures as they count.
    pub(super) figures: Figures,
    /// Since when nobody of the group has been listed.
    pub(super) gone: Option<Instant>,
    /// Before this nothing is tried for the group: something of it does not work.
    pub(super) rests_until: Instant,
    pub(super) backoff: Backoff,
}

impl GroupMemory {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            candidates: Vec::new(),
            changed: now,
            published: (Epoch(0), now),
            pending: (Epoch(0), now),
            late: BTreeMap::new(),
            behind: BTreeMap::new(),
            figures: Figures::default(),
            gone: None,
            rests_until: now,
            backoff: Backoff::new(PLAN_PAUSE_MIN, PLAN_PAUSE_MAX),
        }
    }

    /// The epoch that a worker did not load in time: the pending one, or else the published one.
    pub(super) fn missed_epoch(&self, id: &WorkerId) -> Epoch {
        let published = self.behind.get(id).map_or(Epoch(0), |(epoch, _)| *epoch);
        self.pending.0.max(published)
    }

    /// Notes which holders of the published placement lack slices, and since when. A store out of
    /// sight says nothing about that.
    fn notice_behind(&mut self, members: &Members, published: Option<&Placement>, now: Instant) {
        let Some(published) = published.filter(|_| !members.stale) else {
            self.behind.clear();
            return;
        };
        let epoch = published.epoch;
        let behind = |id: &&WorkerId| {
            let record = members.workers.get(*id);
            record.is_some_and(|record| record.loaded < epoch)
        };
        let known = std::mem::take(&mut self.behind);
        for id in published.workers.iter().filter(behind) {
            let since = known.get(id).filter(|(of, _)| *of == epoch);
            let since = since.map_or(now, |(_, since)| *since);
            self.behind.insert(id.clone(), (epoch, since));
        }
    }

    /// Notes since when candidates and placements are as they are; `members` are the group's.
    pub(super) fn notice(&mut self, members: &Members, seen: &SeenGroup, now: Instant) {
        let workers = members.workers.values().filter(|w| w.roles.experts);
        let candidates: Vec<(WorkerId, u64)> = workers
            .filter(|w| w.state.is_staying())
            .map(|w| (w.id.clone(), w.incarnation))
            .collect();
        if candidates != self.candidates {
            self.candidates = candidates;
            self.changed = now;
        }
        let epoch =
            |stored: &Option<Stored>| stored.as_ref().map_or(Epoch(0), |s| s.placement.epoch);
        if epoch(&seen.pending) != self.pending.0 {
            self.pending = (epoch(&seen.pending), now);
        }
        if epoch(&seen.published) != self.published.0 {
            self.published = (epoch(&seen.published), now);
        }
        self.figures = self.figures.follow(members);
        let published = seen.published.as_ref().map(|s| &*s.placement);
        self.notice_behind(members, published, now);
        // Nobody is gone while nobody can be seen.
        let is_gone = members.workers.is_empty() && !members.stale;
        self.gone = is_gone.then(|| self.gone.unwrap_or(now));
        // A late worker is forgiven when it is a new process or has caught up.
        self.late.retain(|id, (incarnation, missed)| {
            let worker = members.workers.get(id);
            worker.is_some_and(|w| w.incarnation == *incarnation && w.loaded < *missed)
        });
    }
}
