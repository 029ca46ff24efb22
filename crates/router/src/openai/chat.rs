//! `POST /v1/chat/completions`: messages in, assistant messages out.

use std::collections::BTreeSet;

use serde::Serialize;
use serde_json::{Map, Value, json};
use tramontane_tokenizer::{ChatMessage, ChatRequest, Role, ToolCall};
use tramontane_types::TokenOutput;

use super::fields::{self, Fields, wrong};
use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::options::{
    CHAT_REFUSED, not_in_a_stream, refuse_unsupported, shared_options, stream_options,
};
use super::tools::{chat_tools, tool_calls, tool_use};
use super::{
    Chunk, Form, Head, Parsed, Render, Whole, chunk, few_values, finish_reason, object,
    usage_object,
};
use crate::answer::{Choice, Spent};
use crate::answer_room::json_bytes;
use crate::error::{ApiError, ErrorKind};
use crate::request::{GenerationRequest, Prompt};
use crate::run::ServedModel;
use crate::sequence::Delta;
use crate::text::CallDelta;

/// Most messages of a conversation.
pub(crate) const MESSAGES_MAX: usize = 4096;
/// Most parts of one message.
pub(crate) const PARTS_MAX: usize = 1024;

/// Checks a chat body.
pub(crate) fn parse_chat(body: &Value, model: &ServedModel) -> Result<Parsed, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    refuse_unsupported(&body, &CHAT_REFUSED)?;
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
    options.prompt_logprobs = body.unsigned("prompt_logprobs")?;
    if stream && options.prompt_logprobs.is_some() {
        return Err(not_in_a_stream("prompt_logprobs"));
    }
    options.tool_use = tool_use(&body, true)?;
    let chat = ChatRequest {
        messages: messages(&body)?,
        tools: chat_tools(&body)?,
    };
    let request = GenerationRequest::new(vec![Prompt::Chat(chat)], &options, model)?;
    let form = Form {
        stream,
        include_usage,
        include_metrics: body.boolean("include_metrics")?.unwrap_or(false),
        logprobs: wants_logprobs,
        ..Form::default()
    };
    Ok(Parsed { request, form })
}

pub(super) fn messages(body: &Fields<'_>) -> Result<Vec<ChatMessage>, ApiError> {
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
    for name in ["function_call", "audio"] {
        let asks = fields
            .get(name)
            .is_some_and(|v| !v.as_array().is_some_and(Vec::is_empty));
        if asks {
            return Err(ApiError::unsupported(&fields.path(name)));
        }
    }
    let tool_calls = tool_calls(&fields)?;
    if !tool_calls.is_empty() && role != Role::Assistant {
        let path = fields.path("tool_calls");
        let message = format!("{path} must be in a message of the role assistant");
        return Err(ApiError::invalid(&path, message));
    }
    // Who calls, or refuses, need say nothing.
    let text = fields.get("content").or_else(|| fields.get("refusal"));
    let content = match text {
        Some(value) => content(value, &fields.path("content"))?,
        None if !tool_calls.is_empty() => String::new(),
        None => content(fields.required("content")?, &fields.path("content"))?,
    };
    let tool_call_id = match role {
        Role::Tool => {
            let id = fields.required("tool_call_id")?;
            Some(fields::string(id, &fields.path("tool_call_id"))?.to_owned())
        }
        _ => None,
    };
    let name = fields.string("name")?.filter(|_| role == Role::Tool);
    let prefix = fields.boolean("prefix")?.unwrap_or(false);
    Ok(ChatMessage {
        tool_calls,
        tool_call_id,
        name: name.map(str::to_owned),
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
        "tool" => Ok(Role::Tool),
        "function" => {
            let message = format!(
                "{path} must be tool instead of function, which is not supported by this server"
            );
            Err(ApiError::new(ErrorKind::Unsupported, message).at(path))
        }
        _ => {
            let message = format!(
                "{path} must be system, developer, user, assistant or tool, got something else"
            );
            Err(ApiError::invalid(path, message))
        }
    }
}

/// Text, whole or in parts, whichever of the names of text parts they have.
pub(super) fn content(value: &Value, path: &str) -> Result<String, ApiError> {
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
        if kind == "refusal" {
            text.push_str(fields::string(
                part.required("refusal")?,
                &part.path("refusal"),
            )?);
            continue;
        }
        if !["text", "input_text", "output_text"].contains(&kind) {
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
    /// Choices that have called a tool.
    called: BTreeSet<usize>,
}

const CHUNK: &str = "chat.completion.chunk";

impl ChatRender {
    pub(crate) fn new(head: Head) -> Self {
        Self {
            head,
            called: BTreeSet::new(),
        }
    }

    fn chunk(&self, index: usize, delta: Value, logprobs: Value, finish: Value) -> Chunk {
        let mut choice = json!({ "index": index });
        choice["delta"] = delta;
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = finish;
        chunk(&self.head, CHUNK, vec![choice]).into()
    }

    fn logprobs<'a>(
        &'a self,
        tokens: &'a [TokenOutput],
        has_end_token: bool,
    ) -> Option<ChatLogprobs<'a>> {
        let wanted = self.head.logprobs;
        wanted.then(|| ChatLogprobs::of(tokens, has_end_token, &self.head.tokenizer))
    }
}

/// One of the answers, whole.
#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    message: Value,
    logprobs: Option<ChatLogprobs<'a>>,
    finish_reason: Value,
}

impl Render for ChatRender {
    fn open(&mut self, choice: usize, _echo: Option<&str>) -> Vec<Chunk> {
        let delta = json!({ "role": "assistant", "content": "" });
        vec![self.chunk(choice, delta, Value::Null, Value::Null)]
    }

    fn chunks(&mut self, delta: &Delta) -> Vec<Chunk> {
        let mut chunks = Vec::with_capacity(2);
        let logprobs = self.logprobs(&delta.tokens, delta.has_end_token);
        let has_logprobs = logprobs.is_some_and(|logprobs| !logprobs.is_empty());
        let logprobs = few_values(logprobs);
        let calls = calls_of(&delta.calls);
        if !calls.is_empty() {
            self.called.insert(delta.choice);
        }
        if !delta.text.is_empty() || !calls.is_empty() || has_logprobs {
            let mut content = json!({});
            if !delta.text.is_empty() || calls.is_empty() {
                content["content"] = delta.text.as_str().into();
            }
            if !calls.is_empty() {
                content["tool_calls"] = calls.into();
            }
            chunks.push(self.chunk(delta.choice, content, logprobs, Value::Null));
        }
        if delta.finish.is_some() {
            let reason = finish_reason(delta.finish, self.called.contains(&delta.choice));
            chunks.push(self.chunk(delta.choice, json!({}), Value::Null, reason));
        }
        chunks
    }

    fn end(&mut self, spent: Spent) -> Vec<Chunk> {
        if !self.head.include_usage {
            return Vec::new();
        }
        let mut last = object(&self.head, CHUNK, Vec::new());
        last["usage"] = usage_object(spent, self.head.include_metrics);
        vec![last.into()]
    }

    fn whole(&self, choices: &[Choice], spent: Spent) -> Result<Vec<u8>, ApiError> {
        let mut list = Vec::with_capacity(choices.len());
        for (index, choice) in choices.iter().enumerate() {
            list.push(WholeChoice {
                index,
                message: message_of(choice),
                logprobs: self.logprobs(&choice.tokens, choice.has_end_token),
                finish_reason: finish_reason(choice.finish, !choice.calls.is_empty()),
            });
        }
        let mut whole = Whole::new(&self.head, "chat.completion", list, spent);
        // All answers have the same prompt.
        let first = choices.first().filter(|c| c.prompt_begin.is_some());
        whole.prompt_logprobs = first.map(|first| PromptLogprobs {
            prompt: &first.prompt_tokens,
            tokenizer: &self.head.tokenizer,
        });
        json_bytes(&whole)
    }
}

/// A whole assistant's message.
fn message_of(choice: &Choice) -> Value {
    let mut message = json!({ "role": "assistant", "content": choice.text, "refusal": null });
    if choice.calls.is_empty() {
        return message;
    }
    if choice.text.is_empty() {
        message["content"] = Value::Null;
    }
    let call = |call: &ToolCall| {
        json!({
            "id": call.id,
            "type": "function",
            "function": { "name": call.name, "arguments": call.arguments },
        })
    };
    message["tool_calls"] = choice.calls.iter().map(call).collect();
    message
}

/// `delta.tool_calls`: one entry per call of which there is something new.
fn calls_of(deltas: &[CallDelta]) -> Vec<Value> {
    let mut calls: Vec<Value> = Vec::new();
    for delta in deltas {
        if delta.begins.is_none()
            && let Some(last) = calls.last_mut().filter(|last| last["index"] == delta.index)
        {
            let arguments = &mut last["function"]["arguments"];
            let before = arguments.as_str().unwrap_or_default();
            *arguments = format!("{before}{}", delta.arguments).into();
            continue;
        }
        let mut call = Map::new();
        call.insert("index".to_owned(), delta.index.into());
        let mut function = Map::new();
        if let Some(head) = &delta.begins {
            call.insert("id".to_owned(), head.id.as_str().into());
            call.insert("type".to_owned(), "function".into());
            function.insert("name".to_owned(), head.name.as_str().into());
        }
        function.insert("arguments".to_owned(), delta.arguments.as_str().into());
        call.insert("function".to_owned(), function.into());
        calls.push(call.into());
    }
    calls
}
