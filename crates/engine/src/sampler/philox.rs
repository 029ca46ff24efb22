//! Philox4x32-10, a counter-based generator: the same seed and counter give the same bits on every
//! machine, in any order. Holds no state.
//!
//! Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC11,
//! <https://doi.org/10.1145/2063384.2063405>.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Golden ratio and sqrt(3) - 1, added to the key each round.
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

/// One block of the generator.
pub(crate) fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let [a, b, c, d] = counter;
        let (hi0, lo0) = wide_mul(MULTIPLIERS[0], a);
        let (hi1, lo1) = wide_mul(MULTIPLIERS[1], c);
        counter = [hi1 ^ b ^ key[0], lo1, hi0 ^ d ^ key[1], lo0];
        key = [
            key[0].wrapping_add(KEY_STEPS[0]),
            key[1].wrapping_add(KEY_STEPS[1]),
        ];
    }
    counter
}

/// A number in `[0, 1)` for the token at `position` of the output of a sequence of this seed.
pub(crate) fn uniform(seed: u64, position: u32) -> f64 {
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    let key = [seed as u32, (seed >> 32) as u32];
    let [a, b, ..] = philox4x32([position, 0, 0, 0], key);
    let bits = (u64::from(a) << 32 | u64::from(b)) >> 11; // 53 bits
    bits as f64 * UNIT
}

fn wide_mul(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    ((product >> 32) as u32, product as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123: counter, key, result.
    #[test]
    fn the_published_known_answers() {
        let ones = u32::MAX;
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32([ones; 4], [ones; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let mut counts = [0_u32; 10];
        for seed in 0..100_u64 {
            for position in 0..100 {
                let u = uniform(seed << 31, position);
                assert!((0.0..1.0).contains(&u));
                counts[(u * 10.0) as usize] += 1;
            }
        }
        // Standard deviation of a count is 30.
        assert!(
            counts.iter().all(|&n| (850..1150).contains(&n)),
            "{counts:?}"
        );
    }
}
