//! What every token id stands for, as bytes. Knows nothing about how text is cut into tokens.

use std::fmt;
use std::sync::Arc;

use toktrie::{ApproximateTokEnv, TokRxInfo, TokTrie};
use tramontane_types::TokenId;

/// Ids that a vocabulary may have.
pub const VOCABULARY_MAX: usize = 1 << 20;
/// Longest token in bytes that a grammar may use: longer ones are left out.
pub const TOKEN_BYTES_MAX: usize = 512;
/// Before the name of a control token; no byte of UTF-8.
const CONTROL: u8 = TokTrie::SPECIAL_TOKEN_MARKER;

/// One entry of a vocabulary.
#[derive(Clone, Copy, Debug)]
pub enum Token<'a> {
    /// Bytes in running text, not always whole characters; none for an id that is not used.
    Text(&'a [u8]),
    /// A token that is no text, by its name, such as `[TOOL_CALLS]`.
    Control(&'a [u8]),
}

/// All tokens of a model by id, and those that end an answer. Cheap to clone.
#[derive(Clone, PartialEq, Eq)]
pub struct Vocabulary {
    words: Arc<[Vec<u8>]>, // [vocab_size]
    eos_ids: Arc<[TokenId]>,
}

/// A vocabulary that cannot be one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the vocabulary must have {rule}, got {got}")]
pub struct InvalidVocabulary {
    /// What is allowed.
    pub rule: String,
    /// What came.
    pub got: usize,
}

impl Vocabulary {
    /// The tokens in order of their ids.
    ///
    /// # Errors
    /// When there are none or too many, or `eos_ids` are not among them.
    pub fn new<'a>(
        tokens: impl IntoIterator<Item = Token<'a>>,
        eos_ids: &[TokenId],
    ) -> Result<Self, InvalidVocabulary> {
        Self::from_words(tokens.into_iter().map(word).collect(), eos_ids)
    }

    /// What [`words`](Self::words) gave elsewhere.
    ///
    /// # Errors
    /// As those of [`new`](Self::new).
    pub fn from_words(
        mut words: Vec<Vec<u8>>,
        eos_ids: &[TokenId],
    ) -> Result<Self, InvalidVocabulary> {
        let got = words.len();
        if !(1..=VOCABULARY_MAX).contains(&got) {
            let rule = format!("1 to {VOCABULARY_MAX} tokens");
            return Err(InvalidVocabulary { rule, got });
        }
        if let Some(&id) = eos_ids.iter().find(|&&id| id as usize >= got) {
            let rule = format!("end-of-sequence ids below {got}");
            let got = id as usize;
            return Err(InvalidVocabulary { rule, got });
        }
        for word in &mut words {
            if word.len() > TOKEN_BYTES_MAX {
                word.clear();
            }
        }
        Ok(Self {
            words: words.into(),
            eos_ids: eos_ids.into(),
        })
    }

    /// The bytes of each token; control tokens have a byte before their name that no text has.
    #[must_use]
    pub fn words(&self) -> &[Vec<u8>] {
        &self.words
    }

    /// The tokens that end an answer.
    #[must_use]
    pub fn eos_ids(&self) -> &[TokenId] {
        &self.eos_ids
    }

    /// The form that llguidance walks. It asserts what [`Vocabulary::new`] has checked.
    pub(crate) fn trie(&self) -> ApproximateTokEnv {
        let eos = self.eos_ids.first().copied();
        let info = TokRxInfo::new(
            self.words.len() as u32,
            eos.unwrap_or(toktrie::INVALID_TOKEN),
        );
        let mut trie = TokTrie::from(&info, &self.words);
        if !self.eos_ids.is_empty() {
            trie = trie.with_eos_tokens(&self.eos_ids);
        }
        // Any way of cutting an allowed text is allowed: only then does a mask depend on the bytes so far alone.
        ApproximateTokEnv::new(trie)
    }
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary")
            .field("len", &self.words.len())
            .field("eos_ids", &self.eos_ids)
            .finish()
    }
}

/// Grammars name control tokens in angle brackets: `[TOOL_CALLS]` is `<TOOL_CALLS>`, `</s>` is itself.
fn word(token: Token<'_>) -> Vec<u8> {
    let name = match token {
        // Never part of a text.
        Token::Text(bytes) if bytes.first() == Some(&CONTROL) => return Vec::new(),
        Token::Text(bytes) => return bytes.to_vec(),
        Token::Control(name) => name,
    };
    let inner = match name {
        [b'[', inner @ .., b']'] | [b'<', inner @ .., b'>'] => inner,
        other => other,
    };
    let mut word = vec![CONTROL, b'<'];
    word.extend_from_slice(inner);
    word.push(b'>');
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_tokens_have_names_that_a_grammar_can_write() {
        for (name, expected) in [
            ("[TOOL_CALLS]", "<TOOL_CALLS>"),
            ("</s>", "</s>"),
            ("<|im_end|>", "<|im_end|>"),
            ("pad", "<pad>"),
        ] {
            let word = word(Token::Control(name.as_bytes()));
            assert_eq!((word[0], &word[1..]), (CONTROL, expected.as_bytes()));
        }
        assert_eq!(word(Token::Text(&[0xff])), b"", "a byte that no text has");
    }

    #[test]
    fn a_vocabulary_without_its_end_is_refused() {
        let tokens = || [Token::Text(b"a"), Token::Text(b"b")];
        assert!(Vocabulary::new(tokens(), &[1]).is_ok());
        assert_eq!(
            Vocabulary::new(tokens(), &[2]).unwrap_err().to_string(),
            "the vocabulary must have end-of-sequence ids below 2, got 2"
        );
        assert!(Vocabulary::new([], &[]).is_err());
    }
}
