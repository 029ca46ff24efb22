//! Who a certificate says that its holder is: `spiffe://CLUSTER/ROLE`, one URI among its names, or for authorities that
//! put no URIs into certificates the host name `ROLE.CLUSTER.tramontane.internal`. Trusts nothing: whether the certificate
//! itself is believed is decided elsewhere.

use std::fmt;
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use x509_parser::extensions::GeneralName;
use x509_parser::parse_x509_certificate;

/// What such a URI begins with.
const SCHEME: &str = "spiffe://";
/// What such a host name ends with; `internal` is nobody's domain.
const DOMAIN: &str = ".tramontane.internal";
/// Most of a foreign name that is shown.
const SHOWN_CHARS_MAX: usize = 128;

/// What a process of a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serves clients, calls workers.
    Router,
    /// Computes, calls other workers.
    Worker,
    /// A person's tool: calls the admin API.
    Operator,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Router, Self::Worker, Self::Operator];

    /// As it stands in certificates.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Router => "router",
            Self::Worker => "worker",
            Self::Operator => "operator",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Cluster and role of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerName {
    /// Name of the cluster.
    pub cluster: String,
    /// What the process is in it.
    pub role: Role,
}

impl PeerName {
    /// A name.
    #[must_use]
    pub fn new(cluster: &str, role: Role) -> Self {
        let cluster = cluster.to_owned();
        Self { cluster, role }
    }

    /// The one that a certificate carries.
    ///
    /// # Errors
    /// When it carries none, or several.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, BadName> {
        let (_rest, parsed) =
            parse_x509_certificate(certificate).map_err(|_invalid| BadName::Unreadable)?;
        let names = parsed
            .subject_alternative_name()
            .map_err(|_invalid| BadName::Unreadable)?;
        let names = names.map_or(&[][..], |names| &names.value.general_names);
        let mut ours = names.iter().filter_map(|name| match name {
            GeneralName::URI(uri) if uri.starts_with(SCHEME) => Some(*uri),
            GeneralName::DNSName(host) if host.ends_with(DOMAIN) => Some(*host),
            _ => None,
        });
        match (ours.next(), ours.next()) {
            (Some(name), None) => name.parse(),
            (None, _) => Err(BadName::Missing),
            (Some(one), Some(two)) => Err(BadName::Several(shown(one), shown(two))),
        }
    }
}

impl fmt::Display for PeerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.cluster, self.role)
    }
}

impl FromStr for PeerName {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let unknown = || BadName::Unknown(shown(name));
        let parts = match (name.strip_prefix(SCHEME), name.strip_suffix(DOMAIN)) {
            (Some(path), _) => path.split_once('/'),
            (None, Some(host)) => host.split_once('.').map(|(role, cluster)| (cluster, role)),
            (None, None) => None,
        };
        let (cluster, role) = parts.ok_or_else(unknown)?;
        let role = Role::ALL.into_iter().find(|known| known.name() == role);
        let role = role.filter(|_| !cluster.is_empty()).ok_or_else(unknown)?;
        Ok(Self::new(cluster, role))
    }
}

/// Foreign text for a log or an error: bounded, and on one line.
fn shown(text: &str) -> String {
    text.escape_debug().take(SHOWN_CHARS_MAX).collect()
}

/// A certificate that does not say who its holder is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BadName {
    /// It is no certificate.
    #[error("is no X.509 certificate")]
    Unreadable,
    /// It has no such name.
    #[error("has no URI spiffe://CLUSTER/router, worker or operator among its names")]
    Missing,
    /// It has more than one.
    #[error("has more than one role: {0} and {1}, expected one")]
    Several(String, String),
    /// Its name is of another form.
    #[error("names {0}, expected spiffe://CLUSTER/router, worker or operator")]
    Unknown(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_cluster_and_a_role() {
        let name: PeerName = "spiffe://prod.eu_1/worker".parse().unwrap();
        assert_eq!(name, PeerName::new("prod.eu_1", Role::Worker));
        assert_eq!(name.to_string(), "spiffe://prod.eu_1/worker");
        let host: PeerName = "router.prod.eu.tramontane.internal".parse().unwrap();
        assert_eq!(host, PeerName::new("prod.eu", Role::Router));
        for bad in [
            "spiffe://prod",
            "spiffe:///worker",
            "spiffe://prod/cook",
            "spiffe://prod/worker/",
            "spiffe://prod/ns/worker",
            "https://prod/worker",
            "worker.prod",
            "worker.tramontane.internal",
            "cook.prod.tramontane.internal",
            "spiffe://worker.prod.tramontane.internal",
        ] {
            assert_eq!(bad.parse::<PeerName>(), Err(BadName::Unknown(bad.into())));
        }
        let long = format!("spiffe://{}", "x".repeat(4096));
        assert!(long.parse::<PeerName>().unwrap_err().to_string().len() < 256);
    }
}
