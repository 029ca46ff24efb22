//! Exponentials of logits with the same bits on every machine. Never calls the C library's `exp`
//! or `ln`, whose last bits depend on the machine.

/// Below this, `exp` counts as zero: its result would have no weight next to 1.
const EXP_MIN: f64 = -700.0;

/// `e^x` for `x <= 0` (NaN not allowed), to about one unit in the last place.
///
/// `x = k ln 2 + r` with `|r| <= ln 2 / 2`, then the Taylor polynomial of degree 13 (its remainder is
/// below 2^-58) in Horner's form, scaled by `2^k`.
#[inline]
pub(crate) fn exp(x: f64) -> f64 {
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

/// Sums that [`log_sum_exp`] keeps.
const LANES: usize = 8;

/// `ln(sum(exp(logits)))` of logits whose maximum is `max`: logit `i` is added to sum `i % 8`, in order of ids,
/// then the sums ascending.
pub(crate) fn log_sum_exp(logits: &[f32], max: f32) -> f64 {
    let max = f64::from(max);
    let mut sums = [0.0_f64; LANES];
    for logits in logits.chunks(LANES) {
        for (sum, &l) in sums.iter_mut().zip(logits) {
            *sum += exp(f64::from(l) - max);
        }
    }
    max + libm::log(sums.iter().sum())
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

    #[test]
    fn log_softmax_is_stable_for_large_logits() {
        let logits = [1000.0_f32, 1000.0, -1000.0];
        assert!((log_sum_exp(&logits, 1000.0) - (1000.0 + 2.0_f64.ln())).abs() < 1e-12);
    }
}
