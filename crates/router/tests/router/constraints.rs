//! What becomes of a sequence whose worker cannot go on in its constraint, or is lost where the constraint may have ended it.

use tonic_types::ErrorDetails;

use super::*;

const PARAM: &str = "structured_outputs.regex";

/// What a worker says about a constraint that nobody can go on in.
fn constraint_failed() -> Status {
    let details = ErrorDetails::with_error_info(
        "CONSTRAINT_FAILED",
        "tramontane",
        std::collections::HashMap::new(),
    );
    let message = "the grammar's next tokens cannot be found: too many items";
    Status::with_error_details(tonic::Code::InvalidArgument, message, details)
}

fn constrained(mut more: Value) -> Value {
    more["structured_outputs"] = json!({ "regex": "[a-z ]*" });
    more
}

/// Requests that workers saw.
fn num_seen(scene: &Scene) -> usize {
    scene.workers.iter().map(|w| w.seen.lock().len()).sum()
}

#[tokio::test]
async fn a_constraint_that_cannot_be_followed_further_is_the_clients_to_mend() {
    let fails = || {
        scripted(|_| {
            let failed = Step::Fail(constraint_failed());
            Ok(vec![Step::Started(0), Step::Token(300), failed])
        })
    };
    let scene = Scene::start(config(), vec![fails(), fails()]).await;
    let response = scene.chat(constrained(json!({}))).await;
    assert_eq!(response.status(), 400);
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["error"]["type"], "invalid_request_error");
    assert_eq!(body["error"]["param"], PARAM);
    let expected = format!(
        "{PARAM} cannot be followed further: {}",
        constraint_failed().message()
    );
    assert_eq!(body["error"]["message"], expected);
    // Nobody else was asked: the damage stays where it is.
    assert_eq!(num_seen(&scene), 1);
    // A stream has begun: its last event says so.
    let response = scene.chat(constrained(json!({ "stream": true }))).await;
    assert_eq!(response.status(), 200);
    let chunks = parse(&events(response).await);
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["type"], "invalid_request_error");
    assert_eq!(
        (&error["param"], &error["message"]),
        (&json!(PARAM), &json!(expected))
    );
    assert_eq!(num_seen(&scene), 2);
    scene.end().await;
}

#[tokio::test]
async fn whether_the_last_token_completed_the_text_is_asked_of_a_worker_and_not_guessed() {
    let script = || {
        scripted(|request| {
            Ok(match request.num_resumed {
                0 => vec![Step::Tokens(vec![300, 301, 302]), Step::Break],
                3 => vec![Step::Started(0), Step::Finish(v1::FinishReason::Stop)],
                _ => return Err(Status::internal("nothing else is resumed")),
            })
        })
    };
    let scene = Scene::start(config(), vec![script(), script()]).await;
    let said = async |body: Value| -> Value {
        let response = scene.chat(body).await;
        let body: Value = response.json().await.unwrap();
        body["choices"][0]["finish_reason"].clone()
    };
    let body = json!({ "max_tokens": 3 });
    assert_eq!(said(constrained(body.clone())).await, "stop");
    assert_eq!(num_seen(&scene), 2);
    // Without a constraint nobody needs to be asked.
    assert_eq!(said(body).await, "length");
    assert_eq!(num_seen(&scene), 3);
    scene.end().await;
}
