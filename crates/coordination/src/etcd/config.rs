//! Where etcd is, how to get there and how long to wait for it. Shows no password.

use std::fmt;
use std::time::Duration;

use etcd_client::ConnectOptions;
use tonic::transport::Endpoint;
use tramontane_runtime::tls::Link;

use super::{
    ATTEMPT_TIMEOUT, CALL_DEADLINE, CLUSTER_NAME_BYTES_MAX, CONNECT_TIMEOUT, PING_EVERY,
    PING_TIMEOUT,
};
use crate::Error;

/// Where etcd is and how long to wait for it.
#[derive(Clone)]
pub struct EtcdConfig {
    /// Such as `http://etcd-0:2379`; a missing scheme means http.
    pub endpoints: Vec<String>,
    /// Name of the cluster: keys live below `/tramontane/<cluster>/`.
    pub cluster: String,
    /// User and password.
    pub user: Option<(String, String)>,
    /// The way to endpoints that have TLS: those of `https`, and those without a scheme.
    pub tls: Option<Link>,
    /// See [`CALL_DEADLINE`].
    pub call_deadline: Duration,
    /// See [`ATTEMPT_TIMEOUT`].
    pub attempt_timeout: Duration,
    /// See [`CONNECT_TIMEOUT`].
    pub connect_timeout: Duration,
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("cluster", &self.cluster)
            .field("user", &self.user.as_ref().map(|(name, _password)| name))
            .field("call_deadline", &self.call_deadline)
            .field("attempt_timeout", &self.attempt_timeout)
            .field("connect_timeout", &self.connect_timeout)
            .finish()
    }
}

impl EtcdConfig {
    /// The default limits, no user.
    #[must_use]
    pub fn new(endpoints: Vec<String>, cluster: &str) -> Self {
        Self {
            endpoints,
            cluster: cluster.to_owned(),
            user: None,
            tls: None,
            call_deadline: CALL_DEADLINE,
            attempt_timeout: ATTEMPT_TIMEOUT,
            connect_timeout: CONNECT_TIMEOUT,
        }
    }

    /// Checks the endpoints' number and the cluster's name.
    ///
    /// # Errors
    /// [`Error::Invalid`] that says which, and the rule.
    pub fn validate(&self) -> Result<(), Error> {
        if self.endpoints.is_empty() {
            return Err(Error::invalid("etcd.endpoints", "none given"));
        }
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let named = (1..=CLUSTER_NAME_BYTES_MAX).contains(&self.cluster.len());
        if !named || !self.cluster.bytes().all(plain) {
            let what = format!("etcd.cluster {:?}", self.cluster);
            return Err(Error::invalid(
                what,
                "1 to 63 letters, digits and ._- expected",
            ));
        }
        Ok(())
    }

    /// A channel to an endpoint with TLS; `None` for one in the clear.
    pub(super) fn secured(
        &self,
        url: &str,
    ) -> Result<Option<tonic::transport::Channel>, etcd_client::Error> {
        let authority = url.strip_prefix("https://").unwrap_or(url);
        let Some(link) = self.tls.as_ref().filter(|_| !url.starts_with("http://")) else {
            return Ok(None);
        };
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))?
            .origin(format!("https://{authority}").parse()?)
            .connect_timeout(self.connect_timeout)
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_TIMEOUT);
        Ok(Some(link.connect_lazy(&endpoint)))
    }

    pub(super) fn connect_options(&self) -> ConnectOptions {
        let options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(self.connect_timeout)
            .with_keep_alive(PING_EVERY, PING_TIMEOUT)
            .with_keep_alive_while_idle(false)
            .with_auto_token_refresh(true);
        match &self.user {
            Some((name, password)) => options.with_user(name, password),
            None => options,
        }
    }
}
