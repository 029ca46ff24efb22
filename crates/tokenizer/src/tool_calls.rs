//! Calls of tools in what a model says: found by the ids of control tokens, never by text that looks like them.
//! What is no call after all comes out as text; nothing that a model says is an error.

mod list;

use tramontane_types::TokenId;

use crate::{DecodeStart, DecodeStream, Tokenizer};
use list::CallList;

/// Length of the id of a call, in Mistral's formats from v3 on.
pub const CALL_ID_LEN: usize = 9;
/// Longest name of a function.
pub const FUNCTION_NAME_MAX: usize = 64;

/// The tokens of calls, which say how a model writes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallTokens {
    /// v2 to v7: `[TOOL_CALLS]` and a JSON list of objects with name, arguments and (from v3 on) id.
    List {
        /// `[TOOL_CALLS]`.
        calls: TokenId,
    },
    /// From v11 on, each call: `[TOOL_CALLS]`name`[CALL_ID]`id`[ARGS]`arguments; from v13 on without the id.
    Named {
        /// `[TOOL_CALLS]`.
        calls: TokenId,
        /// `[CALL_ID]`, where there is one.
        call_id: Option<TokenId>,
        /// `[ARGS]`.
        args: TokenId,
    },
}

impl CallTokens {
    pub(crate) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let calls = tokenizer.control_id("[TOOL_CALLS]")?;
        Some(match tokenizer.control_id("[ARGS]") {
            None => Self::List { calls },
            Some(args) => Self::Named {
                calls,
                call_id: tokenizer.control_id("[CALL_ID]"),
                args,
            },
        })
    }

    /// The token before calls.
    pub fn calls(self) -> TokenId {
        match self {
            Self::List { calls } | Self::Named { calls, .. } => calls,
        }
    }
}

/// A piece of what a model says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallPiece {
    /// Text, which is no part of a call.
    Text(String),
    /// A call begins.
    Begin {
        /// Which call of the answer, from 0.
        index: usize,
        /// What the model calls it, where it says so before the arguments.
        id: Option<String>,
        /// The function.
        name: String,
    },
    /// The next piece of the arguments of a call that has begun, just as the model writes them.
    Arguments {
        /// Which call.
        index: usize,
        /// JSON text, or what the model takes for it.
        text: String,
    },
}

/// Whether a function may have this name.
pub fn is_function_name(name: &str) -> bool {
    (1..=FUNCTION_NAME_MAX).contains(&name.len()) && name.bytes().all(is_name_byte)
}

/// Whether a call may have this id, in formats v3 to v11.
pub fn is_call_id(id: &str) -> bool {
    id.len() == CALL_ID_LEN && id.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-')
}

/// Takes the ids of one answer and tells text and calls apart, piece by piece.
///
/// What comes out depends on the ids alone, never on when they come.
#[derive(Debug, Clone)]
pub struct ToolCallParser {
    tokenizer: Tokenizer,
    tokens: CallTokens,
    /// Of the stretch since the last control token of calls.
    text: DecodeStream,
    state: State,
    num_calls: usize,
}

#[derive(Debug, Clone)]
enum State {
    /// No call is open.
    Text,
    /// Behind `[TOOL_CALLS]`.
    List(Box<CallList>),
    /// Likewise, the name so far.
    Name(String),
    /// Behind `[CALL_ID]`.
    Id { name: String, id: String },
    /// Behind `[ARGS]`, and behind the white space before them: clients parse every piece that they get.
    Arguments { has_begun: bool },
}

impl ToolCallParser {
    /// For an answer whose text begins at `start`; `None` where the model has no tokens for calls.
    pub fn new(tokenizer: &Tokenizer, start: DecodeStart) -> Option<Self> {
        Some(Self {
            tokenizer: tokenizer.clone(),
            tokens: tokenizer.call_tokens()?,
            text: DecodeStream::new(tokenizer, start, true),
            state: State::Text,
            num_calls: 0,
        })
    }

    /// What is certain after this id.
    pub fn push(&mut self, id: TokenId) -> Vec<CallPiece> {
        let mut out = Vec::new();
        match self.tokens {
            CallTokens::List { calls } if id == calls => {
                self.end_stretch(&mut out);
                self.state = State::List(Box::default());
            }
            CallTokens::Named { calls, .. } if id == calls => {
                self.end_stretch(&mut out);
                self.state = State::Name(String::new());
            }
            CallTokens::Named { args, .. } if id == args => self.begin_arguments(&mut out),
            CallTokens::Named { call_id, .. } if Some(id) == call_id => self.begin_id(&mut out),
            _ => {
                if let Some(text) = self.text.push(id) {
                    self.take(&text, &mut out);
                }
            }
        }
        out
    }

    /// Whether what comes next belongs to a call, or to what may become one.
    pub fn is_in_call(&self) -> bool {
        match &self.state {
            State::Text => false,
            State::List(list) => !list.is_text(),
            State::Name(_) | State::Id { .. } | State::Arguments { .. } => true,
        }
    }

    /// The end of the answer: what was held back.
    pub fn finish(&mut self) -> Vec<CallPiece> {
        let mut out = Vec::new();
        self.end_stretch(&mut out);
        out
    }

    /// A control token of calls or the end stands here: whatever is open ends.
    fn end_stretch(&mut self, out: &mut Vec<CallPiece>) {
        self.end_text(out);
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text | State::Arguments { .. } => {}
            State::List(list) => push_text(out, &list.rest()),
            State::Name(name) => push_text(out, &name),
            State::Id { name, id } => push_text(out, &(name + &id)),
        }
    }

    fn begin_arguments(&mut self, out: &mut Vec<CallPiece>) {
        self.end_text(out);
        let (name, id) = match std::mem::replace(&mut self.state, State::Text) {
            State::Name(name) => (name, None),
            State::Id { name, id } => (name, Some(id.trim().to_owned())),
            other => {
                self.state = other;
                return;
            }
        };
        if !is_function_name(name.trim()) {
            push_text(out, &name);
            return;
        }
        out.push(CallPiece::Begin {
            index: self.num_calls,
            id: id.filter(|id| is_call_id(id)),
            name: name.trim().to_owned(),
        });
        self.num_calls += 1;
        self.state = State::Arguments { has_begun: false };
    }

    fn begin_id(&mut self, out: &mut Vec<CallPiece>) {
        self.end_text(out);
        if let State::Name(name) = &mut self.state {
            self.state = State::Id {
                name: std::mem::take(name),
                id: String::new(),
            };
        }
    }

    /// The text of the stretch so far is all there is of it.
    fn end_text(&mut self, out: &mut Vec<CallPiece>) {
        let rest = self.text.finish();
        self.text = DecodeStream::new(&self.tokenizer, DecodeStart::Text, true);
        if let Some(rest) = rest {
            self.take(&rest, out);
        }
    }

    fn take(&mut self, text: &str, out: &mut Vec<CallPiece>) {
        match &mut self.state {
            State::Text => push_text(out, text),
            State::List(list) => list.take(text, &mut self.num_calls, out),
            State::Name(name) => {
                name.push_str(text);
                if !may_be_name(name) {
                    push_text(out, name);
                    self.state = State::Text;
                }
            }
            State::Id { name, id } => {
                id.push_str(text);
                if id.trim().len() > FUNCTION_NAME_MAX {
                    push_text(out, name);
                    push_text(out, id);
                    self.state = State::Text;
                }
            }
            State::Arguments { has_begun } => {
                let text = if *has_begun { text } else { text.trim_start() };
                *has_begun |= !text.is_empty();
                push_arguments(out, self.num_calls - 1, text);
            }
        }
    }
}

/// Whether this is, or may become, the name of a function with white space around it.
fn may_be_name(text: &str) -> bool {
    let name = text.trim();
    name.len() <= FUNCTION_NAME_MAX && name.bytes().all(is_name_byte)
}

fn push_text(out: &mut Vec<CallPiece>, text: &str) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(CallPiece::Text(before)) => before.push_str(text),
        _ => out.push(CallPiece::Text(text.to_owned())),
    }
}

fn push_arguments(out: &mut Vec<CallPiece>, index: usize, text: &str) {
    if text.is_empty() {
        return;
    }
    match out.last_mut() {
        Some(CallPiece::Arguments {
            index: last,
            text: before,
        }) if *last == index => before.push_str(text),
        _ => out.push(CallPiece::Arguments {
            index,
            text: text.to_owned(),
        }),
    }
}
