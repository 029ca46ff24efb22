//! What to do next about the placement, given everything that is known. Pure: time comes as durations.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tramontane_types::{Epoch, Placement, WorkerId};

use super::figures::Figures;
use super::outdated::is_sane;
use super::{Intent, same_holders, worth};
use crate::balance::{
    BalanceError, BalanceInput, PlacementPolicy, Summary, WorkerShare, balance, summarise,
};
use crate::mutation::{Mutation, is_on};
use crate::registry::{Members, ModelFacts, WorkerRecord};

/// How long membership must rest before a plan includes newcomers: workers often come together.
pub const SETTLE_TIME: Duration = Duration::from_secs(3);
/// How long a worker may load before it is planned out: a large model from a slow disk.
pub const LOAD_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// What the planner goes by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannerConfig {
    /// Workers that the first placement waits for.
    pub min_workers: NonZeroUsize,
    /// Replicas where the intent does not say.
    pub replicas: NonZeroUsize,
    /// Slices per expert where the intent does not say; `None` leaves it to `balance`.
    pub slices_per_expert: Option<u8>,
    /// See [`SETTLE_TIME`].
    pub settle_time: Duration,
    /// See [`LOAD_TIMEOUT`].
    pub load_timeout: Duration,
}

impl Default for PlannerConfig {
    fn default() -> Self {
        Self {
            min_workers: NonZeroUsize::MIN,
            replicas: NonZeroUsize::MIN,
            slices_per_expert: None,
            settle_time: SETTLE_TIME,
            load_timeout: LOAD_TIMEOUT,
        }
    }
}

/// Workers that can hold one model together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group {
    /// Their numeric class.
    pub numeric_class: String,
    /// Their model.
    pub model: ModelFacts,
}

/// Everything that a decision depends on.
#[derive(Clone, Debug)]
pub struct PlannerView<'a> {
    /// Who is there.
    pub members: &'a Members,
    /// The published placement as the store has it.
    pub published: Option<&'a Placement>,
    /// The newest published placement that was ever seen; the store may have lost it.
    pub known: Option<&'a Placement>,
    /// The pending placement as the store has it.
    pub pending: Option<&'a Placement>,
    /// What the operator wants.
    pub intent: &'a Intent,
    /// What the planner goes by.
    pub config: &'a PlannerConfig,
    /// How long the workers have been the same.
    pub settled_for: Duration,
    /// How long the published placement has been seen to be the same.
    pub published_for: Duration,
    /// How long the pending placement has been the same.
    pub pending_for: Duration,
    /// For how long holders of the published placement have not held all that they should.
    pub behind_for: &'a BTreeMap<WorkerId, Duration>,
    /// Workers that did not load a placement in time.
    pub late: &'a BTreeSet<WorkerId>,
    /// What was measured.
    pub figures: &'a Figures,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannerAction {
    /// Nothing for now.
    Wait {
        /// Why.
        reason: WaitReason,
        /// When to look again if nothing changes before.
        again_in: Option<Duration>,
    },
    /// Write this as pending in place of what is pending.
    Propose(Arc<Placement>),
    /// Publish what is pending, and remove it as pending.
    Publish,
    /// Remove what is pending: it is published already.
    DropPending,
    /// Write the known placement again: the store has lost it.
    Restore,
    /// Plan without these workers from now on: they did not load in time.
    Late(Vec<WorkerId>),
}

/// Why the planner does nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// The placement fits.
    Idle,
    /// Another placement would suit loads and speeds better, but not by enough to move for.
    NotWorthIt {
        /// By how much layers would be faster.
        gain_percent: u8,
    },
    /// Another placement would suit loads and speeds better, but this one is too young.
    Rested {
        /// By how much layers would be faster.
        gain_percent: u8,
    },
    /// The store is out of sight.
    StoreAway,
    /// Too few workers for a first placement.
    TooFewWorkers {
        /// There are.
        have: usize,
        /// The configuration asks for.
        need: usize,
    },
    /// Workers came or went just now.
    Settling,
    /// Workers load their slices of the pending placement.
    Loading {
        /// Its epoch.
        epoch: Epoch,
        /// Who has not finished.
        workers: Vec<WorkerId>,
    },
    /// There is no placement on the workers that there are.
    NoPlacement(Shortage),
}

/// Why there is no placement on the workers that there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shortage {
    /// What the balancer says.
    pub error: BalanceError,
    /// Bytes that one copy of the experts needs, by the workers' largest segment.
    pub needed_bytes: u64,
    /// Bytes that the workers offer.
    pub offered_bytes: u64,
}

/// What the planner does, for status displays and metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlannerStatus {
    /// In a few words.
    pub doing: String,
    /// Why nothing can be placed, as long as that is so.
    pub shortage: Option<Shortage>,
    /// Workers of another numeric class or model than the group's: they get no slices.
    pub incompatible: Vec<WorkerId>,
    /// The placement that is proposed or published now, in numbers.
    pub summary: Option<Summary>,
    /// The wish that the published placement fits as well as it can, when there is nothing to do.
    pub fulfilled: Option<Intent>,
}

/// What to do next about the placement.
#[must_use]
pub fn decide(view: &PlannerView<'_>) -> (PlannerAction, PlannerStatus) {
    let group = view.group();
    let action = view.action(group.as_ref());
    let status = view.status(group.as_ref(), &action);
    (action, status)
}

pub(super) fn wait(reason: WaitReason, again_in: Option<Duration>) -> PlannerAction {
    PlannerAction::Wait { reason, again_in }
}

impl PlannerView<'_> {
    fn action(&self, group: Option<&Group>) -> PlannerAction {
        if self.members.stale || !self.members.synced {
            return wait(WaitReason::StoreAway, None);
        }
        let lost = |known: &&Placement| self.pending.is_none_or(|p| p.epoch <= known.epoch);
        if let (None, Some(known)) = (self.published, self.known.filter(lost)) {
            return self.after_loss(known, group);
        }
        let Some(pending) = self.pending else {
            return self.without_pending(group);
        };
        if self.published.is_some_and(|p| p.epoch >= pending.epoch) {
            return PlannerAction::DropPending;
        }
        self.with_pending(pending, group)
    }

    fn with_pending(&self, pending: &Placement, group: Option<&Group>) -> PlannerAction {
        let stays = |id: &WorkerId| group.is_some_and(|group| self.stays(id, pending, group));
        if !pending.workers.iter().all(stays) {
            return match self.plan(group) {
                Ok(placement) => PlannerAction::Propose(Arc::new(placement)),
                Err(reason) => wait(reason, None),
            };
        }
        let loading = |id: &&WorkerId| {
            let record = self.members.workers.get(*id);
            record.is_none_or(|record| record.loaded < pending.epoch)
        };
        let workers: Vec<WorkerId> = pending.workers.iter().filter(loading).cloned().collect();
        if workers.is_empty() {
            return PlannerAction::Publish;
        }
        let left = self.config.load_timeout.saturating_sub(self.pending_for);
        if left.is_zero() {
            return PlannerAction::Late(workers);
        }
        let epoch = pending.epoch;
        wait(WaitReason::Loading { epoch, workers }, Some(left))
    }

    fn without_pending(&self, group: Option<&Group>) -> PlannerAction {
        let have = group.map_or(0, |group| self.candidates(group).len());
        let need = self.config.min_workers.get();
        let Some(published) = self.published else {
            if have < need {
                return wait(WaitReason::TooFewWorkers { have, need }, None);
            }
            return self.settled_plan(group);
        };
        let overdue = self.overdue(published, group);
        if !overdue.is_empty() {
            return PlannerAction::Late(overdue);
        }
        let lost = |id: &WorkerId| !group.is_some_and(|group| self.stays(id, published, group));
        if !published.workers.iter().any(lost) {
            return self.settled_plan(group);
        }
        // Somebody is gone or going: every moment counts.
        match self.plan(group) {
            Ok(placement) => PlannerAction::Propose(Arc::new(placement)),
            Err(reason) => wait(reason, None),
        }
    }

    /// Holders of the published placement that new placements still count on, although they came back
    /// without their slices and did not load them in time.
    fn overdue(&self, published: &Placement, group: Option<&Group>) -> Vec<WorkerId> {
        let counted = |id: &&WorkerId| group.is_some_and(|group| self.is_candidate(id, group));
        let waited = |id: &&WorkerId| {
            let behind_for = self.behind_for.get(*id);
            behind_for.is_some_and(|behind_for| *behind_for >= self.config.load_timeout)
        };
        let holders = published.workers.iter();
        holders.filter(counted).filter(waited).cloned().collect()
    }

    /// A plan for newcomers and new wishes, once membership rests.
    fn settled_plan(&self, group: Option<&Group>) -> PlannerAction {
        let placement = match self.plan(group) {
            Ok(placement) => placement,
            Err(reason) => return wait(reason, None),
        };
        let fits = |p: &Placement| same_holders(p, &placement) && !self.is_outdated(p);
        if self.published.is_some_and(fits) {
            return wait(WaitReason::Idle, None);
        }
        if let Some(reason) = self.holds_back(&placement, group) {
            return reason;
        }
        let left = self.config.settle_time.saturating_sub(self.settled_for);
        if !left.is_zero() {
            return wait(WaitReason::Settling, Some(left));
        }
        PlannerAction::Propose(Arc::new(placement))
    }

    /// Why a plan that differs for load and speed alone is not proposed now.
    fn holds_back(&self, plan: &Placement, group: Option<&Group>) -> Option<PlannerAction> {
        let (published, group) = (self.published?, group?);
        if self.is_outdated(published) {
            return None;
        }
        let candidates = self.candidates(group);
        if !self.figures.know(&candidates, &group.model) {
            return None;
        }
        let replicas = self.policy().replicas;
        if worth::is_needed(published, plan, (&candidates, replicas.get())) {
            return None;
        }
        let costs = self.figures.costs(self.members, &group.model);
        let gain = worth::gain(published, plan, &costs);
        let gain_percent = (gain * 100.0).clamp(0.0, 100.0) as u8;
        // Who asks for it gets the smallest gain, and at once, but no loss.
        let is_asked = self.intent.rebalance == Some(published.epoch);
        let least = if is_asked { 0.0 } else { worth::REBALANCE_GAIN };
        if gain <= least {
            return Some(wait(WaitReason::NotWorthIt { gain_percent }, None));
        }
        if is_asked {
            return None;
        }
        let left = worth::REBALANCE_EVERY.saturating_sub(self.published_for);
        (!left.is_zero()).then(|| wait(WaitReason::Rested { gain_percent }, Some(left)))
    }

    pub(super) fn policy(&self) -> PlacementPolicy {
        let cut = self.intent.slices_per_expert;
        PlacementPolicy {
            replicas: self.intent.replicas.unwrap_or(self.config.replicas),
            slices_per_expert: cut.or(self.config.slices_per_expert),
        }
    }

    /// The best placement on the workers that there are, moving little from the published one, or
    /// from the pending one where there is none.
    pub(super) fn plan(&self, group: Option<&Group>) -> Result<Placement, WaitReason> {
        let candidates = group
            .map(|group| self.candidates(group))
            .unwrap_or_default();
        let Some(group) = group.filter(|_| !candidates.is_empty()) else {
            let need = self.config.min_workers.get();
            return Err(WaitReason::TooFewWorkers { have: 0, need });
        };
        let share = |record: &&WorkerRecord| WorkerShare {
            id: record.id.clone(),
            capacity_segments: record.capacity_segments(),
            layers: record.expert_layers(),
            speed: self.figures.speed(&record.id),
        };
        let input = BalanceInput {
            workers: candidates.iter().map(share).collect(),
            num_layers: group.model.num_layers,
            num_experts: group.model.num_experts,
            num_segments: group.model.num_segments,
            expert_load: self.figures.load(&group.model),
            policy: self.policy(),
            current: self.published.or(self.pending).or(self.known),
            epoch: self.next_epoch(),
            numeric_class: group.numeric_class.clone(),
            model: group.model.fingerprint.clone(),
        };
        let placed = balance(&input);
        placed.map_err(|error| WaitReason::NoPlacement(shortage(error, &group.model, &candidates)))
    }

    /// Above every epoch that anybody has ever seen, also after the store was emptied.
    fn next_epoch(&self) -> Epoch {
        let placements = [self.published, self.known, self.pending];
        let placed = placements.iter().flatten().map(|p| p.epoch);
        let highest = placed
            .filter(|&epoch| is_sane(epoch))
            .max()
            .unwrap_or(Epoch(0));
        if is_on(Mutation::EpochCheckOff) {
            return highest.next();
        }
        highest.max(self.newest_loaded()).next()
    }

    /// The published group as long as it has workers, otherwise the one with most memory.
    pub(super) fn group(&self) -> Option<Group> {
        let mut offers: BTreeMap<Group, u64> = BTreeMap::new();
        for worker in self.members.workers.values() {
            let group = group_of(worker);
            if self.is_candidate(&worker.id, &group) {
                let offer = offers.entry(group).or_default();
                *offer = offer.saturating_add(worker.capacity_segments());
            }
        }
        let serves = |group: &&Group| self.published.is_some_and(|p| is_of(p, group));
        if let Some(group) = offers.keys().find(serves) {
            return Some(group.clone());
        }
        let most = offers.into_iter().rev().max_by_key(|(_, offer)| *offer);
        most.map(|(group, _)| group)
    }

    /// Whether new placements may count on a worker.
    fn is_candidate(&self, id: &WorkerId, group: &Group) -> bool {
        self.members.workers.get(id).is_some_and(|worker| {
            worker.roles.experts
                && worker.state.is_staying()
                && worker.capacity_segments() > 0
                && group_of(worker) == *group
                && self.intent.may_hold(worker)
                && !self.late.contains(id)
        })
    }

    /// Whether a holder is a candidate, and still one for all that a placement gives it: its name may have been taken over by a
    /// worker that can hold other layers.
    fn stays(&self, id: &WorkerId, placement: &Placement, group: &Group) -> bool {
        let can = |worker: &Arc<WorkerRecord>| worker.can_hold(placement);
        self.is_candidate(id, group) && self.members.workers.get(id).is_some_and(can)
    }

    pub(super) fn candidates(&self, group: &Group) -> Vec<&WorkerRecord> {
        let workers = self.members.workers.values().map(|worker| &**worker);
        workers
            .filter(|worker| self.is_candidate(&worker.id, group))
            .collect()
    }

    fn status(&self, group: Option<&Group>, action: &PlannerAction) -> PlannerStatus {
        let other = |worker: &&Arc<WorkerRecord>| {
            worker.roles.experts && group.is_some_and(|group| group_of(worker) != *group)
        };
        let workers = self.members.workers.values().filter(other);
        let shown = match action {
            PlannerAction::Propose(placement) => Some(&**placement),
            _ => self.pending.or(self.published),
        };
        let summary = shown.zip(group).map(|(placement, group)| {
            let current = self.published.filter(|p| p.epoch != placement.epoch);
            summarise(placement, current, group.model.num_segments)
        });
        let shortage = match action {
            PlannerAction::Wait {
                reason: WaitReason::NoPlacement(shortage),
                ..
            } => Some(shortage.clone()),
            _ => None,
        };
        let is_at_rest = matches!(
            action,
            PlannerAction::Wait {
                reason: WaitReason::Idle
                    | WaitReason::NotWorthIt { .. }
                    | WaitReason::Rested { .. },
                ..
            }
        );
        PlannerStatus {
            fulfilled: is_at_rest.then(|| self.intent.clone()),
            doing: action.to_string(),
            shortage,
            incompatible: workers.map(|worker| worker.id.clone()).collect(),
            summary,
        }
    }
}

/// An error in bytes, of the layers that it is about and of those who can hold them.
fn shortage(error: BalanceError, model: &ModelFacts, candidates: &[&WorkerRecord]) -> Shortage {
    let layer = match &error {
        BalanceError::Capacity { layer, .. } | BalanceError::Layers { layer } => *layer,
        _ => 0,
    };
    let can = |w: &&&WorkerRecord| w.expert_layers().contains(&layer);
    let holders: Vec<&&WorkerRecord> = candidates.iter().filter(can).collect();
    let layers = holders
        .first()
        .map_or(model.num_layers, |w| w.expert_layers().len());
    let segments = (layers * model.num_experts) as u64 * u64::from(model.num_segments);
    let largest = candidates.iter().map(|w| w.segment_bytes).max();
    let offered = holders.iter().map(|w| w.capacity_bytes);
    Shortage {
        error,
        needed_bytes: segments.saturating_mul(largest.unwrap_or(0)),
        offered_bytes: offered.fold(0, u64::saturating_add),
    }
}

fn group_of(worker: &WorkerRecord) -> Group {
    Group {
        numeric_class: worker.numeric_class.clone(),
        // Names are for people: they do not divide a group.
        model: ModelFacts {
            name: String::new(),
            ..worker.model.clone()
        },
    }
}

fn is_of(placement: &Placement, group: &Group) -> bool {
    placement.numeric_class == group.numeric_class
        && placement.model == group.model.fingerprint
        && placement.num_layers == group.model.num_layers
        && placement.num_experts == group.model.num_experts
}
