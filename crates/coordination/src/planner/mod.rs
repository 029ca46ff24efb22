//! Keeps the placement fit for the workers that are there. Never changes what is served before every
//! worker of the new placement has said that it holds its slices.
//!
//! A change has two phases: the plan is written as pending, its workers load and say so in their
//! records, then it is published and the pending one removed. Deciding is pure ([`decide`]); this
//! module only looks, asks and writes.

mod decide;
mod explore;
mod figures;
mod outdated;
mod wish;
mod words;
mod worth;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tramontane_types::{Epoch, Placement, WorkerId};

pub use decide::{
    Group, LOAD_TIMEOUT, PlannerAction, PlannerConfig, PlannerStatus, PlannerView, SETTLE_TIME,
    Shortage, WaitReason, decide,
};
pub use explore::{Candidate, PlanReport, PlanWish, Promise, explore};
pub use figures::Figures;
pub use wish::{Intent, REPLICAS_MAX};
pub use worth::{PLAN_TOKENS, REBALANCE_EVERY, REBALANCE_GAIN};

use crate::Error;
use crate::backoff::Backoff;
use crate::placement_store::{PlacementStore, Placements, Stored};
use crate::registry::Members;
use crate::store::{Entry, Revision, Store, Watch, keys};

/// First pause after the store failed the planner.
pub const PLAN_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause after the store failed the planner.
pub const PLAN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The planner looks again at least this often.
pub const PLAN_EVERY: Duration = Duration::from_secs(10);
/// Shortest pause between two looks: load figures in worker records change all the time.
pub const PLAN_SPACING: Duration = Duration::from_millis(100);
/// Largest intent.
pub const INTENT_BYTES_MAX: usize = 64 * 1024;

/// The planner of a cluster; runs in whichever router leads.
#[derive(Clone, Debug)]
pub struct Planner {
    store: Arc<dyn Store>,
    config: PlannerConfig,
    members: watch::Receiver<Arc<Members>>,
    placements: watch::Receiver<Arc<Placements>>,
    status: watch::Sender<Arc<PlannerStatus>>,
}

/// What is in the store, read just before deciding.
struct Seen {
    published: Option<Stored>,
    pending: Option<Stored>,
    intent: Intent,
}

/// What the planner remembers between two looks; lost with leadership, without harm.
struct Memory {
    /// Ids and states that the last plan would have been made from, and since when they are so.
    candidates: Vec<(WorkerId, u64)>,
    changed: Instant,
    /// The published epoch and since when it has been seen.
    published: (Epoch, Instant),
    /// The pending epoch and since when it has been seen.
    pending: (Epoch, Instant),
    /// Workers that did not load in time, with the incarnation that did not and the epoch.
    late: BTreeMap<WorkerId, (u64, Epoch)>,
    /// Holders that do not hold all of the published epoch, and since when they have been seen so.
    /// Starting again does not reset it: a worker that keeps crashing must not be waited for.
    behind: BTreeMap<WorkerId, (Epoch, Instant)>,
    intent: Intent,
    /// Measured figures as they count.
    figures: Figures,
}

impl Planner {
    /// A planner that reads `members` and `placements`; see [`crate::watch_members`] and
    /// [`crate::watch_placements`].
    #[must_use]
    pub fn new(
        store: Arc<dyn Store>,
        config: PlannerConfig,
        members: watch::Receiver<Arc<Members>>,
        placements: watch::Receiver<Arc<Placements>>,
    ) -> Self {
        Self {
            store,
            config,
            members,
            placements,
            status: watch::Sender::new(Arc::default()),
        }
    }

    /// What the planner does and waits for.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<PlannerStatus>> {
        self.status.subscribe()
    }

    /// Plans until `leadership` ends: the work to hand to [`crate::run_elected`].
    pub async fn run(&self, leadership: CancellationToken) {
        let work = async {
            let mut backoff = Backoff::new(PLAN_PAUSE_MIN, PLAN_PAUSE_MAX);
            loop {
                if let Err(error) = self.plan(&mut backoff).await {
                    tracing::warn!(%error, "planning interrupted");
                    sleep(backoff.pause()).await;
                }
            }
        };
        tokio::select! {
            biased;
            () = work => {}
            () = leadership.cancelled() => {}
        }
    }

    /// Plans until the store fails.
    async fn plan(&self, backoff: &mut Backoff) -> Result<(), Error> {
        let mut planner = self.clone();
        let now = Instant::now();
        let mut memory = Memory {
            candidates: Vec::new(),
            changed: now,
            published: (Epoch(0), now),
            pending: (Epoch(0), now),
            late: BTreeMap::new(),
            behind: BTreeMap::new(),
            intent: Intent::default(),
            figures: Figures::default(),
        };
        let from = self.store.list(keys::INTENT).await?.revision;
        let mut intents = self.store.watch(keys::INTENT, from.next());
        loop {
            let wake = planner.look_and_act(&mut memory).await?;
            backoff.reset();
            sleep(PLAN_SPACING).await;
            planner.wait(&mut intents, wake).await?;
        }
    }

    async fn wait(&mut self, intents: &mut Watch, wake: Instant) -> Result<(), Error> {
        let ended = |detail: &str| Error::Unavailable {
            operation: "watch",
            detail: detail.to_owned(),
        };
        tokio::select! {
            biased;
            changed = self.members.changed() => changed.map_err(|_| ended("members ended")),
            changed = self.placements.changed() => changed.map_err(|_| ended("placements ended")),
            event = intents.next() => match event {
                Some(event) => event.map(drop),
                None => Err(ended("intent watch ended")),
            },
            () = sleep_until(wake) => Ok(()),
        }
    }

    /// One look and what follows from it; returns when to look again at the latest.
    async fn look_and_act(&mut self, memory: &mut Memory) -> Result<Instant, Error> {
        let members = Arc::clone(&self.members.borrow_and_update());
        let known = Arc::clone(&self.placements.borrow_and_update());
        let seen = self.read(memory).await?;
        let now = Instant::now();
        memory.notice(&members, &seen, now);
        let late = memory.late.keys().cloned().collect();
        let behind = memory.behind.iter();
        let behind_for = behind.map(|(id, (_, since))| (id.clone(), now.duration_since(*since)));
        let published = seen.published.as_ref().map(|s| &*s.placement);
        let (action, status) = decide(&PlannerView {
            members: &members,
            published,
            known: known.published.as_deref(),
            pending: seen.pending.as_ref().map(|s| &*s.placement),
            intent: &seen.intent,
            config: &self.config,
            settled_for: now.duration_since(memory.changed),
            published_for: now.duration_since(memory.published.1),
            pending_for: now.duration_since(memory.pending.1),
            behind_for: &behind_for.collect(),
            late: &late,
            figures: &memory.figures,
        });
        self.show(status, &members);
        match action {
            PlannerAction::Wait { again_in, .. } => {
                return Ok(now + again_in.unwrap_or(PLAN_EVERY).min(PLAN_EVERY));
            }
            PlannerAction::Late(workers) => {
                for id in workers {
                    tracing::warn!(worker = %id, "worker did not load in time, planned out");
                    let incarnation = members.workers.get(&id).map_or(0, |r| r.incarnation);
                    let missed = memory.missed_epoch(&id);
                    memory.late.insert(id, (incarnation, missed));
                }
            }
            action => self.act(action, &seen, &known).await?,
        }
        Ok(now)
    }

    async fn act(
        &self,
        action: PlannerAction,
        seen: &Seen,
        known: &Placements,
    ) -> Result<(), Error> {
        let store = PlacementStore::new(Arc::clone(&self.store));
        let pending = seen.pending.as_ref();
        match action {
            PlannerAction::Propose(placement) => {
                let epoch = placement.epoch;
                store
                    .propose(&placement, pending.map(|p| p.revision))
                    .await?;
                tracing::info!(%epoch, "placement proposed");
            }
            PlannerAction::Publish => {
                let Some(pending) = pending else {
                    return Ok(());
                };
                let epoch = pending.placement.epoch;
                store
                    .publish(&pending.placement, seen.published.as_ref())
                    .await?;
                tracing::info!(%epoch, "placement published");
                store.drop_pending(pending.revision).await?;
            }
            PlannerAction::DropPending => {
                let Some(pending) = pending else {
                    return Ok(());
                };
                store.drop_pending(pending.revision).await?;
            }
            PlannerAction::Restore => {
                let Some(known) = &known.published else {
                    return Ok(());
                };
                tracing::warn!(epoch = %known.epoch, "store lost the placement, writing it again");
                store.publish(known, seen.published.as_ref()).await?;
            }
            PlannerAction::Late(_) | PlannerAction::Wait { .. } => {}
        }
        Ok(())
    }

    async fn read(&self, memory: &mut Memory) -> Result<Seen, Error> {
        let store = PlacementStore::new(Arc::clone(&self.store));
        let published = self
            .readable(store.published().await, &store, keys::PLACEMENT)
            .await?;
        let pending = store.pending().await;
        let pending = self
            .readable(pending, &store, keys::PLACEMENT_PENDING)
            .await?;
        match read_intent(self.store.get(keys::INTENT).await?) {
            Ok(intent) => memory.intent = intent,
            Err(error) => tracing::warn!(%error, "intent ignored, keeping the last one"),
        }
        Ok(Seen {
            published,
            pending,
            intent: memory.intent.clone(),
        })
    }

    /// A value that cannot be read must not stop planning for ever: it is removed.
    async fn readable(
        &self,
        read: Result<Option<Stored>, Error>,
        store: &PlacementStore,
        key: &str,
    ) -> Result<Option<Stored>, Error> {
        match read {
            Err(Error::Invalid { .. } | Error::TooLarge { .. }) => {
                store.drop_unreadable(key).await?;
                Ok(None)
            }
            read => read,
        }
    }

    fn show(&self, status: PlannerStatus, members: &Members) {
        self.status.send_if_modified(|known| {
            let changed = **known != status;
            warn_of(&status, known, members);
            if changed {
                tracing::info!(
                    doing = status.doing,
                    incompatible = status.incompatible.len(),
                    "planner"
                );
                *known = Arc::new(status);
            }
            changed
        });
    }
}

/// Says what an operator should look into, once for as long as it stays the same.
fn warn_of(status: &PlannerStatus, known: &PlannerStatus, members: &Members) {
    if let Some(shortage) = status
        .shortage
        .as_ref()
        .filter(|_| status.shortage != known.shortage)
    {
        tracing::warn!(
            error = %shortage.error,
            needed_bytes = shortage.needed_bytes,
            offered_bytes = shortage.offered_bytes,
            "there is no placement on the workers that there are"
        );
    }
    if status.incompatible.is_empty() || status.incompatible == known.incompatible {
        return;
    }
    let facts = |id: &WorkerId| match members.workers.get(id) {
        Some(w) => format!("{id} ({}, {})", w.numeric_class, w.model.fingerprint),
        None => id.to_string(),
    };
    let workers: Vec<String> = status.incompatible.iter().map(facts).collect();
    tracing::warn!(
        count = workers.len(),
        workers = workers.join(", "),
        "workers of another numeric class or model get no slices"
    );
}

impl Memory {
    /// The epoch that a worker did not load in time: the pending one, or else the published one.
    fn missed_epoch(&self, id: &WorkerId) -> Epoch {
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

    /// Notes since when candidates and the pending epoch are as they are.
    fn notice(&mut self, members: &Members, seen: &Seen, now: Instant) {
        let workers = members.workers.values().filter(|w| w.roles.experts);
        let candidates: Vec<(WorkerId, u64)> = workers
            .filter(|w| w.state.is_staying())
            .map(|w| (w.id.clone(), w.incarnation))
            .collect();
        if candidates != self.candidates {
            self.candidates = candidates;
            self.changed = now;
        }
        let pending = seen
            .pending
            .as_ref()
            .map_or(Epoch(0), |p| p.placement.epoch);
        if pending != self.pending.0 {
            self.pending = (pending, now);
        }
        let published = seen.published.as_ref().map(|s| &*s.placement);
        let epoch = published.map_or(Epoch(0), |p| p.epoch);
        if epoch != self.published.0 {
            self.published = (epoch, now);
        }
        self.figures = self.figures.follow(members);
        self.notice_behind(members, published, now);
        // A late worker is forgiven when it is a new process or has caught up.
        self.late.retain(|id, (incarnation, missed)| {
            let worker = members.workers.get(id);
            worker.is_some_and(|w| w.incarnation == *incarnation && w.loaded < *missed)
        });
    }
}

/// Reads the intent; none means the default.
pub(crate) fn read_intent(entry: Option<Entry>) -> Result<Intent, Error> {
    let Some(entry) = entry else {
        return Ok(Intent::default());
    };
    let size = entry.value.len();
    if size > INTENT_BYTES_MAX {
        return Err(Error::TooLarge {
            what: keys::INTENT.to_owned(),
            size,
            max: INTENT_BYTES_MAX,
        });
    }
    let intent: Intent = serde_json::from_slice(&entry.value)
        .map_err(|e| Error::invalid(keys::INTENT, e.to_string()))?;
    intent.validate()?;
    Ok(intent)
}

/// The operator's wish and where to swap it from.
///
/// # Errors
/// The store's, or [`Error::Invalid`] for a value that is none.
pub async fn intent(store: &dyn Store) -> Result<(Intent, Option<Revision>), Error> {
    let entry = store.get(keys::INTENT).await?;
    let revision = entry.as_ref().map(|entry| entry.revision);
    Ok((read_intent(entry)?, revision))
}

/// Writes the operator's wish in place of what was read at `replaces`.
///
/// # Errors
/// [`Error::Invalid`] for a wish outside its limits; [`Error::Conflict`] when somebody else wrote since.
pub async fn set_intent(
    store: &dyn Store,
    intent: &Intent,
    replaces: Option<Revision>,
) -> Result<Revision, Error> {
    intent.validate()?;
    let text = serde_json::to_vec(intent);
    let text = text.map_err(|e| Error::invalid(keys::INTENT, e.to_string()))?;
    let outcome = store
        .compare_and_swap(keys::INTENT, replaces, text.into(), None)
        .await?;
    match outcome {
        crate::CasOutcome::Swapped(revision) => Ok(revision),
        crate::CasOutcome::Conflict(_) => Err(Error::Conflict {
            key: keys::INTENT.to_owned(),
            expected: replaces,
        }),
    }
}

/// Whether both placements put the same slices on the same workers in the same order.
fn same_holders(a: &Placement, b: &Placement) -> bool {
    let alike = (a.num_layers, a.num_experts) == (b.num_layers, b.num_experts)
        && (&a.model, &a.numeric_class) == (&b.model, &b.numeric_class);
    let named = |p: &Placement, holders: &[u16]| -> Vec<Option<WorkerId>> {
        holders.iter().map(|&h| p.worker(h).cloned()).collect()
    };
    let (of_a, of_b): (Vec<_>, Vec<_>) = (a.iter().collect(), b.iter().collect());
    let same = |((slice_a, holders_a), (slice_b, holders_b)): (&(_, &[u16]), &(_, &[u16]))| {
        slice_a == slice_b && named(a, holders_a) == named(b, holders_b)
    };
    alike && of_a.len() == of_b.len() && of_a.iter().zip(&of_b).all(same)
}

#[cfg(test)]
mod tests;
