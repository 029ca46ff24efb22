//! What is refused, and what is bounded: the queue, bodies, and clients that are slow or mute.

use super::*;

#[tokio::test]
async fn a_full_queue_is_429_and_no_worker_is_503() {
    let (gate, slow) = gated();
    let narrow = RouterConfig {
        sequences_max: 1,
        queue_max: 0,
        ..config()
    };
    let scene = Scene::start(narrow, vec![slow]).await;
    let first = scene.chat(json!({ "stream": true })).await;
    assert_eq!(first.status(), 200);
    let refused = scene.chat(json!({})).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["retry-after"], "1");
    assert_eq!(refused.headers()["retry-after-ms"], "1000");
    assert_eq!(refused.headers()["x-should-retry"], "true");
    let body: Value = refused.json().await.unwrap();
    assert_eq!(body["error"]["code"], "rate_limit_exceeded");
    gate.add_permits(1);
    assert_eq!(events(first).await.last().unwrap(), "[DONE]");
    scene.end().await;

    let empty = Scene::start(config(), vec![]).await;
    empty.until_ready(false).await;
    let response = empty.chat(json!({})).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["code"], "service_unavailable");
    let ready = empty.get("/health/ready").await;
    assert_eq!(ready.status(), 503);
    assert!(ready.json::<Value>().await.unwrap()["reason"].is_string());
    assert_eq!(empty.get("/health/live").await.status(), 200);
    empty.end().await;
}

#[tokio::test]
async fn what_is_not_a_request_is_refused_in_one_form() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let url = |path: &str| format!("{}{path}", scene.http);
    let chat = url("/v1/chat/completions");
    let huge = vec![b' '; 10 * 1024 * 1024];
    let post = |body: Vec<u8>| {
        scene
            .client
            .post(&chat)
            .header("content-type", "application/json")
            .body(body)
    };
    let mut deep = "[".repeat(5000).into_bytes();
    deep.extend("]".repeat(5000).bytes());
    let table = [
        (post(huge), 413, "request_too_large"),
        (post(b"{\"model\":".to_vec()), 400, ""),
        (post(deep), 400, ""),
        (post(Vec::new()), 400, ""),
        (
            scene.client.post(&chat).body("{}"),
            415,
            "unsupported_media_type",
        ),
        (scene.client.get(&chat), 405, "method_not_allowed"),
        (scene.client.get(url("/nowhere")), 404, "not_found"),
        (
            scene.client.get(url("/v1/models/none")),
            404,
            "model_not_found",
        ),
        (scene.client.get(url("/v1/models/%ff")), 400, ""),
        (
            post(br#"{"model":"x","messages":[{"role":"user","content":"a"}]}"#.to_vec()),
            404,
            "model_not_found",
        ),
    ];
    for (request, status, code) in table {
        let request = request.header("x-request-id", "chosen-by-the-client");
        // A body without a type is text to reqwest.
        let request = if status == 415 {
            request.header("content-type", "text/plain")
        } else {
            request
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), status);
        assert_ne!(response.headers()["x-request-id"], "chosen-by-the-client");
        assert_eq!(response.headers()["x-should-retry"], "false");
        let body: Value = response.json().await.unwrap();
        let keys: Vec<&String> = body["error"].as_object().unwrap().keys().collect();
        assert_eq!(keys, ["message", "type", "param", "code"]);
        assert_eq!(body["error"]["code"].as_str().unwrap_or_default(), code);
    }
    assert!(scene.workers[0].seen.lock().is_empty());
    let models: Value = scene.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["data"][1]["id"], "other-name");
    assert_eq!(scene.get("/v1/models/demo").await.status(), 200);
    assert!(scene.get("/version").await.json::<Value>().await.unwrap()["version"].is_string());
    scene.end().await;
}

#[tokio::test]
async fn bodies_that_are_only_announced_hold_up_nobody() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
                content-type: application/json\r\n";
    let mut half_open = Vec::new();
    for i in 0..80 {
        let size = if i % 2 == 0 {
            "content-length: 8388608"
        } else {
            "transfer-encoding: chunked"
        };
        let mut stream = mute_client(&scene, &format!("{head}{size}\r\n\r\n")).await;
        // The router reads the body now.
        assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 100");
        half_open.push(stream);
    }
    let whole: Value = scene.chat(json!({})).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    for size in [8_388_609_u64, 99_999_999_999] {
        let request = format!("{head}content-length: {size}\r\n\r\n").replace("expect", "x");
        let mut stream = mute_client(&scene, &request).await;
        assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 413");
    }
    drop(half_open);
    scene.end().await;
}

#[tokio::test]
async fn a_body_that_does_not_come_is_waited_for_no_longer_than_the_limit() {
    let quick = RouterConfig {
        body_timeout: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(quick, vec![storyteller()]).await;
    let half = chat_on_the_wire(&json!({ "messages": [] }));
    let mut stream = mute_client(&scene, &half[..half.len() - 5]).await;
    assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 408");
    scene.end().await;
}

#[tokio::test]
async fn a_finished_answer_gives_its_place_back_though_nobody_reads_it() {
    let calls = AtomicUsize::new(0);
    let first_hangs = scripted(move |_| {
        let end = match calls.fetch_add(1, Ordering::SeqCst) {
            0 => Step::Hang,
            _ => Step::Finish(v1::FinishReason::Length),
        };
        Ok(vec![Step::Started(0), Step::Token(300), end])
    });
    let small = RouterConfig {
        sequences_max: 2,
        ..config()
    };
    let scene = Scene::start(small, vec![first_hangs]).await;
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({ "messages": messages, "stream": true, "n": 2 });
    let mute = mute_client(&scene, &chat_on_the_wire(&body)).await;
    let seen = &scene.workers[0].seen;
    until("two sequences", async || seen.lock().len() == 2).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    assert_eq!(scene.workers[0].open.load(Ordering::SeqCst), 1);
    drop(mute);
    scene.until_idle(0).await;
    scene.end().await;
}

#[tokio::test]
async fn a_client_that_does_not_read_is_cut_off() {
    let calls = AtomicUsize::new(0);
    let first_never_end = scripted(move |_| {
        // More than all buffers between here and the client.
        let (num_tokens, end) = match calls.fetch_add(1, Ordering::SeqCst) {
            0..4 => (1900, Step::Hang),
            _ => (1, Step::Finish(v1::FinishReason::Length)),
        };
        let mut steps = vec![Step::Token(300); num_tokens];
        steps.push(end);
        Ok(steps)
    });
    let impatient = RouterConfig {
        sequences_max: 4,
        client_stall_max: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(impatient, vec![first_never_end]).await;
    let messages = json!([{ "role": "user", "content": "hi" }]);
    let body = json!({
        "messages": messages, "stream": true, "n": 4, "logprobs": true, "top_logprobs": 20,
    });
    let mut mute = mute_client(&scene, &chat_on_the_wire(&body)).await;
    let seen = &scene.workers[0].seen;
    until("four sequences", async || seen.lock().len() == 4).await;
    scene.until_idle(0).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    // When it reads after all, it is told.
    let mut rest = Vec::new();
    let reading = tokio::time::timeout(PATIENCE, mute.read_to_end(&mut rest));
    reading.await.unwrap().unwrap();
    let rest = String::from_utf8(rest).unwrap();
    assert!(rest.contains("data: {\"error\":"), "{} bytes", rest.len());
    assert!(!rest.contains("[DONE]"));
    scene.end().await;
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let (gate, slow) = gated();
    let quick = RouterConfig {
        sse_keepalive: Duration::from_millis(20),
        ..config()
    };
    let scene = Scene::start(quick, vec![slow]).await;
    let mut body = scene.chat(json!({ "stream": true })).await.bytes_stream();
    assert_eq!(
        &body.next().await.unwrap().unwrap()[..13],
        b": keep-alive\n"
    );
    gate.add_permits(1);
    let mut rest = Vec::new();
    while let Some(bytes) = body.next().await {
        rest.extend_from_slice(&bytes.unwrap());
    }
    assert!(rest.ends_with(b"data: [DONE]\n\n"));
    scene.end().await;
}
