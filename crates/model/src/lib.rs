//! Mistral and Mixtral checkpoints: `config.json` and safetensors, or GGUF. Reads; never computes a token.
//!
//! A checkpoint is checked completely before anything is allocated for it: every tensor's file, type,
//! shape and place. Errors name file, tensor, expected and got. Weights come from files, or from whoever
//! has them ([`Source`]), when they are to be packed.

pub mod checkpoint;
pub mod config;
pub mod demo;
pub mod described;
pub mod error;
mod fingerprint;
#[doc(hidden)]
pub mod fuzzing;
pub mod gguf;
pub mod inspect;
pub mod load;
pub mod manifest;
mod names;
mod parallel;
mod read;
mod shard;
pub mod source;
pub mod tensors;
pub mod verify;

pub use checkpoint::{Checkpoint, Overrides};
pub use config::ModelConfig;
pub use described::{Description, FileDescription};
pub use error::Error;
pub use inspect::Inspection;
pub use load::load_slices;
pub use read::{AttentionBytes, ExpertBytes};
pub use shard::Form;
pub use source::{Part, Source};
pub use verify::VerifyReport;
