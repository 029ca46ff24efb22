//! Checkpoints end to end: what is refused, what transformers computes from them, and the exactness contract.
#![expect(clippy::unwrap_used, reason = "a test ends where something is wrong")]

mod described;
mod driver;
mod exact;
mod files;
mod gguf;
mod golden;
