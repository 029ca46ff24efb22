//! The OpenAI HTTP API: bodies in, JSON and event streams out. Everything else is shared with gRPC.

mod chat;
mod completions;
mod error;
mod fields;
mod held;
mod logprobs;
mod models;
mod options;
mod responses;
mod stream;
mod structured;
#[cfg(test)]
mod tests;
mod tokens;
mod tools;

use serde::Serialize;
use serde_json::Value;
use tramontane_coordination::Version;
use tramontane_tokenizer::Tokenizer;
use tramontane_types::FinishReason;

pub(crate) use chat::{ChatRender, MESSAGES_MAX, parse_chat, role};
pub(crate) use completions::{CompletionRender, parse_completion};
pub(crate) use error::{error_body, error_response};
pub(crate) use held::{EventBytes, Failed, held_stream};
pub(crate) use models::{model, models};
pub(crate) use responses::{ResponseRender, parse_response, response_error};
pub(crate) use stream::{StreamOptions, error_event, event_stream, last_event};
pub(crate) use tokens::{check_num_tokens, parse_detokenize, parse_tokenize};
pub(crate) use tools::check_name;

use crate::answer::{Choice, Spent};
use crate::error::ApiError;
use crate::request::GenerationRequest;
use crate::sequence::Delta;
use logprobs::PromptLogprobs;

/// A parsed body: the request, and the form that its answer is to have. What is asked for takes much more memory, and
/// the form is all that is needed once it is tokenized.
#[derive(Debug)]
pub(crate) struct Parsed {
    pub(crate) request: GenerationRequest,
    pub(crate) form: Form,
}

/// The form of an answer.
#[derive(Debug, Default)]
pub(crate) struct Form {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// The usage says how long the request took.
    pub(crate) include_metrics: bool,
    /// Whether the answer reports log probabilities.
    pub(crate) logprobs: bool,
    /// What of the request its answer repeats: the text of an object, which is much smaller than its values.
    pub(crate) repeats: Box<str>,
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
    /// The usage says how long the request took.
    pub(crate) include_metrics: bool,
}

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Where events have names.
    pub(crate) name: Option<String>,
    /// JSON text.
    pub(crate) data: String,
}

impl From<Value> for Chunk {
    fn from(data: Value) -> Self {
        Self {
            name: None,
            data: data.to_string(),
        }
    }
}

/// How deltas and answers look at one route.
pub(crate) trait Render: Send {
    /// What opens an answer that has said nothing yet.
    fn open(&mut self, choice: usize, echo: Option<&str>) -> Vec<Chunk>;
    /// The chunks that a delta makes, if any. The last one of a delta that ends an answer says so.
    fn chunks(&mut self, delta: &Delta) -> Vec<Chunk>;
    /// The chunks behind the last one.
    fn end(&mut self, spent: Spent) -> Vec<Chunk>;
    /// The last event of a stream that fails.
    fn failed(&mut self, error: &ApiError) -> Chunk {
        error_body(error).into()
    }
    /// Whether events have names, and the last one is the mark of the end.
    fn names_events(&self) -> bool {
        false
    }
    /// Takes note of a delta of an answer that is given whole.
    fn note(&mut self, _delta: &Delta) {}
    /// The whole answer as the JSON text of one object, all of its deltas noted. Long CPU work where it reports log
    /// probabilities.
    fn whole(&self, choices: &[Choice], spent: Spent) -> Result<Vec<u8>, ApiError>;
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

fn finish_reason(reason: Option<FinishReason>, has_calls: bool) -> Value {
    match reason {
        Some(FinishReason::Stop) if has_calls => "tool_calls".into(),
        Some(FinishReason::Stop) => "stop".into(),
        // Workers never end a sequence as aborted here: that is a loss and replayed.
        Some(FinishReason::Length | FinishReason::Aborted) => "length".into(),
        None => Value::Null,
    }
}

fn usage_object(spent: Spent, with_metrics: bool) -> Value {
    let usage = spent.usage;
    let mut object = serde_json::json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
        // Nothing is thought in secret, predicted by clients or spoken.
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    });
    if with_metrics {
        object["metrics"] = metrics_object(spent);
    }
    object
}

/// How long the request took, in seconds.
fn metrics_object(spent: Spent) -> Value {
    let decoding = spent.first_token.map(|first| spent.total - first);
    let decoding = decoding.map(|time| time.as_secs_f64()).filter(|t| *t > 0.0);
    let num_next = spent.usage.completion_tokens.saturating_sub(1);
    serde_json::json!({
        "queue_time": spent.queued.as_secs_f64(),
        "time_to_first_token": spent.first_token.map(|time| time.as_secs_f64()),
        "mean_inter_token_time": spent.next_token.map(|time| time.as_secs_f64()),
        "total_time": spent.total.as_secs_f64(),
        "tokens_per_second": decoding.map(|time| f64::from(num_next) / time),
    })
}

/// A whole answer, written straight into JSON.
#[derive(Serialize)]
struct Whole<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: Vec<C>,
    usage: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
}

impl<'a, C> Whole<'a, C> {
    fn new(head: &'a Head, object: &'static str, choices: Vec<C>, spent: Spent) -> Self {
        Self {
            id: &head.id,
            object,
            created: head.created,
            model: &head.model,
            system_fingerprint: &head.system_fingerprint,
            choices,
            usage: usage_object(spent, head.include_metrics),
            prompt_logprobs: None,
        }
    }
}

/// Log probabilities as values; few, of one delta.
fn few_values(logprobs: impl Serialize) -> Value {
    // Only maps with keys that are no strings have no value.
    serde_json::to_value(logprobs).unwrap_or_default()
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
