//! Requests that come before anybody can serve them.

use super::*;

fn patient(hold_wait: Duration) -> RouterConfig {
    RouterConfig {
        hold_wait,
        ..config()
    }
}

/// A router without workers, of a cluster without a placement.
async fn alone(config: RouterConfig) -> Scene {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let servers = tokio::task::JoinSet::new();
    Scene::open(config, store, (Vec::new(), servers), None, tokenizer()).await
}

impl Scene {
    /// A worker comes, and what it serves is published.
    async fn arrive(&mut self) {
        let worker = FakeWorker {
            script: storyteller(),
            seen: Arc::default(),
            parents: Arc::default(),
            open: Arc::default(),
            drains: Arc::default(),
            is_dead: Arc::default(),
        };
        let address = worker.clone().serve(&mut self._servers).await;
        let record = record("w0", address);
        put(&*self.store, &record.key(), &record).await;
        serve(&*self.store, &placement_of("f")).await;
        self.workers.push(worker);
    }

    async fn until_held(&self, num: usize) {
        let line = format!("tramontane_router_held_requests {num}\n");
        let held = async || {
            self.get("/metrics")
                .await
                .text()
                .await
                .unwrap()
                .contains(&line)
        };
        until(&line, held).await;
    }
}

#[tokio::test]
async fn a_stream_that_comes_early_is_told_so_and_gets_its_answer() {
    let mut scene = alone(patient(PATIENCE)).await;
    let response = scene.chat(json!({ "stream": true })).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let mut body = response.bytes_stream();
    let first = body.next().await.unwrap().unwrap();
    assert!(first.starts_with(b": waiting: "), "{first:?}");
    assert_eq!(scene.get("/health/ready").await.status(), 503);
    scene.until_held(1).await;
    scene.arrive().await;
    let mut rest = String::new();
    while let Some(bytes) = body.next().await {
        rest.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
    }
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    assert!(rest.contains("\"finish_reason\":\"stop\""), "{rest}");
    scene.until_held(0).await;
    scene.end().await;
}

#[tokio::test]
async fn a_whole_answer_and_one_over_grpc_wait_too() {
    let mut scene = alone(patient(PATIENCE)).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let url = format!("{}/v1/chat/completions", scene.http);
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let asked = scene.client.post(url).json(&body).send();
    let asked = TaskTracker::new().spawn(asked);
    let called = TaskTracker::new().spawn(async move {
        client
            .generate_once(plain(v1::GenerateOptions::default()))
            .await
    });
    scene.until_held(2).await;
    scene.arrive().await;
    let whole: Value = asked.await.unwrap().unwrap().json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    let answer = called.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.answers[0].text.trim_start(), TEXT);
    scene.end().await;
}

#[tokio::test]
async fn nobody_waits_for_a_worker_longer_than_the_limit() {
    let scene = alone(patient(Duration::from_millis(50))).await;
    let whole = scene.chat(json!({})).await;
    assert_eq!(whole.status(), 503);
    assert!(whole.headers().contains_key("retry-after"));
    let body: Value = whole.json().await.unwrap();
    assert_eq!(body["error"]["code"], "service_unavailable");
    let message = body["error"]["message"].as_str().unwrap();
    assert!(
        message.starts_with("nobody could serve this within 50ms: "),
        "{message}"
    );
    let stream = scene.chat(json!({ "stream": true })).await;
    assert_eq!(stream.status(), 200);
    let events = events(stream).await;
    let [error] = parse(&events).try_into().unwrap();
    assert_eq!(error["error"]["code"], "service_unavailable");
    let body = json!({ "input": "hi", "stream": true });
    let response = scene.post("/v1/responses", &body).await;
    assert_eq!(response.status(), 200);
    let text = response.text().await.unwrap();
    let (_, last) = text.split_once("event: error\ndata: ").unwrap();
    let error: Value = serde_json::from_str(last.trim_end()).unwrap();
    assert_eq!(
        (&error["type"], &error["code"], &error["sequence_number"]),
        (&json!("error"), &json!("service_unavailable"), &json!(0))
    );
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let refused = client
        .generate_once(plain(v1::GenerateOptions::default()))
        .await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::Unavailable);
    scene.end().await;
}

#[tokio::test]
async fn more_than_the_limit_is_refused_with_its_status_and_who_leaves_is_forgotten() {
    let narrow = RouterConfig {
        queue_max: 1,
        ..patient(PATIENCE)
    };
    let scene = alone(narrow).await;
    let held = scene.chat(json!({ "stream": true })).await;
    assert_eq!(held.status(), 200);
    scene.until_held(1).await;
    for stream in [true, false] {
        let refused = scene.chat(json!({ "stream": stream })).await;
        assert_eq!(refused.status(), 503);
    }
    drop(held);
    scene.until_held(0).await;
    scene.end().await;
}
