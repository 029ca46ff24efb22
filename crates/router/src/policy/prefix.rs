//! The worker that has most of the prompt in its cache, as far as this router knows. Never trusts that
//! too far: a large difference in load wins.

use std::collections::{BTreeMap, HashMap};

use tramontane_types::WorkerId;

use super::{Candidate, Policy, PromptBlocks, least_loaded};

/// Blocks that are remembered: four million tokens.
pub(crate) const BLOCKS_MAX: usize = 65_536;
/// Workers remembered per block, the latest.
pub(crate) const HOLDERS_MAX: usize = 4;
/// A worker with this many sequences more than the least loaded one is not chosen for its cache.
pub(crate) const LOAD_GAP_MAX: u32 = 8;

/// Longest known prefix first, then least load.
#[derive(Debug)]
pub(crate) struct PrefixThenLoad {
    blocks: HashMap<u64, Block>,
    /// Hashes by when they were last used, oldest first.
    by_use: BTreeMap<u64, u64>,
    now: u64,
    blocks_max: usize,
}

/// Who was given this block.
#[derive(Debug)]
struct Block {
    /// Latest first.
    holders: Vec<WorkerId>,
    used: u64,
}

impl Default for PrefixThenLoad {
    fn default() -> Self {
        Self::with_room_for(BLOCKS_MAX)
    }
}

impl PrefixThenLoad {
    fn with_room_for(blocks_max: usize) -> Self {
        Self {
            blocks: HashMap::new(),
            by_use: BTreeMap::new(),
            now: 0,
            blocks_max,
        }
    }

    /// Blocks from the start of the prompt that each candidate was given.
    fn matched(&self, prompt: &PromptBlocks, candidates: &[Candidate]) -> Vec<usize> {
        let mut matched = vec![0; candidates.len()];
        for (depth, hash) in prompt.0.iter().enumerate() {
            let Some(block) = self.blocks.get(hash) else {
                break;
            };
            let mut anybody = false;
            for (candidate, matched) in candidates.iter().zip(&mut matched) {
                if *matched == depth && block.holders.contains(&candidate.id) {
                    *matched = depth + 1;
                    anybody = true;
                }
            }
            if !anybody {
                break;
            }
        }
        matched
    }

    fn remember(&mut self, prompt: &PromptBlocks, worker: &WorkerId) {
        // From the end, so that the start of a prompt is the last to be forgotten.
        for &hash in prompt.0.iter().rev() {
            self.now += 1;
            let now = self.now;
            let block = self.blocks.entry(hash).or_insert(Block {
                holders: Vec::new(),
                used: now,
            });
            self.by_use.remove(&block.used);
            self.by_use.insert(now, hash);
            block.used = now;
            block.holders.retain(|holder| holder != worker);
            block.holders.insert(0, worker.clone());
            block.holders.truncate(HOLDERS_MAX);
        }
        while self.blocks.len() > self.blocks_max {
            let Some((_, oldest)) = self.by_use.pop_first() else {
                break;
            };
            self.blocks.remove(&oldest);
        }
    }
}

impl Policy for PrefixThenLoad {
    fn pick(&mut self, prompt: &PromptBlocks, candidates: &[Candidate]) -> Option<usize> {
        let idlest = least_loaded(candidates)?;
        let load_max = candidates[idlest].load.saturating_add(LOAD_GAP_MAX);
        let matched = self.matched(prompt, candidates);
        let mut chosen = idlest;
        for (i, candidate) in candidates.iter().enumerate() {
            if candidate.load > load_max {
                continue;
            }
            let better = matched[i] > matched[chosen]
                || (matched[i] == matched[chosen] && candidate.load < candidates[chosen].load);
            if better {
                chosen = i;
            }
        }
        self.remember(prompt, &candidates[chosen].id);
        Some(chosen)
    }

    fn forget(&mut self, worker: &WorkerId) {
        let by_use = &mut self.by_use;
        self.blocks.retain(|_, block| {
            block.holders.retain(|holder| holder != worker);
            if block.holders.is_empty() {
                by_use.remove(&block.used);
            }
            !block.holders.is_empty()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::candidates;
    use super::*;

    fn pick(policy: &mut PrefixThenLoad, blocks: &[u64], loads: &[(&str, u32)]) -> String {
        let candidates = candidates(loads);
        let chosen = policy
            .pick(&PromptBlocks(blocks.to_vec()), &candidates)
            .unwrap();
        candidates[chosen].id.to_string()
    }

    #[test]
    fn the_longest_known_prefix_wins_until_load_differs_too_much() {
        let mut policy = PrefixThenLoad::default();
        assert_eq!(pick(&mut policy, &[1, 2, 3], &[("a", 1), ("b", 0)]), "b");
        assert_eq!(
            pick(&mut policy, &[1, 2, 9], &[("a", 0), ("b", LOAD_GAP_MAX)]),
            "b"
        );
        assert_eq!(
            pick(
                &mut policy,
                &[1, 2, 9],
                &[("a", 0), ("b", LOAD_GAP_MAX + 1)]
            ),
            "a"
        );
        // Both know two blocks and b knows the third.
        assert_eq!(pick(&mut policy, &[1, 2, 3], &[("a", 0), ("b", 3)]), "b");
        // Equal prefixes: less load.
        assert_eq!(pick(&mut policy, &[1, 2, 7], &[("a", 2), ("b", 1)]), "b");
    }

    #[test]
    fn an_unknown_prompt_goes_to_the_least_loaded() {
        let mut policy = PrefixThenLoad::default();
        assert_eq!(pick(&mut policy, &[], &[("a", 2), ("b", 1), ("c", 1)]), "b");
        assert_eq!(pick(&mut policy, &[5], &[("a", 2), ("b", 1)]), "b");
    }

    #[test]
    fn memory_is_bounded_and_forgets_the_end_of_prompts_first() {
        let mut policy = PrefixThenLoad::with_room_for(4);
        pick(&mut policy, &[1, 2, 3], &[("a", 0), ("b", 1)]);
        pick(&mut policy, &[11, 12, 13], &[("a", 1), ("b", 0)]);
        assert_eq!(policy.blocks.len(), 4);
        assert_eq!(policy.by_use.len(), 4);
        assert_eq!(pick(&mut policy, &[1], &[("a", 3), ("b", 0)]), "a");
        assert!(!policy.blocks.contains_key(&3) && !policy.blocks.contains_key(&2));
    }

    #[test]
    fn a_worker_that_left_is_forgotten() {
        let mut policy = PrefixThenLoad::default();
        pick(&mut policy, &[1, 2], &[("a", 0)]);
        pick(&mut policy, &[1, 2], &[("b", 0)]);
        policy.forget(&WorkerId::new("a"));
        assert_eq!(pick(&mut policy, &[1], &[("a", 0), ("b", 5)]), "b");
        policy.forget(&WorkerId::new("b"));
        assert!(policy.blocks.is_empty() && policy.by_use.is_empty());
    }
}
