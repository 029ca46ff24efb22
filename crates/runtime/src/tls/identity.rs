//! What a process shows and whom it believes, as rustls wants it. Decides nothing about calls.
//!
//! Where a certificate is checked, no session is resumed: who resumes one is not checked again, and would get in for as
//! long as it likes by a certificate that has ended. Connections between processes are long, so whole handshakes are few.

use std::path::PathBuf;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::UnixTime;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, RootCertStore, ServerConfig, SupportedProtocolVersion};

use super::files::{Contents, Files, Own};
use super::name::{PeerName, Role};
use super::reloaded::{Made, Reloaded};
use super::verify::PeerVerifier;
use super::{Expected, TlsError};

/// What is spoken inside, the better one first.
const HTTP: [&[u8]; 2] = [b"h2", b"http/1.1"];
/// gRPC needs HTTP/2.
const GRPC: &[u8] = b"h2";
const VERSIONS: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];

/// The certificate that clients see.
pub(super) type Clients = Reloaded<ServerConfig>;
/// How a server is checked that is known by its host name, such as an etcd.
pub(super) type Outgoing = Reloaded<ClientConfig>;

/// What a process of the cluster shows to others of it, and how it checks them.
#[derive(Debug)]
pub(super) struct Cluster {
    pub(super) name: PeerName,
    pub(super) current: Arc<Reloaded<Configs>>,
}

#[derive(Debug)]
pub(super) struct Configs {
    name: PeerName,
    /// For servers whose callers must show a certificate.
    pub(super) mutual: Arc<ServerConfig>,
    /// For servers that anybody may ask.
    pub(super) open: Arc<ServerConfig>,
    to_router: Arc<ClientConfig>,
    to_worker: Arc<ClientConfig>,
}

impl Cluster {
    /// Reads the identity for the first time; later ones must have the same name.
    pub(super) fn load(
        (cert, key, ca): (PathBuf, PathBuf, PathBuf),
        expected: Expected,
    ) -> Result<Self, TlsError> {
        let (own, ca) = (Some((cert, key)), Some(ca));
        let make = move |files: &Files, contents: &Contents| configs(files, contents, &expected);
        let current = Reloaded::load("cluster", Files { own, ca }, make)?;
        Ok(Self {
            name: current.get().name.clone(),
            current: Arc::new(current),
        })
    }

    /// How to call processes of a role. Nobody calls operators.
    pub(super) fn to(&self, role: Role) -> Arc<ClientConfig> {
        let configs = self.current.get();
        match role {
            Role::Worker => Arc::clone(&configs.to_worker),
            Role::Router | Role::Operator => Arc::clone(&configs.to_router),
        }
    }
}

/// Reads what clients see.
pub(super) fn clients(cert: PathBuf, key: PathBuf) -> Result<Clients, TlsError> {
    let own = Some((cert, key));
    Reloaded::load("clients", Files { own, ca: None }, |files, contents| {
        let provider = Arc::new(ring::default_provider());
        let Some(own) = files.own(contents, &provider)? else {
            return Err(incomplete(files, rustls::Error::NoCertificatesPresented));
        };
        let config = server(&provider, &own, None).map_err(|e| incomplete(files, e))?;
        Ok((config, Some(own.until)))
    })
}

/// Reads how a server with a host name is checked, and what it is shown if anything is.
pub(super) fn outgoing(
    what: &'static str,
    ca: PathBuf,
    own: Option<(PathBuf, PathBuf)>,
) -> Result<Outgoing, TlsError> {
    let ca = Some(ca);
    Reloaded::load(what, Files { own, ca }, |files, contents| {
        let provider = Arc::new(ring::default_provider());
        let own = files.own(contents, &provider)?;
        let roots = files.roots(contents)?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&VERSIONS)
            .map_err(|e| incomplete(files, e))?
            .with_root_certificates(roots);
        let mut config = match &own {
            Some(own) => config.with_client_cert_resolver(resolver(own)),
            None => config.with_no_client_auth(),
        };
        config.alpn_protocols = vec![GRPC.to_vec()];
        config.resumption = Resumption::disabled();
        Ok((config, own.map(|own| own.until)))
    })
}

fn resolver(own: &Own) -> Arc<SingleCertAndKey> {
    Arc::new(SingleCertAndKey::from((*own.key).clone()))
}

fn server(
    provider: &Arc<CryptoProvider>,
    own: &Own,
    callers: Option<Arc<dyn ClientCertVerifier>>,
) -> Result<ServerConfig, rustls::Error> {
    let config = ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&VERSIONS)?;
    let checks_callers = callers.is_some();
    let config = match callers {
        Some(callers) => config.with_client_cert_verifier(callers),
        None => config.with_no_client_auth(),
    };
    let mut config = config.with_cert_resolver(resolver(own));
    config.alpn_protocols = HTTP.map(<[u8]>::to_vec).to_vec();
    if checks_callers {
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
    }
    Ok(config)
}

fn to_peer(
    provider: &Arc<CryptoProvider>,
    own: &Own,
    roots: &Arc<RootCertStore>,
    peer: PeerName,
) -> Result<ClientConfig, rustls::Error> {
    let verifier = PeerVerifier::new(Arc::clone(roots), provider, peer);
    let mut config = ClientConfig::builder_with_provider(Arc::clone(provider))
        .with_protocol_versions(&VERSIONS)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(resolver(own));
    config.alpn_protocols = vec![GRPC.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

fn configs(
    files: &Files,
    contents: &Contents,
    expected: &Expected,
) -> Result<Made<Configs>, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let own = files.own(contents, &provider)?;
    let own = own.ok_or_else(|| incomplete(files, rustls::Error::NoCertificatesPresented))?;
    let roots = Arc::new(files.roots(contents)?);
    let name = own_name(files, &own, expected)?;
    let callers = callers(&provider, &own, &roots).map_err(|source| not_of_ca(files, source))?;
    let unusable = |source| incomplete(files, source);
    let to = |role| {
        let peer = PeerName::new(&name.cluster, role);
        to_peer(&provider, &own, &roots, peer).map(Arc::new)
    };
    let configs = Configs {
        mutual: Arc::new(server(&provider, &own, Some(callers)).map_err(unusable)?),
        open: Arc::new(server(&provider, &own, None).map_err(unusable)?),
        to_router: to(Role::Router).map_err(unusable)?,
        to_worker: to(Role::Worker).map_err(unusable)?,
        name,
    };
    Ok((configs, Some(own.until)))
}

/// Who checks callers; an error when they and we would refuse our own certificate.
fn callers(
    provider: &Arc<CryptoProvider>,
    own: &Own,
    roots: &Arc<RootCertStore>,
) -> Result<Arc<dyn ClientCertVerifier>, rustls::Error> {
    let (chain, now) = (&own.key.cert, UnixTime::now());
    let algorithms = provider.signature_verification_algorithms;
    PeerVerifier::check_chain(roots, algorithms, chain, now)?;
    let callers =
        WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider))
            .build()
            .map_err(|error| rustls::Error::General(error.to_string()))?;
    if let Some((leaf, intermediates)) = chain.split_first() {
        callers.verify_client_cert(leaf, intermediates, now)?;
    }
    Ok(callers)
}

fn own_name(files: &Files, own: &Own, expected: &Expected) -> Result<PeerName, TlsError> {
    let path = files.own.as_ref().map(|(cert, _)| cert.clone());
    let path = path.unwrap_or_default();
    let leaf = own.key.cert.first();
    let got = leaf.map_or(Err(super::BadName::Unreadable), PeerName::of);
    let got = got.map_err(|source| TlsError::NoName {
        path: path.clone(),
        source,
    })?;
    match expected {
        Expected::Name(expected) if got != *expected => Err(TlsError::OtherName {
            path,
            expected: expected.clone(),
            got,
        }),
        Expected::Role(expected) if got.role != *expected => Err(TlsError::OtherRole {
            path,
            expected: *expected,
            got,
        }),
        Expected::Name(_) | Expected::Role(_) => Ok(got),
    }
}

fn not_of_ca(files: &Files, source: rustls::Error) -> TlsError {
    let cert = files.own.as_ref().map(|(cert, _)| cert.clone());
    TlsError::NotOfCa {
        cert: cert.unwrap_or_default(),
        ca: files.ca.clone().unwrap_or_default(),
        source,
    }
}

fn incomplete(files: &Files, source: rustls::Error) -> TlsError {
    let cert = files.own.as_ref().map(|(cert, _)| cert.clone());
    TlsError::Unusable {
        what: "certificate",
        path: cert.or_else(|| files.ca.clone()).unwrap_or_default(),
        source,
    }
}
