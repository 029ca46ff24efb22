//! Roles that change while the worker serves: nothing that runs is lost, and what is not needed is free.

use std::time::Duration;

use tonic::Code;
use tonic_types::StatusExt as _;
use tramontane_compute::WeightFormat;
use tramontane_coordination::{Roles, WorkerState};
use tramontane_proto::v1;
use tramontane_types::{SamplingParams, WorkerId};
use tramontane_worker::WorkerConfig;

use crate::cluster::{Carrier, Cluster, Said, config, eventually, prompt, request, split};

pub(crate) const BOTH: Roles = Roles {
    attention: true,
    experts: true,
};
pub(crate) const ATTENTION: Roles = Roles {
    attention: true,
    experts: false,
};
pub(crate) const EXPERTS: Roles = Roles {
    attention: false,
    experts: true,
};

fn q8(id: &str) -> WorkerConfig {
    config(id, WeightFormat::Q8)
}

fn asked(id: &str, max_tokens: u32) -> v1::GenerateSequenceRequest {
    let params = SamplingParams {
        max_tokens,
        ignore_eos: true,
        logprobs: Some(2),
        ..SamplingParams::default()
    };
    request(id, prompt(3, 40), &params)
}

async fn two_workers(first: WorkerConfig) -> Cluster {
    let mut cluster = Cluster::new(Carrier::Grpc);
    cluster.start(first).await;
    cluster.start(q8("b")).await;
    cluster.publish(&["a", "b"], split(2)).await;
    cluster
}

pub(crate) async fn want(cluster: &Cluster, id: &str, roles: Roles) {
    let id = WorkerId::new(id);
    cluster
        .want(|intent| {
            intent.roles.insert(id, roles);
        })
        .await;
}

pub(crate) async fn does(cluster: &Cluster, id: &str, roles: Roles) {
    eventually("the record says what the worker does", async || {
        cluster.record(id).await.is_some_and(|r| r.roles == roles)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn attention_is_given_up_after_the_last_sequence_and_taken_on_again() {
    let cluster = two_workers(q8("a")).await;
    let expected = cluster.generate_all("b", &[asked("e", 1500)]).await;
    let (before, mut said) = (cluster.record("a").await.unwrap(), Said::default());
    let mut running = cluster.generate("a", asked("r", 1500)).await.unwrap();
    while said.ids.is_empty() {
        said.note(running.message().await.unwrap().unwrap());
    }
    want(&cluster, "a", EXPERTS).await;
    eventually("no new sequence is taken", async || {
        let refused = cluster.generate("a", asked("n", 1)).await;
        refused.is_err_and(|status| {
            let reason = status.get_details_error_info().unwrap().reason;
            status.code() == Code::Unavailable && reason == "DRAINING"
        })
    })
    .await;
    assert_eq!(
        cluster.record("a").await.unwrap().roles,
        BOTH,
        "it still attends"
    );
    while let Some(event) = running.message().await.unwrap() {
        said.note(event);
    }
    assert_eq!(vec![said], expected, "the running one has not noticed");
    does(&cluster, "a", EXPERTS).await;
    let (status, record) = (
        cluster.status("a").await,
        cluster.record("a").await.unwrap(),
    );
    assert_eq!((status.kv_pages_total, status.state.as_str()), (0, "ready"));
    assert!(
        record.capacity_bytes > before.capacity_bytes,
        "the cache's memory is for experts"
    );
    let refused = cluster.generate("a", asked("n", 1)).await.unwrap_err();
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "NO_ATTENTION"
    );
    // Its experts serve on.
    assert_eq!(
        cluster.generate_all("b", &[asked("e", 1500)]).await,
        expected
    );

    want(&cluster, "a", BOTH).await;
    does(&cluster, "a", BOTH).await;
    let record = cluster.record("a").await.unwrap();
    assert_eq!(record.capacity_bytes, before.capacity_bytes);
    assert_eq!(
        (record.state, record.incarnation),
        (WorkerState::Ready, before.incarnation)
    );
    assert_eq!(
        cluster.generate_all("a", &[asked("e", 1500)]).await,
        expected
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_end_in_time_is_handed_back() {
    let cluster = two_workers(WorkerConfig {
        drain_deadline: Duration::from_millis(50),
        ..q8("a")
    })
    .await;
    let mut running = cluster.generate("a", asked("r", 16_000)).await.unwrap();
    running.message().await.unwrap().unwrap();
    want(&cluster, "a", EXPERTS).await;
    let status = loop {
        match running.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("it ended as if it were complete"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.get_details_error_info().unwrap().reason, "STOPPED");
    does(&cluster, "a", EXPERTS).await;
    // The thread that had the engine's desk serves experts on.
    assert_eq!(
        cluster.generate_all("b", &[asked("e", 20)]).await[0]
            .ids
            .len(),
        20
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wish_that_is_taken_back_leaves_everything_as_it_was() {
    let cluster = two_workers(q8("a")).await;
    let mut running = cluster.generate("a", asked("r", 16_000)).await.unwrap();
    running.message().await.unwrap().unwrap();
    want(&cluster, "a", EXPERTS).await;
    eventually("no new sequence is taken", async || {
        cluster.generate("a", asked("n", 1)).await.is_err()
    })
    .await;
    want(&cluster, "a", BOTH).await;
    eventually("new sequences are taken", async || {
        cluster.generate("a", asked("m", 1)).await.is_ok()
    })
    .await;
    running.message().await.unwrap().unwrap();
    assert_eq!(cluster.record("a").await.unwrap().roles, BOTH);
    drop(running);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn experts_are_given_up_when_no_placement_names_the_worker_and_then_dropped() {
    let mut cluster = two_workers(q8("a")).await;
    let expected = cluster.generate_all("b", &[asked("e", 30)]).await;
    want(&cluster, "a", ATTENTION).await;
    // A wish changes nothing before the planner has moved the slices.
    assert_eq!(cluster.generate_all("a", &[asked("e", 30)]).await, expected);
    assert_eq!(cluster.record("a").await.unwrap().roles, BOTH);
    cluster.publish(&["b"], split(1)).await;
    does(&cluster, "a", ATTENTION).await;
    assert_eq!(cluster.record("a").await.unwrap().capacity_bytes, 0);
    eventually("its slices are dropped", async || {
        cluster.status("a").await.expert_segments_held == 0
    })
    .await;
    assert_eq!(cluster.generate_all("a", &[asked("e", 30)]).await, expected);

    want(&cluster, "a", BOTH).await;
    does(&cluster, "a", BOTH).await;
    cluster.publish(&["a", "b"], split(2)).await;
    assert!(cluster.status("a").await.expert_segments_held > 0);
    assert_eq!(cluster.generate_all("a", &[asked("e", 30)]).await, expected);
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_starts_again_does_what_is_wanted_of_its_name() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    want(&cluster, "a", EXPERTS).await;
    cluster.start(q8("a")).await;
    assert_eq!(
        cluster.record("a").await.unwrap().roles,
        EXPERTS,
        "from the beginning"
    );
    cluster.start(q8("b")).await;
    cluster.publish(&["a", "b"], split(2)).await;
    assert_eq!(cluster.status("a").await.kv_pages_total, 0);
    assert_eq!(
        cluster.generate_all("b", &[asked("e", 20)]).await[0]
            .ids
            .len(),
        20
    );
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn room_that_was_to_be_given_to_attention_is_offered_again_when_it_is_not() {
    let mut cluster = Cluster::new(Carrier::Grpc);
    want(&cluster, "a", EXPERTS).await;
    // Experts fit only as long as there is no cache.
    cluster
        .start(WorkerConfig {
            expert_memory: Some(1),
            ..q8("a")
        })
        .await;
    cluster.start(q8("b")).await;
    cluster.publish(&["a", "b"], split(2)).await;
    let before = cluster.record("a").await.unwrap().capacity_bytes;
    assert!(before > 1);
    let offers = async |bytes: u64| {
        let record = cluster.record("a").await;
        record.is_some_and(|record| record.capacity_bytes == bytes)
    };
    want(&cluster, "a", BOTH).await;
    eventually("the cache's memory is not offered", async || {
        offers(1).await
    })
    .await;
    want(&cluster, "a", EXPERTS).await;
    eventually("it is offered again", async || offers(before).await).await;
    assert_eq!(cluster.record("a").await.unwrap().roles, EXPERTS);
    cluster.stop().await;
}
