//! The settings of every process in one tree: file, environment and flags merged once, at the start.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::net::Ipv6Addr;
use std::num::NonZeroU16;
use std::path::Path;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use tramontane_router::{AuthConfig, RouterConfig, TenantConfig};
use tramontane_runtime::config::{self, Layers, Loaded, Source};
use tramontane_runtime::telemetry::TelemetryConfig;
use tramontane_worker::WorkerConfig;

/// Port of the OpenAI-compatible HTTP API.
pub(crate) const HTTP_PORT: u16 = 8000;
/// Port of the router's gRPC API.
pub(crate) const ROUTER_GRPC_PORT: u16 = 8001;
/// Port of a worker's gRPC API.
pub(crate) const WORKER_GRPC_PORT: u16 = 8100;
/// Port of a worker's health checks and metrics.
pub(crate) const WORKER_OPS_PORT: u16 = 8101;
/// Only this machine may connect, until somebody says otherwise.
const LOOPBACK: &str = "127.0.0.1";

/// A command or configuration that was written wrongly: exit status 2.
#[derive(Debug)]
pub(crate) struct Misuse(String);

impl Display for Misuse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Misuse {}

/// Wraps an error as the user's.
pub(crate) fn misuse(error: impl Display) -> anyhow::Error {
    anyhow::Error::new(Misuse(error.to_string()))
}

/// Every setting.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Settings {
    /// Who may ask the router.
    pub(crate) auth: AuthConfig,
    /// Where etcd is.
    pub(crate) etcd: EtcdSettings,
    /// Where processes listen.
    pub(crate) listen: ListenSettings,
    /// The router.
    pub(crate) router: RouterConfig,
    /// What a tenant may use where its own section does not say.
    pub(crate) tenant_defaults: TenantConfig,
    /// What each tenant may use: a section per tenant.
    tenants: BTreeMap<String, TenantConfig>,
    /// Logs and traces.
    pub(crate) telemetry: TelemetryConfig,
    /// The worker.
    pub(crate) worker: WorkerConfig,
}

impl Settings {
    /// The router's settings, with the sections that stand by themselves.
    pub(crate) fn router(&self) -> RouterConfig {
        RouterConfig {
            auth: self.auth.clone(),
            tenant_defaults: self.tenant_defaults.clone(),
            tenants: self.tenants.clone(),
            ..self.router.clone()
        }
    }
}

/// Where etcd is. The cluster's name is the worker's and the router's alike.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EtcdSettings {
    /// Such as `http://etcd-0:2379`.
    pub(crate) endpoints: Vec<String>,
    /// Processes of one name work together.
    pub(crate) cluster: String,
    /// Where a process keeps what it last knew of the cluster, for a start while etcd is away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_dir: Option<PathBuf>,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            state_dir: None,
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            cluster: tramontane_worker::config::CLUSTER.to_owned(),
        }
    }
}

impl EtcdSettings {
    /// Checks that every endpoint is `host:port`, with or without `http://` or `https://` in front.
    ///
    /// # Errors
    /// [`Misuse`] that names the endpoint.
    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        match self.endpoints.iter().find(|url| !is_endpoint(url)) {
            Some(url) => Err(misuse(format!(
                "etcd.endpoints must be host:port or http(s)://host:port, got {url:?}"
            ))),
            None => Ok(()),
        }
    }
}

fn is_endpoint(url: &str) -> bool {
    let plain = ["http://", "https://"]
        .iter()
        .find_map(|s| url.strip_prefix(s));
    let authority = plain.unwrap_or(url).trim_end_matches('/');
    authority.rsplit_once(':').is_some_and(|(host, port)| {
        let is_v6 = |host: &str| {
            let inner = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
            inner.is_some_and(|inner| inner.parse::<Ipv6Addr>().is_ok())
        };
        let in_name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let is_name = !host.is_empty() && host.bytes().all(in_name);
        (is_name || is_v6(host)) && port.parse::<NonZeroU16>().is_ok()
    })
}

/// Where processes listen: `host:port`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ListenSettings {
    /// The router's HTTP API.
    pub(crate) http: String,
    /// The router's gRPC API.
    pub(crate) grpc: String,
    /// A worker's gRPC API.
    pub(crate) worker: String,
    /// A worker's health checks and metrics.
    pub(crate) ops: String,
}

impl Default for ListenSettings {
    fn default() -> Self {
        let at = |port: u16| format!("{LOOPBACK}:{port}");
        Self {
            http: at(HTTP_PORT),
            grpc: at(ROUTER_GRPC_PORT),
            worker: at(WORKER_GRPC_PORT),
            ops: at(WORKER_OPS_PORT),
        }
    }
}

/// Flags on their way into the tree; absent flags leave no key.
#[derive(Debug, Default)]
pub(crate) struct Flags(Table);

impl Flags {
    /// Sets `section.key` when the flag was given.
    pub(crate) fn set<T: Into<Value>>(&mut self, section: &str, key: &str, value: Option<T>) {
        let Some(value) = value else { return };
        let section = self
            .0
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()));
        if let Value::Table(section) = section {
            section.insert(key.to_owned(), value.into());
        }
    }
}

/// Merges file, environment and flags over the defaults.
///
/// # Errors
/// [`Misuse`] with the key, the value and the rule.
pub(crate) fn load(file: Option<&Path>, flags: Flags) -> anyhow::Result<Loaded<Settings>> {
    let layers = Layers {
        file,
        environment: config::environment(),
        flags: flags.0,
    };
    config::load(&layers).map_err(|e| misuse(with_cause(&e)))
}

/// Whether file, environment or a flag says `section.key`.
pub(crate) fn is_given(loaded: &Loaded<Settings>, key: &str) -> bool {
    let source = loaded.sources.get(key);
    source.is_some_and(|source| *source != Source::Default)
}

fn with_cause(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_etcd_endpoint_is_a_host_and_a_port() {
        let check = |url: &str| {
            let endpoints = vec!["http://etcd-0:2379".to_owned(), url.to_owned()];
            let cluster = String::new();
            let settings = EtcdSettings {
                endpoints,
                cluster,
                state_dir: None,
            };
            settings.validate()
        };
        for good in ["etcd:2379", "https://10.0.0.1:2379/", "http://[::1]:2379"] {
            check(good).unwrap();
        }
        for bad in [
            "",
            "notaurl",
            "http://",
            "http://etcd",
            "etcd:0",
            "etcd:65536",
            ":2379",
            "ftp://etcd:1",
            "http://etcd:2379/path",
            "::1:2379",
            "a b:1",
        ] {
            let error = check(bad).unwrap_err();
            assert!(
                error.is::<Misuse>() && error.to_string().contains(&format!("{bad:?}")),
                "{error}"
            );
        }
    }
}
