//! A trace that begins at a client goes on at the worker, through either door.

use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt as _;

use super::*;

const OVER_HTTP: &str = "0af7651916cd43dd8448eb211c80319c";
const OVER_GRPC: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn parent(trace: &str) -> String {
    format!("00-{trace}-b7ad6b7169203331-01")
}

#[tokio::test]
async fn a_clients_trace_reaches_the_worker_through_both_doors() {
    // While there is one subscriber only, a span that a test on another thread makes first is off for all threads.
    let _another = tracing::Dispatch::new(tracing_subscriber::registry());
    let tracer = SdkTracerProvider::builder().build().tracer("test");
    let layer = tracing_opentelemetry::layer().with_tracer(tracer);
    // Of this thread, which is all that this test has.
    let _traced = tracing::subscriber::set_default(tracing_subscriber::registry().with(layer));
    let scene = Scene::start(config(), vec![storyteller()]).await;

    let body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let said = parent(OVER_HTTP);
    let headers = [("traceparent", said.as_str()), ("tracestate", "v=secret")];
    let response = scene
        .post_with("/v1/chat/completions", &body, &headers)
        .await;
    assert_eq!(response.status(), 200);

    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let mut request = Request::new(plain(v1::GenerateOptions::default()));
    let said = parent(OVER_GRPC).parse().unwrap();
    request.metadata_mut().insert("traceparent", said);
    client.generate_once(request).await.unwrap();

    let parents = scene.workers[0].parents.lock().clone();
    let traces: Vec<&str> = parents.iter().map(|parent| &parent[3..35]).collect();
    assert_eq!(traces, [OVER_HTTP, OVER_GRPC]);
    // In a span of the router's, not in the client's.
    assert!(
        parents
            .iter()
            .all(|parent| !parent.contains("b7ad6b7169203331"))
    );
    scene.end().await;
}
