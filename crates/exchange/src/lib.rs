//! Carries rows to experts and sums what comes back. Knows no model.
//!
//! The engine thread calls [`Exchange::dispatch`] and [`Exchange::combine`] for every layer. What is
//! to be sent where is decided in [`plan`] (pure); [`ExpertExchange`] sends it over a [`Transport`],
//! computes its own share meanwhile, and asks elsewhere when an answer does not come. The other half
//! of a worker is its [`ExpertServer`]: one thread that merges the waiting calls of a layer.
//! gRPC stands behind [`GrpcTransport`] and [`ExpertService`]; nothing here blocks a runtime thread.

mod answers;
pub mod call;
pub mod error;
pub mod exchange;
mod failure;
mod flight;
pub mod grpc;
mod health;
pub mod limits;
mod local;
mod merge;
pub mod plan;
pub mod server;
pub mod stats;
pub mod transport;
mod validate;

pub use call::{ExpertCall, Job, Refusal, Reply, ReplySender};
pub use error::Error;
pub use exchange::{Exchange, ExchangeConfig, ExpertExchange};
pub use flight::Ticket;
pub use grpc::{
    ExpertService, ExpertServiceConfig, GrpcTransport, GrpcTransportConfig, LinkSettings,
};
pub use limits::CallLimits;
pub use local::LocalTransport;
pub use server::{ExpertServer, ExpertServerConfig, ExpertServerHandle, ExpertServerStats};
pub use stats::ExchangeStats;
pub use transport::{Transport, TransportStats};
