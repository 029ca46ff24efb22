//! The Responses API: items, events in their official order, and what is refused.

use super::tools::{TWO_CALLS, function, ids, scene, talking};
use super::*;

/// Numbers, types and data of the events of a response.
async fn response_events(response: reqwest::Response) -> (Vec<Event>, Vec<Value>) {
    let events = events_with_ids(response).await;
    let data: Vec<Value> = events
        .iter()
        .map(|e| serde_json::from_str(&e.data).unwrap())
        .collect();
    for event in &data {
        assert!(
            event["type"].is_string() && event["sequence_number"].is_u64(),
            "{event}"
        );
    }
    (events, data)
}

fn response_body(extra: &Value) -> Value {
    let mut tools = vec![function("get_weather"), function("clock")];
    for tool in &mut tools {
        tool["type"] = "function".into();
    }
    let mut body = json!({ "input": "hi", "tools": tools });
    for (key, value) in extra.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[tokio::test]
async fn a_response_has_items() {
    let scene = scene(false, &TWO_CALLS).await;
    let body = response_body(&json!({ "instructions": "Be kind.", "metadata": { "a": "b" } }));
    let whole: Value = scene
        .post("/v1/responses", &body)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&whole["object"], &whole["status"]),
        (&json!("response"), &json!("completed")),
        "{whole}"
    );
    let output = whole["output"].as_array().unwrap();
    assert_eq!(output[0]["content"][0]["text"], "Let me see.");
    assert_eq!(output[1]["arguments"], r#"{"city": "Paris, 7e"}"#);
    assert_eq!(output[2]["name"], "clock");
    assert_eq!(
        (&whole["instructions"], &whole["metadata"]["a"]),
        (&json!("Be kind."), &json!("b"))
    );
    assert_eq!(
        whole["usage"]["output_tokens"],
        ids(&scene.tokenizer, &TWO_CALLS).len()
    );
    scene.end().await;
}

#[tokio::test]
async fn a_response_has_the_official_events() {
    let scene = scene(false, &TWO_CALLS).await;
    let whole = scene
        .post("/v1/responses", &response_body(&json!({})))
        .await;
    let whole: Value = whole.json().await.unwrap();
    let body = response_body(&json!({ "stream": true }));
    let (_, events) = response_events(scene.post("/v1/responses", &body).await).await;
    let mut types: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    types.dedup();
    let call = [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
    ];
    let mut expected = vec![
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ];
    expected.extend(call.into_iter().chain(call));
    expected.push("response.completed");
    assert_eq!(types, expected);
    let numbers: Vec<u64> = events
        .iter()
        .map(|e| e["sequence_number"].as_u64().unwrap())
        .collect();
    assert!(
        numbers.iter().copied().eq(0..numbers.len() as u64),
        "{numbers:?}"
    );
    let last = &events.last().unwrap()["response"];
    let texts = |output: &Value| {
        let items = output.as_array().unwrap().iter();
        items
            .map(|i| {
                (
                    i["content"][0]["text"].clone(),
                    i["name"].clone(),
                    i["arguments"].clone(),
                )
            })
            .collect::<Vec<_>>()
    };
    assert_eq!(texts(&last["output"]), texts(&whole["output"]));
    assert_eq!(
        last["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
    scene.end().await;
}

#[tokio::test]
async fn a_response_goes_on_after_any_event_with_the_same_events() {
    let scene = scene(false, &TWO_CALLS).await;
    let path = "/v1/responses";
    let body = response_body(&json!({ "stream": true }));
    let (whole, expected) = response_events(scene.post(path, &body).await).await;
    for (at, event) in whole.iter().enumerate() {
        let Some(id) = event.id.as_deref() else {
            continue;
        };
        let rest = scene.post_with(path, &body, &[("last-event-id", id)]).await;
        if at + 1 == whole.len() {
            assert_eq!(rest.text().await.unwrap(), "");
            continue;
        }
        let (_, rest) = response_events(rest).await;
        assert_eq!(rest, expected[at + 1..], "after {id}");
    }
    scene.end().await;
}

#[tokio::test]
async fn the_items_of_a_response_are_checked_and_nothing_is_kept() {
    let scene = scene(false, &["Sunny."]).await;
    let called =
        json!({ "type": "function_call", "call_id": "abcdefghi", "name": "f", "arguments": "{}" });
    let output =
        json!({ "type": "function_call_output", "call_id": "abcdefghi", "output": "sunny" });
    let asked = json!({ "role": "user", "content": [{ "type": "input_text", "text": "hi" }] });
    let good = response_body(&json!({ "input": [asked, called, output] }));
    let whole: Value = scene
        .post("/v1/responses", &good)
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        whole["output"][0]["content"][0]["text"], "Sunny.",
        "{whole}"
    );
    let table = [
        (json!({ "input": null }), "input"),
        (json!({ "input": [] }), "input"),
        (json!({ "input": [5] }), "input[0]"),
        (
            json!({ "input": [{ "type": "reasoning" }] }),
            "input[0].type",
        ),
        (json!({ "input": [{ "role": "user" }] }), "input[0].content"),
        (
            json!({ "input": [{ "type": "function_call", "name": "f" }] }),
            "input[0].call_id",
        ),
        (json!({ "store": true }), "store"),
        (
            json!({ "previous_response_id": "resp_1" }),
            "previous_response_id",
        ),
        (json!({ "background": true }), "background"),
        (
            json!({ "include": ["file_search_call.results"] }),
            "include[0]",
        ),
        (json!({ "top_logprobs": 2 }), "top_logprobs"),
        (json!({ "max_output_tokens": 0 }), "max_output_tokens"),
        (json!({ "truncation": "auto" }), "truncation"),
        (json!({ "metadata": 17 }), "metadata"),
        (
            json!({ "guided_regex": "a", "text": { "format": { "type": "json_object" } } }),
            "text.format",
        ),
        (
            json!({ "text": { "format": { "type": "xml" } } }),
            "text.format.type",
        ),
        (
            json!({ "tools": [{ "type": "web_search" }] }),
            "tools[0].type",
        ),
    ];
    for (extra, param) in table {
        let refused = scene.post("/v1/responses", &response_body(&extra)).await;
        assert_eq!(refused.status(), 400, "{extra}");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    for path in ["/v1/responses/resp_1", "/v1/embeddings", "/completions"] {
        let gone = scene.get(path).await;
        assert_eq!(gone.status(), 404, "{path}");
        let error: Value = gone.json().await.unwrap();
        assert_eq!(error["error"]["code"], "not_found");
    }
    scene.end().await;
}

#[tokio::test]
async fn a_response_that_fails_ends_with_an_error_event() {
    let tokenizer = talking(false);
    let first = tokenizer.encode("Hello").unwrap()[0];
    let broken = scripted(move |request| match request.num_resumed {
        0 => Ok(vec![Step::Started(0), Step::Token(first), Step::Break]),
        _ => Err(Status::unavailable("gone")),
    });
    let scene = Scene::start_of(config(), vec![broken], None, tokenizer).await;
    let body = response_body(&json!({ "stream": true }));
    let (_, events) = response_events(scene.post("/v1/responses", &body).await).await;
    let last = events.last().unwrap();
    assert_eq!(
        (&last["type"], &last["code"]),
        (&json!("error"), &json!("service_unavailable"))
    );
    assert!(events.iter().all(|e| e["type"] != "response.completed"));
    scene.end().await;
}
