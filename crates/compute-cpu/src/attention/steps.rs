//! The steps of a layer between its products, each over the pool. They allocate nothing.

use std::ops::Range;

use tramontane_compute::quant::BLOCK;
use tramontane_compute::{KV_PAGE_TOKENS, RoutedRows, StepBatch};
use tramontane_types::ModelGeometry;

use super::gate::choose;
use super::weights::LayerWeights;
use super::{DENSE, Scratch};
use crate::batch_check::{first_visible, visible_pages};
use crate::cache::{KvCache, Slot};
use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::kernels::attention::{AttendPage, HEADS_MAX};
use crate::kernels::norm::{Dot, RmsNorm, Rotate, Softmax};
use crate::kernels::quantise::{QuantiseBlock, QuantiseToWire, padded_block};
use crate::rows::RowsWriter;
use crate::simd::LANES;

/// Rows of one sequence that an item takes through its pages together: each page is read once for them.
const ATTEND_ROWS: usize = 8;

/// Consecutive rows of one sequence, for one key and value head.
#[derive(Clone, Debug)]
pub(super) struct AttendItem {
    sequence: usize,
    /// Rows of the step.
    rows: Range<usize>,
    kv_head: usize,
}

impl Scratch {
    /// `cos` and `sin` of `position * theta^(-2i / head_dim)`, with the roundings to f32 of the published
    /// implementation: the frequency, then the angle.
    pub(super) fn compute_angles(&mut self, geometry: &ModelGeometry, positions: &[u32]) {
        let half = geometry.head_dim / 2;
        for (row, &position) in positions.iter().enumerate() {
            for i in 0..half {
                let angle = f64::from(position as f32 * self.frequencies[i]);
                self.cos[row * half + i] = angle.cos() as f32;
                self.sin[row * half + i] = angle.sin() as f32;
            }
        }
    }

    pub(super) fn list_attend_items(&mut self, geometry: &ModelGeometry, batch: &StepBatch) {
        self.items.clear();
        for (sequence, span) in batch.sequences.iter().enumerate() {
            let end = (span.row_begin + span.num_rows) as usize;
            for begin in (span.row_begin as usize..end).step_by(ATTEND_ROWS) {
                let rows = begin..(begin + ATTEND_ROWS).min(end);
                for kv_head in 0..geometry.num_kv_heads {
                    self.items.push(AttendItem {
                        sequence,
                        rows: rows.clone(),
                        kv_head,
                    });
                }
            }
        }
    }

    /// Normalises rows of the residual stream for a product: row `i` of the result is row `source(i)`.
    pub(super) fn norm_to_rows(
        &mut self,
        context: &Context,
        weight: &[f32],
        num_rows: usize,
        source: &(dyn Fn(usize) -> usize + Sync),
    ) {
        let hidden = context.geometry.hidden;
        let normed = Disjoint::new(&mut self.normed);
        let writer = self.rows.writer();
        let residual = &self.residual;
        context.pool.run(num_rows, &|row| {
            // SAFETY: this item alone has the row.
            let out = unsafe { normed.range_mut(row * hidden..(row + 1) * hidden) };
            context.dispatch.run(RmsNorm {
                x: &residual[source(row) * hidden..][..hidden],
                weight,
                eps: context.geometry.rms_eps as f32,
                out,
            });
            // SAFETY: this item alone has the row.
            unsafe { quantise_row(context, &writer, row, out) };
        });
    }

    /// Rotates queries and keys; writes keys and values to the cache.
    pub(super) fn rotate_and_cache(
        &mut self,
        context: &Context,
        batch: &StepBatch,
        layer: usize,
        cache: &mut KvCache,
    ) {
        let ModelGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = context.geometry;
        let half = head_dim / 2;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let qkv = Disjoint::new(&mut self.qkv);
        let writer = cache.writer();
        let (cos, sin) = (&self.cos, &self.sin);
        context.pool.run(batch.num_rows(), &|row| {
            // SAFETY: this item alone has the row.
            let qkv = unsafe { qkv.range_mut(row * width..(row + 1) * width) };
            let (rotated, values) = qkv.split_at_mut((num_heads + num_kv_heads) * head_dim);
            for head in rotated.chunks_exact_mut(head_dim) {
                context.dispatch.run(Rotate {
                    head,
                    cos: &cos[row * half..(row + 1) * half],
                    sin: &sin[row * half..(row + 1) * half],
                });
            }
            let keys = rotated[num_heads * head_dim..].chunks_exact(head_dim);
            let slot = slot_of(batch, layer, row);
            for (head, (key, value)) in keys.zip(values.chunks_exact(head_dim)).enumerate() {
                // SAFETY: rows of a step have slots of their own: the positions of a sequence differ, and
                // `check_batch` refused a page that is written through two entries of the block tables.
                unsafe { writer.write(slot, head, key, value) };
            }
        });
    }

    /// Attention of every row over the pages that it sees, ascending.
    pub(super) fn attend_pages(
        &mut self,
        context: &Context,
        batch: &StepBatch,
        layer: usize,
        cache: &KvCache,
    ) {
        let attend = AttendPages {
            context,
            batch,
            layer,
            cache,
            qkv: &self.qkv,
            maxima: Disjoint::new(&mut self.maxima),
            sums: Disjoint::new(&mut self.sums),
            outputs: Disjoint::new(&mut self.outputs),
        };
        let items = &self.items;
        context
            .pool
            .run(items.len(), &|item| attend.run(&items[item]));
    }

    /// Divides the attention outputs by their sums and rounds them for the O product.
    pub(super) fn outputs_to_rows(&mut self, context: &Context, num_rows: usize) {
        let ModelGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = context.geometry;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let padded = head_dim.next_multiple_of(LANES);
        let qkv = Disjoint::new(&mut self.qkv);
        let writer = self.attended.writer();
        let (outputs, sums) = (&self.outputs, &self.sums);
        context.pool.run(num_rows, &|row| {
            // The queries have been read; their place takes the outputs without padding.
            // SAFETY: this item alone has the row.
            let out = unsafe { qkv.range_mut(row * width..row * width + num_heads * head_dim) };
            let heads = row * num_heads..(row + 1) * num_heads;
            let row_outputs = &outputs[heads.start * padded..heads.end * padded];
            let scaled = out
                .chunks_exact_mut(head_dim)
                .zip(row_outputs.chunks_exact(padded))
                .zip(&sums[heads]);
            for ((out, output), sum) in scaled {
                for (x, o) in out.iter_mut().zip(output) {
                    *x = o / sum;
                }
            }
            // SAFETY: this item alone has the row.
            unsafe { quantise_row(context, &writer, row, out) };
        });
    }

    /// Norm, gate, and the rows for the experts.
    pub(super) fn route(
        &mut self,
        context: &Context,
        weights: &LayerWeights,
        num_rows: usize,
        routed: &mut RoutedRows,
    ) {
        let geometry = &context.geometry;
        let (hidden, top_k) = (geometry.hidden, geometry.top_k);
        let row_bytes = context.row_format().row_bytes(hidden);
        routed.num_rows = num_rows;
        routed.rows.resize(num_rows * row_bytes, 0);
        routed.topk_ids.clear();
        routed.topk_ids.resize(num_rows * top_k, DENSE.0);
        routed.topk_weights.clear();
        routed.topk_weights.resize(num_rows * top_k, DENSE.1);
        let rows = Disjoint::new(&mut routed.rows);
        let topk_ids = Disjoint::new(&mut routed.topk_ids);
        let topk_weights = Disjoint::new(&mut routed.topk_weights);
        let normed = Disjoint::new(&mut self.normed);
        let gate = Disjoint::new(&mut self.gate);
        let residual = &self.residual;
        context.pool.run(num_rows, &|row| {
            // SAFETY: this item alone has the row, here and below.
            let x = unsafe { normed.range_mut(row * hidden..(row + 1) * hidden) };
            context.dispatch.run(RmsNorm {
                x: &residual[row * hidden..(row + 1) * hidden],
                weight: &weights.post_norm,
                eps: geometry.rms_eps as f32,
                out: x,
            });
            context.dispatch.run(QuantiseToWire {
                format: context.row_format(),
                values: x,
                // SAFETY: as above.
                out: unsafe { rows.range_mut(row * row_bytes..(row + 1) * row_bytes) },
            });
            if !geometry.has_gate() {
                return;
            }
            let experts = row * geometry.num_experts..(row + 1) * geometry.num_experts;
            let chosen = row * top_k..(row + 1) * top_k;
            // SAFETY: as above.
            let (p, ids, weights_out) = unsafe {
                (
                    gate.range_mut(experts),
                    topk_ids.range_mut(chosen.clone()),
                    topk_weights.range_mut(chosen),
                )
            };
            for (p, weight) in p.iter_mut().zip(weights.gate.chunks_exact(hidden)) {
                *p = context.dispatch.run(Dot { a: x, b: weight });
            }
            context.dispatch.run(Softmax { x: p });
            choose(p, ids, weights_out);
        });
    }
}

/// Where a row's key and value go; the batch was checked.
fn slot_of(batch: &StepBatch, layer: usize, row: usize) -> Slot {
    let after = batch
        .sequences
        .partition_point(|span| span.row_begin as usize <= row);
    let position = batch.positions[row] as usize;
    let page = batch.sequences[after - 1].block_table[position / KV_PAGE_TOKENS];
    Slot {
        layer,
        page: page.0 as usize,
        offset: position % KV_PAGE_TOKENS,
    }
}

/// Rounds a row to the form that the products read.
///
/// # Safety
/// While this runs, no other call may ask for a block of the same row.
unsafe fn quantise_row(context: &Context, writer: &RowsWriter<'_>, row: usize, values: &[f32]) {
    for (i, values) in values.chunks(BLOCK).enumerate() {
        context.dispatch.run(QuantiseBlock {
            format: writer.format,
            values: &padded_block(values),
            // SAFETY: the caller promises the whole row.
            out: unsafe { writer.block(row, i) },
        });
    }
}

/// Attention over pages: what the items share.
struct AttendPages<'a> {
    context: &'a Context,
    batch: &'a StepBatch,
    layer: usize,
    cache: &'a KvCache,
    qkv: &'a [f32],
    maxima: Disjoint<'a, f32>,
    sums: Disjoint<'a, f32>,
    outputs: Disjoint<'a, f32>,
}

impl AttendPages<'_> {
    fn run(&self, item: &AttendItem) {
        let geometry = &self.context.geometry;
        let position_of = |row: usize| self.batch.positions[row] as usize;
        let positions = position_of(item.rows.start)..position_of(item.rows.end - 1) + 1;
        let block_table = &self.batch.sequences[item.sequence].block_table;
        for row in item.rows.clone() {
            self.clear(row, item.kv_head);
        }
        for page in visible_pages(geometry, positions) {
            let id = block_table[page].0 as usize;
            let (keys, values) = self.cache.page(self.layer, id, item.kv_head);
            let page_begin = page * KV_PAGE_TOKENS;
            for row in item.rows.clone() {
                let position = position_of(row);
                let begin = first_visible(geometry, position).saturating_sub(page_begin);
                let end = (position + 1).saturating_sub(page_begin);
                let visible = begin.min(KV_PAGE_TOKENS)..end.min(KV_PAGE_TOKENS);
                if !visible.is_empty() {
                    self.attend_page(row, item.kv_head, (keys, values), visible);
                }
            }
        }
    }

    /// Query heads of the step that share a key and value head.
    fn heads(&self, row: usize, kv_head: usize) -> Range<usize> {
        let geometry = &self.context.geometry;
        let group = geometry.num_heads / geometry.num_kv_heads;
        let begin = row * geometry.num_heads + kv_head * group;
        begin..begin + group
    }

    fn padded_dim(&self) -> usize {
        self.context.geometry.head_dim.next_multiple_of(LANES)
    }

    fn clear(&self, row: usize, kv_head: usize) {
        let heads = self.heads(row, kv_head);
        let padded = self.padded_dim();
        // SAFETY: this item alone has the heads of its group in its rows.
        unsafe {
            self.maxima.range_mut(heads.clone()).fill(f32::NEG_INFINITY);
            self.sums.range_mut(heads.clone()).fill(0.0);
            self.outputs
                .range_mut(heads.start * padded..heads.end * padded)
                .fill(0.0);
        }
    }

    fn attend_page(
        &self,
        row: usize,
        kv_head: usize,
        (keys, values): (&[u16], &[u16]),
        visible: Range<usize>,
    ) {
        let geometry = &self.context.geometry;
        let head_dim = geometry.head_dim;
        let padded = self.padded_dim();
        let heads = self.heads(row, kv_head);
        let width = (geometry.num_heads + 2 * geometry.num_kv_heads) * head_dim;
        let queries = row * width + (heads.start - row * geometry.num_heads) * head_dim;
        for begin in heads.clone().step_by(HEADS_MAX) {
            let end = (begin + HEADS_MAX).min(heads.end);
            let at = queries + (begin - heads.start) * head_dim;
            // SAFETY: this item alone has the heads of its group in its rows.
            let (maxima, sums, outputs) = unsafe {
                (
                    self.maxima.range_mut(begin..end),
                    self.sums.range_mut(begin..end),
                    self.outputs.range_mut(begin * padded..end * padded),
                )
            };
            self.context.dispatch.run(AttendPage {
                keys,
                values,
                visible: visible.clone(),
                scale: 1.0 / (head_dim as f32).sqrt(),
                queries: &self.qkv[at..at + (end - begin) * head_dim],
                maxima,
                sums,
                outputs,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::bf16;
    use tramontane_compute::SequenceSpan;
    use tramontane_types::PageId;

    use super::*;
    use crate::isa::Isa;
    use crate::kernels::tests::noise;
    use crate::pack::PackFormat;
    use crate::pool::Pool;

    fn context(isa: Isa, heads: (usize, usize, usize), window: Option<usize>) -> Option<Context> {
        let (num_heads, num_kv_heads, head_dim) = heads;
        Some(Context {
            geometry: ModelGeometry {
                hidden: 32,
                num_layers: 2,
                num_heads,
                num_kv_heads,
                head_dim,
                ff: 32,
                num_experts: 1,
                top_k: 1,
                vocab: 8,
                rope_theta: 1e4,
                rms_eps: 1e-5,
                sliding_window: window,
                max_positions: 512,
            },
            format: PackFormat::Q8,
            dispatch: isa.dispatch()?,
            pool: Pool::new(NonZeroUsize::new(2)?).unwrap(),
        })
    }

    fn one_sequence(num_rows: usize) -> StepBatch {
        let pages = [3, 0, 2, 1].map(PageId);
        StepBatch {
            tokens: vec![0; num_rows],
            positions: (0..num_rows as u32).collect(),
            sequences: vec![SequenceSpan {
                row_begin: 0,
                num_rows: num_rows as u32,
                block_table: pages[..num_rows.div_ceil(KV_PAGE_TOKENS)].to_vec(),
            }],
            logits_rows: vec![],
        }
    }

    /// Attention outputs of a prompt whose queries, keys and values are noise and are not rotated.
    fn attend(context: &Context, batch: &StepBatch, qkv: &[f32]) -> Vec<f32> {
        let geometry = &context.geometry;
        let num_rows = batch.num_rows();
        let mut scratch = Scratch::new(context, num_rows);
        let mut cache = KvCache::new(geometry, 4);
        scratch.qkv.copy_from_slice(qkv);
        scratch.cos.fill(1.0);
        scratch.sin.fill(0.0);
        scratch.list_attend_items(geometry, batch);
        scratch.rotate_and_cache(context, batch, 1, &mut cache);
        scratch.attend_pages(context, batch, 1, &cache);
        scratch.outputs_to_rows(context, num_rows);
        let width = qkv.len() / num_rows;
        let out_width = geometry.num_heads * geometry.head_dim;
        let rows = scratch.qkv.chunks_exact(width);
        rows.flat_map(|row| row[..out_width].to_vec()).collect()
    }

    /// Softmax in f64 over all visible positions at once.
    fn naive(geometry: &ModelGeometry, qkv: &[f32], row: usize, head: usize) -> Vec<f64> {
        let ModelGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *geometry;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let kv_head = head / (num_heads / num_kv_heads);
        let rounded = |x: f32| bf16::from_f32(x).to_f64();
        let query = &qkv[row * width + head * head_dim..][..head_dim];
        let first = first_visible(geometry, row);
        let scores: Vec<f64> = (first..=row)
            .map(|t| {
                let key = &qkv[t * width + (num_heads + kv_head) * head_dim..][..head_dim];
                let dot: f64 = query
                    .iter()
                    .zip(key)
                    .map(|(&q, &k)| f64::from(q) * rounded(k))
                    .sum();
                (dot / (head_dim as f64).sqrt()).exp()
            })
            .collect();
        let total: f64 = scores.iter().sum();
        let mut out = vec![0.0; head_dim];
        for (t, score) in (first..=row).zip(scores) {
            let at = t * width + (num_heads + num_kv_heads + kv_head) * head_dim;
            for (out, &v) in out.iter_mut().zip(&qkv[at..at + head_dim]) {
                *out += score / total * rounded(v);
            }
        }
        out
    }

    #[test]
    fn attention_is_a_softmax_over_the_visible_positions() {
        let cases = [
            ((4, 4, 16), 70, None),
            ((8, 2, 24), 130, None),
            ((8, 1, 64), 200, Some(40)),
            ((4, 1, 128), 130, Some(64)),
            ((5, 1, 32), 200, Some(100)),
            ((2, 1, 14), 65, Some(1)),
        ];
        for (heads, num_rows, window) in cases {
            let width = (heads.0 + 2 * heads.1) * heads.2;
            let qkv: Vec<f32> = noise(heads.2 as u64, num_rows * width)
                .iter()
                .map(|x| x * 3.0)
                .collect();
            let batch = one_sequence(num_rows);
            let mut expected: Option<Vec<f32>> = None;
            for isa in Isa::ALL {
                let Some(context) = context(isa, heads, window) else {
                    println!("skipped: this machine lacks {isa}");
                    continue;
                };
                let out = attend(&context, &batch, &qkv);
                for (i, out) in out.chunks_exact(heads.2).enumerate() {
                    let exact = naive(&context.geometry, &qkv, i / heads.0, i % heads.0);
                    for (got, exact) in out.iter().zip(exact) {
                        let error = (f64::from(*got) - exact).abs();
                        assert!(error < 2e-5, "{isa} {heads:?} row {i}: {got} {exact}");
                    }
                }
                let first = expected.get_or_insert_with(|| out.clone());
                assert!(*first == out, "{isa} differs for {heads:?}");
            }
        }
    }

    #[test]
    fn angles_follow_the_position() {
        let context = context(Isa::Scalar, (1, 1, 8), None).unwrap();
        let mut scratch = Scratch::new(&context, 2);
        scratch.compute_angles(&context.geometry, &[0, 300]);
        assert_eq!(scratch.cos[..4], [1.0; 4]);
        assert_eq!(scratch.sin[..4], [0.0; 4]);
        for i in 0..4 {
            let angle = 300.0 * 1e4_f64.powf(-2.0 * i as f64 / 8.0);
            assert!((f64::from(scratch.cos[4 + i]) - angle.cos()).abs() < 1e-5);
            assert!((f64::from(scratch.sin[4 + i]) - angle.sin()).abs() < 1e-5);
        }
    }
}
