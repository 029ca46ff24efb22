//! Why an identity cannot be used: which file, what was expected, what was found.

use std::path::PathBuf;

use super::name::{BadName, PeerName};

/// An identity that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// One half of an identity without the other.
    #[error("tls.{given} is set without tls.{missing}: an identity needs both")]
    Incomplete {
        /// The key that is there.
        given: &'static str,
        /// The key that is not.
        missing: &'static str,
    },
    /// A file cannot be read.
    #[error("{what} {}", path.display())]
    Read {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A file is too large to be what it should be.
    #[error("{what} {} is larger than {max} bytes", path.display())]
    TooLarge {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The limit.
        max: u64,
    },
    /// A file has nothing of the expected kind.
    #[error("{what} {} must be PEM with {expected}, got {got}", path.display())]
    NotPem {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
        /// What is in it.
        got: String,
    },
    /// The key is not that of the certificate.
    #[error("key {} is not that of certificate {}", key.display(), cert.display())]
    KeyMismatch {
        /// The key.
        key: PathBuf,
        /// The certificate.
        cert: PathBuf,
    },
    /// A key or certificate that TLS cannot use.
    #[error("{what} {} cannot be used", path.display())]
    Unusable {
        /// What it is for.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// It is too late, or too early, for a certificate.
    #[error("certificate {} is valid from {from} to {until}, now is {now}", path.display())]
    NotNow {
        /// The file.
        path: PathBuf,
        /// Begin.
        from: String,
        /// End.
        until: String,
        /// The clock.
        now: String,
    },
    /// A certificate of the cluster that others of the cluster would refuse.
    #[error("certificate {} is none that CA {} makes good", cert.display(), ca.display())]
    NotOfCa {
        /// The certificate.
        cert: PathBuf,
        /// The authority.
        ca: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// A certificate of the cluster without a role.
    #[error("certificate {} {source}", path.display())]
    NoName {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BadName,
    },
    /// A certificate of another role or cluster than the process has.
    #[error("certificate {} is that of {got}, expected {expected}", path.display())]
    OtherName {
        /// The file.
        path: PathBuf,
        /// What this process is.
        expected: PeerName,
        /// What the certificate says.
        got: PeerName,
    },
    /// A certificate of another role than the process has.
    #[error("certificate {} is that of {got}, expected the role {expected}", path.display())]
    OtherRole {
        /// The file.
        path: PathBuf,
        /// What this process is.
        expected: super::Role,
        /// What the certificate says.
        got: PeerName,
    },
}
