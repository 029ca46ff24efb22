//! A router that stops.

use super::*;

#[tokio::test]
async fn a_router_that_stops_says_so_first_and_finishes_what_runs() {
    let gate = Arc::new(Semaphore::new(0));
    let held = Arc::clone(&gate);
    let tokenizer = tokenizer();
    let slow = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.insert(2, Step::Gate(Arc::clone(&held)));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    });
    let lingering = RouterConfig {
        unready_grace: Duration::from_secs(2),
        ..config()
    };
    let scene = Scene::start(lingering, vec![slow]).await;
    let mut health = HealthClient::new(channel(&scene.grpc).await);
    let mut check = async |service: &str| {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        health.check(request).await.unwrap().into_inner().status()
    };
    assert_eq!(check("").await, ServingStatus::Serving);
    assert_eq!(
        check("tramontane.v1.Inference").await,
        ServingStatus::Serving
    );
    let running = scene.chat(json!({ "stream": true })).await;
    scene.shutdown.trigger();
    scene.until_ready(false).await;
    until("NOT_SERVING", async || {
        check("").await == ServingStatus::NotServing
    })
    .await;
    assert_eq!(check("liveness").await, ServingStatus::Serving);
    // Refused connections are the sign that the doors are closed, with the request still running.
    until("closed doors", async || {
        reqwest::Client::new()
            .get(&scene.http)
            .send()
            .await
            .is_err()
    })
    .await;
    assert!(!scene.running.is_finished());
    gate.add_permits(1);
    let events = events(running).await;
    assert_eq!(events.last().unwrap(), "[DONE]");
    assert_eq!(content(&parse(&events[..events.len() - 1])), TEXT);
    tokio::time::timeout(PATIENCE, scene.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn what_does_not_end_within_the_drain_is_aborted_with_an_error() {
    let endless = scripted(|_| Ok(vec![Step::Token(300), Step::Hang]));
    let short = RouterConfig {
        drain_deadline: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(short, vec![endless]).await;
    let running = scene.chat(json!({ "stream": true })).await;
    scene.shutdown.trigger();
    let events = events(running).await;
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["message"], "this router is stopping");
    tokio::time::timeout(PATIENCE, scene.running)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}
