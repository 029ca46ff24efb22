//! How the operator's commands reach a router: in the clear on this machine, with the operator's certificate elsewhere.
//! Tries once.

use std::error::Error as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tramontane_runtime::tls::{Expected, Link, Role, Tls, Trust};

use crate::args::RouterAddress;
use crate::exit::{Exit, refusal};
use crate::settings::{self, Flags, chain, misuse};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects to the admin port of the router that the operator names.
///
/// # Errors
/// With exit status 2 for an address or a certificate that is none, and 5 when nobody answers there.
pub(crate) async fn admin(
    address: &RouterAddress,
    timeout: Option<Duration>,
) -> anyhow::Result<Channel> {
    let tls = operator(address)?;
    let (with_tls, authority) = split(&address.router);
    let link = match with_tls.unwrap_or(tls.has_cluster()) {
        false => Link::plain(),
        true if tls.has_cluster() => tls.link(Role::Router),
        true => {
            let message = format!(
                "--router {} needs the operator's certificate, got none",
                address.router
            );
            let next = "--tls-ca, --tls-cert and --tls-key, or --config with a [tls] section";
            return Err(refusal(Exit::Misused, message, next));
        }
    };
    connect("--router", authority, &link, timeout).await
}

/// Connects to the public gRPC port of a router.
///
/// # Errors
/// As [`admin`].
pub(crate) async fn public(url: &str, ca: Option<&Path>) -> anyhow::Result<Channel> {
    let (with_tls, authority) = split(url);
    let link = match (with_tls.unwrap_or(false), ca) {
        (false, _) => Link::plain(),
        (true, Some(ca)) => {
            let trust = Trust::load("public gRPC", ca.to_owned(), None);
            trust.map_err(|error| misuse(chain(&error)))?.link()
        }
        (true, None) => {
            let message = format!("--grpc {url} needs the CA of its certificate, got none");
            return Err(refusal(Exit::Misused, message, "--grpc-ca FILE"));
        }
    };
    connect("--grpc", authority, &link, None).await
}

/// The operator's identity, of the flags, the environment or a configuration file.
fn operator(address: &RouterAddress) -> anyhow::Result<Tls> {
    let mut flags = Flags::default();
    let text = |path: &Option<PathBuf>| path.as_ref().map(|path| path.display().to_string());
    flags.set("tls", "cluster_ca", text(&address.tls_ca));
    flags.set("tls", "cluster_cert", text(&address.tls_cert));
    flags.set("tls", "cluster_key", text(&address.tls_key));
    let mut settings = settings::load(address.config.as_deref(), flags)?.value.tls;
    // What a server shows to its clients is none of an operator's.
    (settings.clients_cert, settings.clients_key) = (None, None);
    Tls::load(&settings, Expected::Role(Role::Operator)).map_err(|error| misuse(chain(&error)))
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

    #[test]
    fn the_scheme_of_an_address_says_whether_it_wants_tls() {
        assert_eq!(split("https://a:1"), (Some(true), "a:1"));
        assert_eq!(split("http://a:1"), (Some(false), "a:1"));
        assert_eq!(split("a:1"), (None, "a:1"));
        assert_eq!(split("ftp://a:1"), (Some(false), "ftp://a:1"));
    }
}
