//! What this worker has measured of itself, from counters that exist anyway. Once there are figures, never
//! looks more often than every half minute: each record is read by everybody.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tramontane_coordination::registry::{LINK_US_MAX, SEGMENT_NS_MAX};
use tramontane_coordination::{ExpertLoad, Measured};

use crate::state::Node;

/// How often figures are taken again.
const MEASURE_EVERY: Duration = Duration::from_secs(30);
/// After this time a choice of an expert counts half.
const HALF_LIFE: Duration = Duration::from_secs(120);
/// Choices of the mean expert before loads are worth telling: fewer are chance.
const CHOSEN_MIN: f64 = 64.0;

/// Keeps the counts of the last minutes.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    /// What the counters said at the last look.
    seen: Vec<u64>,
    /// Choices of each expert, older ones counting less.
    recent: Vec<f64>,
    looked: Option<Instant>,
    /// When the figures were last handed out complete.
    told: Option<Instant>,
}

impl Meter {
    /// The figures at `now`, when it is time for them: often until there are any, then now and then.
    pub(crate) fn look(&mut self, node: &Node, now: Instant) -> Option<Measured> {
        let is_fresh = |at: Instant| now.saturating_duration_since(at) < MEASURE_EVERY;
        if self.told.is_some_and(is_fresh) {
            return None;
        }
        let exchange = node.exchange();
        let counters = exchange.as_ref().map(|stats| &stats.chosen[..]);
        let counters = counters.unwrap_or_default().iter();
        let counts: Vec<u64> = counters.map(|n| n.load(Ordering::Relaxed)).collect();
        self.count(&counts, now);
        let link = exchange.as_ref().map(|stats| &stats.link_us);
        let half = node.roles().experts.then_some(&node.experts);
        let probed = || half.and_then(|half| half.store.probed_ns());
        let measured = Measured {
            segment_ns: half
                .and_then(|half| half.server.segment_ns())
                .or_else(probed)
                // A pause in the middle of a call is no speed; a record with it would be refused.
                .map(|ns| ns.clamp(1, SEGMENT_NS_MAX)),
            link_us: link
                .map(|us| us.load(Ordering::Relaxed).min(LINK_US_MAX))
                .filter(|us| *us > 0),
            expert_load: self.load(node),
        };
        let is_complete = (half.is_none() || measured.segment_ns.is_some())
            && (exchange.is_none() || measured.expert_load.is_some());
        self.told = is_complete.then_some(now);
        Some(measured)
    }

    /// Adds what was chosen since the last look, when that was worth less and less.
    fn count(&mut self, counts: &[u64], now: Instant) {
        self.seen.resize(counts.len(), 0);
        self.recent.resize(counts.len(), 0.0);
        let passed = now.saturating_duration_since(self.looked.replace(now).unwrap_or(now));
        let kept = 0.5_f64.powf(passed.as_secs_f64() / HALF_LIFE.as_secs_f64());
        for ((recent, seen), &count) in self.recent.iter_mut().zip(&mut self.seen).zip(counts) {
            *recent = *recent * kept + count.saturating_sub(*seen) as f64;
            *seen = count;
        }
    }

    fn load(&self, node: &Node) -> Option<ExpertLoad> {
        let sum: f64 = self.recent.iter().sum();
        let geometry = &node.geometry;
        let is_enough = sum >= CHOSEN_MIN * self.recent.len() as f64;
        is_enough
            .then(|| ExpertLoad::of(&self.recent, geometry.num_experts, geometry.top_k))
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_count_less_as_they_grow_old() {
        let (mut meter, begin) = (Meter::default(), Instant::now());
        meter.count(&[100, 0], begin);
        meter.count(&[100, 40], begin + HALF_LIFE);
        assert_eq!(meter.recent, [50.0, 40.0]);
        meter.count(&[100, 40], begin + HALF_LIFE * 3);
        assert_eq!(meter.recent, [12.5, 10.0]);
    }
}
