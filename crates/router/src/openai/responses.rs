//! `POST /v1/responses`: items in, a response out. Nothing is kept: every request brings its whole conversation.

mod input;
mod render;

use std::sync::Arc;

use serde_json::{Map, Value, json};
use tramontane_tokenizer::ChatRequest;
use tramontane_types::Constraint;

use super::fields::{self, Fields, wrong};
use super::options::{RESPONSE_REFUSED, refuse_unsupported, shared_options};
use super::tools::{response_tools, tool_use};
use super::{Form, Parsed};
use crate::error::{ApiError, ErrorKind};
use crate::request::{GenerationRequest, Options, Prompt};
use crate::run::ServedModel;
use input::conversation;
pub(crate) use render::{ResponseRender, response_error};

/// Most text of all fields that a response repeats: each keeps its own as long as it runs. What a context has room for
/// is less.
const REPEATED_BYTES_MAX: usize = 1 << 20;
/// What `include` may list: the log probabilities of the text.
const INCLUDE_LOGPROBS: &str = "message.output_text.logprobs";
/// Fields that a response repeats as they came.
const REPEATED: [&str; 9] = [
    "instructions",
    "max_output_tokens",
    "metadata",
    "parallel_tool_calls",
    "temperature",
    "text",
    "tool_choice",
    "tools",
    "top_p",
];

/// Checks the body of a response.
pub(crate) fn parse_response(body: &Value, model: &ServedModel) -> Result<Parsed, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    refuse_unsupported(&body, &RESPONSE_REFUSED)?;
    let stream = body.boolean("stream")?.unwrap_or(false);
    if let Some(options) = body.object("stream_options")? {
        options.boolean("include_obfuscation")?;
    }
    let mut options = shared_options(&body)?;
    options.max_tokens = body.unsigned("max_output_tokens")?;
    options.max_tokens_name = Some("max_output_tokens");
    options.tool_use = tool_use(&body, false)?;
    if let Some(format) = text_format(&body)? {
        if let Some(other) = options.constraint_name {
            let message = format!("only one of {other} and text.format is allowed");
            return Err(ApiError::invalid("text.format", message));
        }
        options.constraint = Some(Arc::new(format));
        options.constraint_name = Some("text.format");
    }
    let logprobs = logprobs(&body, &mut options)?;
    let chat = ChatRequest {
        messages: conversation(&body)?,
        tools: response_tools(&body)?,
    };
    let request = GenerationRequest::new(vec![Prompt::Chat(chat)], &options, model)?;
    let form = Form {
        stream,
        include_usage: true,
        logprobs,
        repeats: repeats(&body)?,
        ..Form::default()
    };
    Ok(Parsed { request, form })
}

/// The text of an object with every field that is repeated.
fn repeats(body: &Fields<'_>) -> Result<Box<str>, ApiError> {
    let mut repeats = Map::new();
    let mut num_bytes = 0;
    for name in REPEATED {
        let value = body.get(name).cloned();
        let value = value.unwrap_or_else(|| default_of(name));
        num_bytes += value.to_string().len();
        if num_bytes > REPEATED_BYTES_MAX {
            let message = format!(
                "{name} and the other fields that a response repeats must be at most {REPEATED_BYTES_MAX} bytes of \
                 JSON, got {num_bytes} or more"
            );
            return Err(ApiError::invalid(name, message));
        }
        repeats.insert(name.to_owned(), value);
    }
    // Clients expect all fields of a tool.
    let tools = repeats.get_mut("tools").and_then(Value::as_array_mut);
    for tool in tools.into_iter().flatten() {
        for name in ["description", "parameters", "strict"] {
            if tool.get(name).is_none() {
                tool[name] = Value::Null;
            }
        }
    }
    Ok(Value::from(repeats).to_string().into())
}

/// What a response says of a field that did not come.
fn default_of(name: &str) -> Value {
    match name {
        "metadata" => json!({}),
        "parallel_tool_calls" => true.into(),
        "temperature" | "top_p" => 1.0.into(),
        "text" => json!({ "format": { "type": "text" } }),
        "tool_choice" => "auto".into(),
        "tools" => json!([]),
        _ => Value::Null,
    }
}

/// `include` and `top_logprobs`: whether the answer has log probabilities.
fn logprobs(body: &Fields<'_>, options: &mut Options) -> Result<bool, ApiError> {
    let mut wants_logprobs = false;
    let include = body.array("include")?.unwrap_or_default();
    for (i, entry) in include.iter().enumerate() {
        let path = format!("include[{i}]");
        if fields::string(entry, &path)? != INCLUDE_LOGPROBS {
            let message = format!(
                "{path} must be {INCLUDE_LOGPROBS}: nothing else is supported by this server"
            );
            return Err(ApiError::new(ErrorKind::Unsupported, message).at(&path));
        }
        wants_logprobs = true;
    }
    let top = body.unsigned("top_logprobs")?;
    if top.is_some_and(|n| n > 0) && !wants_logprobs {
        let message = format!("top_logprobs is only allowed when include has {INCLUDE_LOGPROBS}");
        return Err(ApiError::invalid("top_logprobs", message));
    }
    options.logprobs = wants_logprobs.then(|| top.unwrap_or(0));
    Ok(wants_logprobs)
}

/// `text.format`: what the text must look like.
fn text_format(body: &Fields<'_>) -> Result<Option<Constraint>, ApiError> {
    let Some(text) = body.object("text")? else {
        return Ok(None);
    };
    if text.get("verbosity").is_some_and(|value| value != "medium") {
        return Err(ApiError::unsupported("text.verbosity"));
    }
    let Some(format) = text.object("format")? else {
        return Ok(None);
    };
    let path = format.path("type");
    match fields::string(format.required("type")?, &path)? {
        "text" => Ok(None),
        "json_object" => Ok(Some(Constraint::JsonObject)),
        "json_schema" => {
            let schema = format.required("schema")?;
            if !schema.is_object() {
                return Err(wrong(&format.path("schema"), "an object", schema));
            }
            let name = fields::string(format.required("name")?, &format.path("name"))?;
            super::check_name(name, &format.path("name"))?;
            Ok(Some(Constraint::JsonSchema(schema.to_string().into())))
        }
        _ => {
            let message =
                format!("{path} must be text, json_object or json_schema, got something else");
            Err(ApiError::invalid(&path, message))
        }
    }
}
