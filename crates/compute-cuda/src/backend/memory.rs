//! How much of a device's memory a worker needs beside its experts and its KV cache: a bound, for whoever shares the rest out.
//! Reserves nothing.

use tramontane_compute::WeightFormat;
use tramontane_types::ModelGeometry;

use super::call::{PAIRS_MAX, VECTORS_MAX};
use super::context::STAGING_BYTES;
use super::core::LOGITS_ROWS;
use super::panels::ExpertPanels;
use super::plan::SLOTS_MAX;

/// Dims that kernels have for a head, at most.
const HEAD_MAX: usize = 128;

/// Most bytes of the weights that are not experts, and of the buffers of steps of up to `max_rows` rows and of calls.
#[must_use]
pub fn working_bytes(g: &ModelGeometry, weights: WeightFormat, max_rows: usize) -> u64 {
    let bytes = dense(g, weights) + of_rows(g, max_rows) + fixed(g);
    // Strips, panels and allocations are rounded up.
    (bytes + bytes / 16) as u64
}

fn dense(g: &ModelGeometry, weights: WeightFormat) -> usize {
    let (heads, kv) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
    let element = match weights {
        WeightFormat::E4m3 => 1,
        _ => 2,
    };
    let matrices = g.hidden * (2 * heads + 2 * kv) * element;
    let norms_and_gate = (g.num_experts + 2) * g.hidden * size_of::<f32>();
    let embedding_and_head = 2 * g.vocab * g.hidden * 2;
    g.num_layers * (matrices + norms_and_gate) + embedding_and_head
}

/// Residual stream, rows, queries, keys and values, attention's outputs and their panels; for each expert of a row its hidden row and
/// output, in bf16 and as e4m3.
fn of_rows(g: &ModelGeometry, max_rows: usize) -> usize {
    let (heads, kv) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
    let row = 4 * g.hidden + 3 * g.hidden + 4 * (heads + 2 * kv) + 2 * g.num_heads * HEAD_MAX;
    let attended = 3 * heads + 2 * g.hidden.max(heads);
    let pair = 4 * g.hidden + g.ff.max(2 * g.hidden) + 2 * g.ff + 64;
    // Where long steps have panels, rows are for shorter ones.
    let hidden_rows = max_rows.min(ExpertPanels::rows_min(g)) * g.top_k * 3 * g.ff;
    max_rows * (row + attended + 4 * g.num_experts + g.top_k * pair) + hidden_rows
}

/// Logits and their sums, parts of long contexts, calls of others and the sums that they bring, weights on their way.
fn fixed(g: &ModelGeometry) -> usize {
    let logits = LOGITS_ROWS * (g.vocab * 4 + g.vocab / 64 + 64);
    let slots = SLOTS_MAX * g.num_heads * (HEAD_MAX + 2) * 4;
    let calls = PAIRS_MAX * (4 * g.hidden + 4 * g.ff) + 2 * VECTORS_MAX * g.hidden * 4;
    logits + slots + calls + STAGING_BYTES.max(256 * g.hidden.max(g.ff)) + (1 << 20)
}
