//! A request that is sent again with its idempotency key is the same request.

use super::*;

const PATH: &str = "/v1/chat/completions";

fn body(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Says `TEXT`, the second half when the gate opens.
fn halting(gate: &Arc<Semaphore>) -> Script {
    let (gate, tokenizer) = (Arc::clone(gate), tokenizer());
    scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.insert(4, Step::Gate(Arc::clone(&gate)));
        steps.insert(0, Step::Started(1));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    })
}

fn seen(scene: &Scene) -> usize {
    scene.workers.iter().map(|w| w.seen.lock().len()).sum()
}

/// A gauge or counter of the router.
async fn metric(scene: &Scene, name: &str) -> u64 {
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    let line = metrics
        .lines()
        .find_map(|line| line.strip_prefix(&format!("{name} ")));
    line.unwrap_or_else(|| panic!("{name} in {metrics}"))
        .parse()
        .unwrap()
}

#[tokio::test]
async fn a_retry_gets_the_running_answer_and_then_the_finished_one() {
    let gate = Arc::new(Semaphore::new(0));
    let scene = Scene::start(config(), vec![halting(&gate)]).await;
    let body = body(&json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let headers = [("idempotency-key", "k-1")];
    let first = scene.post_with(PATH, &body, &headers).await;
    let second = scene.post_with(PATH, &body, &headers).await;
    assert_eq!(
        metric(&scene, "tramontane_router_attached_requests_total").await,
        1
    );
    gate.add_permits(1);
    let first = events(first).await;
    assert_eq!(first.last().unwrap(), "[DONE]");
    assert_eq!(content(&parse(&first[..first.len() - 1])), TEXT);
    assert_eq!(events(second).await, first);
    let third = scene.post_with(PATH, &body, &headers).await;
    assert_eq!(events(third).await, first);
    assert_eq!(seen(&scene), 1);
    scene.end().await;
}

#[tokio::test]
async fn a_client_that_left_finds_its_answer_and_goes_on_where_it_was() {
    let gate = Arc::new(Semaphore::new(0));
    let scene = Scene::start(config(), vec![halting(&gate)]).await;
    let body = body(&json!({ "stream": true }));
    let headers = [("idempotency-key", "k-1")];
    let mut stream = scene.post_with(PATH, &body, &headers).await.bytes_stream();
    let mut text = String::new();
    while text.matches("\n\n").count() < 3 {
        text.push_str(std::str::from_utf8(&stream.next().await.unwrap().unwrap()).unwrap());
    }
    drop(stream);
    let got: Vec<Event> = text.trim_end().split("\n\n").map(event).collect();
    let id = got.last().unwrap().id.clone().unwrap();
    gate.add_permits(1);
    let headers = [("idempotency-key", "k-1"), ("last-event-id", &id)];
    let rest = events_with_ids(scene.post_with(PATH, &body, &headers).await).await;
    let mut all: Vec<String> = got.into_iter().chain(rest).map(|e| e.data).collect();
    assert_eq!(all.pop().unwrap(), "[DONE]");
    assert_eq!(content(&parse(&all)), TEXT);
    assert_eq!(seen(&scene), 1);
    // Now that it is whole, it is known how far it goes.
    let (answer, _position) = id.rsplit_once('/').unwrap();
    let num_tokens = story(&scene.tokenizer).len();
    for (position, status) in [(num_tokens + 3, 200), (num_tokens + 4, 400)] {
        let id = format!("{answer}/{position}");
        let headers = [("idempotency-key", "k-1"), ("last-event-id", &id)];
        let response = scene.post_with(PATH, &body, &headers).await;
        assert_eq!(response.status(), status, "{id}");
    }
    // A whole answer is another body and another key.
    let mut whole = body.clone();
    whole["stream"] = json!(false);
    let headers = [("idempotency-key", "k-2")];
    gate.add_permits(1);
    let one: Value = scene
        .post_with(PATH, &whole, &headers)
        .await
        .json()
        .await
        .unwrap();
    let two: Value = scene
        .post_with(PATH, &whole, &headers)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (one["choices"][0]["message"]["content"].as_str(), &one),
        (Some(TEXT), &two)
    );
    assert_eq!(seen(&scene), 2);
    scene.end().await;
}

#[tokio::test]
async fn keys_are_for_one_body_and_one_tenant() {
    let (config, _dir) = auth::guarded(|_| ());
    let scene = Scene::start(config, vec![storyteller()]).await;
    let (one, other) = (body(&json!({})), body(&json!({ "temperature": 0 })));
    let key = ("idempotency-key", "k");
    let (anna, otto) = (
        ("authorization", "Bearer trm_acme"),
        ("authorization", "Bearer trm_globex"),
    );
    assert_eq!(
        scene.post_with(PATH, &one, &[key, anna]).await.status(),
        200
    );
    let refused = scene.post_with(PATH, &other, &[key, anna]).await;
    assert_eq!(refused.status(), 422);
    assert_eq!(refused.headers()["x-should-retry"], "false");
    let error: Value = refused.json().await.unwrap();
    assert_eq!(error["error"]["code"], "idempotency_key_reused");
    // Another tenant learns nothing of it.
    assert_eq!(
        scene.post_with(PATH, &other, &[key, otto]).await.status(),
        200
    );
    assert_eq!(seen(&scene), 2);
    let long = "k".repeat(257);
    let refused = scene
        .post_with(PATH, &one, &[("idempotency-key", &long), anna])
        .await;
    assert_eq!(refused.status(), 400);
    scene.end().await;
}

#[tokio::test]
async fn another_router_makes_the_same_answer_from_the_key() {
    let first = Scene::start(config(), vec![storyteller()]).await;
    let second = first.another(config()).await;
    for scene in [&first, &second] {
        let headers = [("idempotency-key", "k")];
        assert_eq!(
            scene
                .post_with(PATH, &body(&json!({})), &headers)
                .await
                .status(),
            200
        );
    }
    assert_eq!(first.post(PATH, &body(&json!({}))).await.status(), 200);
    let seen = first.workers[0].seen.lock().clone();
    let seeds: Vec<u64> = seen
        .iter()
        .map(|r| r.sampling.as_ref().unwrap().seed)
        .collect();
    assert_eq!(seeds[0], seeds[1]);
    assert_ne!(seeds[0], seeds[2]);
    assert_ne!(
        seen[0].request_id, seen[1].request_id,
        "workers tell them apart"
    );
    second.end().await;
    first.end().await;
}

#[tokio::test]
async fn an_answer_that_nobody_comes_back_for_is_aborted_after_the_grace() {
    let gate = Arc::new(Semaphore::new(0));
    let short = RouterConfig {
        orphan_grace: Duration::from_millis(200),
        keep_answers: Duration::from_millis(200),
        ..config()
    };
    let scene = Scene::start(short, vec![halting(&gate)]).await;
    let body = body(&json!({ "stream": true }));
    let headers = [("idempotency-key", "k")];
    let mut stream = scene.post_with(PATH, &body, &headers).await.bytes_stream();
    stream.next().await.unwrap().unwrap();
    drop(stream);
    assert_eq!(
        scene.workers[0].open.load(Ordering::SeqCst),
        1,
        "not at once"
    );
    scene.until_idle(0).await;
    until("nothing is kept", async || {
        metric(&scene, "tramontane_router_kept_answers").await == 0
            && metric(&scene, "tramontane_router_kept_bytes").await == 0
    })
    .await;
    // A whole answer goes after its time.
    gate.add_permits(1);
    events(scene.post_with(PATH, &body, &headers).await).await;
    until("the whole answer is forgotten", async || {
        metric(&scene, "tramontane_router_kept_answers").await == 0
            && metric(&scene, "tramontane_router_kept_bytes").await == 0
    })
    .await;
    scene.end().await;
}

#[tokio::test]
async fn a_refused_request_is_refused_to_all_that_wait_for_it_and_then_tried_again() {
    let calls = AtomicUsize::new(0);
    let tokenizer = tokenizer();
    let first_full = scripted(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0..3 => Err(Status::resource_exhausted("full")),
        _ => {
            let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
            steps.push(Step::Finish(v1::FinishReason::Stop));
            Ok(steps)
        }
    });
    let scene = Scene::start(config(), vec![first_full]).await;
    let headers = [("idempotency-key", "k")];
    let body = body(&json!({}));
    let refused = scene.post_with(PATH, &body, &headers).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["x-should-retry"], "true");
    assert_eq!(scene.post_with(PATH, &body, &headers).await.status(), 200);
    scene.end().await;
}
