//! Drills: each fault happens, is counted, ends, and changes no token.

use std::time::Duration;

use tonic::Code;
use tonic_types::StatusExt as _;
use tramontane_compute::WeightFormat;
use tramontane_proto::v1::{self, DrillKind};
use tramontane_types::SamplingParams;
use tramontane_worker::WorkerConfig;

use crate::cluster::{Carrier, Cluster, Said, config, eventually, prompt, request};

/// A fault that lasts longer than a test: what ends it is not the clock.
const LONG_MS: u32 = 60_000;

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        max_tokens,
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

fn drilled(id: &str) -> WorkerConfig {
    WorkerConfig {
        drills: true,
        ..config(id, WeightFormat::Q8)
    }
}

fn drill(kind: DrillKind, duration_ms: u32) -> v1::DrillRequest {
    v1::DrillRequest {
        kind: kind.into(),
        duration_ms,
        ..v1::DrillRequest::default()
    }
}

async fn begin(
    cluster: &Cluster,
    id: &str,
    request: v1::DrillRequest,
) -> Result<v1::DrillReport, tonic::Status> {
    let mut client = cluster.workers[id].client.clone();
    Ok(client.drill(request).await?.into_inner())
}

async fn report(cluster: &Cluster, id: &str) -> v1::DrillReport {
    cluster.status(id).await.drill.unwrap()
}

/// `a` holds nothing, `b` and `c` hold everything.
async fn two_holders() -> Cluster {
    let mut cluster = Cluster::new(Carrier::Grpc);
    for id in ["a", "b", "c"] {
        cluster.start(drilled(id)).await;
    }
    cluster
        .publish(&["a", "b", "c"], |_| vec![(0, 8, vec![1, 2])])
        .await;
    cluster
}

async fn say(cluster: &Cluster, id: &str, name: &str, max_tokens: u32) -> Vec<u32> {
    let request = request(name, prompt(1, 20), &params(max_tokens));
    let stream = cluster.generate(id, request).await.unwrap();
    Said::read(stream).await.unwrap().ids
}

#[tokio::test]
async fn drills_are_off_until_the_configuration_allows_them() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    cluster.start(config("a", WeightFormat::Q8)).await;
    let refused = begin(&cluster, "a", drill(DrillKind::Kill, 0)).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(
        refused.message().contains("worker.drills = true"),
        "{refused}"
    );
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "DRILLS_OFF"
    );
    assert!(!report(&cluster, "a").await.allowed);
    cluster.stop().await;
}

#[tokio::test]
async fn a_drill_is_refused_where_it_cannot_be_and_while_another_runs() {
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start(drilled("a")).await;
    let refused = async |request| begin(&cluster, "a", request).await.unwrap_err();
    let pause = refused(drill(DrillKind::Pause, 100)).await;
    assert_eq!(pause.code(), Code::FailedPrecondition);
    assert!(pause.message().contains("slow or a kill drill"), "{pause}");
    let cut = refused(drill(DrillKind::Partition, 100)).await;
    assert_eq!(cut.code(), Code::FailedPrecondition);
    assert!(cut.message().contains("--exchange grpc"), "{cut}");
    let long = refused(drill(DrillKind::Slow, 60_001)).await;
    assert_eq!(long.code(), Code::InvalidArgument);
    let slow = v1::DrillRequest {
        delay_ms: 1,
        ..drill(DrillKind::Slow, LONG_MS)
    };
    let running = begin(&cluster, "a", slow.clone()).await.unwrap();
    assert_eq!(running.running(), DrillKind::Slow);
    let second = refused(slow).await;
    assert_eq!(second.code(), Code::FailedPrecondition);
    assert!(
        second.message().contains("slow drill under way"),
        "{second}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_killed_holder_says_no_goodbye_and_no_token_changes() {
    let mut cluster = two_holders().await;
    let expected = say(&cluster, "a", "reference", 200).await;
    let request = request("kill", prompt(1, 20), &params(200));
    let mut stream = cluster.generate("a", request).await.unwrap();
    let mut said = Said::default();
    while said.ids.len() < 10 {
        said.note(stream.message().await.unwrap().unwrap());
    }
    begin(&cluster, "b", drill(DrillKind::Kill, 0))
        .await
        .unwrap();
    while let Some(event) = stream.message().await.unwrap() {
        said.note(event);
    }
    assert_eq!(said.ids, expected);
    let dead = cluster.workers.remove("b").unwrap();
    // Its record goes with its lease, not before: a worker that deregisters leaves the state "leaving".
    dead.ended.await.unwrap().unwrap();
    let mut client = dead.client.clone();
    assert!(client.status(v1::WorkerStatusRequest {}).await.is_err());
    if let Some(record) = cluster.record("b").await {
        assert!(record.state.is_staying(), "{record:?}");
    }
    eventually("the lease of the dead ends", async || {
        cluster.record("b").await.is_none()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn the_streams_of_a_killed_worker_break_without_a_word() {
    let mut cluster = two_holders().await;
    let request = request("kill", prompt(1, 20), &params(10_000));
    let mut stream = cluster.generate("a", request).await.unwrap();
    stream.message().await.unwrap().unwrap();
    begin(&cluster, "a", drill(DrillKind::Kill, 0))
        .await
        .unwrap();
    let broken = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream of a dead worker has an end"),
            Err(status) => break status,
        }
    };
    // What a worker says itself carries its reason.
    assert!(broken.get_details_error_info().is_none(), "{broken:?}");
    let dead = cluster.workers.remove("a").unwrap();
    dead.ended.await.unwrap().unwrap();
    eventually("the lease of the dead ends", async || {
        cluster.record("a").await.is_none()
    })
    .await;
    cluster.stop().await;
}

#[tokio::test]
async fn calls_across_a_partition_vanish_and_the_other_holder_answers() {
    let cluster = two_holders().await;
    let expected = say(&cluster, "a", "reference", 60).await;
    let cut = v1::DrillRequest {
        peers: vec!["a".to_owned()],
        ..drill(DrillKind::Partition, 3_000)
    };
    begin(&cluster, "b", cut).await.unwrap();
    assert_eq!(say(&cluster, "a", "cut", 60).await, expected);
    assert!(report(&cluster, "b").await.frames_dropped > 0);
    assert_eq!(report(&cluster, "a").await.frames_dropped, 0);
    eventually("the partition heals", async || {
        report(&cluster, "b").await.running() == DrillKind::Unspecified
    })
    .await;
    let dropped = report(&cluster, "b").await.frames_dropped;
    assert_eq!(say(&cluster, "a", "healed", 60).await, expected);
    assert_eq!(report(&cluster, "b").await.frames_dropped, dropped);
    cluster.stop().await;
}

#[tokio::test]
async fn a_worker_that_is_cut_off_goes_on_when_the_partition_heals() {
    let cluster = two_holders().await;
    let expected = say(&cluster, "a", "reference", 60).await;
    begin(&cluster, "a", drill(DrillKind::Partition, 1_500))
        .await
        .unwrap();
    assert_eq!(say(&cluster, "a", "cut", 60).await, expected);
    assert!(report(&cluster, "a").await.frames_dropped > 0);
    cluster.stop().await;
}

#[tokio::test]
async fn a_slow_worker_is_late_as_long_as_the_drill_lasts_and_says_the_same() {
    let cluster = two_holders().await;
    let expected = say(&cluster, "a", "reference", 12).await;
    for id in ["a", "b"] {
        let slow = v1::DrillRequest {
            delay_ms: 20,
            ..drill(DrillKind::Slow, 2_000)
        };
        begin(&cluster, id, slow).await.unwrap();
    }
    let begin = std::time::Instant::now();
    assert_eq!(say(&cluster, "a", "slow", 12).await, expected);
    assert!(begin.elapsed() >= Duration::from_millis(12 * 20));
    assert!(report(&cluster, "a").await.steps_delayed >= 12);
    assert!(report(&cluster, "b").await.replies_delayed > 0);
    eventually("the worker is quick again", async || {
        report(&cluster, "a").await.running() == DrillKind::Unspecified
    })
    .await;
    let steps = report(&cluster, "a").await.steps_delayed;
    assert_eq!(say(&cluster, "a", "quick", 12).await, expected);
    assert_eq!(report(&cluster, "a").await.steps_delayed, steps);
    cluster.stop().await;
}
