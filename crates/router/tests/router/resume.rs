//! A stream that broke goes on at any router: whatever it asks for, and after whichever event it broke.

use super::failover::{Case, Form, Speech, cases};
use super::tools::talking;
use super::*;

/// A worker that puts one to three tokens in a message, one more with every request.
fn batching() -> Script {
    let speech = Speech::new(&talking(false));
    let requests = AtomicUsize::new(0);
    scripted(move |request| {
        let (said, reason) = speech.after(request);
        let num = requests.fetch_add(1, Ordering::SeqCst) % 3 + 1;
        let mut steps = vec![Step::Started(1)];
        steps.extend(said.chunks(num).map(|ids| Step::Tokens(ids.to_vec())));
        steps.push(Step::Finish(reason));
        Ok(steps)
    })
}

/// What a client has after some events, however they were cut.
#[derive(Clone, Debug, Default, PartialEq)]
struct Had {
    ids: Vec<String>,
    choices: Vec<HadChoice>,
    usage: Vec<Value>,
    num_done: usize,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct HadChoice {
    roles: usize,
    text: String,
    logprobs: Vec<Value>,
    finish: Vec<Value>,
}

impl Had {
    fn after<'a>(events: impl IntoIterator<Item = &'a Event>) -> Self {
        let mut had = Self::default();
        for event in events {
            if event.data == "[DONE]" {
                had.num_done += 1;
                continue;
            }
            had.note(&serde_json::from_str(&event.data).unwrap());
        }
        had
    }

    fn note(&mut self, chunk: &Value) {
        assert!(chunk["error"].is_null(), "{chunk}");
        let name = format!("{} {}", chunk["id"], chunk["created"]);
        if !self.ids.contains(&name) {
            self.ids.push(name);
        }
        if !chunk["usage"].is_null() {
            self.usage.push(chunk["usage"].clone());
        }
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            if self.choices.len() <= index {
                self.choices.resize(index + 1, HadChoice::default());
            }
            let had = &mut self.choices[index];
            had.roles += usize::from(choice["delta"]["role"].is_string());
            let text = choice["delta"]["content"]
                .as_str()
                .or(choice["text"].as_str());
            had.text.push_str(text.unwrap_or_default());
            had.note_logprobs(&choice["logprobs"]);
            if !choice["finish_reason"].is_null() {
                had.finish.push(choice["finish_reason"].clone());
            }
        }
    }
}

impl HadChoice {
    fn note_logprobs(&mut self, logprobs: &Value) {
        if let Some(content) = logprobs["content"].as_array() {
            self.logprobs.extend_from_slice(content);
        }
        for i in 0..logprobs["tokens"].as_array().map_or(0, Vec::len) {
            let lists = ["tokens", "token_logprobs", "top_logprobs", "text_offset"];
            let entry = lists.map(|list| logprobs[list][i].clone());
            self.logprobs.push(entry.to_vec().into());
        }
    }
}

/// The case as a stream with its usage; without its seed, so that the seed comes from the answer's name.
fn streamed(case: &Case) -> Value {
    let mut body = case.body.clone();
    body["stream"] = json!(true);
    body["stream_options"] = json!({ "include_usage": true });
    body.as_object_mut().unwrap().remove("seed");
    body
}

#[tokio::test]
async fn a_stream_goes_on_at_another_router_after_any_event() {
    let workers = vec![batching(), batching()];
    let first = Scene::start_of(config(), workers, None, talking(false)).await;
    let second = first.another(config()).await;
    // Calls and responses have tests of their own.
    for case in cases().into_iter().filter(|case| case.form == Form::Texts) {
        let body = streamed(&case);
        let whole = events_with_ids(first.post(case.path, &body).await).await;
        let expected = Had::after(&whole);
        assert_eq!(
            (expected.ids.len(), expected.num_done, expected.usage.len()),
            (1, 1, 1)
        );
        assert!(
            expected
                .choices
                .iter()
                .all(|choice| choice.finish.len() == 1)
        );
        for broken in 0..whole.len() - 1 {
            let id = whole[broken].id.as_deref().unwrap();
            let response = second
                .post_with(case.path, &body, &[("last-event-id", id)])
                .await;
            assert_eq!(response.status(), 200, "{} after {id}", case.name);
            let rest = events_with_ids(response).await;
            let got = Had::after(whole[..=broken].iter().chain(&rest));
            assert_eq!(got, expected, "{} after {id}", case.name);
            // And once more in the middle of what went on.
            let Some(id) = rest[rest.len() / 2].id.as_deref() else {
                continue;
            };
            let again = first
                .post_with(case.path, &body, &[("last-event-id", id)])
                .await;
            let seen = whole[..=broken].iter().chain(&rest[..=rest.len() / 2]);
            let again = events_with_ids(again).await;
            assert_eq!(
                Had::after(seen.chain(&again)),
                expected,
                "{} after {id}",
                case.name
            );
        }
    }
    let metrics = second.get("/metrics").await.text().await.unwrap();
    assert!(
        !metrics.contains("tramontane_router_resumed_streams_total 0\n"),
        "{metrics}"
    );
    second.end().await;
    first.end().await;
}

#[tokio::test]
async fn what_is_not_the_same_request_does_not_go_on() {
    let scene = Scene::start(config(), vec![batching()]).await;
    let path = "/v1/chat/completions";
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true });
    let whole = events_with_ids(scene.post(path, &body).await).await;
    let id = whole[1].id.clone().unwrap();
    let mut other = body.clone();
    other["temperature"] = json!(0.5);
    let mut at_once = body.clone();
    at_once["stream"] = json!(false);
    let (answer, _position) = id.rsplit_once('/').unwrap();
    let (two, far) = (format!("{answer}/1.1"), format!("{answer}/4000000000"));
    let table = [
        (&other, id.as_str(), 409, "of another request"),
        (&at_once, id.as_str(), 400, "stream is true"),
        (&body, "7", 400, "ANSWER/TAG/POSITION"),
        (
            &body,
            two.as_str(),
            400,
            "the positions of 1 choices, got 2",
        ),
    ];
    for (body, id, status, expected) in table {
        let refused = scene.post_with(path, body, &[("last-event-id", id)]).await;
        assert_eq!(refused.status(), status, "{id}");
        assert_eq!(refused.headers()["x-should-retry"], "false");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], "last-event-id");
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains(expected), "{message}");
    }
    // How long the answer is shows when it is made.
    let beyond = events(
        scene
            .post_with(path, &body, &[("last-event-id", &far)])
            .await,
    )
    .await;
    let error: Value = serde_json::from_str(beyond.last().unwrap()).unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert!(
        message.ends_with("position of choice 0, got 4000000000"),
        "{message}"
    );
    assert_eq!(beyond.len(), 1);
    scene.end().await;
}

#[tokio::test]
async fn other_weights_do_not_go_on_with_an_answer() {
    let scene = Scene::start(config(), vec![batching()]).await;
    let path = "/v1/chat/completions";
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }], "stream": true });
    let whole = events_with_ids(scene.post(path, &body).await).await;
    let id = whole[1].id.clone().unwrap();
    let mut placement = placement_of("f");
    placement.numeric_class = "cpu-q4".to_owned();
    serve(&*scene.store, &placement).await;
    let changed = WorkerRecord {
        numeric_class: "cpu-q4".to_owned(),
        loaded: Epoch(2),
        ..record("w0", "127.0.0.1:1".to_owned())
    };
    put(&*scene.store, &changed.key(), &changed).await;
    until("the other class is served", async || {
        let resumed = scene
            .post_with(path, &body, &[("last-event-id", &id)])
            .await;
        resumed.status() == 409
    })
    .await;
    scene.end().await;
}
