//! Whatever a request asks for, it is answered the same when its worker breaks after any token.

use super::tools::{TOOL_CALLS, TWO_CALLS, function, ids, talking};
use super::*;

/// A request that uses one feature, with whatever decides its answer.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) path: &'static str,
    pub(super) body: Value,
    pub(super) form: Form,
}

/// What an answer looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Choices of text, whole and in chunks.
    Texts,
    /// Choices of text that are only given whole.
    WholeTexts,
    /// One choice or more with calls of tools.
    Calls,
    /// A response of a message.
    Response,
    /// A response of items, calls among them.
    ResponseCalls,
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";
const RESPONSE: &str = "/v1/responses";
/// More than what is said with tools has.
const CALLS_TOKENS: u32 = 120;

fn case(name: &'static str, path: &'static str, extra: &Value) -> Case {
    let mut body = match path {
        CHAT => {
            json!({ "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 12 })
        }
        RESPONSE => json!({ "input": "hi", "max_output_tokens": 12 }),
        _ => json!({ "prompt": "hi", "max_tokens": 12 }),
    };
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    let form = match path {
        RESPONSE => Form::Response,
        _ => Form::Texts,
    };
    Case {
        name,
        path,
        body,
        form,
    }
}

impl Case {
    fn of(self, form: Form) -> Self {
        Self { form, ..self }
    }
}

/// One request for every feature that a move between workers, or a resumed stream, could break.
pub(super) fn cases() -> Vec<Case> {
    let mut cases = sampling_cases();
    cases.extend(bounded_cases());
    cases.extend(form_cases());
    cases.extend(tool_cases());
    cases
}

/// What is drawn, and where it ends.
fn sampling_cases() -> Vec<Case> {
    let eos = tokenizer().eos_ids()[0];
    vec![
        case("greedy", CHAT, &json!({ "temperature": 0 })),
        case("seed", CHAT, &json!({ "seed": 11 })),
        case("n", CHAT, &json!({ "n": 3, "seed": -4 })),
        case(
            "logprobs",
            CHAT,
            &json!({ "logprobs": true, "top_logprobs": 3, "seed": 1 }),
        ),
        case(
            "legacy logprobs",
            COMPLETION,
            &json!({ "logprobs": 2, "n": 2, "seed": 2 }),
        ),
        case(
            "stop string",
            CHAT,
            &json!({ "seed": 5, "stop": ["ory", "o the s", "a l"], "n": 4 }),
        ),
        case(
            "stop string and logprobs",
            COMPLETION,
            &json!({ "seed": 6, "stop": ["o", "is"], "n": 4, "logprobs": 1 }),
        ),
        case(
            "penalties",
            CHAT,
            &json!({
                "presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.2, "seed": 8,
            }),
        ),
        case(
            "min_tokens",
            CHAT,
            &json!({ "min_tokens": 9, "seed": 9, "n": 2 }),
        ),
        case(
            "logit_bias",
            CHAT,
            &json!({ "logit_bias": { "300": 5, "301": -5 }, "seed": 10 }),
        ),
        case(
            "ignore_eos",
            CHAT,
            &json!({ "ignore_eos": true, "seed": 12, "n": 2 }),
        ),
        case(
            "stop ids",
            CHAT,
            &json!({ "stop_token_ids": [eos], "ignore_eos": true, "seed": 13 }),
        ),
        case(
            "filters",
            CHAT,
            &json!({ "top_k": 7, "top_p": 0.5, "min_p": 0.1, "seed": 14 }),
        ),
        case(
            "prompt ids",
            COMPLETION,
            &json!({ "prompt": [[5, 6], [7]], "n": 2, "seed": 15 }),
        ),
    ]
}

/// What may not be said, or alone may.
fn bounded_cases() -> Vec<Case> {
    vec![
        case(
            "bad words",
            CHAT,
            &json!({ "bad_words": ["story", "the sea"], "seed": 16, "n": 2 }),
        ),
        case(
            "expression",
            COMPLETION,
            &json!({ "structured_outputs": { "regex": "[a-z ]*" }, "seed": 17, "n": 2 }),
        ),
        case(
            "schema",
            CHAT,
            &json!({
                "response_format": { "type": "json_schema", "json_schema": {
                    "name": "a", "schema": { "type": "object", "properties": { "a": { "type": "string" } } },
                } },
                "seed": 18,
            }),
        ),
    ]
}

/// What is told beside what is drawn.
fn form_cases() -> Vec<Case> {
    let prompts = json!(["one story", "two stories"]);
    vec![
        case(
            "echo",
            COMPLETION,
            &json!({ "echo": true, "prompt": prompts, "seed": 11 }),
        ),
        case(
            "echo and logprobs",
            COMPLETION,
            &json!({ "echo": true, "prompt": prompts, "logprobs": 2, "seed": 19 }),
        )
        .of(Form::WholeTexts),
        case(
            "prompt logprobs",
            COMPLETION,
            &json!({ "prompt_logprobs": 1, "prompt": prompts, "n": 2, "seed": 20 }),
        )
        .of(Form::WholeTexts),
        case(
            "prompt logprobs of a chat",
            CHAT,
            &json!({ "prompt_logprobs": 2, "seed": 21 }),
        )
        .of(Form::WholeTexts),
        case(
            "best of",
            COMPLETION,
            &json!({ "best_of": 4, "n": 2, "seed": 22 }),
        )
        .of(Form::WholeTexts),
        case(
            "suffix",
            COMPLETION,
            &json!({ "suffix": " about the sea", "seed": 23 }),
        ),
        case(
            "response",
            RESPONSE,
            &json!({
                "instructions": "Be kind.", "temperature": 0.7, "top_logprobs": 1, "seed": 24,
                "include": ["message.output_text.logprobs"],
            }),
        ),
    ]
}

/// What is called.
fn tool_cases() -> Vec<Case> {
    let functions = ["get_weather", "clock"].map(function);
    let tools = functions
        .clone()
        .map(|f| json!({ "type": "function", "function": f }));
    let named = functions.map(|mut f| {
        f["type"] = "function".into();
        f
    });
    let (chat, max) = (json!(tools), CALLS_TOKENS);
    vec![
        case(
            "tools",
            CHAT,
            &json!({ "tools": chat, "max_tokens": max, "n": 2, "seed": 25 }),
        )
        .of(Form::Calls),
        case(
            "forced tools",
            CHAT,
            &json!({ "tools": chat, "tool_choice": "required", "max_tokens": max, "seed": 26 }),
        )
        .of(Form::Calls),
        case(
            "tools and logprobs",
            CHAT,
            &json!({ "tools": chat, "logprobs": true, "max_tokens": max, "seed": 27 }),
        )
        .of(Form::Calls),
        case(
            "response with tools",
            RESPONSE,
            &json!({ "tools": named, "max_output_tokens": max, "seed": 28 }),
        )
        .of(Form::ResponseCalls),
        case(
            "response with forced tools",
            RESPONSE,
            &json!({ "tools": named, "tool_choice": "required", "max_output_tokens": max, "seed": 29 }),
        )
        .of(Form::ResponseCalls),
    ]
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What workers say: words, parts of words and characters of several tokens; and calls, where there are tools.
#[derive(Clone)]
pub(super) struct Speech {
    words: Vec<u32>,
    eos: u32,
    /// What tools begin with in a prompt.
    tools: u32,
    /// With the text before them, and without.
    calls: [[Vec<u32>; 2]; 2],
}

impl Speech {
    pub(super) fn new(tokenizer: &Tokenizer) -> Self {
        let other = [
            "One moment, żółw.",
            TOOL_CALLS,
            r#"[{"name": "clock", "arguments": {"zone": "漢字 🦀", "city": "x"}}]"#,
        ];
        let words = tokenizer.encode("a story of the sea: 漢字 żółw 🦀 is about to");
        Self {
            words: words.unwrap(),
            eos: tokenizer.eos_ids()[0],
            tools: tokenizer.control_id("[AVAILABLE_TOOLS]").unwrap(),
            calls: [TWO_CALLS, other]
                .map(|said| [&said[..], &said[1..]].map(|s| ids(tokenizer, s))),
        }
    }

    /// What a worker says after what it was sent: a function of every parameter, of the prompt, of where the
    /// output begins and of the output so far. So a single wrong number in a replay changes the answer.
    pub(super) fn after(
        &self,
        request: &v1::GenerateSequenceRequest,
    ) -> (Vec<u32>, v1::FinishReason) {
        let mut sampling = request.sampling.clone().unwrap();
        if sampling.temperature == 0.0 {
            // Nothing is drawn.
            sampling.seed = 0;
        }
        let begin = request.prompt_ids.len() - request.num_resumed as usize;
        let (mut tokens, mut said) = (request.prompt_ids.clone(), Vec::new());
        let calls = self.calls(&sampling, &tokens[..begin]);
        loop {
            let num_output = tokens.len() - begin;
            if num_output >= sampling.max_tokens as usize {
                return (said, v1::FinishReason::Length);
            }
            let known = format!("{sampling:?} {begin} {tokens:?}");
            let chance = hash(known.as_bytes()) >> 7;
            let may_end = num_output >= sampling.min_tokens as usize;
            let is_calling = calls.get(..num_output) == Some(&tokens[begin..]);
            let id = match calls.get(num_output) {
                Some(&id) if is_calling => id,
                _ if may_end && chance.is_multiple_of(10) => self.eos,
                _ => self.words[(chance / 10) as usize % self.words.len()],
            };
            tokens.push(id);
            said.push(id);
            let is_end = id == self.eos && !sampling.ignore_eos;
            if is_end || sampling.stop_ids.contains(&id) {
                return (said, v1::FinishReason::Stop);
            }
        }
    }

    /// The calls that follow from a prompt with tools; from others none.
    fn calls(&self, sampling: &v1::Sampling, prompt: &[u32]) -> &[u32] {
        if !prompt.contains(&self.tools) {
            return &[];
        }
        let chance = hash(format!("{sampling:?} {prompt:?}").as_bytes()) >> 7;
        let is_forced = sampling.constraint.is_some();
        &self.calls[chance as usize % 2][usize::from(is_forced)]
    }
}

/// Attempts of one sequence break after so many further tokens, one after the other; the next goes on to
/// its end. One that breaks before its first token breaks in the midst of what it tells of the prompt, if it is to.
fn breaking(speech: &Speech, breaks: Vec<usize>) -> Script {
    let speech = speech.clone();
    scripted(move |request| {
        let (said, reason) = speech.after(request);
        let (_, attempt) = request.request_id.rsplit_once('.').unwrap();
        let attempt: usize = attempt.parse().unwrap();
        let after = breaks.get(attempt - 1).copied();
        let mut steps = vec![Step::Started(1)];
        let begin = request.prompt_ids.len() - request.num_resumed as usize;
        if request.sampling.as_ref().unwrap().prompt_logprobs.is_some() && begin > 1 {
            let (first, rest) = (request.prompt_ids[1], request.prompt_ids[2..begin].to_vec());
            steps.push(Step::PromptTokens(1, vec![first]));
            if after == Some(0) {
                steps.push(Step::Break);
            }
            steps.push(Step::PromptTokens(2, rest));
        }
        match after {
            Some(after) => {
                steps.extend(said.into_iter().take(after).map(Step::Token));
                steps.push(Step::Break);
            }
            None => {
                steps.extend(said.into_iter().map(Step::Token));
                steps.push(Step::Finish(reason));
            }
        }
        Ok(steps)
    })
}

/// The answer without what differs from request to request: times, and names made from the answer's own.
fn plain(mut answer: Value) -> Value {
    match &mut answer {
        Value::Object(map) => {
            for (key, value) in map.iter_mut() {
                let differs = ["id", "item_id", "call_id", "created", "created_at"];
                *value = match differs.contains(&key.as_str()) && !value.is_null() {
                    true => json!("differs"),
                    false => plain(value.take()),
                };
            }
        }
        Value::Array(list) => {
            for value in list {
                *value = plain(value.take());
            }
        }
        _ => {}
    }
    answer
}

/// The chunks of each choice in their order, and those of no choice at the end: choices mix in any way.
fn by_choice(events: &[String]) -> Vec<(i64, String)> {
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last, "[DONE]");
    let mut chunks: Vec<(i64, String)> = parse(chunks)
        .into_iter()
        .map(|chunk| {
            let index = chunk["choices"][0]["index"].as_i64();
            (index.unwrap_or(i64::MAX), plain(chunk).to_string())
        })
        .collect();
    chunks.sort_by_key(|(index, _)| *index);
    chunks
}

/// The answer as a whole and in events, where it is given so.
async fn answered(scene: &Scene, case: &Case) -> (Value, Vec<(i64, String)>) {
    let response = scene.post(case.path, &case.body).await;
    let status = response.status();
    let whole: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{}: {whole}", case.name);
    let whole = plain(whole);
    assert_eq!(whole["id"], "differs", "{}: {whole}", case.name);
    let mut body = case.body.clone();
    body["stream"] = json!(true);
    let events = match case.form {
        Form::WholeTexts => Vec::new(),
        Form::Response | Form::ResponseCalls => {
            let events = parse(&events(scene.post(case.path, &body).await).await);
            let numbered = events.into_iter().zip(0..);
            numbered.map(|(e, i)| (i, plain(e).to_string())).collect()
        }
        Form::Texts | Form::Calls => {
            body["stream_options"] = json!({ "include_usage": true });
            by_choice(&events(scene.post(case.path, &body).await).await)
        }
    };
    (whole, events)
}

/// Whether an answer is of the form that its case is about.
fn check_form(case: &Case, whole: &Value) {
    let finish = &whole["choices"][0]["finish_reason"];
    let output = whole["output"].as_array().into_iter().flatten();
    let types: Vec<&Value> = output.map(|item| &item["type"]).collect();
    let is_so = match case.form {
        Form::Texts | Form::WholeTexts => finish == "stop" || finish == "length",
        Form::Calls => finish == "tool_calls",
        Form::Response => types == ["message"],
        Form::ResponseCalls => types.contains(&&json!("function_call")),
    };
    assert!(is_so, "{}: {whole}", case.name);
    let reported = whole.to_string();
    for name in ["prompt_logprobs", "logprobs"] {
        if case.body[name].as_u64().is_some_and(|num| num > 0) {
            let given = format!("\"{name}\":null");
            assert!(!reported.contains(&given), "{}: {whole}", case.name);
        }
    }
}

#[tokio::test]
async fn every_feature_survives_the_loss_of_a_worker_after_any_token() {
    let tokenizer = talking(false);
    let speech = Speech::new(&tokenizer);
    let start =
        async |workers| Scene::start_of(config(), workers, None, Arc::clone(&tokenizer)).await;
    let undisturbed = start(vec![breaking(&speech, Vec::new())]).await;
    let mut expected = Vec::new();
    for case in cases() {
        let answer = answered(&undisturbed, &case).await;
        check_form(&case, &answer.0);
        expected.push(answer);
    }
    let is_cut = |whole: &Value| {
        let choices = whole["choices"].as_array().into_iter().flatten();
        choices.filter(|c| c["finish_reason"] == "stop").count()
    };
    assert!(
        expected
            .iter()
            .map(|(whole, _)| is_cut(whole))
            .sum::<usize>()
            >= 5
    );
    undisturbed.end().await;
    // 12 is behind the last token and before the word that it was the last; most calls have begun after 20 and are
    // not whole after 40.
    for breaks in [
        vec![0],
        vec![1],
        vec![2],
        vec![3],
        vec![5],
        vec![11],
        vec![12],
        vec![20],
        vec![40],
        vec![1; 12],
        vec![7; 3],
    ] {
        let shown = format!("{breaks:?}");
        let workers = vec![breaking(&speech, breaks.clone()), breaking(&speech, breaks)];
        let scene = start(workers).await;
        for (case, expected) in cases().iter().zip(&expected) {
            let got = answered(&scene, case).await;
            assert_eq!(got.0, expected.0, "{} broken after {shown}", case.name);
            assert_eq!(got.1, expected.1, "{} broken after {shown}", case.name);
        }
        let metrics = scene.get("/metrics").await.text().await.unwrap();
        let losses = "tramontane_router_worker_losses_total{reason=\"broken\"}";
        assert!(metrics.contains(losses), "nothing was broken");
        scene.end().await;
    }
}
