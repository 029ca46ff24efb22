//! Mistral's instruct formats v1 to v13, as mistral-common 1.13 encodes them (`tokens/tokenizers/instruct.py`).
//! A request is checked, then normalised, then encoded; control tokens are ids from the start, never text.

mod normalize;
mod validate;

use std::fmt;

use serde_json::{Value, json};
use tramontane_types::TokenId;

use crate::chat::{ChatRequest, Role, ToolCall};
use crate::python::dumps;
use crate::vocabulary::Vocabulary;
use crate::{Error, Tokenizer};
use normalize::{Conversation, Turn, normalize};

/// A version of Mistral's instruct format. Tekken files say `v3` too; their tokens differ, the format does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InstructVersion {
    /// `[INST]` as plain text, no tools: Mistral 7B v0.1, Mixtral 8x7B.
    V1,
    /// Control tokens, one tool result per turn.
    V2,
    /// Tool calls with ids: Mistral 7B v0.3, Mixtral 8x22B v0.3, Nemo.
    V3,
    /// The system prompt has control tokens of its own: Mistral Large 2411, Small 2501.
    V7,
    /// Each tool call has control tokens of its own.
    V11,
    /// Tools come with the first user turn, and ids of calls reach the model no more.
    V13,
}

impl fmt::Display for InstructVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::V7 => "v7",
            Self::V11 => "v11",
            Self::V13 => "v13",
        })
    }
}

impl InstructVersion {
    /// By the name in a tekken file. Versions from v15 on are not known here: such models bring a template.
    pub(crate) fn from_name(name: &str) -> Option<Self> {
        [Self::V1, Self::V2, Self::V3, Self::V7, Self::V11, Self::V13]
            .into_iter()
            .find(|version| version.to_string() == name)
    }

    /// By the control tokens of a SentencePiece model: v2 brought `[INST]`, v3 `[PREFIX]`, v7 `[TOOL_CONTENT]`.
    pub(crate) fn of_sentencepiece(vocabulary: &Vocabulary) -> Self {
        Self::of_controls(vocabulary).unwrap_or(Self::V1)
    }

    /// As [`Self::of_sentencepiece`], for files that need not be Mistral's at all.
    pub(crate) fn of_controls(vocabulary: &Vocabulary) -> Option<Self> {
        vocabulary.control_id("[INST]")?;
        let has = |text| vocabulary.control_id(text).is_some();
        Some(if has("[TOOL_CONTENT]") {
            Self::V7
        } else if has("[PREFIX]") {
            Self::V3
        } else {
            Self::V2
        })
    }
}

/// Ids of a conversation, bos first.
pub(crate) fn encode(
    tokenizer: &Tokenizer,
    version: InstructVersion,
    request: &ChatRequest,
) -> Result<Vec<TokenId>, Error> {
    validate::validate(version, request)?;
    let conversation = normalize(version, request);
    check_tool_results(version, &conversation.turns)?;
    let mut encoder = ChatEncoder {
        tokenizer,
        version,
        ids: Vec::new(),
    };
    encoder.control("<s>")?;
    encoder.conversation(&conversation)?;
    Ok(encoder.ids)
}

/// Ids of a text with a gap, as `encode_fim` of mistral-common: what follows, what comes before, bos first.
pub(crate) fn encode_infill(
    tokenizer: &Tokenizer,
    prompt: &str,
    suffix: &str,
) -> Result<Vec<TokenId>, Error> {
    /// What is encoded before the suffix so that it gets no space of its own, and its number of tokens.
    const FRONT: (char, usize) = ('☺', 2);
    let control = |name| tokenizer.control_id(name).ok_or(Error::NoInfill);
    let mut ids = vec![
        tokenizer.bos_id().ok_or(Error::NoInfill)?,
        control("[SUFFIX]")?,
    ];
    let behind = tokenizer.encode(&format!("{}{suffix}", FRONT.0))?;
    ids.extend(behind.iter().skip(FRONT.1));
    ids.push(control("[PREFIX]")?);
    ids.extend(tokenizer.encode(prompt)?);
    Ok(ids)
}

/// Format v2 has room for one tool result after the calls of one assistant turn.
fn check_tool_results(version: InstructVersion, turns: &[Turn]) -> Result<(), Error> {
    if version != InstructVersion::V2 {
        return Ok(());
    }
    let last_user = turns
        .iter()
        .rposition(|turn| turn.role == Role::User)
        .unwrap_or(0);
    let mut after_calls = false;
    let mut results = 0;
    for turn in &turns[last_user..] {
        match turn.role {
            Role::Tool if after_calls => results += 1,
            Role::Tool => {}
            Role::System | Role::User | Role::Assistant => {
                after_calls = turn.role == Role::Assistant && !turn.tool_calls.is_empty();
                results = 0;
            }
        }
        if results > 1 {
            return Err(Error::Unsupported {
                version,
                feature: "place for several tool results after one assistant turn",
            });
        }
    }
    Ok(())
}

struct ChatEncoder<'t> {
    tokenizer: &'t Tokenizer,
    version: InstructVersion,
    ids: Vec<TokenId>,
}

impl ChatEncoder<'_> {
    fn conversation(&mut self, conversation: &Conversation) -> Result<(), Error> {
        let turns = &conversation.turns;
        let is_user = |turn: &Turn| turn.role == Role::User;
        let first_user = turns.iter().position(is_user);
        let last_user = turns.iter().rposition(is_user);
        for (index, turn) in turns.iter().enumerate() {
            let before_last_user = last_user.is_some_and(|last| index < last);
            match turn.role {
                Role::User if self.version == InstructVersion::V1 => {
                    let system = conversation
                        .system
                        .as_ref()
                        .filter(|_| Some(index) == first_user);
                    self.user_v1(turn, system)?;
                }
                Role::User => {
                    let place = (Some(index) == first_user, Some(index) == last_user);
                    self.user(turn, conversation, place)?;
                }
                Role::Assistant => self.assistant(turn, before_last_user)?,
                Role::Tool => self.tool(turn, before_last_user)?,
                Role::System => {
                    self.control("[SYSTEM_PROMPT]")?;
                    self.text(&turn.content)?;
                    self.control("[/SYSTEM_PROMPT]")?;
                }
            }
        }
        Ok(())
    }

    /// The first user turn carries the system prompt; the brackets are text.
    fn user_v1(&mut self, turn: &Turn, system: Option<&String>) -> Result<(), Error> {
        let content = with_system(system, &turn.content);
        self.text(&format!("[INST] {content} [/INST]"))
    }

    /// The last user turn carries the tools (from v13 on the first one) and, up to v3, the system prompt.
    fn user(
        &mut self,
        turn: &Turn,
        conversation: &Conversation,
        (is_first, is_last): (bool, bool),
    ) -> Result<(), Error> {
        let carries_tools = if self.version >= InstructVersion::V13 {
            is_first
        } else {
            is_last
        };
        if carries_tools && !conversation.tools.is_empty() {
            self.control("[AVAILABLE_TOOLS]")?;
            self.text(&dumps(&Value::Array(conversation.tools.clone())))?;
            self.control("[/AVAILABLE_TOOLS]")?;
        }
        let system = conversation.system.as_ref().filter(|_| is_last);
        self.control("[INST]")?;
        self.text(&with_system(system, &turn.content))?;
        self.control("[/INST]")
    }

    fn assistant(&mut self, turn: &Turn, before_last_user: bool) -> Result<(), Error> {
        let has_calls = !turn.tool_calls.is_empty();
        let has_content = !turn.content.is_empty();
        if has_calls && self.version == InstructVersion::V1 {
            return Err(self.unsupported("tools"));
        }
        if has_calls && has_content && self.version < InstructVersion::V7 {
            return Err(self.unsupported("assistant turn with both text and tool calls"));
        }
        if !has_calls && !has_content {
            return Err(self.unsupported("empty assistant turn"));
        }
        if has_calls && before_last_user && self.version == InstructVersion::V2 {
            return Ok(()); // v2 forgets calls and their results once the user speaks again
        }
        if has_content {
            let trims = self.version != InstructVersion::V1;
            self.text(if trims {
                turn.content.trim_end_matches(' ')
            } else {
                &turn.content
            })?;
        }
        if has_calls {
            self.tool_calls(&turn.tool_calls)?;
        }
        if turn.prefix {
            return Ok(());
        }
        self.control("</s>")
    }

    fn tool_calls(&mut self, calls: &[ToolCall]) -> Result<(), Error> {
        if self.version < InstructVersion::V11 {
            let calls = calls.iter().map(|call| self.tool_call(call)).collect();
            self.control("[TOOL_CALLS]")?;
            return self.text(&dumps(&Value::Array(calls)));
        }
        for call in calls {
            self.control("[TOOL_CALLS]")?;
            self.text(&call.name)?;
            if self.version == InstructVersion::V11 && call.id != normalize::NO_CALL_ID {
                self.control("[CALL_ID]")?;
                self.text(&call.id)?;
            }
            self.control("[ARGS]")?;
            self.text(&dumps(&parsed(&call.arguments)))?;
        }
        Ok(())
    }

    fn tool_call(&self, call: &ToolCall) -> Value {
        let mut value = json!({"name": call.name, "arguments": parsed(&call.arguments)});
        if self.version >= InstructVersion::V3 && call.id != normalize::NO_CALL_ID {
            value["id"] = json!(call.id);
        }
        value
    }

    fn tool(&mut self, turn: &Turn, before_last_user: bool) -> Result<(), Error> {
        match self.version {
            InstructVersion::V1 => return Err(self.unsupported("tools")),
            InstructVersion::V2 if before_last_user => return Ok(()),
            InstructVersion::V2 => {
                let result = json!([{"name": turn.name, "content": parsed(&turn.content)}]);
                self.control("[TOOL_RESULTS]")?;
                self.text(&dumps(&result))?;
            }
            InstructVersion::V3 => {
                let result =
                    json!({"content": parsed(&turn.content), "call_id": turn.tool_call_id});
                self.control("[TOOL_RESULTS]")?;
                self.text(&dumps(&result))?;
            }
            InstructVersion::V13 => {
                self.control("[TOOL_RESULTS]")?;
                self.text(&turn.content)?;
            }
            InstructVersion::V7 | InstructVersion::V11 => {
                self.control("[TOOL_RESULTS]")?;
                self.text(turn.tool_call_id.as_deref().unwrap_or_default())?;
                self.control("[TOOL_CONTENT]")?;
                self.text(&turn.content)?;
            }
        }
        self.control("[/TOOL_RESULTS]")
    }

    fn text(&mut self, text: &str) -> Result<(), Error> {
        self.ids.extend(self.tokenizer.encode(text)?);
        Ok(())
    }

    fn control(&mut self, token: &'static str) -> Result<(), Error> {
        let id = self
            .tokenizer
            .control_id(token)
            .ok_or(Error::MissingControl {
                version: self.version,
                token,
            })?;
        self.ids.push(id);
        Ok(())
    }

    fn unsupported(&self, feature: &'static str) -> Error {
        Error::Unsupported {
            version: self.version,
            feature,
        }
    }
}

fn with_system(system: Option<&String>, content: &str) -> String {
    match system {
        Some(system) => format!("{system}\n\n{content}"),
        None => content.to_owned(),
    }
}

/// JSON text as its value, anything else as a string.
fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}
