//! Paged attention of a step: who takes which pages, and how the parts of a row are joined. They allocate nothing.
//!
//! A row's pages are cut into chunks at fixed positions. Each chunk has a softmax of its own, and those of a
//! row are merged ascending, whoever computed them: a row has the same bits on one thread and on many.

use std::ops::Range;

use tramontane_compute::batch_check::{first_visible, visible_pages};
use tramontane_compute::{AttentionConfig, KV_PAGE_TOKENS, SequenceSpan, StepBatch};
use tramontane_types::ModelGeometry;

use crate::cache::KvCache;
use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::kernels::attention::join::{Finish, Merge};
use crate::kernels::attention::{AttendPages, Softmaxes, Tile};
use crate::simd::LANES;

/// Rows of one sequence that an item takes through its pages together: each page is read once for them.
const ATTEND_ROWS: usize = 16;

/// Pages of one chunk. Part of the exactness contract: a row's softmaxes are merged chunk by chunk.
const CHUNK_PAGES: usize = 8;
const CHUNK_TOKENS: usize = CHUNK_PAGES * KV_PAGE_TOKENS;

/// Softmaxes of a step besides one per row: a few rows with long contexts have one per chunk, so that all
/// threads can share a row.
const EXTRA_SLOTS: usize = 1_024;

/// Consecutive rows of one sequence, for one key and value head and some chunks.
#[derive(Clone, Debug)]
struct AttendItem {
    sequence: usize,
    /// Rows of the step.
    rows: Range<usize>,
    kv_head: usize,
    chunks: Range<usize>,
}

/// What a row of the step attends to, and where its softmaxes are.
#[derive(Clone, Debug, Default)]
struct RowPlan {
    /// The positions that it sees.
    visible: Range<usize>,
    /// One for all chunks, or one for each of them.
    slots: Range<usize>,
}

impl RowPlan {
    fn chunks(&self) -> Range<usize> {
        self.visible.start / CHUNK_TOKENS..self.visible.end.div_ceil(CHUNK_TOKENS)
    }
}

/// The plan of a step's attention and its memory.
#[derive(Debug)]
pub(super) struct Attend {
    items: Vec<AttendItem>,
    rows: Vec<RowPlan>,
    /// `[slots][num_heads]`, see [`Softmaxes`].
    maxima: Vec<f32>,
    sums: Vec<[f32; LANES]>,
    outputs: Vec<f32>,
    num_slots: usize,
    /// One for each thread of the pool.
    tiles: Vec<Tile>,
    /// The visible positions of each row, as the kernel reads them.
    visible: Vec<Range<usize>>,
}

impl Attend {
    pub(super) fn new(context: &Context, config: AttentionConfig) -> Self {
        let geometry = &context.geometry;
        let num_slots = config.max_rows + EXTRA_SLOTS;
        let heads = num_slots * geometry.num_heads;
        let group = geometry.num_heads / geometry.num_kv_heads;
        let rows = ATTEND_ROWS.min(config.max_rows);
        let tile = || Tile::new(config.kv_format, rows, group, geometry.head_dim);
        let items = config.max_rows * geometry.num_kv_heads + EXTRA_SLOTS * geometry.num_kv_heads;
        Self {
            items: Vec::with_capacity(items),
            rows: Vec::with_capacity(config.max_rows),
            maxima: vec![0.0; heads],
            sums: vec![[0.0; LANES]; heads],
            outputs: vec![0.0; heads * geometry.head_dim.next_multiple_of(LANES)],
            num_slots,
            tiles: (0..context.pool.threads()).map(|_| tile()).collect(),
            visible: Vec::with_capacity(config.max_rows),
        }
    }

    /// Plans a step; the batch was checked.
    pub(super) fn plan(&mut self, geometry: &ModelGeometry, batch: &StepBatch) {
        self.items.clear();
        self.rows.clear();
        self.rows.resize(batch.num_rows(), RowPlan::default());
        self.visible.clear();
        let mut extra = self.num_slots - batch.num_rows();
        let mut next_slot = 0;
        for (sequence, span) in batch.sequences.iter().enumerate() {
            for rows in tiles_of(span) {
                for row in rows.clone() {
                    let position = batch.positions[row] as usize;
                    let visible = first_visible(geometry, position)..position + 1;
                    self.visible.push(visible.clone());
                    self.rows[row].visible = visible;
                }
                let all =
                    self.rows[rows.start].chunks().start..self.rows[rows.end - 1].chunks().end;
                let wanted = rows.len() * (all.len() - 1);
                // Sequences with many rows give every thread enough to do.
                let split = span.num_rows as usize <= ATTEND_ROWS && wanted <= extra;
                if split {
                    extra -= wanted;
                }
                for row in &mut self.rows[rows.clone()] {
                    let count = if split { row.chunks().len() } else { 1 };
                    row.slots = next_slot..next_slot + count;
                    next_slot += count;
                }
                let step = if split { 1 } else { all.len() };
                for begin in all.clone().step_by(step) {
                    for kv_head in 0..geometry.num_kv_heads {
                        self.items.push(AttendItem {
                            sequence,
                            rows: rows.clone(),
                            kv_head,
                            chunks: begin..begin + step,
                        });
                    }
                }
            }
        }
    }

    /// Attention of every row of one layer. `queries` are `[num_rows][width]`, `num_heads * head_dim` of them at
    /// the start of each row.
    pub(super) fn run(
        &mut self,
        context: &Context,
        batch: &StepBatch,
        (layer, cache): (usize, &KvCache),
        queries: &[f32],
    ) {
        let pass = Pass {
            context,
            batch,
            layer,
            cache,
            queries,
            rows: &self.rows,
            visible: &self.visible,
            maxima: Disjoint::new(&mut self.maxima),
            sums: Disjoint::new(&mut self.sums),
            outputs: Disjoint::new(&mut self.outputs),
        };
        let tiles = Disjoint::new(&mut self.tiles);
        let items = &self.items;
        context.pool.run_on_threads(items.len(), &|item, thread| {
            // SAFETY: one thread of the pool runs one item at a time.
            let tile = unsafe { tiles.range_mut(thread..thread + 1) };
            if let [tile] = tile {
                pass.run(&items[item], tile);
            }
        });
    }

    /// For finishing rows from the items of a parallel run.
    pub(super) fn finisher(&mut self) -> Finisher<'_> {
        Finisher {
            rows: &self.rows,
            maxima: Disjoint::new(&mut self.maxima),
            sums: Disjoint::new(&mut self.sums),
            outputs: Disjoint::new(&mut self.outputs),
        }
    }
}

/// The tiles of a sequence's rows.
fn tiles_of(span: &SequenceSpan) -> impl Iterator<Item = Range<usize>> {
    let end = (span.row_begin + span.num_rows) as usize;
    let begins = (span.row_begin as usize..end).step_by(ATTEND_ROWS);
    begins.map(move |begin| begin..(begin + ATTEND_ROWS).min(end))
}

/// What the items of one layer share.
struct Pass<'a> {
    context: &'a Context,
    batch: &'a StepBatch,
    layer: usize,
    cache: &'a KvCache,
    queries: &'a [f32],
    rows: &'a [RowPlan],
    visible: &'a [Range<usize>],
    maxima: Disjoint<'a, f32>,
    sums: Disjoint<'a, [f32; LANES]>,
    outputs: Disjoint<'a, f32>,
}

impl Pass<'_> {
    fn run(&self, item: &AttendItem, tile: &mut Tile) {
        let geometry = &self.context.geometry;
        let head_dim = geometry.head_dim;
        let group = geometry.num_heads / geometry.num_kv_heads;
        let block_table = &self.batch.sequences[item.sequence].block_table;
        let plans = &self.rows[item.rows.clone()];
        let width = self.queries.len() / self.rows.len();
        let positions = plans[0].visible.end - 1..plans[plans.len() - 1].visible.end;
        let seen = visible_pages(geometry, positions);
        for chunk in item.chunks.clone() {
            let begin = seen.start.max(chunk * CHUNK_PAGES);
            let end = seen.end.min((chunk + 1) * CHUNK_PAGES);
            self.context.dispatch.run(AttendPages {
                cache: self.cache.pages(self.layer, item.kv_head),
                pages: &block_table[begin..end],
                first_position: begin * KV_PAGE_TOKENS,
                visible: &self.visible[item.rows.clone()],
                queries: &self.queries[item.rows.start * width + item.kv_head * group * head_dim..],
                query_stride: width,
                head_dim,
                tile,
            });
            for (i, plan) in plans.iter().enumerate() {
                if plan.chunks().contains(&chunk) {
                    self.keep(plan, chunk, item.kv_head * group, tile.row(i));
                }
            }
        }
    }

    /// Puts the softmaxes of a chunk where they belong: merged with those of the row's earlier chunks if they
    /// share a slot.
    fn keep(&self, plan: &RowPlan, chunk: usize, first_head: usize, from: Softmaxes<'_>) {
        let num_heads = self.context.geometry.num_heads;
        let nth = chunk - plan.chunks().start;
        let is_first = nth == 0 || plan.slots.len() > 1;
        let slot = plan.slots.start + if plan.slots.len() > 1 { nth } else { 0 };
        let begin = slot * num_heads + first_head;
        let heads = begin..begin + from.maxima.len();
        let stride = from.outputs.len() / from.maxima.len();
        // SAFETY: this item alone has the heads of its group in its rows and chunks.
        let into = unsafe {
            Softmaxes {
                maxima: self.maxima.range_mut(heads.clone()),
                sums: self.sums.range_mut(heads.clone()),
                outputs: self
                    .outputs
                    .range_mut(heads.start * stride..heads.end * stride),
            }
        };
        if is_first {
            into.maxima.copy_from_slice(from.maxima);
            into.sums.copy_from_slice(from.sums);
            into.outputs.copy_from_slice(from.outputs);
        } else {
            self.context.dispatch.run(Merge { into, from });
        }
    }
}

/// Joins the chunks of rows and divides by their sums.
pub(super) struct Finisher<'a> {
    rows: &'a [RowPlan],
    maxima: Disjoint<'a, f32>,
    sums: Disjoint<'a, [f32; LANES]>,
    outputs: Disjoint<'a, f32>,
}

impl Finisher<'_> {
    /// Writes the attention outputs of a row, `[num_heads * head_dim]`.
    ///
    /// # Safety
    /// While this runs, no other call may have the same row.
    pub(super) unsafe fn finish(&self, context: &Context, row: usize, out: &mut [f32]) {
        let slots = self.rows[row].slots.clone();
        for other in slots.start + 1..slots.end {
            // SAFETY: the slots of a row differ, and the caller has the row alone.
            let (into, from) =
                unsafe { (self.slot(context, slots.start), self.slot(context, other)) };
            context.dispatch.run(Merge { into, from });
        }
        context.dispatch.run(Finish {
            // SAFETY: the caller has the row alone.
            softmaxes: unsafe { self.slot(context, slots.start) },
            head_dim: context.geometry.head_dim,
            out,
        });
    }

    /// # Safety
    /// While the result lives, no other call may ask for the same slot.
    unsafe fn slot(&self, context: &Context, slot: usize) -> Softmaxes<'_> {
        let num_heads = context.geometry.num_heads;
        let stride = context.geometry.head_dim.next_multiple_of(LANES);
        let heads = slot * num_heads..(slot + 1) * num_heads;
        // SAFETY: the caller has the slot alone.
        unsafe {
            Softmaxes {
                maxima: self.maxima.range_mut(heads.clone()),
                sums: self.sums.range_mut(heads.clone()),
                outputs: self
                    .outputs
                    .range_mut(heads.start * stride..heads.end * stride),
            }
        }
    }
}
