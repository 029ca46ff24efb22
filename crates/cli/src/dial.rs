//! How the operator's commands reach a router: in the clear on this machine, with the operator's certificate elsewhere.
//! Tries once. Never sends a key in the clear beyond this machine, unless the operator insists.

use std::error::Error as _;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tramontane_runtime::tls::{Expected, Link, Role, Tls, Trust, is_here};

use crate::args::RouterAddress;
use crate::exit::{Exit, refusal};
use crate::settings::{self, Flags, chain, misuse};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// What to try where an operator's certificate is missing.
const WITH_CERTIFICATE: &str =
    "--tls-ca, --tls-cert and --tls-key, or --config with a [tls] section";
/// What to try where the CA of the certificate for clients is missing.
const WITH_CA: &str = "--grpc https://HOST:PORT with --grpc-ca FILE";

/// A connection whose every call says who asks.
pub(crate) type Proven = InterceptedService<Channel, Proof>;

/// Says with every call who asks, if anybody is to know.
#[derive(Clone, Debug)]
pub(crate) struct Proof(Option<MetadataValue<Ascii>>);

impl Proof {
    fn new(api_key: Option<&str>) -> anyhow::Result<Self> {
        let Some(key) = api_key.filter(|key| !key.is_empty()) else {
            return Ok(Self(None));
        };
        let bearer = MetadataValue::try_from(format!("Bearer {key}"));
        let mut bearer = bearer.map_err(|_| misuse("an API key must be visible characters"))?;
        bearer.set_sensitive(true);
        Ok(Self(Some(bearer)))
    }
}

impl Interceptor for Proof {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = &self.0 {
            request
                .metadata_mut()
                .insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

/// Connects to the admin port of the router that the operator names.
///
/// # Errors
/// With exit status 2 for an address or a certificate that is none, or one beyond this machine in the clear; and 5 when
/// nobody answers there.
pub(crate) async fn admin(
    address: &RouterAddress,
    timeout: Option<Duration>,
) -> anyhow::Result<Proven> {
    let proof = Proof::new(address.api_key.as_deref())?;
    let (tls, insecure) = operator(address)?;
    let (with_tls, authority) = split(&address.router);
    let link = match with_tls.unwrap_or(tls.has_cluster()) {
        false => plain(("--router", authority), WITH_CERTIFICATE, insecure)?,
        true if tls.has_cluster() => tls.link(Role::Router),
        true => {
            let message = format!(
                "--router {} needs the operator's certificate, got none",
                address.router
            );
            return Err(refusal(Exit::Misused, message, WITH_CERTIFICATE));
        }
    };
    let channel = connect("--router", authority, &link, timeout).await?;
    Ok(InterceptedService::new(channel, proof))
}

/// Where a server of clients is, and who asks there.
#[derive(Clone, Copy)]
pub(crate) struct Public<'a> {
    pub(crate) url: &'a str,
    pub(crate) ca: Option<&'a Path>,
    pub(crate) api_key: Option<&'a str>,
    pub(crate) insecure: bool,
}

/// Connects to the public gRPC port of a router.
///
/// # Errors
/// As [`admin`].
pub(crate) async fn public(to: Public<'_>) -> anyhow::Result<Proven> {
    let proof = Proof::new(to.api_key)?;
    let (with_tls, authority) = split(to.url);
    let link = match (with_tls.unwrap_or(false), to.ca) {
        (false, _) => plain(("--grpc", authority), WITH_CA, to.insecure)?,
        (true, Some(ca)) => {
            let trust = Trust::load("public gRPC", ca.to_owned(), None);
            trust.map_err(|error| misuse(chain(&error)))?.link()
        }
        (true, None) => {
            let message = format!(
                "--grpc {} needs the CA of its certificate, got none",
                to.url
            );
            return Err(refusal(Exit::Misused, message, WITH_CA));
        }
    };
    let channel = connect("--grpc", authority, &link, None).await?;
    Ok(InterceptedService::new(channel, proof))
}

/// A way in the clear, which goes no further than this machine unless the operator insists.
fn plain((flag, authority): (&str, &str), with_tls: &str, insecure: bool) -> anyhow::Result<Link> {
    if insecure {
        return Ok(Link::plain());
    }
    // A name that means nothing yet is looked up again, and held to the same rule, by the link.
    let found = authority.to_socket_addrs();
    if found.is_ok_and(|found| is_beyond(&found.collect::<Vec<_>>())) {
        let message = format!(
            "{flag} {authority} is beyond this machine: a key and what is asked would go there in the clear"
        );
        let next = format!("{with_tls}; or --insecure");
        return Err(refusal(Exit::Misused, message, next));
    }
    Ok(Link::default())
}

/// Whether any of these addresses is another machine's.
pub(crate) fn is_beyond(found: &[SocketAddr]) -> bool {
    !found.iter().all(is_here)
}

/// The operator's identity, of the flags, the environment or a configuration file; and whether to do without.
fn operator(address: &RouterAddress) -> anyhow::Result<(Tls, bool)> {
    let mut flags = Flags::default();
    let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    flags.set("tls", "cluster_ca", text(&address.tls_ca));
    flags.set("tls", "cluster_cert", text(&address.tls_cert));
    flags.set("tls", "cluster_key", text(&address.tls_key));
    flags.set("tls", "insecure", address.insecure.then_some(true));
    let mut settings = settings::load(address.config.as_deref(), flags)?.value.tls;
    // What a server shows to its clients is none of an operator's.
    (settings.clients_cert, settings.clients_key) = (None, None);
    let tls = Tls::load(&settings, Expected::Role(Role::Operator));
    let tls = tls.map_err(|error| misuse(chain(&error)))?;
    Ok((tls, settings.insecure))
}

/// Whether an address wants TLS, if it says, and where it is.
fn split(address: &str) -> (Option<bool>, &str) {
    match address.split_once("://") {
        Some(("https", authority)) => (Some(true), authority),
        Some(("http", authority)) => (Some(false), authority),
        // Another scheme is no address.
        Some(_) => (Some(false), address),
        None => (None, address),
    }
}

async fn connect(
    flag: &str,
    authority: &str,
    link: &Link,
    timeout: Option<Duration>,
) -> anyhow::Result<Channel> {
    let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|error| {
        let message = format!("{flag} {authority:?} is no address: {error}");
        refusal(Exit::Misused, message, format!("{flag} 127.0.0.1:8002"))
    })?;
    let endpoint = endpoint.connect_timeout(CONNECT_TIMEOUT);
    let endpoint = match timeout {
        Some(timeout) => endpoint.timeout(timeout),
        None => endpoint,
    };
    link.connect(&endpoint).await.map_err(|error| {
        let cause = error.source().map_or_else(|| error.to_string(), chain);
        let next = format!("tramontane serve (starts one), or name a running one with {flag}");
        let message = format!("no router at {authority}: {cause}");
        refusal(Exit::Unavailable, message, next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit;

    #[test]
    fn the_scheme_of_an_address_says_whether_it_wants_tls() {
        assert_eq!(split("https://a:1"), (Some(true), "a:1"));
        assert_eq!(split("http://a:1"), (Some(false), "a:1"));
        assert_eq!(split("a:1"), (None, "a:1"));
        assert_eq!(split("ftp://a:1"), (Some(false), "ftp://a:1"));
    }

    #[test]
    fn nothing_goes_beyond_this_machine_in_the_clear_unless_somebody_insists() {
        for here in ["127.0.0.1:8002", "[::1]:8002", "localhost:8002"] {
            plain(("--router", here), WITH_CERTIFICATE, false).unwrap();
        }
        let beyond = ("--router", "192.0.2.2:8002");
        let error = plain(beyond, WITH_CERTIFICATE, false).unwrap_err();
        assert_eq!(exit::of(&error), Exit::Misused);
        let text = error.to_string();
        for word in ["--router 192.0.2.2:8002", "--tls-cert", "--insecure"] {
            assert!(text.contains(word), "{text}");
        }
        plain(beyond, WITH_CERTIFICATE, true).unwrap();
    }
}
