//! What `serve` and `worker` are told of a worker's arithmetic.

use clap::Args;

/// What a worker computes with.
#[derive(Debug, Args)]
pub(crate) struct ComputeArgs {
    /// What to compute on: auto (a GPU when one can be used), cpu, or cuda:N
    #[arg(long)]
    pub(crate) device: Option<String>,
    /// Weight format: bf16, q8, q4, e4m3 (GPUs), or f32 (reference backend, for checking); that of the file when absent
    #[arg(long)]
    pub(crate) weights: Option<String>,
    /// Format of cached keys and values: f16 or q8
    #[arg(long)]
    pub(crate) kv_format: Option<String>,
}
