//! Carries rows to experts and sums what comes back. Knows no model.
//!
//! The engine thread calls [`Exchange::dispatch`] and [`Exchange::combine`] for every layer. What is
//! to be sent where is decided in [`plan`] (pure); [`ExpertExchange`] sends it over a [`Transport`],
//! computes its own share meanwhile, and asks elsewhere when an answer does not come. The other half
//! of a worker is its [`ExpertServer`]: one thread that merges the waiting calls of a layer.
//! Both halves of a worker meet at its [`Desk`]: one thread at a time takes answers and serves calls.
//! gRPC stands behind [`GrpcTransport`] and [`ExpertService`]; Unix sockets of the
//! same host behind [`HostTransport`] and [`HostListener`]; nothing here blocks a runtime thread.

mod answers;
pub mod call;
mod desk;
pub mod error;
pub mod exchange;
mod failure;
pub mod faults;
mod flight;
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
mod health;
mod host;
pub mod limits;
mod local;
mod merge;
mod meters;
#[doc(hidden)]
pub mod mutation;
mod patience;
pub mod plan;
mod rhythm;
mod seam;
pub mod server;
pub mod stats;
pub mod transport;
pub mod turns;
mod validate;

pub use call::{ExpertCall, Job, Refusal, Reply, ReplySender};
pub use desk::{Desk, LOOK_TIME};
pub use error::Error;
pub use exchange::{ExchangeConfig, ExpertExchange};
pub use faults::{Cut, FAULTS_KEPT_MAX, Faults, FaultyTransport};
pub use flight::Ticket;
pub use grpc::{
    Dial, ExpertService, ExpertServiceConfig, GrpcTransport, GrpcTransportConfig, LinkSettings,
    TcpDial,
};
pub use host::{HostListener, HostTransport, PeerAddress};
pub use limits::CallLimits;
pub use local::LocalTransport;
pub use seam::Exchange;
pub use server::{ExpertServer, ExpertServerConfig, ExpertServerHandle, ExpertServerStats};
pub use stats::ExchangeStats;
pub use transport::{Transport, TransportStats};
