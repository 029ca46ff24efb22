//! Something new in an answer, as it travels from a sequence to whoever reads the answer.

use tramontane_types::{FinishReason, TokenOutput};

use crate::text::CallDelta;

/// Something new in an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Delta {
    /// Which answer of the request.
    pub(crate) choice: usize,
    pub(crate) text: String,
    /// What was asked for about further tokens of the prompt, in order from the second one on.
    pub(crate) prompt_tokens: Vec<TokenOutput>,
    /// The new tokens, an end token included.
    pub(crate) tokens: Vec<TokenOutput>,
    /// Where in `text` the part of each token ends, in bytes.
    pub(crate) text_ends: Vec<usize>,
    /// New pieces of calls.
    pub(crate) calls: Vec<CallDelta>,
    /// Where in `calls` those of each token end.
    pub(crate) call_ends: Vec<usize>,
    /// Whether the last of `tokens` ended the answer and has no text.
    pub(crate) has_end_token: bool,
    /// Prompt tokens that were cached, when the sequence left the worker's queue.
    pub(crate) cached_tokens: Option<u32>,
    pub(crate) finish: Option<FinishReason>,
}

impl Delta {
    /// What the first `num_tokens` tokens said, and the rest.
    pub(crate) fn split(mut self, num_tokens: usize) -> (Self, Self) {
        let num_tokens = num_tokens.min(self.tokens.len());
        let rest_tokens = self.tokens.split_off(num_tokens);
        let mut rest_ends = self.text_ends.split_off(num_tokens);
        let end = self.text_ends.last().copied().unwrap_or(0);
        for rest_end in &mut rest_ends {
            *rest_end -= end;
        }
        let mut rest_call_ends = self.call_ends.split_off(num_tokens);
        let calls_end = self.call_ends.last().copied().unwrap_or(0);
        for rest_end in &mut rest_call_ends {
            *rest_end -= calls_end;
        }
        let rest = Self {
            choice: self.choice,
            text: self.text.split_off(end),
            prompt_tokens: Vec::new(),
            has_end_token: self.has_end_token && !rest_tokens.is_empty(),
            tokens: rest_tokens,
            text_ends: rest_ends,
            calls: self.calls.split_off(calls_end),
            call_ends: rest_call_ends,
            cached_tokens: None,
            finish: self.finish.take(),
        };
        self.has_end_token &= rest.tokens.is_empty();
        (self, rest)
    }
}
