//! What clients see when all is well.

use super::*;

#[tokio::test]
async fn a_chat_is_answered_whole_and_as_a_stream() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let response = scene.chat(json!({})).await;
    assert_eq!(response.status(), 200);
    assert!(
        response.headers()["x-request-id"]
            .to_str()
            .unwrap()
            .starts_with("req_")
    );
    let whole: Value = response.json().await.unwrap();
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    assert_eq!(whole["choices"][0]["message"]["role"], "assistant");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    let num_tokens = story(&scene.tokenizer).len();
    assert_eq!(whole["usage"]["completion_tokens"], num_tokens);
    assert_eq!(whole["usage"]["prompt_tokens_details"]["cached_tokens"], 1);
    let sent = scene.workers[0].seen.lock()[0].clone();
    assert_eq!(whole["usage"]["prompt_tokens"], sent.prompt_ids.len());
    assert_eq!(sent.prompt_ids[0], scene.tokenizer.bos_id().unwrap());

    let stream = json!({ "stream": true, "stream_options": { "include_usage": true } });
    let mut events = events(scene.chat(stream).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let mut chunks = parse(&events);
    let usage = chunks.pop().unwrap();
    assert_eq!(
        (&usage["choices"], &usage["usage"]["completion_tokens"]),
        (&json!([]), &json!(num_tokens))
    );
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({ "role": "assistant", "content": "" })
    );
    assert!(
        chunks
            .iter()
            .all(|c| c["usage"].is_null() && c["object"] == "chat.completion.chunk")
    );
    assert_eq!(content(&chunks), TEXT);
    let reasons: Vec<&Value> = chunks
        .iter()
        .map(|c| &c["choices"][0]["finish_reason"])
        .collect();
    assert_eq!(reasons.iter().filter(|r| !r.is_null()).count(), 1);
    assert_eq!(**reasons.last().unwrap(), "stop");
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics
            .contains("vllm:request_success_total{model_name=\"demo\",finished_reason=\"stop\"} 2"),
        "{metrics}"
    );
    assert!(metrics.contains("tramontane_router_ready 1"), "{metrics}");
    scene.end().await;
}

#[tokio::test]
async fn three_answers_have_seeds_of_their_own() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    let whole: Value = scene
        .chat(json!({ "n": 3, "seed": 7 }))
        .await
        .json()
        .await
        .unwrap();
    for i in 0..3 {
        assert_eq!(whole["choices"][i]["index"], i);
        assert_eq!(whole["choices"][i]["message"]["content"], TEXT);
    }
    let mut seen = scene.workers[0].seen.lock().clone();
    seen.extend(scene.workers[1].seen.lock().iter().cloned());
    assert!(
        scene.workers.iter().any(|w| w.seen.lock().is_empty()),
        "answers share one worker's cache"
    );
    let mut seeds: Vec<u64> = seen
        .iter()
        .map(|r| r.sampling.as_ref().unwrap().seed)
        .collect();
    assert!(seeds.contains(&7));
    seeds.sort_unstable();
    seeds.dedup();
    assert_eq!(seeds.len(), 3);
    let body = json!({ "prompt": ["a", "b"], "echo": true, "stream": true });
    let mut events = events(scene.post("/v1/completions", &body).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let mut texts = [String::new(), String::new()];
    for chunk in parse(&events) {
        let choice = &chunk["choices"][0];
        texts[choice["index"].as_u64().unwrap() as usize] += choice["text"].as_str().unwrap();
    }
    for (text, prompt) in texts.iter().zip(["a", "b"]) {
        assert!(text.starts_with(prompt) && text.ends_with(TEXT), "{text}");
    }
    scene.end().await;
}

#[tokio::test]
async fn a_stop_string_ends_the_answer_and_its_sequence() {
    let tokenizer = tokenizer();
    let endless = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.pop();
        steps.push(Step::Hang);
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![endless]).await;
    let response = scene
        .chat(json!({ "stop": ["this is a st", "never"] }))
        .await;
    let whole: Value = response.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "Hello world, ");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn log_probabilities_reach_the_client() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let chat: Value = scene
        .chat(json!({ "logprobs": true, "top_logprobs": 2 }))
        .await
        .json()
        .await
        .unwrap();
    let entries = chat["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(entries.len(), story(&scene.tokenizer).len() - 1);
    assert_eq!(entries[0]["top_logprobs"].as_array().unwrap().len(), 2);
    let spoken: String = entries
        .iter()
        .map(|e| e["token"].as_str().unwrap())
        .collect();
    assert_eq!(spoken.trim_start(), TEXT);
    let body = json!({ "prompt": "x", "logprobs": 1 });
    let whole: Value = scene
        .post("/v1/completions", &body)
        .await
        .json()
        .await
        .unwrap();
    let logprobs = &whole["choices"][0]["logprobs"];
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(
            logprobs[list].as_array().unwrap().len(),
            entries.len(),
            "{list}"
        );
    }
    scene.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_aborts_its_sequence() {
    let endless = scripted(|_| Ok(vec![Step::Started(0), Step::Token(300), Step::Hang]));
    let scene = Scene::start(config(), vec![endless]).await;
    let mut body = scene.chat(json!({ "stream": true })).await.bytes_stream();
    body.next().await.unwrap().unwrap();
    assert_eq!(scene.workers[0].open.load(Ordering::SeqCst), 1);
    drop(body);
    scene.until_idle(0).await;
    let whole = scene.client.post(format!("{}/v1/completions", scene.http));
    let whole = whole.json(&json!({ "prompt": "x" })).send();
    let mut whole = Box::pin(whole);
    tokio::select! {
        _ = &mut whole => panic!("the answer never ends"),
        () = until("a stream", async || scene.workers[0].open.load(Ordering::SeqCst) == 1) => {}
    }
    drop(whole);
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn the_usage_says_how_long_the_request_took() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let whole = scene.chat(json!({ "include_metrics": true, "n": 2 })).await;
    let whole: Value = whole.json().await.unwrap();
    let usage = &whole["usage"];
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 0);
    let seconds = |name: &str| usage["metrics"][name].as_f64().unwrap();
    let since_the_first = seconds("total_time") - seconds("time_to_first_token");
    // From the first token to the last one of each of both answers.
    let num_next = usage["completion_tokens"].as_f64().unwrap() - 2.0;
    let between = seconds("mean_inter_token_time") * num_next;
    assert!(between > 0.0 && between <= 2.0 * since_the_first, "{usage}");
    scene.end().await;
}
