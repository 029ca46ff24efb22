//! What can go wrong with tokenizer files, texts and conversations. The texts never quote a prompt.

use std::path::{Path, PathBuf};

use crate::InstructVersion;

/// Everything this crate refuses, with who, what, expected and got.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory holds none of the known tokenizer files.
    #[error(
        "{} holds no tokenizer, expected tekken.json, tokenizer.model or tokenizer.json",
        dir.display()
    )]
    NoTokenizer {
        /// The model directory that was searched.
        dir: PathBuf,
    },
    /// A file could not be read.
    #[error("{} can not be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system says.
        #[source]
        source: std::io::Error,
    },
    /// A file is longer than any tokenizer file has a reason to be.
    #[error("{} has {actual} bytes, expected at most {max}", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Its length in bytes.
        actual: u64,
        /// The limit in bytes.
        max: u64,
    },
    /// A file was read but what it says can not be used.
    #[error("{}: {field} is {actual}, expected {expected}", path.display())]
    InvalidFile {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        field: String,
        /// What was expected there.
        expected: String,
        /// What was found.
        actual: String,
    },
    /// The text is longer than one request may be.
    #[error("text has {actual} bytes, expected at most {max}")]
    TextTooLong {
        /// Length in bytes.
        actual: usize,
        /// The limit in bytes.
        max: usize,
    },
    /// The tokenizer gave up on this text (a backtracking pattern in its file, or no token for a character).
    #[error("text can not be tokenized: {reason}")]
    Encode {
        /// What the encoder says.
        reason: String,
    },
    /// The conversation breaks a rule of the chat format.
    #[error("{param} is {actual}, expected {expected}")]
    InvalidChat {
        /// Path of the field, as in `messages[2].tool_call_id`.
        param: String,
        /// The rule.
        expected: String,
        /// What the request says.
        actual: String,
    },
    /// The chat format of this model has no way to say what the conversation holds.
    #[error("instruct format {version} has no {feature}")]
    Unsupported {
        /// The built-in format.
        version: InstructVersion,
        /// What is missing.
        feature: &'static str,
    },
    /// The tokenizer file lacks a control token that the chat format needs.
    #[error("instruct format {version} needs the control token {token}, the tokenizer has none")]
    MissingControl {
        /// The built-in format.
        version: InstructVersion,
        /// The token's text.
        token: &'static str,
    },
    /// Neither a chat template nor a known instruct format belongs to this tokenizer.
    #[error("the model has no chat template and its tokenizer no known instruct format")]
    NoChatFormat,
    /// The model's own chat template called `raise_exception`.
    #[error("the chat template refuses the messages: {message}")]
    TemplateRefused {
        /// The template's words.
        message: String,
    },
    /// The chat template failed: out of fuel, output too long, an undefined value.
    #[error("the chat template can not be rendered: {reason}")]
    Template {
        /// What the template engine says.
        reason: String,
    },
    /// The tokenizer has no tokens for a text with a gap.
    #[error("the model can not fill gaps: its tokenizer has no [PREFIX] and [SUFFIX]")]
    NoInfill,
    /// A stop string that can not be used.
    #[error("stop has {actual}, expected {expected}")]
    InvalidStop {
        /// The rule.
        expected: String,
        /// What the request says.
        actual: String,
    },
}

impl Error {
    /// True if the request is at fault (HTTP 400), false if the model directory or this server is.
    pub fn is_invalid_request(&self) -> bool {
        matches!(
            self,
            Self::TextTooLong { .. }
                | Self::Encode { .. }
                | Self::InvalidChat { .. }
                | Self::Unsupported { .. }
                | Self::MissingControl { .. }
                | Self::NoChatFormat
                | Self::NoInfill
                | Self::TemplateRefused { .. }
                | Self::Template { .. }
                | Self::InvalidStop { .. }
        )
    }

    /// The request field at fault, where one can be named.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidChat { param, .. } => Some(param),
            Self::InvalidStop { .. } => Some("stop"),
            Self::NoInfill => Some("suffix"),
            Self::TemplateRefused { .. }
            | Self::Template { .. }
            | Self::Unsupported { .. }
            | Self::MissingControl { .. }
            | Self::NoChatFormat => Some("messages"),
            _ => None,
        }
    }

    pub(crate) fn invalid_file(
        path: &Path,
        field: impl Into<String>,
        expected: impl Into<String>,
        actual: impl Into<String>,
    ) -> Self {
        Self::InvalidFile {
            path: path.to_path_buf(),
            field: field.into(),
            expected: expected.into(),
            actual: actual.into(),
        }
    }

    pub(crate) fn invalid_chat(
        param: impl Into<String>,
        expected: impl Into<String>,
        actual: impl Into<String>,
    ) -> Self {
        Self::InvalidChat {
            param: param.into(),
            expected: expected.into(),
            actual: actual.into(),
        }
    }
}
