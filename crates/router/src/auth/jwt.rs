//! Tokens of an issuer (JWT): signature first, then who made it, for whom and when. What a token says about keys
//! (`jwk`, `jku`, `x5u`, ...) is never looked at, and `kid` only chooses among the keys that the issuer published.

use std::collections::BTreeMap;

use jsonwebtoken::errors::ErrorKind as JwtError;
use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use serde::Deserialize;
use serde_json::Value;

use super::config::{JwtAlgorithm, JwtConfig};
use super::signature;
use crate::tenants::TenantName;

/// Most keys of an issuer that are looked at.
pub(crate) const JWKS_KEYS_MAX: usize = 256;

/// Why a token is refused. Never says what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenRefusal {
    /// It is no token, or has what this server does not know.
    Malformed,
    /// Its algorithm is not allowed.
    Algorithm,
    /// The issuer has published no such key.
    UnknownKey,
    Signature,
    Expired,
    NotYet,
    Issuer,
    Audience,
    /// It is good but names no tenant.
    Tenant,
}

impl TokenRefusal {
    /// For the client.
    pub(crate) const fn message(self) -> &'static str {
        match self {
            Self::Malformed => "the token is not one that this server reads",
            Self::Algorithm => "the token's algorithm is not allowed",
            Self::UnknownKey => "the token's key is not one that its issuer has published",
            Self::Signature => "the token's signature is wrong",
            Self::Expired => "the token has expired",
            Self::NotYet => "the token is not valid yet",
            Self::Issuer => "the token is of another issuer",
            Self::Audience => "the token is for somebody else",
            Self::Tenant => "the token names no tenant",
        }
    }

    /// In metrics.
    pub(crate) const fn label(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Algorithm => "algorithm",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "signature",
            Self::Expired => "expired",
            Self::NotYet => "not_yet",
            Self::Issuer => "issuer",
            Self::Audience => "audience",
            Self::Tenant => "tenant",
        }
    }
}

/// The public keys of an issuer.
#[derive(Debug, Default)]
pub(crate) struct IssuerKeys(Vec<IssuerKey>);

#[derive(Debug)]
struct IssuerKey {
    kid: Option<String>,
    /// What it can check.
    algorithms: Vec<Algorithm>,
    key: DecodingKey,
}

/// A published set, of which each key is read by itself: one of a new kind hides none of the others.
#[derive(Deserialize)]
struct Published {
    keys: Vec<Value>,
}

/// A set of keys that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadKeys(&'static str);

impl IssuerKeys {
    /// Reads a JWKS. Keys that this server cannot use are left out; a set without any other is an error.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, BadKeys> {
        let published: Published = serde_json::from_slice(bytes)
            .map_err(|_| BadKeys("expected a JSON object with an array `keys`"))?;
        if published.keys.len() > JWKS_KEYS_MAX {
            return Err(BadKeys("expected at most 256 keys"));
        }
        let keys: Vec<IssuerKey> = published.keys.into_iter().filter_map(usable).collect();
        if keys.is_empty() {
            return Err(BadKeys(
                "none of the keys is an RSA, P-256, P-384 or Ed25519 key for signatures",
            ));
        }
        Ok(Self(keys))
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The one key that a token with this header may be checked with.
    fn find(&self, kid: Option<&str>, algorithm: Algorithm) -> Option<&DecodingKey> {
        let fits = |key: &&IssuerKey| {
            let is_named = kid.is_none_or(|kid| key.kid.as_deref() == Some(kid));
            is_named && key.algorithms.contains(&algorithm)
        };
        let mut found = self.0.iter().filter(fits);
        let first = found.next()?;
        // Without a name there must be no choice.
        found.next().is_none().then_some(&first.key)
    }
}

fn usable(value: Value) -> Option<IssuerKey> {
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    let used = jwk.common.public_key_use.as_ref();
    if used.is_some_and(|used| *used != PublicKeyUse::Signature) {
        return None;
    }
    let all = match &jwk.algorithm {
        AlgorithmParameters::RSA(_) => vec![
            Algorithm::RS256,
            Algorithm::RS384,
            Algorithm::RS512,
            Algorithm::PS256,
            Algorithm::PS384,
            Algorithm::PS512,
        ],
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => vec![Algorithm::ES256],
            EllipticCurve::P384 => vec![Algorithm::ES384],
            _ => return None,
        },
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => {
            vec![Algorithm::EdDSA]
        }
        // Secrets too: whoever reads the file could sign with them.
        _ => return None,
    };
    let algorithms = match jwk.common.key_algorithm {
        Some(only) => {
            let is_it = |a: &Algorithm| format!("{a:?}") == only.to_string();
            all.into_iter().filter(is_it).collect()
        }
        None => all,
    };
    Some(IssuerKey {
        key: DecodingKey::from_jwk(&jwk).ok()?,
        kid: jwk.common.key_id,
        algorithms,
    })
}

/// What every token of the issuer must be.
#[derive(Debug)]
pub(crate) struct TokenRules {
    config: JwtConfig,
    allowed: Vec<Algorithm>,
}

impl TokenRules {
    pub(crate) fn new(config: JwtConfig) -> Self {
        signature::install();
        let allowed = config.algorithms.iter().map(|a| algorithm(*a)).collect();
        Self { config, allowed }
    }

    /// The tenant that the token speaks for.
    pub(crate) fn tenant(
        &self,
        token: &str,
        keys: &IssuerKeys,
    ) -> Result<TenantName, TokenRefusal> {
        // `none` and whatever else is no algorithm is no header either.
        let header = decode_header(token).map_err(|_| TokenRefusal::Malformed)?;
        if header.crit.is_some() {
            return Err(TokenRefusal::Malformed);
        }
        if !self.allowed.contains(&header.alg) {
            return Err(TokenRefusal::Algorithm);
        }
        let key = keys.find(header.kid.as_deref(), header.alg);
        let key = key.ok_or(TokenRefusal::UnknownKey)?;
        let validation = self.validation(header.alg);
        let decoded = decode::<BTreeMap<String, Value>>(token, key, &validation);
        let claims = decoded.map_err(|error| refusal(error.kind()))?.claims;
        let named = claims
            .get(&self.config.tenant_claim)
            .and_then(Value::as_str);
        named.and_then(TenantName::new).ok_or(TokenRefusal::Tenant)
    }

    fn validation(&self, algorithm: Algorithm) -> Validation {
        let mut validation = Validation::new(algorithm);
        validation.leeway = self.config.leeway.as_secs();
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation
    }
}

const fn algorithm(configured: JwtAlgorithm) -> Algorithm {
    match configured {
        JwtAlgorithm::RS256 => Algorithm::RS256,
        JwtAlgorithm::RS384 => Algorithm::RS384,
        JwtAlgorithm::RS512 => Algorithm::RS512,
        JwtAlgorithm::PS256 => Algorithm::PS256,
        JwtAlgorithm::PS384 => Algorithm::PS384,
        JwtAlgorithm::PS512 => Algorithm::PS512,
        JwtAlgorithm::ES256 => Algorithm::ES256,
        JwtAlgorithm::ES384 => Algorithm::ES384,
        JwtAlgorithm::EdDSA => Algorithm::EdDSA,
    }
}

fn refusal(error: &JwtError) -> TokenRefusal {
    match error {
        JwtError::InvalidSignature => TokenRefusal::Signature,
        JwtError::InvalidAlgorithm => TokenRefusal::Algorithm,
        JwtError::ExpiredSignature => TokenRefusal::Expired,
        JwtError::ImmatureSignature => TokenRefusal::NotYet,
        JwtError::InvalidIssuer => TokenRefusal::Issuer,
        JwtError::InvalidAudience => TokenRefusal::Audience,
        JwtError::MissingRequiredClaim(claim) => match claim.as_str() {
            "iss" => TokenRefusal::Issuer,
            "aud" => TokenRefusal::Audience,
            _ => TokenRefusal::Malformed,
        },
        _ => TokenRefusal::Malformed,
    }
}

#[cfg(test)]
pub(crate) mod tests;
