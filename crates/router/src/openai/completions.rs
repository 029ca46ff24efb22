//! `POST /v1/completions`: prompts in, their continuations out.

use serde::Serialize;
use serde_json::{Value, json};

use super::fields::{self, Fields, wrong};
use super::logprobs::{LegacyLogprobs, PromptLogprobs};
use super::options::{
    COMPLETION_REFUSED, not_in_a_stream, refuse_unsupported, shared_options, stream_options,
};
use super::{
    Chunk, Form, Head, Parsed, Render, Whole, chunk, few_values, finish_reason, object,
    usage_object,
};
use crate::answer::{Choice, Spent};
use crate::answer_room::json_bytes;
use crate::error::ApiError;
use crate::request::{CHOICES_MAX, GenerationRequest, Prompt};
use crate::run::ServedModel;
use crate::sequence::Delta;

/// Most alternatives per token at this route, as in the OpenAI API.
pub(crate) const LOGPROBS_MAX: u32 = 5;

/// Checks a completion body.
pub(crate) fn parse_completion(body: &Value, model: &ServedModel) -> Result<Parsed, ApiError> {
    let body = Fields::of(body, "")?;
    model.check(body.string("model")?)?;
    refuse_unsupported(&body, &COMPLETION_REFUSED)?;
    let (stream, include_usage) = stream_options(&body)?;
    let mut options = shared_options(&body)?;
    options.echo = body.boolean("echo")?.unwrap_or(false);
    options.logprobs = body.unsigned("logprobs")?;
    options.logprobs_name = Some("logprobs");
    if options.logprobs.is_some_and(|n| n > LOGPROBS_MAX) {
        let got = options.logprobs.unwrap_or_default();
        let message = format!("logprobs must be at most {LOGPROBS_MAX}, got {got}");
        return Err(ApiError::invalid("logprobs", message));
    }
    let logprobs = options.logprobs.is_some();
    let asked_of_prompt = body.unsigned("prompt_logprobs")?;
    options.prompt_logprobs = asked_of_prompt.or(options.logprobs.filter(|_| options.echo));
    if stream && options.prompt_logprobs.is_some() {
        let param = match asked_of_prompt {
            Some(_) => "prompt_logprobs",
            None => "echo",
        };
        return Err(not_in_a_stream(param));
    }
    options.best_of = body.unsigned("best_of")?;
    if stream && options.chooses() {
        let message = "best_of is only allowed without stream, unless it equals n";
        return Err(ApiError::invalid("best_of", message));
    }
    let mut prompts = prompts(body.required("prompt")?)?;
    if let Some(suffix) = body.string("suffix")?.filter(|suffix| !suffix.is_empty()) {
        prompts = infills(prompts, suffix)?;
    }
    let request = GenerationRequest::new(prompts, &options, model)?;
    let form = Form {
        stream,
        include_usage,
        include_metrics: body.boolean("include_metrics")?.unwrap_or(false),
        logprobs,
        ..Form::default()
    };
    Ok(Parsed { request, form })
}

/// The prompts with a gap between each and `suffix`.
fn infills(prompts: Vec<Prompt>, suffix: &str) -> Result<Vec<Prompt>, ApiError> {
    let infill = |prompt| match prompt {
        Prompt::Text(prompt) => Ok(Prompt::Infill {
            prompt,
            suffix: suffix.to_owned(),
        }),
        _ => Err(ApiError::invalid(
            "suffix",
            "suffix is only allowed with prompts that are strings",
        )),
    };
    prompts.into_iter().map(infill).collect()
}

/// A string, strings, token ids, or lists of token ids.
fn prompts(value: &Value) -> Result<Vec<Prompt>, ApiError> {
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) => list,
        other => return Err(wrong("prompt", "a string or an array", other)),
    };
    let Some(first) = list.first() else {
        return Err(ApiError::invalid("prompt", "prompt must not be empty"));
    };
    if first.is_number() {
        return Ok(vec![Prompt::Ids(fields::token_ids(list, "prompt")?)]);
    }
    if list.len() > CHOICES_MAX {
        let message = format!(
            "prompt must list at most {CHOICES_MAX} prompts, got {}",
            list.len()
        );
        return Err(ApiError::invalid("prompt", message));
    }
    let mut prompts = Vec::with_capacity(list.len());
    for (i, entry) in list.iter().enumerate() {
        let path = format!("prompt[{i}]");
        prompts.push(match entry {
            Value::String(text) if first.is_string() => Prompt::Text(text.clone()),
            Value::Array(ids) if first.is_array() => Prompt::Ids(fields::token_ids(ids, &path)?),
            other if first.is_string() => {
                return Err(wrong(&path, "a string like prompt[0]", other));
            }
            other => return Err(wrong(&path, "an array of token ids", other)),
        });
    }
    Ok(prompts)
}

/// Renders `text_completion`, whole and in chunks.
#[derive(Debug)]
pub(crate) struct CompletionRender {
    head: Head,
    /// Characters of each answer so far, for `text_offset`.
    offsets: Vec<usize>,
}

const OBJECT: &str = "text_completion";

impl CompletionRender {
    pub(crate) fn new(head: Head, num_choices: usize) -> Self {
        Self {
            head,
            offsets: vec![0; num_choices],
        }
    }

    fn choice(index: usize, text: &str, logprobs: Value, finish: Value) -> Value {
        let mut choice = json!({ "index": index, "text": text });
        choice["logprobs"] = logprobs;
        choice["finish_reason"] = finish;
        choice
    }
}

impl Render for CompletionRender {
    fn open(&mut self, choice: usize, echo: Option<&str>) -> Vec<Chunk> {
        let Some(echo) = echo else {
            return Vec::new();
        };
        let opened = Self::choice(choice, echo, Value::Null, Value::Null);
        vec![chunk(&self.head, OBJECT, vec![opened]).into()]
    }

    fn chunks(&mut self, delta: &Delta) -> Vec<Chunk> {
        let offset = self.offsets.get(delta.choice).copied().unwrap_or(0);
        let mut logprobs = LegacyLogprobs::starting_at(offset, &self.head.tokenizer);
        if self.head.logprobs {
            logprobs.add(&delta.tokens, delta.has_end_token);
            if let Some(offset) = self.offsets.get_mut(delta.choice) {
                *offset = logprobs.offset();
            }
        }
        if delta.text.is_empty() && logprobs.is_empty() && delta.finish.is_none() {
            return Vec::new();
        }
        let logprobs = few_values((!logprobs.is_empty()).then_some(logprobs));
        let choice = Self::choice(
            delta.choice,
            &delta.text,
            logprobs,
            finish_reason(delta.finish, false),
        );
        vec![chunk(&self.head, OBJECT, vec![choice]).into()]
    }

    fn end(&mut self, spent: Spent) -> Vec<Chunk> {
        if !self.head.include_usage {
            return Vec::new();
        }
        let mut last = object(&self.head, OBJECT, Vec::new());
        last["usage"] = usage_object(spent, self.head.include_metrics);
        vec![last.into()]
    }

    fn whole(&self, choices: &[Choice], spent: Spent) -> Result<Vec<u8>, ApiError> {
        let tokenizer = &self.head.tokenizer;
        let mut list = Vec::with_capacity(choices.len());
        for (index, choice) in choices.iter().enumerate() {
            let mut legacy = LegacyLogprobs::starting_at(0, tokenizer);
            if let Some(first) = choice.prompt_begin.filter(|_| choice.is_echoed) {
                legacy.add_prompt(first, &choice.prompt_tokens);
            }
            legacy.add(&choice.tokens, choice.has_end_token);
            let shows_prompt = choice.prompt_begin.is_some() && !choice.is_echoed;
            list.push(WholeChoice {
                index,
                text: &choice.text,
                logprobs: self.head.logprobs.then_some(legacy),
                finish_reason: finish_reason(choice.finish, false),
                prompt_logprobs: shows_prompt.then_some(PromptLogprobs {
                    prompt: &choice.prompt_tokens,
                    tokenizer,
                }),
            });
        }
        json_bytes(&Whole::new(&self.head, OBJECT, list, spent))
    }
}

/// One of the answers, whole.
#[derive(Serialize)]
struct WholeChoice<'a> {
    index: usize,
    text: &'a str,
    logprobs: Option<LegacyLogprobs<'a>>,
    finish_reason: Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs<'a>>,
}
