//! The items of a request as the messages of a conversation.

use serde_json::Value;
use tramontane_tokenizer::{ChatMessage, Role, ToolCall};

use crate::error::{ApiError, ErrorKind};
use crate::openai::chat::{MESSAGES_MAX, content, role};
use crate::openai::fields::{self, Fields, wrong};
use crate::tools::CALLS_MAX;

/// `instructions` and `input`.
pub(super) fn conversation(body: &Fields<'_>) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = body.string("instructions")? {
        messages.push(ChatMessage::new(Role::System, instructions));
    }
    let items = match body.required("input")? {
        Value::String(text) => {
            messages.push(ChatMessage::new(Role::User, text.clone()));
            return Ok(messages);
        }
        Value::Array(items) => items,
        other => return Err(wrong("input", "a string or an array of items", other)),
    };
    if items.is_empty() || items.len() > MESSAGES_MAX {
        let got = items.len();
        let message = format!("input must have 1 to {MESSAGES_MAX} items, got {got}");
        return Err(ApiError::invalid("input", message));
    }
    for (i, item) in items.iter().enumerate() {
        add_item(&mut messages, &Fields::of(item, &format!("input[{i}]"))?)?;
    }
    Ok(messages)
}

fn add_item(messages: &mut Vec<ChatMessage>, item: &Fields<'_>) -> Result<(), ApiError> {
    let path = item.path("type");
    match item.string("type")?.unwrap_or("message") {
        "message" => {
            let path = item.path("role");
            let role = role(fields::string(item.required("role")?, &path)?, &path)?;
            if role == Role::Tool {
                let message =
                    format!("{path} must be system, developer, user or assistant, got tool");
                return Err(ApiError::invalid(&path, message));
            }
            let text = content(item.required("content")?, &item.path("content"))?;
            messages.push(ChatMessage::new(role, text));
            Ok(())
        }
        "function_call" => add_call(messages, item),
        "function_call_output" => {
            let id = fields::string(item.required("call_id")?, &item.path("call_id"))?;
            let output = content(item.required("output")?, &item.path("output"))?;
            messages.push(ChatMessage {
                tool_call_id: Some(id.to_owned()),
                name: name_of_call(messages, id),
                ..ChatMessage::new(Role::Tool, output)
            });
            Ok(())
        }
        _ => {
            let message = format!(
                "{path} must be message, function_call or function_call_output: other items are not \
                 supported by this server"
            );
            Err(ApiError::new(ErrorKind::Unsupported, message).at(&path))
        }
    }
}

/// Calls that stand beside each other, or behind what the assistant said, are one message.
fn add_call(messages: &mut Vec<ChatMessage>, item: &Fields<'_>) -> Result<(), ApiError> {
    let text = |name: &str| fields::string(item.required(name)?, &item.path(name));
    let call = ToolCall {
        id: text("call_id")?.to_owned(),
        name: text("name")?.to_owned(),
        arguments: text("arguments")?.to_owned(),
    };
    match messages.last_mut() {
        Some(last) if last.role == Role::Assistant && last.tool_calls.len() < CALLS_MAX => {
            last.tool_calls.push(call);
        }
        _ => messages.push(ChatMessage {
            tool_calls: vec![call],
            ..ChatMessage::new(Role::Assistant, "")
        }),
    }
    Ok(())
}

/// The function that was called; formats that know no ids need it.
fn name_of_call(messages: &[ChatMessage], id: &str) -> Option<String> {
    let mut calls = messages.iter().rev().flat_map(|m| &m.tool_calls);
    calls
        .find(|call| call.id == id)
        .map(|call| call.name.clone())
}
