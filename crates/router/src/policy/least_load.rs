//! The worker with the fewest sequences. Never looks at the prompt.

use super::{Candidate, Policy, PromptBlocks, least_loaded};

/// Fewest sequences first.
#[derive(Debug)]
pub(crate) struct LeastLoad;

impl Policy for LeastLoad {
    fn pick(&mut self, _prompt: &PromptBlocks, candidates: &[Candidate]) -> Option<usize> {
        least_loaded(candidates)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidates;
    use super::*;

    #[test]
    fn the_least_loaded_is_chosen_and_the_first_of_equals() {
        let pick = |loads| LeastLoad.pick(&PromptBlocks::default(), &candidates(loads));
        assert_eq!(pick(&[("a", 3), ("b", 1), ("c", 2)]), Some(1));
        assert_eq!(pick(&[("a", 1), ("b", 1)]), Some(0));
    }
}
