//! Draws a token with the probability that its logit says. Every sum has one order, which the threads of a GPU can follow too,
//! and every operation one rounding: whoever draws with the same number draws the same token.

use tramontane_types::TokenId;

use super::{Choice, SampleError, argmax, check_numbers};

/// Below this, `exp` counts as zero: its result would have no weight next to 1.
const EXP_MIN: f64 = -700.0;
/// Weights of a chunk, and chunks of a group.
const CHUNK: usize = 32;

/// What decides a draw beside the logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multinomial {
    /// More than 0.
    pub temperature: f32,
    /// Tokens of less than this fraction of the best probability are left out; 0 to 1.
    pub min_p: f32,
    /// In `[0, 1)`.
    pub uniform: f64,
}

/// The token that a draw falls on.
///
/// # Errors
/// As [`best`](super::best).
pub fn multinomial(logits: &[f32], draw: &Multinomial) -> Choice {
    check_numbers(logits)?;
    let best = argmax(logits).filter(|(_, logit)| *logit > f32::NEG_INFINITY);
    let (_, max) = best.ok_or(SampleError::NoCandidate)?;
    let scale = Scale::new(max, draw.temperature);
    let min = f64::from(draw.min_p);
    let weight = |&logit| at_least(scale.weight(logit), min);
    let weights: Vec<f64> = logits.iter().map(weight).collect();
    let picked = Sums::default().pick(&weights, draw.uniform);
    picked
        .map(|id| id as TokenId)
        .ok_or(SampleError::NoCandidate)
}

/// Weights relative to the best token's, whose weight is 1.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    max: f64,
    per_temperature: f64,
}

impl Scale {
    /// For the highest logit, and a temperature above 0.
    #[must_use]
    pub fn new(max: f32, temperature: f32) -> Self {
        Self {
            max: f64::from(max),
            per_temperature: per_temperature(temperature),
        }
    }

    /// `e^((logit - max) / temperature)`.
    #[inline]
    #[must_use]
    pub fn weight(self, logit: f32) -> f64 {
        exp((f64::from(logit) - self.max) * self.per_temperature)
    }
}

/// What differences of logits are multiplied with.
#[must_use]
pub fn per_temperature(temperature: f32) -> f64 {
    1.0 / f64::from(temperature)
}

/// A weight, or 0 where it is less than `min`.
#[inline]
#[must_use]
pub fn at_least(weight: f64, min: f64) -> f64 {
    if weight >= min { weight } else { 0.0 }
}

/// Memory for sums of weights: of chunks of 32, and of groups of 32 chunks.
#[derive(Debug, Default)]
pub struct Sums {
    chunks: Vec<f64>,
    groups: Vec<f64>,
}

impl Sums {
    /// The index that a number in `[0, 1)` falls on; `None` where all weights are 0.
    ///
    /// A chunk's weights are added in their order, then a group's chunks, then the groups: the total. Of the groups, the
    /// one is taken that brings the sum beyond `uniform * total`; of its chunks, and of the weights of that, alike, on top of
    /// what lies before them.
    pub fn pick(&mut self, weights: &[f64], uniform: f64) -> Option<usize> {
        add_chunks(weights, &mut self.chunks);
        add_chunks(&self.chunks, &mut self.groups);
        let target = uniform * sum(&self.groups);
        let mut below = 0.0;
        let group = find(&self.groups, target, &mut below)?;
        let chunk = find_in(&self.chunks, group, target, &mut below)?;
        find_in(weights, chunk, target, &mut below)
    }
}

fn sum(weights: &[f64]) -> f64 {
    weights.iter().fold(0.0, |sum, weight| sum + weight)
}

fn add_chunks(weights: &[f64], sums: &mut Vec<f64>) {
    sums.clear();
    sums.extend(weights.chunks(CHUNK).map(sum));
}

/// As [`find`], among those of one chunk; the index among all.
fn find_in(weights: &[f64], chunk: usize, target: f64, below: &mut f64) -> Option<usize> {
    let of_chunk = weights.chunks(CHUNK).nth(chunk)?;
    find(of_chunk, target, below).map(|i| chunk * CHUNK + i)
}

/// The first weight that brings the sum beyond `target`, or the last that is not 0. `below` is the sum of all before the
/// first, then that of all before the one that was found.
fn find(weights: &[f64], target: f64, below: &mut f64) -> Option<usize> {
    let mut found = None;
    let mut sum = *below;
    for (i, &weight) in weights.iter().enumerate() {
        if weight > 0.0 {
            (found, *below) = (Some(i), sum);
            sum += weight;
            if sum > target {
                break;
            }
        }
    }
    found
}

/// `e^x` for `x <= 0` (NaN not allowed), to about one unit in the last place, with the same bits on every machine: the C
/// library's depend on it.
///
/// `x = k ln 2 + r` with `|r| <= ln 2 / 2`, then the Taylor polynomial of degree 13 (its remainder is
/// below 2^-58) in Horner's form, scaled by `2^k`.
#[inline]
#[must_use]
pub fn exp(x: f64) -> f64 {
    /// Adding it rounds to an integer, which then stands in the low bits of the sum.
    const ROUND: f64 = 6_755_399_441_055_744.0; // 1.5 * 2^52
    /// ln 2 in two parts; `k * LN2_HI` is exact.
    const LN2_HI: f64 = 6.931_471_803_691_238e-1;
    const LN2_LO: f64 = 1.908_214_929_270_587_7e-10;
    const COEFFICIENTS: [f64; 13] = [
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    let clamped = x.max(EXP_MIN);
    let shifted = clamped * std::f64::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = (clamped - k * LN2_HI) - k * LN2_LO;
    let mut sum = 1.0 / 6_227_020_800.0;
    for c in COEFFICIENTS {
        sum = sum * r + c;
    }
    let scale = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52); // 2^k
    if x < EXP_MIN { 0.0 } else { sum * scale }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_the_library() {
        let mut x = 0.0_f64;
        while x > -690.0 {
            let (got, expected) = (exp(x), x.exp());
            assert!(
                (got / expected - 1.0).abs() < 4e-16,
                "exp({x}) = {got}, expected {expected}"
            );
            x -= 0.013_7;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e30), 0.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
    }

    /// By integers, whose sums are exact in any order.
    #[test]
    fn a_number_falls_on_the_weight_that_is_there() {
        let mut sums = Sums::default();
        for len in [1, 31, 32, 33, 1023, 1024, 1025, 5000] {
            let weights: Vec<f64> = (0..len).map(|i| f64::from((i * 7 + 3) % 5)).collect();
            let total = sum(&weights);
            let mut before = 0.0;
            for (i, &weight) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
                let at = |place: f64| (before + place * weight) / total;
                // The middle of its share; of the first and last thousandth too.
                for uniform in [at(0.001), at(0.5), at(0.999)] {
                    assert_eq!(sums.pick(&weights, uniform), Some(i), "{uniform} of {len}");
                }
                before += weight;
            }
        }
        assert_eq!(sums.pick(&[0.0; 70], 0.5), None);
        assert_eq!(sums.pick(&[], 0.0), None);
    }

    #[test]
    fn the_largest_number_falls_on_the_last_weight_whatever_was_rounded() {
        let mut sums = Sums::default();
        let largest = 1.0 - f64::EPSILON / 2.0;
        let mut weights: Vec<f64> = (0..3000).map(|i| exp(-f64::from(i % 97) * 0.37)).collect();
        weights[2990..].fill(0.0);
        assert_eq!(sums.pick(&weights, largest), Some(2989));
        assert_eq!(sums.pick(&weights, 0.0), Some(0));
        weights[2989] = 1e-300;
        // Too light to be seen, and yet never what is behind it.
        let picked = sums.pick(&weights, largest);
        assert!(picked <= Some(2989), "{picked:?}");
    }

    #[test]
    fn a_draw_leaves_out_what_is_too_unlikely_and_refuses_what_is_no_row() {
        let draw = |logits: &[f32], min_p, uniform| {
            let draw = Multinomial {
                temperature: 1.0,
                min_p,
                uniform,
            };
            multinomial(logits, &draw)
        };
        let logits = [0.3_f32, 0.6, 0.1].map(f32::ln);
        let at = |min_p, numbers: [f64; 4]| numbers.map(|u| draw(&logits, min_p, u).unwrap());
        assert_eq!(at(0.0, [0.0, 0.29, 0.31, 0.95]), [0, 0, 1, 2]);
        assert_eq!(at(0.4, [0.0, 0.3, 0.34, 0.95]), [0, 0, 1, 1]);
        assert_eq!(at(1.0, [0.0, 0.3, 0.34, 0.95]), [1; 4]);
        let refused = Err(SampleError::NotFinite { id: 1 });
        assert_eq!(draw(&[0.0, f32::NAN, f32::INFINITY], 0.0, 0.5), refused);
        let none = Err(SampleError::NoCandidate);
        assert_eq!(draw(&[f32::NEG_INFINITY; 40], 0.0, 0.5), none);
    }
}
