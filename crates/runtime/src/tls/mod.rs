//! TLS of a process: what its ports show, whom it believes, how it calls others. Files are followed: what is made after a
//! change has the new identity, what runs goes on. Never logs a key, and never falls back to plaintext.
//!
//! There are two identities. `clients` is what clients see at the public doors. `cluster` is what processes show to each
//! other: both ends have a certificate of the same authority, with cluster and role in it, and both check the other's.

mod access;
mod error;
mod files;
mod handshake;
mod identity;
mod incoming;
mod link;
mod name;
mod quiet;
mod reloaded;
#[cfg(test)]
mod tests;
mod verify;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

pub use access::{Guard, Guarded};
pub use error::TlsError;
pub use handshake::HANDSHAKE_TIMEOUT;
pub use incoming::{CONNECTIONS_MAX, Door, HANDSHAKES_MAX, Incoming, PeerInfo, Socket};
pub use link::{Link, Opened, is_here};
pub use name::{BadName, PeerName, Role};

use crate::duration_text;
use identity::{Clients, Cluster, Outgoing};

/// How often files are looked at: secrets arrive within minutes anyway.
pub const RELOAD_EVERY: Duration = Duration::from_secs(10);

/// Where a process has its identities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// Whether ports without TLS may be open beyond this machine.
    pub insecure: bool,
    /// Certificates (PEM, the own one first) that clients see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients_cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clients_key: Option<PathBuf>,
    /// Certificates that other processes of the cluster see.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_key: Option<PathBuf>,
    /// Authorities that make certificates of the cluster good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_ca: Option<PathBuf>,
    /// How often files are looked at.
    #[serde(with = "duration_text")]
    pub reload_every: Duration,
}

impl Default for TlsSettings {
    fn default() -> Self {
        Self {
            insecure: false,
            clients_cert: None,
            clients_key: None,
            cluster_cert: None,
            cluster_key: None,
            cluster_ca: None,
            reload_every: RELOAD_EVERY,
        }
    }
}

/// What a process's own certificate must say.
#[derive(Clone, Debug)]
pub enum Expected {
    /// This, exactly.
    Name(PeerName),
    /// This role, in whichever cluster: the certificate says which.
    Role(Role),
}

/// The identities of a process. Without any, its ports are in the clear and it calls nobody beyond this machine.
#[derive(Clone, Debug, Default)]
pub struct Tls {
    clients: Option<Arc<Clients>>,
    cluster: Option<Arc<Cluster>>,
    insecure: bool,
}

impl Tls {
    /// Reads and checks everything that the settings name.
    ///
    /// # Errors
    /// When an identity is incomplete, a file is not what it should be, or the certificate is not this process's.
    pub fn load(settings: &TlsSettings, expected: Expected) -> Result<Self, TlsError> {
        let clients = both(
            ("clients_cert", settings.clients_cert.as_ref()),
            ("clients_key", settings.clients_key.as_ref()),
        )?;
        let clients = clients.map(|(cert, key)| identity::clients(cert, key));
        let own = both(
            ("cluster_cert", settings.cluster_cert.as_ref()),
            ("cluster_key", settings.cluster_key.as_ref()),
        )?;
        let with_ca = both(
            ("cluster_cert", settings.cluster_cert.as_ref()),
            ("cluster_ca", settings.cluster_ca.as_ref()),
        )?;
        let cluster = own
            .zip(with_ca)
            .map(|((cert, key), (_, ca))| Cluster::load((cert, key, ca), expected));
        Ok(Self {
            clients: clients.transpose()?.map(Arc::new),
            cluster: cluster.transpose()?.map(Arc::new),
            insecure: settings.insecure,
        })
    }

    /// Follows the files until `stop`.
    pub fn watch(&self, every: Duration, tasks: &TaskTracker, stop: &CancellationToken) {
        if let Some(clients) = &self.clients {
            Arc::clone(clients).watch(every, tasks, stop.clone());
        }
        if let Some(cluster) = &self.cluster {
            Arc::clone(&cluster.current).watch(every, tasks, stop.clone());
        }
    }

    /// Whether clients see a certificate.
    #[must_use]
    pub const fn has_clients(&self) -> bool {
        self.clients.is_some()
    }

    /// Whether other processes do.
    #[must_use]
    pub const fn has_cluster(&self) -> bool {
        self.cluster.is_some()
    }

    /// Cluster and role of this process, as its certificate says.
    #[must_use]
    pub fn name(&self) -> Option<&PeerName> {
        self.cluster.as_ref().map(|cluster| &cluster.name)
    }

    /// A public door.
    #[must_use]
    pub fn clients_door(&self, name: &'static str) -> Door {
        match &self.clients {
            Some(clients) => Door::clients(name, Arc::clone(clients)),
            None => Door::plain(name),
        }
    }

    /// A door for other processes of the cluster.
    #[must_use]
    pub fn cluster_door(&self, name: &'static str) -> Door {
        match &self.cluster {
            Some(cluster) => Door::mutual(name, Arc::clone(cluster)),
            None => Door::plain(name),
        }
    }

    /// A door for health checks and metrics: who asks for those has no certificate of the cluster.
    #[must_use]
    pub fn ops_door(&self, name: &'static str) -> Door {
        match &self.cluster {
            Some(cluster) => Door::open(name, Arc::clone(cluster)),
            None => Door::plain(name),
        }
    }

    /// Lets those through [`Tls::cluster_door`] call what their role may.
    #[must_use]
    pub fn guard(&self) -> Guard {
        let name = self.cluster.as_ref().map(|cluster| &cluster.name);
        name.map_or_else(Guard::default, |name| Guard::of(&name.cluster))
    }

    /// The way to processes of a role.
    #[must_use]
    pub fn link(&self, role: Role) -> Link {
        match &self.cluster {
            Some(cluster) => Link::peer(Arc::clone(cluster), role),
            None if self.insecure => Link::plain(),
            None => Link::default(),
        }
    }
}

/// Trust in servers that are known by their host names, such as etcd's.
#[derive(Clone, Debug)]
pub struct Trust(Arc<Outgoing>);

impl Trust {
    /// Reads the authorities, and the certificate to show if there is one.
    ///
    /// # Errors
    /// When a file is not what it should be.
    pub fn load(
        what: &'static str,
        ca: PathBuf,
        own: Option<(PathBuf, PathBuf)>,
    ) -> Result<Self, TlsError> {
        identity::outgoing(what, ca, own).map(|outgoing| Self(Arc::new(outgoing)))
    }

    /// Follows the files until `stop`.
    pub fn watch(&self, every: Duration, tasks: &TaskTracker, stop: &CancellationToken) {
        Arc::clone(&self.0).watch(every, tasks, stop.clone());
    }

    /// The way to such servers.
    #[must_use]
    pub fn link(&self) -> Link {
        Link::named(Arc::clone(&self.0))
    }
}

/// Makes our cryptography that of libraries which ask the process for one, such as an HTTP client.
pub fn install_provider() {
    // The one that is there already is the same.
    let _was_there = rustls::crypto::ring::default_provider().install_default();
}

/// Both of two settings that only make sense together, or neither.
fn both(
    (one, first): (&'static str, Option<&PathBuf>),
    (two, second): (&'static str, Option<&PathBuf>),
) -> Result<Option<(PathBuf, PathBuf)>, TlsError> {
    let incomplete = |given, missing| TlsError::Incomplete { given, missing };
    match (first, second) {
        (Some(first), Some(second)) => Ok(Some((first.clone(), second.clone()))),
        (Some(_), None) => Err(incomplete(one, two)),
        (None, Some(_)) => Err(incomplete(two, one)),
        (None, None) => Ok(None),
    }
}
