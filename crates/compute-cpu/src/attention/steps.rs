//! The steps of a layer between its products, each over the pool. They allocate nothing.

use tramontane_compute::{KV_PAGE_TOKENS, RoutedRows, StepBatch};
use tramontane_types::ModelGeometry;

use super::gate::choose;
use super::weights::LayerWeights;
use super::{DENSE, Scratch};
use crate::cache::{KvCache, Slot};
use crate::context::Context;
use crate::disjoint::Disjoint;
use crate::kernels::norm::{Gate, RmsNorm, Rotate, Softmax};
use crate::kernels::quantise::{QuantiseRow, QuantiseToWire};
use crate::rows::RowsWriter;

impl Scratch {
    /// `cos` and `sin` of `position * theta^(-2i / head_dim)`, with the roundings to f32 of the published
    /// implementation: the frequency, then the angle. Not by the C library, whose last bit depends on the host.
    pub(super) fn compute_angles(&mut self, geometry: &ModelGeometry, positions: &[u32]) {
        let half = geometry.head_dim / 2;
        for (row, &position) in positions.iter().enumerate() {
            for i in 0..half {
                let angle = f64::from(position as f32 * self.frequencies[i]);
                let (sin, cos) = libm::sincos(angle);
                self.cos[row * half + i] = cos as f32;
                self.sin[row * half + i] = sin as f32;
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
        context.pool.run_rows(num_rows, &|row| {
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
        let writer = cache.writer(context.dispatch);
        let (cos, sin) = (&self.cos, &self.sin);
        context.pool.run_rows(batch.num_rows(), &|row| {
            // SAFETY: this item alone has the row.
            let qkv = unsafe { qkv.range_mut(row * width..(row + 1) * width) };
            let (rotated, values) = qkv.split_at_mut((num_heads + num_kv_heads) * head_dim);
            context.dispatch.run(Rotate {
                heads: &mut *rotated,
                cos: &cos[row * half..(row + 1) * half],
                sin: &sin[row * half..(row + 1) * half],
            });
            let keys = rotated[num_heads * head_dim..].chunks_exact(head_dim);
            let slot = slot_of(batch, layer, row);
            for (head, (key, value)) in keys.zip(values.chunks_exact(head_dim)).enumerate() {
                // SAFETY: rows of a step have slots of their own: the positions of a sequence differ, and
                // `StepBatch::check` refused a page that is written through two entries of the block tables.
                unsafe { writer.write(slot, head, key, value) };
            }
        });
    }

    /// Joins and divides the attention outputs, and rounds them for the O product.
    pub(super) fn outputs_to_rows(&mut self, context: &Context, num_rows: usize) {
        let ModelGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = context.geometry;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let qkv = Disjoint::new(&mut self.qkv);
        let writer = self.attended.writer();
        let finisher = self.attend.finisher();
        context.pool.run_rows(num_rows, &|row| {
            // The queries have been read; their place takes the outputs.
            // SAFETY: this item alone has the row, here and below.
            let out = unsafe { qkv.range_mut(row * width..row * width + num_heads * head_dim) };
            // SAFETY: as above.
            unsafe { finisher.finish(context, row, out) };
            // SAFETY: as above.
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
        context.pool.run_rows(num_rows, &|row| {
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
            context.dispatch.run(Gate {
                x,
                weights: &weights.gate,
                out: p,
            });
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
    context.dispatch.run(QuantiseRow {
        format: writer.format,
        values,
        // SAFETY: the caller promises the whole row, and each block comes once.
        out: |block| unsafe { writer.block(row, block) },
    });
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use half::f16;
    use tramontane_compute::batch_check::first_visible;
    use tramontane_compute::kv::Q8Head;
    use tramontane_compute::{AttentionConfig, KvFormat, SequenceSpan};
    use tramontane_types::PageId;

    use super::*;
    use crate::isa::Isa;
    use crate::kernels::tests::noise;
    use crate::memory::Slab;
    use crate::pack::PackFormat;
    use crate::pool::Pool;

    const NUM_PAGES: u32 = 24;

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
                max_positions: 4096,
            },
            format: PackFormat::Q8,
            dispatch: isa.dispatch()?,
            pool: Pool::new(NonZeroUsize::new(2)?).unwrap(),
            weights: Slab::new(),
        })
    }

    fn one_sequence(num_rows: usize) -> StepBatch {
        // Neither ascending nor one after the other.
        let pages = [3, 0, 2, 1]
            .map(PageId)
            .into_iter()
            .chain((4..NUM_PAGES).map(PageId));
        let pages: Vec<PageId> = pages.collect();
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
    ///
    /// The last row is computed `alone` again, with its chunks on several threads.
    fn attend(context: &Context, kv_format: KvFormat, batch: &StepBatch, qkv: &[f32]) -> Vec<f32> {
        let geometry = &context.geometry;
        let num_rows = batch.num_rows();
        let config = AttentionConfig {
            num_pages: NUM_PAGES as usize,
            max_rows: num_rows,
            kv_format,
        };
        let mut scratch = Scratch::new(context, config);
        let mut cache = KvCache::new(geometry, config).unwrap();
        scratch.qkv.copy_from_slice(qkv);
        scratch.cos.fill(1.0);
        scratch.sin.fill(0.0);
        scratch.attend.plan(geometry, batch);
        scratch.rotate_and_cache(context, batch, 1, &mut cache);
        scratch
            .attend
            .run(context, batch, (1, &cache), &scratch.qkv);
        scratch.outputs_to_rows(context, num_rows);
        let width = qkv.len() / num_rows;
        let out_width = geometry.num_heads * geometry.head_dim;
        let together = |scratch: &Scratch| -> Vec<f32> {
            let rows = scratch.qkv.chunks_exact(width);
            rows.flat_map(|row| row[..out_width].to_vec()).collect()
        };
        let out = together(&scratch);
        let last = last_row_alone(batch);
        scratch.qkv[..width].copy_from_slice(&qkv[(num_rows - 1) * width..]);
        scratch.attend.plan(geometry, &last);
        scratch
            .attend
            .run(context, &last, (1, &cache), &scratch.qkv[..width]);
        scratch.outputs_to_rows(context, 1);
        let alone = &together(&scratch)[..out_width];
        let bits = |x: &[f32]| -> Vec<u32> { x.iter().map(|x| x.to_bits()).collect() };
        assert!(
            bits(alone) == bits(&out[(num_rows - 1) * out_width..]),
            "alone and in a tile"
        );
        out
    }

    fn last_row_alone(batch: &StepBatch) -> StepBatch {
        let mut alone = batch.clone();
        alone.tokens.truncate(1);
        alone.positions = vec![batch.num_rows() as u32 - 1];
        alone.sequences[0].num_rows = 1;
        alone
    }

    /// Softmax in f64 over all visible positions at once.
    fn naive(
        geometry: &ModelGeometry,
        kv_format: KvFormat,
        qkv: &[f32],
        (row, head): (usize, usize),
    ) -> Vec<f64> {
        let ModelGeometry {
            num_heads,
            num_kv_heads,
            head_dim,
            ..
        } = *geometry;
        let width = (num_heads + 2 * num_kv_heads) * head_dim;
        let kv_head = head / (num_heads / num_kv_heads);
        let rounded = |x: &[f32]| -> Vec<f64> {
            let q8 = Q8Head::new(x);
            let one = |&x: &f32| match kv_format {
                KvFormat::F16 => f16::from_f32(x).to_f64(),
                KvFormat::Q8 => f64::from(q8.q(x)) * f64::from(q8.scale),
            };
            x.iter().map(one).collect()
        };
        let query = &qkv[row * width + head * head_dim..][..head_dim];
        let first = first_visible(geometry, row);
        let scores: Vec<f64> = (first..=row)
            .map(|t| {
                let key = &qkv[t * width + (num_heads + kv_head) * head_dim..][..head_dim];
                let dot: f64 = query
                    .iter()
                    .zip(rounded(key))
                    .map(|(&q, k)| f64::from(q) * k)
                    .sum();
                (dot / (head_dim as f64).sqrt()).exp()
            })
            .collect();
        let total: f64 = scores.iter().sum();
        let mut out = vec![0.0; head_dim];
        for (t, score) in (first..=row).zip(scores) {
            let at = t * width + (num_heads + num_kv_heads + kv_head) * head_dim;
            for (out, v) in out.iter_mut().zip(rounded(&qkv[at..at + head_dim])) {
                *out += score / total * v;
            }
        }
        out
    }

    fn check_against_naive(heads: (usize, usize, usize), num_rows: usize, window: Option<usize>) {
        let width = (heads.0 + 2 * heads.1) * heads.2;
        let noise = noise(heads.2 as u64, num_rows * width);
        let qkv: Vec<f32> = noise.iter().map(|x| x * 3.0).collect();
        let batch = one_sequence(num_rows);
        // Queries and weights of q8 have fifteen bits.
        for (kv_format, most) in [(KvFormat::F16, 2e-5), (KvFormat::Q8, 4e-4)] {
            let mut expected: Option<Vec<f32>> = None;
            for isa in Isa::ALL {
                let Some(context) = context(isa, heads, window) else {
                    println!("skipped: this machine lacks {isa}");
                    continue;
                };
                let out = attend(&context, kv_format, &batch, &qkv);
                if let Some(first) = &expected {
                    assert!(*first == out, "{isa} differs for {heads:?}");
                    continue;
                }
                let outputs = out.chunks_exact(heads.2).enumerate();
                // All of the first rows, some of the others.
                for (i, out) in outputs.filter(|(i, _)| *i < 4000 || i % 29 == 0) {
                    let at = (i / heads.0, i % heads.0);
                    let exact = naive(&context.geometry, kv_format, &qkv, at);
                    for (got, exact) in out.iter().zip(exact) {
                        let error = (f64::from(*got) - exact).abs();
                        assert!(
                            error < most,
                            "{isa} {kv_format} {heads:?} {at:?}: {got} {exact}"
                        );
                    }
                }
                expected = Some(out);
            }
        }
    }

    #[test]
    fn attention_is_a_softmax_over_the_visible_positions() {
        let cases = [
            ((4, 4, 16), 70, None),
            ((8, 2, 24), 130, None),
            ((8, 1, 64), 200, Some(40)),
            ((4, 1, 128), 130, Some(64)),
            ((5, 1, 32), 200, Some(100)),
            ((14, 2, 6), 65, None),
            ((2, 1, 14), 65, Some(1)),
        ];
        for (heads, num_rows, window) in cases {
            check_against_naive(heads, num_rows, window);
        }
    }

    #[test]
    fn chunks_of_a_long_context_are_joined() {
        check_against_naive((4, 1, 20), 1_100, None);
        check_against_naive((3, 1, 16), 1_500, Some(600));
        check_against_naive((1, 1, 16), 513, None);
    }

    #[test]
    fn keys_that_are_not_finite_do_not_vanish() {
        let (heads, num_rows) = ((4, 1, 16), 600);
        let width = (heads.0 + 2 * heads.1) * heads.2;
        let mut qkv = noise(1, num_rows * width);
        let bad_row = 550;
        qkv[bad_row * width + heads.0 * heads.2..(bad_row + 1) * width].fill(f32::NAN);
        for kv_format in [KvFormat::F16, KvFormat::Q8] {
            let context = context(Isa::detect(), heads, None).unwrap();
            let out = attend(&context, kv_format, &one_sequence(num_rows), &qkv);
            for (row, out) in out.chunks_exact(heads.0 * heads.2).enumerate() {
                let is_nan = out.iter().all(|x| x.is_nan());
                let is_finite = out.iter().all(|x| x.is_finite());
                assert!(
                    if row < bad_row { is_finite } else { is_nan },
                    "{kv_format} {row}"
                );
            }
        }
    }

    #[test]
    fn angles_follow_the_position() {
        let context = context(Isa::Scalar, (1, 1, 8), None).unwrap();
        let config = AttentionConfig {
            num_pages: 1,
            max_rows: 2,
            kv_format: KvFormat::F16,
        };
        let mut scratch = Scratch::new(&context, config);
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
