//! Certificates and keys in PEM files, read and checked. Keeps nothing, and never shows a key.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use rustls::RootCertStore;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::parse_x509_certificate;
use x509_parser::time::ASN1Time;

use super::TlsError;

/// Largest file: a bundle of some hundred authorities.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where an identity is.
#[derive(Clone, Debug)]
pub(super) struct Files {
    /// Certificate and key, where there is something to show.
    pub(super) own: Option<(PathBuf, PathBuf)>,
    /// Authorities, where others are checked.
    pub(super) ca: Option<PathBuf>,
}

/// What was in them.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Contents {
    own: Option<(Vec<u8>, Vec<u8>)>,
    pub(super) ca: Option<Vec<u8>>,
}

/// A certificate with its key, and until when it is valid.
#[derive(Clone, Debug)]
pub(super) struct Own {
    pub(super) key: Arc<CertifiedKey>,
    /// Unix time in seconds.
    pub(super) until: i64,
}

impl Files {
    /// Reads all of them.
    pub(super) fn read(&self) -> Result<Contents, TlsError> {
        let own = match &self.own {
            Some((cert, key)) => Some((read("certificate", cert)?, read("key", key)?)),
            None => None,
        };
        let ca = self.ca.as_deref().map(|ca| read("CA", ca)).transpose()?;
        Ok(Contents { own, ca })
    }

    /// What there is to show; `None` when nothing is.
    pub(super) fn own(
        &self,
        contents: &Contents,
        provider: &CryptoProvider,
    ) -> Result<Option<Own>, TlsError> {
        let (Some(files), Some(bytes)) = (&self.own, &contents.own) else {
            return Ok(None);
        };
        own(
            (&files.0, &bytes.0),
            (&files.1, &bytes.1),
            provider,
            unix_seconds(),
        )
        .map(Some)
    }

    /// Authorities that others are checked against; empty when there is no file.
    pub(super) fn roots(&self, contents: &Contents) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        let (Some(path), Some(bytes)) = (&self.ca, &contents.ca) else {
            return Ok(roots);
        };
        for certificate in certificates("CA", path, bytes)? {
            roots
                .add(certificate)
                .map_err(|source| TlsError::Unusable {
                    what: "CA",
                    path: path.clone(),
                    source,
                })?;
        }
        Ok(roots)
    }
}

fn own(
    (cert, cert_bytes): (&Path, &[u8]),
    (key, key_bytes): (&Path, &[u8]),
    provider: &CryptoProvider,
    now: i64,
) -> Result<Own, TlsError> {
    let chain = certificates("certificate", cert, cert_bytes)?;
    let secret = PrivateKeyDer::from_pem_slice(key_bytes).map_err(|_none| TlsError::NotPem {
        what: "key",
        path: key.to_owned(),
        expected: "a private key",
        got: described(key_bytes),
    })?;
    let until = valid_until(cert, &chain, now)?;
    let made = CertifiedKey::from_der(chain, secret, provider).map_err(|source| match source {
        rustls::Error::InconsistentKeys(_) => TlsError::KeyMismatch {
            key: key.to_owned(),
            cert: cert.to_owned(),
        },
        source => TlsError::Unusable {
            what: "key",
            path: key.to_owned(),
            source,
        },
    })?;
    let key = Arc::new(made);
    Ok(Own { key, until })
}

/// The end of the first certificate's time; an error outside of it.
fn valid_until(path: &Path, chain: &[CertificateDer<'static>], now: i64) -> Result<i64, TlsError> {
    let unreadable = || TlsError::NotPem {
        what: "certificate",
        path: path.to_owned(),
        expected: "X.509 certificates",
        got: "something else".to_owned(),
    };
    let leaf = chain.first().ok_or_else(unreadable)?;
    let (_rest, parsed) = parse_x509_certificate(leaf).map_err(|_invalid| unreadable())?;
    let validity = parsed.validity();
    let (from, until) = (validity.not_before, validity.not_after);
    if now < from.timestamp() || now > until.timestamp() {
        return Err(TlsError::NotNow {
            path: path.to_owned(),
            from: from.to_string(),
            until: until.to_string(),
            now: date(now),
        });
    }
    Ok(until.timestamp())
}

/// A time as certificates show it.
pub(super) fn date(unix_seconds: i64) -> String {
    ASN1Time::from_timestamp(unix_seconds)
        .map_or_else(|_beyond| unix_seconds.to_string(), |time| time.to_string())
}

fn certificates(
    what: &'static str,
    path: &Path,
    bytes: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) | Err(_) => Err(TlsError::NotPem {
            what,
            path: path.to_owned(),
            expected: "at least one certificate",
            got: described(bytes),
        }),
    }
}

/// What a file has instead; nothing of what may be secret.
fn described(bytes: &[u8]) -> String {
    const MARK: &[u8] = b"-----BEGIN ";
    if bytes.is_empty() {
        return "an empty file".to_owned();
    }
    let begin = bytes.windows(MARK.len()).position(|w| w == MARK);
    let Some(begin) = begin else {
        return format!("{} bytes that are no PEM", bytes.len());
    };
    let label = bytes[begin + MARK.len()..].iter();
    let label: Vec<u8> = label
        .take(32)
        .take_while(|b| **b != b'-')
        .copied()
        .collect();
    format!(
        "PEM with a {}",
        String::from_utf8_lossy(&label).escape_debug()
    )
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read {
        what,
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        let (path, max) = (path.to_owned(), FILE_BYTES_MAX);
        return Err(TlsError::TooLarge { what, path, max });
    }
    Ok(bytes)
}

/// The clock.
pub(super) fn unix_seconds() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    i64::try_from(now.unwrap_or_default().as_secs()).unwrap_or(i64::MAX)
}
