//! Who is let through and who is not, whatever they say.

use std::path::PathBuf;
use std::time::Duration;

use http::HeaderValue;
use serde_json::json;
use tempfile::TempDir;

use super::config::tests::jwt;
use super::jwt::tests::{TestIssuer, claims};
use super::keys::{KeyEntry, KeyHash};
use super::*;
use crate::tenants::TenantName;

const KEY: &str = "trm_0123";

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        headers.append(*name, HeaderValue::from_str(value).unwrap());
    }
    headers
}

fn line(name: &str, key: &str) -> String {
    let entry = KeyEntry {
        name: TenantName::new(name).unwrap(),
        tenant: TenantName::new("acme").unwrap(),
        hash: KeyHash::of(key),
        expires: None,
        is_operator: false,
    };
    format!("{entry}\n")
}

struct Scene {
    dir: TempDir,
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Scene {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    }

    fn open(&self, config: &AuthConfig) -> Auth {
        Auth::open(config, &self.tasks, &self.stop).unwrap()
    }

    fn with_keys(&self) -> Auth {
        let keys_file = Some(self.write("keys", &line("a", KEY)));
        self.open(&AuthConfig {
            keys_file,
            ..AuthConfig::default()
        })
    }
}

fn ask(auth: &Auth, pairs: &[(&'static str, &str)]) -> Result<String, Refusal> {
    let caller = auth.caller(&headers(pairs), SystemTime::now());
    caller.map(|caller| caller.tenant.to_string())
}

#[tokio::test]
async fn a_key_is_taken_from_any_of_its_headers_and_from_one() {
    let scene = Scene::new();
    let auth = scene.with_keys();
    let bearer = format!("Bearer {KEY}");
    for pairs in [
        vec![("authorization", bearer.as_str())],
        vec![("authorization", "bearer   trm_0123 ")],
        vec![("api-key", KEY)],
        vec![("x-api-key", KEY)],
        vec![("authorization", bearer.as_str()), ("api-key", KEY)],
    ] {
        assert_eq!(ask(&auth, &pairs).unwrap(), "acme", "{pairs:?}");
    }
    let long = "x".repeat(PROOF_BYTES_MAX + 1);
    for (pairs, expected) in [
        (vec![], Refusal::Missing),
        (vec![("authorization", KEY)], Refusal::Malformed),
        (
            vec![("authorization", "Basic trm_0123")],
            Refusal::Malformed,
        ),
        (vec![("authorization", "Bearer ")], Refusal::Malformed),
        (
            vec![("api-key", KEY), ("api-key", "trm_x")],
            Refusal::Malformed,
        ),
        (vec![("api-key", long.as_str())], Refusal::Malformed),
        (vec![("api-key", "trm_0124")], Refusal::UnknownKey),
        (vec![("api-key", "eyJh.eyJh.x")], Refusal::UnknownKey),
    ] {
        assert_eq!(ask(&auth, &pairs), Err(expected));
    }
}

#[tokio::test]
async fn without_keys_and_issuer_everybody_is_the_default_tenant() {
    let scene = Scene::new();
    let auth = scene.open(&AuthConfig::default());
    assert_eq!(
        ask(&auth, &[("authorization", "Bearer sk-x")]).unwrap(),
        "default"
    );
    assert_eq!(ask(&auth, &[]).unwrap(), "default");
}

#[tokio::test]
async fn keys_and_tokens_go_side_by_side() {
    let (scene, issuer) = (Scene::new(), TestIssuer::new());
    let jwks = scene.write("jwks.json", &issuer.jwks().to_string());
    let auth = scene.open(&AuthConfig {
        keys_file: Some(scene.write("keys", &line("a", KEY))),
        jwt: Some(jwt(jwks)),
        ..AuthConfig::default()
    });
    let token = issuer.sign(
        &json!({ "alg": "EdDSA" }),
        &claims(&json!({ "tenant": "globex" })),
    );
    assert_eq!(ask(&auth, &[("api-key", &token)]).unwrap(), "globex");
    assert_eq!(ask(&auth, &[("api-key", KEY)]).unwrap(), "acme");
    let refused = ask(&auth, &[("api-key", "a.b.c")]);
    assert_eq!(refused, Err(Refusal::Token(TokenRefusal::Malformed)));
    assert_eq!(
        ask(&auth, &[("api-key", "trm_x")]),
        Err(Refusal::UnknownKey)
    );
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_revoked_or_added_counts_soon_and_a_broken_file_changes_nothing() {
    let scene = Scene::new();
    let auth = scene.with_keys();
    let until = async |key: &str, expected: Result<String, Refusal>| {
        let waiting = async {
            while ask(&auth, &[("api-key", key)]) != expected {
                tokio::time::sleep(follow::LOOK_EVERY / 4).await;
            }
        };
        tokio::time::timeout(10 * follow::LOOK_EVERY, waiting)
            .await
            .unwrap();
    };
    scene.write(
        "keys",
        &format!("{}{}", line("a", KEY), line("b", "trm_new")),
    );
    until("trm_new", Ok("acme".to_owned())).await;
    scene.write("keys", "what is this\n");
    tokio::time::sleep(5 * follow::LOOK_EVERY).await;
    assert_eq!(ask(&auth, &[("api-key", KEY)]).unwrap(), "acme");
    scene.write("keys", &line("b", "trm_new"));
    until(KEY, Err(Refusal::UnknownKey)).await;
    assert_eq!(ask(&auth, &[("api-key", "trm_new")]).unwrap(), "acme");
    scene.stop.cancel();
    scene.tasks.close();
    tokio::time::timeout(Duration::from_secs(60), scene.tasks.wait())
        .await
        .unwrap();
}

#[tokio::test(start_paused = true)]
async fn keys_whose_file_stays_broken_let_nobody_in_until_it_is_mended() {
    let scene = Scene::new();
    let auth = scene.with_keys();
    scene.write("keys", "what is this\n");
    tokio::time::sleep(follow::UNUSABLE_MAX - follow::LOOK_EVERY).await;
    assert_eq!(ask(&auth, &[("api-key", KEY)]).unwrap(), "acme");
    tokio::time::sleep(4 * follow::LOOK_EVERY).await;
    for key in [KEY, "trm_x"] {
        assert_eq!(ask(&auth, &[("api-key", key)]), Err(Refusal::NoKeys));
    }
    assert_eq!(ask(&auth, &[]), Err(Refusal::Missing));
    scene.write("keys", &line("a", KEY));
    tokio::time::sleep(2 * follow::LOOK_EVERY).await;
    assert_eq!(ask(&auth, &[("api-key", KEY)]).unwrap(), "acme");
}

#[tokio::test]
async fn a_file_that_cannot_be_used_at_the_start_ends_it_by_name() {
    let scene = Scene::new();
    let open = |config: &AuthConfig| {
        let opened = Auth::open(config, &scene.tasks, &scene.stop);
        opened.unwrap_err().to_string()
    };
    let missing = AuthConfig {
        keys_file: Some(scene.dir.path().join("none")),
        ..AuthConfig::default()
    };
    assert!(open(&missing).starts_with("auth.keys_file must be a file that can be read"));
    let broken = AuthConfig {
        keys_file: Some(scene.write("broken", "a b\n")),
        ..AuthConfig::default()
    };
    assert!(
        open(&broken).contains("line 1 of the file of keys"),
        "{}",
        open(&broken)
    );
    let jwks = AuthConfig {
        jwt: Some(jwt(scene.write("jwks", "{}"))),
        ..AuthConfig::default()
    };
    assert!(open(&jwks).starts_with("auth.jwt.jwks_file must be"));
}

#[test]
fn what_is_public_is_exactly_what_is_listed() {
    for path in ["/metrics", "/health/live", "/grpc.health.v1.Health/Check"] {
        assert!(is_listed(&PUBLIC, path), "{path}");
    }
    for path in [
        "/",
        "/metrics/",
        "//metrics",
        "/metrics/../v1/models",
        "/health",
        "/health/live/x",
        "/grpc.health.v1.Health",
        "/grpc.health.v1.HealthX/Check",
        "/METRICS",
        "/v1/models",
    ] {
        assert!(!is_listed(&PUBLIC, path), "{path}");
    }
}

#[test]
fn a_refusal_says_what_to_do_and_nothing_of_what_was_sent() {
    assert_eq!(Refusal::Missing.error().kind, ErrorKind::Unauthenticated);
    assert_eq!(Refusal::Forbidden.error().kind, ErrorKind::Forbidden);
    for away in [Refusal::NoIssuer, Refusal::NoKeys] {
        assert_eq!(away.error().kind, ErrorKind::Unavailable);
    }
    let tenant = Refusal::Token(TokenRefusal::Tenant).error();
    assert_eq!(tenant.kind, ErrorKind::Forbidden);
}
