//! The settings of every process in one tree: file, environment and flags merged once, at the start.

mod etcd;
mod secret;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path;

use serde::{Deserialize, Serialize};
use toml::{Table, Value};
use tramontane_router::{AuthConfig, RouterConfig, TenantConfig};
use tramontane_runtime::config::{self, Layers, Loaded, Source};
use tramontane_runtime::telemetry::TelemetryConfig;
use tramontane_runtime::tls::TlsSettings;
use tramontane_worker::WorkerConfig;

pub(crate) use etcd::EtcdSettings;

/// Port of the OpenAI-compatible HTTP API.
pub(crate) const HTTP_PORT: u16 = 8000;
/// Port of the router's gRPC API.
pub(crate) const ROUTER_GRPC_PORT: u16 = 8001;
/// Port of the router's gRPC API for operators.
pub(crate) const ADMIN_PORT: u16 = 8002;
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
    /// Certificates, and whether to do without.
    pub(crate) tls: TlsSettings,
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

/// Where processes listen: `host:port`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct ListenSettings {
    /// The router's HTTP API.
    pub(crate) http: String,
    /// The router's gRPC API.
    pub(crate) grpc: String,
    /// The router's gRPC API for operators.
    pub(crate) admin: String,
    /// A worker's gRPC API.
    pub(crate) worker: String,
    /// A worker's health checks and metrics.
    pub(crate) ops: String,
}

impl ListenSettings {
    /// Checks that each is an address.
    ///
    /// # Errors
    /// [`Misuse`] that names the setting.
    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        for (key, address) in [
            ("listen.http", &self.http),
            ("listen.grpc", &self.grpc),
            ("listen.admin", &self.admin),
            ("listen.worker", &self.worker),
            ("listen.ops", &self.ops),
        ] {
            crate::doors::resolved(key, address)?;
        }
        Ok(())
    }
}

impl Default for ListenSettings {
    fn default() -> Self {
        let at = |port: u16| format!("{LOOPBACK}:{port}");
        Self {
            http: at(HTTP_PORT),
            grpc: at(ROUTER_GRPC_PORT),
            admin: at(ADMIN_PORT),
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
    config::load(&layers).map_err(|e| misuse(chain(&e)))
}

/// Whether file, environment or a flag says `section.key`.
pub(crate) fn is_given(loaded: &Loaded<Settings>, key: &str) -> bool {
    let source = loaded.sources.get(key);
    source.is_some_and(|source| *source != Source::Default)
}

/// An error with all that lies beneath it.
pub(crate) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some repeat their cause.
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}
