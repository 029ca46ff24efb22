//! Tokens that a model directory adds to those of its tokenizer file. Reads JSON values, never files.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tramontane_types::TokenId;

use crate::Error;
use crate::vocabulary::VOCAB_MAX;

/// A token of `added_tokens` or `added_tokens_decoder`, names as in Hugging Face's files.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    #[serde(default)]
    pub(crate) special: bool,
    #[serde(default)]
    pub(crate) lstrip: bool,
    #[serde(default)]
    pub(crate) rstrip: bool,
}

/// Added tokens by id; what is inserted later wins.
pub(crate) type AddedTokens = BTreeMap<TokenId, AddedToken>;

/// Reads `added_tokens_decoder` of `tokenizer_config.json`: `{"32000": {"content": ..., "special": ...}}`.
pub(crate) fn from_decoder(path: &Path, map: &Value) -> Result<AddedTokens, Error> {
    let mut tokens = AddedTokens::new();
    let Some(map) = map.as_object() else {
        return Err(Error::invalid_file(
            path,
            "added_tokens_decoder",
            "an object",
            kind_of(map),
        ));
    };
    for (key, value) in map {
        let field = format!("added_tokens_decoder.{key}");
        let id = key.parse().ok().filter(|id| is_id(*id)).ok_or_else(|| {
            Error::invalid_file(
                path,
                field.as_str(),
                format!("an id below {VOCAB_MAX}"),
                key.as_str(),
            )
        })?;
        tokens.insert(id, added_token(path, &field, value)?);
    }
    Ok(tokens)
}

/// Reads `added_tokens` of `tokenizer.json`: `[{"id": 0, "content": ..., "special": ...}]`.
pub(crate) fn from_list(path: &Path, list: &Value) -> Result<AddedTokens, Error> {
    let mut tokens = AddedTokens::new();
    let Some(list) = list.as_array() else {
        return Err(Error::invalid_file(
            path,
            "added_tokens",
            "a list",
            kind_of(list),
        ));
    };
    for (index, value) in list.iter().enumerate() {
        let field = format!("added_tokens[{index}]");
        let id = value.get("id").and_then(Value::as_u64);
        let id = id
            .and_then(|id| TokenId::try_from(id).ok())
            .filter(|id| is_id(*id))
            .ok_or_else(|| {
                Error::invalid_file(
                    path,
                    format!("{field}.id"),
                    format!("a number below {VOCAB_MAX}"),
                    value
                        .get("id")
                        .map_or("absent".to_owned(), Value::to_string),
                )
            })?;
        tokens.insert(id, added_token(path, &field, value)?);
    }
    Ok(tokens)
}

fn added_token(path: &Path, field: &str, value: &Value) -> Result<AddedToken, Error> {
    let token = AddedToken::deserialize(value).map_err(|error| {
        Error::invalid_file(path, field, "a token with a content", error.to_string())
    })?;
    if token.content.is_empty() {
        return Err(Error::invalid_file(
            path,
            format!("{field}.content"),
            "some text",
            "empty",
        ));
    }
    Ok(token)
}

fn is_id(id: TokenId) -> bool {
    (id as usize) < VOCAB_MAX
}

/// The JSON type of a value, for error texts.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
