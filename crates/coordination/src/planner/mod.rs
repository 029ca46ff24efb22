//! Keeps the placements fit for the workers that are there, one for each version of the weights, and says which
//! version takes new requests. Never changes what is served before every worker of a new placement has said
//! that it holds its slices.
//!
//! A change has two phases: the plan is written as pending, its workers load and say so in their
//! records, then it is published and the pending one removed. Deciding is pure ([`decide`]); this
//! module only looks, asks and writes. What goes wrong with one group does not hold up another.

mod decide;
mod explore;
mod figures;
mod memory;
mod outdated;
mod serving;
mod wish;
mod words;
mod worth;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;
use tramontane_types::{Placement, WorkerId};

pub use decide::{
    Group, LOAD_TIMEOUT, PlannerAction, PlannerConfig, PlannerStatus, PlannerView, SETTLE_TIME,
    Shortage, WaitReason, decide,
};
pub use explore::{Candidate, PlanReport, PlanWish, Promise, explore};
pub use figures::Figures;
pub use serving::{MOVE_AFTER, ServingView};
pub(crate) use wish::read_intent;
pub use wish::{INTENT_BYTES_MAX, Intent, REPLICAS_MAX, intent, set_intent};
pub use worth::{PLAN_TOKENS, REBALANCE_EVERY, REBALANCE_GAIN};

use crate::Error;
use crate::backoff::Backoff;
use crate::placement_store::{PlacementStore, set_serving};
use crate::placements::Placements;
use crate::registry::Members;
use crate::store::{Store, Watch, keys};
use crate::version::{GroupKey, Version};
use memory::{GroupMemory, Memory, Seen, SeenGroup};
use serving::groups_to_plan;

/// First pause after the store failed the planner.
pub const PLAN_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause after the store failed the planner.
pub const PLAN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The planner looks again at least this often.
pub const PLAN_EVERY: Duration = Duration::from_secs(10);
/// Shortest pause between two looks: load figures in worker records change all the time.
pub const PLAN_SPACING: Duration = Duration::from_millis(100);
/// The placement of a version of which nobody has been listed for this long is removed, unless it serves or is
/// wanted: time to think of a rollback.
pub const GROUP_FORGET: Duration = Duration::from_secs(10 * 60);

/// The planner of a cluster; runs in whichever router leads.
#[derive(Clone, Debug)]
pub struct Planner {
    store: Arc<dyn Store>,
    config: PlannerConfig,
    members: watch::Receiver<Arc<Members>>,
    placements: watch::Receiver<Arc<Placements>>,
    status: watch::Sender<Arc<PlannerStatuses>>,
}

/// What the planner does for each group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannerStatuses {
    /// By group.
    pub groups: BTreeMap<GroupKey, PlannerStatus>,
    /// The group that serves or, before one does, the first that is planned for.
    pub first: Option<GroupKey>,
}

impl PlannerStatuses {
    /// What it does for the group that serves.
    #[must_use]
    pub fn first(&self) -> Option<&PlannerStatus> {
        self.groups.get(&self.first?)
    }
}

/// What one look is made from.
struct Look<'a> {
    members: &'a Members,
    known: &'a Placements,
    seen: Seen,
    /// The version that serves, as far as anybody knows.
    serving: Option<Version>,
    now: Instant,
}

impl Planner {
    /// A planner that reads `members` and the `placements` of all groups; see [`crate::watch_members`] and
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
    pub fn status(&self) -> watch::Receiver<Arc<PlannerStatuses>> {
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
        let mut memory = Memory::default();
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
        let serving = seen.serving.clone();
        let serving = serving.or_else(|| known.serving.as_deref().cloned());
        let mut look = Look {
            members: &members,
            known: &known,
            seen,
            serving,
            now: Instant::now(),
        };
        let wished = look.seen.intent.weights.clone();
        let first: Vec<&Version> = look.serving.iter().chain(&wished).collect();
        let planned = groups_to_plan(&members, &look.seen.placements(), &first);
        let mut statuses = PlannerStatuses {
            groups: BTreeMap::new(),
            first: planned.first().map(Version::key),
        };
        let mut wake = look.now + PLAN_EVERY;
        for version in &planned {
            let (status, again) = self.look_at(version, &mut look, memory).await?;
            statuses.groups.insert(version.key(), status);
            wake = wake.min(again);
        }
        self.show(statuses, &members);
        wake = wake.min(self.choose(&look, memory).await?);
        self.forget(&look, &planned, memory).await?;
        Ok(wake)
    }

    /// Plans for one group. Only a store that does not answer is an error here.
    async fn look_at(
        &self,
        version: &Version,
        look: &mut Look<'_>,
        memory: &mut Memory,
    ) -> Result<(PlannerStatus, Instant), Error> {
        let (key, now) = (version.key(), look.now);
        let members = look.members.of(version);
        let memory = memory.groups.entry(key);
        let memory = memory.or_insert_with(|| GroupMemory::new(now));
        let seen = look.seen.groups.get(&key).cloned().unwrap_or_default();
        memory.notice(&members, &seen, now);
        let (action, status) = self.decide(version, look, (&members, &seen, &*memory));
        if memory.rests_until > now {
            return Ok((status, memory.rests_until));
        }
        match action {
            PlannerAction::Wait { again_in, .. } => {
                let again = again_in.unwrap_or(PLAN_EVERY).min(PLAN_EVERY);
                return Ok((status, now + again));
            }
            PlannerAction::Late(workers) => {
                for id in workers {
                    tracing::warn!(worker = %id, "worker did not load in time, planned out");
                    let incarnation = members.workers.get(&id).map_or(0, |r| r.incarnation);
                    let missed = memory.missed_epoch(&id);
                    memory.late.insert(id, (incarnation, missed));
                }
            }
            action => match self.act(action, key, &seen, look).await {
                Ok(()) => memory.backoff.reset(),
                Err(error) if error.is_retryable() => return Err(error),
                Err(error) => {
                    tracing::warn!(%version, %error, "planning for one version interrupted");
                    memory.rests_until = now + memory.backoff.pause();
                    return Ok((status, memory.rests_until));
                }
            },
        }
        Ok((status, now))
    }

    fn decide(
        &self,
        version: &Version,
        look: &Look<'_>,
        (members, seen, memory): (&Members, &SeenGroup, &GroupMemory),
    ) -> (PlannerAction, PlannerStatus) {
        let (now, is_serving) = (look.now, look.serving.as_ref() == Some(version));
        let late = memory.late.keys().cloned().collect();
        let behind = memory.behind.iter();
        let behind_for = behind.map(|(id, (_, since))| (id.clone(), now.duration_since(*since)));
        let mut config = self.config.clone();
        if look.serving.is_some() && !is_serving {
            // Waiting for workers is for a cluster that starts: now somebody serves.
            config.min_workers = std::num::NonZeroUsize::MIN;
        }
        let mut intent = look.seen.intent.clone();
        // Epochs are those of a group.
        intent.rebalance = intent.rebalance.filter(|_| is_serving);
        let known = look.known.of(version);
        let (action, mut status) = decide(&PlannerView {
            members,
            published: seen.published.as_ref().map(|s| &*s.placement),
            known: known.and_then(|group| group.published.as_deref()),
            pending: seen.pending.as_ref().map(|s| &*s.placement),
            intent: &intent,
            config: &config,
            settled_for: now.duration_since(memory.changed),
            published_for: now.duration_since(memory.published.1),
            pending_for: now.duration_since(memory.pending.1),
            behind_for: &behind_for.collect(),
            late: &late,
            figures: &memory.figures,
        });
        status.fulfilled = status.fulfilled.map(|_| look.seen.intent.clone());
        (action, status)
    }

    async fn act(
        &self,
        action: PlannerAction,
        group: GroupKey,
        seen: &SeenGroup,
        look: &mut Look<'_>,
    ) -> Result<(), Error> {
        let store = PlacementStore::new(Arc::clone(&self.store), group);
        let pending = seen.pending.as_ref();
        match action {
            PlannerAction::Propose(placement) => {
                let epoch = placement.epoch;
                store
                    .propose(&placement, pending.map(|p| p.revision))
                    .await?;
                tracing::info!(%group, %epoch, "placement proposed");
            }
            PlannerAction::Publish => {
                let Some(pending) = pending else {
                    return Ok(());
                };
                let epoch = pending.placement.epoch;
                let published = seen.published.as_ref();
                let revision = store.publish(&pending.placement, published).await?;
                tracing::info!(%group, %epoch, "placement published");
                // Whoever chooses the version in this look counts it.
                let mut now = pending.clone();
                now.revision = revision;
                look.seen.groups.entry(group).or_default().published = Some(now);
                store.drop_pending(pending.revision).await?;
            }
            PlannerAction::DropPending => {
                let Some(pending) = pending else {
                    return Ok(());
                };
                store.drop_pending(pending.revision).await?;
            }
            PlannerAction::Restore => {
                let known = look.known.groups.get(&group);
                let Some(known) = known.and_then(|group| group.published.as_ref()) else {
                    return Ok(());
                };
                let epoch = known.epoch;
                tracing::warn!(%group, %epoch, "store lost the placement, writing it again");
                store.publish(known, seen.published.as_ref()).await?;
            }
            PlannerAction::Late(_) | PlannerAction::Wait { .. } => {}
        }
        Ok(())
    }

    /// Says which version takes new requests, if that changes; returns when it may change by itself.
    async fn choose(&self, look: &Look<'_>, memory: &Memory) -> Result<Instant, Error> {
        let serving = look.serving.as_ref();
        let gone = serving.and_then(|version| memory.groups.get(&version.key())?.gone);
        let view = ServingView {
            members: look.members,
            placements: &look.seen.placements(),
            intent: &look.seen.intent,
            current: serving,
            gone_for: gone.map(|since| look.now.duration_since(since)),
        };
        let move_at = gone.map(|since| since + MOVE_AFTER);
        let move_at = move_at.filter(|at| *at > look.now);
        let again = move_at.unwrap_or(look.now + PLAN_EVERY);
        let Some(chosen) = view
            .choose()
            .filter(|v| look.seen.serving.as_ref() != Some(v))
        else {
            return Ok(again);
        };
        if look.members.stale || !look.members.synced {
            return Ok(again);
        }
        match set_serving(&*self.store, &chosen, look.seen.serving_at).await {
            Ok(_revision) => tracing::info!(version = %chosen, "takes new requests from now on"),
            Err(error) if error.is_retryable() => return Err(error),
            Err(error) => tracing::warn!(%error, "version not written, trying again"),
        }
        Ok(look.now)
    }

    /// Removes values that cannot be read, and placements of versions that nobody has any more.
    async fn forget(
        &self,
        look: &Look<'_>,
        planned: &[Version],
        memory: &mut Memory,
    ) -> Result<(), Error> {
        for (key, revision) in &look.seen.unreadable {
            tracing::warn!(key, "removing a placement that cannot be read");
            self.store.delete_if(key, *revision).await?;
        }
        let kept: BTreeSet<GroupKey> = planned.iter().map(Version::key).collect();
        let stored = &look.seen.groups;
        memory
            .groups
            .retain(|key, _| kept.contains(key) || stored.contains_key(key));
        if look.members.stale || !look.members.synced {
            return Ok(());
        }
        for (key, seen) in stored.iter().filter(|(key, _)| !kept.contains(*key)) {
            let memory = memory.groups.entry(*key);
            let memory = memory.or_insert_with(|| GroupMemory::new(look.now));
            let any = seen.published.as_ref().or(seen.pending.as_ref());
            let version = any.map(|stored| Version::of_placement(&stored.placement));
            let members = version.map(|version| look.members.of(&version));
            memory.notice(&members.unwrap_or_default(), seen, look.now);
            let is_over = |since| look.now.duration_since(since) >= GROUP_FORGET;
            if !memory.gone.is_some_and(is_over) {
                continue;
            }
            tracing::info!(group = %key, "removing the placement of a version that nobody has");
            let stored = [
                (key.pending(), &seen.pending),
                (key.published(), &seen.published),
            ];
            for (key, stored) in stored {
                if let Some(stored) = stored {
                    self.store.delete_if(&key, stored.revision).await?;
                }
            }
        }
        Ok(())
    }

    async fn read(&self, memory: &mut Memory) -> Result<Seen, Error> {
        let mut seen = Seen::default();
        for entry in self.store.list(keys::PLACEMENTS).await?.entries {
            seen.take(&entry);
        }
        match read_intent(self.store.get(keys::INTENT).await?) {
            Ok(intent) => memory.intent = intent,
            Err(error) => tracing::warn!(%error, "intent ignored, keeping the last one"),
        }
        seen.intent = memory.intent.clone();
        Ok(seen)
    }

    fn show(&self, statuses: PlannerStatuses, members: &Members) {
        self.status.send_if_modified(|known| {
            let changed = **known != statuses;
            if changed {
                for (group, status) in &statuses.groups {
                    let nothing = PlannerStatus::default();
                    let before = known.groups.get(group).unwrap_or(&nothing);
                    warn_of(status, before, members);
                    if before != status {
                        tracing::info!(%group, doing = status.doing, "planner");
                    }
                }
                *known = Arc::new(statuses);
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
        "workers that say otherwise of the same weights get no slices"
    );
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
