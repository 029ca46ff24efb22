//! Log probabilities with the same bits on every machine. Never calls the C library's `exp` or `ln`, whose last bits depend on
//! the machine.

use tramontane_compute::sampling::exp;

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
    fn log_softmax_is_stable_for_large_logits() {
        let logits = [1000.0_f32, 1000.0, -1000.0];
        assert!((log_sum_exp(&logits, 1000.0) - (1000.0 + 2.0_f64.ln())).abs() < 1e-12);
    }
}
