//! How the next token is chosen, and the limits of every parameter; checked once, at the edge.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::TokenId;
use crate::constraint::{CONSTRAINT_BYTES_MAX, Constraint};

/// Most alternatives reported per token (`top_logprobs`).
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most stop ids of one request.
pub const STOP_IDS_MAX: usize = 64;
/// Most words that may not appear in one answer.
pub const BAD_WORDS_MAX: usize = 64;
/// Most tokens of one of them.
pub const BAD_WORD_TOKENS_MAX: usize = 32;
/// Highest temperature.
pub const TEMPERATURE_MAX: f32 = 2.0;
/// Largest absolute presence or frequency penalty.
pub const PENALTY_MAX: f32 = 2.0;
/// Smallest repetition penalty: a smaller divisor could take a logit beyond f32.
pub const REPETITION_PENALTY_MIN: f32 = 0.01;
/// Largest repetition penalty.
pub const REPETITION_PENALTY_MAX: f32 = 10.0;
/// Largest absolute logit bias.
pub const LOGIT_BIAS_VALUE_MAX: f32 = 100.0;

/// How the next token is chosen. Every value here has passed [`SamplingParams::validate`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SamplingParams {
    /// 0 chooses the most likely token (lowest id on a tie).
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens of at least this fraction of the best probability; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of each token already in the output.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output.
    pub frequency_penalty: f32,
    /// Divides positive, multiplies negative logits of tokens in prompt or output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Seed of the counter-based generator; the token at output position `i` uses counter `i`.
    pub seed: u64,
    /// Most tokens to sample.
    pub max_tokens: u32,
    /// Stop ids and end-of-sequence are masked before this many tokens.
    pub min_tokens: u32,
    /// Sampling one of these ends the sequence with [`Stop`](crate::FinishReason::Stop).
    pub stop_ids: Vec<TokenId>,
    /// End-of-sequence ids do not end the sequence.
    pub ignore_eos: bool,
    /// `Some(n)`: report the log probability of each token and its `n` best alternatives.
    pub logprobs: Option<u32>,
    /// `Some(n)`: report the same of every token of the prompt but the first.
    pub prompt_logprobs: Option<u32>,
    /// Token sequences that never appear whole in the output: the last token of one is masked while the output
    /// ends with its others.
    pub bad_words: Vec<Vec<TokenId>>,
    /// Language that the output is a word of.
    pub constraint: Option<Arc<Constraint>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            max_tokens: 16,
            min_tokens: 0,
            stop_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            bad_words: Vec::new(),
            constraint: None,
        }
    }
}

/// A sampling parameter outside its range: which one, the rule, and what came.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{param} must be {rule}, got {got}")]
pub struct InvalidSampling {
    /// Name of the parameter as clients write it.
    pub param: &'static str,
    /// What is allowed.
    pub rule: String,
    /// What came.
    pub got: String,
}

impl SamplingParams {
    /// Checks every parameter against its range and the vocabulary of the model.
    ///
    /// # Errors
    /// Names the first parameter that breaks its rule.
    pub fn validate(&self, vocab: usize) -> Result<(), InvalidSampling> {
        in_range("temperature", self.temperature, 0.0, TEMPERATURE_MAX)?;
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(invalid("top_p", "greater than 0 and at most 1", self.top_p));
        }
        in_range("min_p", self.min_p, 0.0, 1.0)?;
        in_range(
            "presence_penalty",
            self.presence_penalty,
            -PENALTY_MAX,
            PENALTY_MAX,
        )?;
        in_range(
            "frequency_penalty",
            self.frequency_penalty,
            -PENALTY_MAX,
            PENALTY_MAX,
        )?;
        in_range(
            "repetition_penalty",
            self.repetition_penalty,
            REPETITION_PENALTY_MIN,
            REPETITION_PENALTY_MAX,
        )?;
        if self.max_tokens == 0 {
            return Err(invalid("max_tokens", "at least 1", self.max_tokens));
        }
        if self.min_tokens > self.max_tokens {
            let rule = format!("at most max_tokens ({})", self.max_tokens);
            return Err(invalid("min_tokens", &rule, self.min_tokens));
        }
        let logprobs = [
            ("top_logprobs", self.logprobs),
            ("prompt_logprobs", self.prompt_logprobs),
        ];
        for (param, asked) in logprobs {
            if let Some(asked) = asked.filter(|&n| n > TOP_LOGPROBS_MAX) {
                let rule = format!("at most {TOP_LOGPROBS_MAX}");
                return Err(invalid(param, &rule, asked));
            }
        }
        if let Some(constraint) = &self.constraint {
            let got = constraint.source().len();
            if got > CONSTRAINT_BYTES_MAX {
                let rule = format!("at most {CONSTRAINT_BYTES_MAX} bytes");
                return Err(invalid("response_format", &rule, got));
            }
        }
        self.validate_ids(vocab)?;
        self.validate_bad_words(vocab)
    }

    fn validate_bad_words(&self, vocab: usize) -> Result<(), InvalidSampling> {
        if self.bad_words.len() > BAD_WORDS_MAX {
            let rule = format!("at most {BAD_WORDS_MAX} entries");
            return Err(invalid("bad_words", &rule, self.bad_words.len()));
        }
        for word in &self.bad_words {
            if !(1..=BAD_WORD_TOKENS_MAX).contains(&word.len()) {
                let rule = format!("words of 1 to {BAD_WORD_TOKENS_MAX} tokens");
                return Err(invalid("bad_words", &rule, word.len()));
            }
            if let Some(id) = word.iter().find(|&&id| id as usize >= vocab) {
                return Err(invalid(
                    "bad_words",
                    &format!("token ids below {vocab}"),
                    id,
                ));
            }
        }
        Ok(())
    }

    fn validate_ids(&self, vocab: usize) -> Result<(), InvalidSampling> {
        if self.logit_bias.len() > LOGIT_BIAS_MAX {
            let rule = format!("at most {LOGIT_BIAS_MAX} entries");
            return Err(invalid("logit_bias", &rule, self.logit_bias.len()));
        }
        if self.stop_ids.len() > STOP_IDS_MAX {
            let rule = format!("at most {STOP_IDS_MAX} entries");
            return Err(invalid("stop_token_ids", &rule, self.stop_ids.len()));
        }
        let rule = format!("token ids below {vocab}");
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return Err(invalid("logit_bias", &rule, id));
            }
            in_range(
                "logit_bias",
                bias,
                -LOGIT_BIAS_VALUE_MAX,
                LOGIT_BIAS_VALUE_MAX,
            )?;
        }
        let mut biased: Vec<TokenId> = self.logit_bias.iter().map(|&(id, _)| id).collect();
        biased.sort_unstable();
        if let Some(twice) = biased.windows(2).find(|pair| pair[0] == pair[1]) {
            let rule = "one value for each token id";
            return Err(invalid("logit_bias", rule, format!("two for {}", twice[0])));
        }
        match self.stop_ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(invalid("stop_token_ids", &rule, id)),
            None => Ok(()),
        }
    }
}

fn in_range(param: &'static str, value: f32, min: f32, max: f32) -> Result<(), InvalidSampling> {
    // Written so that NaN fails.
    if value >= min && value <= max {
        return Ok(());
    }
    Err(invalid(param, &format!("between {min} and {max}"), value))
}

#[expect(clippy::needless_pass_by_value, reason = "callers pass numbers")]
fn invalid(param: &'static str, rule: &str, got: impl ToString) -> InvalidSampling {
    InvalidSampling {
        param,
        rule: rule.to_owned(),
        got: got.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut SamplingParams)) -> String {
        let mut params = SamplingParams::default();
        params.validate(100).unwrap();
        change(&mut params);
        params.validate(100).unwrap_err().to_string()
    }

    #[test]
    fn every_parameter_outside_its_range_is_named() {
        let nan = f32::NAN;
        assert_eq!(
            refused(|p| p.temperature = nan),
            "temperature must be between 0 and 2, got NaN"
        );
        assert_eq!(
            refused(|p| p.temperature = -0.1),
            "temperature must be between 0 and 2, got -0.1"
        );
        assert_eq!(
            refused(|p| p.top_p = 0.0),
            "top_p must be greater than 0 and at most 1, got 0"
        );
        assert_eq!(
            refused(|p| p.top_p = nan),
            "top_p must be greater than 0 and at most 1, got NaN"
        );
        assert_eq!(
            refused(|p| p.min_p = 1.5),
            "min_p must be between 0 and 1, got 1.5"
        );
        assert_eq!(
            refused(|p| p.repetition_penalty = 0.001),
            "repetition_penalty must be between 0.01 and 10, got 0.001"
        );
        assert_eq!(
            refused(|p| p.max_tokens = 0),
            "max_tokens must be at least 1, got 0"
        );
        assert_eq!(
            refused(|p| p.min_tokens = 17),
            "min_tokens must be at most max_tokens (16), got 17"
        );
        assert_eq!(
            refused(|p| p.logprobs = Some(21)),
            "top_logprobs must be at most 20, got 21"
        );
        assert_eq!(
            refused(|p| p.prompt_logprobs = Some(21)),
            "prompt_logprobs must be at most 20, got 21"
        );
        assert_eq!(
            refused(|p| p.bad_words = vec![vec![1], vec![]]),
            "bad_words must be words of 1 to 32 tokens, got 0"
        );
        assert_eq!(
            refused(|p| p.bad_words = vec![vec![1, 100]]),
            "bad_words must be token ids below 100, got 100"
        );
        let long = "x".repeat(CONSTRAINT_BYTES_MAX + 1);
        assert_eq!(
            refused(|p| p.constraint = Some(Arc::new(Constraint::Regex(long.into())))),
            "response_format must be at most 262144 bytes, got 262145"
        );
        assert_eq!(
            refused(|p| p.stop_ids = vec![100]),
            "stop_token_ids must be token ids below 100, got 100"
        );
        assert_eq!(
            refused(|p| p.logit_bias = vec![(3, f32::INFINITY)]),
            "logit_bias must be between -100 and 100, got inf"
        );
        assert_eq!(
            refused(|p| p.logit_bias = vec![(3, 1.0), (2, 1.0), (3, -1.0)]),
            "logit_bias must be one value for each token id, got two for 3"
        );
    }
}
