//! Why a worker cannot start or had to end. Never what a client did wrong: that is a [`crate::GenerateError`].

use std::fmt;
/// A setting that breaks its rule.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{key} must be {rule}, got {got}")]
pub struct ConfigError {
    /// Which setting.
    pub key: String,
    /// What is allowed.
    pub rule: String,
    /// What came.
    pub got: String,
}

impl ConfigError {
    pub(crate) fn new(key: &str, rule: &str, got: &dyn fmt::Display) -> Self {
        Self {
            key: key.to_owned(),
            rule: rule.to_owned(),
            got: got.to_string(),
        }
    }
}

/// Why a worker could not start or ended by itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting breaks its rule.
    #[error("configuration")]
    Config(#[from] ConfigError),
    /// The backend refuses the model, or its weights.
    #[error("the backend refuses the model")]
    Backend(#[source] tramontane_compute::Error),
    /// A tensor could not be read.
    #[error("the checkpoint cannot be read")]
    Checkpoint(#[source] tramontane_model::Error),
    /// No other worker describes the checkpoint that it lists.
    #[error("no description of the checkpoint {model}")]
    Described {
        /// Fingerprint of the checkpoint.
        model: String,
        /// Who was asked, and what each said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The engine refuses its limits.
    #[error("the engine refuses its configuration")]
    Engine(#[source] tramontane_engine::Error),
    /// The record would not be accepted by anybody.
    #[error("the worker cannot be registered")]
    Registration(#[source] tramontane_coordination::Error),
    /// The operating system refuses a thread.
    #[error("no thread for {what}")]
    Thread {
        /// What it was for.
        what: &'static str,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The listening socket has no address.
    #[error("the address of the gRPC listener")]
    Address(#[source] std::io::Error),
    /// The gRPC server ended by itself.
    #[error("the gRPC server ended")]
    Server(#[source] tonic::transport::Error),
    /// The descriptions of the services could not be read.
    #[error("gRPC reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The engine's thread panicked.
    #[error("the engine's thread ended by itself")]
    EngineEnded,
    /// A task that prepares the worker panicked.
    #[error("{what} ended by itself")]
    Task {
        /// What it was doing.
        what: &'static str,
        /// How it ended.
        #[source]
        source: tokio::task::JoinError,
    },
}
