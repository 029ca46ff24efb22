//! Tokens that are signed here and now, and what becomes of those that are not as they should be.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
};
use serde_json::json;

use super::*;
use crate::auth::config::tests::jwt;

const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// Base64 for URLs, without padding.
pub(crate) fn base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let mut word = [0; 4];
        word[1..=chunk.len()].copy_from_slice(chunk);
        let word = u32::from_be_bytes(word);
        for i in 0..=chunk.len() {
            text.push(char::from(DIGITS[(word >> (18 - 6 * i)) as usize & 63]));
        }
    }
    text
}

/// An issuer with an Ed25519 key `e` and a P-256 key `p`.
pub(crate) struct TestIssuer {
    ed: Ed25519KeyPair,
    ec: EcdsaKeyPair,
    random: SystemRandom,
}

impl TestIssuer {
    pub(crate) fn new() -> Self {
        let random = SystemRandom::new();
        let ed = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        let signing = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let ec = EcdsaKeyPair::generate_pkcs8(signing, &random).unwrap();
        Self {
            ed: Ed25519KeyPair::from_pkcs8(ed.as_ref()).unwrap(),
            ec: EcdsaKeyPair::from_pkcs8(signing, ec.as_ref(), &random).unwrap(),
            random,
        }
    }

    pub(crate) fn jwks(&self) -> Value {
        let point = self.ec.public_key().as_ref();
        json!({ "keys": [
            { "kty": "OKP", "crv": "Ed25519", "kid": "e", "x": base64(self.ed.public_key().as_ref()) },
            { "kty": "EC", "crv": "P-256", "kid": "p", "alg": "ES256", "use": "sig",
              "x": base64(&point[1..33]), "y": base64(&point[33..]) },
            { "kty": "oct", "kid": "s", "k": base64(b"a secret that somebody published") },
            { "kty": "new", "kid": "n" },
        ] })
    }

    /// A token with this header and these claims, signed with the key of the header's algorithm.
    pub(crate) fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = format!(
            "{}.{}",
            base64(header.to_string().as_bytes()),
            base64(claims.to_string().as_bytes())
        );
        let signature = match header["alg"].as_str() {
            Some("ES256") => {
                let signature = self.ec.sign(&self.random, message.as_bytes()).unwrap();
                base64(signature.as_ref())
            }
            _ => base64(self.ed.sign(message.as_bytes()).as_ref()),
        };
        format!("{message}.{signature}")
    }
}

pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Claims of a good token, with changes.
pub(crate) fn claims(changes: &Value) -> Value {
    let mut claims = json!({
        "iss": "https://issuer", "aud": "tramontane", "tenant": "acme", "exp": now() + 300,
    });
    for (key, value) in changes.as_object().unwrap() {
        claims[key] = value.clone();
    }
    claims
}

struct Scene {
    issuer: TestIssuer,
    rules: TokenRules,
    keys: IssuerKeys,
}

impl Scene {
    fn new() -> Self {
        let issuer = TestIssuer::new();
        Self {
            rules: TokenRules::new(jwt(PathBuf::from("jwks.json"))),
            keys: IssuerKeys::parse(issuer.jwks().to_string().as_bytes()).unwrap(),
            issuer,
        }
    }

    fn check(&self, token: &str) -> Result<String, TokenRefusal> {
        let tenant = self.rules.tenant(token, &self.keys);
        tenant.map(|tenant| tenant.to_string())
    }

    fn of(&self, header: &Value, changes: &Value) -> Result<String, TokenRefusal> {
        self.check(&self.issuer.sign(header, &claims(changes)))
    }
}

#[test]
fn good_tokens_of_both_kinds_of_keys_name_their_tenant() {
    let scene = Scene::new();
    for header in [
        json!({ "alg": "EdDSA", "kid": "e" }),
        json!({ "alg": "ES256", "kid": "p", "typ": "JWT" }),
        // One key of the kind: no name is needed.
        json!({ "alg": "EdDSA" }),
    ] {
        assert_eq!(scene.of(&header, &json!({})).unwrap(), "acme", "{header}");
    }
    let many = json!({ "aud": ["x", "tramontane"], "nbf": now() - 5 });
    scene.of(&json!({ "alg": "EdDSA" }), &many).unwrap();
}

#[test]
fn what_a_token_says_must_be_right() {
    let scene = Scene::new();
    let header = json!({ "alg": "EdDSA", "kid": "e" });
    for (changes, expected) in [
        (json!({ "exp": now() - 61 }), TokenRefusal::Expired),
        (json!({ "exp": null }), TokenRefusal::Malformed),
        (json!({ "exp": "soon" }), TokenRefusal::Malformed),
        (json!({ "nbf": now() + 120 }), TokenRefusal::NotYet),
        (json!({ "iss": "https://other" }), TokenRefusal::Issuer),
        (json!({ "iss": null }), TokenRefusal::Issuer),
        (json!({ "aud": "other" }), TokenRefusal::Audience),
        (json!({ "aud": null }), TokenRefusal::Audience),
        (json!({ "tenant": null }), TokenRefusal::Tenant),
        (json!({ "tenant": "a/../b" }), TokenRefusal::Tenant),
        (json!({ "tenant": 7 }), TokenRefusal::Tenant),
    ] {
        assert_eq!(scene.of(&header, &changes), Err(expected), "{changes}");
    }
    // Within the leeway.
    scene.of(&header, &json!({ "exp": now() - 30 })).unwrap();
}

#[test]
fn headers_that_would_weaken_the_check_are_refused() {
    let scene = Scene::new();
    for (header, expected) in [
        (json!({ "alg": "none" }), TokenRefusal::Malformed),
        (
            json!({ "alg": "NONE", "kid": "e" }),
            TokenRefusal::Malformed,
        ),
        (
            json!({ "alg": "HS256", "kid": "e" }),
            TokenRefusal::Algorithm,
        ),
        (
            json!({ "alg": "HS256", "kid": "s" }),
            TokenRefusal::Algorithm,
        ),
        // Known, but not allowed here.
        (json!({ "alg": "ES384" }), TokenRefusal::Algorithm),
        // The other kind of key under this name.
        (
            json!({ "alg": "ES256", "kid": "e" }),
            TokenRefusal::UnknownKey,
        ),
        (
            json!({ "alg": "EdDSA", "kid": "../../etc/passwd" }),
            TokenRefusal::UnknownKey,
        ),
        (
            json!({ "alg": "EdDSA", "kid": "s" }),
            TokenRefusal::UnknownKey,
        ),
        (
            json!({ "alg": "EdDSA", "crit": ["exp"] }),
            TokenRefusal::Malformed,
        ),
    ] {
        assert_eq!(scene.of(&header, &json!({})), Err(expected), "{header}");
    }
}

#[test]
fn a_key_that_a_token_brings_along_is_not_looked_at() {
    let (scene, other) = (Scene::new(), TestIssuer::new());
    let header = json!({
        "alg": "EdDSA", "kid": "e", "jku": "https://evil/jwks.json", "jwk": other.jwks()["keys"][0],
    });
    let token = other.sign(&header, &claims(&json!({})));
    assert_eq!(scene.check(&token), Err(TokenRefusal::Signature));
}

#[test]
fn a_public_key_is_no_secret_of_an_hmac() {
    // Signed with HMAC keyed by the public key, which everybody has.
    let scene = Scene::new();
    let public = scene.issuer.ed.public_key().as_ref();
    let head = base64(br#"{"alg":"HS256","kid":"e"}"#);
    let message = format!(
        "{head}.{}",
        base64(claims(&json!({})).to_string().as_bytes())
    );
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, public);
    let signature = base64(ring::hmac::sign(&key, message.as_bytes()).as_ref());
    let token = format!("{message}.{signature}");
    assert_eq!(scene.check(&token), Err(TokenRefusal::Algorithm));
}

#[test]
fn what_is_changed_cut_or_stuck_together_is_no_token() {
    let scene = Scene::new();
    let good = scene
        .issuer
        .sign(&json!({ "alg": "EdDSA" }), &claims(&json!({})));
    let parts: Vec<&str> = good.split('.').collect();
    let others = base64(
        claims(&json!({ "tenant": "globex" }))
            .to_string()
            .as_bytes(),
    );
    let changed = format!("{}.{others}.{}", parts[0], parts[2]);
    assert_eq!(scene.check(&changed), Err(TokenRefusal::Signature));
    for bad in [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c",
        &format!("{good}.x"),
        &format!("{}.{}", parts[0], parts[1]),
        &format!("{}.{}.", parts[0], parts[1]),
    ] {
        scene.check(bad).unwrap_err();
    }
}

#[test]
fn a_set_without_a_usable_key_is_no_set() {
    for bad in [
        "",
        "[]",
        "{}",
        r#"{"keys": []}"#,
        r#"{"keys": [{"kty": "oct", "k": "AAAA"}]}"#,
        r#"{"keys": [{"kty": "EC", "crv": "P-521", "x": "AAAA", "y": "AAAA"}]}"#,
    ] {
        IssuerKeys::parse(bad.as_bytes()).unwrap_err();
    }
}
