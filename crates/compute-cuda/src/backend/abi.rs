//! The kernels' arguments as they lie in memory: `kernels/README.md` and the heads of the sources, in Rust. No logic.

use bytemuck::{Pod, Zeroable};

/// `tr_pack_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Pack {
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) rows: i32,
    pub(super) cols: i32,
    pub(super) stride: i32,
    pub(super) pad: i32,
    pub(super) dm_a: u64,
    pub(super) dm_b: u64,
}

/// `tr_linear_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Linear {
    pub(super) weights: u64,
    pub(super) x: u64,
    pub(super) row_ids: u64,
    pub(super) out: u64,
    pub(super) weight_scales: u64,
    pub(super) x_scales: u64,
    pub(super) num_tokens: i32,
    pub(super) rows: i32,
    pub(super) cols: i32,
    pub(super) x_stride: i32,
    pub(super) out_stride: i32,
    pub(super) is_added: i32,
}

/// `tr_gate_up_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct GateUp {
    pub(super) out: u64,
    pub(super) experts: u64,
    pub(super) jobs: u64,
    pub(super) offsets: u64,
    pub(super) row_ids: u64,
    pub(super) x: u64,
    pub(super) x_scales: u64,
    pub(super) hidden: i32,
    pub(super) ff: i32,
    pub(super) x_stride: i32,
    pub(super) out_stride: i32,
}

/// `tr_down_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Down {
    pub(super) out: u64,
    pub(super) experts: u64,
    pub(super) jobs: u64,
    pub(super) offsets: u64,
    pub(super) x: u64,
    pub(super) x_scales: u64,
    pub(super) hidden: i32,
    pub(super) ff: i32,
    pub(super) x_stride: i32,
    pub(super) pad: i32,
}

/// Where an expert's segments are; 0 where one is not loaded.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertEntry {
    pub(super) gate_up: [u64; 8],
    pub(super) down: [u64; 8],
    pub(super) gate_up_scales: [u64; 8],
    pub(super) down_scales: [u64; 8],
}

/// What is to be computed of an expert.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct JobEntry {
    pub(super) expert: i32,
    pub(super) begin: i32,
    pub(super) end: i32,
    /// Index of the first output vector; -1: the job's first assignment.
    pub(super) out: i32,
}

/// Of every kernel that begins with a norm.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct NormArgs {
    pub(super) out: u64,
    pub(super) residual: u64,
    pub(super) weight: u64,
    pub(super) num_rows: u64,
    pub(super) source: u64,
    /// Of rows as e4m3; otherwise 0.
    pub(super) scales: u64,
    pub(super) eps: f32,
    pub(super) hidden: u32,
    pub(super) out_stride: u32,
    pub(super) pad: u32,
}

/// Second argument of `tr_combine_norm_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct ExpertOutputs {
    pub(super) outputs: u64,
    pub(super) slot_of: u64,
    pub(super) weights: u64,
    pub(super) top_k: u32,
    pub(super) pad: u32,
}

/// Second argument of `tr_norm_gate*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct GateArgs {
    pub(super) gate: u64,
    pub(super) scores: u64,
    pub(super) num_experts: u32,
    pub(super) pad: u32,
}

/// `tr_rope_kv_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RopeArgs {
    pub(super) q: u64,
    pub(super) pages: u64,
    pub(super) qkv: u64,
    pub(super) angles: u64,
    pub(super) positions: u64,
    pub(super) sequences: u64,
    pub(super) tables: u64,
    pub(super) num_rows: u64,
    pub(super) q_scale: f32,
    pub(super) table_stride: u32,
    pub(super) num_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) pad: u32,
}

/// `tr_attend_*`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct AttendArgs {
    pub(super) out: u64,
    pub(super) q: u64,
    pub(super) pages: u64,
    pub(super) positions: u64,
    pub(super) tables: u64,
    pub(super) items: u64,
    pub(super) num_items: u64,
    pub(super) slot_outputs: u64,
    pub(super) slot_softmax: u64,
    pub(super) counters: u64,
    pub(super) out_stride: u32,
    pub(super) table_stride: u32,
    pub(super) num_heads: u32,
    pub(super) num_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) window: u32,
}

/// A tile's share of the attention, see `attention.cu` and `attention_wide.cu`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct AttendItem {
    pub(super) row_begin: u32,
    pub(super) num_rows: u32,
    pub(super) sequence: u32,
    pub(super) chunk_begin: u32,
    pub(super) chunk_end: u32,
    pub(super) num_parts: u32,
    pub(super) slot_begin: u32,
    pub(super) counter: u32,
}

/// `tr_choose_experts`, `tr_expert_lists`, `tr_route`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RouteArgs {
    pub(super) topk_ids: u64,
    pub(super) topk_weights: u64,
    pub(super) offsets: u64,
    pub(super) row_of: u64,
    pub(super) slot_of: u64,
    pub(super) scores: u64,
    pub(super) num_rows: u64,
    pub(super) chosen: u64,
    pub(super) num_experts: u32,
    pub(super) top_k: u32,
}

/// `tr_sum_nodes`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct NodeParts {
    pub(super) out: u64,
    pub(super) vectors: u64,
    pub(super) num_rows: u64,
    pub(super) top_k: u32,
    pub(super) hidden: u32,
    pub(super) num_nodes: u32,
    pub(super) zero: u32,
    pub(super) lens: [u32; 8],
    pub(super) begins: [u64; 8],
}

/// `tr_panels`.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Panels {
    pub(super) out: u64,
    pub(super) x: u64,
    pub(super) row_ids: u64,
    pub(super) offsets: u64,
    pub(super) num_rows: u64,
    /// Of rows as e4m3; otherwise 0.
    pub(super) x_scales: u64,
    pub(super) scales: u64,
    pub(super) jobs: i32,
    pub(super) panels: i32,
    pub(super) x_stride: i32,
    pub(super) slots: i32,
}

/// `tr_round_e4m3`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Round {
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) rows: u64,
    pub(super) num_rows: u64,
    pub(super) cols: u32,
    pub(super) part_cols: u32,
    pub(super) row_stride: u32,
    pub(super) out_stride: u32,
    pub(super) scale_stride: u32,
    pub(super) pad: u32,
}

/// `tr_round_panels_e4m3`.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct RoundPanels {
    pub(super) out: u64,
    pub(super) scales: u64,
    pub(super) panels: u64,
    pub(super) part_cols: u32,
    pub(super) slots: u32,
}

/// How `tr_draw` draws the token of a row.
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Draw {
    /// 0: it does not.
    pub(super) per_temperature: f64,
    pub(super) min_weight: f64,
    pub(super) uniform: f64,
}

/// What `tr_argmax` says of a row, and `tr_draw` behind it.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Best {
    /// [`Self::NO_TOKEN`] when every logit is NaN.
    pub(super) id: u32,
    pub(super) logit: f32,
    /// The first token whose logit is NaN or infinity.
    pub(super) bad_id: u32,
    pub(super) pad: u32,
}

impl Best {
    pub(super) const NO_TOKEN: u32 = u32::MAX;
}

const _: () = {
    assert!(size_of::<Best>() == 16);
    assert!(size_of::<Draw>() == 24);
    assert!(size_of::<NodeParts>() == 136);
    assert!(size_of::<Panels>() == 72);
    assert!(size_of::<Pack>() == 64);
    assert!(size_of::<Linear>() == 72);
    assert!(size_of::<GateUp>() == 72);
    assert!(size_of::<Down>() == 64);
    assert!(size_of::<ExpertEntry>() == 256);
    assert!(size_of::<JobEntry>() == 16);
    assert!(size_of::<NormArgs>() == 64);
    assert!(size_of::<Round>() == 56);
    assert!(size_of::<RoundPanels>() == 32);
    assert!(size_of::<AttendArgs>() == 104);
    assert!(size_of::<AttendItem>() == 32);
};
