//! How keys and values are kept between steps, and what that does to their numbers. Holds none of them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::KV_PAGE_TOKENS;

/// How the KV cache stores keys and values. Part of the numeric class, see [`class_of`](Self::class_of).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvFormat {
    /// binary16, finite magnitudes beyond 65,504 stored as that. Keys and values are activations of a few hundred at most,
    /// and three more bits than bfloat16 has are worth more there than its range. The reference backend keeps
    /// binary32 instead, as it does with weights.
    #[default]
    F16,
    /// Signed bytes with one f32 scale per token and head, see [`Q8Head`]: half the memory of f16.
    Q8,
}

impl KvFormat {
    /// The numeric class of a backend of class `class` that keeps keys and values so.
    #[must_use]
    pub fn class_of(self, class: &str) -> String {
        match self {
            Self::F16 => class.to_owned(),
            Self::Q8 => format!("{class}-kv8"),
        }
    }

    /// Bytes of the keys of one page and one head, in whole cache lines.
    #[must_use]
    pub const fn key_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::F16 => KV_PAGE_TOKENS * head_dim * 2,
            Self::Q8 => KV_PAGE_TOKENS * (head_dim.next_multiple_of(4) + size_of::<f32>()),
        }
    }

    /// Bytes of the values of one page and one head, in whole cache lines.
    #[must_use]
    pub const fn value_bytes(self, head_dim: usize) -> usize {
        let padded = head_dim.next_multiple_of(VALUE_LANES);
        match self {
            Self::F16 => KV_PAGE_TOKENS * padded * 2,
            Self::Q8 => KV_PAGE_TOKENS * (padded + size_of::<f32>()),
        }
    }
}

/// Values are padded to whole vectors of this many numbers.
const VALUE_LANES: usize = 16;

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F16 => "f16",
            Self::Q8 => "q8",
        })
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "f16" => Ok(Self::F16),
            "q8" => Ok(Self::Q8),
            other => Err(format!("kv format must be f16 or q8, got {other:?}")),
        }
    }
}

/// How the key or value of one token and one head is rounded: `d = amax / 127` in f32, `q = round(x (1 / d))`,
/// ties to even; the number is `q d`. A head of zeros has scale 0; one with a number that is not finite has
/// scale NaN; `q` is 0 in both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Q8Head {
    /// What one step is worth.
    pub scale: f32,
    /// Its inverse, or 0.
    inverse: f32,
}

/// Partial results of a pass over a head: as many as the widest vectors have lanes.
const LANES: usize = 16;

impl Q8Head {
    /// Finds the scale of a head.
    #[must_use]
    pub fn new(x: &[f32]) -> Self {
        let mut largest = [0.0_f32; LANES];
        let mut poison = [0.0_f32; LANES];
        for x in x.chunks(LANES) {
            for ((largest, poison), x) in largest.iter_mut().zip(&mut poison).zip(x) {
                *largest = if x.abs() > *largest {
                    x.abs()
                } else {
                    *largest
                };
                // NaN where x is not finite, and stays it.
                *poison += x * 0.0;
            }
        }
        let amax = largest.iter().fold(0.0, |a: f32, &b| a.max(b));
        let scale = amax / 127.0 + poison.iter().sum::<f32>();
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        if scale > 0.0 && inverse.is_infinite() {
            // Too small to be told from zero.
            return Self {
                scale: 0.0,
                inverse: 0.0,
            };
        }
        Self { scale, inverse }
    }

    /// Rounds one number of the head.
    #[inline]
    #[must_use]
    pub fn q(self, x: f32) -> i8 {
        /// The sum with it has the rounded number in its low bits.
        const TO_BITS: f32 = 12_582_912.0; // 1.5 * 2^23
        if self.inverse == 0.0 {
            return 0;
        }
        (x * self.inverse + TO_BITS).to_bits() as i8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rounded_head_is_within_half_a_step() {
        let x: Vec<f32> = (0..70).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
        let head = Q8Head::new(&x);
        let q: Vec<i8> = x.iter().map(|&x| head.q(x)).collect();
        assert!(q.contains(&127) || q.contains(&-127));
        for (x, q) in x.iter().zip(q) {
            assert_eq!(q, (x * (1.0 / head.scale)).round_ties_even() as i8);
            assert!((x - f32::from(q) * head.scale).abs() <= 0.501 * head.scale);
        }
    }

    #[test]
    fn zeros_stay_zeros_and_what_is_not_finite_is_nan() {
        for zero in [0.0, 1e-45] {
            let head = Q8Head::new(&[zero; 3]);
            assert_eq!((head.scale, head.q(zero)), (0.0, 0));
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let head = Q8Head::new(&[1.0, bad, 2.0]);
            assert!(head.scale.is_nan());
            assert_eq!((head.q(1.0), head.q(bad)), (0, 0));
        }
    }

    #[test]
    fn formats_have_names_sizes_and_classes() {
        for format in [KvFormat::F16, KvFormat::Q8] {
            assert_eq!(format.to_string().parse(), Ok(format));
        }
        assert!("bf16".parse::<KvFormat>().is_err());
        assert_eq!(
            KvFormat::F16.key_bytes(64) + KvFormat::F16.value_bytes(64),
            16_384
        );
        assert_eq!(
            KvFormat::Q8.key_bytes(64) + KvFormat::Q8.value_bytes(64),
            8_704
        );
        assert_eq!(KvFormat::Q8.value_bytes(14), 64 * 20);
        assert_eq!(KvFormat::Q8.class_of("cpu-q8"), "cpu-q8-kv8");
        assert_eq!(KvFormat::F16.class_of("cpu-q8"), "cpu-q8");
    }
}
