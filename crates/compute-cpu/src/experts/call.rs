//! One call of the experts: gate and up, then down. Its buffers are kept for the next call.

use tramontane_compute::quant::BLOCK;
use tramontane_types::{Node, SEGMENTS_PER_EXPERT, slice};

use super::plan::{GateUpItem, Group, Plan};
use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::kernels::quantise::QuantiseBlock;
use crate::kernels::swiglu::SwiGlu;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileRow};
use crate::pack::PAIR_ROWS;
use crate::rows::{Rows, RowsWriter};
use crate::simd::LANES;

/// Rows whose activations an item keeps on its stack between the products and the rounding.
const CHUNK_ROWS: usize = 48;

/// Rows that one item converts from the wire.
const CONVERT_ROWS: usize = 16;

/// Buffers of a call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) plan: Plan,
    /// The caller's rows in kernel form.
    rows: Rows,
    /// `silu(w1 x) * (w3 x)` of every entry; its segments one after another.
    activations: Rows,
}

impl Call {
    pub(crate) fn new(context: &Context) -> Self {
        let geometry = &context.geometry;
        let padded_ff = slice::segment_len(geometry.ff) * usize::from(SEGMENTS_PER_EXPERT);
        Self {
            plan: Plan::default(),
            rows: Rows::new(context.row_format(), geometry.hidden),
            activations: Rows::new(context.row_format(), padded_ff),
        }
    }

    /// Computes the plan; `out` has the planned length, `rows` was checked.
    pub(crate) fn compute(
        &mut self,
        context: &Context,
        rows: &[u8],
        num_rows: usize,
        out: &mut [f32],
    ) {
        self.convert_rows(context, rows, num_rows);
        let plan = &self.plan;
        self.activations.reserve(plan.entry_rows.len());
        let gate_up = GateUp {
            context,
            plan,
            rows: &self.rows,
            writer: self.activations.writer(),
        };
        context.pool.run(plan.gate_up_items.len(), &|item| {
            gate_up.run(plan.gate_up_items[item]);
        });
        let down = Down {
            context,
            plan,
            activations: &self.activations,
            out: Disjoint::new(out),
        };
        let pairs = context.geometry.hidden.div_ceil(PAIR_ROWS);
        context.pool.run(plan.groups.len() * pairs, &|item| {
            down.run(&plan.groups[item / pairs], item % pairs);
        });
        // Slices that were unloaded meanwhile are freed now, not at the next call.
        self.plan.segments.clear();
    }

    fn convert_rows(&mut self, context: &Context, rows: &[u8], num_rows: usize) {
        let row_bytes = context.row_format().row_bytes(context.geometry.hidden);
        self.rows.reserve(num_rows);
        let writer = self.rows.writer();
        context.pool.run(num_rows.div_ceil(CONVERT_ROWS), &|item| {
            let begin = item * CONVERT_ROWS;
            for row in begin..(begin + CONVERT_ROWS).min(num_rows) {
                let wire = &rows[row * row_bytes..(row + 1) * row_bytes];
                // SAFETY: this item alone has the row.
                unsafe { writer.copy_wire(row, wire) };
            }
        });
    }
}

/// The first phase: `silu(w1 x) * (w3 x)`, rounded to the row format.
struct GateUp<'a> {
    context: &'a Context,
    plan: &'a Plan,
    rows: &'a Rows,
    writer: RowsWriter<'a>,
}

impl GateUp<'_> {
    /// 32 `ff` columns for all rows of a group.
    fn run(&self, item: GateUpItem) {
        let group = &self.plan.groups[item.group];
        let segment_blocks = slice::segment_len(self.context.geometry.ff) / BLOCK;
        let block = (item.segment - group.segments.start) * segment_blocks + item.block;
        let mut values = [[0.0; BLOCK]; CHUNK_ROWS];
        let mut entry = group.entries.start;
        for ids in self.plan.entry_rows[group.entries.clone()].chunks(CHUNK_ROWS) {
            self.activate(item, ids, &mut values);
            for values in &values[..ids.len()] {
                self.context.dispatch.run(QuantiseBlock {
                    format: self.writer.format,
                    values,
                    // SAFETY: this item alone has this block of the entries of its group.
                    out: unsafe { self.writer.block(entry, block) },
                });
                entry += 1;
            }
        }
    }

    fn activate(&self, item: GateUpItem, ids: &[u32], values: &mut [[f32; BLOCK]; CHUNK_ROWS]) {
        let dispatch = self.context.dispatch;
        let tile_rows = dispatch.tile_rows();
        let mut tile = [TileRow::default(); TILE_ROWS_MAX];
        for half in 0..BLOCK / LANES {
            let chunks = ids.chunks(tile_rows);
            for (ids, values) in chunks.zip(values.chunks_mut(tile_rows)) {
                dispatch.run(Tile {
                    matrix: &self.plan.segments[item.segment].gate_up,
                    pair: item.block * (BLOCK / LANES) + half,
                    rows: self.rows,
                    block_begin: 0,
                    ids,
                    out: &mut tile,
                });
                for (gate_up, values) in tile.iter().zip(values).take(ids.len()) {
                    let out = &mut values.as_chunks_mut::<LANES>().0[half];
                    dispatch.run(SwiGlu { gate_up, out });
                }
            }
        }
    }
}

/// The second phase: `w2` of the activations, summed over the segments of each node.
struct Down<'a> {
    context: &'a Context,
    plan: &'a Plan,
    activations: &'a Rows,
    out: Disjoint<'a, f32>,
}

impl Down<'_> {
    /// 32 `hidden` outputs of all nodes for all rows of a group.
    fn run(&self, group: &Group, pair: usize) {
        let hidden = self.context.geometry.hidden;
        let num_segments = self.context.geometry.num_segments();
        let col = pair * PAIR_ROWS;
        let len = PAIR_ROWS.min(hidden - col);
        let ids = &self.plan.entry_ids[group.entries.clone()];
        let mut sum = [TileRow::default(); TILE_ROWS_MAX];
        for ids in ids.chunks(self.context.dispatch.tile_rows()) {
            let tree = Tree {
                down: self,
                group,
                pair,
                ids,
            };
            for (n, node) in group.range.nodes(num_segments).enumerate() {
                tree.sum(node, &mut sum);
                for (row, &entry) in sum.iter().zip(ids) {
                    let at = self.plan.entry_outs[entry as usize] + n * hidden + col;
                    // SAFETY: this item alone has these columns of the entries of its group.
                    let target = unsafe { self.out.range_mut(at..at + len) };
                    target.copy_from_slice(&row.as_flattened()[..len]);
                }
            }
        }
    }
}

/// The down products of a tile of rows, summed along the tree.
struct Tree<'a> {
    down: &'a Down<'a>,
    group: &'a Group,
    pair: usize,
    ids: &'a [u32],
}

impl Tree<'_> {
    /// The sum of a node that has at least one non-empty segment; an empty right half adds nothing.
    fn sum(&self, node: Node, out: &mut [TileRow; TILE_ROWS_MAX]) {
        let Some((left, right)) = node.halves() else {
            return self.leaf(node.begin, out);
        };
        self.sum(left, out);
        if right.begin >= self.down.context.geometry.num_segments() {
            return;
        }
        let mut other = [TileRow::default(); TILE_ROWS_MAX];
        self.sum(right, &mut other);
        let sums = out.as_flattened_mut().as_flattened_mut().iter_mut();
        for (a, b) in sums.zip(other.as_flattened().as_flattened()) {
            *a += b;
        }
    }

    fn leaf(&self, segment: u8, out: &mut [TileRow; TILE_ROWS_MAX]) {
        let Down {
            context,
            plan,
            activations,
            ..
        } = self.down;
        let index = usize::from(segment - self.group.range.begin());
        let blocks = slice::segment_len(context.geometry.ff) / BLOCK;
        context.dispatch.run(Tile {
            matrix: &plan.segments[self.group.segments.start + index].down,
            pair: self.pair,
            rows: activations,
            block_begin: index * blocks,
            ids: self.ids,
            out,
        });
    }
}
