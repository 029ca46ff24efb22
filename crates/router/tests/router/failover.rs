//! Whatever a request asks for, it is answered the same when its worker breaks after any token.

use super::*;

/// A request that uses one feature, with whatever decides its answer.
pub(super) struct Case {
    pub(super) name: &'static str,
    pub(super) path: &'static str,
    pub(super) body: Value,
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETION: &str = "/v1/completions";

fn case(name: &'static str, path: &'static str, extra: &Value) -> Case {
    let mut body = json!({ "max_tokens": 12 });
    if path == CHAT {
        body["messages"] = json!([{ "role": "user", "content": "hi" }]);
    } else {
        body["prompt"] = json!("hi");
    }
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    Case { name, path, body }
}

/// One request for every feature that a move between workers, or a resumed stream, could break.
pub(super) fn cases() -> Vec<Case> {
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
            "echo",
            COMPLETION,
            &json!({ "echo": true, "prompt": ["one", "two"], "seed": 11 }),
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

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// What a worker says after what it was sent: a function of every parameter, of the prompt, of where the
/// output begins and of the output so far. So a single wrong number in a replay changes the answer.
pub(super) fn continuation(
    request: &v1::GenerateSequenceRequest,
    words: &[u32],
    eos: u32,
) -> (Vec<u32>, v1::FinishReason) {
    let mut sampling = request.sampling.clone().unwrap();
    if sampling.temperature == 0.0 {
        // Nothing is drawn.
        sampling.seed = 0;
    }
    let begin = request.prompt_ids.len() - request.num_resumed as usize;
    let (mut tokens, mut said) = (request.prompt_ids.clone(), Vec::new());
    loop {
        let known = format!("{sampling:?} {begin} {tokens:?}");
        let chance = hash(known.as_bytes()) >> 7;
        let num_output = tokens.len() - begin;
        let may_end = num_output >= sampling.min_tokens as usize;
        let id = if may_end && chance.is_multiple_of(10) {
            eos
        } else {
            words[(chance / 10) as usize % words.len()]
        };
        tokens.push(id);
        said.push(id);
        let is_end = id == eos && !sampling.ignore_eos;
        if is_end || sampling.stop_ids.contains(&id) {
            return (said, v1::FinishReason::Stop);
        }
        if num_output + 1 >= sampling.max_tokens as usize {
            return (said, v1::FinishReason::Length);
        }
    }
}

/// Words, parts of words, and characters of several tokens.
pub(super) fn words() -> Vec<u32> {
    tokenizer()
        .encode("a story of the sea: 漢字 żółw 🦀 is about to")
        .unwrap()
}

/// Attempts of one sequence break after so many further tokens, one after the other; the next goes on to
/// its end.
fn breaking(breaks: Vec<usize>) -> Script {
    let (words, eos) = (words(), tokenizer().eos_ids()[0]);
    scripted(move |request| {
        let (said, reason) = continuation(request, &words, eos);
        let (_, attempt) = request.request_id.rsplit_once('.').unwrap();
        let attempt: usize = attempt.parse().unwrap();
        let mut steps = vec![Step::Started(1)];
        match breaks.get(attempt - 1) {
            Some(&after) => {
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

/// The answer without what differs from request to request.
fn plain(mut answer: Value) -> Value {
    for key in ["id", "created"] {
        assert!(!answer[key].is_null());
        answer[key] = Value::Null;
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

async fn whole_and_streamed(scene: &Scene, case: &Case) -> (Value, Vec<(i64, String)>) {
    let response = scene.post(case.path, &case.body).await;
    let status = response.status();
    let whole: Value = response.json().await.unwrap();
    assert_eq!(status, 200, "{}: {whole}", case.name);
    let mut body = case.body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    let streamed = events(scene.post(case.path, &body).await).await;
    (plain(whole), by_choice(&streamed))
}

#[tokio::test]
async fn every_feature_survives_the_loss_of_a_worker_after_any_token() {
    let undisturbed = Scene::start(config(), vec![breaking(Vec::new())]).await;
    let mut expected = Vec::new();
    for case in cases() {
        expected.push(whole_and_streamed(&undisturbed, &case).await);
    }
    let is_cut = |whole: &Value| {
        let choices = whole["choices"].as_array().unwrap().iter();
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
    // 12 is behind the last token and before the word that it was the last.
    for breaks in [
        vec![0],
        vec![1],
        vec![2],
        vec![3],
        vec![5],
        vec![11],
        vec![12],
        vec![1; 12],
    ] {
        let shown = format!("{breaks:?}");
        let scene = Scene::start(config(), vec![breaking(breaks.clone()), breaking(breaks)]).await;
        for (case, expected) in cases().iter().zip(&expected) {
            let got = whole_and_streamed(&scene, case).await;
            assert_eq!(got.0, expected.0, "{} broken after {shown}", case.name);
            assert_eq!(got.1, expected.1, "{} broken after {shown}", case.name);
        }
        let metrics = scene.get("/metrics").await.text().await.unwrap();
        let losses = "tramontane_router_worker_losses_total{reason=\"broken\"}";
        assert!(metrics.contains(losses), "nothing was broken");
        scene.end().await;
    }
}
