//! What clients see of workers that are lost, frozen, full or wrong: as little as can be.

use super::*;

#[tokio::test]
async fn a_lost_worker_is_replaced_and_the_stream_goes_on_without_a_seam() {
    let tokenizer = tokenizer();
    let breaks = scripted(move |request| {
        let resumed = request.num_resumed as usize;
        let ids = story(&tokenizer);
        let mut steps = vec![Step::Started(1)];
        // The first request dies before its first token, later ones after three more.
        let num_tokens = if request.prompt_ids.len() == 1 { 0 } else { 3 };
        steps.extend(
            ids.into_iter()
                .skip(resumed)
                .take(num_tokens)
                .map(Step::Token),
        );
        steps.push(Step::Break);
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![breaks, storyteller()]).await;
    let body = json!({ "prompt": [5] });
    let whole: Value = scene
        .post("/v1/completions", &body)
        .await
        .json()
        .await
        .unwrap();
    assert!(
        whole["choices"][0]["text"]
            .as_str()
            .unwrap()
            .ends_with(TEXT),
        "{whole}"
    );
    assert_eq!(scene.workers[1].seen.lock()[0].num_resumed, 0);

    let stream = json!({ "stream": true, "stream_options": { "include_usage": true }, "seed": 3 });
    let mut events = events(scene.chat(stream).await).await;
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let chunks = parse(&events);
    assert_eq!(content(&chunks), TEXT);
    let usage = &chunks.last().unwrap()["usage"];
    assert_eq!(usage["completion_tokens"], story(&scene.tokenizer).len());
    let broken = scene.workers[0].seen.lock().last().unwrap().clone();
    let replay = scene.workers[1].seen.lock().last().unwrap().clone();
    assert_eq!(replay.num_resumed, 3);
    assert_eq!(replay.sampling, broken.sampling);
    let resumed = replay.prompt_ids.len() - 3;
    assert_eq!(replay.prompt_ids[..resumed], broken.prompt_ids);
    assert_eq!(replay.prompt_ids[resumed..], story(&scene.tokenizer)[..3]);
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    assert!(
        metrics.contains("tramontane_router_replayed_tokens_total 3"),
        "{metrics}"
    );
    scene.end().await;
}

#[tokio::test]
async fn a_worker_that_is_frozen_is_noticed_and_passed_over() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    // Accepts connections, like a paused process, and never says anything.
    let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let frozen = WorkerRecord {
        incarnation: 2,
        ..record("w0", mute.local_addr().unwrap().to_string())
    };
    put(&*scene.store, &frozen.key(), &frozen).await;
    let known = async || {
        let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
        let workers = admin
            .list_workers(v1::ListWorkersRequest {})
            .await
            .unwrap()
            .into_inner();
        workers.workers[0].address == frozen.address
    };
    until("the frozen worker's address", known).await;
    let whole: Value = scene.chat(json!({})).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], TEXT);
    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn a_router_that_plans_makes_the_first_placement_itself() {
    let plans = RouterConfig {
        planner: true,
        settle_time: Duration::ZERO,
        ..config()
    };
    // `start` waits for readiness.
    let scene = Scene::start(plans, vec![storyteller()]).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    let mut admin = admin(&scene).await;
    until("the planner has nothing to do", async || {
        let status = cluster_status(&mut admin).await;
        status.plans && status.settled && status.planner_doing == "placement fits"
    })
    .await;
    scene.end().await;
}

#[tokio::test]
async fn a_stream_that_nobody_can_continue_ends_in_an_error_and_nothing_else() {
    let calls = AtomicUsize::new(0);
    let dies = scripted(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
        0 => Ok(vec![Step::Token(300), Step::Token(301), Step::Break]),
        _ => Err(Status::unavailable("gone")),
    });
    let scene = Scene::start(config(), vec![dies]).await;
    let events = events(scene.chat(json!({ "stream": true })).await).await;
    let chunks = parse(&events);
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["type"], "overloaded_error");
    assert_eq!(error.as_object().unwrap().len(), 4);
    assert!(
        chunks
            .iter()
            .all(|c| c["choices"][0]["finish_reason"].is_null())
    );
    scene.end().await;
}

#[tokio::test]
async fn workers_that_refuse_are_asked_in_turn_and_full_ones_make_it_429() {
    let full = || scripted(|_| Err(Status::resource_exhausted("full")));
    let scene = Scene::start(config(), vec![full(), storyteller()]).await;
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    scene.end().await;
    let scene = Scene::start(config(), vec![full(), full()]).await;
    let response = scene.chat(json!({ "stream": true })).await;
    assert_eq!(response.status(), 429);
    assert!(response.headers().contains_key("retry-after"));
    scene.end().await;
    let invalid = scripted(|_| Err(Status::invalid_argument("too long for this worker")));
    let scene = Scene::start(config(), vec![invalid]).await;
    let response = scene.chat(json!({})).await;
    assert_eq!(response.status(), 400);
    assert_eq!(scene.workers[0].seen.lock().len(), 1);
    scene.end().await;
}
