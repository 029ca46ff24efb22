//! What the text of an answer must look like. Says nothing about how that is enforced.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Largest schema, expression or grammar in bytes.
pub const CONSTRAINT_BYTES_MAX: usize = 256 * 1024;

/// A language that every answer must be a word of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that this schema (the text of a JSON document) accepts.
    JsonSchema(Arc<str>),
    /// Text that this regular expression matches from its begin to its end.
    Regex(Arc<str>),
    /// Text of this grammar, in Lark's notation. It may name special tokens, such as those of tool calls.
    Lark(Arc<str>),
}

impl Constraint {
    /// The schema, expression or grammar; empty where there is none.
    #[must_use]
    pub fn source(&self) -> &str {
        match self {
            Self::JsonObject => "",
            Self::JsonSchema(text) | Self::Regex(text) | Self::Lark(text) => text,
        }
    }
}
