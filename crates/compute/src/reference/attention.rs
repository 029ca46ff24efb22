//! Everything but the experts, row by row: embedding, attention over the paged cache, gate, LM head.

use std::sync::Arc;

use tramontane_types::{ExpertId, LayerId, ModelGeometry, PageId};

use super::ops::{Linear, dot, load_vector, rms_norm, rope, softmax, top_k};
use crate::batch_check::first_visible;
use crate::error::{check_index, check_size};
use crate::kv::Q8Head;
use crate::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Contributions, Error,
    KV_PAGE_TOKENS, KvFormat, RoutedRows, StepBatch, combine,
};

#[derive(Debug)]
pub(super) struct ReferenceAttention {
    geometry: Arc<ModelGeometry>,
    config: AttentionConfig,
    embed: Arc<Linear>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    lm_head: Arc<Linear>,
    cache: KvCache,
    /// The batch that `begin` was given.
    batch: StepBatch,
    /// `[num_rows, hidden]`.
    residual: Vec<f32>,
}

#[derive(Debug)]
struct Layer {
    input_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    post_norm: Vec<f32>,
    gate: Option<Linear>,
}

impl ReferenceAttention {
    pub(super) fn new(
        geometry: Arc<ModelGeometry>,
        weights: &AttentionWeights<'_>,
        config: AttentionConfig,
    ) -> Result<Self, Error> {
        let g = &geometry;
        check_size("layers", g.num_layers, weights.layers.len())?;
        let layers = weights.layers.iter().map(|layer| Layer::load(g, layer));
        let layers = layers.collect::<Result<_, _>>()?;
        let embed = Arc::new(Linear::load("embed", &weights.embed, g.vocab, g.hidden)?);
        // Tied: the same bytes are kept once.
        let lm_head = if std::ptr::eq(weights.lm_head.data, weights.embed.data) {
            Arc::clone(&embed)
        } else {
            Arc::new(Linear::load(
                "lm_head",
                &weights.lm_head,
                g.vocab,
                g.hidden,
            )?)
        };
        Ok(Self {
            norm: load_vector("norm", &weights.norm, g.hidden)?,
            cache: KvCache::new(g, config),
            batch: StepBatch::default(),
            residual: Vec::new(),
            embed,
            lm_head,
            layers,
            config,
            geometry,
        })
    }

    /// `[num_heads * head_dim]`: what one row attends to, all heads.
    fn attend_row(
        &self,
        layer: usize,
        query: &[f32],
        position: usize,
        pages: &[PageId],
    ) -> Vec<f32> {
        let g = &self.geometry;
        let scale = 1.0 / (g.head_dim as f32).sqrt();
        let visible = first_visible(g, position)..position + 1;
        let mut out = Vec::with_capacity(query.len());
        for (head, q) in query.chunks_exact(g.head_dim).enumerate() {
            // Consecutive query heads share a key head.
            let kv_head = head / (g.num_heads / g.num_kv_heads);
            let slot = |p: usize| {
                self.cache
                    .slot(layer, pages[p / KV_PAGE_TOKENS], p, kv_head)
            };
            let keys = visible.clone().map(|p| self.cache.key(slot(p)));
            let mut weights: Vec<f32> = keys.map(|k| dot(q, k) * scale).collect();
            softmax(&mut weights);
            let mut sum = vec![0.0; g.head_dim];
            for (p, weight) in visible.clone().zip(weights) {
                for (sum, v) in sum.iter_mut().zip(self.cache.value(slot(p))) {
                    *sum += weight * v;
                }
            }
            out.extend(sum);
        }
        out
    }

    /// Keys and values of every row of the step, before any row attends.
    fn write_cache(&mut self, layer: usize, batch: &StepBatch) -> Result<(), Error> {
        let g = &self.geometry;
        let (weights, theta) = (&self.layers[layer], g.rope_theta as f32);
        for sequence in &batch.sequences {
            let begin = sequence.row_begin as usize;
            for row in begin..begin + sequence.num_rows as usize {
                let position = batch.positions[row];
                let x = &self.residual[row * g.hidden..(row + 1) * g.hidden];
                let x = rms_norm(x, &weights.input_norm, g.rms_eps as f32);
                let mut key = weights.k.apply(&x)?; // [num_kv_heads, head_dim]
                rope(&mut key, g.head_dim, position, theta);
                let value = weights.v.apply(&x)?; // [num_kv_heads, head_dim]
                let position = position as usize;
                let page = sequence.block_table[position / KV_PAGE_TOKENS];
                let slot = self.cache.slot(layer, page, position, 0);
                self.cache.write(slot, &key, &value);
            }
        }
        Ok(())
    }

    /// Attention of one row, added to its residual; then the row that its experts see.
    fn attention_row(
        &mut self,
        layer: usize,
        row: usize,
        position: u32,
        pages: &[PageId],
    ) -> Result<Vec<f32>, Error> {
        let g = &self.geometry;
        let (weights, eps) = (&self.layers[layer], g.rms_eps as f32);
        let at = row * g.hidden..(row + 1) * g.hidden;
        let x = rms_norm(&self.residual[at.clone()], &weights.input_norm, eps);
        let mut query = weights.q.apply(&x)?; // [num_heads, head_dim]
        rope(&mut query, g.head_dim, position, g.rope_theta as f32);
        let attended = self.attend_row(layer, &query, position as usize, pages);
        let output = weights.o.apply(&attended)?; // [hidden]
        for (x, o) in self.residual[at.clone()].iter_mut().zip(output) {
            *x += o;
        }
        Ok(rms_norm(&self.residual[at], &weights.post_norm, eps))
    }

    /// The experts of one row, ascending, and their weights, which add up to 1.
    fn route_row(&self, layer: usize, x: &[f32], routed: &mut RoutedRows) -> Result<(), Error> {
        let Some(gate) = &self.layers[layer].gate else {
            routed.topk_ids.push(ExpertId(0));
            routed.topk_weights.push(1.0);
            return Ok(());
        };
        let mut probabilities = gate.apply(x)?; // [num_experts]
        softmax(&mut probabilities);
        let chosen = top_k(&probabilities, self.geometry.top_k);
        let sum: f32 = chosen.iter().map(|&e| probabilities[e]).sum();
        for expert in chosen {
            // In range: a placement counts experts in 16 bits.
            routed.topk_ids.push(ExpertId(expert as u16));
            routed.topk_weights.push(probabilities[expert] / sum);
        }
        Ok(())
    }
}

impl Layer {
    fn load(g: &ModelGeometry, weights: &AttentionLayerWeights<'_>) -> Result<Self, Error> {
        let (q, kv) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        if g.has_gate() != weights.gate.is_some() {
            let expected = usize::from(g.has_gate());
            check_size(
                "gates of a layer",
                expected,
                usize::from(weights.gate.is_some()),
            )?;
        }
        let gate = weights.gate.as_ref();
        let gate = gate.map(|gate| Linear::load("gate", gate, g.num_experts, g.hidden));
        Ok(Self {
            input_norm: load_vector("input_norm", &weights.input_norm, g.hidden)?,
            q: Linear::load("q", &weights.q, q, g.hidden)?,
            k: Linear::load("k", &weights.k, kv, g.hidden)?,
            v: Linear::load("v", &weights.v, kv, g.hidden)?,
            o: Linear::load("o", &weights.o, g.hidden, q)?,
            post_norm: load_vector("post_norm", &weights.post_norm, g.hidden)?,
            gate: gate.transpose()?,
        })
    }
}

impl Attention for ReferenceAttention {
    fn begin(&mut self, batch: &StepBatch) -> Result<(), Error> {
        batch.check(&self.geometry, self.config, &mut Vec::new())?;
        let mut residual = Vec::with_capacity(batch.num_rows() * self.geometry.hidden);
        for &token in &batch.tokens {
            residual.extend(self.embed.row(token as usize)?);
        }
        self.residual = residual;
        self.batch.clone_from(batch);
        Ok(())
    }

    fn attend(
        &mut self,
        layer: LayerId,
        batch: &StepBatch,
        routed: &mut RoutedRows,
    ) -> Result<(), Error> {
        check_index("layer", self.layers.len(), usize::from(layer.0))?;
        if *batch != self.batch {
            let (expected, got) = (self.batch.num_rows(), batch.num_rows());
            let what = "rows of the batch (another batch than the one begun)".to_owned();
            return Err(Error::Shape {
                what,
                expected,
                got,
            });
        }
        let layer = usize::from(layer.0);
        *routed = RoutedRows {
            num_rows: batch.num_rows(),
            ..RoutedRows::default()
        };
        self.write_cache(layer, batch)?;
        for sequence in &batch.sequences {
            let begin = sequence.row_begin as usize;
            for row in begin..begin + sequence.num_rows as usize {
                let position = batch.positions[row];
                let x = self.attention_row(layer, row, position, &sequence.block_table)?;
                self.route_row(layer, &x, routed)?;
                routed.rows.extend(x.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
        Ok(())
    }

    fn combine(&mut self, layer: LayerId, contributions: &Contributions<'_>) -> Result<(), Error> {
        check_index("layer", self.layers.len(), usize::from(layer.0))?;
        let expected = self.batch.num_rows() * self.geometry.top_k;
        check_size(
            "expert outputs of a step",
            expected,
            contributions.sums.len(),
        )?;
        combine::add_expert_sums(&mut self.residual, self.geometry.hidden, contributions)
    }

    fn logits(&mut self, batch: &StepBatch, out: &mut Vec<f32>) -> Result<(), Error> {
        let g = &self.geometry;
        out.clear();
        for &row in &batch.logits_rows {
            let row = row as usize;
            check_index("logits row", self.batch.num_rows(), row)?;
            let x = &self.residual[row * g.hidden..(row + 1) * g.hidden];
            let x = rms_norm(x, &self.norm, g.rms_eps as f32);
            out.extend(self.lm_head.apply(&x)?);
        }
        Ok(())
    }
}

/// Keys and values of every layer, page by page.
#[derive(Debug)]
struct KvCache {
    format: KvFormat,
    num_pages: usize,
    num_kv_heads: usize,
    head_dim: usize,
    /// `[num_layers, num_pages, page, num_kv_heads, head_dim]`, rotated.
    keys: Vec<f32>,
    /// `[num_layers, num_pages, page, num_kv_heads, head_dim]`.
    values: Vec<f32>,
}

impl KvCache {
    fn new(g: &ModelGeometry, config: AttentionConfig) -> Self {
        let num_pages = config.num_pages;
        let len = g.num_layers * num_pages * KV_PAGE_TOKENS * g.num_kv_heads * g.head_dim;
        Self {
            format: config.kv_format,
            num_pages,
            num_kv_heads: g.num_kv_heads,
            head_dim: g.head_dim,
            keys: vec![0.0; len],
            values: vec![0.0; len],
        }
    }

    /// Where the head of a position begins.
    fn slot(&self, layer: usize, page: PageId, position: usize, head: usize) -> usize {
        let page = layer * self.num_pages + page.0 as usize;
        let token = page * KV_PAGE_TOKENS + position % KV_PAGE_TOKENS;
        (token * self.num_kv_heads + head) * self.head_dim
    }

    fn key(&self, slot: usize) -> &[f32] {
        &self.keys[slot..slot + self.head_dim]
    }

    fn value(&self, slot: usize) -> &[f32] {
        &self.values[slot..slot + self.head_dim]
    }

    /// All heads of one token.
    fn write(&mut self, slot: usize, key: &[f32], value: &[f32]) {
        let (format, head_dim) = (self.format, self.head_dim);
        for (cache, new) in [(&mut self.keys, key), (&mut self.values, value)] {
            let heads = cache[slot..slot + new.len()].chunks_exact_mut(head_dim);
            for (head, new) in heads.zip(new.chunks_exact(head_dim)) {
                match format {
                    KvFormat::F16 => head.copy_from_slice(new),
                    KvFormat::Q8 => write_rounded(head, new),
                }
            }
        }
    }
}

/// What q8 keeps of a head.
fn write_rounded(head: &mut [f32], new: &[f32]) {
    let rounding = Q8Head::new(new);
    for (x, &new) in head.iter_mut().zip(new) {
        *x = f32::from(rounding.q(new)) * rounding.scale;
    }
}
