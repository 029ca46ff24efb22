//! The smallest engine: one step at a time, experts on local "workers". Schedules nothing.

use std::sync::Arc;

use tramontane_compute::{
    Attention, AttentionConfig, Backend, Contributions, ExpertJob, ExpertSum, Experts,
    KV_PAGE_TOKENS, KvFormat, Piece, RoutedRows, SequenceSpan, StepBatch,
};
use tramontane_model::{Checkpoint, load_slices};
use tramontane_testkit::golden::argmax;
use tramontane_types::{
    ExpertId, ExpertSlice, LayerId, ModelGeometry, PageId, SegmentRange, TokenId,
};

pub(crate) const NUM_PAGES: usize = 32;
const MAX_ROWS: usize = 512;

/// A model whose experts are cut at given segments; each part lies with another worker.
pub(crate) struct Driver {
    geometry: ModelGeometry,
    attention: Box<dyn Attention>,
    workers: Vec<(SegmentRange, Arc<dyn Experts>)>,
    /// Experts of every row of the last step, layer after layer.
    pub(crate) chosen: Vec<Vec<ExpertId>>,
}

/// New tokens of one sequence and where its keys live.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(crate) tokens: &'a [TokenId],
    pub(crate) begin: usize,
    pub(crate) pages: Vec<PageId>,
}

impl Driver {
    pub(crate) fn new(checkpoint: &Checkpoint, backend: &dyn Backend, cuts: &[u8]) -> Self {
        let geometry = checkpoint.geometry().clone();
        let attention = checkpoint.attention_weights().unwrap();
        let config = AttentionConfig {
            num_pages: NUM_PAGES,
            max_rows: MAX_ROWS,
            kv_format: KvFormat::F16,
        };
        let mut workers = Vec::new();
        for cut in cuts.windows(2) {
            let range = SegmentRange::new(cut[0], cut[1]).unwrap();
            let experts = backend.experts();
            load_slices(checkpoint, &*experts, &slices(&geometry, range), &|_, _| {}).unwrap();
            workers.push((range, experts));
        }
        Self {
            attention: backend.attention(&attention.weights(), config).unwrap(),
            geometry,
            workers,
            chosen: Vec::new(),
        }
    }

    /// Logits of every row of every part, `[num_rows, vocab]`.
    pub(crate) fn step(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let mut batch = StepBatch::default();
        for part in parts {
            let row_begin = batch.num_rows() as u32;
            batch.tokens.extend(part.tokens);
            let positions = part.begin..part.begin + part.tokens.len();
            batch.positions.extend(positions.map(|p| p as u32));
            batch.sequences.push(SequenceSpan {
                row_begin,
                num_rows: part.tokens.len() as u32,
                block_table: part.pages.clone(),
            });
        }
        batch.logits_rows = (0..batch.num_rows() as u32).collect();
        self.chosen.clear();
        self.attention.begin(&batch).unwrap();
        for layer in 0..self.geometry.num_layers as u16 {
            let mut routed = RoutedRows::default();
            let layer = LayerId(layer);
            self.attention.attend(layer, &batch, &mut routed).unwrap();
            self.exchange(layer, &routed);
            self.chosen.push(routed.topk_ids);
        }
        let mut logits = vec![0.5; 3];
        self.attention.logits(&batch, &mut logits).unwrap();
        logits
    }

    /// Greedy continuation of a prompt.
    pub(crate) fn greedy(&mut self, prompt: &[TokenId], num_tokens: usize) -> Vec<TokenId> {
        let pages = pages(0, prompt.len() + num_tokens);
        let (mut all, mut begin) = (prompt.to_vec(), 0);
        for _ in 0..num_tokens {
            let part = Part {
                tokens: &all[begin..],
                begin,
                pages: pages.clone(),
            };
            let logits = self.step(&[part]);
            let last = &logits[logits.len() - self.geometry.vocab..];
            begin = all.len();
            all.push(argmax(last) as TokenId);
        }
        all.split_off(prompt.len())
    }

    fn exchange(&mut self, layer: LayerId, routed: &RoutedRows) {
        let (top_k, hidden) = (self.geometry.top_k, self.geometry.hidden);
        let rows = |expert: u16| -> Vec<u32> {
            let chosen = routed.topk_ids.iter().enumerate();
            let chosen = chosen.filter(|(_, id)| id.0 == expert);
            chosen.map(|(i, _)| (i / top_k) as u32).collect()
        };
        let rows: Vec<Vec<u32>> = (0..self.geometry.num_experts as u16).map(rows).collect();
        let mut buffers = Vec::new();
        let mut pieces = Vec::new();
        for (worker, (range, experts)) in self.workers.iter().enumerate() {
            let jobs: Vec<ExpertJob<'_>> = (0..)
                .zip(&rows)
                .map(|(expert, row_ids)| ExpertJob {
                    expert: ExpertId(expert),
                    range: *range,
                    row_ids,
                })
                .collect();
            let mut out = vec![0.5; 3];
            experts
                .compute(layer, &routed.rows, routed.num_rows, &jobs, &mut out)
                .unwrap();
            let mut offset = 0;
            for job in &jobs {
                for &row in job.row_ids {
                    for node in range.nodes(self.geometry.num_segments()) {
                        let buffer = worker as u32;
                        let piece = Piece {
                            node,
                            buffer,
                            offset,
                        };
                        pieces.push((row, job.expert, piece));
                        offset += hidden;
                    }
                }
            }
            assert_eq!(offset, out.len(), "one vector per row and node");
            buffers.push(out);
        }
        pieces.sort_by_key(|(row, expert, piece)| (*row, *expert, piece.node));
        let mut sums: Vec<ExpertSum> = Vec::new();
        for (i, &expert) in routed.topk_ids.iter().enumerate() {
            let row = (i / top_k) as u32;
            let of = |p: &&(u32, ExpertId, Piece)| p.0 == row && p.1 == expert;
            let begin = sums.last().map_or(0, |s| s.pieces.end);
            let count = pieces[begin as usize..].iter().take_while(of).count() as u32;
            sums.push(ExpertSum {
                row,
                weight: routed.topk_weights[i],
                pieces: begin..begin + count,
            });
        }
        let contributions = Contributions {
            buffers: &buffers.iter().map(Vec::as_slice).collect::<Vec<_>>(),
            pieces: &pieces.iter().map(|p| p.2).collect::<Vec<_>>(),
            sums: &sums,
            num_segments: self.geometry.num_segments(),
        };
        self.attention.combine(layer, &contributions).unwrap();
    }
}

/// Every expert of the model, cut to `range`.
pub(crate) fn slices(geometry: &ModelGeometry, range: SegmentRange) -> Vec<ExpertSlice> {
    let mut slices = Vec::new();
    for layer in 0..geometry.num_layers as u16 {
        for expert in 0..geometry.num_experts as u16 {
            slices.push(ExpertSlice {
                layer: LayerId(layer),
                expert: ExpertId(expert),
                range,
            });
        }
    }
    slices
}

/// Pages for `num_tokens` positions, counted down from `NUM_PAGES - 1 - skip`.
pub(crate) fn pages(skip: usize, num_tokens: usize) -> Vec<PageId> {
    let count = num_tokens.div_ceil(KV_PAGE_TOKENS);
    let first = NUM_PAGES - skip;
    (0..count).map(|i| PageId((first - 1 - i) as u32)).collect()
}
