//! Who may ask: `[auth]` and `[auth.jwt]`. Without them everybody may, as one tenant.

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tramontane_runtime::duration_text;

use crate::Error;

/// The claim that names a tenant when nobody says.
pub const TENANT_CLAIM: &str = "tenant";
/// Clocks differ by so much.
pub const LEEWAY: Duration = Duration::from_secs(60);
/// Most that they may be allowed to.
pub const LEEWAY_MAX: Duration = Duration::from_secs(600);
/// How often an issuer's keys are fetched.
pub const REFRESH: Duration = Duration::from_secs(300);
/// Fetching more often than this is an attack on the issuer.
pub const REFRESH_MIN: Duration = Duration::from_secs(10);
/// Fetching more rarely would keep keys that were revoked.
pub const REFRESH_MAX: Duration = Duration::from_secs(24 * 3600);
/// Longest issuer, audience, address and claim.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Who may ask.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AuthConfig {
    /// Whether everybody who reaches the server may ask: the operator's word for a server beyond this machine without
    /// keys and tokens.
    pub anonymous: bool,
    /// A file with a line per API key; see `tramontane keys`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keys_file: Option<PathBuf>,
    /// A file whose bytes are mixed into what keeps the prompt caches of tenants apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_secret_file: Option<PathBuf>,
    /// Tokens of an issuer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<JwtConfig>,
}

/// Which signatures count. None of them is made with a secret that this server would share with the issuer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JwtAlgorithm {
    /// RSA with SHA-256, PKCS #1 v1.5.
    RS256,
    /// RSA with SHA-384, PKCS #1 v1.5.
    RS384,
    /// RSA with SHA-512, PKCS #1 v1.5.
    RS512,
    /// RSA with SHA-256, PSS.
    PS256,
    /// RSA with SHA-384, PSS.
    PS384,
    /// RSA with SHA-512, PSS.
    PS512,
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// ECDSA on P-384 with SHA-384.
    ES384,
    /// Ed25519.
    EdDSA,
}

/// Tokens of one issuer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JwtConfig {
    /// What `iss` must be.
    pub issuer: String,
    /// What `aud` must be or have.
    pub audience: String,
    /// The issuer's public keys (JWKS) in a file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_file: Option<PathBuf>,
    /// Where the issuer publishes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks_url: Option<String>,
    /// Signatures that count.
    #[serde(default = "algorithms")]
    pub algorithms: Vec<JwtAlgorithm>,
    /// The claim that names the tenant.
    #[serde(default = "tenant_claim")]
    pub tenant_claim: String,
    /// How much clocks may differ.
    #[serde(default = "leeway", with = "duration_text")]
    pub leeway: Duration,
    /// How often the issuer's keys are fetched.
    #[serde(default = "refresh", with = "duration_text")]
    pub refresh: Duration,
}

fn algorithms() -> Vec<JwtAlgorithm> {
    vec![
        JwtAlgorithm::RS256,
        JwtAlgorithm::ES256,
        JwtAlgorithm::EdDSA,
    ]
}

fn tenant_claim() -> String {
    TENANT_CLAIM.to_owned()
}

const fn leeway() -> Duration {
    LEEWAY
}

const fn refresh() -> Duration {
    REFRESH
}

impl AuthConfig {
    /// Whether callers have to say who they are.
    #[must_use]
    pub const fn is_on(&self) -> bool {
        self.keys_file.is_some() || self.jwt.is_some()
    }

    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.anonymous && self.is_on() {
            return Err(Error::Setting {
                key: "auth.anonymous".to_owned(),
                rule: "false where there are keys or tokens".to_owned(),
                got: "true, with auth.keys_file or auth.jwt".to_owned(),
            });
        }
        match &self.jwt {
            Some(jwt) => jwt.validate(),
            None => Ok(()),
        }
    }
}

impl JwtConfig {
    fn validate(&self) -> Result<(), Error> {
        let texts = [
            ("issuer", &self.issuer),
            ("audience", &self.audience),
            ("tenant_claim", &self.tenant_claim),
        ];
        for (key, text) in texts {
            if text.is_empty() || text.len() > TEXT_BYTES_MAX {
                let rule = format!("of 1 to {TEXT_BYTES_MAX} bytes");
                return Err(refuse(key, &rule, &text.len().to_string()));
            }
        }
        if self.algorithms.is_empty() {
            return Err(refuse("algorithms", "at least one", "none"));
        }
        match (&self.jwks_file, &self.jwks_url) {
            (Some(_), None) => {}
            (None, Some(url)) => check_url(url)?,
            (Some(_), Some(_)) => return Err(refuse("jwks_file", "absent with jwks_url", "both")),
            (None, None) => return Err(refuse("jwks_url", "there, or jwks_file", "neither")),
        }
        let times = [
            ("leeway", self.leeway, Duration::ZERO, LEEWAY_MAX),
            ("refresh", self.refresh, REFRESH_MIN, REFRESH_MAX),
        ];
        for (key, got, min, max) in times {
            if got < min || got > max {
                let shown = humantime::format_duration;
                let rule = format!("between {} and {}", shown(min), shown(max));
                return Err(refuse(key, &rule, &shown(got).to_string()));
            }
        }
        Ok(())
    }
}

/// Keys that anybody on the way could change prove nothing.
fn check_url(url: &str) -> Result<(), Error> {
    let rule = "an https URL, or http on this machine";
    let parsed = url
        .parse::<http::Uri>()
        .ok()
        .filter(|_| url.len() <= TEXT_BYTES_MAX);
    let is_safe = parsed.is_some_and(|uri| match uri.scheme_str() {
        Some("https") => uri.host().is_some(),
        Some("http") => uri.host().is_some_and(is_loopback),
        _ => false,
    });
    if is_safe {
        return Ok(());
    }
    Err(refuse("jwks_url", rule, url))
}

fn is_loopback(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

fn refuse(key: &str, rule: &str, got: &str) -> Error {
    Error::Setting {
        key: format!("auth.jwt.{key}"),
        rule: rule.to_owned(),
        got: got.to_owned(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Of `https://issuer`, for `tramontane`, keys in a file.
    pub(crate) fn jwt(jwks_file: PathBuf) -> JwtConfig {
        JwtConfig {
            issuer: "https://issuer".to_owned(),
            audience: "tramontane".to_owned(),
            jwks_file: Some(jwks_file),
            jwks_url: None,
            algorithms: algorithms(),
            tenant_claim: tenant_claim(),
            leeway: LEEWAY,
            refresh: REFRESH,
        }
    }

    #[test]
    fn keys_come_over_https_or_from_this_machine() {
        let check = |url: &str| {
            let jwt = JwtConfig {
                jwks_file: None,
                jwks_url: Some(url.to_owned()),
                ..jwt(PathBuf::new())
            };
            jwt.validate()
        };
        for good in [
            "https://issuer.example/jwks.json",
            "http://127.0.0.1:80/x",
            "http://[::1]/x",
            "http://localhost:9/x",
        ] {
            check(good).unwrap();
        }
        for bad in [
            "http://issuer.example/jwks.json",
            "http://127.0.0.1.example/x",
            "file:///etc/passwd",
            "ftp://localhost/x",
            "https://",
            "jwks.json",
        ] {
            let error = check(bad).unwrap_err().to_string();
            assert!(error.starts_with("auth.jwt.jwks_url must be"), "{error}");
        }
    }

    #[test]
    fn nobody_is_both_known_and_unknown() {
        let config = |anonymous, jwt| AuthConfig {
            anonymous,
            jwt,
            ..AuthConfig::default()
        };
        config(true, None).validate().unwrap();
        let error = config(true, Some(jwt("jwks".into()))).validate();
        let error = error.unwrap_err().to_string();
        assert!(error.starts_with("auth.anonymous must be false"), "{error}");
    }

    #[test]
    fn there_is_one_source_of_keys_and_no_algorithm_with_a_shared_secret() {
        let both = JwtConfig {
            jwks_url: Some("https://a/b".to_owned()),
            ..jwt(PathBuf::new())
        };
        both.validate().unwrap_err();
        let none = JwtConfig {
            jwks_file: None,
            ..jwt(PathBuf::new())
        };
        none.validate().unwrap_err();
        for algorithm in ["\"HS256\"", "\"none\""] {
            serde_json::from_str::<JwtAlgorithm>(algorithm).unwrap_err();
        }
    }
}
