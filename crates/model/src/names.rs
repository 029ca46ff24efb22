//! What tensors are called: in Hugging Face's checkpoints, and in GGUF files. Opens nothing.

use tramontane_types::{ExpertId, LayerId};

use crate::config::Architecture;

/// Which names a checkpoint has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Naming {
    HuggingFace,
    Gguf,
}

/// The tensors that are there once.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Global {
    Embed,
    Norm,
    LmHead,
}

/// The tensors of a layer that stay with the attention worker.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InLayer {
    InputNorm,
    Q,
    K,
    V,
    O,
    PostNorm,
    Gate,
}

/// The matrices of an expert, or of the feed-forward block of a dense model.
#[derive(Clone, Copy, Debug)]
pub(crate) enum InExpert {
    W1,
    W2,
    W3,
}

impl Naming {
    pub(crate) fn global(self, tensor: Global) -> &'static str {
        let (hugging_face, gguf) = match tensor {
            Global::Embed => ("model.embed_tokens.weight", "token_embd.weight"),
            Global::Norm => ("model.norm.weight", "output_norm.weight"),
            Global::LmHead => ("lm_head.weight", "output.weight"),
        };
        match self {
            Self::HuggingFace => hugging_face,
            Self::Gguf => gguf,
        }
    }

    pub(crate) fn in_layer(self, layer: usize, tensor: InLayer) -> String {
        let (hugging_face, gguf) = match tensor {
            InLayer::InputNorm => ("input_layernorm", "attn_norm"),
            InLayer::Q => ("self_attn.q_proj", "attn_q"),
            InLayer::K => ("self_attn.k_proj", "attn_k"),
            InLayer::V => ("self_attn.v_proj", "attn_v"),
            InLayer::O => ("self_attn.o_proj", "attn_output"),
            InLayer::PostNorm => ("post_attention_layernorm", "ffn_norm"),
            InLayer::Gate => ("block_sparse_moe.gate", "ffn_gate_inp"),
        };
        match self {
            Self::HuggingFace => format!("model.layers.{layer}.{hugging_face}.weight"),
            Self::Gguf => format!("blk.{layer}.{gguf}.weight"),
        }
    }

    /// Of GGUF files: the name that [`gguf::tensors`](crate::gguf::tensors) gives to each expert.
    pub(crate) fn in_expert(
        self,
        architecture: Architecture,
        (layer, expert): (LayerId, ExpertId),
        tensor: InExpert,
    ) -> String {
        let (mixtral, mistral, gguf) = match tensor {
            InExpert::W1 => ("w1", "gate_proj", "ffn_gate"),
            InExpert::W2 => ("w2", "down_proj", "ffn_down"),
            InExpert::W3 => ("w3", "up_proj", "ffn_up"),
        };
        match (self, architecture) {
            (Self::HuggingFace, Architecture::MixtralForCausalLM) => {
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}.{mixtral}.weight")
            }
            (Self::HuggingFace, Architecture::MistralForCausalLM) => {
                format!("model.layers.{layer}.mlp.{mistral}.weight")
            }
            (Self::Gguf, Architecture::MixtralForCausalLM) => {
                format!("blk.{layer}.{gguf}.{expert}.weight")
            }
            (Self::Gguf, Architecture::MistralForCausalLM) => format!("blk.{layer}.{gguf}.weight"),
        }
    }
}
