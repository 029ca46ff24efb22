//! The text of one answer as its tokens come. Never lets out half a character, the text of an end token,
//! or anything from a stop string on.

use tramontane_tokenizer::{DecodeStart, DecodeStream, StopDecoder, Tokenizer};
use tramontane_types::{SamplingParams, TokenId};

/// Turns the sampled tokens of one answer into text.
#[derive(Debug)]
pub(crate) struct AnswerText {
    decoder: DecodeStream,
    stop: StopDecoder,
    /// Tokens that end the answer and are no part of its text.
    end_ids: Vec<TokenId>,
}

/// What one token adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    pub(crate) text: String,
    /// Whether the answer ends here, and how.
    pub(crate) end: Option<TextEnd>,
}

/// Why no text can follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TextEnd {
    /// A stop string was completed.
    StopString,
    /// End-of-sequence or a stop id.
    EndToken,
}

impl AnswerText {
    /// For a chat the answer is a text of its own; otherwise it continues the prompt.
    pub(crate) fn new(
        tokenizer: &Tokenizer,
        params: &SamplingParams,
        stop: StopDecoder,
        is_chat: bool,
    ) -> Self {
        let start = if is_chat {
            DecodeStart::Text
        } else {
            DecodeStart::Continuation
        };
        let mut end_ids = params.stop_ids.clone();
        if !params.ignore_eos {
            end_ids.extend_from_slice(tokenizer.eos_ids());
        }
        Self {
            decoder: DecodeStream::new(tokenizer, start, true),
            stop,
            end_ids,
        }
    }

    /// Takes the next token.
    pub(crate) fn push(&mut self, id: TokenId) -> Added {
        if self.is_end(id) {
            return Added {
                text: String::new(),
                end: Some(TextEnd::EndToken),
            };
        }
        let Some(decoded) = self.decoder.push(id) else {
            return Added {
                text: String::new(),
                end: None,
            };
        };
        let outcome = self.stop.push(&decoded);
        Added {
            text: outcome.emit,
            end: outcome.stopped.then_some(TextEnd::StopString),
        }
    }

    /// What was held back when the answer ends, and whether a stop string was completed in it.
    pub(crate) fn finish(&mut self) -> Added {
        let mut text = String::new();
        if let Some(rest) = self.decoder.finish() {
            let outcome = self.stop.push(&rest);
            text.push_str(&outcome.emit);
            if outcome.stopped {
                return Added {
                    text,
                    end: Some(TextEnd::StopString),
                };
            }
        }
        text.push_str(&self.stop.finish());
        Added { text, end: None }
    }

    /// Whether the worker ends the sequence at this token.
    pub(crate) fn is_end(&self, id: TokenId) -> bool {
        self.end_ids.contains(&id)
    }
}
