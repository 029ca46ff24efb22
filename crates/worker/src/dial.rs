//! Connections to other workers for expert calls: those of this process's identity. Tries once.

use tonic::async_trait;
use tonic::transport::{Channel, Endpoint, Error};
use tramontane_exchange::Dial;
use tramontane_runtime::tls::Link;

/// Dials over a [`Link`].
#[derive(Clone, Debug)]
pub(crate) struct LinkDial(pub(crate) Link);

#[async_trait]
impl Dial for LinkDial {
    async fn dial(&self, endpoint: Endpoint) -> Result<Channel, Error> {
        self.0.connect(&endpoint).await
    }
}
