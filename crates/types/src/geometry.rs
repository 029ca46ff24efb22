//! The shape of a model: every number that a backend, the engine or the planner needs, already checked.

use serde::{Deserialize, Serialize};

use crate::slice;

/// Shape of a Mistral or Mixtral model. Names follow the published `config.json` where they are short.
///
/// A dense Mistral is a mixture of one expert that is always chosen: `num_experts == 1`, `top_k == 1`
/// and no gate tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelGeometry {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Transformer layers.
    pub num_layers: usize,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head; even; `num_heads * head_dim` may differ from `hidden`.
    pub head_dim: usize,
    /// Intermediate dimension of one expert.
    pub ff: usize,
    /// Experts per layer; 1 for a dense model.
    pub num_experts: usize,
    /// Experts chosen per token.
    pub top_k: usize,
    /// Rows of the embedding and of the LM head.
    pub vocab: usize,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Epsilon of every RMS norm.
    pub rms_eps: f64,
    /// Keys visible to a query, itself included; `None` means all of them.
    pub sliding_window: Option<usize>,
    /// Longest sequence (prompt and output together).
    pub max_positions: usize,
}

impl ModelGeometry {
    /// Whether a gate chooses experts; false for a dense model.
    #[must_use]
    pub const fn has_gate(&self) -> bool {
        self.num_experts > 1
    }

    /// Non-empty segments of each expert, see [`mod@slice`].
    #[must_use]
    pub const fn num_segments(&self) -> u8 {
        slice::num_segments(self.ff)
    }
}
