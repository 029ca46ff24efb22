//! Where etcd is, whom to believe there, and who we are to it. Shows no password.

use std::net::{Ipv6Addr, ToSocketAddrs as _};
use std::num::NonZeroU16;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use tramontane_coordination::EtcdConfig;
use tramontane_runtime::tls::{self, Trust};

use super::secret::Secret;
use super::{chain, misuse};

const HTTP: &str = "http://";
const HTTPS: &str = "https://";

/// Where etcd is. The cluster's name is the worker's and the router's alike.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct EtcdSettings {
    /// Such as `http://etcd-0:2379`.
    pub(crate) endpoints: Vec<String>,
    /// Processes of one name work together.
    pub(crate) cluster: String,
    /// Authorities of etcd's certificates, for TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_ca: Option<PathBuf>,
    /// Certificate that etcd is shown.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls_key: Option<PathBuf>,
    /// User, where etcd asks for one.
    pub(crate) user: String,
    /// The user's password.
    pub(crate) password: Secret,
    /// File with it, instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) password_file: Option<PathBuf>,
    /// Where a process keeps what it last knew of the cluster, for a start while etcd is away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) state_dir: Option<PathBuf>,
}

impl Default for EtcdSettings {
    fn default() -> Self {
        Self {
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
            user: String::new(),
            password: Secret::default(),
            password_file: None,
            state_dir: None,
            endpoints: vec!["http://127.0.0.1:2379".to_owned()],
            cluster: tramontane_worker::config::CLUSTER.to_owned(),
        }
    }
}

impl EtcdSettings {
    /// Checks that every endpoint is `host:port`, with or without `http://` or `https://` in front, and that what
    /// belongs together is there.
    ///
    /// # Errors
    /// [`Misuse`](super::Misuse) that names the setting.
    pub(crate) fn validate(&self) -> anyhow::Result<()> {
        EtcdConfig::new(self.endpoints.clone(), &self.cluster)
            .validate()
            .map_err(misuse)?;
        if let Some(url) = self.endpoints.iter().find(|url| !is_endpoint(url)) {
            return Err(misuse(format!(
                "etcd.endpoints must be host:port or http(s)://host:port, got {url:?}"
            )));
        }
        let https = self.endpoints.iter().find(|url| url.starts_with(HTTPS));
        if let Some(url) = https.filter(|_| self.tls_ca.is_none()) {
            return Err(misuse(format!(
                "etcd.tls_ca must name the authorities of {url}, got nothing"
            )));
        }
        match (&self.tls_cert, &self.tls_key, &self.tls_ca) {
            (None, None, _) | (Some(_), Some(_), Some(_)) => {}
            _ => {
                let text = "etcd.tls_cert needs etcd.tls_key and etcd.tls_ca beside it";
                return Err(misuse(text));
            }
        }
        let has_password = !self.password.is_empty() || self.password_file.is_some();
        if has_password == self.user.is_empty() {
            return Err(misuse("etcd.user needs a password, and a password a user"));
        }
        Ok(())
    }

    /// An endpoint that is reached in the clear.
    fn plain(&self) -> Option<&String> {
        let is_plain = |url: &&String| {
            url.starts_with(HTTP) || (self.tls_ca.is_none() && !url.starts_with(HTTPS))
        };
        self.endpoints.iter().find(is_plain)
    }

    /// User and password, read where they are.
    ///
    /// # Errors
    /// [`Misuse`](super::Misuse) for a file that cannot be read, or when the password would go over a network in the clear.
    pub(crate) fn login(&self, insecure: bool) -> anyhow::Result<Option<(String, Secret)>> {
        if self.user.is_empty() {
            return Ok(None);
        }
        if let Some(url) = self.plain().filter(|url| !insecure && !is_here(url)) {
            return Err(misuse(format!(
                "etcd.user would be sent in the clear to {url}: expected https, or --insecure"
            )));
        }
        let password = match &self.password_file {
            Some(path) if self.password.is_empty() => {
                let read = std::fs::read_to_string(path);
                let read = read.map_err(|error| {
                    misuse(format!("etcd.password_file {}: {error}", path.display()))
                })?;
                Secret::new(read.trim_end_matches(['\r', '\n']).to_owned())
            }
            _ => self.password.clone(),
        };
        Ok(Some((self.user.clone(), password)))
    }

    /// Whom to believe at the other end, and what to show there.
    ///
    /// # Errors
    /// [`Misuse`](super::Misuse) for files that are not what they should be.
    pub(crate) fn trust(&self) -> anyhow::Result<Option<Trust>> {
        let Some(ca) = self.tls_ca.clone() else {
            return Ok(None);
        };
        let own = self.tls_cert.clone().zip(self.tls_key.clone());
        let trust = Trust::load("etcd", ca, own);
        trust.map(Some).map_err(|error| misuse(chain(&error)))
    }
}

/// Whether an endpoint is on this machine.
fn is_here(url: &str) -> bool {
    let authority = url.strip_prefix(HTTP).unwrap_or(url).trim_end_matches('/');
    let found = authority.to_socket_addrs();
    found.is_ok_and(|mut found| found.all(|address| tls::is_here(&address)))
}

fn is_endpoint(url: &str) -> bool {
    let plain = [HTTP, HTTPS].iter().find_map(|s| url.strip_prefix(s));
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

#[cfg(test)]
mod tests {
    use super::super::Misuse;
    use super::*;

    #[test]
    fn an_etcd_endpoint_is_a_host_and_a_port() {
        let check = |url: &str| {
            let endpoints = vec!["http://etcd-0:2379".to_owned(), url.to_owned()];
            let settings = EtcdSettings {
                endpoints,
                tls_ca: Some(PathBuf::from("ca.pem")),
                ..EtcdSettings::default()
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

    #[test]
    fn what_belongs_together_is_asked_for_together() {
        let good = EtcdSettings::default();
        good.validate().unwrap();
        let refused = |change: fn(&mut EtcdSettings)| {
            let mut settings = good.clone();
            change(&mut settings);
            settings.validate().unwrap_err().to_string()
        };
        let text = refused(|s| s.endpoints = vec!["https://etcd:1".to_owned()]);
        assert!(text.contains("etcd.tls_ca") && text.contains("https://etcd:1"));
        assert!(refused(|s| s.tls_cert = Some("c".into())).contains("etcd.tls_key"));
        assert!(refused(|s| s.user = "tramontane".to_owned()).contains("password"));
        assert!(refused(|s| s.password = Secret::new("x".to_owned())).contains("user"));
    }

    #[test]
    fn a_password_is_not_sent_over_a_network_in_the_clear() {
        let at = |url: &str, ca: bool| EtcdSettings {
            endpoints: vec![url.to_owned()],
            tls_ca: ca.then(|| "ca.pem".into()),
            user: "u".to_owned(),
            password: Secret::new("hunter2".to_owned()),
            ..EtcdSettings::default()
        };
        let error = at("10.0.0.1:2379", false)
            .login(false)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("10.0.0.1:2379") && !error.contains("hunter2"),
            "{error}"
        );
        assert!(at("http://10.0.0.1:2379", true).login(false).is_err());
        for (settings, insecure) in [
            (at("10.0.0.1:2379", false), true),
            (at("10.0.0.1:2379", true), false),
            (at("https://10.0.0.1:2379", true), false),
            (at("http://127.0.0.1:2379", false), false),
        ] {
            let (user, password) = settings.login(insecure).unwrap().unwrap();
            assert_eq!((user.as_str(), password.reveal()), ("u", "hunter2"));
        }
    }
}
