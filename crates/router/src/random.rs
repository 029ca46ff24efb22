//! Numbers that differ from call to call and from process to process. Not for secrets.

use std::hash::{BuildHasher, Hasher, RandomState};

/// Odd constant of the Weyl sequence in SplitMix64 (Steele, Lea, Flood 2014).
const GOLDEN_GAMMA: u64 = 0x9E37_79B9_7F4A_7C15;

/// A random number: the standard library's hash keys come from the operating system.
pub(crate) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

/// Seed of the `choice`-th of `n` answers. The first has the seed of the request itself, so that a
/// request for one answer and the first of several agree.
pub(crate) const fn choice_seed(seed: u64, choice: u32) -> u64 {
    if choice == 0 {
        return seed;
    }
    let mut z = seed.wrapping_add(GOLDEN_GAMMA.wrapping_mul(choice as u64));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_choice_keeps_the_seed_and_the_others_differ() {
        assert_eq!(choice_seed(7, 0), 7);
        let seeds: std::collections::HashSet<u64> = (0..128).map(|i| choice_seed(7, i)).collect();
        assert_eq!(seeds.len(), 128);
        assert_eq!(choice_seed(7, 5), choice_seed(7, 5));
        assert_ne!(random(), random());
    }
}
