//! A whole cluster in one thread, under virtual time, with faults by seed. The same seed gives the same run.
//!
//! Real are the planner, the balancer, election, registration, watches and their views, the worker's rules
//! about slices, the expert exchange with its planning and retries, and the router's admission, journal,
//! sequences and pool. Not real are processes, network, store server, weights and clients. Start reading at
//! [`world`]; `docs/simulation.md` says more. Nothing that serves depends on this crate.

pub mod check;
pub mod client;
pub mod engine;
pub mod experts;
pub mod faults;
pub mod model;
pub mod net;
pub mod panics;
mod rest;
pub mod rng;
pub mod router;
pub mod runs;
pub mod store;
pub mod worker;
pub mod world;

pub use runs::{Totals, run_seeds, run_seeds_with, tokenizer};
pub use world::{Outcome, run_seed};
