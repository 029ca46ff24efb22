//! The exchange over gRPC: one long-lived stream per pair of workers and direction of calls.
//! No compression, no unary calls, no call without a credit.

mod client;
pub(crate) mod codec;
mod dial;
mod service;

use std::time::Duration;

pub use client::{GrpcTransport, GrpcTransportConfig, PEER_QUEUE_MAX};
pub use dial::{Dial, TcpDial};
pub use service::{ExpertService, ExpertServiceConfig};
use tramontane_proto::v1;

/// HTTP/2 window of a stream: a frame of a large prefill must not wait for a window update.
pub const STREAM_WINDOW_BYTES: u32 = 32 << 20;
/// HTTP/2 window of a connection.
pub const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Largest HTTP/2 frame: the default of 16 KiB cuts a reply into thousands.
pub const HTTP2_FRAME_BYTES: u32 = 1 << 20;
/// How often a peer is pinged, also while idle; a stopped process is noticed after this and the timeout.
pub const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(500);
/// How long a ping may go unanswered before the connection counts as lost.
pub const KEEPALIVE_TIMEOUT: Duration = Duration::from_millis(500);
/// How long connecting and greeting may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Most calls that one stream may have open, whatever the peer's hello grants.
pub const CREDITS_MAX: usize = 256;
/// Streams of calls that a service takes at once unless configured otherwise: one per calling worker,
/// and some more for those that connect anew before the old stream is seen to be lost.
pub const EXCHANGE_STREAMS_MAX: usize = 256;
/// Most HTTP/2 streams of one connection, of every service of the server together. Above what a router
/// has under way at one worker, as further requests wait unseen.
pub const CONNECTION_STREAMS_MAX: u32 = 4096;
/// Calls that a stream may have open unless configured otherwise.
pub const CREDITS: usize = 32;

/// How connections between workers are kept. Both sides should use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkSettings {
    /// How long connecting and greeting may take.
    pub connect_timeout: Duration,
    /// How often the peer is pinged, also while idle.
    pub keepalive_interval: Duration,
    /// How long a ping may go unanswered.
    pub keepalive_timeout: Duration,
    /// HTTP/2 window of a stream, bytes.
    pub stream_window_bytes: u32,
    /// HTTP/2 window of a connection, bytes.
    pub connection_window_bytes: u32,
}

impl Default for LinkSettings {
    fn default() -> Self {
        Self {
            connect_timeout: CONNECT_TIMEOUT,
            keepalive_interval: KEEPALIVE_INTERVAL,
            keepalive_timeout: KEEPALIVE_TIMEOUT,
            stream_window_bytes: STREAM_WINDOW_BYTES,
            connection_window_bytes: CONNECTION_WINDOW_BYTES,
        }
    }
}

/// What two workers must agree on before a row is worth sending.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group<'a> {
    pub(crate) cluster: &'a str,
    pub(crate) numeric_class: &'a str,
    pub(crate) model: &'a str,
}

impl Group<'_> {
    pub(crate) fn hello(&self, worker: &str, credits: usize) -> v1::Hello {
        v1::Hello {
            worker_id: worker.to_owned(),
            cluster: self.cluster.to_owned(),
            numeric_class: self.numeric_class.to_owned(),
            model: self.model.to_owned(),
            credits: u32::try_from(credits).unwrap_or(u32::MAX),
        }
    }

    /// Names the first thing in which `theirs` differs from us.
    pub(crate) fn check(&self, theirs: &v1::Hello) -> Result<(), String> {
        let pairs = [
            ("cluster", self.cluster, &theirs.cluster),
            ("numeric class", self.numeric_class, &theirs.numeric_class),
            ("model", self.model, &theirs.model),
        ];
        for (what, ours, theirs) in pairs {
            if ours != theirs {
                let theirs = codec::clip(theirs.clone());
                return Err(format!("{what} is {theirs:?}, expected {ours:?}"));
            }
        }
        Ok(())
    }
}
