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
    assert!(given_back.is_ok(), "{phase:?}: not within {GIVE_BACK:?}");
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    for gauge in ["journal_entries", "journal_tokens"] {
        assert!(
            metrics.contains(&format!("tramontane_router_{gauge} 0\n")),
            "{phase:?} {metrics}"
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

#[tokio::test]
async fn clients_that_leave_in_any_phase_leave_nothing_behind() {
    let silent = scripted(|_| Ok(vec![Step::Hang]));
    let scene = Scene::start(config(), vec![silent]).await;
    leave(&scene, Phase::BodyHalfSent).await;
    leave(&scene, Phase::BeforeTheFirstToken).await;
    scene.end().await;
    let narrow = RouterConfig {
        sequences_max: 1,
        ..config()
    };
    let silent = scripted(|_| Ok(vec![Step::Hang]));
    let scene = Scene::start(narrow, vec![silent]).await;
    leave(&scene, Phase::Queued).await;
    scene.end().await;
    let talking = scripted(|_| Ok(vec![Step::Started(0), Step::Token(300), Step::Hang]));
    let scene = Scene::start(config(), vec![talking]).await;
    leave(&scene, Phase::MidStream).await;
    scene.end().await;
}
