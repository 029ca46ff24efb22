//! What a request says about tools, and what follows from it: which tokens begin calls, which may not be said, and
//! the grammar that holds the model to its tools. Never reads or makes text of a client.

use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::{Value, json};
use tramontane_grammar::spaced;
use tramontane_tokenizer::{CallTokens, ChatRequest, Tokenizer};
use tramontane_types::{Constraint, TokenId, constraint::CONSTRAINT_BYTES_MAX};

use crate::error::{ApiError, ErrorKind};

/// Most tools of one request, as in the OpenAI API.
pub(crate) const TOOLS_MAX: usize = 128;
/// Most calls of one message.
pub(crate) const CALLS_MAX: usize = 128;

/// Whether the model shall call tools.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// As it likes.
    #[default]
    Auto,
    /// No.
    None,
    /// At least one.
    Required,
}

/// What a request says about tools beside which there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ToolUse {
    pub(crate) choice: ToolChoice,
    /// The names of those that may be called; all when absent. The model is told of the others too.
    pub(crate) only: Option<Vec<String>>,
    /// Whether one answer may have several calls.
    pub(crate) parallel: bool,
}

impl Default for ToolUse {
    fn default() -> Self {
        Self {
            choice: ToolChoice::default(),
            only: None,
            parallel: true,
        }
    }
}

impl ToolUse {
    /// One call, of this tool.
    pub(crate) fn function(name: String) -> Self {
        Self {
            choice: ToolChoice::Required,
            only: Some(vec![name]),
            parallel: false,
        }
    }

    fn allows(&self, tool: &Value) -> bool {
        let only = self.only.as_ref();
        only.is_none_or(|only| only.iter().any(|name| name == name_of(tool)))
    }
}

/// What tools mean for the sequences of a request.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct PreparedTools {
    /// What the answer must look like.
    pub(crate) constraint: Option<Arc<Constraint>>,
    /// Tokens that may not be said.
    pub(crate) banned: Vec<TokenId>,
    /// Whether calls are looked for in the answer.
    pub(crate) reads_calls: bool,
}

/// Checks that tools and choice fit together, as far as no tokenizer is needed.
pub(crate) fn check(tools: &[Value], tool_use: &ToolUse) -> Result<(), ApiError> {
    if tools.len() > TOOLS_MAX {
        let message = format!(
            "tools must have at most {TOOLS_MAX} entries, got {}",
            tools.len()
        );
        return Err(ApiError::invalid("tools", message));
    }
    let refused = |message| Err(ApiError::invalid("tool_choice", message));
    let has = |name: &String| tools.iter().any(|tool| name_of(tool) == name);
    if tool_use.only.iter().flatten().any(|name| !has(name)) {
        return refused("tool_choice must name one of the tools, got another name");
    }
    if tool_use.choice == ToolChoice::Required && tools.is_empty() {
        return refused("tool_choice must be none or auto without tools, got required");
    }
    Ok(())
}

/// What follows from the tools of `chat` with this tokenizer. `constraint` is what the text of the answer must look
/// like without them.
pub(crate) fn prepare(
    chat: &ChatRequest,
    tool_use: &ToolUse,
    tokenizer: &Tokenizer,
    constraint: Option<Arc<Constraint>>,
) -> Result<PreparedTools, ApiError> {
    let tokens = tokenizer.call_tokens();
    if chat.tools.is_empty() {
        return Ok(PreparedTools {
            constraint,
            ..PreparedTools::default()
        });
    }
    if !tokenizer.supports_tools() {
        let message =
            "tools are not supported by the served model: its chat format has no place for them";
        return Err(ApiError::new(ErrorKind::Unsupported, message).at("tools"));
    }
    let Some(tokens) = tokens else {
        return without_tokens(tool_use, constraint);
    };
    if tool_use.choice == ToolChoice::None {
        return Ok(PreparedTools {
            constraint,
            banned: vec![tokens.calls()],
            reads_calls: false,
        });
    }
    Ok(PreparedTools {
        constraint: grammar(chat, tool_use, tokens, constraint.as_deref())?,
        banned: Vec::new(),
        reads_calls: true,
    })
}

/// A template may say what it likes about tools; how the model calls them is then not known.
fn without_tokens(
    tool_use: &ToolUse,
    constraint: Option<Arc<Constraint>>,
) -> Result<PreparedTools, ApiError> {
    if tool_use.choice == ToolChoice::Required || tool_use.only.is_some() {
        let message =
            "tool_choice must be none or auto with the served model, which has no tokens for calls";
        return Err(ApiError::new(ErrorKind::Unsupported, message).at("tool_choice"));
    }
    Ok(PreparedTools {
        constraint,
        ..PreparedTools::default()
    })
}

fn name_of(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

fn is_strict(tool: &Value) -> bool {
    tool["function"]["strict"] == true
}

/// The grammar of an answer with calls. `None` where the model is free: it may call or not, and no tool is strict.
fn grammar(
    chat: &ChatRequest,
    tool_use: &ToolUse,
    tokens: CallTokens,
    text: Option<&Constraint>,
) -> Result<Option<Arc<Constraint>>, ApiError> {
    let is_forced = tool_use.choice == ToolChoice::Required;
    let is_free = tool_use.parallel && tool_use.only.is_none() && !chat.tools.iter().any(is_strict);
    if !is_forced && is_free && text.is_none() {
        return Ok(None);
    }
    let mut rules = String::new();
    rules.push_str(&start(is_forced, text)?);
    let chosen = chat.tools.iter().filter(|tool| tool_use.allows(tool));
    let tools: Vec<(&str, Value)> = chosen
        .map(|tool| (name_of(tool), spaced(schema(tool, is_forced))))
        .collect();
    write_calls(&mut rules, &tools, tokens, tool_use.parallel);
    rules.push_str("WS: /[ \\t\\r\\n]{1,8}/\n");
    if rules.len() > CONSTRAINT_BYTES_MAX {
        let message = format!(
            "tools must need a grammar of at most {CONSTRAINT_BYTES_MAX} bytes, got {}",
            rules.len()
        );
        return Err(ApiError::invalid("tools", message));
    }
    Ok(Some(Arc::new(Constraint::Lark(rules.into()))))
}

/// The first rules: what an answer is.
fn start(is_forced: bool, text: Option<&Constraint>) -> Result<String, ApiError> {
    if is_forced {
        return Ok("start: calls\n".to_owned());
    }
    let text = match text {
        None => return Ok("start: text | text? calls\ntext: /(.|\\n)+/\n".to_owned()),
        Some(Constraint::JsonObject) => json!({ "type": "object" }),
        // Parsed, so that it ends where a schema ends.
        Some(Constraint::JsonSchema(schema)) => serde_json::from_str(schema).map_err(|error| {
            let message = format!("the schema of the answer must be valid JSON: {error}");
            ApiError::new(ErrorKind::Invalid, message)
        })?,
        Some(Constraint::Regex(_) | Constraint::Lark(_)) => {
            let message = "tools together with a regular expression or a grammar are not supported by this server";
            return Err(ApiError::new(ErrorKind::Unsupported, message).at("tools"));
        }
    };
    let text = spaced(text);
    Ok(format!("start: WS? text | calls\ntext: %json {text}\n"))
}

/// What the arguments of a tool must be: an object, as its schema says where that is asked for.
fn schema(tool: &Value, is_forced: bool) -> Value {
    let parameters = &tool["function"]["parameters"];
    let mut schema = match parameters.as_object() {
        Some(map) if !map.is_empty() && (is_forced || is_strict(tool)) => parameters.clone(),
        _ => json!({}),
    };
    if schema["type"].is_null() {
        schema["type"] = "object".into();
    }
    schema
}

fn write_calls(rules: &mut String, tools: &[(&str, Value)], tokens: CallTokens, parallel: bool) {
    let calls = tokens.calls();
    let alternatives: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    let alternatives = alternatives.join(" | ");
    let repeat = match (tokens, parallel) {
        (CallTokens::List { .. }, true) => {
            format!("<[{calls}]> WS? \"[\" WS? call (WS? \",\" WS? call)* WS? \"]\"")
        }
        (CallTokens::List { .. }, false) => format!("<[{calls}]> WS? \"[\" WS? call WS? \"]\""),
        (CallTokens::Named { .. }, true) => "call+".to_owned(),
        (CallTokens::Named { .. }, false) => "call".to_owned(),
    };
    // Writing to a string cannot fail.
    let _ = writeln!(rules, "calls: {repeat}\ncall: {alternatives}");
    for (i, (name, schema)) in tools.iter().enumerate() {
        let _ = match tokens {
            CallTokens::List { .. } => writeln!(
                rules,
                "call_{i}: \"{{\\\"name\\\": \\\"{name}\\\", \\\"arguments\\\": \" arguments_{i} (\", \\\"id\\\": \\\"\" ID \"\\\"\")? \"}}\""
            ),
            CallTokens::Named { call_id, args, .. } => {
                let id = call_id.map_or_else(String::new, |id| format!("(<[{id}]> ID)? "));
                writeln!(
                    rules,
                    "call_{i}: <[{calls}]> WS? \"{name}\" {id}<[{args}]> WS? arguments_{i} WS?"
                )
            }
        };
        let _ = writeln!(rules, "arguments_{i}: %json {schema}");
    }
    let has_id = match tokens {
        CallTokens::List { .. } => true,
        CallTokens::Named { call_id, .. } => call_id.is_some(),
    };
    if has_id {
        rules.push_str("ID: /[a-zA-Z0-9]{9}/\n");
    }
}
