//! Which ports a process may open: beyond this machine only with TLS, or on the operator's explicit word.

use std::net::{SocketAddr, ToSocketAddrs as _};

use anyhow::Context as _;
use tokio::net::TcpListener;
use tramontane_router::AuthConfig;
use tramontane_runtime::tls::{Expected, PeerName, Role, Tls, TlsSettings, is_here};
use tramontane_worker::WorkerConfig;

use crate::settings::{chain, misuse};

/// A port that is to be opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Port<'a> {
    /// The setting that says where.
    pub(crate) key: &'static str,
    /// Where.
    pub(crate) address: &'a str,
    /// What it shows.
    pub(crate) shows: Shows,
}

/// Which identity a port shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shows {
    /// That for clients.
    Clients,
    /// That for other processes.
    Cluster,
}

/// The identities of a server of a cluster.
///
/// # Errors
/// [`Misuse`](crate::settings::Misuse) that says what is wrong with which file.
pub(crate) fn identities(settings: &TlsSettings, cluster: &str, role: Role) -> anyhow::Result<Tls> {
    let expected = Expected::Name(PeerName::new(cluster, role));
    Tls::load(settings, expected).map_err(|error| misuse(chain(&error)))
}

/// Refuses ports that others could reach and that have no TLS, unless the operator wants it so.
///
/// # Errors
/// [`Misuse`](crate::settings::Misuse) that names the port and the ways out; or an address that is none.
pub(crate) fn check(ports: &[Port<'_>], tls: &Tls, insecure: bool) -> anyhow::Result<()> {
    for port in ports {
        let has_tls = match port.shows {
            Shows::Clients => tls.has_clients(),
            Shows::Cluster => tls.has_cluster(),
        };
        if has_tls || insecure || stays_here(port)? {
            continue;
        }
        let Port {
            key,
            address,
            shows,
        } = port;
        let files = match shows {
            Shows::Clients => "tls.clients_cert and tls.clients_key",
            Shows::Cluster => "tls.cluster_cert, tls.cluster_key and tls.cluster_ca",
        };
        return Err(misuse(format!(
            "{key} is {address}, beyond this machine, and has no TLS: expected {files} (`tramontane certs init` \
             makes them), an address of this machine, or --insecure to serve in the clear"
        )));
    }
    Ok(())
}

/// Refuses ports that others could reach and at which nobody is asked who they are, unless the operator wants it so.
///
/// # Errors
/// As [`check`].
pub(crate) fn check_callers(
    ports: &[Port<'_>],
    auth: &AuthConfig,
    insecure: bool,
) -> anyhow::Result<()> {
    if auth.is_on() || auth.anonymous || insecure {
        return Ok(());
    }
    for port in ports {
        if port.shows == Shows::Cluster || stays_here(port)? {
            continue;
        }
        let (key, address) = (port.key, port.address);
        return Err(misuse(format!(
            "{key} is {address}, beyond this machine, and whoever reaches it may ask: expected auth.keys_file \
             (`tramontane keys add` makes keys) or [auth.jwt], an address of this machine, or auth.anonymous = true \
             (TRAMONTANE_AUTH__ANONYMOUS=true) to serve everybody"
        )));
    }
    Ok(())
}

/// Refuses a rank whose leader is on another machine, unless the operator wants it so: NCCL, by which ranks exchange partial
/// sums, does not encrypt.
///
/// # Errors
/// [`Misuse`](crate::settings::Misuse) that names the leader and the ways out.
pub(crate) fn check_island(worker: &WorkerConfig, insecure: bool) -> anyhow::Result<()> {
    if worker.island_rank == 0 || worker.island_network_trusted || insecure {
        return Ok(());
    }
    let Some(leader) = &worker.island_leader else {
        return Ok(());
    };
    // A name that nobody knows yet may be that of another machine.
    let found: Vec<_> = leader.to_socket_addrs().into_iter().flatten().collect();
    if !found.is_empty() && found.iter().all(is_here) {
        return Ok(());
    }
    let rank = worker.island_rank;
    Err(misuse(format!(
        "worker.island_leader of rank {rank} is {leader}, beyond this machine, and NCCL exchanges partial sums in the clear: \
         expected a loopback address, worker.island_network_trusted = true \
         (TRAMONTANE_WORKER__ISLAND_NETWORK_TRUSTED=true) where nobody else reaches the island's network, or --insecure"
    )))
}

/// Whether only this machine reaches a port.
fn stays_here(port: &Port<'_>) -> anyhow::Result<bool> {
    let found = resolved(port.key, port.address)?;
    Ok(!found.is_empty() && found.iter().all(is_here))
}

/// What `host:port` stands for.
///
/// # Errors
/// [`Misuse`](crate::settings::Misuse) that names the key, when it is no such thing or nobody knows the host.
pub(crate) fn resolved(key: &str, address: &str) -> anyhow::Result<Vec<SocketAddr>> {
    let found = address
        .to_socket_addrs()
        .map_err(|error| misuse(format!("{key} must be host:port, got {address:?}: {error}")))?;
    Ok(found.collect())
}

/// Listens on `host:port`.
pub(crate) async fn bind(address: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Misuse;

    fn checked(address: &str, shows: Shows, insecure: bool) -> anyhow::Result<()> {
        let key = "listen.ops";
        let port = Port {
            key,
            address,
            shows,
        };
        check(&[port], &Tls::default(), insecure)
    }

    #[test]
    fn a_port_without_tls_stays_on_this_machine_unless_somebody_says_otherwise() {
        for here in [
            "127.0.0.1:1",
            "127.9.9.9:1",
            "[::1]:1",
            "localhost:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            checked(here, Shows::Cluster, false).unwrap();
        }
        for beyond in ["0.0.0.0:8101", "[::]:8101", "10.0.0.1:8101"] {
            checked(beyond, Shows::Cluster, true).unwrap();
            let error = checked(beyond, Shows::Cluster, false).unwrap_err();
            let text = error.to_string();
            assert!(error.is::<Misuse>(), "{text}");
            for word in [
                beyond,
                "listen.ops",
                "tls.cluster_cert",
                "certs init",
                "--insecure",
            ] {
                assert!(text.contains(word), "{text}");
            }
        }
        let error = checked("0.0.0.0:1", Shows::Clients, false).unwrap_err();
        assert!(error.to_string().contains("tls.clients_cert"), "{error}");
        assert!(
            checked("nowhere", Shows::Clients, false)
                .unwrap_err()
                .is::<Misuse>()
        );
    }

    /// What NCCL carries is in the clear: the class "NCCL / tensor RPC" of docs/security.md.
    #[test]
    fn an_island_spans_machines_only_where_somebody_says_that_its_network_is_trusted() {
        let follower = |leader: &str| WorkerConfig {
            island_ranks: 2,
            island_rank: 1,
            island_leader: Some(leader.to_owned()),
            ..WorkerConfig::default()
        };
        for here in ["127.0.0.1:8100", "[::1]:8100", "localhost:8100"] {
            check_island(&follower(here), false).unwrap();
        }
        for beyond in ["10.0.0.7:8100", "[2001:db8::7]:8100", "0.0.0.0:8100"] {
            let error = check_island(&follower(beyond), false).unwrap_err();
            let text = error.to_string();
            assert!(error.is::<Misuse>(), "{text}");
            for word in [
                beyond,
                "rank 1",
                "NCCL",
                "worker.island_network_trusted = true",
                "--insecure",
            ] {
                assert!(text.contains(word), "{text}");
            }
            check_island(&follower(beyond), true).unwrap();
            let trusted = WorkerConfig {
                island_network_trusted: true,
                ..follower(beyond)
            };
            check_island(&trusted, false).unwrap();
        }
        // The leader calls nobody: each rank that follows is asked for its own.
        let leader = WorkerConfig {
            island_rank: 0,
            ..follower("10.0.0.7:8100")
        };
        check_island(&leader, false).unwrap();
    }

    #[test]
    fn everybody_is_served_beyond_this_machine_only_where_somebody_says_so() {
        let checked = |address, shows, auth: &AuthConfig, insecure| {
            let key = "listen.http";
            let port = Port {
                key,
                address,
                shows,
            };
            check_callers(&[port], auth, insecure)
        };
        let (beyond, nobody) = ("0.0.0.0:8000", AuthConfig::default());
        let error = checked(beyond, Shows::Clients, &nobody, false).unwrap_err();
        let text = error.to_string();
        assert!(error.is::<Misuse>(), "{text}");
        for word in [
            "listen.http",
            beyond,
            "auth.keys_file",
            "[auth.jwt]",
            "auth.anonymous",
        ] {
            assert!(text.contains(word), "{text}");
        }
        checked("127.0.0.1:8000", Shows::Clients, &nobody, false).unwrap();
        // Who comes there shows a certificate.
        checked(beyond, Shows::Cluster, &nobody, false).unwrap();
        checked(beyond, Shows::Clients, &nobody, true).unwrap();
        let everybody = AuthConfig {
            anonymous: true,
            ..AuthConfig::default()
        };
        let keys = AuthConfig {
            keys_file: Some("keys".into()),
            ..AuthConfig::default()
        };
        for said in [everybody, keys] {
            checked(beyond, Shows::Clients, &said, false).unwrap();
        }
    }
}
