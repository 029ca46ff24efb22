//! What the planner would do and what else it could, in numbers and words, for an operator who asks before
//! anything moves. Pure; never changes what the planner decides.

use std::num::NonZeroUsize;

use tramontane_types::Placement;

use super::decide::{Group, PlannerView, decide};
use super::{Intent, PLAN_TOKENS, PlannerAction, REBALANCE_EVERY, REBALANCE_GAIN, WaitReason};
use crate::balance::{BalanceError, Costs, predict, summarise};
use crate::loss::{Room, leaves_room};

/// Numbers of slices per expert that are compared.
const CUTS: [u8; 4] = [1, 2, 4, 8];
/// Most replicas that are compared where nobody asks for a number.
const REPLICAS_COMPARED: usize = 3;

/// What an operator would like to see planned; the intent where it says nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlanWish {
    /// Workers that hold each slice.
    pub replicas: Option<NonZeroUsize>,
    /// Slices per expert.
    pub slices_per_expert: Option<u8>,
    /// For load and speed now, however little there is to gain.
    pub rebalance: bool,
}

/// One placement that could be.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Slices per expert.
    pub slices_per_expert: u8,
    /// Workers that hold each slice.
    pub replicas: usize,
    /// What it promises, or why it cannot be.
    pub promise: Result<Promise, BalanceError>,
}

/// What a placement promises.
#[derive(Clone, Debug, PartialEq)]
pub struct Promise {
    /// Predicted microseconds of the experts of one layer, for [`PLAN_TOKENS`] tokens.
    pub layer_us: f64,
    /// Bytes that workers must load for it.
    pub moved_bytes: u64,
    /// Whether any one worker may be lost.
    pub survives_one_loss: bool,
}

/// What the planner would do, and what it could.
#[derive(Clone, Debug, PartialEq)]
pub struct PlanReport {
    /// The published placement.
    pub now: Option<Promise>,
    /// What was compared.
    pub candidates: Vec<Candidate>,
    /// The one of them that the planner makes for this wish.
    pub chosen: usize,
    /// Whether the planner would propose it now.
    pub proposes: bool,
    /// What the planner does, and why.
    pub why: Vec<String>,
}

/// Compares placements for the workers of `view`, as the planner would make them for `wish`.
///
/// # Errors
/// Why there can be none at all.
pub fn explore(view: &PlannerView<'_>, wish: PlanWish) -> Result<PlanReport, WaitReason> {
    let published = view.published.map(|p| p.epoch);
    let intent = Intent {
        replicas: wish.replicas.or(view.intent.replicas),
        slices_per_expert: wish.slices_per_expert.or(view.intent.slices_per_expert),
        rebalance: published
            .filter(|_| wish.rebalance)
            .or(view.intent.rebalance),
        ..view.intent.clone()
    };
    let view = PlannerView {
        intent: &intent,
        ..view.clone()
    };
    let need = view.config.min_workers.get();
    let Some(group) = view.group() else {
        return Err(WaitReason::TooFewWorkers { have: 0, need });
    };
    let plan = view.plan(Some(&group))?;
    let explorer = Explorer {
        costs: view.figures.costs(view.members, &group.model),
        view: &view,
        group: &group,
    };
    let mut candidates = explorer.candidates(wish);
    let (cut, replicas) = (cut_of(&plan), view.policy().replicas.get());
    let same = |c: &Candidate| (c.slices_per_expert, c.replicas) == (cut, replicas);
    let chosen = candidates.iter().position(same).unwrap_or(candidates.len());
    if chosen == candidates.len() {
        candidates.push(Candidate {
            slices_per_expert: cut,
            replicas,
            promise: Ok(explorer.promise(&plan)),
        });
    }
    // The planner's own plan, which may cut as is, not the one that was asked to.
    let promise = explorer.promise(&plan);
    let now = view.published.map(|p| explorer.promise(p));
    let (action, _) = decide(&view);
    let mut why = explorer.reasons(cut, wish);
    why.extend(comparison(&promise, now.as_ref()));
    why.extend(fastest(&candidates, chosen, &promise));
    why.push(format!("the planner's next step: {action}"));
    candidates[chosen].promise = Ok(promise);
    Ok(PlanReport {
        now,
        candidates,
        chosen,
        proposes: matches!(action, PlannerAction::Propose(_)),
        why,
    })
}

struct Explorer<'a> {
    view: &'a PlannerView<'a>,
    group: &'a Group,
    costs: Costs,
}

impl Explorer<'_> {
    fn candidates(&self, wish: PlanWish) -> Vec<Candidate> {
        let num_workers = self.view.candidates(self.group).len();
        let replicas = match wish.replicas {
            Some(replicas) => replicas.get()..=replicas.get(),
            None => 1..=num_workers.min(REPLICAS_COMPARED),
        };
        let cuts = wish
            .slices_per_expert
            .map_or(CUTS.to_vec(), |cut| vec![cut]);
        let mut candidates = Vec::new();
        for replicas in replicas.filter_map(NonZeroUsize::new) {
            let cuts = cuts.iter().filter(|&&k| k <= self.group.model.num_segments);
            for &cut in cuts {
                candidates.extend(self.candidate(cut, replicas));
            }
        }
        candidates
    }

    fn candidate(&self, cut: u8, replicas: NonZeroUsize) -> Option<Candidate> {
        let intent = Intent {
            replicas: Some(replicas),
            slices_per_expert: Some(cut),
            ..self.view.intent.clone()
        };
        let view = PlannerView {
            intent: &intent,
            ..self.view.clone()
        };
        let promise = match view.plan(Some(self.group)) {
            Ok(placement) => Ok(self.promise(&placement)),
            Err(WaitReason::NoPlacement(shortage)) => Err(shortage.error),
            Err(_) => return None,
        };
        Some(Candidate {
            slices_per_expert: cut,
            replicas: replicas.get(),
            promise,
        })
    }

    fn promise(&self, placement: &Placement) -> Promise {
        let workers = self.view.candidates(self.group);
        let segment_bytes = workers.iter().map(|w| w.segment_bytes).max().unwrap_or(0);
        let num_segments = self.group.model.num_segments;
        let summary = summarise(placement, self.view.published, num_segments);
        let rooms: Vec<Room> = workers.iter().map(|w| Room::of(w)).collect();
        Promise {
            layer_us: predict(placement, &self.costs, PLAN_TOKENS),
            moved_bytes: summary.moved_segments.saturating_mul(segment_bytes),
            survives_one_loss: summary.replicas_min > 1
                && self.costs.attention.len() > 1
                && leaves_room(&rooms, placement, num_segments),
        }
    }

    /// Why this cut, these replicas, these shares.
    fn reasons(&self, cut: u8, wish: PlanWish) -> Vec<String> {
        let (intent, workers) = (self.view.intent, self.view.candidates(self.group));
        let source = |wished: bool, meant: bool| match (wished, meant) {
            (true, _) => "as asked for here",
            (_, true) => "as the intent asks",
            _ => "as configured",
        };
        let replicas = self.view.policy().replicas;
        let asked = source(wish.replicas.is_some(), intent.replicas.is_some());
        let mut why = vec![format!("replicas: {replicas}, {asked}")];
        why.push(match self.view.policy().slices_per_expert {
            Some(_) => {
                let meant = intent.slices_per_expert.is_some();
                let asked = source(wish.slices_per_expert.is_some(), meant);
                format!("slices per expert: {cut}, {asked}")
            }
            None => format!(
                "slices per expert: {cut}, the fewest that give each of {} workers work in every \
                 layer and fit, and no fewer than now",
                workers.len()
            ),
        });
        let figures = self.view.figures;
        let measured = workers
            .iter()
            .filter(|w| figures.speed(&w.id).is_some())
            .count();
        why.push(match measured {
            0 => "shares: by memory, no worker has measured its speed".to_owned(),
            n => format!(
                "shares: by speed within memory, measured on {n} of {} workers",
                workers.len()
            ),
        });
        why.push(match &self.costs.expert_load {
            None => "expert loads: taken for equal, nothing was routed lately".to_owned(),
            Some(loads) => {
                let highest = loads.iter().copied().fold(0.0, f32::max);
                format!("expert loads: the hottest has {highest:.1} times the mean of its layer")
            }
        });
        why
    }
}

fn comparison(plan: &Promise, now: Option<&Promise>) -> Vec<String> {
    let Some(now) = now else {
        return Vec::new();
    };
    let gain = 100.0 * (1.0 - plan.layer_us / now.layer_us.max(f64::MIN_POSITIVE));
    let bar = 100.0 * REBALANCE_GAIN;
    let minutes = REBALANCE_EVERY.as_secs() / 60;
    vec![
        format!(
            "experts of a layer: {:.0} us for {PLAN_TOKENS} tokens, {:.0} us now, {gain:.0} % less",
            plan.layer_us, now.layer_us
        ),
        format!(
            "for load and speed alone nothing moves below {bar:.0} %, nor within {minutes} minutes \
             of the last change"
        ),
    ]
}

/// What would be faster than the planner's choice, if anything noticeably is.
fn fastest(candidates: &[Candidate], chosen: usize, plan: &Promise) -> Option<String> {
    let known = candidates.iter().enumerate().filter(|(i, _)| *i != chosen);
    let known = known.filter_map(|(_, c)| Some((c, c.promise.as_ref().ok()?)));
    let (best, promise) = known.min_by(|a, b| a.1.layer_us.total_cmp(&b.1.layer_us))?;
    let is_better = promise.layer_us < plan.layer_us * (1.0 - REBALANCE_GAIN);
    is_better.then(|| {
        format!(
            "faster would be {} slices per expert with {} replicas, {:.0} us: the planner takes what \
             the intent or the configuration asks for",
            best.slices_per_expert, best.replicas, promise.layer_us
        )
    })
}

fn cut_of(placement: &Placement) -> u8 {
    let most = placement.experts.iter().map(Vec::len).max().unwrap_or(1);
    u8::try_from(most).unwrap_or(u8::MAX)
}
