//! Log probabilities in the two forms of the OpenAI API. Never has a number that JSON cannot say.

use serde_json::{Map, Value, json};
use tramontane_tokenizer::Tokenizer;
use tramontane_types::{TokenId, TokenOutput};

/// Stands for a probability of zero, whose logarithm JSON cannot say; as in the OpenAI API.
pub(crate) const LOGPROB_MIN: f32 = -9999.0;

/// `choices[].logprobs` of a chat: one entry per token, the end token left out.
pub(crate) fn chat_logprobs(
    tokens: &[TokenOutput],
    has_end_token: bool,
    tokenizer: &Tokenizer,
) -> Value {
    let mut content = Vec::with_capacity(tokens.len());
    for token in with_text(tokens, has_end_token) {
        let mut entry = chat_entry(token.id, token.logprob, tokenizer);
        let top = token.top_logprobs.iter();
        let top: Vec<Value> = top
            .map(|t| Value::Object(chat_entry(t.id, Some(t.logprob), tokenizer)))
            .collect();
        entry.insert("top_logprobs".to_owned(), Value::Array(top));
        content.push(Value::Object(entry));
    }
    json!({ "content": content, "refusal": null })
}

/// `logprobs` of a response's text: one entry per token.
pub(crate) fn response_logprobs(tokens: &[TokenOutput], tokenizer: &Tokenizer) -> Vec<Value> {
    let mut logprobs = chat_logprobs(tokens, false, tokenizer);
    match logprobs["content"].take() {
        Value::Array(content) => content,
        _ => Vec::new(),
    }
}

fn chat_entry(id: TokenId, logprob: Option<f32>, tokenizer: &Tokenizer) -> Map<String, Value> {
    let mut entry = Map::new();
    entry.insert("token".to_owned(), token_text(id, tokenizer).into());
    entry.insert("logprob".to_owned(), json!(finite(logprob)));
    entry.insert("bytes".to_owned(), json!(tokenizer.token_bytes(id)));
    entry
}

/// `prompt_logprobs` in vLLM's form: of every token of the prompt but the first its own log probability and those of
/// the most likely ones, by id. `prompt` begins with the second one.
pub(crate) fn prompt_logprobs(prompt: &[TokenOutput], tokenizer: &Tokenizer) -> Value {
    let entry = |token: &TokenOutput| {
        let mut entry = Map::new();
        for (top, rank) in token.top_logprobs.iter().zip(1_usize..) {
            let text = token_text(top.id, tokenizer);
            let logprob = finite(Some(top.logprob));
            let value = json!({ "logprob": logprob, "rank": rank, "decoded_token": text });
            entry.insert(top.id.to_string(), value);
        }
        // Its rank is known only among the best.
        entry.entry(token.id.to_string()).or_insert_with(|| {
            let text = token_text(token.id, tokenizer);
            json!({ "logprob": finite(token.logprob), "rank": null, "decoded_token": text })
        });
        Value::Object(entry)
    };
    let entries = prompt.iter().map(entry);
    std::iter::once(Value::Null).chain(entries).collect()
}

/// `choices[].logprobs` of a completion: parallel lists.
#[derive(Debug)]
pub(crate) struct LegacyLogprobs {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    offset: usize,
}

impl LegacyLogprobs {
    /// Empty lists for text that begins after so many characters.
    pub(crate) const fn starting_at(offset: usize) -> Self {
        Self {
            tokens: Vec::new(),
            token_logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            text_offset: Vec::new(),
            offset,
        }
    }

    pub(crate) fn add(
        &mut self,
        tokens: &[TokenOutput],
        has_end_token: bool,
        tokenizer: &Tokenizer,
    ) {
        for token in with_text(tokens, has_end_token) {
            let text = token_text(token.id, tokenizer);
            let mut top = Map::new();
            for alternative in &token.top_logprobs {
                let text = token_text(alternative.id, tokenizer);
                top.entry(text)
                    .or_insert(json!(finite(Some(alternative.logprob))));
            }
            top.entry(text.clone())
                .or_insert(json!(finite(token.logprob)));
            self.text_offset.push(self.offset.into());
            self.offset += text.chars().count();
            self.tokens.push(text.into());
            self.token_logprobs.push(json!(finite(token.logprob)));
            self.top_logprobs.push(Value::Object(top));
        }
    }

    /// The prompt, for an answer that begins with it: nothing is known of its `first` token. Every token of the prompt
    /// has its place, also one that only marks the beginning and takes none in the text: who asks by ids counts it.
    pub(crate) fn add_prompt(
        &mut self,
        first: TokenId,
        prompt: &[TokenOutput],
        tokenizer: &Tokenizer,
    ) {
        let text = token_text(first, tokenizer);
        self.text_offset.push(self.offset.into());
        if tokenizer.bos_id() != Some(first) {
            self.offset += text.chars().count();
        }
        self.tokens.push(text.into());
        self.token_logprobs.push(Value::Null);
        self.top_logprobs.push(Value::Null);
        self.add(prompt, false, tokenizer);
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Characters up to the end of the last token.
    pub(crate) const fn offset(&self) -> usize {
        self.offset
    }

    pub(crate) fn into_value(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
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
fn token_text(id: TokenId, tokenizer: &Tokenizer) -> String {
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let mut text = "bytes:".to_owned();
            for byte in bytes {
                text.push_str(&format!("\\x{byte:02x}"));
            }
            text
        }
    }
}

fn finite(logprob: Option<f32>) -> Option<f32> {
    // Written so that NaN becomes the minimum.
    logprob.map(|p| {
        if p > LOGPROB_MIN {
            p.min(0.0)
        } else {
            LOGPROB_MIN
        }
    })
}
