//! Calls of tools from the worker's tokens to what clients see, at every door, and again after a break.

use super::*;

/// The first id behind the demo model's vocabulary.
const FIRST_ADDED: u32 = 4096;
/// Its id is [`FIRST_ADDED`].
pub(super) const TOOL_CALLS: &str = "[TOOL_CALLS]";
const LIST_TOKENS: [&str; 8] = [
    TOOL_CALLS,
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
];
pub(super) const TWO_CALLS: [&str; 3] = [
    "Let me see.",
    TOOL_CALLS,
    r#"[{"name": "get_weather", "arguments": {"city": "Paris, 7e"}}, {"name": "clock", "arguments": {}}]"#,
];

/// The demo model's tokenizer with tokens for tools: as a list of calls, or each by name.
pub(super) fn talking(by_name: bool) -> Arc<Tokenizer> {
    let demo = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../models/demo/tokenizer.model"
    );
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(demo, dir.path().join("tokenizer.model")).unwrap();
    let others: &[&str] = if by_name {
        &["[ARGS]", "[CALL_ID]"]
    } else {
        &[]
    };
    let mut added = serde_json::Map::new();
    for (id, text) in (FIRST_ADDED..).zip(LIST_TOKENS.iter().chain(others)) {
        added.insert(id.to_string(), json!({ "content": text, "special": true }));
    }
    let config = json!({ "bos_token": "<s>", "eos_token": "</s>", "added_tokens_decoder": added });
    std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Arc::new(Tokenizer::from_dir(dir.path()).unwrap())
}

/// Ids of what a model says; names of control tokens stand alone.
pub(super) fn ids(tokenizer: &Tokenizer, said: &[&str]) -> Vec<u32> {
    let mut ids = Vec::new();
    for part in said {
        match tokenizer.control_id(part) {
            Some(id) => ids.push(id),
            None => ids.extend(tokenizer.encode(part).unwrap()),
        }
    }
    ids.push(tokenizer.eos_ids()[0]);
    ids
}

/// A worker that says this, in messages of one to three tokens, one more with every request.
fn saying(tokenizer: &Tokenizer, said: &[&str]) -> Script {
    let ids = ids(tokenizer, said);
    let requests = AtomicUsize::new(0);
    scripted(move |request| {
        let num = requests.fetch_add(1, Ordering::SeqCst) % 3 + 1;
        let rest = ids.get(request.num_resumed as usize..).unwrap_or_default();
        let mut steps = vec![Step::Started(0)];
        steps.extend(rest.chunks(num).map(|ids| Step::Tokens(ids.to_vec())));
        steps.push(Step::Finish(v1::FinishReason::Stop));
        Ok(steps)
    })
}

pub(super) async fn scene(by_name: bool, said: &[&str]) -> Scene {
    let tokenizer = talking(by_name);
    let worker = saying(&tokenizer, said);
    Scene::start_of(config(), vec![worker], None, tokenizer).await
}

pub(super) fn function(name: &str) -> Value {
    let parameters = json!({
        "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"],
    });
    json!({ "name": name, "description": "Something", "parameters": parameters })
}

fn tools() -> Value {
    let tool = |name| json!({ "type": "function", "function": function(name) });
    json!([tool("get_weather"), tool("clock")])
}

/// A message as a client puts it together from chunks.
fn message(chunks: &[Value]) -> (String, Vec<Value>, Value) {
    let (mut text, mut calls, mut finish) = (String::new(), Vec::<Value>::new(), Value::Null);
    for chunk in chunks {
        let choice = &chunk["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        for call in choice["delta"]["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let index = call["index"].as_u64().unwrap() as usize;
            if call["id"].is_string() {
                assert_eq!((index, &call["type"]), (calls.len(), &json!("function")));
                let function = json!({ "name": call["function"]["name"], "arguments": "" });
                calls.push(json!({ "id": call["id"], "type": "function", "function": function }));
            }
            let so_far = &mut calls[index]["function"]["arguments"];
            let more = call["function"]["arguments"].as_str().unwrap();
            *so_far = format!("{}{more}", so_far.as_str().unwrap()).into();
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    (text, calls, finish)
}

async fn streamed(response: reqwest::Response) -> (Vec<Event>, Vec<Value>) {
    let mut events = events_with_ids(response).await;
    assert_eq!(events.pop().unwrap().data, "[DONE]");
    let chunks = events
        .iter()
        .map(|e| serde_json::from_str(&e.data).unwrap());
    let chunks = chunks.collect();
    (events, chunks)
}

#[tokio::test]
async fn calls_reach_the_client_whole_and_piece_by_piece() {
    let scene = scene(false, &TWO_CALLS).await;
    let whole: Value = scene
        .chat(json!({ "tools": tools() }))
        .await
        .json()
        .await
        .unwrap();
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls", "{whole}");
    assert_eq!(choice["message"]["content"], "Let me see.");
    let calls = choice["message"]["tool_calls"].as_array().unwrap();
    assert_eq!(calls[0]["function"]["name"], "get_weather");
    assert_eq!(
        calls[0]["function"]["arguments"],
        r#"{"city": "Paris, 7e"}"#
    );
    assert_eq!(
        calls[1]["function"],
        json!({ "name": "clock", "arguments": "{}" })
    );
    for call in calls {
        assert!(
            tramontane_tokenizer::is_call_id(call["id"].as_str().unwrap()),
            "{call}"
        );
    }
    let prompt = scene.workers[0].seen.lock()[0].prompt_ids.clone();
    assert!(
        prompt.contains(&(FIRST_ADDED + 1)),
        "the tools are in the prompt"
    );

    let body = json!({ "tools": tools(), "stream": true, "logprobs": true });
    let (_, chunks) = streamed(scene.chat(body).await).await;
    let (text, streamed_calls, finish) = message(&chunks);
    assert_eq!(
        (text.as_str(), finish),
        ("Let me see.", json!("tool_calls"))
    );
    let functions = |calls: &[Value]| {
        calls
            .iter()
            .map(|c| c["function"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(functions(&streamed_calls), functions(calls));
    let num_logprobs: usize = chunks
        .iter()
        .filter_map(|c| c["choices"][0]["logprobs"]["content"].as_array())
        .map(Vec::len)
        .sum();
    assert_eq!(
        num_logprobs + 1,
        ids(&scene.tokenizer, &TWO_CALLS).len(),
        "all but the end token"
    );
    let pieces = chunks
        .iter()
        .filter(|c| c["choices"][0]["delta"]["tool_calls"].is_array());
    assert!(pieces.count() > 3, "arguments come piece by piece");
    scene.end().await;
}

#[tokio::test]
async fn calls_by_name_keep_their_ids_and_every_answer_has_its_own() {
    let said = [
        TOOL_CALLS,
        "f",
        "[CALL_ID]",
        "abcdefghi",
        "[ARGS]",
        "{\"a\": 1}",
        TOOL_CALLS,
        "g",
        "[ARGS]",
        "{}",
    ];
    let scene = scene(true, &said).await;
    let whole: Value = scene
        .chat(json!({ "tools": tools(), "n": 2 }))
        .await
        .json()
        .await
        .unwrap();
    let calls = |i: usize| whole["choices"][i]["message"]["tool_calls"].clone();
    assert_eq!(calls(0)[0]["id"], "abcdefghi", "{whole}");
    assert_eq!(
        calls(0)[0]["function"],
        json!({ "name": "f", "arguments": "{\"a\": 1}" })
    );
    assert_ne!(calls(0)[1]["id"], calls(1)[1]["id"]);
    assert_eq!(whole["choices"][0]["message"]["content"], Value::Null);
    scene.end().await;
}

#[tokio::test]
async fn a_stream_of_calls_goes_on_after_any_event_and_is_replayed_by_its_key() {
    let scene = scene(false, &TWO_CALLS).await;
    let path = "/v1/chat/completions";
    let body = json!({
        "messages": [{ "role": "user", "content": "hi" }], "stream": true, "tools": tools(),
    });
    let (whole, chunks) = streamed(scene.post(path, &body).await).await;
    let expected = message(&chunks);
    for broken in 0..whole.len() {
        let id = whole[broken].id.as_deref().unwrap();
        let (_, rest) =
            streamed(scene.post_with(path, &body, &[("last-event-id", id)]).await).await;
        let all: Vec<Value> = chunks[..=broken].iter().chain(&rest).cloned().collect();
        assert_eq!(message(&all), expected, "after {id}");
    }
    let headers = [("idempotency-key", "k")];
    let first = events(scene.post_with(path, &body, &headers).await).await;
    let num_seen = scene.workers[0].seen.lock().len();
    assert_eq!(
        events(scene.post_with(path, &body, &headers).await).await,
        first
    );
    assert_eq!(scene.workers[0].seen.lock().len(), num_seen, "made once");
    scene.end().await;
}

#[tokio::test]
async fn what_is_no_call_is_content_and_stop_strings_leave_calls_alone() {
    let bad = scene(false, &[TOOL_CALLS, "I would rather not."]).await;
    let whole: Value = bad
        .chat(json!({ "tools": tools() }))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        whole["choices"][0]["message"]["content"],
        "I would rather not."
    );
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert!(whole["choices"][0]["message"]["tool_calls"].is_null());
    // Without tools nobody looks for calls.
    let plain: Value = bad.chat(json!({})).await.json().await.unwrap();
    assert_eq!(
        plain["choices"][0]["message"]["content"],
        "I would rather not."
    );
    bad.end().await;

    let scene = scene(false, &TWO_CALLS).await;
    let body = json!({ "tools": tools(), "stop": ["Paris", "see."] });
    let whole: Value = scene.chat(body).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "Let me ");
    let body = json!({ "tools": tools(), "stop": ["Paris", "see.["] });
    let whole: Value = scene.chat(body).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "Let me see.");
    assert_eq!(
        whole["choices"][0]["message"]["tool_calls"][1]["function"]["name"],
        "clock"
    );
    scene.end().await;
}

#[tokio::test]
async fn stop_strings_do_not_cut_what_is_left_of_a_call() {
    let list = [TOOL_CALLS, r#"[{"name": "get_weather", "argu"#];
    let named = [TOOL_CALLS, "get_wea"];
    for (by_name, said) in [(false, list), (true, named)] {
        let tokenizer = talking(by_name);
        let mut cut = ids(&tokenizer, &said);
        cut.pop();
        let worker = scripted(move |_| {
            let end = Step::Finish(v1::FinishReason::Length);
            Ok(vec![Step::Started(0), Step::Tokens(cut.clone()), end])
        });
        let scene = Scene::start_of(config(), vec![worker], None, tokenizer).await;
        let mut body = json!({ "tools": tools(), "tool_choice": "required", "stop": ["t_w", "{"] });
        let whole: Value = scene.chat(body.clone()).await.json().await.unwrap();
        let choice = &whole["choices"][0];
        assert_eq!(choice["message"]["content"], said[1], "{whole}");
        assert_eq!(choice["finish_reason"], "length");
        body["stream"] = true.into();
        let (_, chunks) = streamed(scene.chat(body).await).await;
        let (text, calls, finish) = message(&chunks);
        assert_eq!((text.as_str(), finish), (said[1], json!("length")));
        assert!(calls.is_empty());
        scene.end().await;
    }
}

/// The grammar that a worker was given last.
fn grammar(scene: &Scene) -> Option<String> {
    let seen = scene.workers[0].seen.lock();
    let sampling = seen.last().unwrap().sampling.clone().unwrap();
    match sampling.constraint?.kind? {
        v1::constraint::Kind::Lark(text) => Some(text),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn the_choice_of_tools_decides_what_the_model_may_say() {
    let scene = scene(false, &TWO_CALLS).await;
    let ask = async |extra: Value| {
        let mut body = json!({ "tools": tools() });
        for (key, value) in extra.as_object().unwrap() {
            body[key] = value.clone();
        }
        let response = scene.chat(body).await;
        assert_eq!(response.status(), 200, "{extra}");
        response.json::<Value>().await.unwrap()
    };
    ask(json!({ "tool_choice": "auto" })).await;
    assert_eq!(grammar(&scene), None);
    let none = ask(json!({ "tool_choice": "none" })).await;
    assert!(none["choices"][0]["message"]["tool_calls"].is_null());
    let banned = scene.workers[0]
        .seen
        .lock()
        .last()
        .unwrap()
        .sampling
        .clone()
        .unwrap()
        .bad_words;
    assert_eq!(banned[0].ids, [FIRST_ADDED]);
    ask(json!({ "tool_choice": "required" })).await;
    let text = grammar(&scene).unwrap();
    assert!(text.starts_with("start: calls\ncalls: <[4096]> "), "{text}");
    assert!(
        text.contains("get_weather") && text.contains("clock"),
        "{text}"
    );
    ask(json!({ "tool_choice": { "type": "function", "function": { "name": "clock" } } })).await;
    let text = grammar(&scene).unwrap();
    assert!(
        !text.contains("get_weather") && text.contains("clock"),
        "{text}"
    );
    assert!(
        text.contains(r#"arguments_0: %json {"type":"object","properties":"#),
        "{text}"
    );
    let clock = json!([{ "type": "function", "function": { "name": "clock" } }]);
    for (mode, start) in [
        ("auto", "start: text | text? calls\n"),
        ("required", "start: calls\n"),
    ] {
        let allowed = json!({ "mode": mode, "tools": clock });
        ask(json!({ "tool_choice": { "type": "allowed_tools", "allowed_tools": allowed } })).await;
        let text = grammar(&scene).unwrap();
        assert!(text.starts_with(start), "{text}");
        assert!(
            !text.contains("get_weather") && text.contains("clock") && text.contains("call)*"),
            "{text}"
        );
    }
    ask(json!({ "parallel_tool_calls": false })).await;
    let text = grammar(&scene).unwrap();
    assert!(text.starts_with("start: text | text? calls\n"), "{text}");
    assert!(
        text.contains(r#"arguments_0: %json {"type":"object","x-guidance":{"whitespace_pattern":"#),
        "{text}"
    );
    scene.end().await;
}

#[tokio::test]
async fn tools_are_refused_by_name_where_they_cannot_be() {
    let demo = Scene::start(config(), vec![storyteller()]).await;
    let talking = scene(false, &TWO_CALLS).await;
    let named = json!({ "type": "function", "function": { "name": "nobody" } });
    let allowed = |mode, tools| json!({ "type": "allowed_tools", "allowed_tools": { "mode": mode, "tools": tools } });
    let web = json!([{ "type": "web_search" }]);
    let bad_name = json!([{ "type": "function", "function": { "name": "a b" } }]);
    let table = [
        (&demo, json!({ "tools": tools() }), "tools"),
        (
            &talking,
            json!({ "tool_choice": "required" }),
            "tool_choice",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": named }),
            "tool_choice",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": "any" }),
            "tool_choice",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": 5 }),
            "tool_choice",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": allowed("auto", json!([named])) }),
            "tool_choice",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": allowed("none", json!([named])) }),
            "tool_choice.allowed_tools.mode",
        ),
        (
            &talking,
            json!({ "tools": tools(), "tool_choice": allowed("auto", json!([])) }),
            "tool_choice.allowed_tools.tools",
        ),
        (&talking, json!({ "tools": web }), "tools[0].type"),
        (
            &talking,
            json!({ "tools": bad_name }),
            "tools[0].function.name",
        ),
        (
            &talking,
            json!({ "tools": [{ "type": "function" }] }),
            "tools[0].function",
        ),
        (
            &talking,
            json!({ "tools": vec![tools()[0].clone(); 129] }),
            "tools",
        ),
    ];
    for (scene, body, param) in table {
        let refused = scene.chat(body.clone()).await;
        assert_eq!(refused.status(), 400, "{param}");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    talking.end().await;
    demo.end().await;
}

#[tokio::test]
async fn what_tools_said_goes_back_to_the_model_and_is_checked() {
    let scene = scene(false, &["Sunny."]).await;
    let call = |id: &str| json!({ "id": id, "type": "function", "function": { "name": "f", "arguments": "{}" } });
    let asked = json!({ "role": "user", "content": "hi" });
    let called =
        |id: &str| json!({ "role": "assistant", "content": null, "tool_calls": [call(id)] });
    let result = |id: &str| json!({ "role": "tool", "tool_call_id": id, "content": "sunny" });
    let good = json!([asked, called("abcdefghi"), result("abcdefghi")]);
    let whole: Value = scene
        .chat(json!({ "messages": good }))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        whole["choices"][0]["message"]["content"], "Sunny.",
        "{whole}"
    );
    let prompt = scene.workers[0].seen.lock()[0].prompt_ids.clone();
    assert!(prompt.contains(&FIRST_ADDED) && prompt.contains(&(FIRST_ADDED + 3)));
    let table = [
        (
            json!([asked, called("call_1"), result("call_1")]),
            "messages[1].tool_calls[0].id",
        ),
        (
            json!([asked, called("abcdefghi"), result("x")]),
            "messages[2].tool_call_id",
        ),
        (json!([asked, called("abcdefghi")]), "messages[1].role"),
        (json!([asked, result("abcdefghi")]), "messages[1].role"),
    ];
    for (messages, param) in table {
        let refused = scene.chat(json!({ "messages": messages })).await;
        assert_eq!(refused.status(), 400, "{param}");
        let error: Value = refused.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    scene.end().await;
}

#[tokio::test]
async fn calls_go_through_the_other_door_too() {
    let scene = scene(false, &TWO_CALLS).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let tool = v1::Tool {
        name: "get_weather".to_owned(),
        parameters: function("x")["parameters"].to_string(),
        ..v1::Tool::default()
    };
    let chat = v1::ChatMessages {
        messages: vec![v1::ChatMessage {
            role: "user".to_owned(),
            content: "hi".to_owned(),
            ..v1::ChatMessage::default()
        }],
        tools: vec![tool],
        ..v1::ChatMessages::default()
    };
    let request = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(chat.clone())),
        ..v1::GenerateRequest::default()
    };
    let once = client
        .generate_once(request.clone())
        .await
        .unwrap()
        .into_inner();
    let calls = &once.answers[0].tool_calls;
    assert_eq!(calls[0].arguments, r#"{"city": "Paris, 7e"}"#);
    assert_eq!(
        (calls.len(), once.answers[0].text.as_str()),
        (2, "Let me see.")
    );
    let mut stream = client.generate(request.clone()).await.unwrap().into_inner();
    let mut arguments = String::new();
    while let Some(response) = stream.message().await.unwrap() {
        for piece in response.tool_calls.into_iter().filter(|p| p.index == 0) {
            arguments.push_str(&piece.arguments);
        }
    }
    assert_eq!(arguments, calls[0].arguments);
    let mut bad = chat;
    bad.tools[0].parameters = "[]".to_owned();
    let refused = client
        .generate_once(v1::GenerateRequest {
            input: Some(v1::generate_request::Input::Chat(bad)),
            ..v1::GenerateRequest::default()
        })
        .await
        .unwrap_err();
    let violations = refused.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, "chat.tools[0].parameters");
    scene.end().await;
}
