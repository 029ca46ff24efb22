//! One call of the experts: gate and up, then down. Its buffers are kept for the next call.

use std::ops::Range;

use tramontane_compute::quant::BLOCK;
use tramontane_types::{Node, SEGMENTS_PER_EXPERT, slice};

use super::plan::{GateUpItem, Group, NO_ROW, Plan};
use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::guided::run_guided;
use crate::kernels::swiglu::Activate;
use crate::kernels::tile::{TILE_ROWS_MAX, Tile, TileOut, TileRow};
use crate::pack::{Line, PAIR_ROWS};
use crate::rows::{GROUP_ROWS, Rows, RowsWriter};
use crate::simd::LANES;

/// Rows that one item converts from the wire; a call of no more leaves the other threads alone.
const CONVERT_ROWS: usize = 32;

/// Depth of the summation tree.
const TREE_DEPTH: usize = SEGMENTS_PER_EXPERT.ilog2() as usize;

/// Buffers of a call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) plan: Plan,
    /// The row of every entry in kernel form.
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
    pub(crate) fn compute(&mut self, context: &Context, rows: &[u8], out: &mut [f32]) {
        self.convert_rows(context, rows);
        let plan = &self.plan;
        self.activations.reserve(plan.entry_rows.len());
        let gate_up = GateUp {
            context,
            plan,
            rows: &self.rows,
            writer: self.activations.writer(),
        };
        run_guided(&context.pool, plan.gate_up_items.len(), &|items| {
            gate_up.run(&plan.gate_up_items[items]);
        });
        let down = Down {
            context,
            plan,
            activations: &self.activations,
            out: Disjoint::new(out),
        };
        let num_items = plan.groups.len() * down.num_pairs();
        run_guided(&context.pool, num_items, &|items| down.run(items));
        // Slices that were unloaded meanwhile are freed now, not at the next call.
        self.plan.segments.clear();
    }

    fn convert_rows(&mut self, context: &Context, rows: &[u8]) {
        let row_bytes = context.row_format().row_bytes(context.geometry.hidden);
        let entry_rows = &self.plan.entry_rows;
        self.rows.reserve(entry_rows.len());
        let writer = self.rows.writer();
        let convert = |item: usize| {
            let begin = item * CONVERT_ROWS;
            let end = (begin + CONVERT_ROWS).min(entry_rows.len());
            for (i, &row) in entry_rows[begin..end].iter().enumerate() {
                if row == NO_ROW {
                    continue;
                }
                let wire = &rows[row as usize * row_bytes..][..row_bytes];
                // SAFETY: this item alone has the entry.
                unsafe { writer.copy_wire(begin + i, wire) };
            }
        };
        context
            .pool
            .run(entry_rows.len().div_ceil(CONVERT_ROWS), &convert);
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
    fn run(&self, items: &[GateUpItem]) {
        let mut halves = [TileOut::ZERO; BLOCK / LANES];
        for (i, item) in items.iter().enumerate() {
            let next = items.get(i + 1).map_or(&[][..], |item| self.lines(item, 0));
            self.run_item(item, next, &mut halves);
        }
    }

    /// 32 `ff` columns for all rows of a group.
    fn run_item(&self, item: &GateUpItem, next: &[Line], halves: &mut [TileOut; BLOCK / LANES]) {
        let group = &self.plan.groups[item.group];
        let segment_blocks = slice::segment_len(self.context.geometry.ff) / BLOCK;
        let block = (item.segment - group.segments.start) * segment_blocks + item.block;
        for entries in chunks(&group.entries) {
            for (half, sums) in halves.iter_mut().enumerate() {
                let next = if half == 0 { self.lines(item, 1) } else { next };
                self.multiply(item, half, &entries, next, sums);
            }
            self.context.dispatch.run(Activate {
                gate_up: halves.each_ref().map(|sums| &sums.0[..entries.len()]),
                format: self.writer.format,
                // SAFETY: this item alone has this block of the entries of its group, and each row
                // comes once.
                out: |row| unsafe { self.writer.block(entries.start + row, block) },
            });
        }
    }

    fn multiply(
        &self,
        item: &GateUpItem,
        half: usize,
        entries: &Range<usize>,
        next: &[Line],
        out: &mut TileOut,
    ) {
        self.context.dispatch.tile(Tile {
            matrix: &self.plan.segments[item.segment].gate_up,
            pair: item.block * (BLOCK / LANES) + half,
            rows: self.rows,
            row_begin: entries.start,
            num_rows: entries.len(),
            block_begin: 0,
            next,
            out: &mut out.0,
        });
    }

    /// The weights of one half of an item.
    fn lines(&self, item: &GateUpItem, half: usize) -> &[Line] {
        let matrix = &self.plan.segments[item.segment].gate_up;
        matrix.pair(item.block * (BLOCK / LANES) + half)
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
    /// Pairs of panels of an expert's outputs.
    fn num_pairs(&self) -> usize {
        self.context.geometry.hidden.div_ceil(PAIR_ROWS)
    }

    /// An item is 32 `hidden` outputs of all nodes for all rows of a group. Where the rows leave room for several,
    /// those go through each segment together: its weights lie one behind the other.
    fn run(&self, items: Range<usize>) {
        let mut levels = [TileOut::ZERO; TREE_DEPTH + 1];
        let pairs = self.num_pairs();
        let mut begin = items.start;
        while begin < items.end {
            let group = &self.plan.groups[begin / pairs];
            let stride = group.entries.len().next_multiple_of(GROUP_ROWS);
            let together = (TILE_ROWS_MAX / stride).max(1);
            let left = (items.end - begin).min(pairs - begin % pairs);
            let end = begin + left.min(together);
            for entries in chunks(&group.entries) {
                let tree = Tree {
                    down: self,
                    group,
                    pairs: begin % pairs..begin % pairs + (end - begin),
                    entries,
                };
                tree.run(&mut levels);
            }
            begin = end;
        }
    }
}

/// The down products of a tile of rows, summed along the tree.
struct Tree<'a> {
    down: &'a Down<'a>,
    group: &'a Group,
    pairs: Range<usize>,
    entries: Range<usize>,
}

impl Tree<'_> {
    fn run(&self, levels: &mut [TileOut; TREE_DEPTH + 1]) {
        let Down {
            context, plan, out, ..
        } = self.down;
        let hidden = context.geometry.hidden;
        let num_segments = context.geometry.num_segments();
        let entry_outs = &plan.entry_outs[self.entries.clone()];
        for (n, node) in self.group.range.nodes(num_segments).enumerate() {
            self.sum(node, levels);
            for (pair, rows) in self.parts(&mut levels[0]) {
                let col = pair * PAIR_ROWS;
                let len = PAIR_ROWS.min(hidden - col);
                for (row, &begin) in rows.iter().zip(entry_outs) {
                    let at = begin + n * hidden + col;
                    // SAFETY: the items of this run alone have these columns of the entries of the group.
                    let target = unsafe { out.range_mut(at..at + len) };
                    target.copy_from_slice(&row.as_flattened()[..len]);
                }
            }
        }
    }

    /// The pairs, each with its part of a buffer: whole groups of rows.
    fn parts<'b>(
        &self,
        out: &'b mut TileOut,
    ) -> impl Iterator<Item = (usize, &'b mut [TileRow])> + use<'b> {
        let stride = self.entries.len().next_multiple_of(GROUP_ROWS);
        self.pairs.clone().zip(out.0.chunks_exact_mut(stride))
    }

    /// The sum of a node that has at least one non-empty segment, into the first of `levels`; an empty
    /// right half adds nothing.
    fn sum(&self, node: Node, levels: &mut [TileOut]) {
        let Some((left, right)) = node.halves() else {
            let Some(out) = levels.first_mut() else {
                debug_assert!(false, "a node is no deeper than the tree");
                return;
            };
            return self.leaf(node.begin, out);
        };
        self.sum(left, levels);
        if right.begin >= self.down.context.geometry.num_segments() {
            return;
        }
        let Some((out, below)) = levels.split_first_mut() else {
            return;
        };
        self.sum(right, below);
        let Some(other) = below.first_mut() else {
            return;
        };
        let num_rows = self.entries.len();
        for ((_, sums), (_, others)) in self.parts(out).zip(self.parts(other)) {
            let sums = sums[..num_rows].as_flattened_mut().as_flattened_mut();
            let others = others[..num_rows].as_flattened().as_flattened();
            for (a, b) in sums.iter_mut().zip(others) {
                *a += b;
            }
        }
    }

    fn leaf(&self, segment: u8, out: &mut TileOut) {
        let Down {
            context,
            plan,
            activations,
            ..
        } = self.down;
        let index = usize::from(segment - self.group.range.begin());
        let blocks = slice::segment_len(context.geometry.ff) / BLOCK;
        let segments = &plan.segments[self.group.segments.clone()];
        for (pair, out) in self.parts(out) {
            let next = if pair + 1 < self.pairs.end {
                segments[index].down.pair(pair + 1)
            } else {
                match segments.get(index + 1) {
                    Some(next) => next.down.pair(self.pairs.start),
                    None => segments[0].down.pair(self.pairs.end),
                }
            };
            context.dispatch.tile(Tile {
                matrix: &segments[index].down,
                pair,
                rows: activations,
                row_begin: self.entries.start,
                num_rows: self.entries.len(),
                block_begin: index * blocks,
                next,
                out,
            });
        }
    }
}

/// A range in tiles of rows.
fn chunks(rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = rows.end;
    let begins = rows.clone().step_by(TILE_ROWS_MAX);
    begins.map(move |begin| begin..(begin + TILE_ROWS_MAX).min(end))
}
