//! Tenants: who asks, what they may use, and how their requests share the workers. Knows tenants by name only;
//! who may speak for one is decided in `auth`.

mod bucket;
pub mod config;
mod fair;
mod headers;
mod quota;

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

pub(crate) use config::Limits;
pub(crate) use fair::{Ask, Entered, FairQueue, Granted, QueueMax, Ticket};
pub(crate) use headers::rate_headers;
pub(crate) use quota::{Left, Quotas, Reserved};

use crate::RouterConfig;
use config::{Class, TenantConfig};

/// Longest name of a tenant.
pub const TENANT_BYTES_MAX: usize = 64;
/// The tenant of everybody while nobody has to say who they are.
pub const DEFAULT_TENANT: &str = "default";
/// What metrics call tenants that have no section of their own: their number is not bounded by the operator.
const OTHER: &str = "other";
/// Tells the salts of prompt caches from other uses of the same secret.
const SALT_DOMAIN: &[u8] = b"tramontane prompt cache salt 1";

/// Name of a tenant: 1 to [`TENANT_BYTES_MAX`] letters, digits or any of `. _ -`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(Arc<str>);

impl TenantName {
    /// The name, if it is one.
    #[must_use]
    pub fn new(name: &str) -> Option<Self> {
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let fits = (1..=TENANT_BYTES_MAX).contains(&name.len());
        (fits && name.bytes().all(is_plain)).then(|| Self(name.into()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TenantName {
    fn default() -> Self {
        Self(DEFAULT_TENANT.into())
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl Borrow<str> for TenantName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Who asks. Only `auth` makes one for a request from outside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Caller {
    pub(crate) tenant: TenantName,
    /// Whether the caller may also operate the cluster.
    pub(crate) is_operator: bool,
}

/// What every tenant may use.
#[derive(Debug)]
pub(crate) struct Tenants {
    configured: BTreeMap<TenantName, Limits>,
    others: Limits,
    /// Mixed into the salts of prompt caches; the same on all routers of a cluster.
    secret: Vec<u8>,
}

impl Tenants {
    /// Those of a configuration that was checked.
    pub(crate) fn of(config: &RouterConfig, secret: Vec<u8>) -> Self {
        Self::new(&config.tenant_defaults, &config.tenants, secret)
    }

    /// From sections that were checked; names that are none are left out.
    pub(crate) fn new(
        defaults: &TenantConfig,
        sections: &BTreeMap<String, TenantConfig>,
        secret: Vec<u8>,
    ) -> Self {
        let mut configured = BTreeMap::new();
        for (name, section) in sections {
            if let Some(name) = TenantName::new(name) {
                configured.insert(name, section.limits(defaults));
            }
        }
        Self {
            configured,
            others: defaults.limits(defaults),
            secret,
        }
    }

    pub(crate) fn limits(&self, tenant: &TenantName) -> Limits {
        *self.configured.get(tenant).unwrap_or(&self.others)
    }

    /// The tenant's name in metrics: one of a closed set.
    pub(crate) fn label<'a>(&self, tenant: &'a TenantName) -> &'a str {
        if self.configured.contains_key(tenant) || tenant.as_str() == DEFAULT_TENANT {
            return tenant.as_str();
        }
        OTHER
    }

    /// What keeps the prompt cache of this tenant apart from those of others, on every router the same. The
    /// default tenant has the one that workers take for none, so that clusters without tenants need no secret.
    pub(crate) fn salt(&self, tenant: &TenantName) -> u64 {
        if tenant.as_str() == DEFAULT_TENANT {
            return 0;
        }
        let mut digest = Sha256::new();
        digest.update(SALT_DOMAIN);
        // Of one length, so that no name can continue another secret.
        digest.update(Sha256::digest(&self.secret));
        digest.update(tenant.as_str().as_bytes());
        let digest: [u8; 32] = digest.finalize().into();
        let (head, _) = digest.split_first_chunk::<8>().unwrap_or((&[1; 8], &[]));
        u64::from_be_bytes(*head).max(1)
    }

    /// In which class a request of this tenant waits that asks for `lowered` classes below the tenant's own.
    pub(crate) fn class(&self, tenant: &TenantName, lowered: u32) -> Class {
        self.limits(tenant).priority.lowered_by(lowered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tenants(secret: &[u8]) -> Tenants {
        let section = TenantConfig {
            weight: Some(3),
            ..TenantConfig::default()
        };
        let sections = BTreeMap::from([("acme".to_owned(), section)]);
        Tenants::new(&TenantConfig::default(), &sections, secret.to_vec())
    }

    fn name(name: &str) -> TenantName {
        TenantName::new(name).unwrap()
    }

    #[test]
    fn a_name_is_short_and_plain() {
        for good in ["a", "acme.eu-1_x", &"t".repeat(TENANT_BYTES_MAX)] {
            assert_eq!(TenantName::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "a b",
            "a/b",
            "ä",
            "a\n",
            &"t".repeat(TENANT_BYTES_MAX + 1),
        ] {
            assert_eq!(TenantName::new(bad), None, "{bad}");
        }
    }

    #[test]
    fn salts_tell_tenants_and_secrets_apart_and_the_default_tenant_has_none() {
        let (one, other) = (tenants(b""), tenants(b"secret"));
        let salts = [
            one.salt(&name("acme")),
            one.salt(&name("globex")),
            other.salt(&name("acme")),
            one.salt(&TenantName::default()),
        ];
        for (i, salt) in salts.iter().enumerate() {
            assert!(!salts[i + 1..].contains(salt), "{salts:?}");
        }
        assert_eq!(salts[3], 0);
        assert_eq!(tenants(b"").salt(&name("acme")), salts[0]);
    }

    #[test]
    fn who_has_no_section_has_the_defaults_and_no_label_of_its_own() {
        let tenants = tenants(b"");
        assert_eq!(tenants.limits(&name("acme")).weight.get(), 3);
        assert_eq!(tenants.limits(&name("globex")).weight.get(), 1);
        assert_eq!(tenants.label(&name("acme")), "acme");
        assert_eq!(tenants.label(&TenantName::default()), "default");
        assert_eq!(tenants.label(&name("globex")), "other");
    }
}
