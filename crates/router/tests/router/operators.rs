//! What operators see and change.

use super::*;

#[tokio::test]
async fn operators_see_the_cluster_and_drain_workers() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let status = admin
        .cluster_status(v1::ClusterStatusRequest {})
        .await
        .unwrap()
        .into_inner();
    assert!(status.ready && status.store_available && !status.survives_one_loss);
    assert_eq!(
        (status.epoch, status.workers_ready, status.workers_total),
        (1, 1, 1)
    );
    let workers = admin
        .list_workers(v1::ListWorkersRequest {})
        .await
        .unwrap()
        .into_inner()
        .workers;
    assert_eq!(
        (
            workers[0].state.as_str(),
            workers[0].slices,
            workers[0].segments
        ),
        ("ready", 1, 8)
    );
    let placement = admin
        .get_placement(v1::GetPlacementRequest {})
        .await
        .unwrap()
        .into_inner();
    let placement: Placement = serde_json::from_str(&placement.placement_json).unwrap();
    assert_eq!(placement.epoch, Epoch(1));
    let drain = |id: &str| v1::DrainWorkerRequest {
        worker_id: id.to_owned(),
    };
    admin.drain_worker(drain("w0")).await.unwrap();
    assert_eq!(scene.workers[0].drains.load(Ordering::SeqCst), 1);
    let unknown = admin.drain_worker(drain("w9")).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    scene.end().await;
}

#[tokio::test]
async fn a_cordoned_worker_gets_no_new_sequences_and_finishes_what_it_has() {
    let gate = Arc::new(Semaphore::new(0));
    let (held, tokenizer) = (Arc::clone(&gate), tokenizer());
    let slow = scripted(move |_| {
        let mut steps: Vec<Step> = story(&tokenizer).into_iter().map(Step::Token).collect();
        steps.insert(2, Step::Gate(Arc::clone(&held)));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![slow, storyteller()]).await;
    let mut admin = admin(&scene).await;
    let seen = |worker: usize| scene.workers[worker].seen.lock().len();
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let running = scene.chat(json!({ "stream": true })).await;
    assert_eq!((seen(0), seen(1)), (1, 0), "w1 is cordoned");

    admin.set_cordon(cordon("w1", false)).await.unwrap();
    let changed = admin.set_cordon(cordon("w0", true)).await.unwrap();
    assert!(changed.into_inner().changed);
    let again = admin.set_cordon(cordon("w0", true)).await.unwrap();
    assert!(!again.into_inner().changed);
    assert_eq!(cluster_status(&mut admin).await.cordoned, ["w0"]);
    let listed = admin.list_workers(v1::ListWorkersRequest {}).await.unwrap();
    let listed: Vec<bool> = listed
        .into_inner()
        .workers
        .iter()
        .map(|w| w.cordoned)
        .collect();
    assert_eq!(listed, [true, false]);
    for _ in 0..4 {
        assert_eq!(scene.chat(json!({})).await.status(), 200);
    }
    assert_eq!((seen(0), seen(1)), (1, 4), "w0 is cordoned");

    gate.add_permits(1);
    let events = events(running).await;
    assert_eq!(content(&parse(&events[..events.len() - 1])), TEXT);
    assert_eq!((seen(0), seen(1)), (1, 4), "the running one stayed");

    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let status = cluster_status(&mut admin).await;
    assert!(
        !status.ready && status.reason.contains("cordoned"),
        "{}",
        status.reason
    );
    assert_eq!(scene.chat(json!({})).await.status(), 503);
    let unknown = admin.set_cordon(cordon("w9", true)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);
    scene.end().await;
}

#[tokio::test]
async fn an_operator_changes_and_clears_what_is_wanted_of_the_placement() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = admin(&scene).await;
    let wish = |replicas, slices_per_expert| v1::SetIntentRequest {
        replicas,
        slices_per_expert,
    };
    let mut set = async |request| {
        let now = admin.set_intent(request).await?.into_inner();
        Ok::<_, Status>((now.replicas, now.slices_per_expert))
    };
    // What cannot be read is in nobody's way.
    put(&*scene.store, "intent", &json!("junk")).await;
    assert_eq!(set(wish(Some(2), None)).await.unwrap(), (Some(2), None));
    assert_eq!(set(wish(None, Some(4))).await.unwrap(), (Some(2), Some(4)));
    assert_eq!(set(wish(Some(0), None)).await.unwrap(), (None, Some(4)));
    for (request, number) in [
        (wish(Some(65), None), "65"),
        (wish(None, Some(9)), "9"),
        (wish(None, Some(300)), "300"),
    ] {
        let refused = set(request).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{number}");
        assert!(refused.message().contains(number), "{}", refused.message());
    }
    let (stored, _) = planner::intent(&*scene.store).await.unwrap();
    assert_eq!((stored.replicas, stored.slices_per_expert), (None, Some(4)));
    scene.end().await;
}

#[tokio::test]
async fn two_operators_at_once_lose_neither_change() {
    let scripts = vec![storyteller(), storyteller(), storyteller(), storyteller()];
    let scene = Scene::start(config(), scripts).await;
    let channel = channel(&scene.admin).await;
    let cordons = ["w0", "w1", "w2", "w3"].map(|id| {
        let mut admin = AdminClient::new(channel.clone());
        async move { admin.set_cordon(cordon(id, true)).await.unwrap() }
    });
    futures::future::join_all(cordons).await;
    let status = cluster_status(&mut AdminClient::new(channel)).await;
    assert_eq!(status.cordoned, ["w0", "w1", "w2", "w3"]);
    scene.end().await;
}

#[tokio::test]
async fn a_worker_that_is_gone_is_removed_and_a_ready_one_only_by_force() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut admin = admin(&scene).await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let gone = record("w1", address);
    put(&*scene.store, &gone.key(), &gone).await;
    until("w1 is listed", async || {
        cluster_status(&mut admin).await.workers_total == 2
    })
    .await;
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let remove = |id: &str, force| v1::RemoveWorkerRequest {
        worker_id: id.to_owned(),
        force,
    };
    let removed = admin.remove_worker(remove("w1", false)).await.unwrap();
    let removed = removed.into_inner();
    assert!(removed.was_listed && !removed.was_alive && removed.slices == 0);
    until("w1 is gone", async || {
        cluster_status(&mut admin).await.workers_total == 1
    })
    .await;
    let status = cluster_status(&mut admin).await;
    assert_eq!(
        status.cordoned,
        Vec::<String>::new(),
        "its cordon goes with it"
    );
    let unknown = admin.remove_worker(remove("w1", true)).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound);

    let refused = admin.remove_worker(remove("w0", false)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(scene.store.get("workers/w0").await.unwrap().is_some());
    let forced = admin.remove_worker(remove("w0", true)).await.unwrap();
    let forced = forced.into_inner();
    assert!(forced.was_listed && forced.was_alive && forced.slices == 1);
    assert_eq!(scene.store.get("workers/w0").await.unwrap(), None);
    scene.end().await;
}

#[derive(Debug, Default)]
struct FakeScaler {
    asked: Mutex<Vec<u16>>,
}

#[tonic::async_trait]
impl Scaler for FakeScaler {
    async fn scale(&self, count: u16) -> Result<ScaleStarted, ScaleError> {
        self.asked.lock().push(count);
        if count > 10 {
            return Err(ScaleError::Refused(
                "ten machines are all there are".to_owned(),
            ));
        }
        Ok(ScaleStarted {
            from: 1,
            started: vec![WorkerId::new("w1")],
            draining: Vec::new(),
        })
    }
}

#[tokio::test]
async fn workers_are_scaled_by_whoever_can_and_otherwise_refused_with_advice() {
    let count = |count| v1::ScaleWorkersRequest { count };
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut alone = admin(&scene).await;
    assert!(!cluster_status(&mut alone).await.scalable);
    let refused = alone.scale_workers(count(2)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert!(refused.message().contains("tramontane worker"), "{refused}");
    scene.end().await;

    let scaler = Arc::new(FakeScaler::default());
    let scene = Scene::start_with(config(), vec![storyteller()], Some(scaler.clone())).await;
    let mut admin = admin(&scene).await;
    assert!(cluster_status(&mut admin).await.scalable);
    let begun = admin.scale_workers(count(2)).await.unwrap().into_inner();
    assert_eq!((begun.from, begun.started), (1, vec!["w1".to_owned()]));
    for wrong in [0, 65, u32::MAX] {
        let refused = admin.scale_workers(count(wrong)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{wrong}");
    }
    let refused = admin.scale_workers(count(11)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    assert_eq!(*scaler.asked.lock(), [2, 11]);
    scene.end().await;
}

#[tokio::test]
async fn what_happens_is_told_to_those_who_ask_and_to_those_who_watch() {
    let dies = scripted(|_| Ok(vec![Step::Started(0), Step::Break]));
    let scene = Scene::start(config(), vec![dies, storyteller()]).await;
    let mut admin = admin(&scene).await;
    let watch = v1::WatchEventsRequest { after_sequence: 0 };
    let mut stream = admin.watch_events(watch).await.unwrap().into_inner();
    let mut told = async |kind: &str, worker: &str| {
        loop {
            let next = tokio::time::timeout(PATIENCE, stream.message());
            let event = next.await.unwrap().unwrap().unwrap();
            if event.kind == kind && event.worker == worker {
                return event;
            }
        }
    };
    told("router_started", "").await;
    admin.set_cordon(cordon("w1", true)).await.unwrap();
    let cordoned = told("worker_cordoned", "w1").await;
    assert_eq!(cordoned.epoch, 1);
    admin.set_cordon(cordon("w1", false)).await.unwrap();
    assert_eq!(
        told("worker_uncordoned", "w1").await.sequence,
        cordoned.sequence + 1
    );

    until("a sequence was lost by w0", async || {
        assert_eq!(scene.chat(json!({})).await.status(), 200);
        !scene.workers[0].seen.lock().is_empty()
    })
    .await;
    let moved = told("sequences_moved", "w0").await;
    assert!(moved.text.starts_with("1 sequences"), "{}", moved.text);
    scene.lose(1).await;
    told("worker_lost", "w1").await;

    let newest = v1::ListEventsRequest { limit: 1 };
    let newest = admin.list_events(newest).await.unwrap().into_inner().events;
    assert_eq!(newest.len(), 1);
    assert_eq!(newest[0].kind, "worker_lost");
    scene.end().await;
    assert!(
        matches!(stream.message().await, Ok(None) | Err(_)),
        "ends with the router"
    );
}

#[tokio::test]
async fn a_drill_goes_to_its_worker_and_a_refusal_comes_back_as_it_is() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let ask = async |worker: &str, kind: v1::DrillKind, peers: &[&str]| {
        let drill = v1::DrillRequest {
            kind: kind.into(),
            delay_ms: 7,
            peers: peers.iter().map(|&peer| peer.to_owned()).collect(),
            ..v1::DrillRequest::default()
        };
        let request = v1::DrillWorkerRequest {
            worker_id: worker.to_owned(),
            drill: Some(drill),
        };
        admin.clone().drill_worker(request).await
    };
    let begun = ask("w0", v1::DrillKind::Slow, &[]).await.unwrap();
    assert_eq!(begun.into_inner().report.unwrap().steps_delayed, 7);
    let off = ask("w0", v1::DrillKind::Kill, &[]).await.unwrap_err();
    assert_eq!(off.code(), tonic::Code::FailedPrecondition);
    assert_eq!(off.message(), "drills are off");
    let broken = ask("w0", v1::DrillKind::Partition, &[]).await.unwrap_err();
    assert_eq!(broken.code(), tonic::Code::Unavailable);
    for unknown in [
        ask("w9", v1::DrillKind::Slow, &[]).await.unwrap_err(),
        ask("w0", v1::DrillKind::Partition, &["w9"])
            .await
            .unwrap_err(),
    ] {
        assert_eq!(unknown.code(), tonic::Code::NotFound);
        assert!(unknown.message().contains("w9"), "{unknown}");
    }
    scene.end().await;
}

#[tokio::test]
async fn operators_plan_before_they_move_and_know_whom_they_need() {
    let config = RouterConfig {
        slices_per_expert: Some(8),
        ..config()
    };
    let scene = Scene::start(config, vec![storyteller(), storyteller()]).await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let workers = admin
        .list_workers(v1::ListWorkersRequest {})
        .await
        .unwrap()
        .into_inner()
        .workers;
    assert_eq!([true, false], [workers[0].essential, workers[1].essential]);

    let plan = admin
        .plan_placement(v1::PlanPlacementRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!((plan.candidates.len(), plan.proposes), (8, true));
    let chosen = &plan.candidates[plan.chosen as usize];
    assert_eq!((chosen.slices_per_expert, chosen.replicas), (8, 1));
    assert_eq!(
        chosen.moved_bytes,
        3 << 10,
        "w0 keeps one more than half of the expert"
    );
    assert!(plan.now.unwrap().layer_us > chosen.layer_us);
    assert!(
        plan.why.iter().any(|line| line.contains("by memory")),
        "{:?}",
        plan.why
    );
    let safe = plan.candidates.iter().find(|c| c.replicas == 2).unwrap();
    assert!(safe.survives_one_loss && !chosen.survives_one_loss);
    let too_many = v1::PlanPlacementRequest {
        replicas: 0,
        slices_per_expert: 9,
    };
    let refused = admin.plan_placement(too_many).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);

    let mut rebalance = async |dry_run| {
        let request = v1::RebalanceRequest { dry_run };
        admin.rebalance(request).await.unwrap().into_inner()
    };
    assert_eq!(rebalance(true).await.replaces_epoch, 1);
    assert_eq!(scene.store.get("intent").await.unwrap(), None);
    assert_eq!(rebalance(false).await.moved_bytes, 3 << 10);
    let (intent, _) = planner::intent(&*scene.store).await.unwrap();
    assert_eq!(intent.rebalance, Some(Epoch(1)));

    scene.end().await;
}

#[tokio::test]
async fn a_second_ready_holder_of_everything_makes_the_cluster_safe() {
    let scene = Scene::start(config(), vec![storyteller(), storyteller()]).await;
    let gauge = async |value: u8| {
        let metrics = scene.get("/metrics").await.text().await.unwrap();
        metrics.contains(&format!("\ntramontane_survives_one_loss {value}\n"))
    };
    assert!(gauge(0).await, "only w0 holds the expert");
    let both = Placement {
        epoch: Epoch(2),
        numeric_class: "cpu-q8".to_owned(),
        model: "f".to_owned(),
        num_layers: 1,
        num_experts: 1,
        workers: vec![WorkerId::new("w0"), WorkerId::new("w1")],
        experts: vec![vec![SliceHolders {
            range: SegmentRange::WHOLE,
            holders: vec![0, 1],
        }]],
    };
    serve(&*scene.store, &both).await;
    for id in ["w0", "w1"] {
        let entry = scene
            .store
            .get(&format!("workers/{id}"))
            .await
            .unwrap()
            .unwrap();
        let mut record = WorkerRecord::decode(&entry).unwrap();
        record.loaded = Epoch(2);
        put(&*scene.store, &record.key(), &record).await;
    }
    until("any one may be lost", async || gauge(1).await).await;
    scene.end().await;
}
