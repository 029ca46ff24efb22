//! Who may ask: one layer around every route of both doors, which lets nobody through who is not known, save to
//! the few paths that are `PUBLIC`. A route that somebody adds is closed. Never shows, logs or counts by what a
//! caller sent as a proof.

pub mod config;
mod follow;
mod guard;
mod jwt;
pub mod keys;
mod signature;

use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use http::HeaderMap;
use http::header::{AUTHORIZATION, HeaderName};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub(crate) use guard::{Door, Guard, guard};

use crate::error::{ApiError, ErrorKind};
use crate::tenants::{Caller, Tenants};
use crate::{Error, RouterConfig};
use config::{AuthConfig, JwtConfig};
use follow::{Current, Fetched, Followed, JWKS_BYTES_MAX};
use jwt::{IssuerKeys, TokenRefusal, TokenRules};
use keys::{KEY_PREFIX, KEYS_FILE_BYTES_MAX, KeyRefusal, KeyTable, parse_keys};

/// Paths that anybody may ask for; what ends with a slash stands for all below it.
pub(crate) const PUBLIC: [&str; 4] = [
    "/health/live",
    "/health/ready",
    "/metrics",
    "/grpc.health.v1.Health/",
];
/// Paths for operators only, likewise.
pub(crate) const OPERATORS: [&str; 1] = ["/tramontane.v1.Admin/"];
/// Longest proof: tokens with many claims have a few thousand bytes.
pub(crate) const PROOF_BYTES_MAX: usize = 16 << 10;
/// Largest secret for the salts of prompt caches.
const SECRET_BYTES_MAX: usize = 64 << 10;

const API_KEY: HeaderName = HeaderName::from_static("api-key");
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Whether a set of an issuer's keys can be used.
pub(crate) fn jwks(bytes: &[u8]) -> bool {
    IssuerKeys::parse(bytes).is_ok()
}

/// Whether `path` is one of `listed`, or below it.
pub(crate) fn is_listed(listed: &[&str], path: &str) -> bool {
    let covers = |entry: &&str| match entry.strip_suffix('/') {
        Some(_) => path.starts_with(*entry),
        None => path == *entry,
    };
    listed.iter().any(covers)
}

/// Why somebody is not let through: for metrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Nothing was said.
    Missing,
    /// More than one proof, one that is too long, or no text.
    Malformed,
    UnknownKey,
    ExpiredKey,
    Token(TokenRefusal),
    /// The issuer's keys are not here yet.
    NoIssuer,
    /// Nobody knows any more which API keys are valid.
    NoKeys,
    /// Known, but not for this.
    Forbidden,
}

impl Refusal {
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::UnknownKey => "api_key_unknown",
            Self::ExpiredKey => "api_key_expired",
            Self::Token(refusal) => refusal.label(),
            Self::NoIssuer => "issuer_away",
            Self::NoKeys => "keys_file_lost",
            Self::Forbidden => "forbidden",
        }
    }

    pub(crate) fn error(self) -> ApiError {
        let message = match self {
            Self::Missing => "an API key is required: send authorization: Bearer KEY",
            Self::Malformed => {
                "expected one proof of who you are, in authorization: Bearer KEY or in api-key"
            }
            Self::UnknownKey => "the API key is not valid",
            Self::ExpiredKey => "the API key has expired",
            Self::Token(refusal) => refusal.message(),
            Self::NoIssuer => "the keys of the issuer of tokens have not been read yet",
            Self::NoKeys => "the server cannot read its file of API keys",
            Self::Forbidden => "this is for operators; the API key is none of theirs",
        };
        match self {
            Self::NoIssuer | Self::NoKeys => ApiError::unavailable(message),
            Self::Forbidden | Self::Token(TokenRefusal::Tenant) => {
                ApiError::new(ErrorKind::Forbidden, message)
            }
            _ => ApiError::new(ErrorKind::Unauthenticated, message),
        }
    }
}

/// Who is known.
#[derive(Debug)]
pub(crate) struct Auth {
    /// Where there is a file; no table when it is lost.
    keys: Option<Arc<Current<Option<KeyTable>>>>,
    issuer: Option<Issuer>,
}

#[derive(Debug)]
struct Issuer {
    rules: TokenRules,
    keys: Arc<Current<IssuerKeys>>,
    wanted: Arc<Notify>,
}

impl Auth {
    /// Reads what is configured and follows it until `stop`.
    pub(crate) fn open(
        config: &AuthConfig,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, Error> {
        let keys = match &config.keys_file {
            Some(path) => {
                let file = Followed::new(path.clone(), KEYS_FILE_BYTES_MAX, "API keys");
                Some(follow_keys(file, tasks, stop)?)
            }
            None => None,
        };
        let issuer = match &config.jwt {
            Some(jwt) => Some(Issuer::open(jwt, tasks, stop)?),
            None => None,
        };
        Ok(Self { keys, issuer })
    }

    /// Whether callers have to say who they are.
    const fn is_on(&self) -> bool {
        self.keys.is_some() || self.issuer.is_some()
    }

    /// Who sent these headers.
    pub(crate) fn caller(&self, headers: &HeaderMap, now: SystemTime) -> Result<Caller, Refusal> {
        if !self.is_on() {
            return Ok(Caller {
                is_operator: true,
                ..Caller::default()
            });
        }
        let proof = proof(headers)?;
        match (&self.keys, &self.issuer) {
            (Some(keys), issuer) if issuer.is_none() || proof.starts_with(KEY_PREFIX) => {
                let table = keys.get();
                let table = (*table).as_ref().ok_or(Refusal::NoKeys)?;
                let entry = table.find(proof, now).map_err(|refusal| match refusal {
                    KeyRefusal::Unknown => Refusal::UnknownKey,
                    KeyRefusal::Expired => Refusal::ExpiredKey,
                })?;
                Ok(Caller {
                    tenant: entry.tenant.clone(),
                    is_operator: entry.is_operator,
                })
            }
            (_, Some(issuer)) => issuer.caller(proof),
            _ => Err(Refusal::UnknownKey),
        }
    }
}

impl Issuer {
    fn open(
        config: &JwtConfig,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, Error> {
        let wanted = Arc::new(Notify::new());
        let parse = |bytes: &[u8]| IssuerKeys::parse(bytes).map_err(|error| error.to_string());
        let keys = match (&config.jwks_file, &config.jwks_url) {
            (Some(path), _) => {
                let file = Followed::new(path.clone(), JWKS_BYTES_MAX, "keys of an issuer");
                let bytes = file.read_now().map_err(unreadable("auth.jwt.jwks_file"))?;
                let first = parse(&bytes).map_err(unusable("auth.jwt.jwks_file"))?;
                let keys = Arc::new(Current::new(first));
                let following = Arc::clone(&keys);
                spawn(tasks, stop, async move {
                    let take = |bytes: &[u8]| parse(bytes).map(|keys| following.set(keys));
                    // Tokens end by themselves: keys that were good for them are while their file is away.
                    file.run(&bytes, take, || ()).await;
                });
                keys
            }
            (None, url) => {
                let keys = Arc::new(Current::new(IssuerKeys::default()));
                let (following, fetched) = (
                    Arc::clone(&keys),
                    Fetched {
                        url: url.clone().unwrap_or_default(),
                        refresh: config.refresh,
                        wanted: Arc::clone(&wanted),
                    },
                );
                spawn(tasks, stop, async move {
                    fetched
                        .run(|bytes| parse(bytes).map(|keys| following.set(keys)))
                        .await;
                });
                keys
            }
        };
        Ok(Self {
            rules: TokenRules::new(config.clone()),
            keys,
            wanted,
        })
    }

    fn caller(&self, token: &str) -> Result<Caller, Refusal> {
        let keys = self.keys.get();
        if keys.is_empty() {
            return Err(Refusal::NoIssuer);
        }
        match self.rules.tenant(token, &keys) {
            Ok(tenant) => Ok(Caller {
                tenant,
                is_operator: false,
            }),
            Err(refusal) => {
                if refusal == TokenRefusal::UnknownKey {
                    // The issuer may have a new one.
                    self.wanted.notify_one();
                }
                Err(Refusal::Token(refusal))
            }
        }
    }
}

fn follow_keys(
    file: Followed,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<Arc<Current<Option<KeyTable>>>, Error> {
    let table = |bytes: &[u8]| parse_keys(bytes).map(|keys| Some(KeyTable::new(keys)));
    let bytes = file.read_now().map_err(unreadable("auth.keys_file"))?;
    let keys = Arc::new(Current::new(
        table(&bytes).map_err(unusable("auth.keys_file"))?,
    ));
    let following = Arc::clone(&keys);
    spawn(tasks, stop, async move {
        let take = |bytes: &[u8]| {
            following.set(table(bytes).map_err(|error| error.to_string())?);
            Ok(())
        };
        // A revoked key would work for as long as its file is away.
        file.run(&bytes, take, || following.set(None)).await;
    });
    Ok(keys)
}

fn spawn(
    tasks: &TaskTracker,
    stop: &CancellationToken,
    following: impl Future<Output = ()> + Send + 'static,
) {
    let stop = stop.clone();
    tasks.spawn(async move {
        stop.run_until_cancelled(following).await;
    });
}

/// Who may ask, and what for.
#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) auth: Arc<Auth>,
    pub(crate) tenants: Arc<Tenants>,
}

impl Known {
    /// Reads what is configured and follows it until `stop`.
    pub(crate) fn read(
        config: &RouterConfig,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Result<Self, Error> {
        let secret = cache_secret(&config.auth)?;
        Ok(Self {
            auth: Arc::new(Auth::open(&config.auth, tasks, stop)?),
            tenants: Arc::new(Tenants::of(config, secret)),
        })
    }
}

/// The secret that is mixed into the salts of prompt caches.
fn cache_secret(config: &AuthConfig) -> Result<Vec<u8>, Error> {
    let key = "auth.cache_secret_file";
    let Some(path) = &config.cache_secret_file else {
        return Ok(Vec::new());
    };
    let file = Followed::new(path.clone(), SECRET_BYTES_MAX, "secret");
    let bytes = file.read_now().map_err(unreadable(key))?;
    if bytes.is_empty() || bytes.len() > SECRET_BYTES_MAX {
        let rule = format!(
            "a file of 1 to {SECRET_BYTES_MAX} bytes, got {}",
            bytes.len()
        );
        return Err(unusable(key)(rule));
    }
    Ok(bytes)
}

fn unreadable(key: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::Setting {
        key: key.to_owned(),
        rule: "a file that can be read".to_owned(),
        got: error.to_string(),
    }
}

fn unusable<E: Display>(key: &'static str) -> impl Fn(E) -> Error {
    move |error| Error::Setting {
        key: key.to_owned(),
        rule: "a file that can be used".to_owned(),
        got: error.to_string(),
    }
}

/// What the caller proves who it is with: the only one there is.
fn proof(headers: &HeaderMap) -> Result<&str, Refusal> {
    let mut found = None;
    for name in [&AUTHORIZATION, &API_KEY, &X_API_KEY] {
        for value in headers.get_all(name) {
            if value.len() > PROOF_BYTES_MAX {
                return Err(Refusal::Malformed);
            }
            let text = value.to_str().map_err(|_| Refusal::Malformed)?.trim();
            let text = if *name == AUTHORIZATION {
                bearer(text).ok_or(Refusal::Malformed)?
            } else {
                text
            };
            // Several that are the same are one: some clients send two headers.
            if text.is_empty() || found.is_some_and(|other| other != text) {
                return Err(Refusal::Malformed);
            }
            found = Some(text);
        }
    }
    found.ok_or(Refusal::Missing)
}

fn bearer(text: &str) -> Option<&str> {
    let (scheme, rest) = text.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| rest.trim())
}

#[cfg(test)]
mod tests;
