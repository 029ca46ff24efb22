//! Token ids to text, one id at a time. Never emits half a character.

use tramontane_types::TokenId;

use crate::Tokenizer;

/// What the text of a [`DecodeStream`] follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DecodeStart {
    /// A new text, as a chat answer is: the space that SentencePiece puts before a text is dropped.
    Text,
    /// Text that goes on, as in a completion of a prompt: every space counts.
    Continuation,
}

/// Turns the ids of one sequence into text as they come.
#[derive(Debug, Clone)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    bytes: DecodedBytes,
}

impl DecodeStream {
    /// With `skip_special` control tokens are left out, otherwise their names are part of the text.
    pub fn new(tokenizer: &Tokenizer, start: DecodeStart, skip_special: bool) -> Self {
        Self {
            tokenizer: tokenizer.clone(),
            skip_special,
            bytes: DecodedBytes::new(start),
        }
    }

    /// The text that is certain after this id, if there is any. Ids outside the vocabulary stand for no text.
    pub fn push(&mut self, id: TokenId) -> Option<String> {
        self.bytes.push(&self.tokenizer, id, self.skip_special);
        let text = self.bytes.take_complete();
        (!text.is_empty()).then_some(text)
    }

    /// The end of the sequence: a character that was never completed becomes U+FFFD.
    pub fn finish(&mut self) -> Option<String> {
        let text = self.bytes.take_rest();
        (!text.is_empty()).then_some(text)
    }
}

/// Bytes decoded so far and not yet given out as text.
#[derive(Debug, Clone)]
pub(crate) struct DecodedBytes {
    bytes: Vec<u8>,
    drops_space: bool,
}

impl DecodedBytes {
    pub(crate) fn new(start: DecodeStart) -> Self {
        Self {
            bytes: Vec::new(),
            drops_space: start == DecodeStart::Text,
        }
    }

    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, id: TokenId, skip_special: bool) {
        let Some(token) = tokenizer.vocabulary().get(id) else {
            return;
        };
        if token.is_control && skip_special {
            return;
        }
        let mut bytes: &[u8] = &token.bytes;
        if self.drops_space && tokenizer.has_leading_space() && !token.is_control {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.drops_space = false;
        self.bytes.extend_from_slice(bytes);
    }

    /// All text up to a character that more bytes could complete.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut taken = 0;
        for chunk in self.bytes.utf8_chunks() {
            text.push_str(chunk.valid());
            taken += chunk.valid().len();
            if chunk.invalid().is_empty() || is_incomplete(&self.bytes[taken..]) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            taken += chunk.invalid().len();
        }
        self.bytes.drain(..taken);
        text
    }

    pub(crate) fn take_rest(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.bytes).into_owned();
        self.bytes.clear();
        text
    }
}

/// True if `bytes` is the beginning of a character and nothing else.
fn is_incomplete(bytes: &[u8]) -> bool {
    std::str::from_utf8(bytes)
        .is_err_and(|error| error.valid_up_to() == 0 && error.error_len().is_none())
}
