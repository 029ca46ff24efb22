//! Messages that cannot be decoded, metadata that is too large, and the names that calls have.

use http_body_util::BodyExt as _;
use prost::Message as _;
use tonic::Code;
use tonic::codegen::Service as _;
use tonic::transport::Endpoint;

use super::*;

const GENERATE: &str = "/tramontane.v1.Inference/GenerateOnce";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const SCALE: &str = "/tramontane.v1.Admin/ScaleWorkers";

/// A message as it goes over the wire.
fn framed(message: &[u8]) -> Vec<u8> {
    let size = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &size[..], message].concat()
}

/// What a call with this body is answered.
async fn called(
    channel: &mut Channel,
    path: &str,
    body: Vec<u8>,
    header: (&str, &str),
) -> http::Response<tonic::body::Body> {
    let request = http::Request::post(path)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header(header.0, header.1)
        .body(tonic::body::Body::new(axum::body::Body::from(body)))
        .unwrap();
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    let answer = tokio::time::timeout(PATIENCE, channel.call(request)).await;
    answer.unwrap().unwrap()
}

async fn refused(channel: &mut Channel, path: &str, body: Vec<u8>) -> Status {
    let (parts, body) = called(channel, path, body, ("x-any", "1"))
        .await
        .into_parts();
    let rest = body.collect().await.unwrap();
    let in_trailers = rest.trailers().and_then(Status::from_header_map);
    let status = Status::from_header_map(&parts.headers).or(in_trailers);
    status.unwrap()
}

/// A conversation whose content is not UTF-8.
fn spoilt_conversation() -> Vec<u8> {
    let mut message = vec![0x22, 12];
    // messages, of role `user` and content.
    message.extend([0x0a, 10]);
    message.extend(b"\x0a\x04user\x12\x02\xff\xfe");
    message
}

#[tokio::test]
async fn what_cannot_be_decoded_is_the_callers_fault() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut clients = channel(&scene.grpc).await;
    let mut operators = channel(&scene.admin).await;
    let groups = [[0xfb, 1].repeat(101), [0xfc, 1].repeat(101)].concat();
    let cut = framed(b"\x12\x05hello")[..8].to_vec();
    let table = [
        (GENERATE, framed(b"\x12\x02\xff\xfe"), "prompt"),
        (
            GENERATE,
            framed(&spoilt_conversation()),
            "chat.messages.content",
        ),
        (GENERATE, framed(b"\x12\x80"), "prompt"),
        (
            GENERATE,
            framed(&[b"\x12", &[0xff; 10][..]].concat()),
            "prompt",
        ),
        (GENERATE, framed(b"\x12\x05hi"), "prompt"),
        (GENERATE, framed(b"\x10\x01"), "prompt"),
        (GENERATE, framed(b"\x2a\x02\x0d\x00"), "options.temperature"),
        (GENERATE, framed(b"\x00\x00"), "message"),
        (GENERATE, framed(b"\x17"), "message"),
        (GENERATE, framed(&groups), "message"),
        (GENERATE, cut, "message"),
        (GENERATE, Vec::new(), "message"),
        (INFER, framed(b"\x0a\x01\xff"), "model_name"),
        (CHECK, framed(b"\x0a\x01\xff"), "service"),
    ];
    for (path, body, field) in table {
        let shown = format!("{path} {body:02x?}");
        let status = refused(&mut clients, path, body).await;
        says_invalid(&status, field, &shown);
    }
    let status = refused(&mut operators, SCALE, framed(b"\x09\x00")).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    // As many as are allowed are passed over.
    let groups = [[0xfb, 1].repeat(99), [0xfc, 1].repeat(99)].concat();
    let status = refused(&mut clients, GENERATE, framed(&groups)).await;
    says_invalid(&status, "input", "99 groups");
    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[track_caller]
fn says_invalid(status: &Status, field: &str, shown: &str) {
    assert_eq!(status.code(), Code::InvalidArgument, "{shown}: {status:?}");
    let details = status.get_error_details();
    let info = details.error_info().unwrap();
    assert_eq!(
        (info.reason.as_str(), info.domain.as_str()),
        ("INVALID_PARAMETER", "tramontane"),
        "{shown}"
    );
    let violations = &details.bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, field, "{shown}: {status:?}");
}

#[tokio::test]
async fn a_choice_of_tools_that_nobody_knows_is_refused_by_name() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let chat = v1::ChatMessages {
        messages: vec![v1::ChatMessage {
            role: "user".to_owned(),
            content: "hi".to_owned(),
            ..v1::ChatMessage::default()
        }],
        tool_choice: Some(v1::ToolChoice {
            kind: Some(v1::tool_choice::Kind::Mode(77)),
            ..v1::ToolChoice::default()
        }),
        ..v1::ChatMessages::default()
    };
    let request = v1::GenerateRequest {
        input: Some(v1::generate_request::Input::Chat(chat)),
        ..v1::GenerateRequest::default()
    };
    let status = client.generate_once(request).await.unwrap_err();
    says_invalid(&status, "chat.tool_choice.mode", "mode 77");
    scene.end().await;
}

#[tokio::test]
async fn metadata_that_is_too_large_is_refused_and_its_connection_serves_on() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut clients = channel(&scene.grpc).await;
    let large = "x".repeat(20 << 10);
    let answer = called(&mut clients, GENERATE, framed(b""), ("x-large", &large)).await;
    assert_eq!(answer.status(), 431);
    let status = refused(&mut clients, GENERATE, framed(b"")).await;
    says_invalid(&status, "input", "the call behind it");
    scene.end().await;
}

/// The name of a call in its metadata.
fn name(metadata: &tonic::metadata::MetadataMap) -> String {
    metadata
        .get("x-request-id")
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned()
}

/// The name in an error, which its metadata has too.
#[track_caller]
fn name_in(status: &Status) -> String {
    let details = status.get_error_details();
    details.request_info().unwrap().request_id.clone()
}

#[tokio::test]
async fn every_call_has_a_name_in_its_metadata_its_error_and_its_answer() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let mut asked = Request::new(plain(v1::GenerateOptions::default()));
    let chosen = "chosen-by-the-client".parse().unwrap();
    asked.metadata_mut().insert("x-request-id", chosen);
    let once = client.generate_once(asked).await.unwrap();
    let id = name(once.metadata());
    let digits = id.strip_prefix("req_").unwrap();
    assert_eq!(once.get_ref().id, format!("gen-{digits}"));
    let seen = scene.workers[0].seen.lock()[0].request_id.clone();
    assert!(seen.contains(&id), "{seen}");
    let stream = client.generate(plain(v1::GenerateOptions::default())).await;
    assert_ne!(name(stream.unwrap().metadata()), id);
    // Whoever refuses it: the method, the layer that reads messages, nobody.
    let wrong = v1::GenerateOptions {
        n: Some(1000),
        ..v1::GenerateOptions::default()
    };
    let status = client.generate(plain(wrong)).await.unwrap_err();
    assert_eq!(name_in(&status), name(status.metadata()));
    let mut channel = channel(&scene.grpc).await;
    for (path, body) in [
        (GENERATE, framed(b"\x10\x01")),
        (SCALE, framed(b"")),
        ("/no.Such/Method", framed(b"")),
    ] {
        let status = refused(&mut channel, path, body).await;
        assert_eq!(name_in(&status), name(status.metadata()), "{status:?}");
    }
    scene.end().await;
}

#[tokio::test]
async fn an_error_in_the_midst_of_a_stream_has_the_name_of_its_call() {
    let broken = scripted(|request| match request.num_resumed {
        0 => Ok(vec![Step::Started(0), Step::Token(300), Step::Break]),
        _ => Err(Status::unavailable("gone")),
    });
    let scene = Scene::start(config(), vec![broken]).await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let stream = client.generate(plain(v1::GenerateOptions::default())).await;
    let stream = stream.unwrap();
    let id = name(stream.metadata());
    let mut stream = stream.into_inner();
    let status = loop {
        match stream.message().await {
            Ok(Some(_token)) => {}
            Ok(None) => panic!("the stream ends well"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(name_in(&status), id);
    let details = status.get_error_details();
    assert_eq!(details.error_info().unwrap().reason, "UNAVAILABLE");
    assert!(details.retry_info().is_some());
    scene.end().await;
}

#[tokio::test]
async fn answers_that_nobody_takes_are_counted_as_over_http() {
    let config = RouterConfig {
        body_bytes_max: 64 << 10,
        body_timeout: Duration::from_secs(1),
        ..config()
    };
    let scene = Scene::start(config, vec![storyteller()]).await;
    let size = |id: &u32| scene.tokenizer.token_bytes(*id).map_or(0, <[u8]>::len);
    let longest = (300..4000).max_by_key(size).unwrap();
    let ids = vec![longest; 30_000];
    let answer_bytes = ids.len() * size(&longest);
    assert!(
        answer_bytes > 64 << 10,
        "{answer_bytes} bytes are not counted"
    );
    let asked = framed(&v1::DetokenizeRequest { ids }.encode_to_vec());
    let path = "/tramontane.v1.Inference/Detokenize";
    // Each answer is sent as far as its window goes.
    let endpoint = Endpoint::from_shared(scene.grpc.clone()).unwrap();
    let endpoint = endpoint
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(16 << 20);
    let mut channel = endpoint.connect().await.unwrap();
    let mut untaken = Vec::new();
    let room = 32 * (64 << 10);
    for _ in 0..room / answer_bytes {
        untaken.push(called(&mut channel, path, asked.clone(), ("x-any", "1")).await);
    }
    let status = refused(&mut channel, path, asked.clone()).await;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert!(status.message().contains("large answers"), "{status:?}");
    drop(untaken.pop());
    let taken = refused(&mut channel, path, asked).await;
    assert_eq!(taken.code(), Code::Ok, "{taken:?}");
    drop(untaken);
    scene.end().await;
}
