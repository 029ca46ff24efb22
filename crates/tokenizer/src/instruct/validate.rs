//! The rules of mistral-common's `protocol/instruct/validator.py` in serving mode. Errors name the field.

use serde_json::Value;

use super::InstructVersion;
use super::normalize::NO_CALL_ID;
use crate::Error;
use crate::chat::{ChatMessage, ChatRequest, Role};
use crate::tool_calls::{CALL_ID_LEN, FUNCTION_NAME_MAX, is_call_id, is_function_name};

pub(crate) fn validate(version: InstructVersion, request: &ChatRequest) -> Result<(), Error> {
    structure(version, &request.messages)?;
    for (index, message) in request.messages.iter().enumerate() {
        let is_last = index + 1 == request.messages.len();
        match message.role {
            Role::Assistant => assistant(version, index, message, is_last)?,
            Role::Tool => tool(version, index, message)?,
            Role::System | Role::User => {}
        }
    }
    for (index, tool) in request.tools.iter().enumerate() {
        tool_on_offer(index, tool)?;
    }
    Ok(())
}

fn structure(version: InstructVersion, messages: &[ChatMessage]) -> Result<(), Error> {
    let Some(last) = messages.last() else {
        return Err(Error::invalid_chat(
            "messages",
            "at least one message",
            "empty",
        ));
    };
    if messages.len() == 1 && !matches!(last.role, Role::User | Role::System) {
        return Err(Error::invalid_chat(
            "messages[0].role",
            "user or system",
            last.role.as_str(),
        ));
    }
    if messages.len() > 1 && last.role == Role::Assistant && !last.prefix {
        return Err(Error::invalid_chat(
            format!("messages[{}].role", messages.len() - 1),
            "user or tool at the end, or assistant with prefix",
            "assistant",
        ));
    }
    for (index, pair) in messages.windows(2).enumerate() {
        let allowed: &[Role] = match pair[0].role {
            Role::System | Role::User => &[Role::System, Role::User, Role::Assistant],
            Role::Assistant | Role::Tool => &[Role::User, Role::Assistant, Role::Tool],
        };
        if !allowed.contains(&pair[1].role) {
            let names: Vec<&str> = allowed.iter().map(|role| role.as_str()).collect();
            return Err(Error::invalid_chat(
                format!("messages[{}].role", index + 1),
                format!("{} after {}", names.join(", "), pair[0].role),
                pair[1].role.as_str(),
            ));
        }
    }
    if version >= InstructVersion::V11 {
        return every_call_has_its_result(messages);
    }
    every_call_has_a_result(messages)
}

/// From v11 on results name their calls. As in mistral-common, the first message is left out.
fn every_call_has_its_result(messages: &[ChatMessage]) -> Result<(), Error> {
    let mut calls: Vec<&str> = Vec::new();
    let mut results: Vec<&str> = Vec::new();
    for (index, message) in messages.iter().enumerate().skip(1) {
        match message.role {
            Role::Tool => {
                let id = message.tool_call_id.as_deref().unwrap_or_default();
                if !calls.contains(&id) || results.contains(&id) {
                    return Err(Error::invalid_chat(
                        format!("messages[{index}].tool_call_id"),
                        "the id of a call of the assistant message before, once each",
                        format!("{id:?}"),
                    ));
                }
                results.push(id);
            }
            Role::Assistant => {
                same_number(index, calls.len(), results.len())?;
                results.clear();
                calls.clear();
                for (place, call) in message.tool_calls.iter().enumerate() {
                    if calls.contains(&call.id.as_str()) {
                        return Err(Error::invalid_chat(
                            format!("messages[{index}].tool_calls[{place}].id"),
                            "an id that no other call of the message has",
                            format!("{:?}", call.id),
                        ));
                    }
                    calls.push(&call.id);
                }
            }
            Role::System | Role::User => {}
        }
    }
    same_number(messages.len().saturating_sub(1), calls.len(), results.len())
}

/// Counts as mistral-common does, the first message left out.
fn every_call_has_a_result(messages: &[ChatMessage]) -> Result<(), Error> {
    let mut calls = 0usize;
    let mut results = 0usize;
    for (index, message) in messages.iter().enumerate().skip(1) {
        match message.role {
            Role::Tool => results += 1,
            Role::Assistant => {
                same_number(index, calls, results)?;
                calls = message.tool_calls.len();
                results = 0;
            }
            Role::System | Role::User => {}
        }
    }
    same_number(messages.len().saturating_sub(1), calls, results)
}

fn same_number(index: usize, calls: usize, results: usize) -> Result<(), Error> {
    if calls == results {
        return Ok(());
    }
    Err(Error::invalid_chat(
        format!("messages[{index}]"),
        format!("{calls} tool results before it or in it, one for each call"),
        format!("{results} results"),
    ))
}

fn assistant(
    version: InstructVersion,
    index: usize,
    message: &ChatMessage,
    is_last: bool,
) -> Result<(), Error> {
    let has_content = !message.content.is_empty();
    let has_calls = !message.tool_calls.is_empty();
    if version < InstructVersion::V7 && has_content == has_calls {
        return Err(Error::invalid_chat(
            format!("messages[{index}]"),
            "either content or tool_calls",
            if has_content { "both" } else { "neither" },
        ));
    }
    for (place, call) in message.tool_calls.iter().enumerate() {
        let field = format!("messages[{index}].tool_calls[{place}]");
        if version >= InstructVersion::V3 {
            call_id(version, &format!("{field}.id"), &call.id)?;
        }
        function_name(&format!("{field}.function.name"), &call.name)?;
    }
    if message.prefix && !is_last {
        return Err(Error::invalid_chat(
            format!("messages[{index}].prefix"),
            "true on the last message only",
            "true",
        ));
    }
    Ok(())
}

fn tool(version: InstructVersion, index: usize, message: &ChatMessage) -> Result<(), Error> {
    if let Some(name) = &message.name {
        function_name(&format!("messages[{index}].name"), name)?;
    }
    if version < InstructVersion::V3 {
        return Ok(());
    }
    let id = message.tool_call_id.as_deref().unwrap_or_default();
    call_id(version, &format!("messages[{index}].tool_call_id"), id)
}

fn tool_on_offer(index: usize, tool: &Value) -> Result<(), Error> {
    let field = format!("tools[{index}].function");
    let function = &tool["function"];
    let Some(name) = function["name"].as_str() else {
        return Err(Error::invalid_chat(
            format!("{field}.name"),
            "a string",
            function["name"].to_string(),
        ));
    };
    function_name(&format!("{field}.name"), name)?;
    let parameters = &function["parameters"];
    if !parameters.is_null() && !parameters.is_object() {
        let actual = crate::added::kind_of(parameters);
        return Err(Error::invalid_chat(
            format!("{field}.parameters"),
            "an object",
            actual,
        ));
    }
    let description = &function["description"];
    if !description.is_null() && !description.is_string() {
        let actual = crate::added::kind_of(description);
        return Err(Error::invalid_chat(
            format!("{field}.description"),
            "a string",
            actual,
        ));
    }
    Ok(())
}

fn call_id(version: InstructVersion, field: &str, id: &str) -> Result<(), Error> {
    let is_free = version >= InstructVersion::V13;
    let fits = if is_free {
        !id.is_empty()
    } else {
        is_call_id(id)
    };
    if fits && id != NO_CALL_ID {
        return Ok(());
    }
    let expected = if is_free {
        "an id".to_owned()
    } else {
        format!("{CALL_ID_LEN} letters or digits")
    };
    Err(Error::invalid_chat(field, expected, format!("{id:?}")))
}

fn function_name(field: &str, name: &str) -> Result<(), Error> {
    if is_function_name(name) {
        return Ok(());
    }
    Err(Error::invalid_chat(
        field,
        format!("1 to {FUNCTION_NAME_MAX} of a-z, A-Z, 0-9, _ and -"),
        format!("{name:?}"),
    ))
}
