//! Tools in requests: what may be called, whether to, and what was called before. Never looks into a schema.

use serde_json::{Value, json};
use tramontane_tokenizer::{FUNCTION_NAME_MAX, ToolCall, is_function_name};

use super::fields::{self, Fields, wrong};
use crate::error::{ApiError, ErrorKind};
use crate::tools::{CALLS_MAX, TOOLS_MAX, ToolChoice, ToolUse};

const CHOICE: &str = "tool_choice";

/// The tools of a chat: `{"type": "function", "function": {...}}`.
pub(super) fn chat_tools(body: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let mut tools = Vec::new();
    for (i, tool) in body.array("tools")?.unwrap_or_default().iter().enumerate() {
        let path = format!("tools[{i}]");
        let tool = Fields::of(tool, &path)?;
        only_functions(&tool)?;
        let function = tool.required("function")?;
        tools.push(function_tool(&Fields::of(
            function,
            &format!("{path}.function"),
        )?)?);
    }
    Ok(tools)
}

/// The tools of a response: `{"type": "function", "name": ...}`.
pub(super) fn response_tools(body: &Fields<'_>) -> Result<Vec<Value>, ApiError> {
    let mut tools = Vec::new();
    for (i, tool) in body.array("tools")?.unwrap_or_default().iter().enumerate() {
        let tool = Fields::of(tool, &format!("tools[{i}]"))?;
        only_functions(&tool)?;
        tools.push(function_tool(&tool)?);
    }
    Ok(tools)
}

fn only_functions(tool: &Fields<'_>) -> Result<(), ApiError> {
    let path = tool.path("type");
    if fields::string(tool.required("type")?, &path)? == "function" {
        return Ok(());
    }
    let message = format!("{path} must be function: other tools are not supported by this server");
    Err(ApiError::new(ErrorKind::Unsupported, message).at(&path))
}

/// A tool in the form of a chat, for the tokenizer.
fn function_tool(function: &Fields<'_>) -> Result<Value, ApiError> {
    let name = fields::string(function.required("name")?, &function.path("name"))?;
    check_name(name, &function.path("name"))?;
    let mut tool = json!({ "name": name });
    if let Some(description) = function.string("description")? {
        tool["description"] = description.into();
    }
    if let Some(parameters) = function.get("parameters") {
        if !parameters.is_object() {
            return Err(wrong(&function.path("parameters"), "an object", parameters));
        }
        tool["parameters"] = parameters.clone();
    }
    if let Some(strict) = function.boolean("strict")? {
        tool["strict"] = strict.into();
    }
    Ok(json!({ "type": "function", "function": tool }))
}

/// Refuses what is no name of a function.
pub(crate) fn check_name(name: &str, path: &str) -> Result<(), ApiError> {
    if is_function_name(name) {
        return Ok(());
    }
    let message = format!(
        "{path} must be 1 to {FUNCTION_NAME_MAX} of a-z, A-Z, 0-9, _ and -, got something else"
    );
    Err(ApiError::invalid(path, message))
}

/// `tool_choice` and `parallel_tool_calls`; what names a function has it below `function` in a chat.
pub(super) fn tool_use(body: &Fields<'_>, is_chat: bool) -> Result<ToolUse, ApiError> {
    let parallel = body.boolean("parallel_tool_calls")?.unwrap_or(true);
    let Some(value) = body.get(CHOICE) else {
        return Ok(ToolUse {
            parallel,
            ..ToolUse::default()
        });
    };
    if value.is_string() {
        let words = [
            ("auto", ToolChoice::Auto),
            ("none", ToolChoice::None),
            ("required", ToolChoice::Required),
        ];
        return Ok(ToolUse {
            choice: word(value, CHOICE, &words)?,
            only: None,
            parallel,
        });
    }
    if !value.is_object() {
        return Err(wrong(CHOICE, "a string or an object", value));
    }
    let choice = Fields::of(value, CHOICE)?;
    let kind = fields::string(choice.required("type")?, &choice.path("type"))?;
    if kind != "allowed_tools" {
        return Ok(ToolUse::function(named(&choice, is_chat)?));
    }
    let allowed = if is_chat {
        Fields::of(choice.required(kind)?, &choice.path(kind))?
    } else {
        choice
    };
    let modes = [
        ("auto", ToolChoice::Auto),
        ("required", ToolChoice::Required),
    ];
    Ok(ToolUse {
        choice: word(allowed.required("mode")?, &allowed.path("mode"), &modes)?,
        only: Some(allowed_names(&allowed, is_chat)?),
        parallel,
    })
}

/// The choice that a word stands for.
fn word(value: &Value, path: &str, words: &[(&str, ToolChoice)]) -> Result<ToolChoice, ApiError> {
    let got = fields::string(value, path)?;
    if let Some((_, choice)) = words.iter().find(|(word, _)| *word == got) {
        return Ok(choice.clone());
    }
    let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
    let object = if path == CHOICE { " or an object" } else { "" };
    let message = format!(
        "{path} must be one of {}{object}, got another word",
        words.join(", ")
    );
    Err(ApiError::invalid(path, message))
}

/// The functions of a list of them.
fn allowed_names(allowed: &Fields<'_>, is_chat: bool) -> Result<Vec<String>, ApiError> {
    let path = allowed.path("tools");
    let tools = fields::array(allowed.required("tools")?, &path)?;
    if tools.is_empty() || tools.len() > TOOLS_MAX {
        let got = tools.len();
        let message = format!("{path} must have 1 to {TOOLS_MAX} entries, got {got}");
        return Err(ApiError::invalid(&path, message));
    }
    let names = tools.iter().enumerate().map(|(i, tool)| {
        let tool = Fields::of(tool, &format!("{path}[{i}]"))?;
        named(&tool, is_chat)
    });
    names.collect()
}

/// The function that an object names.
fn named(object: &Fields<'_>, is_chat: bool) -> Result<String, ApiError> {
    only_functions(object)?;
    let name = |function: &Fields<'_>| {
        fields::string(function.required("name")?, &function.path("name")).map(str::to_owned)
    };
    if is_chat {
        let path = object.path("function");
        return name(&Fields::of(object.required("function")?, &path)?);
    }
    name(object)
}

/// The calls of an assistant's message.
pub(super) fn tool_calls(message: &Fields<'_>) -> Result<Vec<ToolCall>, ApiError> {
    let list = message.array("tool_calls")?.unwrap_or_default();
    let path = message.path("tool_calls");
    if list.len() > CALLS_MAX {
        let got = list.len();
        let message = format!("{path} must have at most {CALLS_MAX} entries, got {got}");
        return Err(ApiError::invalid(&path, message));
    }
    let mut calls = Vec::with_capacity(list.len());
    for (i, call) in list.iter().enumerate() {
        let call = Fields::of(call, &format!("{path}[{i}]"))?;
        if call.get("type").is_some() {
            only_functions(&call)?;
        }
        let function = Fields::of(call.required("function")?, &call.path("function"))?;
        calls.push(ToolCall {
            id: fields::string(call.required("id")?, &call.path("id"))?.to_owned(),
            name: fields::string(function.required("name")?, &function.path("name"))?.to_owned(),
            arguments: function.string("arguments")?.unwrap_or_default().to_owned(),
        });
    }
    Ok(calls)
}
