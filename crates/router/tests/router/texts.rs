//! Text with a gap, and texts and ids of each other.

use super::tools::scene;
use super::*;

#[tokio::test]
async fn a_gap_is_filled_where_the_model_can() {
    let scene = scene(false, &["return a"]).await;
    let body = json!({ "prompt": "def f(a):", "suffix": "\n", "max_tokens": 4 });
    let response = scene.post("/v1/completions", &body).await;
    assert_eq!(response.status(), 200);
    let prompt = scene.workers[0].seen.lock()[0].prompt_ids.clone();
    let expected = scene.tokenizer.encode_infill("def f(a):", "\n").unwrap();
    assert_eq!(prompt, expected);
    let ids = json!({ "prompt": [5, 6], "suffix": "x" });
    let demo = Scene::start(config(), vec![storyteller()]).await;
    for (scene, body) in [(&scene, &ids), (&demo, &body)] {
        let refused = scene.post("/v1/completions", body).await;
        assert_eq!(refused.status(), 400);
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], "suffix", "{error}");
    }
    demo.end().await;
    scene.end().await;
}

#[tokio::test]
async fn texts_become_ids_and_ids_texts() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let body = json!({ "prompt": "Hello", "return_token_strs": true });
    let got: Value = scene.post("/tokenize", &body).await.json().await.unwrap();
    let ids = scene.tokenizer.encode_with_bos("Hello").unwrap();
    assert_eq!(
        (&got["tokens"], &got["count"]),
        (&json!(ids), &json!(ids.len())),
        "{got}"
    );
    assert_eq!(
        (&got["max_model_len"], &got["token_strs"][0]),
        (&json!(2048), &json!("<s>"))
    );
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let got: Value = scene.post("/tokenize", &chat).await.json().await.unwrap();
    assert!(got["count"].as_u64().unwrap() > 2);
    let back = json!({ "tokens": ids });
    let got: Value = scene.post("/detokenize", &back).await.json().await.unwrap();
    assert_eq!(got["prompt"], "<s> Hello");
    let table = [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({ "prompt": 5 }), "prompt"),
        ("/tokenize", json!({ "messages": [] }), "messages"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({ "tokens": [4096] }), "tokens"),
    ];
    for (path, body, param) in table {
        let refused = scene.post(path, &body).await;
        assert_eq!(refused.status(), 400, "{path}");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    for path in ["/health", "/ping", "/load", "/version"] {
        assert_eq!(scene.get(path).await.status(), 200, "{path}");
    }
    scene.end().await;
}
