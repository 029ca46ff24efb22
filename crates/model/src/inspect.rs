//! What a checkpoint is, in numbers that an operator plans with.

use serde::Serialize;
use tramontane_types::ModelGeometry;

use crate::Checkpoint;
use crate::config::Architecture;

/// Summary of a checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Class in `config.json`.
    pub architecture: Architecture,
    /// Short name of the content.
    pub fingerprint: String,
    /// The shape.
    pub geometry: ModelGeometry,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Numbers in all tensors that are used.
    pub parameters: u64,
    /// All but the experts that a token does not choose.
    pub parameters_active: u64,
    /// Numbers in all experts.
    pub parameters_experts: u64,
    /// Bytes of all experts as bf16, q8 and q4 (without padding).
    pub expert_bytes: FormatBytes,
    /// Bytes of keys and values per token of context, 16-bit.
    pub kv_bytes_per_token: u64,
    /// Weight files and their sizes.
    pub files: Vec<(String, u64)>,
}

/// Bytes in each weight format.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct FormatBytes {
    /// Two bytes each.
    pub bf16: u64,
    /// 34 bytes per 32.
    pub q8: u64,
    /// 18 bytes per 32.
    pub q4: u64,
}

impl Checkpoint {
    /// Summary for `tramontane model inspect`.
    #[must_use]
    pub fn inspect(&self) -> Inspection {
        let g = self.geometry();
        let (hidden, layers) = (g.hidden as u64, g.num_layers as u64);
        let heads = (g.num_heads * g.head_dim) as u64;
        let kv = (g.num_kv_heads * g.head_dim) as u64;
        let gate = if g.has_gate() {
            g.num_experts as u64 * hidden
        } else {
            0
        };
        let attention = 2 * hidden * heads + 2 * hidden * kv + 2 * hidden + gate;
        let expert = 3 * hidden * g.ff as u64;
        let experts = layers * g.num_experts as u64 * expert;
        let table = g.vocab as u64 * hidden;
        let tables = if self.config().tie_word_embeddings {
            table
        } else {
            2 * table
        };
        let others = layers * attention + tables + hidden;
        Inspection {
            architecture: self.config().architecture,
            fingerprint: self.fingerprint().to_owned(),
            geometry: g.clone(),
            tie_word_embeddings: self.config().tie_word_embeddings,
            parameters: others + experts,
            parameters_active: others + layers * g.top_k as u64 * expert,
            parameters_experts: experts,
            expert_bytes: FormatBytes {
                bf16: experts * 2,
                q8: experts / 32 * 34,
                q4: experts / 32 * 20,
            },
            kv_bytes_per_token: layers * kv * 2 * 2,
            files: self
                .shards()
                .iter()
                .map(|s| (s.name.clone(), s.len as u64))
                .collect(),
        }
    }
}
