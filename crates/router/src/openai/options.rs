//! The parameters that both routes share, and those that are refused by name: known, with an effect, and
//! not offered here. Unknown fields are ignored.

use serde_json::Value;
use tramontane_types::TokenId;

use super::fields::{self, Fields, wrong};
use super::structured;
use crate::error::ApiError;
use crate::request::Options;

/// Whether a value of a known field asks for something.
pub(crate) type Asks = fn(&Value) -> bool;

/// Most entries of `metadata`, and most characters of their keys and values, as in the OpenAI API.
pub(crate) const METADATA_MAX: usize = 16;
const METADATA_KEY_MAX: usize = 64;
const METADATA_VALUE_MAX: usize = 512;

/// Fields that are refused when they ask for something.
pub(crate) const REFUSED: [(&str, Asks); 34] = [
    ("functions", not_empty),
    ("function_call", not_none_or_auto),
    ("audio", anything),
    ("modalities", more_than_text),
    ("prediction", anything),
    ("web_search_options", anything),
    ("reasoning_effort", not_none),
    ("store", is_true),
    ("service_tier", not_auto_or_default),
    ("verbosity", not_medium),
    ("moderation", anything),
    ("background", is_true),
    ("conversation", anything),
    ("guided_decoding_backend", anything),
    ("guided_whitespace_pattern", anything),
    ("chat_template", anything),
    ("chat_template_kwargs", not_empty),
    ("documents", not_empty),
    ("continue_final_message", is_true),
    ("use_beam_search", is_true),
    ("length_penalty", not_one),
    ("early_stopping", is_true),
    ("include_stop_str_in_output", is_true),
    ("skip_special_tokens", is_false),
    ("truncate_prompt_tokens", anything),
    ("allowed_token_ids", anything),
    ("logits_processors", not_empty),
    ("lora_request", anything),
    ("add_generation_prompt", is_false),
    ("prompt_embeds", anything),
    ("cache_salt", not_empty),
    ("return_token_ids", is_true),
    ("return_tokens_as_token_ids", is_true),
    ("spaces_between_special_tokens", is_false),
];

/// What a chat refuses beside them.
pub(crate) const CHAT_REFUSED: [(&str, Asks); 3] = [
    ("echo", is_true),
    ("suffix", not_empty),
    ("best_of", not_one),
];

/// What a completion refuses beside them.
pub(crate) const COMPLETION_REFUSED: [(&str, Asks); 4] = [
    ("tools", not_empty),
    ("tool_choice", not_none_or_auto),
    ("top_logprobs", anything),
    ("max_completion_tokens", anything),
];

/// What a response refuses beside them.
pub(crate) const RESPONSE_REFUSED: [(&str, Asks); 20] = [
    ("prompt_logprobs", anything),
    ("previous_response_id", anything),
    ("prompt", anything),
    ("reasoning", asks_to_reason),
    ("truncation", not_disabled),
    ("max_tool_calls", anything),
    ("background_options", anything),
    ("context_management", not_empty),
    ("access_programs", anything),
    ("image", anything),
    ("n", not_one),
    ("stop", not_empty),
    ("best_of", not_one),
    ("echo", is_true),
    ("suffix", not_empty),
    ("logprobs", is_true),
    ("max_tokens", anything),
    ("max_completion_tokens", anything),
    ("messages", anything),
    ("multi_agent", anything),
];

fn not_auto_or_default(value: &Value) -> bool {
    value != "auto" && value != "default"
}

fn not_medium(value: &Value) -> bool {
    value != "medium"
}

fn not_disabled(value: &Value) -> bool {
    value != "disabled"
}

fn asks_to_reason(value: &Value) -> bool {
    let asks = |(_, value): (&String, &Value)| !value.is_null() && value != "none";
    value.as_object().is_none_or(|map| map.iter().any(asks))
}

fn anything(_value: &Value) -> bool {
    true
}

fn not_empty(value: &Value) -> bool {
    match value {
        Value::Array(list) => !list.is_empty(),
        Value::Object(map) => !map.is_empty(),
        Value::String(text) => !text.is_empty(),
        _ => true,
    }
}

fn not_none(value: &Value) -> bool {
    value != "none"
}

fn not_none_or_auto(value: &Value) -> bool {
    value != "none" && value != "auto"
}

fn more_than_text(value: &Value) -> bool {
    value
        .as_array()
        .is_none_or(|list| list.iter().any(|modality| modality != "text"))
}

fn is_true(value: &Value) -> bool {
    value != false
}

fn is_false(value: &Value) -> bool {
    value != true
}

fn not_one(value: &Value) -> bool {
    value.as_f64() != Some(1.0)
}

/// Refuses fields that ask for what this server does not offer.
pub(crate) fn refuse_unsupported(
    body: &Fields<'_>,
    others: &[(&str, Asks)],
) -> Result<(), ApiError> {
    for &(name, asks) in REFUSED.iter().chain(others) {
        if body.get(name).is_some_and(asks) {
            return Err(ApiError::unsupported(name));
        }
    }
    Ok(())
}

/// The sampling parameters that both routes share.
pub(crate) fn shared_options(body: &Fields<'_>) -> Result<Options, ApiError> {
    check_metadata(body)?;
    let constraint = structured::constraint(body)?;
    Ok(Options {
        constraint_name: constraint.as_ref().map(|(_, name)| *name),
        constraint: constraint.map(|(constraint, _)| constraint),
        temperature: body.number("temperature")?,
        top_k: top_k(body)?,
        top_p: body.number("top_p")?,
        min_p: body.number("min_p")?,
        presence_penalty: body.number("presence_penalty")?,
        frequency_penalty: body.number("frequency_penalty")?,
        repetition_penalty: body.number("repetition_penalty")?,
        logit_bias: logit_bias(body)?,
        seed: body.integer("seed")?,
        max_tokens: body.unsigned("max_tokens")?,
        min_tokens: body.unsigned("min_tokens")?,
        stop: stop(body)?,
        stop_token_ids: match body.array("stop_token_ids")? {
            Some(ids) => fields::token_ids(ids, "stop_token_ids")?,
            None => Vec::new(),
        },
        ignore_eos: body.boolean("ignore_eos")?,
        n: body.unsigned("n")?,
        priority: body.unsigned("priority")?,
        bad_words: match body.array("bad_words")? {
            Some(words) => strings(words, "bad_words")?,
            None => Vec::new(),
        },
        ..Options::default()
    })
}

/// `metadata`, which a response repeats and others ignore.
fn check_metadata(body: &Fields<'_>) -> Result<(), ApiError> {
    let Some(metadata) = body.object("metadata")? else {
        return Ok(());
    };
    let wrong = |rule: String| {
        let message = format!("metadata must {rule}");
        Err(ApiError::invalid("metadata", message))
    };
    let num = metadata.iter().count();
    if num > METADATA_MAX {
        return wrong(format!("have at most {METADATA_MAX} entries, got {num}"));
    }
    for (key, value) in metadata.iter() {
        let got = key.chars().count();
        if got > METADATA_KEY_MAX {
            return wrong(format!(
                "have keys of at most {METADATA_KEY_MAX} characters, got {got}"
            ));
        }
        let got = fields::string(value, "each value of metadata");
        let got = got.map_err(|error| error.at("metadata"))?.chars().count();
        if got > METADATA_VALUE_MAX {
            return wrong(format!(
                "have values of at most {METADATA_VALUE_MAX} characters, got {got}"
            ));
        }
    }
    Ok(())
}

/// The refusal of `param`, which asks for log probabilities of the prompt in a stream.
pub(crate) fn not_in_a_stream(param: &str) -> ApiError {
    let message = "log probabilities of the prompt are only given without stream";
    ApiError::invalid(param, message)
}

/// -1 switches it off, as in vLLM.
fn top_k(body: &Fields<'_>) -> Result<Option<u32>, ApiError> {
    if body.get("top_k").and_then(Value::as_i64) == Some(-1) {
        return Ok(Some(0));
    }
    body.unsigned("top_k")
}

fn stop(body: &Fields<'_>) -> Result<Vec<String>, ApiError> {
    match body.get("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop.clone()]),
        Some(Value::Array(stops)) => strings(stops, "stop"),
        Some(other) => Err(wrong("stop", "a string or an array of strings", other)),
    }
}

fn strings(values: &[Value], path: &str) -> Result<Vec<String>, ApiError> {
    let mut list = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        list.push(fields::string(value, &format!("{path}[{i}]"))?.to_owned());
    }
    Ok(list)
}

fn logit_bias(body: &Fields<'_>) -> Result<Vec<(TokenId, f32)>, ApiError> {
    let Some(map) = body.object("logit_bias")? else {
        return Ok(Vec::new());
    };
    let mut biases = Vec::new();
    for (key, value) in map.iter() {
        let Ok(id) = key.parse::<TokenId>() else {
            let message = "logit_bias must have token ids as keys, got something else";
            return Err(ApiError::invalid("logit_bias", message));
        };
        biases.push((id, fields::number(value, &format!("logit_bias.{id}"))?));
    }
    Ok(biases)
}

/// `stream`, and `stream_options.include_usage`.
pub(crate) fn stream_options(body: &Fields<'_>) -> Result<(bool, bool), ApiError> {
    let stream = body.boolean("stream")?.unwrap_or(false);
    let Some(options) = body.object("stream_options")? else {
        return Ok((stream, false));
    };
    if !stream {
        let message = "stream_options is only allowed when stream is true";
        return Err(ApiError::invalid("stream_options", message));
    }
    Ok((stream, options.boolean("include_usage")?.unwrap_or(false)))
}
