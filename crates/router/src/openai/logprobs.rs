//! Log probabilities in the two forms of the OpenAI API. Never has a number that JSON cannot say. What stands here is
//! written straight into JSON: as values it would take ten times the memory.

use std::borrow::Cow;
use std::fmt::Write as _;

use serde::ser::{Serialize, SerializeMap as _, SerializeStruct as _, Serializer};
use tramontane_tokenizer::Tokenizer;
use tramontane_types::{TokenId, TokenOutput};

/// Stands for a probability of zero, whose logarithm JSON cannot say; as in the OpenAI API.
pub(crate) const LOGPROB_MIN: f32 = -9999.0;

/// `choices[].logprobs` of a chat: one entry per token, the end token left out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChatLogprobs<'a> {
    tokens: &'a [TokenOutput],
    tokenizer: &'a Tokenizer,
}

impl<'a> ChatLogprobs<'a> {
    pub(crate) fn of(
        tokens: &'a [TokenOutput],
        has_end_token: bool,
        tokenizer: &'a Tokenizer,
    ) -> Self {
        Self {
            tokens: with_text(tokens, has_end_token),
            tokenizer,
        }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    fn entries(self) -> impl Iterator<Item = TokenEntry<'a>> {
        let tokenizer = self.tokenizer;
        self.tokens.iter().map(move |token| {
            let Entry {
                token: text,
                logprob,
                bytes,
            } = Entry::of(token.id, token.logprob, tokenizer);
            let top = token.top_logprobs.iter();
            let top = top.map(|t| Entry::of(t.id, Some(t.logprob), tokenizer));
            TokenEntry {
                token: text,
                logprob,
                bytes,
                top_logprobs: top.collect(),
            }
        })
    }
}

impl Serialize for ChatLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_struct("ChatLogprobs", 2)?;
        object.serialize_field("content", &List(|| self.entries()))?;
        object.serialize_field("refusal", &None::<()>)?;
        object.end()
    }
}

/// `logprobs` of a response's text: one entry per token.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ResponseLogprobs<'a>(pub(crate) ChatLogprobs<'a>);

impl Serialize for ResponseLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.entries())
    }
}

#[derive(serde::Serialize)]
struct Entry<'a> {
    token: Cow<'a, str>,
    logprob: Option<f64>,
    bytes: Option<&'a [u8]>,
}

impl<'a> Entry<'a> {
    fn of(id: TokenId, logprob: Option<f32>, tokenizer: &'a Tokenizer) -> Self {
        Self {
            token: token_text(id, tokenizer),
            logprob: finite(logprob),
            bytes: tokenizer.token_bytes(id),
        }
    }
}

#[derive(serde::Serialize)]
struct TokenEntry<'a> {
    token: Cow<'a, str>,
    logprob: Option<f64>,
    bytes: Option<&'a [u8]>,
    top_logprobs: Vec<Entry<'a>>,
}

/// A list whose entries are made as they are written.
struct List<F>(F);

impl<F, I> Serialize for List<F>
where
    F: Fn() -> I,
    I: Iterator,
    I::Item: Serialize,
{
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq((self.0)())
    }
}

/// `prompt_logprobs` in vLLM's form: of every token of the prompt but the first its own log probability and those of
/// the most likely ones, by id.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PromptLogprobs<'a> {
    /// Begins with the second one.
    pub(crate) prompt: &'a [TokenOutput],
    pub(crate) tokenizer: &'a Tokenizer,
}

impl Serialize for PromptLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let tokenizer = self.tokenizer;
        let told = self.prompt.iter();
        let told = told.map(|token| Some(PromptEntry { token, tokenizer }));
        serializer.collect_seq(std::iter::once(None).chain(told))
    }
}

struct PromptEntry<'a> {
    token: &'a TokenOutput,
    tokenizer: &'a Tokenizer,
}

#[derive(serde::Serialize)]
struct Ranked<'a> {
    logprob: Option<f64>,
    rank: Option<usize>,
    decoded_token: Cow<'a, str>,
}

impl Serialize for PromptEntry<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let token = self.token;
        let entry = |id: TokenId, logprob: Option<f32>, rank: Option<usize>| Ranked {
            logprob: finite(logprob),
            rank,
            decoded_token: token_text(id, self.tokenizer),
        };
        let mut entries = serializer.serialize_map(None)?;
        for (top, rank) in token.top_logprobs.iter().zip(1_usize..) {
            entries.serialize_entry(&top.id, &entry(top.id, Some(top.logprob), Some(rank)))?;
        }
        if !token.top_logprobs.iter().any(|top| top.id == token.id) {
            // Its rank is known only among the best.
            entries.serialize_entry(&token.id, &entry(token.id, token.logprob, None))?;
        }
        entries.end()
    }
}

/// `choices[].logprobs` of a completion: parallel lists.
#[derive(Debug)]
pub(crate) struct LegacyLogprobs<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<LegacyToken<'a>>,
    offset: usize,
}

#[derive(Debug)]
struct LegacyToken<'a> {
    id: TokenId,
    /// Nothing is known of the first token of a prompt.
    known: Option<&'a TokenOutput>,
    offset: usize,
}

impl<'a> LegacyLogprobs<'a> {
    /// Empty lists for text that begins after so many characters.
    pub(crate) const fn starting_at(offset: usize, tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            tokens: Vec::new(),
            offset,
        }
    }

    pub(crate) fn add(&mut self, tokens: &'a [TokenOutput], has_end_token: bool) {
        for token in with_text(tokens, has_end_token) {
            self.tokens.push(LegacyToken {
                id: token.id,
                known: Some(token),
                offset: self.offset,
            });
            self.offset += token_text(token.id, self.tokenizer).chars().count();
        }
    }

    /// The prompt, for an answer that begins with it: nothing is known of its `first` token. Every token of the prompt
    /// has its place, also one that only marks the beginning and takes none in the text: who asks by ids counts it.
    pub(crate) fn add_prompt(&mut self, first: TokenId, prompt: &'a [TokenOutput]) {
        self.tokens.push(LegacyToken {
            id: first,
            known: None,
            offset: self.offset,
        });
        if self.tokenizer.bos_id() != Some(first) {
            self.offset += token_text(first, self.tokenizer).chars().count();
        }
        self.add(prompt, false);
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Characters up to the end of the last token.
    pub(crate) const fn offset(&self) -> usize {
        self.offset
    }
}

impl Serialize for LegacyLogprobs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (tokens, tokenizer) = (&self.tokens, self.tokenizer);
        let texts = || tokens.iter().map(|token| token_text(token.id, tokenizer));
        let known = || tokens.iter().map(|token| token.known);
        let logprobs = || known().map(|token| finite(token?.logprob));
        let tops = || {
            known().map(|token| {
                Some(LegacyTop {
                    token: token?,
                    tokenizer,
                })
            })
        };
        let offsets = || tokens.iter().map(|token| token.offset);
        let mut lists = serializer.serialize_struct("LegacyLogprobs", 4)?;
        lists.serialize_field("tokens", &List(texts))?;
        lists.serialize_field("token_logprobs", &List(logprobs))?;
        lists.serialize_field("top_logprobs", &List(tops))?;
        lists.serialize_field("text_offset", &List(offsets))?;
        lists.end()
    }
}

/// The most likely tokens by their text and the token itself: of equal texts the first.
struct LegacyTop<'a> {
    token: &'a TokenOutput,
    tokenizer: &'a Tokenizer,
}

impl Serialize for LegacyTop<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let token = self.token;
        let top = token.top_logprobs.iter();
        let top = top.map(|other| (other.id, Some(other.logprob)));
        let mut entries: Vec<(Cow<'_, str>, Option<f64>)> = Vec::new();
        for (id, logprob) in top.chain([(token.id, token.logprob)]) {
            let text = token_text(id, self.tokenizer);
            if entries.iter().all(|(other, _)| *other != text) {
                entries.push((text, finite(logprob)));
            }
        }
        serializer.collect_map(entries)
    }
}

/// The tokens that are part of the text.
fn with_text(tokens: &[TokenOutput], has_end_token: bool) -> &[TokenOutput] {
    let num = if has_end_token {
        tokens.len().saturating_sub(1)
    } else {
        tokens.len()
    };
    tokens.get(..num).unwrap_or_default()
}

/// A token as text; bytes that are no whole characters as `bytes:\xe2\x96`, as in the OpenAI API.
fn token_text(id: TokenId, tokenizer: &Tokenizer) -> Cow<'_, str> {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => {
            let mut text = "bytes:".to_owned();
            for byte in bytes {
                // Writing to a string cannot fail.
                let _ = write!(text, "\\x{byte:02x}");
            }
            Cow::Owned(text)
        }
    }
}

/// As precise as JSON's numbers are.
fn finite(logprob: Option<f32>) -> Option<f64> {
    // Written so that NaN becomes the minimum.
    logprob.map(|p| {
        let finite = if p > LOGPROB_MIN {
            p.min(0.0)
        } else {
            LOGPROB_MIN
        };
        f64::from(finite)
    })
}
