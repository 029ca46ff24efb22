//! Mistral and Mixtral checkpoints: `config.json` and safetensors, or GGUF. Reads; never computes a token.
//!
//! A checkpoint is checked completely before anything is allocated for it: every tensor's file, type,
//! shape and place. Errors name file, tensor, expected and got.

pub mod checkpoint;
pub mod config;
pub mod demo;
pub mod error;
mod fingerprint;
pub mod gguf;
pub mod inspect;
pub mod load;
pub mod manifest;
mod names;
mod parallel;
mod shard;
pub mod tensors;
pub mod verify;

pub use checkpoint::{Checkpoint, Overrides};
pub use config::ModelConfig;
pub use error::Error;
pub use inspect::Inspection;
pub use load::load_slices;
pub use verify::VerifyReport;
