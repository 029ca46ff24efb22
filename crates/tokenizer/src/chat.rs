//! The words of a conversation, the same for templates and built-in formats. Text only, no wire format.

use serde_json::Value;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions from the application.
    System,
    /// The person, or the application in their place.
    User,
    /// The model.
    Assistant,
    /// The result of a tool call.
    Tool,
}

impl Role {
    /// The name used on the wire and in chat templates.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One function call made by the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolCall {
    /// Joins the call to its result; formats v3 and later want nine letters or digits.
    pub id: String,
    /// The function's name.
    pub name: String,
    /// The arguments as JSON text, just as the model wrote them.
    pub arguments: String,
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: Role,
    /// The text; empty where an assistant message only calls tools.
    pub content: String,
    /// Calls made by an assistant message.
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool message answers.
    pub tool_call_id: Option<String>,
    /// The function that a tool message comes from.
    pub name: Option<String>,
    /// True on a last assistant message that the model shall continue instead of answer.
    pub prefix: bool,
}

impl ChatMessage {
    /// A message that is only text.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self {
            role,
            content: content.into(),
            tool_calls: Vec::new(),
            tool_call_id: None,
            name: None,
            prefix: false,
        }
    }
}

/// A conversation to be continued by the model.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChatRequest {
    /// Oldest first.
    pub messages: Vec<ChatMessage>,
    /// Tools on offer, each `{"type": "function", "function": {"name", "description", "parameters"}}`.
    pub tools: Vec<Value>,
}
