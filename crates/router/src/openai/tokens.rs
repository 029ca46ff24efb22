//! `POST /tokenize` and `POST /detokenize`, in vLLM's form: text or a conversation to ids, ids to text.

use serde_json::{Value, json};
use tramontane_tokenizer::{ChatRequest, Tokenizer};
use tramontane_types::TokenId;

use super::chat::messages;
use super::fields::{self, Fields};
use super::tools::chat_tools;
use crate::error::ApiError;
use crate::run::ServedModel;

/// What to make ids of.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tokenize {
    input: Input,
    /// The answer has the tokens as text too.
    with_strings: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Input {
    Text { text: String, add_bos: bool },
    Chat(ChatRequest),
}

/// Ids to make text of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Detokenize {
    ids: Vec<TokenId>,
}

/// Checks a body of `/tokenize`.
pub(crate) fn parse_tokenize(body: &Value, model: &ServedModel) -> Result<Tokenize, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    for (name, expected) in [
        ("add_generation_prompt", true),
        ("continue_final_message", false),
    ] {
        if body.boolean(name)?.is_some_and(|asked| asked != expected) {
            return Err(ApiError::unsupported(name));
        }
    }
    for name in [
        "chat_template",
        "chat_template_kwargs",
        "mm_processor_kwargs",
    ] {
        if body.get(name).is_some() {
            return Err(ApiError::unsupported(name));
        }
    }
    let input = match (body.string("prompt")?, body.get("messages").is_some()) {
        (Some(text), false) => Input::Text {
            text: text.to_owned(),
            add_bos: body.boolean("add_special_tokens")?.unwrap_or(true),
        },
        (None, true) => Input::Chat(ChatRequest {
            messages: messages(&body)?,
            tools: chat_tools(&body)?,
        }),
        _ => {
            let message = "one of prompt and messages is required";
            return Err(ApiError::invalid("prompt", message));
        }
    };
    Ok(Tokenize {
        input,
        with_strings: body.boolean("return_token_strs")?.unwrap_or(false),
    })
}

impl Tokenize {
    /// The answer. Long CPU work.
    pub(crate) fn answer(
        &self,
        tokenizer: &Tokenizer,
        model: &ServedModel,
    ) -> Result<Value, ApiError> {
        let named = |error: tramontane_tokenizer::Error| {
            let error = ApiError::from(error);
            match error.param {
                None => error.at("prompt"),
                Some(_) => error,
            }
        };
        let ids = match &self.input {
            Input::Text {
                text,
                add_bos: true,
            } => tokenizer.encode_with_bos(text),
            Input::Text { text, .. } => tokenizer.encode(text),
            Input::Chat(chat) => tokenizer.encode_chat(chat),
        };
        let ids = ids.map_err(named)?;
        let strings = self.with_strings.then(|| {
            let bytes = ids.iter().map(|&id| tokenizer.token_bytes(id));
            let text = |bytes: Option<&[u8]>| {
                String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
            };
            bytes.map(text).collect::<Vec<String>>()
        });
        Ok(json!({
            "count": ids.len(),
            "max_model_len": model.context_length,
            "tokens": ids,
            "token_strs": strings,
        }))
    }
}

/// Checks a body of `/detokenize`.
pub(crate) fn parse_detokenize(body: &Value, model: &ServedModel) -> Result<Detokenize, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    let ids = fields::array(body.required("tokens")?, "tokens")?;
    let ids = fields::token_ids(ids, "tokens")?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) {
        let message = format!("tokens must be token ids below {}, got {id}", model.vocab);
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(Detokenize { ids })
}

impl Detokenize {
    /// The answer. Long CPU work.
    pub(crate) fn answer(&self, tokenizer: &Tokenizer) -> Value {
        json!({ "prompt": tokenizer.decode(&self.ids, false) })
    }
}
