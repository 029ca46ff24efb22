//! What a tenant may use, as it is configured: `[tenant_defaults]` and `[tenants.NAME]`.

use std::collections::BTreeMap;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use super::TenantName;
use crate::Error;

/// Largest weight: a thousand times the least share is a typing error.
pub const WEIGHT_MAX: u32 = 1000;
/// Largest quota per minute.
pub const QUOTA_MAX: u64 = 1_000_000_000_000;
/// Largest number of requests that run at once.
pub const CONCURRENT_MAX: u64 = 1 << 24;
/// Sections of tenants: each is a label of metrics.
pub const TENANTS_CONFIGURED_MAX: usize = 1024;

/// Which requests go first. Each class goes before all of the next, except that who waits moves up (see
/// [`crate::config::PRIORITY_AGE`]).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// Before all others.
    High,
    /// What nobody says otherwise.
    #[default]
    Normal,
    /// When nobody else waits.
    Low,
}

/// Number of classes.
pub(crate) const CLASSES: usize = 3;

impl Class {
    pub(crate) const fn index(self) -> usize {
        self as usize
    }

    /// A class so many below this one, at most the last.
    pub(crate) fn lowered_by(self, lowered: u32) -> Self {
        match self as u32 + lowered.min(CLASSES as u32) {
            0 => Self::High,
            1 => Self::Normal,
            _ => Self::Low,
        }
    }
}

/// What one tenant may use. A key that is absent is that of `[tenant_defaults]`; 0 lifts a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TenantConfig {
    /// Share of the tokens among tenants that all want more; 1 when nobody says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// The class of its requests, which may only ask for lower ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub priority: Option<Class>,
    /// Requests per minute; a minute's worth may come at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u64>,
    /// Prompt and generated tokens per minute, likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u64>,
    /// Requests that run at once; more wait.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrent: Option<u64>,
}

/// The limits of one tenant, all decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) weight: NonZeroU32,
    pub(crate) priority: Class,
    pub(crate) requests_per_minute: Option<u64>,
    pub(crate) tokens_per_minute: Option<u64>,
    pub(crate) concurrent: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let nothing = TenantConfig::default();
        nothing.limits(&nothing)
    }
}

impl TenantConfig {
    pub(crate) fn limits(&self, defaults: &Self) -> Limits {
        let limit = |own: Option<u64>, other: Option<u64>| own.or(other).filter(|&n| n > 0);
        let weight = self.weight.or(defaults.weight).and_then(NonZeroU32::new);
        let concurrent = limit(self.concurrent, defaults.concurrent);
        Limits {
            weight: weight.unwrap_or(NonZeroU32::MIN),
            priority: self.priority.or(defaults.priority).unwrap_or_default(),
            requests_per_minute: limit(self.requests_per_minute, defaults.requests_per_minute),
            tokens_per_minute: limit(self.tokens_per_minute, defaults.tokens_per_minute),
            concurrent: concurrent.map_or(usize::MAX, |n| usize::try_from(n).unwrap_or(usize::MAX)),
        }
    }

    /// Checks every value that has a rule; `section` names it in the error.
    fn validate(&self, section: &str) -> Result<(), Error> {
        if let Some(weight) = self.weight.filter(|w| !(1..=WEIGHT_MAX).contains(w)) {
            return Err(refuse(
                section,
                "weight",
                u64::from(WEIGHT_MAX),
                weight.into(),
            ));
        }
        let limits = [
            ("requests_per_minute", self.requests_per_minute, QUOTA_MAX),
            ("tokens_per_minute", self.tokens_per_minute, QUOTA_MAX),
            ("concurrent", self.concurrent, CONCURRENT_MAX),
        ];
        for (key, got, max) in limits {
            if let Some(got) = got.filter(|&n| n > max) {
                return Err(refuse(section, key, max, got));
            }
        }
        Ok(())
    }
}

fn refuse(section: &str, key: &str, max: u64, got: u64) -> Error {
    let min = u8::from(key == "weight");
    Error::Setting {
        key: format!("{section}.{key}"),
        rule: format!("between {min} and {max}"),
        got: got.to_string(),
    }
}

/// Checks the sections of all tenants.
pub(crate) fn validate(
    defaults: &TenantConfig,
    sections: &BTreeMap<String, TenantConfig>,
) -> Result<(), Error> {
    defaults.validate("tenant_defaults")?;
    if sections.len() > TENANTS_CONFIGURED_MAX {
        return Err(Error::Setting {
            key: "tenants".to_owned(),
            rule: format!("at most {TENANTS_CONFIGURED_MAX} sections"),
            got: sections.len().to_string(),
        });
    }
    for (name, section) in sections {
        if TenantName::new(name).is_none() {
            return Err(Error::Setting {
                key: "tenants".to_owned(),
                rule: "sections with names of 1 to 64 letters, digits or any of . _ -".to_owned(),
                got: format!("{name:?}"),
            });
        }
        section.validate(&format!("tenants.{name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenant_takes_what_it_does_not_say_from_the_defaults_and_zero_lifts_a_limit() {
        let defaults = TenantConfig {
            weight: Some(2),
            tokens_per_minute: Some(500),
            concurrent: Some(4),
            ..TenantConfig::default()
        };
        let own = TenantConfig {
            tokens_per_minute: Some(0),
            priority: Some(Class::High),
            ..TenantConfig::default()
        };
        let limits = own.limits(&defaults);
        assert_eq!(limits.weight.get(), 2);
        assert_eq!((limits.tokens_per_minute, limits.concurrent), (None, 4));
        assert_eq!(limits.priority, Class::High);
    }

    #[test]
    fn a_request_can_only_lower_its_class() {
        assert_eq!(Class::High.lowered_by(0), Class::High);
        assert_eq!(Class::High.lowered_by(1), Class::Normal);
        assert_eq!(Class::Normal.lowered_by(1), Class::Low);
        assert_eq!(Class::Low.lowered_by(u32::MAX), Class::Low);
    }

    #[test]
    fn values_outside_their_rules_are_named_with_their_section() {
        let section = TenantConfig {
            weight: Some(0),
            ..TenantConfig::default()
        };
        let sections = BTreeMap::from([("acme".to_owned(), section)]);
        let error = validate(&TenantConfig::default(), &sections).unwrap_err();
        assert_eq!(
            error.to_string(),
            "tenants.acme.weight must be between 1 and 1000, got 0"
        );
        let sections = BTreeMap::from([("a b".to_owned(), TenantConfig::default())]);
        let error = validate(&TenantConfig::default(), &sections).unwrap_err();
        assert!(error.to_string().ends_with("got \"a b\""), "{error}");
    }
}
