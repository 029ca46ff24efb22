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
async fn the_tokens_of_a_prompt_that_is_refused_are_given_back() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let slow = scripted(move |_| {
        Ok(vec![
            Step::Gate(Arc::clone(&held)),
            Step::Token(300),
            Step::Finish(v1::FinishReason::Length),
        ])
    });
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
