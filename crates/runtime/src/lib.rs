//! What every process does at start and stop: configuration, TLS, logs and traces, metrics, health, shutdown.

mod accepted;
pub mod build_info;
pub mod config;
pub mod duration_text;
pub mod metrics;
pub mod ops;
pub mod readiness;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace_context;

pub use accepted::{Accepted, HELLO_TIMEOUT, WRITE_STALL_MAX};
pub use readiness::{Readiness, ReadinessSetter};
pub use shutdown::Shutdown;
