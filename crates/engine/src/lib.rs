//! Continuous batching over a paged KV cache: decides each step and runs it. Never does network I/O
//! itself and never sees text.
//!
//! [`Engine::step`] is one turn of the loop: the scheduler picks rows, the model runner computes them
//! layer by layer, the sampler turns logits into tokens, and the caller receives
//! [`SequenceEvent`]s. One thread owns an [`Engine`]; nothing in here locks for longer than a page
//! takes to change hands, and nothing waits except inside the exchange and, for a moment, for masks.
//!
//! Exactness: what a sequence says depends on its tokens, its sampling parameters and the weights.
//! Batching, chunking, preemption, prefix-cache hits and the fate of other sequences change nothing.

mod batch;
pub mod config;
mod engine;
mod error;
mod kv;
mod lookup;
pub mod masks;
mod model_runner;
mod rows;
mod sampler;
mod scheduler;
mod sequence;
mod stats;

pub use config::EngineConfig;
pub use engine::Engine;
pub use error::{Error, SubmitError};
pub use sequence::{FailureKind, NewSequence, SequenceEvent};
pub use stats::{EngineStats, StepReport, StepTimes};
