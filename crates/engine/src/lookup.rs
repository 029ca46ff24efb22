//! Guesses how a sequence goes on from what it already says (prompt lookup): where its last tokens stood before,
//! the same tokens may follow. A guess costs rows of a step and changes no token: the model computes its rows like
//! all others, and what the sampler then chooses differently is thrown away.
//!
//! Saxena, "Prompt Lookup Decoding" (2023); Leviathan et al., "Fast Inference from Transformers via Speculative
//! Decoding" (2023) for the check of several tokens in one step.

use std::collections::HashMap;

use tramontane_types::TokenId;

/// Tokens that must be the same before anything is guessed.
const GRAM: usize = 3;
/// Steps without a guess after one that was all wrong; doubles up to the limit.
const REST_FIRST: u32 = 1;
const REST_MAX: u32 = 32;

/// What followed what in one sequence.
#[derive(Debug)]
pub(crate) struct Lookup {
    /// For every `GRAM` tokens, where the token behind their last occurrence is.
    behind: HashMap<[TokenId; GRAM], u32>,
    /// Leading tokens that are in `behind`.
    num_seen: usize,
    /// Nothing is guessed from this position on.
    end: usize,
    /// Longest guess, and what recent ones were worth.
    len_max: usize,
    len: usize,
    rest: u32,
    rest_next: u32,
}

impl Lookup {
    /// Guesses up to `len_max` tokens at once, all before position `end`.
    pub(crate) fn new(len_max: usize, end: usize) -> Self {
        Self {
            behind: HashMap::new(),
            num_seen: 0,
            end,
            len_max,
            len: len_max,
            rest: 0,
            rest_next: REST_FIRST,
        }
    }

    /// At most `most` tokens that may follow `tokens`, which only ever grow.
    pub(crate) fn guess<'a>(&mut self, tokens: &'a [TokenId], most: usize) -> &'a [TokenId] {
        self.see(tokens);
        if self.rest > 0 {
            self.rest -= 1;
            return &[];
        }
        let Some(begin) = tokens.last_chunk().and_then(|gram| self.behind.get(gram)) else {
            return &[];
        };
        let begin = *begin as usize;
        let most = most.min(self.end.saturating_sub(tokens.len()));
        let end = tokens.len().min(begin + self.len.min(most));
        tokens.get(begin..end).unwrap_or_default()
    }

    /// Notes how many of the guessed tokens came true: the next guess is bolder or more careful.
    pub(crate) fn learn(&mut self, num_guessed: usize, num_true: usize) {
        if num_guessed == 0 {
            return;
        }
        if num_true == num_guessed {
            self.len = (2 * self.len).min(self.len_max);
        } else {
            self.len = num_true.max(1);
        }
        if num_true == 0 {
            self.rest = self.rest_next;
            self.rest_next = (2 * self.rest_next).min(REST_MAX);
        } else {
            self.rest_next = REST_FIRST;
        }
    }

    fn see(&mut self, tokens: &[TokenId]) {
        let first = self.num_seen.max(GRAM);
        for behind in first..tokens.len() {
            if let Some(gram) = tokens.get(..behind).and_then(|t| t.last_chunk()) {
                // Positions are below the model's context, a u32.
                self.behind.insert(*gram, behind as u32);
            }
        }
        self.num_seen = tokens.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_the_last_time_is_guessed() {
        let mut lookup = Lookup::new(4, 99);
        assert_eq!(lookup.guess(&[1, 2, 3, 4, 5, 6, 7, 8], 9), [0; 0]);
        let again = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3];
        assert_eq!(lookup.guess(&again, 9), [4, 5, 6, 7]);
        assert_eq!(lookup.guess(&again, 2), [4, 5]);
        assert_eq!(Lookup::new(4, 14).guess(&again, 9), [4, 5, 6]);
        // The later place counts, and a guess ends where the text does.
        let later = [again.as_slice(), &[9, 1, 2, 3]].concat();
        assert_eq!(lookup.guess(&later, 9), [9, 1, 2, 3]);
        assert_eq!(Lookup::new(4, 99).guess(&[7, 7], 9), [0; 0]);
        assert_eq!(Lookup::new(4, 99).guess(&[7; 5], 9), [7]);
    }

    #[test]
    fn wrong_guesses_become_short_and_rare() {
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3];
        let mut lookup = Lookup::new(8, 99);
        assert_eq!(lookup.guess(&tokens, 9).len(), 8);
        lookup.learn(8, 2);
        assert_eq!(lookup.guess(&tokens, 9), [4, 5]);
        lookup.learn(2, 2);
        assert_eq!(lookup.guess(&tokens, 9).len(), 4);
        for pause in [1, 2, 4, 8, 16, 32, 32] {
            lookup.learn(4, 0);
            for _ in 0..pause {
                assert_eq!(lookup.guess(&tokens, 9), [0; 0]);
            }
            assert_eq!(lookup.guess(&tokens, 9), [4]);
        }
        lookup.learn(1, 1);
        lookup.learn(2, 0);
        assert_eq!(lookup.guess(&tokens, 9), [0; 0]);
        assert_eq!(lookup.guess(&tokens, 9), [4]);
    }
}
