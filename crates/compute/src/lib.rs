//! What computes: the `Backend` traits, block formats, and the reference backend.
//!
//! A backend has two halves. [`Attention`] owns the KV cache and the residual stream of the running
//! step (one per attention worker, used by one thread). [`Experts`] holds expert slices and is pure:
//! any thread may call it, for its own rows or for those of another worker. The reference backend
//! ([`mod@reference`]) is the specification; every other one is tested against it.

pub mod backend;
pub mod batch;
pub mod batch_check;
mod bf16_rows;
mod blocks;
pub mod combine;
pub mod error;
pub mod kv;
pub mod quant;
pub mod reference;
pub mod sampling;
pub mod tensor;

pub use backend::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, ExpertJob,
    ExpertWeights, Experts, RoutedRows, RowFormat, WeightFormat,
};
pub use batch::{KV_PAGE_TOKENS, SequenceSpan, StepBatch};
pub use bf16_rows::Bf16Rows;
pub use combine::{Contributions, ExpertSum, Piece};
pub use error::Error;
pub use kv::KvFormat;
pub use sampling::{Choice, SampleError, StepOutputs, Wanted};
pub use tensor::{DType, HostTensor, RowOrder};
