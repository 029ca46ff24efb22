//! How a connection to another worker is made: the one thing about it that differs between plain TCP and
//! whatever else carries bytes. Keeps nothing and tries once.

use std::fmt;

use tonic::async_trait;
use tonic::transport::{Channel, Endpoint, Error};

/// Makes connections.
#[async_trait]
pub trait Dial: Send + Sync + fmt::Debug {
    /// Connects to `endpoint`, which says where, how to keep the connection, and how long it may take.
    ///
    /// # Errors
    /// When there is no connection.
    async fn dial(&self, endpoint: Endpoint) -> Result<Channel, Error>;
}

/// TCP, in the clear.
#[derive(Clone, Copy, Debug, Default)]
pub struct TcpDial;

#[async_trait]
impl Dial for TcpDial {
    async fn dial(&self, endpoint: Endpoint) -> Result<Channel, Error> {
        endpoint.connect().await
    }
}
