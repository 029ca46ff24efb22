//! What a running sequence says: tokens with their probabilities, why it ended, what it used.

use serde::{Deserialize, Serialize};

use crate::TokenId;

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model ended it, or a stop id or stop string matched.
    Stop,
    /// `max_tokens` or the model's context was reached.
    Length,
    /// The client left or cancelled.
    Aborted,
}

/// Natural logarithm of a token's probability before temperature and masks.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: TokenId,
    /// `log_softmax` of the raw logits at this token.
    pub logprob: f32,
}

/// One sampled token.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenOutput {
    /// Position in the output, from 0 without gaps.
    pub index: u32,
    /// The sampled token.
    pub id: TokenId,
    /// Its log probability, when asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens, best first, when asked for.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// Token counts of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Prompt tokens whose keys and values came from the prefix cache.
    pub cached_tokens: u32,
    /// Tokens sampled.
    pub completion_tokens: u32,
}
