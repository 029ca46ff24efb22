//! Conversations, tools and calls between messages and what both doors share.

use serde_json::{Value, json};
use tramontane_proto::v1;
use tramontane_tokenizer::{ChatMessage, ChatRequest, Role, ToolCall};

use crate::error::ApiError;
use crate::json_marks::{FIELD_MARKS_MAX, JsonMarks};
use crate::openai::{MESSAGES_MAX, check_name, role};
use crate::text::CallDelta;
use crate::tools::{CALLS_MAX, TOOLS_MAX, ToolChoice, ToolUse};

/// A conversation with its tools.
pub(super) fn conversation(chat: v1::ChatMessages) -> Result<(ChatRequest, ToolUse), ApiError> {
    if chat.messages.is_empty() || chat.messages.len() > MESSAGES_MAX {
        let got = chat.messages.len();
        let message = format!("chat.messages must have 1 to {MESSAGES_MAX} entries, got {got}");
        return Err(ApiError::invalid("chat.messages", message));
    }
    let parallel = chat.parallel_tool_calls.unwrap_or(true);
    let tool_use = tool_use(chat.tool_choice.unwrap_or_default(), parallel)?;
    let mut messages = Vec::with_capacity(chat.messages.len());
    for (i, message) in chat.messages.into_iter().enumerate() {
        messages.push(one_message(message, &format!("chat.messages[{i}]"))?);
    }
    let mut tools = Vec::with_capacity(chat.tools.len());
    let mut marks = JsonMarks::at_most(FIELD_MARKS_MAX);
    for (i, tool) in chat.tools.into_iter().enumerate() {
        tools.push(one_tool(tool, &format!("chat.tools[{i}]"), &mut marks)?);
    }
    Ok((ChatRequest { messages, tools }, tool_use))
}

fn one_message(message: v1::ChatMessage, path: &str) -> Result<ChatMessage, ApiError> {
    let role = role(&message.role, &format!("{path}.role"))?;
    let num_calls = message.tool_calls.len();
    if num_calls > CALLS_MAX || (num_calls > 0 && role != Role::Assistant) {
        let path = format!("{path}.tool_calls");
        let rule = format!("at most {CALLS_MAX} entries, in a message of the role assistant");
        let message = format!("{path} must have {rule}, got {num_calls} of {role}");
        return Err(ApiError::invalid(&path, message));
    }
    let call = |call: v1::ToolCall| ToolCall {
        id: call.id,
        name: call.name,
        arguments: call.arguments,
    };
    let is_tool = role == Role::Tool;
    Ok(ChatMessage {
        tool_calls: message.tool_calls.into_iter().map(call).collect(),
        tool_call_id: is_tool.then_some(message.tool_call_id),
        name: Some(message.name).filter(|name| is_tool && !name.is_empty()),
        prefix: message.prefix,
        ..ChatMessage::new(role, message.content)
    })
}

fn one_tool(tool: v1::Tool, path: &str, marks: &mut JsonMarks) -> Result<Value, ApiError> {
    check_name(&tool.name, &format!("{path}.name"))?;
    let mut function = json!({ "name": tool.name });
    if !tool.description.is_empty() {
        function["description"] = tool.description.into();
    }
    if !tool.parameters.is_empty() {
        marks.count_text(&tool.parameters, "the parameters of all tools")?;
        let parameters = serde_json::from_str::<Value>(&tool.parameters).ok();
        let Some(parameters) = parameters.filter(Value::is_object) else {
            let path = format!("{path}.parameters");
            let message = format!("{path} must be the text of a JSON object, got something else");
            return Err(ApiError::invalid(&path, message));
        };
        function["parameters"] = parameters;
    }
    if tool.strict {
        function["strict"] = true.into();
    }
    Ok(json!({ "type": "function", "function": function }))
}

fn tool_use(choice: v1::ToolChoice, parallel: bool) -> Result<ToolUse, ApiError> {
    use v1::tool_choice::Kind;
    let mode = match choice.kind {
        Some(Kind::Function(name)) => return Ok(ToolUse::function(name)),
        Some(Kind::Mode(mode)) => mode,
        None => 0,
    };
    let mode = match v1::ToolMode::try_from(mode) {
        Ok(v1::ToolMode::Unspecified | v1::ToolMode::Auto) => ToolChoice::Auto,
        Ok(v1::ToolMode::None) => ToolChoice::None,
        Ok(v1::ToolMode::Required) => ToolChoice::Required,
        Err(_unknown) => {
            let path = "chat.tool_choice.mode";
            let message = format!("{path} must be a known mode, got {mode}");
            return Err(ApiError::invalid(path, message));
        }
    };
    let got = choice.allowed.len();
    if got > TOOLS_MAX || (got > 0 && mode == ToolChoice::None) {
        let path = "chat.tool_choice.allowed";
        let rule = format!("at most {TOOLS_MAX} entries, and none with the mode none");
        let message = format!("{path} must have {rule}, got {got}");
        return Err(ApiError::invalid(path, message));
    }
    Ok(ToolUse {
        choice: mode,
        only: (got > 0).then_some(choice.allowed),
        parallel,
    })
}

/// New pieces of calls.
pub(super) fn call_pieces(deltas: Vec<CallDelta>) -> Vec<v1::ToolCallPiece> {
    let piece = |delta: CallDelta| {
        let (id, name) = delta
            .begins
            .map_or_else(Default::default, |h| (h.id, h.name));
        v1::ToolCallPiece {
            index: u32::try_from(delta.index).unwrap_or(u32::MAX),
            id,
            name,
            arguments: delta.arguments,
        }
    };
    deltas.into_iter().map(piece).collect()
}

/// Whole calls.
pub(super) fn calls(calls: Vec<ToolCall>) -> Vec<v1::ToolCall> {
    let call = |call: ToolCall| v1::ToolCall {
        id: call.id,
        name: call.name,
        arguments: call.arguments,
    };
    calls.into_iter().map(call).collect()
}
