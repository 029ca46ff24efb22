//! What tenants are charged for, and what nobody gets past.

use tramontane_router::TenantConfig;

use super::*;

/// Everybody has these limits.
fn limited(limits: TenantConfig) -> RouterConfig {
    RouterConfig {
        tenant_defaults: limits,
        ..config()
    }
}

fn number(response: &reqwest::Response, header: &str) -> u64 {
    let value = response.headers()[header].to_str().unwrap();
    value.parse().unwrap()
}

#[tokio::test]
async fn ids_of_texts_count_as_requests_at_both_doors() {
    let limits = TenantConfig {
        requests_per_minute: Some(4),
        ..TenantConfig::default()
    };
    let scene = Scene::start(limited(limits), vec![storyteller()]).await;
    // What is no JSON costs nothing.
    let url = format!("{}/tokenize", scene.http);
    let plain = scene.client.post(url).header("content-type", "text/plain");
    assert_eq!(plain.body("hi").send().await.unwrap().status(), 415);
    let body = json!({ "prompt": "hi" });
    let first = scene.post("/tokenize", &body).await;
    assert_eq!(first.status(), 200);
    assert_eq!(number(&first, "x-ratelimit-remaining-requests"), 3);

    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let text = || v1::TokenizeRequest {
        text: "hi".to_owned(),
        add_bos: false,
    };
    let ids = client.tokenize(text()).await.unwrap().into_inner().ids;
    let ids = || v1::DetokenizeRequest { ids: ids.clone() };
    client.detokenize(ids()).await.unwrap();
    client.tokenize(text()).await.unwrap();
    let refused = client.tokenize(text()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    let refused = client.detokenize(ids()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    assert_eq!(scene.post("/tokenize", &body).await.status(), 429);

    let page = scene.get("/metrics").await.text().await.unwrap();
    for (route, code, num) in [
        ("tokenize", 200, 1),
        ("tokenize", 415, 1),
        ("tokenize", 429, 1),
        ("grpc_tokenize", 200, 2),
        ("grpc_tokenize", 429, 1),
        ("grpc_detokenize", 200, 1),
        ("grpc_detokenize", 429, 1),
    ] {
        let labels = format!("{{route=\"{route}\",code=\"{code}\"}} {num}\n");
        let line = format!("tramontane_router_requests_total{labels}");
        assert!(page.contains(&line), "{line} is not in {page}");
    }
    scene.end().await;
}

#[tokio::test]
async fn the_tokens_of_a_prompt_that_is_refused_are_given_back() {
    let (gate, slow) = gated();
    let limits = TenantConfig {
        tokens_per_minute: Some(100),
        ..TenantConfig::default()
    };
    let narrow = RouterConfig {
        sequences_max: 1,
        queue_wait: Duration::from_millis(1),
        ..limited(limits)
    };
    let scene = Scene::start(narrow, vec![slow]).await;
    let first = scene.chat(json!({ "stream": true })).await;
    assert_eq!(first.status(), 200);
    let left = number(&first, "x-ratelimit-remaining-tokens");
    assert!((1..100).contains(&left), "{left}");
    // Together they have far more tokens than there are in a minute.
    for _ in 0..30 {
        let late = scene.chat(json!({})).await;
        assert_eq!(late.status(), 503);
        assert!(number(&late, "x-ratelimit-remaining-tokens") >= left);
    }
    gate.add_permits(1);
    assert_eq!(events(first).await.last().unwrap(), "[DONE]");
    scene.end().await;
}

#[tokio::test]
async fn what_a_response_repeats_counts_while_it_waits() {
    let (gate, slow) = gated();
    let narrow = RouterConfig {
        sequences_max: 1,
        queue_bytes_max: 1 << 20,
        ..config()
    };
    let scene = Scene::start(narrow, vec![slow]).await;
    let first = scene.chat(json!({ "stream": true })).await;
    assert_eq!(first.status(), 200);
    let text = json!({ "format": { "type": "text" }, "note": "x".repeat(400 << 10) });
    let body = json!({ "input": "hi", "text": text });
    let url = format!("{}/v1/responses", scene.http);
    let tasks = TaskTracker::new();
    let mut waiting = Vec::new();
    for num in 1..=2 {
        waiting.push(tasks.spawn(scene.client.post(&url).json(&body).send()));
        let line = format!("{{\"server_load\":{}}}", num + 1);
        let waits = async || scene.get("/load").await.text().await.unwrap() == line;
        until(&line, waits).await;
    }
    // There is room for two of them.
    assert_eq!(scene.post("/v1/responses", &body).await.status(), 429);
    gate.add_permits(3);
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap().unwrap().status(), 200);
    }
    drop(first);
    scene.end().await;
}
