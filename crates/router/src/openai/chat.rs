//! `POST /v1/chat/completions`: messages in, assistant messages out.

use serde_json::{Value, json};
use tramontane_tokenizer::{ChatMessage, ChatRequest, Role};
use tramontane_types::Usage;

use super::fields::{self, Fields, wrong};
use super::logprobs::chat_logprobs;
use super::options::{refuse_unsupported, shared_options, stream_options};
use super::{Head, Parsed, Render, chunk, finish_reason, object, usage_object};
use crate::answer::Choice;
use crate::error::{ApiError, ErrorKind};
use crate::request::{GenerationRequest, Prompt};
use crate::run::ServedModel;
use crate::sequence::Delta;

/// Most messages of a conversation.
pub(crate) const MESSAGES_MAX: usize = 4096;
/// Most parts of one message.
pub(crate) const PARTS_MAX: usize = 1024;

/// Checks a chat body.
pub(crate) fn parse_chat(body: &Value, model: &ServedModel) -> Result<Parsed, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    refuse_unsupported(&body)?;
    if body.boolean("echo")? == Some(true) {
        return Err(ApiError::unsupported("echo"));
    }
    let (stream, include_usage) = stream_options(&body)?;
    let mut options = shared_options(&body)?;
    if let Some(max) = body.unsigned("max_completion_tokens")? {
        options.max_tokens = Some(max);
        options.max_tokens_name = Some("max_completion_tokens");
    }
    let wants_logprobs = body.boolean("logprobs")?.unwrap_or(false);
    let top = body.unsigned("top_logprobs")?;
    if top.is_some_and(|n| n > 0) && !wants_logprobs {
        let message = "top_logprobs is only allowed when logprobs is true";
        return Err(ApiError::invalid("top_logprobs", message));
    }
    options.logprobs = wants_logprobs.then(|| top.unwrap_or(0));
    let chat = ChatRequest {
        messages: messages(&body)?,
        tools: Vec::new(),
    };
    let request = GenerationRequest::new(vec![Prompt::Chat(chat)], &options, model)?;
    Ok(Parsed {
        request,
        stream,
        include_usage,
        logprobs: wants_logprobs,
    })
}

fn messages(body: &Fields<'_>) -> Result<Vec<ChatMessage>, ApiError> {
    body.required("messages")?;
    let list = body.array("messages")?.unwrap_or_default();
    if list.is_empty() || list.len() > MESSAGES_MAX {
        let message = format!(
            "messages must have 1 to {MESSAGES_MAX} entries, got {}",
            list.len()
        );
        return Err(ApiError::invalid("messages", message));
    }
    let mut messages = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        messages.push(message(value, &format!("messages[{i}]"))?);
    }
    Ok(messages)
}

fn message(value: &Value, path: &str) -> Result<ChatMessage, ApiError> {
    let fields = Fields::of(value, path)?;
    fields.required("role")?;
    let role = role(
        fields.string("role")?.unwrap_or_default(),
        &fields.path("role"),
    )?;
    for name in ["tool_calls", "function_call", "audio"] {
        let asks = fields
            .get(name)
            .is_some_and(|v| !v.as_array().is_some_and(Vec::is_empty));
        if asks {
            return Err(ApiError::unsupported(&fields.path(name)));
        }
    }
    let content = content(fields.required("content")?, &fields.path("content"))?;
    let prefix = fields.boolean("prefix")?.unwrap_or(false);
    Ok(ChatMessage {
        prefix,
        ..ChatMessage::new(role, content)
    })
}

/// The role of a message, for both doors.
pub(crate) fn role(name: &str, path: &str) -> Result<Role, ApiError> {
    match name {
        "system" | "developer" => Ok(Role::System),
        "user" => Ok(Role::User),
        "assistant" => Ok(Role::Assistant),
        "tool" | "function" => {
            let message = format!(
                "{path} must be system, developer, user or assistant: tools are not supported by this server"
            );
            Err(ApiError::new(ErrorKind::Unsupported, message).at(path))
        }
        _ => {
            let message =
                format!("{path} must be system, developer, user or assistant, got something else");
            Err(ApiError::invalid(path, message))
        }
    }
}

fn content(value: &Value, path: &str) -> Result<String, ApiError> {
    let parts = match value {
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        other => return Err(wrong(path, "a string or an array of parts", other)),
    };
    if parts.len() > PARTS_MAX {
        let message = format!(
            "{path} must have at most {PARTS_MAX} parts, got {}",
            parts.len()
        );
        return Err(ApiError::invalid(path, message));
    }
    let mut text = String::new();
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{path}[{i}]");
        if let Value::String(plain) = part {
            text.push_str(plain);
            continue;
        }
        let part = Fields::of(part, &path)?;
        let kind = fields::string(part.required("type")?, &part.path("type"))?;
        if kind != "text" {
            let path = part.path("type");
            let message =
                format!("{path} must be text: other content is not supported by this server");
            return Err(ApiError::new(ErrorKind::Unsupported, message).at(&path));
        }
        text.push_str(fields::string(part.required("text")?, &part.path("text"))?);
    }
    Ok(text)
}

/// Renders `chat.completion` and `chat.completion.chunk`.
#[derive(Debug)]
pub(crate) struct ChatRender {
    head: Head,
}

const CHUNK: &str = "chat.completion.chunk";

impl ChatRender {
    pub(crate) const fn new(head: Head) -> Self {
        Self { head }
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish: Value) -> Value {
        let mut choice = json!({ "index": index });
        choice["delta"] = delta;
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = finish;
        chunk(&self.head, CHUNK, vec![choice])
    }
}

impl Render for ChatRender {
    fn open(&mut self, choice: usize, _echo: Option<&str>) -> Option<Value> {
        let delta = json!({ "role": "assistant", "content": "" });
        Some(self.chunk(choice, delta, Value::Null, Value::Null))
    }

    fn chunks(&mut self, delta: &Delta) -> Vec<Value> {
        let mut chunks = Vec::with_capacity(2);
        let logprobs = if self.head.logprobs {
            chat_logprobs(&delta.tokens, delta.has_end_token, &self.head.tokenizer)
        } else {
            Value::Null
        };
        if !delta.text.is_empty() || logprobs_have_content(&logprobs) {
            let content = json!({ "content": delta.text });
            chunks.push(self.chunk(delta.choice, content, logprobs, Value::Null));
        }
        if delta.finish.is_some() {
            let reason = finish_reason(delta.finish);
            chunks.push(self.chunk(delta.choice, json!({}), Value::Null, reason));
        }
        chunks
    }

    fn usage(&self, usage: Usage) -> Value {
        let mut last = object(&self.head, CHUNK, Vec::new());
        last["usage"] = usage_object(usage);
        last
    }

    fn whole(&self, choices: &[Choice], usage: Usage) -> Value {
        let mut list = Vec::with_capacity(choices.len());
        for (index, choice) in choices.iter().enumerate() {
            let logprobs = if self.head.logprobs {
                chat_logprobs(&choice.tokens, choice.has_end_token, &self.head.tokenizer)
            } else {
                Value::Null
            };
            list.push(json!({
                "index": index,
                "message": { "role": "assistant", "content": choice.text, "refusal": null },
                "logprobs": logprobs,
                "finish_reason": finish_reason(choice.finish),
            }));
        }
        let mut whole = object(&self.head, "chat.completion", list);
        whole["usage"] = usage_object(usage);
        whole
    }
}

fn logprobs_have_content(logprobs: &Value) -> bool {
    logprobs["content"]
        .as_array()
        .is_some_and(|content| !content.is_empty())
}
