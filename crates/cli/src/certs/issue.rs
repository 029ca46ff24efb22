//! Makes certificates: ECDSA on P-256, as every TLS of today takes them. Reads and writes no file.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use tramontane_runtime::tls::{PeerName, Role};
use x509_parser::pem::parse_x509_pem;

use super::Holder;

/// Certificates begin in the past: not all clocks are alike.
const CLOCKS_DIFFER: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate and its key as PEM.
pub(super) struct Pair {
    pub(super) cert: String,
    pub(super) key: String,
}

/// Who makes certificates.
pub(super) struct Authority(Issuer<'static, KeyPair>);

impl Authority {
    /// A new one.
    pub(super) fn new(cluster: &str, days: u32) -> anyhow::Result<(Self, Pair)> {
        let key = KeyPair::generate().context("a key for the authority")?;
        // Authorities of one name would be taken for each other.
        let id = key.public_key_raw().iter().rev().take(4);
        let id: String = id.map(|byte| format!("{byte:02x}")).collect();
        let mut params = params(&format!("tramontane {cluster} CA {id}"), days)?;
        // Of processes, not of further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert = params.self_signed(&key).context("the authority")?;
        let pair = Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        };
        Ok((Self(Issuer::new(params, key)), pair))
    }

    /// One that was made before.
    pub(super) fn read(cert: &str, key: &str) -> anyhow::Result<Self> {
        let key = KeyPair::from_pem(key).context("its key")?;
        let issuer = Issuer::from_ca_cert_pem(cert, key).context("its certificate")?;
        Ok(Self(issuer))
    }

    /// A certificate for both ends of connections.
    pub(super) fn issue(
        &self,
        cluster: &str,
        holder: Holder,
        hosts: &[String],
        days: u32,
    ) -> anyhow::Result<Pair> {
        let mut params = params(&format!("tramontane {cluster} {}", holder.name()), days)?;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let role = match holder {
            Holder::Clients | Holder::Etcd => None,
            Holder::Router => Some(Role::Router),
            Holder::Worker => Some(Role::Worker),
            Holder::Operator => Some(Role::Operator),
        };
        if let Some(role) = role {
            let name = PeerName::new(cluster, role).to_string();
            let name = SanType::URI(name.try_into().context("the name")?);
            params.subject_alt_names.push(name);
        }
        if holder != Holder::Clients {
            let client = ExtendedKeyUsagePurpose::ClientAuth;
            params.extended_key_usages.push(client);
        }
        for host in hosts {
            let name = match host.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_name) => SanType::DnsName(host.as_str().try_into().context("a host")?),
            };
            params.subject_alt_names.push(name);
        }
        let key = KeyPair::generate().context("a key")?;
        let cert = params.signed_by(&key, &self.0).context("a certificate")?;
        Ok(Pair {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// The cluster of an authority that [`Authority::new`] made; `None` for one of somebody else.
pub(super) fn cluster_of(authority: &str) -> Option<String> {
    let (_rest, pem) = parse_x509_pem(authority.as_bytes()).ok()?;
    let cert = pem.parse_x509().ok()?;
    let name = cert.subject().iter_common_name().next()?.as_str().ok()?;
    let (cluster, _id) = name.strip_prefix("tramontane ")?.rsplit_once(" CA ")?;
    Some(cluster.to_owned())
}

fn params(name: &str, days: u32) -> anyhow::Result<CertificateParams> {
    let mut params = CertificateParams::default();
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    params.distinguished_name = subject;
    let now = SystemTime::now();
    let until = now.checked_add(DAY * days).context("the end of its time")?;
    params.not_before = now.checked_sub(CLOCKS_DIFFER).unwrap_or(now).into();
    params.not_after = until.into();
    Ok(params)
}
