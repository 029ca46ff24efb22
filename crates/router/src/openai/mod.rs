//! The OpenAI HTTP API: bodies in, JSON and event streams out. Everything else is shared with gRPC.

mod chat;
mod completions;
mod error;
mod fields;
mod logprobs;
mod models;
mod options;
mod stream;
mod structured;
#[cfg(test)]
mod tests;

use serde_json::Value;
use tramontane_coordination::Version;
use tramontane_tokenizer::Tokenizer;
use tramontane_types::{FinishReason, Usage};

pub(crate) use chat::{ChatRender, MESSAGES_MAX, parse_chat, role};
pub(crate) use completions::{CompletionRender, parse_completion};
pub(crate) use error::{error_body, error_response};
pub(crate) use models::{model, models};
pub(crate) use stream::{StreamOptions, event_stream, last_event};

use crate::answer::Choice;
use crate::error::ApiError;
use crate::request::GenerationRequest;
use crate::sequence::Delta;

/// A parsed body: the request, and what the door needs to answer it.
#[derive(Clone, Debug)]
pub(crate) struct Parsed {
    pub(crate) request: GenerationRequest,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Whether the answer reports log probabilities.
    pub(crate) logprobs: bool,
}

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) id: String,
    /// Unix time in seconds.
    pub(crate) created: u64,
    pub(crate) model: String,
    /// See [`fingerprint`].
    pub(crate) system_fingerprint: String,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) logprobs: bool,
    /// Chunks carry `"usage": null`, and one more at the end carries the usage.
    pub(crate) include_usage: bool,
}

/// How deltas and answers look at one route.
pub(crate) trait Render: Send {
    /// What opens an answer that has said nothing yet.
    fn open(&mut self, choice: usize, echo: Option<&str>) -> Option<Value>;
    /// The chunks that a delta makes, if any.
    fn chunks(&mut self, delta: &Delta) -> Vec<Value>;
    /// The chunk after the last one.
    fn usage(&self, usage: Usage) -> Value;
    /// The whole answer as one object.
    fn whole(&self, choices: &[Choice], usage: Usage) -> Value;
}

/// Parses the JSON of a body.
pub(crate) fn parse_json(body: &[u8]) -> Result<Value, ApiError> {
    if body.is_empty() {
        return Err(ApiError::new(
            crate::error::ErrorKind::Invalid,
            "the body is empty, expected a JSON object",
        ));
    }
    serde_json::from_slice(body).map_err(|error| {
        let message = format!("the body is not valid JSON: {error}");
        ApiError::new(crate::error::ErrorKind::Invalid, message)
    })
}

/// What decides an answer beside its request: equal for equal weights that are computed alike.
pub(crate) fn fingerprint(version: &Version) -> String {
    format!("{}-{}", version.model, version.numeric_class)
}

fn finish_reason(reason: Option<FinishReason>) -> Value {
    match reason {
        Some(FinishReason::Stop) => "stop".into(),
        // Workers never end a sequence as aborted here: that is a loss and replayed.
        Some(FinishReason::Length | FinishReason::Aborted) => "length".into(),
        None => Value::Null,
    }
}

fn usage_object(usage: Usage) -> Value {
    serde_json::json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}

/// A chunk or object with the fields that all of them share.
fn object(head: &Head, kind: &str, choices: Vec<Value>) -> Value {
    let mut object = serde_json::json!({
        "id": head.id,
        "object": kind,
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.system_fingerprint,
    });
    object["choices"] = Value::Array(choices);
    object
}

fn chunk(head: &Head, kind: &str, choices: Vec<Value>) -> Value {
    let mut chunk = object(head, kind, choices);
    if head.include_usage {
        chunk["usage"] = Value::Null;
    }
    chunk
}
