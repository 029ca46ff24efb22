//! Serves an engine and its experts to the cluster. Sees token ids only, never text.
//!
//! [`run`] is a worker's whole life: load, listen, register, follow the placements, drain, leave. One
//! thread owns the engine ([`EngineHandle`] speaks to it), one thread computes the expert calls of
//! others, and everything that waits for the network is a task of the runtime.

mod assemble;
mod attention;
mod backend;
pub mod config;
pub mod device;
mod dial;
mod drain;
mod drill;
pub mod engine_thread;
mod error;
mod expert_keeper;
mod follower;
#[doc(hidden)]
pub mod following;
#[doc(hidden)]
pub mod fuzzing;
mod generate_service;
mod host_socket;
mod island;
mod measure;
mod metrics;
mod part;
mod peers;
mod registration;
mod roles;
mod run;
mod server;
mod severable;
mod state;
pub mod status;
mod watched;
mod weights;

pub use config::{RoleSet, WorkerConfig, machine_memory};
pub use drill::{DRILL_DELAY_MAX, DRILL_MAX, DRILL_PEERS_MAX, DrillError, ProcessKind};
pub use engine_thread::{
    EngineHandle, EngineThread, Generation, GenerationEvent, GenerationFailure, RefusedSequence,
};
pub use error::{ConfigError, Error};
pub use island::rank::{RankParts, run_rank};
pub use part::MixedClass;
pub use run::{ExchangeKind, WorkerParts, run};
pub use status::{ERROR_DOMAIN, GenerateError, reason};
pub use weights::{PeerModel, PeerOpened, open_from_peers};
