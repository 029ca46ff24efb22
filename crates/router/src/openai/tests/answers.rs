//! What requests are answered, as chunks and whole.

use super::*;

#[test]
fn chat_chunks_have_the_documented_form() {
    let mut render = ChatRender::new(head(false, true));
    assert_eq!(
        render.open(0, None)[0].data,
        r#"{"id":"x-1","object":"chat.completion.chunk","created":7,"model":"demo","system_fingerprint":"f1-cpu-q8","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"usage":null}"#
    );
    let delta = Delta {
        choice: 2,
        text: "hi".to_owned(),
        finish: Some(FinishReason::Length),
        ..Delta::default()
    };
    let chunks = values(&render.chunks(&delta));
    assert_eq!(chunks.len(), 2);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({ "content": "hi" }));
    assert_eq!(chunks[0]["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(chunks[1]["choices"][0]["delta"], json!({}));
    assert_eq!(chunks[1]["choices"][0]["finish_reason"], "length");
    assert_eq!(chunks[1]["choices"][0]["index"], 2);
    let mut spent = Spent {
        usage: Usage {
            prompt_tokens: 3,
            cached_tokens: 1,
            completion_tokens: 3,
        },
        queued: Duration::from_millis(250),
        first_token: Some(Duration::from_secs(1)),
        next_token: Some(Duration::from_millis(500)),
        total: Duration::from_secs(2),
    };
    let usage = &values(&render.end(spent))[0];
    assert!(usage["usage"]["metrics"].is_null());
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["total_tokens"], 6);
    assert_eq!(usage["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    let details = usage["usage"]["completion_tokens_details"].as_object();
    let details = details.unwrap();
    assert!(details.len() == 4 && details.values().all(|tokens| tokens == 0));
    let mut with_metrics = head(false, true);
    with_metrics.include_metrics = true;
    let mut render = ChatRender::new(with_metrics);
    let metrics = &values(&render.end(spent))[0]["usage"]["metrics"];
    assert_eq!(
        (&metrics["queue_time"], &metrics["total_time"]),
        (&json!(0.25), &json!(2.0))
    );
    assert_eq!(metrics["tokens_per_second"], 2.0);
    assert_eq!(metrics["mean_inter_token_time"], 0.5);
    (spent.first_token, spent.next_token) = (None, None);
    let metrics = &values(&render.end(spent))[0]["usage"]["metrics"];
    for name in [
        "time_to_first_token",
        "mean_inter_token_time",
        "tokens_per_second",
    ] {
        assert!(metrics[name].is_null(), "{metrics}");
    }
    let mut plain = ChatRender::new(head(false, false));
    assert!(!plain.open(0, None)[0].data.contains("usage"));
    assert!(plain.end(Spent::default()).is_empty());
}

#[test]
fn log_probabilities_have_both_documented_forms_and_leave_the_end_token_out() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("Hello world").unwrap();
    let (a, b) = (ids[0], ids[1]);
    let text = |id: u32| String::from_utf8(tokenizer.token_bytes(id).unwrap().to_vec()).unwrap();
    let tokens = vec![
        token(0, a, -0.5, &[(a, -0.5), (b, -1.5)]),
        token(1, b, f32::NEG_INFINITY, &[(a, -0.25)]),
        token(2, tokenizer.eos_ids()[0], -0.1, &[]),
    ];
    let delta = Delta {
        tokens,
        has_end_token: true,
        ..Delta::default()
    };
    let chunk = &values(&ChatRender::new(head(true, false)).chunks(&delta))[0];
    let content = &chunk["choices"][0]["logprobs"]["content"];
    assert_eq!(content.as_array().unwrap().len(), 2);
    assert_eq!(content[0]["token"], text(a));
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(content[0]["bytes"], json!(text(a).as_bytes()));
    assert_eq!(content[0]["top_logprobs"][1]["token"], text(b));
    assert_eq!(content[1]["logprob"], -9999.0);
    let mut legacy = CompletionRender::new(head(true, false), 1);
    let chunk = &values(&legacy.chunks(&delta))[0]["choices"][0]["logprobs"];
    assert_eq!(chunk["tokens"], json!([text(a), text(b)]));
    assert_eq!(chunk["token_logprobs"], json!([-0.5, -9999.0]));
    assert_eq!(chunk["text_offset"], json!([0, text(a).chars().count()]));
    assert_eq!(chunk["top_logprobs"][0][text(b)], -1.5);
    // The sampled token is always among them.
    assert_eq!(chunk["top_logprobs"][1][text(b)], -9999.0);
    let more = Delta {
        tokens: vec![token(2, a, -1.0, &[])],
        ..Delta::default()
    };
    let offset = text(a).chars().count() + text(b).chars().count();
    let next = &values(&legacy.chunks(&more))[0]["choices"][0]["logprobs"]["text_offset"];
    assert_eq!(next, &json!([offset]));
}

#[test]
fn stop_strings_hold_across_tokens_and_end_tokens_have_no_text() {
    use crate::text::{AnswerText, TextEnd};
    let tokenizer = tokenizer();
    let whole = "Hello world, this is the end of it";
    let ids = tokenizer.encode(whole).unwrap();
    let parsed = completion_with("stop", json!(["rld, th", "never"])).unwrap();
    let params = parsed.request.sampling.clone();
    let mut text = AnswerText::new(&tokenizer, &params, parsed.request.stop, true);
    let mut out = String::new();
    let mut end = None;
    for &id in &ids {
        let added = text.push(id);
        out.push_str(&added.text);
        end = added.end;
        if end.is_some() {
            break;
        }
        assert!(
            "Hello wo".starts_with(&out),
            "text of the stop string went out: {out}"
        );
    }
    assert_eq!((out.as_str(), end), ("Hello wo", Some(TextEnd::StopString)));
    let free = completion_with("stop", json!("rld, not")).unwrap();
    let mut text = AnswerText::new(&tokenizer, &params, free.request.stop, true);
    let mut out: String = ids.iter().map(|&id| text.push(id).text).collect();
    let ended = text.push(tokenizer.eos_ids()[0]);
    assert_eq!(
        (ended.text.as_str(), ended.end),
        ("", Some(TextEnd::EndToken))
    );
    out.push_str(&text.finish().text);
    let mut decoder = DecodeStream::new(&tokenizer, DecodeStart::Text, true);
    let plain: String = ids.iter().filter_map(|&id| decoder.push(id)).collect();
    assert_eq!(out, plain);
    assert_eq!(out, whole);
}

#[test]
fn a_chat_that_has_to_match_is_given_out_as_it_matched() {
    use crate::text::AnswerText;
    let tokenizer = tokenizer();
    let says = |key: &str, value: Value, said: &str| {
        let parsed = chat_with(key, value).unwrap();
        let (params, stop) = (parsed.request.sampling, parsed.request.stop);
        let mut text = AnswerText::new(&tokenizer, &params, stop, true);
        // With the space that SentencePiece puts before a text.
        let ids = tokenizer.encode(said).unwrap();
        let begin: String = ids.iter().map(|&id| text.push(id).text).collect();
        begin + &text.finish().text
    };
    assert_eq!(says("seed", json!(1), "yes"), "yes");
    assert_eq!(says("guided_regex", json!(" [a-z]{3}"), "yes"), " yes");
    assert_eq!(says("guided_choice", json!([" yes", " no"]), "no"), " no");
    assert_eq!(says("guided_grammar", json!("start: \" a\""), "a"), " a");
    // Valid with and without.
    assert_eq!(says("guided_json", json!({ "const": 1 }), "1"), "1");
}

#[test]
fn more_answers_are_made_than_given() {
    let parsed = completion_with("best_of", json!(3)).unwrap();
    let request = &parsed.request;
    assert_eq!(
        (request.n, request.kept, parsed.form.logprobs),
        (3, 1, false)
    );
    assert_eq!(request.sampling.logprobs, Some(0));
    let streamed = json!({ "prompt": "x", "best_of": 2, "stream": true });
    let error = parse_completion(&streamed, &served()).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("best_of"));
}

#[test]
fn log_probabilities_of_prompts_have_both_known_forms() {
    use super::logprobs::{LegacyLogprobs, PromptLogprobs};
    let tokenizer = tokenizer();
    let ids = tokenizer.encode_with_bos("Hello world").unwrap();
    let (a, b) = (ids[1], ids[2]);
    let text = |id: u32| String::from_utf8(tokenizer.token_bytes(id).unwrap().to_vec()).unwrap();
    let prompt = [
        token(1, a, -0.5, &[(a, -0.5), (b, -1.5)]),
        token(2, b, -4.0, &[(a, -0.25)]),
    ];
    let listed = few_values(PromptLogprobs {
        prompt: &prompt,
        tokenizer: &tokenizer,
    });
    let answer = Choice {
        prompt_begin: Some(ids[0]),
        prompt_tokens: prompt.to_vec().into(),
        ..Choice::default()
    };
    let chat = ChatRender::new(head(false, false));
    let whole = whole_of(&chat, &[answer.clone(), answer]);
    assert_eq!(whole["prompt_logprobs"], listed);
    let whole = whole_of(&chat, &[Choice::default()]);
    assert!(whole.get("prompt_logprobs").is_none(), "{whole}");
    assert_eq!(listed[0], Value::Null);
    let best = json!({ "logprob": -0.5, "rank": 1, "decoded_token": text(a) });
    assert_eq!(listed[1][a.to_string()], best);
    assert_eq!(listed[1][b.to_string()]["rank"], 2);
    let own = json!({ "logprob": -4.0, "rank": null, "decoded_token": text(b) });
    assert_eq!(listed[2][b.to_string()], own);
    let mut legacy = LegacyLogprobs::starting_at(0, &tokenizer);
    legacy.add_prompt(ids[0], &prompt);
    let lists = few_values(legacy);
    assert_eq!(lists["tokens"], json!([text(ids[0]), text(a), text(b)]));
    assert_eq!(lists["token_logprobs"], json!([null, -0.5, -4.0]));
    assert_eq!(
        (&lists["text_offset"][0], &lists["text_offset"][1]),
        (&json!(0), &json!(0))
    );
    let mut legacy = LegacyLogprobs::starting_at(0, &tokenizer);
    legacy.add_prompt(a, &[]);
    let lists = few_values(legacy);
    assert_eq!(lists["token_logprobs"], json!([null]));
    assert_eq!(lists["top_logprobs"], json!([null]));
}

#[test]
fn a_whole_answer_reports_what_its_chunks_report() {
    let tokenizer = tokenizer();
    let ids = tokenizer.encode("Hello world").unwrap();
    // 0x0a as a byte, and half a character.
    let odd = [13, 0xe2 + 3];
    let mut tokens = Vec::new();
    for (index, id) in (0..).zip(ids.into_iter().chain(odd)) {
        tokens.push(token(
            index,
            id,
            -0.1 - index as f32,
            &[(id, -0.1), (13, f32::NAN)],
        ));
    }
    let delta = Delta {
        tokens: tokens.clone(),
        ..Delta::default()
    };
    let choice = Choice {
        tokens: tokens.clone(),
        prompt_begin: Some(1),
        prompt_tokens: tokens.into(),
        ..Choice::default()
    };
    let mut chat = ChatRender::new(head(true, false));
    let mut completion = CompletionRender::new(head(true, false), 1);
    let renders: [&mut dyn Render; 2] = [&mut chat, &mut completion];
    for render in renders {
        let chunk = values(&render.chunks(&delta))[0]["choices"][0]["logprobs"].clone();
        let whole = whole_of(render, &[choice.clone(), choice.clone()]);
        assert_eq!(whole["choices"][1]["logprobs"], chunk);
        assert!(chunk.to_string().contains("bytes:"), "{chunk}");
    }
    // vLLM's form: a completion shows the prompt in every answer.
    let whole = whole_of(&completion, &[choice.clone(), choice]);
    let prompts = [0, 1].map(|i| whole["choices"][i]["prompt_logprobs"].clone());
    assert_eq!(prompts[0], prompts[1]);
    assert_eq!(prompts[0].as_array().unwrap().len(), 1 + delta.tokens.len());
}
