//! The limits of an engine, checked once. Never read after [`crate::Engine::new`] by anybody else.

use tramontane_types::TokenId;

use crate::Error;
use crate::masks::MaskLimits;

/// Sequences that may hold pages at the same time.
pub const MAX_RUNNING_DEFAULT: usize = 256;
/// Sequences that may wait; more are refused, so that a router can go elsewhere.
pub const MAX_WAITING_DEFAULT: usize = 1024;
/// Rows of one step: large enough to fill the kernels, small enough for a short inter-token latency.
pub const MAX_STEP_ROWS_DEFAULT: usize = 2048;
/// Rows of one prompt in one step.
pub const MAX_PREFILL_CHUNK_DEFAULT: usize = 512;
/// Pages of the KV cache; the worker replaces it by what its memory allows.
pub const NUM_PAGES_DEFAULT: usize = 1024;
/// Most tokens that may be guessed at once.
pub const LOOKUP_TOKENS_MAX: usize = 32;
/// Consecutive attempts of a step before its sequences are handed back to the router.
pub const STEP_ATTEMPTS_MAX_DEFAULT: u32 = 3;

/// The limits of one engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that may hold pages at the same time, at least 1.
    pub max_running: usize,
    /// Sequences that may wait for a place; further ones are refused. At least 1.
    pub max_waiting: usize,
    /// Token budget of one step (rows), at least 1.
    pub max_step_rows: usize,
    /// Most rows of one sequence in one step, at least 1.
    pub max_prefill_chunk: usize,
    /// Pages of the KV cache, of [`tramontane_compute::KV_PAGE_TOKENS`] tokens; at least 1.
    pub num_pages: usize,
    /// Whether full pages are shared between sequences that begin with the same tokens.
    pub prefix_cache: bool,
    /// Most tokens of a sequence that are guessed from what it already says and checked in one step; 0 guesses none.
    pub lookup_tokens: usize,
    /// Sampling one of these ends a sequence, unless it ignores them.
    pub eos_ids: Vec<TokenId>,
    /// After this many consecutive failures of the exchange, the sequences of the step fail; at least 1.
    pub step_attempts_max: u32,
    /// What constraints may cost.
    pub masks: MaskLimits,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_running: MAX_RUNNING_DEFAULT,
            max_waiting: MAX_WAITING_DEFAULT,
            max_step_rows: MAX_STEP_ROWS_DEFAULT,
            max_prefill_chunk: MAX_PREFILL_CHUNK_DEFAULT,
            num_pages: NUM_PAGES_DEFAULT,
            prefix_cache: true,
            lookup_tokens: 0,
            eos_ids: Vec::new(),
            step_attempts_max: STEP_ATTEMPTS_MAX_DEFAULT,
            masks: MaskLimits::default(),
        }
    }
}

impl EngineConfig {
    /// Checks every limit, and the end-of-sequence ids against the vocabulary.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] names the first key that breaks its rule.
    pub fn validate(&self, vocab: usize) -> Result<(), Error> {
        let counts = [
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_step_rows", self.max_step_rows),
            ("max_prefill_chunk", self.max_prefill_chunk),
            ("num_pages", self.num_pages),
            ("step_attempts_max", self.step_attempts_max as usize),
        ];
        for (key, got) in counts {
            if got == 0 {
                return Err(Error::InvalidConfig {
                    key,
                    rule: "at least 1".to_owned(),
                    got,
                });
            }
        }
        if self.lookup_tokens > LOOKUP_TOKENS_MAX {
            return Err(Error::InvalidConfig {
                key: "lookup_tokens",
                rule: format!("at most {LOOKUP_TOKENS_MAX}"),
                got: self.lookup_tokens,
            });
        }
        // Row and page numbers travel as u32, and the last one stands for a released page.
        let wide = [
            ("max_step_rows", self.max_step_rows),
            ("num_pages", self.num_pages),
        ];
        for (key, got) in wide {
            if got >= u32::MAX as usize {
                return Err(Error::InvalidConfig {
                    key,
                    rule: format!("below {}", u32::MAX),
                    got,
                });
            }
        }
        match self.eos_ids.iter().find(|&&id| id as usize >= vocab) {
            Some(&id) => Err(Error::InvalidConfig {
                key: "eos_ids",
                rule: format!("token ids below {vocab}"),
                got: id as usize,
            }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_zero_or_an_unknown_eos_id_is_named() {
        let good = EngineConfig {
            eos_ids: vec![2],
            ..EngineConfig::default()
        };
        good.validate(3).unwrap();
        assert_eq!(
            good.validate(2).unwrap_err().to_string(),
            "eos_ids must be token ids below 2, got 2"
        );
        let bad = EngineConfig {
            num_pages: 0,
            ..good
        };
        assert_eq!(
            bad.validate(3).unwrap_err().to_string(),
            "num_pages must be at least 1, got 0"
        );
    }
}
