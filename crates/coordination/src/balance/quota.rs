//! How many slices each worker gets: in proportion to what it offers, within its capacity, and near
//! to what it has. Never looks at which slices.

/// Largest difference, in slices, between a worker's quota and its exact proportional share.
const TOLERANCE_SLICES: f64 = 1.0 + 1e-6;

/// The exact proportional share of each worker: `weights`, filled up to `capacity` where that is less.
///
/// `total` is at most the sum of the capacities.
pub(super) fn shares(weights: &[f64], capacity: &[usize], total: usize) -> Vec<f64> {
    let mut shares = vec![0.0; weights.len()];
    let mut open: Vec<usize> = (0..weights.len()).collect();
    let mut left = total as f64;
    loop {
        let weight: f64 = open.iter().map(|&i| weights[i]).sum();
        let share = |i: usize| left * weights[i] / weight;
        let full = |i: &usize| share(*i) >= capacity[*i] as f64;
        let (filled, rest): (Vec<usize>, Vec<usize>) = open.iter().copied().partition(full);
        if filled.is_empty() || rest.is_empty() {
            for &i in &open {
                shares[i] = share(i).min(capacity[i] as f64);
            }
            return shares;
        }
        for i in filled {
            shares[i] = capacity[i] as f64;
            left -= shares[i];
        }
        open = rest;
    }
}

/// Whole slices per worker that add up to `total`, each within one slice of its share.
///
/// With nothing held this is the method of largest remainders. Otherwise workers keep what they hold
/// as long as they stay within one slice of their share.
pub(super) fn quotas(
    shares: &[f64],
    capacity: &[usize],
    held: &[usize],
    total: usize,
) -> Vec<usize> {
    let keep = |i: usize| {
        let most = (shares[i] + TOLERANCE_SLICES).floor() as usize;
        held[i].min(most).min(capacity[i])
    };
    let mut quotas: Vec<usize> = (0..shares.len()).map(keep).collect();
    let mut sum: usize = quotas.iter().sum();
    let lack = |quotas: &[usize], i: usize| shares[i] - quotas[i] as f64;
    let neediest = |quotas: &[usize]| {
        let open = (0..shares.len()).filter(|&i| quotas[i] < capacity[i]);
        open.max_by(|&a, &b| lack(quotas, a).total_cmp(&lack(quotas, b)).then(b.cmp(&a)))
    };
    let richest = |quotas: &[usize]| {
        let some = (0..shares.len()).filter(|&i| quotas[i] > 0);
        some.min_by(|&a, &b| lack(quotas, a).total_cmp(&lack(quotas, b)).then(a.cmp(&b)))
    };
    while sum < total {
        let Some(i) = neediest(&quotas) else { break };
        quotas[i] += 1;
        sum += 1;
    }
    while sum > total {
        let Some(i) = richest(&quotas) else { break };
        quotas[i] -= 1;
        sum -= 1;
    }
    // Each round brings two workers nearer to their shares, so this ends.
    while let (Some(poor), Some(rich)) = (neediest(&quotas), richest(&quotas)) {
        if lack(&quotas, poor) <= TOLERANCE_SLICES || lack(&quotas, rich) >= 0.0 {
            break;
        }
        quotas[poor] += 1;
        quotas[rich] -= 1;
    }
    quotas
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_proportional_up_to_capacity() {
        assert_eq!(shares(&[1.0, 3.0], &[10, 10], 8), [2.0, 6.0]);
        assert_eq!(shares(&[1.0, 3.0], &[10, 5], 8), [3.0, 5.0]);
        assert_eq!(shares(&[1.0, 1.0, 6.0], &[2, 9, 3], 8), [2.0, 3.0, 3.0]);
        assert_eq!(shares(&[5.0], &[8], 8), [8.0]);
    }

    #[test]
    fn quotas_round_by_largest_remainder_and_keep_what_is_near() {
        let shares = [2.6, 2.7, 2.7];
        assert_eq!(quotas(&shares, &[9; 3], &[0; 3], 8), [2, 3, 3]);
        assert_eq!(quotas(&shares, &[9; 3], &[3, 3, 2], 8), [3, 3, 2]);
        assert_eq!(quotas(&shares, &[9; 3], &[4, 4, 0], 8), [3, 3, 2]);
        assert_eq!(quotas(&shares, &[2, 9, 9], &[4, 4, 0], 8), [2, 3, 3]);
    }
}
