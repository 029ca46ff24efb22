//! The choice of experts: the `top_k` largest probabilities. Reads no weights.

use tramontane_types::ExpertId;

/// Takes the `ids.len()` most probable experts, the lower id first where two are equal. `ids` become
/// ascending, `weights` their probabilities over the sum of those chosen.
pub(crate) fn choose(probabilities: &[f32], ids: &mut [ExpertId], weights: &mut [f32]) {
    for chosen in 0..ids.len() {
        let mut best: Option<usize> = None;
        for (expert, &p) in probabilities.iter().enumerate() {
            if ids[..chosen].contains(&ExpertId(expert as u16)) {
                continue;
            }
            if best.is_none_or(|b| p > probabilities[b]) {
                best = Some(expert);
            }
        }
        ids[chosen] = ExpertId(best.unwrap_or(0) as u16);
    }
    ids.sort_unstable();
    let mut sum = 0.0;
    for (weight, id) in weights.iter_mut().zip(ids.iter()) {
        *weight = probabilities[usize::from(id.0)];
        sum += *weight;
    }
    for weight in weights {
        *weight /= sum;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(probabilities: &[f32], top_k: usize) -> (Vec<u16>, Vec<f32>) {
        let mut ids = vec![ExpertId(0); top_k];
        let mut weights = vec![0.0; top_k];
        choose(probabilities, &mut ids, &mut weights);
        (ids.iter().map(|id| id.0).collect(), weights)
    }

    #[test]
    fn the_largest_are_chosen_and_listed_by_id() {
        assert_eq!(
            chosen(&[0.1, 0.25, 0.05, 0.6], 2),
            (vec![1, 3], vec![0.25 / 0.85, 0.6 / 0.85])
        );
        assert_eq!(chosen(&[0.2, 0.8], 1), (vec![1], vec![1.0]));
    }

    #[test]
    fn of_equal_ones_the_lower_id_is_chosen() {
        assert_eq!(chosen(&[0.2, 0.2, 0.4, 0.2], 2).0, [0, 2]);
        assert_eq!(chosen(&[0.25; 4], 3).0, [0, 1, 2]);
    }

    #[test]
    fn not_a_number_still_gives_distinct_experts() {
        assert_eq!(chosen(&[f32::NAN; 4], 2).0, [0, 1]);
    }
}
