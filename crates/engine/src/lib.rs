//! Continuous batching over a paged KV cache: decides each step and runs it.
