//! What every token id stands for. Knows nothing about how text is cut into tokens.

use std::collections::HashMap;
use std::path::Path;

use tramontane_types::TokenId;

use crate::Error;
use crate::control::{ControlTexts, ControlToken};

/// Ids a tokenizer may have; the largest known one (Gemma's) has 262 144.
pub(crate) const VOCAB_MAX: usize = 1 << 20;

/// One entry of the vocabulary.
#[derive(Debug, Clone, Default)]
pub(crate) struct Token {
    /// The bytes in running text; for a control token its name, such as `[INST]`.
    pub(crate) bytes: Box<[u8]>,
    /// True for tokens that mean something other than text.
    pub(crate) is_control: bool,
}

/// All tokens of a tokenizer by id.
#[derive(Debug)]
pub(crate) struct Vocabulary {
    tokens: Vec<Token>, // [vocab_size]
    control_ids: HashMap<String, TokenId>,
    control_texts: ControlTexts,
}

impl Vocabulary {
    /// `controls` are made control tokens whatever `tokens` says of their ids; `tokens` grows where they lie beyond.
    pub(crate) fn new(
        path: &Path,
        mut tokens: Vec<Token>,
        controls: &[ControlToken],
    ) -> Result<Self, Error> {
        let mut control_ids = HashMap::with_capacity(controls.len());
        for control in controls {
            let index = control.id as usize;
            if index >= VOCAB_MAX {
                return Err(Error::invalid_file(
                    path,
                    format!("id of control token {:?}", control.text),
                    format!("below {VOCAB_MAX}"),
                    control.id.to_string(),
                ));
            }
            if index >= tokens.len() {
                tokens.resize_with(index + 1, Token::default);
            }
            tokens[index] = Token {
                bytes: control.text.as_bytes().into(),
                is_control: true,
            };
            if let Some(other) = control_ids.insert(control.text.clone(), control.id) {
                return Err(Error::invalid_file(
                    path,
                    format!("control token {:?}", control.text),
                    "one id",
                    format!("ids {other} and {}", control.id),
                ));
            }
        }
        let control_texts = ControlTexts::new(controls).map_err(|source| {
            Error::invalid_file(
                path,
                "control tokens",
                "a set that can be searched for",
                source.to_string(),
            )
        })?;
        Ok(Self {
            tokens,
            control_ids,
            control_texts,
        })
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Bytes of the longest token that is text.
    pub(crate) fn text_bytes_max(&self) -> usize {
        let texts = self.tokens.iter().filter(|token| !token.is_control);
        texts.map(|token| token.bytes.len()).max().unwrap_or(0)
    }

    pub(crate) fn get(&self, id: TokenId) -> Option<&Token> {
        self.tokens.get(id as usize)
    }

    pub(crate) fn control_id(&self, text: &str) -> Option<TokenId> {
        self.control_ids.get(text).copied()
    }

    /// The name of a control token.
    pub(crate) fn control_name(&self, id: TokenId) -> Option<String> {
        let token = self.get(id).filter(|token| token.is_control)?;
        Some(String::from_utf8_lossy(&token.bytes).into_owned())
    }

    pub(crate) fn control_texts(&self) -> &ControlTexts {
        &self.control_texts
    }
}
