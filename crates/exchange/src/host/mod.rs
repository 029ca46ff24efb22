//! The exchange between workers of one host: the same frames as over gRPC, on a Unix socket that the
//! waiting thread reads itself. No async runtime between a call and the thread that computes it.
//!
//! A runtime hands a frame from thread to thread five times between the caller and the experts and back;
//! every hand-over is a wake-up. Here a call is written by the engine's thread and read by whoever sits at
//! the other worker's [`Desk`](crate::Desk). The gRPC connection stays the way when there is no socket.

mod frame;
pub(crate) mod fuzzing;
mod greeting;
mod link;
mod listener;
mod sockets;
mod transport;

use std::path::PathBuf;

pub use listener::HostListener;
pub(crate) use listener::new_caller;
pub(crate) use sockets::{Doorbell, Sockets};
pub use transport::HostTransport;

/// Where a worker can be reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerAddress {
    /// `host:port` of its gRPC server.
    pub address: String,
    /// Its Unix socket, when it is on this host.
    pub socket: Option<PathBuf>,
}
