//! What tests share: tiny checkpoints, golden comparison, free ports. Never a dependency of shipped code.

pub mod gguf;
pub mod golden;
pub mod net;
pub mod tiny;
