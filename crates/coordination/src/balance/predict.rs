//! How long a layer takes on a placement, before anybody has moved anything. Pure, and simple enough to
//! compare placements with: not exact.
//!
//! For a decode batch of `B` tokens, spread evenly over the attention workers, a layer takes
//!
//! ```text
//! rest + max over workers w of ( link(w) + segment(w) * sum over slices s on w of len(s) * reads(q(s, w)) )
//! q(s, w) = top_k * load share of the expert * share of the callers that ask w for s
//! reads(q) = max( 1 - (1 - q)^B, B * q / READ_ROWS )
//! ```
//!
//! - `reads`: how often the weights of a slice are read. Few rows cost one reading if there are any,
//!   many cost their products, [`READ_ROWS`] of them as much as a reading.
//! - A caller computes what it holds itself and asks the other holders in turn, as the exchange does.
//! - `link` is added for workers that others ask. Calls are under way while experts compute, but the last
//!   answer is awaited, so a worker's trip and work add up.
//! - Experts are chosen independently of each other; the workers' work runs at the same time; `rest`
//!   (attention, norms, gate) is the same for all placements.

use std::collections::{BTreeMap, BTreeSet};

use tramontane_types::{Placement, SliceHolders, WorkerId};

/// Rows whose products take as long as reading the weights once.
pub const READ_ROWS: f64 = 8.0;
/// Time of one segment where nobody has measured any.
pub const SEGMENT_US_ASSUMED: f64 = 1000.0;
/// Trip of a call where nobody has measured any: a local network.
pub const LINK_US_ASSUMED: f64 = 100.0;

/// What the workers were measured at.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Microseconds of one segment of one row; others are taken for the median.
    pub segment_us: BTreeMap<WorkerId, f64>,
    /// Microseconds of a call's trip there and back; others are taken for the median.
    pub link_us: BTreeMap<WorkerId, f64>,
    /// Load of each expert, layer-major, in any unit; `None` means equally.
    pub expert_load: Option<Vec<f32>>,
    /// Experts that a row chooses.
    pub top_k: usize,
    /// Who sends rows.
    pub attention: BTreeSet<WorkerId>,
    /// Non-empty segments per expert.
    pub num_segments: u8,
    /// Microseconds of a layer that no placement changes.
    pub rest_us: f64,
}

/// Microseconds of one layer for `tokens` in all, the mean over the layers.
#[must_use]
pub fn predict(placement: &Placement, costs: &Costs, tokens: usize) -> f64 {
    let experts = placement.num_experts.max(1);
    let layers = placement.experts.chunks(experts);
    let num_layers = layers.len().max(1) as f64;
    let workers = Workers::of(placement, costs);
    let layer_us = |(layer, slices): (usize, &[Vec<SliceHolders>])| {
        let loads = costs.expert_load.as_ref();
        let loads = loads.and_then(|l| l.get(layer * experts..(layer + 1) * experts));
        workers.layer_us(slices, loads, costs, tokens)
    };
    let sum: f64 = layers.enumerate().map(layer_us).sum();
    sum / num_layers + costs.rest_us
}

/// The holders of a placement, by index.
struct Workers {
    segment_us: Vec<f64>,
    link_us: Vec<f64>,
    attends: Vec<bool>,
    num_attention: usize,
}

impl Workers {
    fn of(placement: &Placement, costs: &Costs) -> Self {
        let figures = |known: &BTreeMap<WorkerId, f64>, assumed: f64| -> Vec<f64> {
            let usual = median(known.values().copied()).unwrap_or(assumed);
            let of = |id| known.get(id).copied().unwrap_or(usual);
            placement.workers.iter().map(of).collect()
        };
        let attends = |id| costs.attention.contains(id);
        Self {
            segment_us: figures(&costs.segment_us, SEGMENT_US_ASSUMED),
            link_us: figures(&costs.link_us, LINK_US_ASSUMED),
            attends: placement.workers.iter().map(attends).collect(),
            num_attention: costs.attention.len(),
        }
    }

    fn layer_us(
        &self,
        experts: &[Vec<SliceHolders>],
        loads: Option<&[f32]>,
        costs: &Costs,
        tokens: usize,
    ) -> f64 {
        let total: f64 = loads.map_or(experts.len() as f64, |loads| {
            loads.iter().map(|&l| f64::from(l)).sum()
        });
        let mut work_us = vec![0.0; self.segment_us.len()];
        let mut is_asked = vec![false; self.segment_us.len()];
        for (expert, slices) in experts.iter().enumerate() {
            let load = loads.map_or(1.0, |loads| f64::from(loads[expert]));
            let chosen = (costs.top_k as f64 * load / total.max(f64::MIN_POSITIVE)).min(1.0);
            for slice in slices {
                let len = slice.range.end().min(costs.num_segments) - slice.range.begin();
                let own = |h: &&u16| self.attends[usize::from(**h)];
                let num_own = slice.holders.iter().filter(own).count();
                let others = self.num_attention.saturating_sub(num_own) as f64;
                // Without a single caller in sight, one from outside.
                let (others, callers) = match self.num_attention {
                    0 => (1.0, 1.0),
                    callers => (others, callers as f64),
                };
                let asked = others / slice.holders.len().max(1) as f64;
                for &holder in &slice.holders {
                    let holder = usize::from(holder);
                    let own = f64::from(u8::from(self.attends[holder]));
                    let q = chosen * (own + asked) / callers;
                    work_us[holder] += self.segment_us[holder] * f64::from(len) * reads(q, tokens);
                    is_asked[holder] |= asked > 0.0;
                }
            }
        }
        let trip = |holder: usize| {
            if is_asked[holder] {
                self.link_us[holder]
            } else {
                0.0
            }
        };
        let time = |holder: usize| work_us[holder] + trip(holder);
        (0..work_us.len()).map(time).fold(0.0, f64::max)
    }
}

/// How often a slice is read that a token asks for with probability `q`.
fn reads(q: f64, tokens: usize) -> f64 {
    let any = 1.0 - (1.0 - q).powf(tokens as f64);
    any.max(tokens as f64 * q / READ_ROWS)
}

/// The middle one, the upper of two.
pub(crate) fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use tramontane_types::{Epoch, SegmentRange, SliceHolders};

    use super::*;

    /// One layer; each expert whole, on these holders of a, b and c.
    fn placement(experts: &[&[u16]]) -> Placement {
        let slice = |holders: &&[u16]| {
            vec![SliceHolders {
                range: SegmentRange::WHOLE,
                holders: holders.to_vec(),
            }]
        };
        Placement {
            epoch: Epoch(1),
            numeric_class: "c".to_owned(),
            model: "m".to_owned(),
            num_layers: 1,
            num_experts: experts.len(),
            workers: ["a", "b", "c"].map(WorkerId::new).to_vec(),
            experts: experts.iter().map(slice).collect(),
        }
    }

    fn costs(attention: &[&str]) -> Costs {
        let by_worker = |us: [f64; 3]| {
            let ids = ["a", "b", "c"].map(WorkerId::new);
            ids.into_iter().zip(us).collect()
        };
        Costs {
            segment_us: by_worker([10.0, 10.0, 20.0]),
            link_us: by_worker([50.0, 60.0, 70.0]),
            expert_load: None,
            top_k: 1,
            attention: attention.iter().map(|id| WorkerId::new(id)).collect(),
            num_segments: 8,
            rest_us: 0.0,
        }
    }

    fn close(got: f64, expected: f64) {
        assert!((got - expected).abs() < 1e-6, "{got}, expected {expected}");
    }

    #[test]
    fn one_token_reads_each_expert_as_often_as_it_is_chosen() {
        // 2 experts, 1 chosen: 8 segments of 10 us at probability 1/2, on each of a and b.
        let apart = placement(&[&[0], &[1]]);
        // b is asked by a: 40 + 60.
        close(predict(&apart, &costs(&["a"]), 1), 100.0);
        // Alone, a reads 2 * 40 and asks nobody.
        let alone = placement(&[&[0], &[0]]);
        close(predict(&alone, &costs(&["a"]), 1), 80.0);
        let mut rest = costs(&["a"]);
        rest.rest_us = 7.0;
        close(predict(&alone, &rest, 1), 87.0);
        // c takes twice as long: 80 + 70.
        close(predict(&placement(&[&[0], &[2]]), &costs(&["a"]), 1), 150.0);
    }

    #[test]
    fn a_batch_reads_what_any_of_its_tokens_chose_and_many_rows_cost_their_products() {
        let apart = placement(&[&[0], &[1]]);
        // Two tokens: 80 us at 1 - 1/4, and the trip to b.
        close(predict(&apart, &costs(&["a"]), 2), 60.0 + 60.0);
        // 64 tokens: 32 rows, as long as four readings.
        close(predict(&apart, &costs(&["a"]), 64), 320.0 + 60.0);
    }

    #[test]
    fn replicas_share_what_callers_do_not_hold_themselves() {
        // Always chosen, held by a and b; only c calls: half of the time each, plus b's trip.
        let mut input = costs(&["c"]);
        let shared = placement(&[&[0, 1]]);
        close(predict(&shared, &input, 1), 40.0 + 60.0);
        // Both callers hold it: each computes its own rows, nobody is asked.
        input.attention = ["a", "b"].map(WorkerId::new).into();
        close(predict(&shared, &input, 1), 40.0);
    }

    #[test]
    fn a_hot_expert_makes_its_worker_the_slowest() {
        let mut input = costs(&["c"]);
        input.expert_load = Some(vec![3.0, 1.0]);
        let hot = predict(&placement(&[&[0], &[1]]), &input, 1);
        close(hot, 60.0 + 50.0);
        // A copy on b halves it on a; b has 30 + 20 and a longer trip.
        let copied = predict(&placement(&[&[0, 1], &[1]]), &input, 1);
        close(copied, 50.0 + 60.0);
    }
}
