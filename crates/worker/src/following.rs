//! What a worker does about the placements that it sees: what to serve on, to load, to say, to drop. Pure:
//! time is an argument, and nothing is loaded here.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tramontane_coordination::mutation::{Mutation, is_on};
use tramontane_coordination::{Members, Placements, Version, slices_to_drop, slices_to_load};
use tramontane_types::{Epoch, ExpertId, ExpertSlice, LayerId, Placement, SegmentRange, WorkerId};

/// Whether a worker that serves on `serving` goes over to `published`: never back to an older epoch.
#[must_use]
pub fn supersedes(serving: Option<Epoch>, published: Epoch) -> bool {
    serving.is_none_or(|serving| {
        published > serving || (published != serving && is_on(Mutation::EpochCheckOff))
    })
}

/// What a worker says and loads next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NextLoad {
    /// Epochs of which it holds everything; with each whether that is the published one.
    pub complete: Vec<(Epoch, bool)>,
    /// What it lacks of the next one, the published placement first; empty when it lacks nothing.
    pub missing: Vec<ExpertSlice>,
}

/// What `worker`, which holds `held`, says and loads next. `None` when it does not hold experts at all: then
/// it lacks nothing, whatever a placement says.
#[must_use]
pub fn next_load(
    worker: &WorkerId,
    published: Option<&Placement>,
    pending: Option<&Placement>,
    held: Option<&[ExpertSlice]>,
) -> NextLoad {
    let mut next = NextLoad::default();
    for placement in [published, pending].into_iter().flatten() {
        let lacks = |held| slices_to_load(worker, Some(placement), None, held);
        let missing = held.map(lacks).unwrap_or_default();
        if !missing.is_empty() {
            next.missing = missing;
            break;
        }
        let is_published = published.is_some_and(|p| p.epoch == placement.epoch);
        next.complete.push((placement.epoch, is_published));
    }
    next
}

/// What no placement asks of `worker` any more; nothing before there is a placement at all.
#[must_use]
pub fn unwanted(
    worker: &WorkerId,
    published: Option<&Placement>,
    pending: Option<&Placement>,
    packed: &[ExpertSlice],
) -> Vec<ExpertSlice> {
    if published.is_none() {
        return Vec::new();
    }
    slices_to_drop(worker, published, pending, packed)
}

/// Slices that no placement asks of this worker any more, until nobody has used them for a grace.
#[derive(Debug)]
pub struct Retired {
    /// Segments per expert.
    masks: HashMap<(LayerId, ExpertId), u8>,
    /// When one of them was last asked for, or when they changed.
    last_used: Instant,
}

impl Retired {
    /// Nothing is retired.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            masks: HashMap::new(),
            last_used: now,
        }
    }

    /// Whether nothing is retired.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.masks.is_empty()
    }

    /// Exactly `slices` are retired from now on.
    pub fn set(&mut self, slices: &[ExpertSlice], now: Instant) {
        let mut masks = HashMap::<_, u8>::new();
        for slice in slices {
            *masks.entry((slice.layer, slice.expert)).or_default() |= slice.range.mask();
        }
        if self.masks != masks {
            self.masks = masks;
            self.last_used = now;
        }
    }

    /// Somebody asks for a part of an expert.
    pub fn used(&mut self, layer: LayerId, expert: ExpertId, range: SegmentRange, now: Instant) {
        let mask = self.masks.get(&(layer, expert)).copied().unwrap_or(0);
        if mask & range.mask() != 0 {
            self.last_used = now;
        }
    }

    /// When to drop them if nobody asks before; `None` when nothing is retired.
    #[must_use]
    pub fn drop_at(&self, grace: Duration) -> Option<Instant> {
        let grace = if is_on(Mutation::NoDropGrace) {
            Duration::ZERO
        } else {
            grace
        };
        (!self.masks.is_empty()).then(|| self.last_used + grace)
    }
}

/// Who may ask the experts of a worker that is leaving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// Nobody runs sequences, or will.
    Nobody,
    /// Only a caller that has not seen the newest placement.
    Unlikely,
    /// A placement names it.
    Likely,
}

/// Who may ask the experts of `me`, which computes with `version`: nobody of another version does.
#[must_use]
pub fn need(
    (me, version): (&WorkerId, &Version),
    placements: &Placements,
    members: &Members,
) -> Need {
    let group = placements.of(version).cloned().unwrap_or_default();
    let mut named = group.published.iter().chain(&group.pending);
    let named = named.any(|placement| placement.workers.contains(me));
    let mut callers = false;
    let others = members.workers.values();
    for other in others.filter(|w| w.id != *me && version.has(w)) {
        let is_busy = other.load.running + other.load.waiting > 0;
        let is_staying = other.state.is_staying();
        callers |= other.roles.attention && (is_busy || is_staying);
    }
    match (callers, named) {
        (false, _) => Need::Nobody,
        (true, false) => Need::Unlikely,
        (true, true) => Need::Likely,
    }
}
