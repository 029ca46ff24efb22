//! Evens out the load of one layer by swapping slices between workers. Never changes how many slices a
//! worker holds, and leaves alone what is nearly even.

/// A swap must relieve the busier of its two workers by this share: what is nearly even stays.
const SWAP_GAIN: f64 = 0.10;
/// Slices of a worker that are looked at, and workers that a swap is sought with: bounds the search.
const SLICES_SEARCHED: usize = 32;
const WORKERS_SEARCHED: usize = 8;

/// Swaps slices of `held` (`[slices][workers]`, 1 where held) from the busiest worker as long as that
/// relieves it. `loads` are those of one copy, `weights` the workers' speeds.
pub(super) fn even_out(held: &mut [Vec<usize>], loads: &[f64], weights: &[f64]) {
    for _ in 0..held.len() {
        let Some((busiest, lighter, given, taken)) = best_swap(held, loads, weights) else {
            return;
        };
        (held[given][busiest], held[given][lighter]) = (0, 1);
        (held[taken][lighter], held[taken][busiest]) = (0, 1);
    }
}

/// The busiest worker, whom it swaps with, the slice that it gives and the one that it takes.
fn best_swap(
    held: &[Vec<usize>],
    loads: &[f64],
    weights: &[f64],
) -> Option<(usize, usize, usize, usize)> {
    let mut busy = vec![0.0; weights.len()];
    for (holders, load) in held.iter().zip(loads) {
        for (worker, &holds) in holders.iter().enumerate() {
            busy[worker] += load * holds as f64 / weights[worker];
        }
    }
    let mut by_work: Vec<usize> = (0..weights.len()).collect();
    by_work.sort_by(|&a, &b| busy[a].total_cmp(&busy[b]).then(a.cmp(&b)));
    let busiest = by_work.pop()?;
    let slices_of = |worker: usize, other: usize| {
        let only = |slice: &usize| held[*slice][worker] > 0 && held[*slice][other] == 0;
        let mut slices: Vec<usize> = (0..held.len()).filter(only).collect();
        slices.sort_by(|&a, &b| loads[a].total_cmp(&loads[b]).then(a.cmp(&b)));
        slices
    };
    let mut best = None;
    let mut least = busy[busiest] * (1.0 - SWAP_GAIN);
    for &lighter in by_work.iter().take(WORKERS_SEARCHED) {
        let given = slices_of(busiest, lighter);
        let taken = slices_of(lighter, busiest);
        for &given in given.iter().rev().take(SLICES_SEARCHED) {
            for &taken in taken.iter().take(SLICES_SEARCHED) {
                let moved = loads[given] - loads[taken];
                let (left, right) = (moved / weights[busiest], moved / weights[lighter]);
                let after = (busy[busiest] - left).max(busy[lighter] + right);
                if after < least {
                    (least, best) = (after, Some((busiest, lighter, given, taken)));
                }
            }
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_slices_are_parted_and_an_even_layer_stays() {
        // Slices 0 and 1 are hot and both on the first worker.
        let mut held = vec![vec![1, 0], vec![1, 0], vec![0, 1], vec![0, 1]];
        let loads = [4.0, 4.0, 1.0, 1.0];
        even_out(&mut held, &loads, &[1.0, 1.0]);
        let of_first: f64 = held.iter().zip(loads).map(|(h, l)| h[0] as f64 * l).sum();
        assert_eq!((of_first, held[0][0] + held[1][0]), (5.0, 1));
        let before = held.clone();
        even_out(&mut held, &[4.0, 4.2, 1.0, 0.9], &[1.0, 1.0]);
        assert_eq!(held, before);
    }
}
