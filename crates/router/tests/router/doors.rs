//! What the doors do with bodies that never end, come too slowly or would become too large, at HTTP and gRPC.

use std::future::pending;

use futures::future::join_all;
use futures::stream::{iter, once};
use tonic::Code;
use tonic::codegen::Service as _;

use super::*;

const CHECK: &str = "/grpc.health.v1.Health/Check";
const GENERATE: &str = "/tramontane.v1.Inference/GenerateOnce";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const SCALE: &str = "/tramontane.v1.Admin/ScaleWorkers";

/// What becomes of a call that announces a message of `size` bytes, sends `sent` of them and never ends.
async fn half_call(mut channel: Channel, path: &str, size: u32, sent: usize) -> Code {
    let mut data = vec![0];
    data.extend(size.to_be_bytes());
    data.resize(data.len() + sent, b' ');
    let data = iter([Ok::<_, Status>(Bytes::from(data))]);
    let never = once(pending::<Result<Bytes, Status>>());
    let body = axum::body::Body::from_stream(data.chain(never));
    let request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(body))
        .unwrap();
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    let answer = tokio::time::timeout(PATIENCE, channel.call(request)).await;
    let answer = answer.unwrap_or_else(|_| panic!("{path} waits for ever"));
    let status = answer.unwrap().headers()["grpc-status"].clone();
    Code::from_bytes(status.as_bytes())
}

#[tokio::test]
async fn a_message_that_does_not_come_is_waited_for_no_longer_than_the_limit() {
    let quick = RouterConfig {
        body_timeout: Duration::from_millis(100),
        ..config()
    };
    let scene = Scene::start(quick, vec![storyteller()]).await;
    let (clients, operators) = (channel(&scene.grpc).await, channel(&scene.admin).await);
    for (channel, path) in [
        (&clients, CHECK),
        (&clients, GENERATE),
        (&clients, INFER),
        (&operators, CHECK),
        (&operators, SCALE),
    ] {
        let code = half_call(channel.clone(), path, 1000, 999).await;
        assert_eq!(code, Code::DeadlineExceeded, "{path}");
    }
    // The connections are as good as before.
    let mut client = InferenceClient::new(clients);
    let asked = client.generate_once(v1::GenerateRequest::default()).await;
    assert_eq!(asked.unwrap_err().code(), Code::InvalidArgument);
    scene.end().await;
}

#[tokio::test]
async fn a_message_that_is_too_large_is_refused_before_it_is_kept() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let channel = channel(&scene.grpc).await;
    let half = async |path, size, sent| half_call(channel.clone(), path, size, sent).await;
    assert_eq!(half(CHECK, 8192, 8000).await, Code::ResourceExhausted);
    let large = 9 << 20;
    assert_eq!(half(INFER, large, 8_400_000).await, Code::ResourceExhausted);
    // A question of reflection that is too large has no answer.
    use tonic_reflection::pb::v1 as reflection;
    let ask = reflection::server_reflection_request::MessageRequest::ListServices(String::new());
    for (size, is_answered) in [(60_000, true), (100_000, false)] {
        let question = reflection::ServerReflectionRequest {
            host: "h".repeat(size),
            message_request: Some(ask.clone()),
        };
        let channel = channel.clone();
        let mut client = reflection::server_reflection_client::ServerReflectionClient::new(channel);
        let answers = client.server_reflection_info(iter([question])).await;
        let answer = match answers {
            Ok(answers) => answers.into_inner().next().await,
            Err(status) => Some(Err(status)),
        };
        assert_eq!(matches!(answer, Some(Ok(_))), is_answered, "{size} bytes");
    }
    scene.end().await;
}

#[tokio::test]
async fn uploads_that_stand_still_hold_up_nobody() {
    let small = RouterConfig {
        body_bytes_max: 64 << 10,
        body_timeout: PATIENCE * 3,
        ..config()
    };
    let scene = Scene::start(small, vec![storyteller()]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\
                content-type: application/json\r\ncontent-length: 65000\r\n\r\n";
    let most = format!("{head}{}", " ".repeat(64_900));
    let mut stalled = Vec::new();
    for _ in 0..40 {
        stalled.push(mute_client(&scene, &most).await);
    }
    let tasks = TaskTracker::new();
    let grpc = channel(&scene.grpc).await;
    let calls: Vec<_> = (0..40)
        .map(|_| tasks.spawn(half_call(grpc.clone(), INFER, 65_000, 64_900)))
        .collect();
    // More than there is room for is on its way or waits for it: the oldest of them is told to go.
    assert_eq!(said(&mut stalled[0], 12).await, "HTTP/1.1 503");
    let asked = join_all((0..8).map(|_| scene.chat(json!({})))).await;
    for answer in asked {
        assert_eq!(answer.status(), 200);
    }
    for call in calls {
        call.abort();
    }
    drop(stalled);
    scene.end().await;
}

#[tokio::test]
async fn a_body_of_too_many_values_is_refused_and_long_prompts_of_ids_are_not() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let post = async |body: String| {
        let url = format!("{}/v1/completions", scene.http);
        let request = scene.client.post(url).body(body);
        let request = request.header("content-type", "application/json");
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, response.json::<Value>().await.unwrap())
    };
    for element in ["[]", "[0]", "{\"\":0}"] {
        let many = vec![element; 700_000].join(",");
        let (status, body) = post(format!("{{\"model\":\"demo\",\"z\":[{many}]}}")).await;
        assert_eq!(
            (status, &body["error"]["code"]),
            (413, &json!("request_too_large"))
        );
        let message = body["error"]["message"].as_str().unwrap();
        assert!(message.contains("at most 655360 commas"), "{message}");
    }
    let ids = vec!["300"; 32_768].join(",");
    let prompts = vec![format!("[{ids}]"); 4].join(",");
    let (status, body) = post(format!("{{\"model\":\"demo\",\"prompt\":[{prompts}]}}")).await;
    assert_eq!(
        (status, &body["error"]["code"]),
        (400, &json!("context_length_exceeded"))
    );
    scene.end().await;
}

#[tokio::test]
async fn a_field_of_json_in_a_message_has_a_limit_on_its_values() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let tool = v1::Tool {
        name: "f".to_owned(),
        parameters: format!("{{\"a\":[{}]}}", vec!["[0]"; 20_000].join(",")),
        ..v1::Tool::default()
    };
    let ask = |tools| v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(v1::ChatMessages {
            messages: vec![v1::ChatMessage {
                role: "user".to_owned(),
                content: "hi".to_owned(),
                ..v1::ChatMessage::default()
            }],
            tools,
            ..v1::ChatMessages::default()
        })),
        ..v1::GenerateRequest::default()
    };
    let refused = client.generate_once(ask(vec![tool.clone(), tool])).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(
        refused.message().contains("at most 65536 commas"),
        "{refused}"
    );
    scene.end().await;
}

#[tokio::test]
async fn a_stream_of_questions_gets_its_answers_as_they_come() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let channel = channel(&scene.grpc).await;
    let (ask, asked) = tokio::sync::mpsc::channel(1);
    let questions = futures::stream::unfold(asked, |mut asked| async move {
        let question = asked.recv().await?;
        Some((question, asked))
    });
    let question = || tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            tonic_reflection::pb::v1::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            ),
        ),
    };
    ask.send(question()).await.unwrap();
    let mut client =
        tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient::new(channel);
    let answers = client.server_reflection_info(questions).await.unwrap();
    let mut answers = answers.into_inner();
    for _ in 0..3 {
        assert!(answers.next().await.unwrap().is_ok());
        ask.send(question()).await.unwrap();
    }
    drop(ask);
    scene.end().await;
}

#[tokio::test]
async fn what_is_compressed_is_refused_by_name() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let chat = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let paths = [
        ("/v1/chat/completions", &chat),
        ("/tokenize", &json!({ "prompt": "hi" })),
    ];
    for (path, body) in paths {
        for encoding in ["gzip", "br", "identity, deflate", "x"] {
            let headers = [("content-encoding", encoding)];
            let refused = scene.post_with(path, body, &headers).await;
            assert_eq!(refused.status(), 415, "{path} {encoding}");
            let error: Value = refused.json().await.unwrap();
            assert_eq!(error["error"]["param"], "content-encoding");
            assert_eq!(error["error"]["code"], "unsupported_media_type");
        }
        let plain = scene.post_with(path, body, &[("content-encoding", "Identity")]);
        assert_eq!(plain.await.status(), 200, "{path}");
    }
    scene.end().await;
}

/// What the router says to these bytes until it closes the connection; nothing where it only does that.
async fn last_words(stream: TcpStream, more: Vec<u8>) -> String {
    let (mut reader, mut writer) = stream.into_split();
    let mut got = Vec::new();
    let talking = async {
        let writing = async {
            let _cut_off = writer.write_all(&more).await;
            pending::<()>().await;
        };
        tokio::select! {
            _closed_or_reset = reader.read_to_end(&mut got) => {}
            () = writing => {}
        }
    };
    let closed = tokio::time::timeout(PATIENCE, talking).await;
    assert!(closed.is_ok(), "the connection is kept");
    String::from_utf8(got).unwrap()
}

#[tokio::test]
async fn a_head_without_end_closes_its_connection_and_holds_up_nobody() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let begin = "GET /version HTTP/1.1\r\nhost: x\r\n";
    let large = format!("x-large: {}\r\n\r\n", "x".repeat(1 << 20));
    let mut many = String::new();
    for i in 0..10_000 {
        many.push_str(&format!("x-{i}: 1\r\n"));
    }
    many.push_str("\r\n");
    for rest in [large, many] {
        let (half, rest) = rest.split_at(20 << 10);
        let stream = mute_client(&scene, &format!("{begin}{half}")).await;
        assert_eq!(scene.chat(json!({})).await.status(), 200);
        let said = last_words(stream, rest.as_bytes().to_vec()).await;
        let refused = said.is_empty() || said.starts_with("HTTP/1.1 431");
        assert!(refused, "{said}");
        assert_eq!(scene.chat(json!({})).await.status(), 200);
    }
    scene.end().await;
}

#[tokio::test]
async fn chunks_of_sizes_that_are_none_are_refused() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n\
                content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    for chunk in [
        "zz\r\n",
        "-1\r\n",
        "\r\n",
        "fffffffffffffffff\r\n",
        "2\r\n{}x\r\n0\r\n\r\n",
        "0x2\r\n{}\r\n0\r\n\r\n",
    ] {
        let stream = mute_client(&scene, head).await;
        let said = last_words(stream, chunk.as_bytes().to_vec()).await;
        assert!(said.starts_with("HTTP/1.1 400"), "{chunk:?}: {said}");
    }
    assert!(scene.workers[0].seen.lock().is_empty());
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    scene.end().await;
}

/// What becomes of a call of whose message nothing comes but its size.
async fn mute_call(channel: Channel, path: &str) -> Code {
    half_call(channel, path, 8, 0).await
}

#[tokio::test]
async fn calls_of_which_no_message_comes_make_way() {
    let small = RouterConfig {
        body_bytes_max: 1024,
        body_timeout: PATIENCE * 3,
        ..config()
    };
    let scene = Scene::start(small, vec![storyteller()]).await;
    let grpc = channel(&scene.grpc).await;
    let tasks = TaskTracker::new();
    // More than there is room for, though next to nothing is sent.
    let mut calls: Vec<_> = (0..80)
        .map(|_| tasks.spawn(mute_call(grpc.clone(), GENERATE)))
        .collect();
    let first = calls.remove(0).await.unwrap();
    assert_eq!(first, Code::Unavailable);
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    for call in calls {
        call.abort();
    }
    scene.end().await;
}

#[tokio::test]
async fn who_need_not_be_known_has_less_time() {
    let slow = RouterConfig {
        body_timeout: PATIENCE * 3,
        ..config()
    };
    let scene = Scene::start(slow, vec![storyteller()]).await;
    let begin = std::time::Instant::now();
    let code = mute_call(channel(&scene.grpc).await, CHECK).await;
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(begin.elapsed() < PATIENCE / 2);
    scene.end().await;
}

#[tokio::test]
async fn heads_of_streams_have_a_limit() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    for (size, is_taken) in [(10_000, true), (20_000, false)] {
        let mut request = Request::new(v1::ListModelsRequest {});
        let long = "w".repeat(size).parse().unwrap();
        request.metadata_mut().insert("x-long", long);
        let listed = client.list_models(request).await;
        assert_eq!(listed.is_ok(), is_taken, "{size} bytes");
    }
    scene.end().await;
}

#[tokio::test]
async fn answers_that_nobody_takes_are_counted_and_hold_up_no_request() {
    let small = RouterConfig {
        body_bytes_max: 1 << 20,
        body_timeout: Duration::from_secs(4),
        ..config()
    };
    let scene = Scene::start(small, vec![storyteller()]).await;
    // No token of its own: one for each of its four bytes, and ten bytes of the answer for each token.
    let prompt = "\u{12345}".repeat(163_000);
    let body = json!({ "prompt": prompt, "return_token_strs": true });
    let size = body.to_string().len();
    let request = format!(
        "POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {size}\r\n\r\n{body}"
    );
    let mut mute = Vec::new();
    for _ in 0..5 {
        let mut stream = mute_client(&scene, &request).await;
        assert_eq!(said(&mut stream, 12).await, "HTTP/1.1 200");
        mute.push(stream);
    }
    let refused = scene.post("/tokenize", &body).await;
    assert_eq!(refused.status(), 503);
    let error: Value = refused.json().await.unwrap();
    let message = error["error"]["message"].as_str().unwrap();
    assert!(message.contains("wait for their clients"), "{message}");
    assert_eq!(scene.chat(json!({})).await.status(), 200);
    drop(mute);
    until("there is room again", async || {
        scene.post("/tokenize", &body).await.status() == 200
    })
    .await;
    scene.end().await;
}
