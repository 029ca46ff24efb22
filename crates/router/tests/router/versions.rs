//! Two versions of the weights side by side: what began with one goes on with it, whatever happens, or ends.

use super::*;

const PATH: &str = "/v1/chat/completions";
const OTHER_TEXT: &str = "Something else that other weights would say";

/// Says the text of the version that it is asked for, and breaks the first attempt after a few tokens when the
/// gate opens, if there is one.
fn telling(breaks: Option<&Arc<Semaphore>>) -> Script {
    let (gate, tokenizer) = (breaks.cloned(), tokenizer());
    scripted(move |request| {
        let text = if request.model == "f" {
            TEXT
        } else {
            OTHER_TEXT
        };
        assert_eq!(request.numeric_class, "cpu-q8");
        let mut ids = tokenizer.encode(text).unwrap();
        ids.push(tokenizer.eos_ids()[0]);
        let rest = ids.into_iter().skip(request.num_resumed as usize);
        let mut steps = vec![Step::Started(0)];
        match gate.as_ref().filter(|_| request.request_id.ends_with(".1")) {
            Some(gate) => {
                steps.extend(rest.take(3).map(Step::Token));
                steps.push(Step::Gate(Arc::clone(gate)));
                steps.push(Step::Break);
            }
            None => {
                steps.extend(rest.map(Step::Token));
                steps.push(Step::Finish(v1::FinishReason::Stop));
            }
        }
        Ok(steps)
    })
}

impl Scene {
    /// The last worker has other weights, which are placed on it.
    async fn with_other_weights(scripts: Vec<Script>) -> Self {
        let scene = Self::start(config(), scripts).await;
        let last = format!("w{}", scene.workers.len() - 1);
        scene
            .edit(&last, |record| record.model.fingerprint = "g".to_owned())
            .await;
        let mut placement = placement_of("g");
        placement.workers = vec![WorkerId::new(&last)];
        let key = Version::of_placement(&placement).key();
        put(&*scene.store, &key.published(), &placement).await;
        until("both are placed", async || {
            let placed = scene.weights().await;
            placed.len() == 2 && placed.iter().all(|version| version.placed)
        })
        .await;
        scene
    }

    async fn edit(&self, id: &str, change: impl Fn(&mut WorkerRecord)) {
        let entry = self.store.get(&format!("workers/{id}")).await.unwrap();
        let mut record = WorkerRecord::decode(&entry.unwrap()).unwrap();
        change(&mut record);
        put(&*self.store, &record.key(), &record).await;
    }

    async fn weights(&self) -> Vec<v1::WeightsSummary> {
        let mut admin = AdminClient::connect(self.admin.clone()).await.unwrap();
        let listed = admin.list_weights(v1::ListWeightsRequest {}).await;
        listed.unwrap().into_inner().weights
    }

    async fn let_serve(&self, model: &str) {
        let version = Version::of_placement(&placement_of(model));
        put(&*self.store, keys::SERVING, &version).await;
        until("it serves", async || {
            let versions = self.weights().await;
            versions.iter().any(|v| v.serving && v.version == model)
        })
        .await;
    }

    /// Versions that each worker was asked for.
    fn asked(&self) -> Vec<Vec<String>> {
        let of = |worker: &FakeWorker| {
            let mut models: Vec<String> =
                worker.seen.lock().iter().map(|r| r.model.clone()).collect();
            models.dedup();
            models
        };
        self.workers.iter().map(of).collect()
    }
}

fn body(extra: &Value) -> Value {
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// Text and versions of a stream that ended well.
async fn read(response: reqwest::Response) -> (String, Vec<String>) {
    let events = events(response).await;
    let (last, chunks) = events.split_last().unwrap();
    assert_eq!(last, "[DONE]");
    let chunks = parse(chunks);
    let name = |chunk: &Value| chunk["system_fingerprint"].as_str().unwrap().to_owned();
    let mut versions: Vec<String> = chunks.iter().map(name).collect();
    versions.dedup();
    (content(&chunks), versions)
}

#[tokio::test]
async fn an_answer_that_moves_keeps_its_weights_and_new_ones_have_others() {
    let gate = Arc::new(Semaphore::new(0));
    let scripts = vec![telling(Some(&gate)), telling(Some(&gate)), telling(None)];
    let scene = Scene::with_other_weights(scripts).await;
    let moved = scene.post(PATH, &body(&json!({}))).await;
    let several = body(&json!({ "n": 3, "stream": false }));
    let several = async {
        scene
            .post(PATH, &several)
            .await
            .json::<Value>()
            .await
            .unwrap()
    };
    let switched = async {
        until("all have begun", async || {
            scene
                .workers
                .iter()
                .map(|w| w.seen.lock().len())
                .sum::<usize>()
                == 4
        })
        .await;
        scene.let_serve("g").await;
        gate.add_permits(4);
    };
    let (several, ()) = tokio::join!(several, switched);
    assert_eq!(
        read(moved).await,
        (TEXT.to_owned(), vec!["f-cpu-q8".to_owned()])
    );
    for choice in several["choices"].as_array().unwrap() {
        assert_eq!(choice["message"]["content"], TEXT);
    }
    assert_eq!(several["system_fingerprint"], "f-cpu-q8");
    let new = scene.post(PATH, &body(&json!({}))).await;
    assert_eq!(
        read(new).await,
        (OTHER_TEXT.to_owned(), vec!["g-cpu-q8".to_owned()])
    );
    assert_eq!(scene.asked(), [["f"], ["f"], ["g"]]);
    let models: Value = scene.get("/v1/models").await.json().await.unwrap();
    assert_eq!(models["data"][0]["system_fingerprint"], "g-cpu-q8");
    let metrics = scene.get("/metrics").await.text().await.unwrap();
    let serving = "tramontane_router_weights{version=\"g\",numeric_class=\"cpu-q8\"} 1";
    assert!(metrics.contains(serving), "{metrics}");
    assert!(
        metrics.contains("tramontane_router_versions 2"),
        "{metrics}"
    );
    scene.end().await;
}

#[tokio::test]
async fn an_answer_whose_weights_are_gone_ends_and_says_why() {
    let gate = Arc::new(Semaphore::new(0));
    let scene = Scene::with_other_weights(vec![telling(Some(&gate)), telling(None)]).await;
    let stream = scene.post(PATH, &body(&json!({}))).await;
    scene.let_serve("g").await;
    scene.lose(0).await;
    until("w0 is not listed", async || {
        scene
            .weights()
            .await
            .iter()
            .all(|version| version.version != "f")
    })
    .await;
    gate.add_permits(1);
    let events = events(stream).await;
    let error: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    let expected = "no worker has the weights any more that this answer began with: f (cpu-q8)";
    assert_eq!(message, expected);
    assert_eq!(error["error"]["code"], "service_unavailable");
    let said = content(&parse(&events[..events.len() - 1]));
    assert!(TEXT.starts_with(&said), "{said}");
    assert_eq!(scene.asked(), [vec!["f"], vec![]]);
    scene.end().await;
}

#[tokio::test]
async fn a_stream_that_broke_goes_on_with_the_weights_that_it_began_with() {
    let scene = Scene::with_other_weights(vec![telling(None), telling(None)]).await;
    let second = scene.another(config()).await;
    let whole = events_with_ids(scene.post(PATH, &body(&json!({}))).await).await;
    let id = whole[3].id.clone().unwrap();
    scene.let_serve("g").await;
    second.let_serve("g").await;
    let resume = async || {
        let headers = [("last-event-id", id.as_str())];
        second.post_with(PATH, &body(&json!({})), &headers).await
    };
    let rest = events_with_ids(resume().await).await;
    let shown = |events: &[Event]| -> Vec<String> {
        events.iter().map(|event| event.data.clone()).collect()
    };
    assert_eq!(shown(&rest), shown(&whole[4..]));
    assert_eq!(scene.asked(), [vec!["f"], vec![]]);
    // The same body is another answer for those who begin now, and its events go on with the new weights.
    let new = events_with_ids(scene.post(PATH, &body(&json!({}))).await).await;
    let new_id = new[2].id.clone().unwrap();
    let headers = [("last-event-id", new_id.as_str())];
    let response = second.post_with(PATH, &body(&json!({})), &headers).await;
    let rest = events_with_ids(response).await;
    assert_eq!(shown(&rest), shown(&new[3..]));
    // Nobody is left who could go on.
    scene.lose(0).await;
    until("nobody can go on", async || resume().await.status() == 409).await;
    let refused: Value = resume().await.json().await.unwrap();
    assert_eq!(refused["error"]["code"], "resume_mismatch");
    second.end().await;
    scene.end().await;
}

#[tokio::test]
async fn a_retry_gets_the_answer_of_the_weights_that_it_began_with() {
    let scene = Scene::with_other_weights(vec![telling(None), telling(None)]).await;
    let key = [("idempotency-key", "k")];
    let first = events_with_ids(scene.post_with(PATH, &body(&json!({})), &key).await).await;
    scene.let_serve("g").await;
    let again = events_with_ids(scene.post_with(PATH, &body(&json!({})), &key).await).await;
    let shown = |events: &[Event]| -> Vec<_> {
        events
            .iter()
            .map(|e| (e.id.clone(), e.data.clone()))
            .collect()
    };
    assert_eq!(shown(&again), shown(&first));
    // Another router has not kept it: there the key names an answer of the new weights.
    let second = scene.another(config()).await;
    let other = events_with_ids(second.post_with(PATH, &body(&json!({})), &key).await).await;
    assert!(other[0].data.contains("g-cpu-q8"), "{}", other[0].data);
    let id = first[2].id.clone().unwrap();
    let headers = [("idempotency-key", "k"), ("last-event-id", id.as_str())];
    let mixed = second.post_with(PATH, &body(&json!({})), &headers).await;
    assert_eq!(mixed.status(), 409);
    let rest = scene.post_with(PATH, &body(&json!({})), &headers).await;
    assert_eq!(shown(&events_with_ids(rest).await), shown(&first[3..]));
    second.end().await;
    scene.end().await;
}

#[tokio::test]
async fn a_request_that_nobody_has_taken_begins_with_the_weights_that_serve() {
    let draining = || scripted(|_| Err(Status::unavailable("draining")));
    let scene = Scene::with_other_weights(vec![draining(), telling(None)]).await;
    let asking = async { scene.post(PATH, &body(&json!({}))).await };
    let switching = async {
        until("it was refused", async || {
            !scene.workers[0].seen.lock().is_empty()
        })
        .await;
        scene.let_serve("g").await;
    };
    let (answer, ()) = tokio::join!(asking, switching);
    assert_eq!(read(answer).await.0, OTHER_TEXT);
    scene.end().await;
}

#[tokio::test]
async fn an_operator_names_a_version_and_is_refused_when_it_could_not_answer() {
    let scene = Scene::with_other_weights(vec![telling(None), telling(None)]).await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    let mut ask = async |version: &str, let_come: bool, dry_run: bool| {
        let request = v1::UseWeightsRequest {
            version: version.to_owned(),
            numeric_class: String::new(),
            let_come,
            dry_run,
        };
        admin.use_weights(request).await.map(Response::into_inner)
    };
    let wanted = async || {
        let (intent, _) = planner::intent(&*scene.store).await.unwrap();
        intent.weights.map(|version| version.model.to_string())
    };
    let unknown = ask("x", true, false).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::NotFound, "{unknown}");
    assert!(
        unknown.message().contains("f (cpu-q8), g (cpu-q8)"),
        "{unknown}"
    );
    let empty = ask("", false, false).await.unwrap_err();
    assert_eq!(empty.code(), tonic::Code::InvalidArgument);
    let shown = ask("g", false, true).await.unwrap();
    assert_eq!((shown.version.as_str(), shown.serving.as_str()), ("g", "f"));
    assert!(shown.placed);
    assert_eq!(wanted().await, None, "a dry run writes nothing");
    ask("g", false, false).await.unwrap();
    assert_eq!(wanted().await.as_deref(), Some("g"));
    // Not placed any more: only who lets it come may want it.
    scene
        .edit("w1", |record| record.state = WorkerState::Joining)
        .await;
    until("g is not placed", async || {
        let versions = scene.weights().await;
        versions
            .iter()
            .any(|v| v.version == "g" && !v.placed && v.wanted)
    })
    .await;
    let refused = ask("g", false, false).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let message = refused.message();
    assert!(
        message.contains("0 of its 1 workers are ready"),
        "{message}"
    );
    assert!(!ask("g", true, false).await.unwrap().placed);
    // One that is of another shape is another model.
    scene
        .edit("w1", |record| {
            record.model.fingerprint = "g2".to_owned();
            record.model.num_layers = 7;
        })
        .await;
    until("g2 is listed", async || {
        scene.weights().await.iter().any(|v| v.version == "g2")
    })
    .await;
    let other = ask("g2", true, false).await.unwrap_err();
    assert!(
        other.message().contains("another model: 7 layers"),
        "{other}"
    );
    let ambiguous = ask("g", true, false).await.unwrap_err();
    assert_eq!(
        ambiguous.code(),
        tonic::Code::InvalidArgument,
        "{ambiguous}"
    );
    scene.end().await;
}

#[tokio::test]
async fn a_single_worker_of_other_weights_takes_nothing_and_is_shown() {
    let scene = Scene::start(config(), vec![telling(None), telling(None)]).await;
    scene
        .edit("w1", |record| record.model.fingerprint = "odd".to_owned())
        .await;
    let mut admin = AdminClient::connect(scene.admin.clone()).await.unwrap();
    until("it is shown", async || {
        let status = cluster_status(&mut admin).await;
        status.other_weights == ["odd (cpu-q8) on w1: not placed"]
            && status.incompatible == ["w1"]
            && status.weights == "f"
    })
    .await;
    for _ in 0..4 {
        assert_eq!(
            read(scene.post(PATH, &body(&json!({}))).await).await.0,
            TEXT
        );
    }
    assert_eq!(scene.asked(), [vec!["f"], vec![]]);
    scene.end().await;
}
