//! Nobody gets through either door who is not known, to whatever path; and what is whose stays whose.

use std::collections::BTreeSet;

use prost_types::FileDescriptorSet;
use tempfile::TempDir;
use tramontane_router::auth::keys::{KeyEntry, KeyHash};
use tramontane_router::tenants::TenantName;
use tramontane_router::{AuthConfig, TenantConfig};

use super::*;

const ACME: &str = "trm_acme";
const GLOBEX: &str = "trm_globex";
const OPERATOR: &str = "trm_operator";

/// A router that knows three keys: of two tenants, and of an operator.
pub(super) fn guarded(change: impl FnOnce(&mut RouterConfig)) -> (RouterConfig, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let mut text = String::new();
    for (tenant, key) in [("acme", ACME), ("globex", GLOBEX), ("ops", OPERATOR)] {
        let tenant = TenantName::new(tenant).unwrap();
        let entry = KeyEntry {
            name: tenant.clone(),
            tenant,
            hash: KeyHash::of(key),
            expires: None,
            is_operator: key == OPERATOR,
        };
        text.push_str(&format!("{entry}\n"));
    }
    let file = dir.path().join("keys");
    std::fs::write(&file, text).unwrap();
    let mut config = config();
    config.auth = AuthConfig {
        keys_file: Some(file),
        ..AuthConfig::default()
    };
    change(&mut config);
    (config, dir)
}

async fn guarded_scene() -> (Scene, TempDir) {
    let (config, dir) = guarded(|_| ());
    (Scene::start(config, vec![storyteller()]).await, dir)
}

pub(super) async fn chat_as(
    scene: &Scene,
    key: &str,
    headers: &[(&str, &str)],
) -> reqwest::Response {
    let body = json!({ "messages": [{ "role": "user", "content": "hi" }] });
    let bearer = format!("Bearer {key}");
    let mut all = vec![("authorization", bearer.as_str())];
    all.extend_from_slice(headers);
    scene.post_with("/v1/chat/completions", &body, &all).await
}

/// Paths that the router's source gives routes to.
fn routes_in_the_source() -> BTreeSet<String> {
    let source = include_str!("../../src/routes.rs")
        .split_whitespace()
        .collect::<String>();
    let pieces = source.split(".route(\"").skip(1);
    let paths = pieces.filter_map(|piece| piece.split('"').next());
    paths.map(|path| path.replace("{*id}", "demo")).collect()
}

/// The class "ways around authentication" of docs/security.md: CVE-2026-48746, CVE-2026-24206, CVE-2026-24207.
#[tokio::test]
async fn every_http_route_is_closed_save_those_that_are_listed() {
    let (scene, _dir) = guarded_scene().await;
    let mut paths = routes_in_the_source();
    assert!(paths.len() >= 8, "{paths:?}");
    let public = ["/health/live", "/health/ready", "/metrics"];
    for path in public {
        assert!(paths.remove(path), "{path}");
        assert_eq!(scene.get(path).await.status(), 200, "{path}");
    }
    paths.extend(["/", "/nothing", "/v1/nothing", "/metrics/", "/health"].map(str::to_owned));
    for path in paths {
        let responses = [
            scene.get(&path).await,
            scene.post(&path, &json!({})).await,
            scene
                .post_with(&path, &json!({}), &[("api-key", "trm_wrong")])
                .await,
        ];
        for response in responses {
            assert_eq!(response.status(), 401, "{path}");
            assert!(
                response.headers()["www-authenticate"]
                    .to_str()
                    .unwrap()
                    .starts_with("Bearer")
            );
            assert_eq!(response.headers()["x-should-retry"], "false");
            assert!(response.headers().contains_key("x-request-id"));
            let body: Value = response.json().await.unwrap();
            assert_eq!(body["error"]["type"], "authentication_error");
            assert_eq!(body["error"]["code"], "invalid_api_key");
        }
    }
    for path in routes_in_the_source()
        .iter()
        .filter(|path| !public.contains(&path.as_str()))
    {
        for method in [
            "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "MADEUP",
        ] {
            let method = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
            let url = format!("{}{path}", scene.http);
            let request = scene.client.request(method.clone(), url);
            let response = tokio::time::timeout(PATIENCE, request.send()).await;
            let status = response.unwrap().unwrap().status();
            assert_eq!(status, 401, "{method} {path}");
        }
    }
    let known = chat_as(&scene, ACME, &[]).await;
    assert_eq!(known.status(), 200);
    let nothing = scene
        .post_with("/v1/nothing", &json!({}), &[("x-api-key", ACME)])
        .await;
    assert_eq!(nothing.status(), 404);
    scene.end().await;
}

/// Every method of every service that the descriptors know, and some that nobody does.
fn grpc_paths() -> Vec<String> {
    let mut paths = vec![
        "/nothing.Nothing/Nothing".to_owned(),
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo".to_owned(),
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo".to_owned(),
    ];
    let set: FileDescriptorSet = prost::Message::decode(tramontane_proto::DESCRIPTORS).unwrap();
    for file in set.file {
        for service in &file.service {
            for method in &service.method {
                let (package, service) = (file.package(), service.name());
                paths.push(format!("/{package}.{service}/{}", method.name()));
            }
        }
    }
    paths
}

async fn grpc_status(client: &reqwest::Client, url: &str, key: Option<&str>) -> String {
    let mut request = client
        .post(url)
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(vec![0; 5]);
    if let Some(key) = key {
        request = request.header("authorization", format!("Bearer {key}"));
    }
    let response = tokio::time::timeout(PATIENCE, request.send())
        .await
        .unwrap()
        .unwrap();
    let status = response.headers().get("grpc-status");
    status.map_or_else(String::new, |status| status.to_str().unwrap().to_owned())
}

#[tokio::test]
async fn every_grpc_method_is_closed_save_health() {
    let (scene, _dir) = guarded_scene().await;
    let _chosen = client();
    let client = reqwest::Client::builder()
        .http2_prior_knowledge()
        .build()
        .unwrap();
    let paths = grpc_paths();
    assert!(paths.len() > 20, "{paths:?}");
    for path in paths {
        for door in [&scene.grpc, &scene.admin] {
            let url = format!("{door}{path}");
            for key in [None, Some("trm_wrong")] {
                assert_eq!(grpc_status(&client, &url, key).await, "16", "{url}");
            }
            if path.contains("v1.Admin/") {
                assert_eq!(grpc_status(&client, &url, Some(ACME)).await, "7", "{url}");
            }
        }
    }
    let admin = format!("{}/tramontane.v1.Admin/ClusterStatus", scene.admin);
    // Its answer has a message, so the status comes behind it.
    assert_eq!(grpc_status(&client, &admin, Some(OPERATOR)).await, "");
    let mut health = HealthClient::new(channel(&scene.grpc).await);
    let asked = HealthCheckRequest::default();
    let serving = health.check(asked).await.unwrap().into_inner().status;
    assert_eq!(serving, ServingStatus::Serving as i32);
    scene.end().await;
}

#[tokio::test]
async fn a_grpc_caller_is_known_by_its_metadata() {
    let (scene, _dir) = guarded_scene().await;
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let refused = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    assert_eq!(
        refused.get_details_error_info().unwrap().reason,
        "UNAUTHENTICATED"
    );
    let mut request = Request::new(plain(v1::GenerateOptions::default()));
    let bearer = format!("Bearer {GLOBEX}");
    request
        .metadata_mut()
        .insert("authorization", bearer.parse().unwrap());
    client.generate_once(request).await.unwrap();
    let salt = scene.workers[0].seen.lock()[0].cache_salt;
    assert_ne!(salt, 0);
    scene.end().await;
}

/// CVE-2025-46570, CVE-2026-105755: what one tenant has cached is told to another, by its time or by an id.
#[tokio::test]
async fn tenants_share_neither_cached_prompts_nor_kept_answers() {
    let (scene, _dir) = guarded_scene().await;
    let retry = [("idempotency-key", "the same")];
    let mut answers = Vec::new();
    for key in [ACME, ACME, GLOBEX] {
        let response = chat_as(&scene, key, &retry).await;
        assert_eq!(response.status(), 200);
        answers.push(response.json::<Value>().await.unwrap()["id"].clone());
    }
    let salts: Vec<u64> = scene.workers[0]
        .seen
        .lock()
        .iter()
        .map(|r| r.cache_salt)
        .collect();
    // The second had the answer of the first; the third had its own made.
    assert_eq!(salts.len(), 2);
    assert_ne!(salts[0], salts[1]);
    assert!(!salts.contains(&0));
    scene.end().await;
    let open = Scene::start(config(), vec![storyteller()]).await;
    assert_eq!(chat_as(&open, "anything", &[]).await.status(), 200);
    assert_eq!(open.workers[0].seen.lock()[0].cache_salt, 0);
    open.end().await;
}

#[tokio::test]
async fn a_quota_is_shown_and_who_has_used_it_up_is_told_when_to_come_back() {
    let (config, _dir) = guarded(|config| {
        let limited = TenantConfig {
            requests_per_minute: Some(2),
            tokens_per_minute: Some(100_000),
            ..TenantConfig::default()
        };
        config.tenants.insert("acme".to_owned(), limited);
    });
    let scene = Scene::start(config, vec![storyteller()]).await;
    let first = chat_as(&scene, ACME, &[]).await;
    assert_eq!(first.headers()["x-ratelimit-limit-requests"], "2");
    assert_eq!(first.headers()["x-ratelimit-remaining-requests"], "1");
    assert_eq!(first.headers()["x-ratelimit-limit-tokens"], "100000");
    assert!(first.headers().contains_key("openai-processing-ms"));
    let left: u64 = first.headers()["x-ratelimit-remaining-tokens"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!(left < 100_000, "{left}");
    assert_eq!(chat_as(&scene, ACME, &[]).await.status(), 200);
    let refused = chat_as(&scene, ACME, &[]).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.headers()["x-should-retry"], "true");
    assert_eq!(refused.headers()["x-ratelimit-remaining-requests"], "0");
    let wait: u64 = refused.headers()["retry-after-ms"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    assert!((1..=30_001).contains(&wait), "{wait}");
    // Others go on.
    let other = chat_as(&scene, GLOBEX, &[]).await;
    assert_eq!(other.status(), 200);
    assert!(!other.headers().contains_key("x-ratelimit-limit-requests"));
    let mut client = InferenceClient::new(channel(&scene.grpc).await);
    let mut request = Request::new(plain(v1::GenerateOptions::default()));
    request
        .metadata_mut()
        .insert("x-api-key", ACME.parse().unwrap());
    let refused = client.generate_once(request).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
    let details = refused.get_error_details();
    assert!(details.retry_info().unwrap().retry_delay.is_some());
    assert_eq!(
        details.quota_failure().unwrap().violations[0].subject,
        "tenant"
    );
    let page = scene.get("/metrics").await.text().await.unwrap();
    let line =
        "tramontane_router_tenant_refusals_total{tenant=\"acme\",reason=\"QUOTA_EXCEEDED\"} 2";
    assert!(page.contains(line), "{page}");
    assert!(
        page.contains("tramontane_router_tenant_admitted_total{tenant=\"other\"} 1"),
        "{page}"
    );
    assert!(!page.contains("trm_"), "{page}");
    scene.end().await;
}

#[tokio::test]
async fn a_tenant_with_ten_times_the_requests_gets_no_more_than_its_share() {
    let (gate, slow) = gated();
    let (config, _dir) = guarded(|config| config.sequences_max = 2);
    let scene = Arc::new(Scene::start(config, vec![slow]).await);
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..110 {
        let (asking, key) = (Arc::clone(&scene), if number < 100 { ACME } else { GLOBEX });
        asked.spawn(async move { chat_as(&asking, key, &[]).await.status() });
        if number == 1 {
            let seen = &scene.workers[0].seen;
            until("the places are taken", async || seen.lock().len() == 2).await;
        }
    }
    let waiting = async || {
        let page = scene.get("/metrics").await.text().await.unwrap();
        page.contains("vllm:num_requests_waiting{model_name=\"demo\"} 108")
    };
    until("all others wait", waiting).await;
    gate.add_permits(200);
    while let Some(status) = asked.join_next().await {
        assert_eq!(status.unwrap(), 200);
    }
    let seen: Vec<u64> = scene.workers[0]
        .seen
        .lock()
        .iter()
        .map(|r| r.cache_salt)
        .collect();
    let acme = seen[0];
    let others = |part: &[u64]| part.iter().filter(|&&salt| salt != acme).count();
    // Ten of the ninety-nine that waited are the other tenant's: all among the first twenty or so.
    assert_eq!(others(&seen), 10);
    assert!(others(&seen[2..25]) >= 9, "{seen:?}");
    Arc::into_inner(scene).unwrap().end().await;
}
