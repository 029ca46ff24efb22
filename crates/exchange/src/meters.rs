//! Running figures of what calls cost, for those who decide where experts live. Never allocates for a
//! known peer, takes no lock, reads no clock.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tramontane_types::WorkerId;

/// A new sample counts one part in this many of a running mean: some seconds of decoding.
const MEAN_SAMPLES: f64 = 64.0;
/// A running median moves by one part in this many with each sample.
const MEDIAN_STEPS: f64 = 32.0;
/// The median over peers is taken again after this many samples.
const MEDIAN_EVERY: u32 = 64;
/// Peers that are known before all are forgotten.
const PEERS_MAX: usize = 1024;

/// A running mean of samples above 0: one thread at a time notes, any thread reads.
#[derive(Debug, Default)]
pub(crate) struct Mean {
    /// Bits of an f64; 0 before the first sample.
    bits: AtomicU64,
}

impl Mean {
    pub(crate) fn note(&self, sample: f64) {
        let known = f64::from_bits(self.bits.load(Ordering::Relaxed));
        let mean = if known > 0.0 {
            known + (sample - known) / MEAN_SAMPLES
        } else {
            sample
        };
        self.bits.store(mean.to_bits(), Ordering::Relaxed);
    }

    /// The mean, rounded; `None` before the first sample.
    pub(crate) fn get(&self) -> Option<u64> {
        let mean = f64::from_bits(self.bits.load(Ordering::Relaxed));
        (mean > 0.0).then(|| mean.round().max(1.0) as u64)
    }
}

/// How long calls to each peer are under way: running medians, since a few trips are very long.
#[derive(Debug, Default)]
pub(crate) struct Links {
    trips_us: HashMap<WorkerId, f64>,
    num_samples: u32,
}

impl Links {
    /// Notes a trip; now and then says what is usual, over all peers.
    pub(crate) fn note(&mut self, peer: &WorkerId, trip: Duration) -> Option<u64> {
        let sample = trip.as_secs_f64() * 1e6;
        if let Some(usual) = self.trips_us.get_mut(peer) {
            let step = (*usual / MEDIAN_STEPS).max(0.1);
            *usual += step * (sample - *usual).signum();
        } else {
            if self.trips_us.len() >= PEERS_MAX {
                self.trips_us.clear();
            }
            self.trips_us.insert(peer.clone(), sample);
        }
        let due = self.num_samples.is_multiple_of(MEDIAN_EVERY);
        self.num_samples = self.num_samples.wrapping_add(1);
        due.then(|| self.median())
    }

    fn median(&self) -> u64 {
        let mut usual: Vec<f64> = self.trips_us.values().copied().collect();
        usual.sort_by(f64::total_cmp);
        let middle = usual.get(usual.len() / 2).copied().unwrap_or_default();
        middle.round().max(1.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in 0..1 that look like chance.
    fn noise() -> impl FnMut() -> f64 {
        let mut state = 1_u32;
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24)
        }
    }

    #[test]
    fn a_mean_follows_its_samples_and_not_their_noise() {
        let (mean, mut noise) = (Mean::default(), noise());
        assert_eq!(mean.get(), None);
        mean.note(1000.0);
        assert_eq!(mean.get(), Some(1000), "the first sample counts whole");
        for _ in 0..1000 {
            mean.note(1000.0 * (0.8 + 0.4 * noise()));
            let got = mean.get().unwrap();
            assert!((900..1100).contains(&got), "{got}");
        }
        for _ in 0..1000 {
            mean.note(3000.0);
        }
        assert_eq!(mean.get(), Some(3000));
    }

    #[test]
    fn the_usual_trip_is_no_outliers_and_no_single_peers() {
        let (mut links, mut noise) = (Links::default(), noise());
        let mut usual = None;
        for n in 0..64 * 100 {
            let peer = WorkerId::new(["a", "b", "c"][n % 3]);
            let us = [60.0, 80.0, 5000.0][n % 3] * (0.8 + 0.4 * noise());
            let us = if noise() < 0.02 { us * 1000.0 } else { us };
            usual = links
                .note(&peer, Duration::from_secs_f64(us / 1e6))
                .or(usual);
        }
        let usual = usual.unwrap();
        assert!((70..90).contains(&usual), "{usual}");
    }
}
