//! Clients that leave, in every phase and many at once, take everything of theirs with them.

use super::*;

/// How long what a client left may take to be given back.
const GIVE_BACK: Duration = Duration::from_secs(1);
const CLIENTS: usize = 200;

/// When a client leaves.
#[derive(Clone, Copy, Debug)]
enum Phase {
    BodyHalfSent,
    Queued,
    BeforeTheFirstToken,
    MidStream,
}

async fn leave(scene: &Scene, phase: Phase) {
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true });
    let mut request = chat_on_the_wire(&body);
    if matches!(phase, Phase::BodyHalfSent) {
        request.truncate(request.len() - 10);
    }
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(mute_client(scene, &request).await);
    }
    let open = || scene.workers[0].open.load(Ordering::SeqCst);
    match phase {
        Phase::BodyHalfSent => {}
        Phase::Queued => {
            until("clients queue", async || {
                metric(scene, "vllm:num_requests_waiting").await > 0
            })
            .await;
        }
        Phase::BeforeTheFirstToken => until("sequences", async || open() == CLIENTS).await,
        Phase::MidStream => {
            until("sequences", async || open() == CLIENTS).await;
            for client in &mut clients {
                said(client, 300).await;
            }
        }
    }
    drop(clients);
    nothing_is_left(scene, &format!("{phase:?}")).await;
}

/// Everything is given back soon.
async fn nothing_is_left(scene: &Scene, left: &str) {
    let open = || scene.workers[0].open.load(Ordering::SeqCst);
    let idle = async {
        until("nothing is left", async || {
            let mut left = open() as u64;
            for name in ["vllm:num_requests_running", "vllm:num_requests_waiting"] {
                left += metric(scene, name).await;
            }
            left == 0
        })
        .await;
    };
    let given_back = tokio::time::timeout(GIVE_BACK, idle).await;
    assert!(given_back.is_ok(), "{left}: not within {GIVE_BACK:?}");
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    for gauge in ["journal_entries", "journal_tokens"] {
        assert!(
            metrics.contains(&format!("tramontane_router_{gauge} 0\n")),
            "{left} {metrics}"
        );
    }
}

/// A gauge with the model's label.
async fn metric(scene: &Scene, name: &str) -> u64 {
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    let start = format!("{name}{{model_name=\"demo\"}} ");
    let line = metrics.lines().find_map(|line| line.strip_prefix(&start));
    line.unwrap_or_else(|| panic!("{name} in {metrics}"))
        .parse()
        .unwrap()
}

/// A worker that takes sequences and says nothing, behind a router that lets so many run.
async fn silent_worker(sequences_max: usize) -> Scene {
    let config = RouterConfig {
        sequences_max,
        ..config()
    };
    Scene::start(config, vec![scripted(|_| Ok(vec![Step::Hang]))]).await
}

#[tokio::test]
async fn clients_that_leave_in_any_phase_leave_nothing_behind() {
    let scene = silent_worker(config().sequences_max).await;
    leave(&scene, Phase::BodyHalfSent).await;
    leave(&scene, Phase::BeforeTheFirstToken).await;
    scene.end().await;
    let scene = silent_worker(1).await;
    leave(&scene, Phase::Queued).await;
    scene.end().await;
    let talking = scripted(|_| Ok(vec![Step::Started(0), Step::Token(300), Step::Hang]));
    let scene = Scene::start(config(), vec![talking]).await;
    leave(&scene, Phase::MidStream).await;
    scene.end().await;
}

/// A call over gRPC whose client never sees the end of it.
async fn call(mut client: InferenceClient<Channel>, is_once: bool) {
    let asked = plain(v1::GenerateOptions::default());
    if is_once {
        let answer = client.generate_once(asked).await;
        panic!("{answer:?}");
    }
    let mut stream = client.generate(asked).await.unwrap().into_inner();
    while stream.message().await.unwrap().is_some() {}
    panic!("the stream ends");
}

/// Many calls that are given up once `reached` says so.
async fn cancel(scene: &Scene, is_once: bool, reached: impl AsyncFnMut() -> bool) {
    let client = InferenceClient::new(channel(&scene.grpc).await);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..CLIENTS {
        calls.spawn(call(client.clone(), is_once));
    }
    until("calls are where they are cancelled", reached).await;
    calls.abort_all();
    while let Some(ended) = calls.join_next().await {
        assert!(ended.unwrap_err().is_cancelled());
    }
    // The connection is as good as before: no call has closed it.
    nothing_is_left(scene, &format!("cancelled, GenerateOnce: {is_once}")).await;
    let mut client = client;
    let refused = client.generate_once(v1::GenerateRequest::default()).await;
    assert_eq!(refused.unwrap_err().code(), tonic::Code::InvalidArgument);
}

#[tokio::test]
async fn calls_that_are_cancelled_in_any_phase_leave_nothing_behind() {
    for is_once in [false, true] {
        let scene = silent_worker(config().sequences_max).await;
        let open = || scene.workers[0].open.load(Ordering::SeqCst);
        cancel(&scene, is_once, async || open() == CLIENTS).await;
        scene.end().await;
        let scene = silent_worker(1).await;
        cancel(&scene, is_once, async || {
            metric(&scene, "vllm:num_requests_waiting").await == CLIENTS as u64 - 1
        })
        .await;
        scene.end().await;
        let talking = scripted(|_| Ok(vec![Step::Started(0), Step::Token(300), Step::Hang]));
        let scene = Scene::start(config(), vec![talking]).await;
        let told = format!("tramontane_router_journal_tokens {CLIENTS}\n");
        cancel(&scene, is_once, async || {
            let metrics = scene.get("/metrics").await.text().await.unwrap();
            metrics.contains(&told)
        })
        .await;
        scene.end().await;
    }
}
