//! Which attention worker takes a request. A policy decides from what it is told; it never reads a
//! clock, waits or does I/O.

mod least_load;
mod prefix;
mod round_robin;

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};

use tramontane_coordination::Version;
use tramontane_types::{TokenId, WorkerId};

pub(crate) use least_load::LeastLoad;
pub(crate) use prefix::PrefixThenLoad;
pub(crate) use round_robin::RoundRobin;

use crate::config::PolicyKind;

/// Tokens of one block: a page of the workers' KV cache.
pub(crate) const BLOCK_TOKENS: usize = 64;
/// Blocks of one prompt that are looked at; what comes after tells prompts apart no better.
pub(crate) const PROMPT_BLOCKS_MAX: usize = 1024;

/// A worker that can take a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    pub(crate) id: WorkerId,
    /// Sequences that it runs or keeps waiting.
    pub(crate) load: u32,
}

/// Chooses among candidates.
pub(crate) trait Policy: Debug + Send {
    /// Index of the chosen candidate; `None` only when there is none. Remembers the choice.
    fn pick(&mut self, prompt: &PromptBlocks, candidates: &[Candidate]) -> Option<usize>;

    /// The worker's cache is gone.
    fn forget(&mut self, _worker: &WorkerId) {}
}

/// The policy of the given name.
pub(crate) fn policy(kind: PolicyKind) -> Box<dyn Policy> {
    match kind {
        PolicyKind::PrefixThenLoad => Box::<PrefixThenLoad>::default(),
        PolicyKind::LeastLoad => Box::new(LeastLoad),
        PolicyKind::RoundRobin => Box::<RoundRobin>::default(),
    }
}

/// Hashes of a prompt's whole blocks, each over everything before it too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PromptBlocks(pub(crate) Vec<u64>);

/// Hashes prompts; keyed, so that nobody outside can make two prompts collide.
#[derive(Clone, Debug, Default)]
pub(crate) struct BlockHasher(RandomState);

impl BlockHasher {
    /// Workers of different weights have nothing in common to find again, nor have tenants of different salts.
    pub(crate) fn blocks(&self, version: &Version, prompt: &[TokenId], salt: u64) -> PromptBlocks {
        let mut before = self.0.hash_one((version, salt));
        let blocks = prompt.chunks_exact(BLOCK_TOKENS).take(PROMPT_BLOCKS_MAX);
        PromptBlocks(
            blocks
                .map(|block| {
                    before = self.0.hash_one((before, block));
                    before
                })
                .collect(),
        )
    }
}

/// Index of the candidate with the least load, the first of equals.
fn least_loaded(candidates: &[Candidate]) -> Option<usize> {
    (0..candidates.len()).min_by_key(|&i| candidates[i].load)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn candidates(loads: &[(&str, u32)]) -> Vec<Candidate> {
        let candidate = |&(id, load): &(&str, u32)| Candidate {
            id: WorkerId::new(id),
            load,
        };
        loads.iter().map(candidate).collect()
    }

    #[test]
    fn blocks_depend_on_everything_before_them() {
        let hasher = BlockHasher::default();
        let of = |model: &str, prompt: &[u32]| {
            let version = Version {
                model: model.into(),
                numeric_class: "c".into(),
            };
            hasher.blocks(&version, prompt, 0).0
        };
        let long: Vec<u32> = (0..200).collect();
        let blocks = of("f", &long);
        assert_eq!(blocks.len(), 3);
        assert_eq!(of("f", &long[..130]), blocks[..2]);
        let mut other = long.clone();
        other[0] = 9999;
        for others in [of("f", &other), of("g", &long)] {
            assert!(others.iter().zip(&blocks).all(|(a, b)| a != b));
        }
        assert!(of("f", &long[..63]).is_empty());
    }

    #[test]
    fn no_policy_chooses_from_nothing() {
        for kind in [
            PolicyKind::PrefixThenLoad,
            PolicyKind::LeastLoad,
            PolicyKind::RoundRobin,
        ] {
            assert_eq!(policy(kind).pick(&PromptBlocks::default(), &[]), None);
        }
    }
}
