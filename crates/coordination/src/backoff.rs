//! Growing pauses between attempts, with jitter so that a whole cluster does not retry at once.
//! Never decides to give up.

use std::cell::Cell;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// Pauses that double from `min` to `max`, each shortened by up to a quarter.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    min: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub(crate) const fn new(min: Duration, max: Duration) -> Self {
        Self {
            min,
            max,
            next: min,
        }
    }

    pub(crate) fn pause(&mut self) -> Duration {
        let full = self.next;
        self.next = (full * 2).min(self.max);
        let quarter_percent = (random() % 26) as u32;
        full - full * quarter_percent / 100
    }

    pub(crate) const fn reset(&mut self) {
        self.next = self.min;
    }
}

thread_local! {
    /// Where this thread's numbers come from, if a simulation has said so.
    static SEEDED: Cell<Option<u64>> = const { Cell::new(None) };
}

/// Odd constant of the Weyl sequence in SplitMix64 (Steele, Lea, Flood 2014).
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// Makes every random number that this crate takes on this thread follow from `seed`, so that a simulated
/// run can be repeated; `None` ends that. Only for simulations.
#[doc(hidden)]
pub fn seed_this_thread(seed: Option<u64>) {
    SEEDED.set(seed);
}

/// A number that differs from call to call and from process to process; not for secrets.
pub(crate) fn random() -> u64 {
    let Some(state) = SEEDED.get() else {
        return RandomState::new().build_hasher().finish();
    };
    let state = state.wrapping_add(GOLDEN_GAMMA);
    SEEDED.set(Some(state));
    let z = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seeded_thread_repeats_its_numbers() {
        let three = |seed| {
            seed_this_thread(seed);
            [random(), random(), random()]
        };
        assert_eq!(three(Some(7)), three(Some(7)));
        assert_ne!(three(Some(7)), three(Some(8)));
        assert_ne!(three(None), three(None));
    }

    #[test]
    fn pauses_double_up_to_the_limit() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_millis(350));
        for full in [100, 200, 350, 350] {
            let pause = backoff.pause().as_millis();
            assert!(
                pause >= full * 74 / 100 && pause <= full,
                "{pause} of {full}"
            );
        }
        backoff.reset();
        assert!(backoff.pause() <= Duration::from_millis(100));
    }
}
