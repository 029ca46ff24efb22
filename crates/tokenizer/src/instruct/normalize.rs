//! Messages to turns, as mistral-common's `protocol/instruct/normalize.py` does it: neighbours of the same role are
//! merged, system prompts collected, JSON brought into one form. Needs a request that was validated.

use serde_json::{Value, json};

use super::InstructVersion;
use crate::chat::{ChatMessage, ChatRequest, Role, ToolCall};
use crate::python::dumps;

/// Stands for "no id" in tool calls.
pub(crate) const NO_CALL_ID: &str = "null";

/// Between texts that are merged into one.
const JOIN: &str = "\n\n";

/// A request ready to be encoded.
#[derive(Debug)]
pub(crate) struct Conversation {
    /// All system prompts in one; `None` from v7 on, where they are turns.
    pub(crate) system: Option<String>,
    pub(crate) turns: Vec<Turn>,
    pub(crate) tools: Vec<Value>,
}

/// One or several messages of the same role.
#[derive(Debug)]
pub(crate) struct Turn {
    pub(crate) role: Role,
    pub(crate) content: String,
    pub(crate) tool_calls: Vec<ToolCall>,
    pub(crate) tool_call_id: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) prefix: bool,
}

impl Turn {
    fn new(role: Role, content: String) -> Self {
        Self {
            role,
            content,
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            prefix: false,
        }
    }
}

pub(crate) fn normalize(version: InstructVersion, request: &ChatRequest) -> Conversation {
    let has_system_turns = version >= InstructVersion::V7;
    let mut turns = Vec::new();
    let mut call_ids: Vec<String> = Vec::new();
    for run in request
        .messages
        .chunk_by(|left, right| left.role == right.role)
    {
        match run[0].role {
            Role::User => turns.push(Turn::new(Role::User, joined(run))),
            Role::Assistant => {
                let turn = assistant(run);
                call_ids.extend(turn.tool_calls.iter().map(|call| call.id.clone()));
                turns.push(turn);
            }
            Role::Tool => {
                let mut results: Vec<Turn> = run.iter().map(|m| tool(version, m)).collect();
                if version >= InstructVersion::V11 {
                    in_order_of_calls(&mut results, &call_ids);
                }
                call_ids.clear();
                turns.extend(results);
            }
            Role::System if has_system_turns => turns.extend(
                run.iter()
                    .map(|message| Turn::new(Role::System, message.content.clone())),
            ),
            Role::System => {}
        }
    }
    let opens_otherwise = turns.first().is_some_and(|turn| turn.role != Role::User);
    if turns.is_empty() || (opens_otherwise && !has_system_turns) {
        turns.insert(0, Turn::new(Role::User, String::new()));
    }
    Conversation {
        system: if has_system_turns {
            None
        } else {
            system_prompt(&request.messages)
        },
        turns,
        tools: request.tools.iter().map(tool_on_offer).collect(),
    }
}

/// Results as their calls are ordered; those of no call behind them.
fn in_order_of_calls(results: &mut [Turn], call_ids: &[String]) {
    results.sort_by_key(|turn| {
        let id = turn.tool_call_id.as_deref().unwrap_or(NO_CALL_ID);
        let place = call_ids.iter().rposition(|call| call == id);
        place.unwrap_or(usize::MAX)
    });
}

fn system_prompt(messages: &[ChatMessage]) -> Option<String> {
    let prompts: Vec<&str> = messages
        .iter()
        .filter(|message| message.role == Role::System && !message.content.is_empty())
        .map(|message| message.content.as_str())
        .collect();
    (!prompts.is_empty()).then(|| prompts.join(JOIN))
}

fn joined(run: &[ChatMessage]) -> String {
    let texts: Vec<&str> = run
        .iter()
        .map(|message| message.content.as_str())
        .filter(|content| !content.is_empty())
        .collect();
    texts.join(JOIN)
}

fn assistant(run: &[ChatMessage]) -> Turn {
    let calls = run
        .iter()
        .flat_map(|message| &message.tool_calls)
        .map(|call| ToolCall {
            id: if call.id.is_empty() {
                NO_CALL_ID.to_owned()
            } else {
                call.id.clone()
            },
            name: call.name.clone(),
            arguments: json_in_one_form(&call.arguments),
        });
    Turn {
        tool_calls: calls.collect(),
        prefix: run.iter().any(|message| message.prefix),
        ..Turn::new(Role::Assistant, joined(run))
    }
}

fn tool(version: InstructVersion, message: &ChatMessage) -> Turn {
    let content = if version >= InstructVersion::V7 {
        message.content.clone()
    } else {
        json_in_one_form(&message.content)
    };
    Turn {
        tool_call_id: message.tool_call_id.clone(),
        name: message.name.clone(),
        ..Turn::new(Role::Tool, content)
    }
}

/// The fields a model has been trained on, in their order.
fn tool_on_offer(tool: &Value) -> Value {
    let function = &tool["function"];
    let or = |value: &Value, default: Value| {
        if value.is_null() {
            default
        } else {
            value.clone()
        }
    };
    json!({
        "type": "function",
        "function": {
            "name": function["name"],
            "description": or(&function["description"], json!("")),
            "parameters": or(&function["parameters"], json!({})),
        },
    })
}

fn json_in_one_form(text: &str) -> String {
    if text.is_empty() {
        return "{}".to_owned();
    }
    serde_json::from_str(text).map_or_else(|_| text.to_owned(), |value: Value| dumps(&value))
}
