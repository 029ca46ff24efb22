//! `POST /tokenize` and `POST /detokenize`, in vLLM's form: text or a conversation to ids, ids to text.

use serde::{Serialize, Serializer};
use serde_json::Value;
use tramontane_tokenizer::{ChatRequest, Tokenizer};
use tramontane_types::TokenId;

use super::chat::messages;
use super::fields::{self, Fields};
use super::tools::chat_tools;
use crate::answer_room::json_bytes;
use crate::error::ApiError;
use crate::run::ServedModel;

/// Most tokens of a text, or ids of one, at both doors: a body with more ids has too many values. What `/tokenize` says,
/// `/detokenize` takes.
pub(crate) const TOKENS_MAX: usize = 655_000;

/// Refuses more tokens than the limit.
pub(crate) fn check_num_tokens(num_tokens: usize, param: &str) -> Result<(), ApiError> {
    if num_tokens <= TOKENS_MAX {
        return Ok(());
    }
    let message = format!("{param} must have at most {TOKENS_MAX} tokens, got {num_tokens}");
    Err(ApiError::invalid(param, message))
}

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
    /// The answer as JSON text. Long CPU work.
    pub(crate) fn answer(
        &self,
        tokenizer: &Tokenizer,
        model: &ServedModel,
    ) -> Result<Vec<u8>, ApiError> {
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
        check_num_tokens(
            ids.len(),
            match &self.input {
                Input::Text { .. } => "prompt",
                Input::Chat(_) => "messages",
            },
        )?;
        let ids = ids.as_slice();
        let token_strs = self.with_strings.then_some(Strings { ids, tokenizer });
        json_bytes(&Tokenized {
            count: ids.len(),
            max_model_len: model.context_length,
            tokens: ids,
            token_strs,
        })
    }
}

#[derive(Serialize)]
struct Tokenized<'a> {
    count: usize,
    max_model_len: u32,
    tokens: &'a [TokenId],
    token_strs: Option<Strings<'a>>,
}

/// The text of each token, made as it is written.
struct Strings<'a> {
    ids: &'a [TokenId],
    tokenizer: &'a Tokenizer,
}

impl Serialize for Strings<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let bytes = |&id| self.tokenizer.token_bytes(id).unwrap_or_default();
        let bytes = self.ids.iter().map(bytes);
        serializer.collect_seq(bytes.map(String::from_utf8_lossy))
    }
}

/// Checks a body of `/detokenize`.
pub(crate) fn parse_detokenize(body: &Value, model: &ServedModel) -> Result<Detokenize, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    let ids = fields::array(body.required("tokens")?, "tokens")?;
    check_num_tokens(ids.len(), "tokens")?;
    let ids = fields::token_ids(ids, "tokens")?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) {
        let message = format!("tokens must be token ids below {}, got {id}", model.vocab);
        return Err(ApiError::invalid("tokens", message));
    }
    Ok(Detokenize { ids })
}

impl Detokenize {
    /// The answer as JSON text. Long CPU work.
    pub(crate) fn answer(&self, tokenizer: &Tokenizer) -> Result<Vec<u8>, ApiError> {
        let prompt = tokenizer.decode(&self.ids, false);
        json_bytes(&Detokenized { prompt: &prompt })
    }
}

#[derive(Serialize)]
struct Detokenized<'a> {
    prompt: &'a str,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::error::ErrorKind;
    use crate::json_marks::{BODY_MARKS_MAX, JsonMarks};

    fn parts() -> (Tokenizer, ServedModel) {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
        let tokenizer = Tokenizer::from_dir(std::path::Path::new(dir)).unwrap();
        let model = ServedModel {
            id: "demo".to_owned(),
            aliases: Vec::new(),
            context_length: 256,
            vocab: tokenizer.vocab_size(),
        };
        (tokenizer, model)
    }

    #[test]
    fn what_is_tokenized_can_be_detokenized_up_to_the_limit_and_no_further() {
        let (tokenizer, model) = parts();
        // No token of its own: four bytes of UTF-8, and a token for each.
        let rare = '\u{12345}'.to_string();
        let ask = |num: usize| {
            let body = json!({
                "prompt": rare.repeat(num), "add_special_tokens": false, "return_token_strs": true,
            });
            let asked = parse_tokenize(&body, &model).unwrap();
            asked.answer(&tokenizer, &model)
        };
        let most = TOKENS_MAX / 4 - 1;
        let answer: Value = serde_json::from_slice(&ask(most).unwrap()).unwrap();
        let tokens = answer["tokens"].as_array().unwrap();
        assert!(tokens.len() > TOKENS_MAX - 8 && answer["count"] == tokens.len());
        assert_eq!(answer["token_strs"].as_array().unwrap().len(), tokens.len());
        let mut body = json!({ "model": "demo", "tokens": tokens });
        let mut marks = JsonMarks::at_most(BODY_MARKS_MAX);
        marks.count_text(&body.to_string(), "the body").unwrap();
        let asked = parse_detokenize(&body, &model).unwrap();
        let answer: Value = serde_json::from_slice(&asked.answer(&tokenizer).unwrap()).unwrap();
        let prompt = answer["prompt"].as_str().unwrap();
        assert_eq!(prompt.trim_start(), rare.repeat(most));

        let error = ask(most + 3).unwrap_err();
        assert_eq!(
            (error.kind, error.param.as_deref()),
            (ErrorKind::Invalid, Some("prompt"))
        );
        assert!(
            error.message.contains("at most 655000 tokens, got 65500"),
            "{error}"
        );
        body["tokens"] = vec![300; TOKENS_MAX].into();
        parse_detokenize(&body, &model).unwrap();
        body["tokens"] = vec![300; TOKENS_MAX + 1].into();
        let error = parse_detokenize(&body, &model).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("tokens"));
    }

    #[test]
    fn texts_of_tokens_are_given_when_asked_for() {
        let (tokenizer, model) = parts();
        let ask = |body: Value| {
            let asked = parse_tokenize(&body, &model).unwrap();
            let answer = asked.answer(&tokenizer, &model).unwrap();
            serde_json::from_slice::<Value>(&answer).unwrap()
        };
        let plain = ask(json!({ "prompt": "Hello world" }));
        assert_eq!(
            (&plain["token_strs"], &plain["max_model_len"]),
            (&Value::Null, &json!(256))
        );
        let texts = ask(json!({ "prompt": "Hello world", "return_token_strs": true }));
        assert_eq!(texts["tokens"], plain["tokens"]);
        let texts = texts["token_strs"].as_array().unwrap();
        let text: String = texts[1..].iter().map(|t| t.as_str().unwrap()).collect();
        assert_eq!(text.trim_start(), "Hello world");
    }
}
