//! The measured figures that plans are made from. Never follows noise: a figure stays as it is until the
//! newest one differs noticeably.

use std::collections::{BTreeMap, BTreeSet};

use tramontane_types::WorkerId;

use crate::balance::Costs;
use crate::registry::{Members, ModelFacts, WorkerRecord, noticeably_apart, settled};

/// Experts that a row is taken to choose before anybody has said: Mixtral's number.
const TOP_K_ASSUMED: usize = 2;

/// What workers have measured, as far as it counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Figures {
    segment_ns: BTreeMap<WorkerId, u64>,
    link_us: BTreeMap<WorkerId, u64>,
    /// By model fingerprint.
    loads: BTreeMap<String, Load>,
}

/// Load of each expert over the mean of its layer, layer-major.
#[derive(Clone, Debug, PartialEq)]
struct Load {
    relative: Vec<f32>,
    top_k: usize,
}

impl Figures {
    /// The figures to go on with now that `members` say what they say.
    #[must_use]
    pub fn follow(&self, members: &Members) -> Self {
        let mut next = Self::default();
        for (id, worker) in &members.workers {
            let (known, new) = (self.segment_ns.get(id), worker.measured.segment_ns);
            if let Some(ns) = settled(known.copied(), new) {
                next.segment_ns.insert(id.clone(), ns);
            }
            let (known, new) = (self.link_us.get(id), worker.measured.link_us);
            if let Some(us) = settled(known.copied(), new) {
                next.link_us.insert(id.clone(), us);
            }
        }
        let models: BTreeSet<&String> = members
            .workers
            .values()
            .map(|worker| &worker.model.fingerprint)
            .collect();
        for model in models {
            let known = self.loads.get(model);
            let new = sum_of_loads(members, model);
            let load = match (known, new) {
                (Some(known), Some(new)) if known.is_noticeably(&new) => Some(new),
                (Some(known), _) => Some(known.clone()),
                (None, new) => new,
            };
            if let Some(load) = load {
                next.loads.insert(model.clone(), load);
            }
        }
        next
    }

    /// Slices per second of a worker, in a unit of no meaning.
    pub(super) fn speed(&self, id: &WorkerId) -> Option<f32> {
        let ns = *self.segment_ns.get(id)?;
        Some(1e9 / ns.max(1) as f32)
    }

    /// Load of each expert of a model.
    pub(super) fn load(&self, model: &ModelFacts) -> Option<Vec<f32>> {
        let load = self.loads.get(&model.fingerprint)?;
        let fits = load.relative.len() == model.num_layers * model.num_experts;
        fits.then(|| load.relative.clone())
    }

    /// Whether anything is known of these workers and their model.
    pub(super) fn know(&self, workers: &[&WorkerRecord], model: &ModelFacts) -> bool {
        let measured = |w: &&WorkerRecord| self.segment_ns.contains_key(&w.id);
        workers.iter().any(measured) || self.load(model).is_some()
    }

    /// What predicting needs of a model and the workers of `members`.
    pub(super) fn costs(&self, members: &Members, model: &ModelFacts) -> Costs {
        let us = |ns: &u64| *ns as f64 / 1e3;
        let attends = members
            .workers
            .values()
            .filter(|w| w.roles.attention && w.state.is_staying());
        let of_model = attends.filter(|w| w.model.fingerprint == model.fingerprint);
        let top_k = self.loads.get(&model.fingerprint).map(|load| load.top_k);
        Costs {
            segment_us: self
                .segment_ns
                .iter()
                .map(|(id, ns)| (id.clone(), us(ns)))
                .collect(),
            link_us: self
                .link_us
                .iter()
                .map(|(id, us)| (id.clone(), *us as f64))
                .collect(),
            expert_load: self.load(model),
            top_k: top_k.unwrap_or(TOP_K_ASSUMED).min(model.num_experts),
            attention: of_model.map(|w| w.id.clone()).collect(),
            num_segments: model.num_segments,
            rest_us: 0.0,
        }
    }
}

impl Load {
    fn is_noticeably(&self, newer: &Self) -> bool {
        let apart = |(a, b): (&f32, &f32)| noticeably_apart(f64::from(*a), f64::from(*b));
        self.top_k != newer.top_k
            || self.relative.len() != newer.relative.len()
            || self.relative.iter().zip(&newer.relative).any(apart)
    }
}

/// The loads of all workers of a model, each counting as much as it has rows.
fn sum_of_loads(members: &Members, model: &str) -> Option<Load> {
    let of_model = members
        .workers
        .values()
        .filter(|w| w.model.fingerprint == model);
    let loads = of_model.filter_map(|w| w.measured.expert_load.as_ref());
    let (mut sum, mut rows, mut top_k) = (Vec::new(), 0.0, 0);
    for load in loads {
        // Records of one model have one shape: they were checked against it.
        sum.resize(load.levels.len().max(sum.len()), 0.0);
        for (sum, relative) in sum.iter_mut().zip(load.relative()) {
            *sum += relative * load.rows as f64;
        }
        rows += load.rows as f64;
        top_k = top_k.max(usize::from(load.top_k));
    }
    let relative = sum.iter().map(|sum: &f64| (sum / rows) as f32).collect();
    (rows > 0.0).then_some(Load { relative, top_k })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::registry::record_for_tests as record;
    use crate::registry::{ExpertLoad, Measured};

    fn members(figures: &[(&str, u64, [f64; 8])]) -> Members {
        let worker = |(id, ns, counts): &(&str, u64, [f64; 8])| {
            let mut worker = record(id);
            worker.measured = Measured {
                segment_ns: Some(*ns),
                link_us: None,
                expert_load: ExpertLoad::of(counts, 4, 2),
            };
            (worker.id.clone(), Arc::new(worker))
        };
        Members {
            workers: figures.iter().map(worker).collect(),
            synced: true,
            ..Members::default()
        }
    }

    #[test]
    fn loads_are_summed_by_rows_and_figures_of_those_who_left_are_forgotten() {
        let even = [64.0; 8];
        let skewed = [768.0, 0.0, 0.0, 0.0, 192.0, 192.0, 192.0, 192.0];
        let both = members(&[("a", 1000, even), ("b", 2000, skewed)]);
        let figures = Figures::default().follow(&both);
        let model = both.workers[&WorkerId::new("a")].model.clone();
        // 128 and 384 rows; the larger is rounded to 512.
        let load = figures.load(&model).unwrap();
        assert!((load[0] - (1.0 + 4.0 * 4.0) / 5.0).abs() < 0.1, "{load:?}");
        assert_eq!(figures.speed(&WorkerId::new("b")), Some(500_000.0));
        let alone = figures.follow(&members(&[("a", 1000, even)]));
        assert_eq!(alone.speed(&WorkerId::new("b")), None);
        let load = alone.load(&model).unwrap();
        assert!((load[0] - 1.0).abs() < 0.1, "{load:?}");
    }

    #[test]
    fn a_noise_of_a_fifth_changes_no_figure() {
        let mut state = 1_u32;
        let mut noisy = |value: f64| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            value * (0.8 + 0.4 * f64::from(state >> 8) / f64::from(1 << 24))
        };
        let mut look = || {
            let counts = [300.0, 100.0, 100.0, 20.0, 100.0, 100.0, 100.0, 100.0];
            members(&[("a", noisy(1000.0) as u64, counts.map(&mut noisy))])
        };
        let first = Figures::default().follow(&look());
        for _ in 0..1000 {
            assert_eq!(first.follow(&look()), first);
        }
    }
}
