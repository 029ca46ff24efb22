//! The attention worker's tensors on the device. Nothing here changes after loading.

use tramontane_compute::error::check_size;
use tramontane_compute::{AttentionLayerWeights, AttentionWeights, Error};
use tramontane_types::ModelGeometry;

use super::context::{Context, Matrix, check_tensor};
use super::format::Packing;
use crate::device::Buffer;

/// Everything of a checkpoint but the experts.
#[derive(Debug)]
pub(super) struct Weights {
    /// `[vocab, hidden]` bf16, by rows.
    pub(super) embed: Buffer,
    pub(super) layers: Vec<LayerWeights>,
    /// `[hidden]` f32, as all norms.
    pub(super) norm: Buffer,
    pub(super) lm_head: Matrix,
    /// cos and sin of every position, `[max_positions, head_dim / 2, 2]` f32.
    pub(super) angles: Buffer,
}

/// One layer.
#[derive(Debug)]
pub(super) struct LayerWeights {
    pub(super) input_norm: Buffer,
    /// The rows of q, then k, then v.
    pub(super) qkv: Matrix,
    pub(super) o: Matrix,
    pub(super) post_norm: Buffer,
    /// `[num_experts, hidden]` f32; `None` for a dense model.
    pub(super) gate: Option<Buffer>,
}

impl Weights {
    pub(super) fn load(context: &Context, weights: &AttentionWeights<'_>) -> Result<Self, Error> {
        let geometry = &context.geometry;
        let (vocab, hidden) = (geometry.vocab, geometry.hidden);
        check_tensor("embed", &weights.embed, (vocab, hidden))?;
        check_tensor("lm_head", &weights.lm_head, (vocab, hidden))?;
        check_tensor("norm", &weights.norm, (1, hidden))?;
        check_size("layers", geometry.num_layers, weights.layers.len())?;
        for layer in &weights.layers {
            check_layer(geometry, layer)?;
        }
        let layers = weights.layers.iter();
        Ok(Self {
            embed: context.upload_bf16(&weights.embed)?,
            layers: layers
                .map(|layer| LayerWeights::load(context, layer))
                .collect::<Result<_, _>>()?,
            norm: context.upload_f32(&weights.norm)?,
            lm_head: context.pack_dense(Packing::Bf16, &[weights.lm_head])?,
            angles: context.upload(bytemuck::cast_slice(&angles(geometry)))?,
        })
    }
}

impl LayerWeights {
    fn load(context: &Context, layer: &AttentionLayerWeights<'_>) -> Result<Self, Error> {
        let packing = context.formats.dense;
        let gate = layer.gate.as_ref().map(|gate| context.upload_f32(gate));
        Ok(Self {
            input_norm: context.upload_f32(&layer.input_norm)?,
            qkv: context.pack_dense(packing, &[layer.q, layer.k, layer.v])?,
            o: context.pack_dense(packing, &[layer.o])?,
            post_norm: context.upload_f32(&layer.post_norm)?,
            gate: gate.transpose()?,
        })
    }
}

fn check_layer(geometry: &ModelGeometry, layer: &AttentionLayerWeights<'_>) -> Result<(), Error> {
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

/// Frequencies and angles in f32 as the published implementation has them, then cos and sin of those in f64: the
/// CPU backend's numbers.
pub(super) fn angles(geometry: &ModelGeometry) -> Vec<[f32; 2]> {
    let half = geometry.head_dim / 2;
    let frequency = |i: usize| {
        let exponent = (2 * i) as f32 / geometry.head_dim as f32;
        1.0 / (libm::pow(geometry.rope_theta, f64::from(exponent)) as f32)
    };
    let frequencies: Vec<f32> = (0..half).map(frequency).collect();
    let of_position = |position: usize| {
        let angle = move |frequency: &f32| f64::from(position as f32 * frequency);
        frequencies.iter().map(move |frequency| {
            let (sin, cos) = libm::sincos(angle(frequency));
            [cos as f32, sin as f32]
        })
    };
    (0..geometry.max_positions).flat_map(of_position).collect()
}
