//! What a worker has measured of itself, as far as placement needs it. Never exact: figures are rounded,
//! and follow what is measured only when it has changed noticeably, so that noise moves nothing.

use serde::{Deserialize, Serialize};

use super::record::ModelFacts;

/// A figure is replaced when the new one differs from it by more than this factor. Two samples of one
/// value with 20 % of noise differ by at most 1.5, and their rounding adds a little.
pub const NOTICEABLE: f64 = 1.6;
/// Loads of one expert, over the mean of its layer, that are no further apart than this are counting noise.
const NOTICEABLE_LOAD: f64 = 0.5;
/// Longest time of one segment that is believed.
pub const SEGMENT_NS_MAX: u64 = 10_000_000_000;
/// Longest trip of a call that is believed.
pub const LINK_US_MAX: u64 = 10_000_000;
/// Most rows that are believed.
pub const ROWS_MAX: u64 = 1 << 40;
/// Most experts (layers times experts of a layer) whose load is published, a byte each.
pub const LOAD_EXPERTS_MAX: usize = 12 * 1024;

/// The digits of [`ExpertLoad::levels`].
const DIGITS: &[u8; 64] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
/// The level of an expert that is chosen as often as the mean of its layer.
const MEAN_LEVEL: f64 = 16.0;

/// Figures of one worker; absent as long as there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Measured {
    /// Nanoseconds that its experts take for one segment in a call of few rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segment_ns: Option<u64>,
    /// Microseconds that its calls to others take beyond the time that those serve them: the usual peer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link_us: Option<u64>,
    /// Which experts its rows chose in the last minutes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<ExpertLoad>,
}

/// How often each expert was chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpertLoad {
    /// Rows that were routed lately, rounded to a power of two: the weight of this worker among all.
    pub rows: u64,
    /// Experts that a row chooses in each layer.
    pub top_k: u16,
    /// One digit per expert, layer-major: 16 times the square root of its load over the mean of its layer,
    /// which is fine near the mean and reaches 15 times of it.
    pub levels: String,
}

impl ExpertLoad {
    /// The load of `counts` (row-expert pairs, layer-major), or `None` when nothing was routed or the
    /// model has more than [`LOAD_EXPERTS_MAX`] experts.
    #[must_use]
    pub fn of(counts: &[f64], num_experts: usize, top_k: usize) -> Option<Self> {
        let num_layers = counts.len().checked_div(num_experts)?;
        let pairs: f64 = counts.iter().sum();
        let rows = pairs / (num_layers * top_k) as f64;
        if counts.len() > LOAD_EXPERTS_MAX || !(rows.is_finite() && rows >= 1.0) {
            return None;
        }
        let mut levels = String::with_capacity(counts.len());
        for layer in counts.chunks(num_experts) {
            let mean = layer.iter().sum::<f64>() / num_experts as f64;
            for count in layer {
                let relative = if mean > 0.0 { count / mean } else { 1.0 };
                let level = (relative.sqrt() * MEAN_LEVEL).round() as usize;
                levels.push(char::from(DIGITS[level.min(DIGITS.len() - 1)]));
            }
        }
        Some(Self {
            rows: rows.log2().round().exp2().min(ROWS_MAX as f64) as u64,
            top_k: u16::try_from(top_k).unwrap_or(u16::MAX),
            levels,
        })
    }

    /// Load of each expert over the mean of its layer, layer-major.
    pub fn relative(&self) -> impl Iterator<Item = f64> + '_ {
        self.levels.bytes().map(|digit| {
            let level = DIGITS.iter().position(|&d| d == digit).unwrap_or_default();
            (level as f64 / MEAN_LEVEL).powi(2)
        })
    }

    /// Whether `newer` tells another story than noise does.
    fn is_noticeably(&self, newer: &Self) -> bool {
        let apart = |(a, b): (f64, f64)| noticeably_apart(a, b);
        self.top_k != newer.top_k
            || self.levels.len() != newer.levels.len()
            || self.rows.max(newer.rows) / self.rows.min(newer.rows).max(1) >= 4
            || self.relative().zip(newer.relative()).any(apart)
    }
}

/// Whether the loads of one expert, over the mean of its layer, differ by more than noise. Rare experts
/// are counted too seldom to tell.
#[must_use]
pub fn noticeably_apart(a: f64, b: f64) -> bool {
    (a - b).abs() > NOTICEABLE_LOAD && a.max(b) > NOTICEABLE * a.min(b)
}

/// The figure to go on with: the known one, unless the new one is noticeably different.
#[must_use]
pub fn settled(known: Option<u64>, new: Option<u64>) -> Option<u64> {
    match (known, new) {
        (Some(known), Some(new)) => {
            let ratio = known.max(new) as f64 / known.min(new).max(1) as f64;
            Some(if ratio > NOTICEABLE { new } else { known })
        }
        (known, new) => new.or(known),
    }
}

impl Measured {
    /// The figures to publish after `new` was measured: those that have not changed noticeably stay.
    #[must_use]
    pub fn settle(&self, new: Self) -> Self {
        let load = match (&self.expert_load, new.expert_load) {
            (Some(known), Some(new)) if known.is_noticeably(&new) => Some(new),
            (Some(known), _) => Some(known.clone()),
            (None, new) => new,
        };
        Self {
            segment_ns: settled(self.segment_ns, new.segment_ns),
            link_us: settled(self.link_us, new.link_us),
            expert_load: load,
        }
    }

    /// Checks every figure against its limit.
    ///
    /// # Errors
    /// The rule that is broken, with the value.
    pub(super) fn validate(&self, model: &ModelFacts) -> Result<(), String> {
        if let Some(ns) = self
            .segment_ns
            .filter(|ns| !(1..=SEGMENT_NS_MAX).contains(ns))
        {
            return Err(format!("segment in {ns} ns, expected 1..={SEGMENT_NS_MAX}"));
        }
        if let Some(us) = self.link_us.filter(|us| *us > LINK_US_MAX) {
            return Err(format!("link of {us} us, expected at most {LINK_US_MAX}"));
        }
        let Some(load) = &self.expert_load else {
            return Ok(());
        };
        let (top_k, rows) = (usize::from(load.top_k), load.rows);
        if !(1..=model.num_experts).contains(&top_k) || !(1..=ROWS_MAX).contains(&rows) {
            return Err(format!("load of {rows} rows that choose {top_k} experts"));
        }
        let expected = model.num_layers * model.num_experts;
        let digits = load.levels.bytes().filter(|b| DIGITS.contains(b)).count();
        if load.levels.len() > LOAD_EXPERTS_MAX || load.levels.len() != digits || digits != expected
        {
            let got = load.levels.len();
            return Err(format!(
                "loads of {got} experts in {digits} digits, expected {expected}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_survive_their_rounding() {
        let counts = [100.0, 100.0, 100.0, 100.0, 640.0, 80.0, 80.0, 0.0];
        let load = ExpertLoad::of(&counts, 4, 2).unwrap();
        assert_eq!((load.rows, load.levels.len()), (256, 8));
        let relative: Vec<f64> = load.relative().collect();
        let expected = [1.0, 1.0, 1.0, 1.0, 3.2, 0.4, 0.4, 0.0];
        for (got, expected) in relative.iter().zip(expected) {
            assert!((got - expected).abs() <= 0.1, "{got} for {expected}");
        }
        assert_eq!(ExpertLoad::of(&[0.0; 8], 4, 2), None, "nothing was routed");
        let many = vec![9.0; LOAD_EXPERTS_MAX + 4];
        assert_eq!(ExpertLoad::of(&many, 4, 2), None, "too many to publish");
        let largest = ExpertLoad::of(&vec![9.0; 60 * 160], 160, 8).unwrap();
        assert_eq!(largest.levels.len(), 9600);
    }

    #[test]
    fn noise_of_a_fifth_is_not_noticeable_and_a_doubling_is() {
        let figures = |ns, link, hot| Measured {
            segment_ns: Some(ns),
            link_us: Some(link),
            expert_load: ExpertLoad::of(&[hot, 1000.0, 1000.0, 1000.0], 4, 2),
        };
        let known = figures(800, 80, 800.0);
        assert_eq!(known.settle(figures(1200, 120, 1200.0)), known);
        assert_eq!(known.settle(Measured::default()), known, "no news");
        let settled = known.settle(figures(1600, 80, 4000.0));
        assert_eq!(
            (settled.segment_ns, settled.link_us),
            (Some(1600), Some(80))
        );
        assert_ne!(settled.expert_load, known.expert_load);
    }
}
