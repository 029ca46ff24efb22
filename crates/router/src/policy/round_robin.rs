//! One worker after the other, by name. Never looks at load or prompt.

use tramontane_types::WorkerId;

use super::{Candidate, Policy, PromptBlocks};

/// Goes around; whoever joins or leaves does not disturb the order of the others.
#[derive(Debug, Default)]
pub(crate) struct RoundRobin {
    last: Option<WorkerId>,
}

impl Policy for RoundRobin {
    fn pick(&mut self, _prompt: &PromptBlocks, candidates: &[Candidate]) -> Option<usize> {
        let by_name = |&i: &usize| &candidates[i].id;
        let after = (0..candidates.len()).filter(|i| Some(by_name(i)) > self.last.as_ref());
        let next = after
            .min_by_key(by_name)
            .or_else(|| (0..candidates.len()).min_by_key(by_name))?;
        self.last = Some(candidates[next].id.clone());
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidates;
    use super::*;

    #[test]
    fn everybody_gets_a_turn_also_when_somebody_joins() {
        let mut policy = RoundRobin::default();
        let mut pick = |loads: &[(&str, u32)]| {
            let candidates = candidates(loads);
            let chosen = policy.pick(&PromptBlocks::default(), &candidates).unwrap();
            candidates[chosen].id.to_string()
        };
        let three = [("a", 9), ("c", 0), ("b", 0)];
        assert_eq!(
            [pick(&three), pick(&three), pick(&three), pick(&three)],
            ["a", "b", "c", "a"]
        );
        assert_eq!(pick(&[("a", 0), ("aa", 0), ("c", 0)]), "aa");
    }
}
