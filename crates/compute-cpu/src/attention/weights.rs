//! The attention worker's tensors, checked and packed. Nothing here changes after loading.

use tramontane_compute::{AttentionLayerWeights, AttentionWeights, Error, HostTensor};

use crate::context::{Context, check_size, check_tensor};
use crate::kernels::quantise::to_bf16;
use crate::pack::PackedMatrix;

/// Everything of a checkpoint but the experts.
pub(crate) struct Weights {
    /// `[vocab, hidden]` bf16.
    pub(crate) embed: Vec<u16>,
    pub(crate) layers: Vec<LayerWeights>,
    pub(crate) norm: Vec<f32>,
    pub(crate) lm_head: PackedMatrix,
}

/// One layer.
pub(crate) struct LayerWeights {
    pub(crate) input_norm: Vec<f32>,
    /// The rows of q, then k, then v.
    pub(crate) qkv: PackedMatrix,
    pub(crate) o: PackedMatrix,
    pub(crate) post_norm: Vec<f32>,
    /// `[num_experts, hidden]`; empty for a dense model.
    pub(crate) gate: Vec<f32>,
}

impl Weights {
    pub(crate) fn pack(context: &Context, weights: &AttentionWeights<'_>) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let (vocab, hidden) = (geometry.vocab, geometry.hidden);
        check_tensor("embed", &weights.embed, (vocab, hidden))?;
        check_tensor("lm_head", &weights.lm_head, (vocab, hidden))?;
        check_tensor("norm", &weights.norm, (1, hidden))?;
        check_size("layers", geometry.num_layers, weights.layers.len())?;
        for layer in &weights.layers {
            check_layer(context, layer)?;
        }
        Ok(Self {
            embed: embedding(&weights.embed),
            layers: weights
                .layers
                .iter()
                .map(|layer| LayerWeights::pack(context, layer))
                .collect::<Result<_, _>>()?,
            norm: weights.norm.to_f32(),
            lm_head: context.pack_attention(&[weights.lm_head])?,
        })
    }
}

impl LayerWeights {
    fn pack(context: &Context, layer: &AttentionLayerWeights<'_>) -> Result<Self, Error> {
        Ok(Self {
            input_norm: layer.input_norm.to_f32(),
            qkv: context.pack_attention(&[layer.q, layer.k, layer.v])?,
            o: context.pack_attention(&[layer.o])?,
            post_norm: layer.post_norm.to_f32(),
            gate: layer.gate.map_or_else(Vec::new, |gate| gate.to_f32()),
        })
    }
}

fn check_layer(context: &Context, layer: &AttentionLayerWeights<'_>) -> Result<(), Error> {
    let geometry = &context.geometry;
    let hidden = geometry.hidden;
    let q_rows = geometry.num_heads * geometry.head_dim;
    let kv_rows = geometry.num_kv_heads * geometry.head_dim;
    check_tensor("input_norm", &layer.input_norm, (1, hidden))?;
    check_tensor("q", &layer.q, (q_rows, hidden))?;
    check_tensor("k", &layer.k, (kv_rows, hidden))?;
    check_tensor("v", &layer.v, (kv_rows, hidden))?;
    check_tensor("o", &layer.o, (hidden, q_rows))?;
    check_tensor("post_norm", &layer.post_norm, (1, hidden))?;
    let expected = usize::from(geometry.has_gate());
    check_size("gate tensors", expected, usize::from(layer.gate.is_some()))?;
    layer.gate.as_ref().map_or(Ok(()), |gate| {
        check_tensor("gate", gate, (geometry.num_experts, hidden))
    })
}

fn embedding(tensor: &HostTensor<'_>) -> Vec<u16> {
    let mut bits = Vec::with_capacity(tensor.rows * tensor.cols);
    let mut values = vec![0.0; tensor.cols];
    for row in 0..tensor.rows {
        tensor.read_row(row, 0, &mut values);
        bits.extend(values.iter().map(|&x| to_bf16(x)));
    }
    bits
}
