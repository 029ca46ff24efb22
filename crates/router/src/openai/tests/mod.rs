//! What the OpenAI routes accept, refuse and answer. Never needs a worker.

mod answers;
mod responses;

use std::time::Duration;

use serde_json::{Value, json};
use tramontane_tokenizer::{DecodeStart, DecodeStream, Role, Tokenizer};
use tramontane_types::{FinishReason, TokenLogprob, TokenOutput, Usage};

use super::*;
use crate::answer_id::AnswerId;
use crate::error::ErrorKind;
use crate::request::{PreparedRequest, Prompt, prepare};
use crate::run::ServedModel;

fn served() -> ServedModel {
    ServedModel {
        id: "demo".to_owned(),
        aliases: vec!["gpt-4o".to_owned()],
        context_length: 256,
        vocab: 4096,
    }
}

fn tokenizer() -> Tokenizer {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
    Tokenizer::from_dir(std::path::Path::new(dir)).unwrap()
}

fn chat_with(key: &str, value: Value) -> Result<Parsed, ApiError> {
    let mut body = json!({ "model": "demo", "messages": [{ "role": "user", "content": "hi" }] });
    body[key] = value;
    parse_chat(&body, &served())
}

fn completion_with(key: &str, value: Value) -> Result<Parsed, ApiError> {
    let mut body = json!({ "model": "demo", "prompt": "hi" });
    body[key] = value;
    parse_completion(&body, &served())
}

/// What events say.
fn values(chunks: &[Chunk]) -> Vec<Value> {
    let parse = |chunk: &Chunk| serde_json::from_str(&chunk.data).unwrap();
    chunks.iter().map(parse).collect()
}

/// What a whole answer says.
fn whole_of(render: &dyn Render, choices: &[Choice]) -> Value {
    let written = render.whole(choices, Spent::default()).unwrap();
    serde_json::from_slice(&written).unwrap()
}

type Door = fn(&str, Value) -> Result<Parsed, ApiError>;

#[track_caller]
fn refused(door: Door, key: &str, value: Value, kind: ErrorKind, param: &str) -> String {
    let shown = format!("{key}: {value}");
    let error = door(key, value).expect_err(&shown);
    assert_eq!(
        (error.kind, error.param.as_deref()),
        (kind, Some(param)),
        "{shown}: {error}"
    );
    error.message
}

/// Fields of both routes with values outside their rules.
fn outside() -> Vec<(&'static str, Value)> {
    vec![
        ("temperature", json!(2.1)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("hot")),
        ("temperature", json!(1e300)),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("top_p", json!([1])),
        ("min_p", json!(-1)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("presence_penalty", json!(2.5)),
        ("frequency_penalty", json!(-2.5)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(129)),
        ("n", json!(1_000_000_000_000_u64)),
        ("n", json!(-1)),
        ("n", json!(true)),
        ("max_tokens", json!(0)),
        ("max_tokens", json!(-5)),
        ("max_tokens", json!(1.5)),
        ("max_tokens", json!("10")),
        ("max_tokens", json!(5_000_000_000_u64)),
        ("seed", json!(18_446_744_073_709_551_615_u64)),
        ("seed", json!(0.5)),
        ("stop", json!(5)),
        ("stop", json!(["a", "b", "c", "d", "e"])),
        ("stop", json!("")),
        ("stop", json!([""])),
        ("stop", json!("x".repeat(10_000))),
        ("stop_token_ids", json!([4096])),
        ("stop_token_ids", json!(3)),
        ("logit_bias", json!({ "4096": 1 })),
        ("logit_bias", json!({ "5": 101 })),
        ("logit_bias", json!({ "five": 1 })),
        ("logit_bias", json!([5])),
        ("ignore_eos", json!("yes")),
        ("stream", json!(1)),
        ("stream_options", json!({ "include_usage": true })),
    ]
}

#[test]
fn every_parameter_outside_its_rule_is_named() {
    for (key, value) in outside() {
        refused(chat_with, key, value.clone(), ErrorKind::Invalid, key);
        refused(completion_with, key, value, ErrorKind::Invalid, key);
    }
    refused(
        chat_with,
        "stop",
        json!(["a", 1]),
        ErrorKind::Invalid,
        "stop[1]",
    );
    refused(
        chat_with,
        "stop_token_ids",
        json!([1, "a"]),
        ErrorKind::Invalid,
        "stop_token_ids[1]",
    );
    refused(
        chat_with,
        "logit_bias",
        json!({ "5": "a" }),
        ErrorKind::Invalid,
        "logit_bias.5",
    );
    refused(
        chat_with,
        "model",
        json!("other"),
        ErrorKind::ModelNotFound,
        "model",
    );
    refused(chat_with, "model", json!(7), ErrorKind::Invalid, "model");
    let max = "max_completion_tokens";
    let message = refused(chat_with, max, json!(0), ErrorKind::Invalid, max);
    assert_eq!(message, "max_completion_tokens must be at least 1, got 0");
}

#[test]
fn log_probabilities_and_token_limits_are_checked_with_what_they_depend_on() {
    refused(
        chat_with,
        "top_logprobs",
        json!(2),
        ErrorKind::Invalid,
        "top_logprobs",
    );
    refused(
        chat_with,
        "logprobs",
        json!(2),
        ErrorKind::Invalid,
        "logprobs",
    );
    refused(
        completion_with,
        "logprobs",
        json!(6),
        ErrorKind::Invalid,
        "logprobs",
    );
    refused(
        completion_with,
        "logprobs",
        json!(true),
        ErrorKind::Invalid,
        "logprobs",
    );
    let both = json!({
        "messages": [{ "role": "user", "content": "x" }], "logprobs": true, "top_logprobs": 21
    });
    let error = parse_chat(&both, &served()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("top_logprobs"));
    let min = json!({ "prompt": "x", "min_tokens": 17, "max_tokens": 16 });
    let error = parse_completion(&min, &served()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("min_tokens"));
}

#[test]
fn messages_are_checked_entry_by_entry() {
    let invalid = ErrorKind::Invalid;
    let unsupported = ErrorKind::Unsupported;
    let table = [
        (json!(null), invalid, "messages"),
        (json!("hi"), invalid, "messages"),
        (json!([]), invalid, "messages"),
        (json!(["hi"]), invalid, "messages[0]"),
        (json!([{ "content": "x" }]), invalid, "messages[0].role"),
        (
            json!([{ "role": 3, "content": "x" }]),
            invalid,
            "messages[0].role",
        ),
        (
            json!([{ "role": "boss", "content": "x" }]),
            invalid,
            "messages[0].role",
        ),
        (
            json!([{ "role": "function", "content": "x" }]),
            unsupported,
            "messages[0].role",
        ),
        (
            json!([{ "role": "tool", "content": "x" }]),
            invalid,
            "messages[0].tool_call_id",
        ),
        (
            json!([{ "role": "user", "content": "x", "tool_calls": [{ "id": "a", "function": { "name": "f" } }] }]),
            invalid,
            "messages[0].tool_calls",
        ),
        (json!([{ "role": "user" }]), invalid, "messages[0].content"),
        (
            json!([{ "role": "user", "content": 5 }]),
            invalid,
            "messages[0].content",
        ),
        (
            json!([{ "role": "user", "content": [5] }]),
            invalid,
            "messages[0].content[0]",
        ),
        (
            json!([{ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] }]),
            unsupported,
            "messages[0].content[0].type",
        ),
        (
            json!([{ "role": "user", "content": [{ "type": "text" }] }]),
            invalid,
            "messages[0].content[0].text",
        ),
        (
            json!([{ "role": "assistant", "content": "x", "tool_calls": [{}] }]),
            invalid,
            "messages[0].tool_calls[0].function",
        ),
    ];
    for (messages, kind, param) in table {
        refused(chat_with, "messages", messages, kind, param);
    }
}

#[test]
fn prompts_are_checked_entry_by_entry() {
    let invalid = ErrorKind::Invalid;
    let table = [
        (json!(null), "prompt"),
        (json!(5), "prompt"),
        (json!([]), "prompt"),
        (json!(["a", 5]), "prompt[1]"),
        (json!([1, "a"]), "prompt[1]"),
        (json!([1, -1]), "prompt[1]"),
        (json!([[1], "a"]), "prompt[1]"),
        (json!([[1], [2, null]]), "prompt[1][1]"),
        (json!(vec!["a"; 129]), "prompt"),
        (json!({}), "prompt"),
    ];
    for (prompt, param) in table {
        refused(completion_with, "prompt", prompt, invalid, param);
    }
}

#[test]
fn prompts_times_answers_are_bounded_and_bodies_are_objects() {
    let many = json!({ "prompt": vec!["a"; 65], "n": 2 });
    assert_eq!(
        parse_completion(&many, &served())
            .unwrap_err()
            .param
            .as_deref(),
        Some("prompt")
    );
    let error = parse_chat(&json!([1]), &served()).unwrap_err();
    assert_eq!(
        error.message,
        "the body must be a JSON object, got an array"
    );
}

#[test]
fn the_prompt_is_reported_only_as_a_whole_and_within_a_limit() {
    let asks = [
        (
            json!({ "prompt": "x", "echo": true, "logprobs": 1, "stream": true }),
            "echo",
        ),
        (
            json!({ "prompt": "x", "prompt_logprobs": 1, "stream": true }),
            "prompt_logprobs",
        ),
        (
            json!({ "prompt": "x", "prompt_logprobs": 21 }),
            "prompt_logprobs",
        ),
    ];
    for (body, param) in asks {
        let error = parse_completion(&body, &served()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param));
    }
    let key = "prompt_logprobs";
    refused(chat_with, key, json!(21), ErrorKind::Invalid, key);
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true, key: 1 });
    let error = parse_chat(&body, &served()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some(key));
    let asked = chat_with(key, json!(3)).unwrap().request;
    assert_eq!(asked.sampling.prompt_logprobs, Some(3));
}

/// For each refused field a value that asks for something, and one that asks for nothing if there is any.
fn asking_and_harmless(name: &str) -> (Value, Option<Value>) {
    let some = |value| (value, None);
    let or = |asking, harmless| (asking, Some(harmless));
    match name {
        "functions" | "documents" | "context_management" => or(json!([{}]), json!([])),
        "logits_processors" | "stop" => or(json!(["x"]), json!([])),
        "tools" => or(json!([{ "type": "function" }]), json!([])),
        "function_call" => or(json!({ "name": "f" }), json!("auto")),
        "tool_choice" => or(json!("required"), json!("none")),
        "modalities" => or(json!(["text", "audio"]), json!(["text"])),
        "reasoning_effort" => or(json!("low"), json!("none")),
        "service_tier" => or(json!("priority"), json!("default")),
        "verbosity" => or(json!("high"), json!("medium")),
        "truncation" => or(json!("auto"), json!("disabled")),
        "reasoning" => or(json!({ "effort": "low" }), json!({ "effort": "none" })),
        "chat_template_kwargs" => or(json!({ "a": 1 }), json!({})),
        "store"
        | "background"
        | "continue_final_message"
        | "use_beam_search"
        | "early_stopping"
        | "include_stop_str_in_output"
        | "echo"
        | "logprobs"
        | "return_token_ids"
        | "return_tokens_as_token_ids" => or(json!(true), json!(false)),
        "skip_special_tokens" | "add_generation_prompt" | "spaces_between_special_tokens" => {
            or(json!(false), json!(true))
        }
        "length_penalty" => or(json!(0.5), json!(1)),
        "best_of" | "n" => or(json!(3), json!(1)),
        "suffix" | "cache_salt" => or(json!("x"), json!("")),
        "truncate_prompt_tokens"
        | "max_tool_calls"
        | "top_logprobs"
        | "prompt_logprobs"
        | "max_tokens"
        | "max_completion_tokens" => some(json!(1)),
        "allowed_token_ids" | "messages" => some(json!([1])),
        "audio" | "prediction" | "web_search_options" | "moderation" | "lora_request" => {
            some(json!({ "voice": "x" }))
        }
        "conversation" | "prompt" | "background_options" | "access_programs" | "image"
        | "multi_agent" => some(json!({ "id": "x" })),
        "guided_decoding_backend"
        | "guided_whitespace_pattern"
        | "chat_template"
        | "prompt_embeds"
        | "previous_response_id" => some(json!("x")),
        _ => panic!("{name} is refused and not tried"),
    }
}

#[test]
fn what_has_an_effect_and_is_not_offered_is_refused_by_name() {
    use super::options::{CHAT_REFUSED, COMPLETION_REFUSED, REFUSED, RESPONSE_REFUSED};
    let doors: [(Door, &[_]); 3] = [
        (chat_with, &CHAT_REFUSED),
        (completion_with, &COMPLETION_REFUSED),
        (responses::response_with, &RESPONSE_REFUSED),
    ];
    for (door, own) in doors {
        for (name, _) in REFUSED.iter().chain(own) {
            let (asking, harmless) = asking_and_harmless(name);
            refused(door, name, asking, ErrorKind::Unsupported, name);
            door(name, Value::Null).unwrap();
            if let Some(value) = harmless {
                door(name, value).unwrap();
            }
        }
    }
    let docs = include_str!("../../../../../docs/api.md");
    for (name, _) in REFUSED {
        assert!(docs.contains(&format!("`{name}`")), "docs/api.md: {name}");
    }
    for made in [json!(0), json!(21), json!(1_000_000)] {
        refused(
            completion_with,
            "best_of",
            made,
            ErrorKind::Invalid,
            "best_of",
        );
    }
    let harmless = [
        ("tools", json!([])),
        ("tool_choice", json!("none")),
        ("tool_choice", json!("auto")),
        ("response_format", json!({ "type": "text" })),
        ("modalities", json!(["text"])),
        ("store", json!(false)),
        ("metadata", json!({ "a": "b" })),
        ("service_tier", json!("auto")),
        ("user", json!("me")),
        ("temperature", json!(null)),
        ("no_such_field", json!({ "a": [1] })),
        ("model", json!("gpt-4o")),
        ("best_of", json!(1)),
        ("top_k", json!(-1)),
    ];
    for (key, value) in harmless {
        chat_with(key, value.clone()).unwrap();
        completion_with(key, value).unwrap();
    }
}

#[test]
fn everything_that_is_honoured_arrives() {
    let body = json!({
        "messages": [
            { "role": "developer", "content": "be short" },
            { "role": "user", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }] },
        ],
        "max_completion_tokens": 7, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "n": 3,
        "stop": ["x", "y"], "stream": true, "stream_options": { "include_usage": true },
        "logprobs": true, "top_logprobs": 4, "logit_bias": { "5": -100, "6": 2.5 },
        "presence_penalty": 1, "frequency_penalty": -1, "seed": -3, "top_k": 40, "min_p": 0.1,
        "repetition_penalty": 1.1, "ignore_eos": true, "min_tokens": 2, "stop_token_ids": [9],
    });
    let parsed = parse_chat(&body, &served()).unwrap();
    assert!(parsed.form.stream && parsed.form.include_usage && parsed.form.logprobs);
    let request = parsed.request;
    assert_eq!((request.max_tokens, request.n), (Some(7), 3));
    let sampling = &request.sampling;
    assert_eq!(
        (sampling.temperature, sampling.top_p, sampling.min_p),
        (0.5, 0.9, 0.1)
    );
    assert_eq!(
        (sampling.top_k, sampling.min_tokens, sampling.ignore_eos),
        (40, 2, true)
    );
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty),
        (1.0, -1.0)
    );
    assert_eq!(sampling.repetition_penalty, 1.1);
    assert_eq!((request.seed, sampling.logprobs), (Some(-3), Some(4)));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (6, 2.5)]);
    assert_eq!(sampling.stop_ids, [9]);
    let [Prompt::Chat(chat)] = &request.prompts[..] else {
        panic!("one conversation expected")
    };
    assert_eq!(chat.messages[0].role, Role::System);
    assert_eq!(chat.messages[1].content, "ab");
}

#[test]
fn prompts_come_in_four_forms_and_the_context_bounds_them() {
    let (model, tokenizer) = (served(), tokenizer());
    let prepared = |body: Value| {
        let parsed = parse_completion(&body, &model).unwrap();
        prepare(parsed.request, AnswerId::unique(7), &tokenizer, &model)
    };
    let one = prepared(json!({ "prompt": "Hello" })).unwrap();
    assert_eq!(
        one.prompts[0].ids[..],
        tokenizer.encode_with_bos("Hello").unwrap()
    );
    assert_eq!(one.prompts[0].max_tokens, 16);
    assert_eq!(
        prepared(json!({ "prompt": ["a", "b"], "n": 2 }))
            .unwrap()
            .num_sequences(),
        4
    );
    let ids = prepared(json!({ "prompt": [5, 6], "max_tokens": 254 })).unwrap();
    assert_eq!(ids.prompts[0].ids[..], [5, 6]);
    let lists = prepared(json!({ "prompt": [[5], [6, 7]], "echo": true })).unwrap();
    assert_eq!(lists.prompts[1].ids[..], [6, 7]);
    assert!(lists.prompts[1].echo.is_some());
    let error = prepared(json!({ "prompt": [5, 6], "max_tokens": 255 })).unwrap_err();
    assert_eq!(error.kind, ErrorKind::ContextLength);
    assert_eq!(error.param.as_deref(), Some("max_tokens"));
    assert_eq!(
        error.message,
        "this model's context is 256 tokens, the prompt has 2 and max_tokens is 255, together 257"
    );
    let error = prepared(json!({ "prompt": vec![5; 256] })).unwrap_err();
    assert_eq!(
        (error.kind, error.param.as_deref()),
        (ErrorKind::ContextLength, Some("prompt"))
    );
    let error = prepared(json!({ "prompt": [[5], [4096]] })).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("prompt[1]"));
    let error = prepared(json!({ "prompt": [[5], []] })).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("prompt[1]"));
    // Room for ten: the default shrinks.
    assert_eq!(
        prepared(json!({ "prompt": vec![5; 246] })).unwrap().prompts[0].max_tokens,
        10
    );
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let chat = prepare(
        parse_chat(&chat, &model).unwrap().request,
        AnswerId::unique(7),
        &tokenizer,
        &model,
    )
    .unwrap();
    let prompt = &chat.prompts[0];
    assert_eq!(prompt.max_tokens as usize, 256 - prompt.ids.len());
    let wrong = json!({ "messages": [{ "role": "system", "content": "hi" }] });
    let parsed = parse_chat(&wrong, &model).unwrap();
    match prepare(parsed.request, AnswerId::unique(7), &tokenizer, &model) {
        Ok(_) => {}
        Err(error) => {
            assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
            assert!(error.param.unwrap().starts_with("messages"));
        }
    }
}

#[test]
fn without_a_seed_the_name_of_the_answer_is_the_seed() {
    let (model, tokenizer) = (served(), tokenizer());
    let seed = |body: Value, id: AnswerId| {
        let parsed = parse_completion(&body, &model).unwrap();
        let prepared = prepare(parsed.request, id, &tokenizer, &model).unwrap();
        prepared.sampling.seed
    };
    let id = AnswerId::unique(7);
    assert_eq!(seed(json!({ "prompt": "a" }), id), id.seed());
    assert_eq!(
        seed(json!({ "prompt": "a", "seed": -3 }), id),
        (-3_i64).cast_unsigned()
    );
}

fn head(logprobs: bool, include_usage: bool) -> Head {
    Head {
        id: "x-1".to_owned(),
        created: 7,
        model: "demo".to_owned(),
        system_fingerprint: "f1-cpu-q8".to_owned(),
        tokenizer: tokenizer(),
        logprobs,
        include_usage,
        include_metrics: false,
    }
}

fn token(index: u32, id: u32, logprob: f32, top: &[(u32, f32)]) -> TokenOutput {
    let top = top
        .iter()
        .map(|&(id, logprob)| TokenLogprob { id, logprob });
    TokenOutput {
        index,
        id,
        logprob: Some(logprob),
        top_logprobs: top.collect(),
    }
}

#[test]
fn all_that_waits_is_counted_and_what_prompts_share_only_once() {
    let (model, tokenizer) = (served(), tokenizer());
    let size = |extra: &Value| {
        let mut body = json!({ "prompt": "hi" });
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let parsed = parse_completion(&body, &model).unwrap();
        let request = prepare(parsed.request, AnswerId::unique(7), &tokenizer, &model);
        request.unwrap().size()
    };
    let plain = size(&json!({}));
    let bias: Value = Value::Object((0..1000).map(|id| (id.to_string(), json!(1))).collect());
    for (extra, bytes) in [
        (json!({ "logit_bias": bias }), 8000),
        (json!({ "stop_token_ids": vec![5; 64] }), 256),
        (json!({ "bad_words": vec!["sea"; 32] }), 32 * 28),
        (json!({ "guided_regex": "a".repeat(5000) }), 5000),
        (json!({ "prompt": vec![5; 200] }), 196 * 4),
    ] {
        let more = size(&extra) - plain;
        assert!((bytes..3 * bytes).contains(&more), "{more} for {extra}");
    }
    let many = size(&json!({ "prompt": vec!["hi"; 128], "logit_bias": bias }));
    assert!(many - plain < 8000 + 128 * 128, "{many}");
}

#[test]
fn words_that_may_not_appear_are_banned_with_and_without_a_space_before_them() {
    let (model, tokenizer) = (served(), tokenizer());
    let prepared = |words: Value| {
        let body = json!({ "prompt": "a", "bad_words": words });
        let parsed = parse_completion(&body, &model)?;
        prepare(parsed.request, AnswerId::unique(7), &tokenizer, &model)
    };
    let banned = prepared(json!(["sea", " the"])).unwrap().sampling.bad_words;
    let plain = |word: &str| tokenizer.encode(word).unwrap();
    assert_eq!(banned[0], plain("sea"));
    assert!(banned.contains(&plain("the")), "{banned:?}");
    for (words, param) in [
        (json!([5]), "bad_words[0]"),
        (json!(vec!["a"; 33]), "bad_words"),
        (json!(["x".repeat(500)]), "bad_words"),
        (json!([" "]), "bad_words[0]"),
        (json!("a"), "bad_words"),
    ] {
        assert_eq!(prepared(words).unwrap_err().param.as_deref(), Some(param));
    }
}

type Parser = fn(&Value, &ServedModel) -> Result<Parsed, ApiError>;

/// A chat and a completion of 200 ids, both with these options, made ready for a context of so many tokens.
fn prepared(context: u32, options: &Value) -> [Result<PreparedRequest, ApiError>; 2] {
    let model = ServedModel {
        context_length: context,
        ..served()
    };
    let tokenizer = tokenizer();
    let messages = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let ids = json!({ "prompt": vec![300; 200] });
    let parsers: [Parser; 2] = [parse_chat, parse_completion];
    let mut results = Vec::new();
    for (mut body, parse) in [messages, ids].into_iter().zip(parsers) {
        for (key, value) in options.as_object().unwrap() {
            body[key] = value.clone();
        }
        let parsed = parse(&body, &model);
        results.push(
            parsed.and_then(|parsed| {
                prepare(parsed.request, AnswerId::unique(7), &tokenizer, &model)
            }),
        );
    }
    results.try_into().unwrap()
}

#[test]
fn all_answers_together_report_no_more_than_a_limit_which_names_its_parameter() {
    let chat = |top: u32, n: u32, max: Option<u32>| json!({ "logprobs": true, "top_logprobs": top, "n": n, "max_tokens": max });
    let [passes, _] = prepared(2048, &chat(20, 128, Some(48)));
    assert_eq!(passes.unwrap().prompts[0].max_tokens, 48);
    let [refused, _] = prepared(2048, &chat(20, 128, Some(49)));
    let error = refused.unwrap_err();
    assert_eq!(error.param.as_deref(), Some("top_logprobs"));
    assert!(error.message.contains("at most 131072") && error.message.contains("got 131712"));
    // Nobody has said how long the answers may be.
    let [short, _] = prepared(2048, &chat(20, 128, None));
    assert_eq!(short.unwrap().prompts[0].max_tokens, 48);
    for top in [0, 1, 3] {
        let [whole, _] = prepared(32_768, &chat(top, 1, None));
        let prompt = whole.unwrap().prompts.remove(0);
        assert_eq!(prompt.max_tokens as usize, 32_768 - prompt.ids.len());
    }
    for (options, param) in [
        (json!({ "n": 128, "prompt_logprobs": 5 }), "prompt_logprobs"),
        (json!({ "n": 128, "echo": true, "logprobs": 5 }), "logprobs"),
        (
            json!({ "n": 128, "logprobs": 5, "max_tokens": 200 }),
            "logprobs",
        ),
        (json!({ "best_of": 20, "max_tokens": 7000 }), "best_of"),
    ] {
        let [_, refused] = prepared(8192, &options);
        assert_eq!(
            refused.unwrap_err().param.as_deref(),
            Some(param),
            "{options}"
        );
    }
    let [_, passes] = prepared(8192, &json!({ "n": 5, "echo": true, "logprobs": 5 }));
    passes.unwrap();
}
