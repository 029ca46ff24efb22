//! What gRPC's health service says, asked and watched, while the router can serve and while it cannot.

use tonic::Code;
use tonic_health::pb::HealthCheckResponse;

use super::*;

fn asked(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
    }
}

async fn check(client: &mut HealthClient<Channel>, service: &str) -> ServingStatus {
    let answer = client.check(asked(service)).await;
    answer.unwrap().into_inner().status()
}

/// Until a watcher is told this.
async fn told(stream: &mut tonic::Streaming<HealthCheckResponse>, expected: ServingStatus) {
    let telling = async {
        while let Some(answer) = stream.message().await.unwrap() {
            if answer.status() == expected {
                return;
            }
        }
        panic!("the watch ended before {expected:?}");
    };
    let told = tokio::time::timeout(PATIENCE, telling).await;
    assert!(told.is_ok(), "never {expected:?}");
}

#[tokio::test]
async fn health_follows_readiness_there_and_back_again() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let record = scene.store.get("workers/w0").await.unwrap().unwrap();
    let record = WorkerRecord::decode(&record).unwrap();
    let doors = [
        (
            &scene.grpc,
            &["tramontane.v1.Inference", "inference.GRPCInferenceService"][..],
        ),
        (&scene.admin, &["tramontane.v1.Admin"]),
    ];
    let mut watches = Vec::new();
    for (url, services) in doors {
        let mut client = HealthClient::new(channel(url).await);
        for name in ["", "readiness"].iter().chain(services) {
            let watch = client.watch(asked(name)).await.unwrap();
            watches.push(watch.into_inner());
        }
    }
    for watch in &mut watches {
        told(watch, ServingStatus::Serving).await;
    }
    scene.lose(0).await;
    for watch in &mut watches {
        told(watch, ServingStatus::NotServing).await;
    }
    for (url, services) in doors {
        let mut client = HealthClient::new(channel(url).await);
        for name in ["", "readiness"].iter().chain(services) {
            let status = check(&mut client, name).await;
            assert_eq!(status, ServingStatus::NotServing, "{name:?}");
        }
        let alive = check(&mut client, "liveness").await;
        assert_eq!(alive, ServingStatus::Serving);
        let unknown = client.check(asked("no.Such")).await.unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound);
        let unknown = client.watch(asked("no.Such")).await.unwrap_err();
        assert_eq!(unknown.code(), Code::NotFound);
    }
    scene.workers[0].is_dead.store(false, Ordering::SeqCst);
    put(&*scene.store, &record.key(), &record).await;
    for watch in &mut watches {
        told(watch, ServingStatus::Serving).await;
    }
    drop(watches);
    scene.end().await;
}

#[tokio::test]
async fn health_is_followed_by_so_many_and_no_more_until_one_of_them_ends() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut watches = Vec::new();
    // A connection has at most 256 calls.
    for _ in 0..8 {
        let mut client = HealthClient::new(channel(&scene.grpc).await);
        for _ in 0..128 {
            watches.push(client.watch(asked("")).await.unwrap().into_inner());
        }
    }
    let mut client = HealthClient::new(channel(&scene.grpc).await);
    let refused = client.watch(asked("")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("1024"), "{refused}");
    assert_eq!(check(&mut client, "").await, ServingStatus::Serving);
    drop(watches.pop());
    let next = async {
        while client.watch(asked("")).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    let next = tokio::time::timeout(PATIENCE, next).await;
    assert!(next.is_ok(), "a place that is given up is somebody else's");
    drop(watches);
    scene.end().await;
}
