//! The exactness contract of the CPU backend: the same bits whatever the batch, the chunking, the pages, the slices or the threads.
#![expect(clippy::unwrap_used, reason = "a test may panic, its functions too")]

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tramontane_compute::{
    Attention, AttentionConfig, AttentionLayerWeights, AttentionWeights, Backend, Contributions,
    DType, Error, ExpertJob, ExpertSum, ExpertWeights, Experts, HostTensor, KvFormat, Piece,
    RoutedRows, SequenceSpan, StepBatch, WeightFormat,
};
use tramontane_compute_cpu::{CpuBackend, CpuConfig, Isa};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, PageId, SegmentRange};

const NUM_PAGES: usize = 64;
const MAX_ROWS: usize = 600;
const FORMATS: [WeightFormat; 3] = [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4];

/// Odd on purpose: columns that fill no block, seven segments of which the last is short, a window that
/// ends inside a page.
fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: 72,
        num_layers: 2,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 24,
        ff: 200,
        num_experts: 4,
        top_k: 2,
        vocab: 75,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: Some(100),
        max_positions: 1024,
    }
}

fn noise(seed: u64, len: usize, scale: f32) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(4 * len);
    for _ in 0..len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let x = ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * scale;
        bytes.extend_from_slice(&x.to_le_bytes());
    }
    bytes
}

struct Owned {
    rows: usize,
    cols: usize,
    data: Vec<u8>,
}

impl Owned {
    fn new(seed: u64, rows: usize, cols: usize) -> Self {
        let scale = 2.0 / (cols as f32).sqrt();
        let data = noise(seed, rows * cols, scale);
        Self { rows, cols, data }
    }

    fn view(&self) -> HostTensor<'_> {
        HostTensor {
            dtype: DType::F32,
            rows: self.rows,
            cols: self.cols,
            order: Default::default(),
            data: &self.data,
        }
    }
}

/// The tensors of a checkpoint, by layer.
struct Checkpoint {
    geometry: ModelGeometry,
    embed: Owned,
    norm: Owned,
    lm_head: Owned,
    /// input norm, q, k, v, o, post norm, gate.
    layers: Vec<[Owned; 7]>,
    /// w1, w2, w3 by layer and expert.
    experts: Vec<[Owned; 3]>,
}

impl Checkpoint {
    fn new(geometry: ModelGeometry) -> Self {
        let g = &geometry;
        let (q, kv) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        let layer = |l: u64| {
            [
                Owned::new(100 * l + 1, 1, g.hidden),
                Owned::new(100 * l + 2, q, g.hidden),
                Owned::new(100 * l + 3, kv, g.hidden),
                Owned::new(100 * l + 4, kv, g.hidden),
                Owned::new(100 * l + 5, g.hidden, q),
                Owned::new(100 * l + 6, 1, g.hidden),
                Owned::new(100 * l + 7, g.num_experts, g.hidden),
            ]
        };
        let expert = |e: u64| {
            [
                Owned::new(5000 + 10 * e, g.ff, g.hidden),
                Owned::new(5001 + 10 * e, g.hidden, g.ff),
                Owned::new(5002 + 10 * e, g.ff, g.hidden),
            ]
        };
        Self {
            embed: Owned::new(1, g.vocab, g.hidden),
            norm: Owned::new(2, 1, g.hidden),
            lm_head: Owned::new(3, g.vocab, g.hidden),
            layers: (1..=g.num_layers as u64).map(layer).collect(),
            experts: (0..(g.num_layers * g.num_experts) as u64)
                .map(expert)
                .collect(),
            geometry,
        }
    }

    fn attention(&self) -> AttentionWeights<'_> {
        let layers = self.layers.iter();
        AttentionWeights {
            embed: self.embed.view(),
            layers: layers
                .map(
                    |[input_norm, q, k, v, o, post_norm, gate]| AttentionLayerWeights {
                        input_norm: input_norm.view(),
                        q: q.view(),
                        k: k.view(),
                        v: v.view(),
                        o: o.view(),
                        post_norm: post_norm.view(),
                        gate: self.geometry.has_gate().then(|| gate.view()),
                    },
                )
                .collect(),
            norm: self.norm.view(),
            lm_head: self.lm_head.view(),
        }
    }

    fn expert(&self, layer: usize, expert: usize) -> ExpertWeights<'_> {
        let [w1, w2, w3] = &self.experts[layer * self.geometry.num_experts + expert];
        ExpertWeights {
            w1: w1.view(),
            w2: w2.view(),
            w3: w3.view(),
        }
    }
}

fn config(threads: usize, isa: Option<Isa>) -> CpuConfig {
    CpuConfig {
        threads: NonZeroUsize::new(threads).unwrap(),
        isa,
    }
}

/// A model whose experts are cut at the given segments and spread over that many workers.
struct Model {
    geometry: ModelGeometry,
    attention: Box<dyn Attention>,
    workers: Vec<(SegmentRange, Arc<dyn Experts>)>,
}

impl Model {
    fn new(checkpoint: &Checkpoint, backend: &dyn Backend, cuts: &[u8]) -> Self {
        Self::with_kv(checkpoint, backend, cuts, KvFormat::F16)
    }

    fn with_kv(
        checkpoint: &Checkpoint,
        backend: &dyn Backend,
        cuts: &[u8],
        kv_format: KvFormat,
    ) -> Self {
        let geometry = checkpoint.geometry.clone();
        let config = AttentionConfig {
            num_pages: NUM_PAGES,
            max_rows: MAX_ROWS,
            kv_format,
        };
        let attention = backend.attention(&checkpoint.attention(), config).unwrap();
        let ranges = cuts
            .windows(2)
            .map(|w| SegmentRange::new(w[0], w[1]).unwrap());
        let workers = ranges
            .map(|range| {
                let experts = backend.experts();
                load(checkpoint, &*experts, range);
                (range, experts)
            })
            .collect();
        Self {
            geometry,
            attention,
            workers,
        }
    }

    /// The logits of one step.
    fn step(&mut self, batch: &StepBatch) -> Vec<f32> {
        let mut routed = RoutedRows::default();
        self.attention.begin(batch).unwrap();
        for layer in 0..self.geometry.num_layers as u16 {
            let layer = LayerId(layer);
            self.attention.attend(layer, batch, &mut routed).unwrap();
            self.exchange(layer, &routed);
        }
        let mut logits = vec![];
        self.attention.logits(batch, &mut logits).unwrap();
        logits
    }

    fn exchange(&mut self, layer: LayerId, routed: &RoutedRows) {
        let top_k = self.geometry.top_k;
        let num_segments = self.geometry.num_segments();
        let hidden = self.geometry.hidden;
        let rows_of = |expert: usize| -> Vec<u32> {
            let chosen = routed.topk_ids.iter().enumerate();
            chosen
                .filter(|(_, id)| usize::from(id.0) == expert)
                .map(|(i, _)| (i / top_k) as u32)
                .collect()
        };
        let rows: Vec<Vec<u32>> = (0..self.geometry.num_experts).map(rows_of).collect();
        let mut buffers = vec![];
        // (row, expert, piece) of every vector.
        let mut pieces = vec![];
        for (range, experts) in &self.workers {
            let jobs: Vec<ExpertJob<'_>> = rows
                .iter()
                .enumerate()
                .map(|(expert, row_ids)| ExpertJob {
                    expert: ExpertId(expert as u16),
                    range: *range,
                    row_ids,
                })
                .collect();
            let mut out = vec![1.0; 3];
            experts
                .compute(layer, &routed.rows, routed.num_rows, &jobs, &mut out)
                .unwrap();
            let mut offset = 0;
            for job in &jobs {
                for &row in job.row_ids {
                    for node in range.nodes(num_segments) {
                        let buffer = buffers.len() as u32;
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
            assert_eq!(offset, out.len());
            buffers.push(out);
        }
        pieces.sort_by_key(|(row, expert, piece)| (*row, *expert, piece.node));
        let sums: Vec<ExpertSum> = (0..routed.topk_ids.len())
            .map(|i| {
                let key = ((i / top_k) as u32, routed.topk_ids[i]);
                let begin = pieces.partition_point(|p| (p.0, p.1) < key) as u32;
                let end = pieces.partition_point(|p| (p.0, p.1) <= key) as u32;
                ExpertSum {
                    row: key.0,
                    weight: routed.topk_weights[i],
                    pieces: begin..end,
                }
            })
            .collect();
        let pieces: Vec<Piece> = pieces.into_iter().map(|p| p.2).collect();
        let buffers: Vec<&[f32]> = buffers.iter().map(Vec::as_slice).collect();
        let contributions = Contributions {
            buffers: &buffers,
            pieces: &pieces,
            sums: &sums,
            num_segments,
        };
        self.attention.combine(layer, &contributions).unwrap();
    }

    /// The bits of the logits of every position, the prompt cut into chunks.
    fn prompt(&mut self, prompt: &Prompt, chunk: usize) -> Vec<u32> {
        let mut bits = vec![];
        let mut begin = 0;
        while begin < prompt.tokens.len() {
            let end = (begin + chunk).min(prompt.tokens.len());
            let mut batch = StepBatch::default();
            prompt.add_to(&mut batch, begin..end, true);
            bits.extend(self.step(&batch).iter().map(|x| x.to_bits()));
            begin = end;
        }
        bits
    }
}

fn load(checkpoint: &Checkpoint, experts: &dyn Experts, range: SegmentRange) {
    for layer in 0..checkpoint.geometry.num_layers {
        for expert in 0..checkpoint.geometry.num_experts {
            let slice = ExpertSlice {
                layer: LayerId(layer as u16),
                expert: ExpertId(expert as u16),
                range,
            };
            experts
                .load(slice, &checkpoint.expert(layer, expert))
                .unwrap();
        }
    }
}

struct Prompt {
    tokens: Vec<u32>,
    pages: Vec<PageId>,
}

impl Prompt {
    fn new(seed: u32, len: usize, first_page: u32) -> Self {
        let num_pages = len.div_ceil(64) as u32;
        Self {
            tokens: (0..len as u32)
                .map(|i| (i * i + 7 * i + seed) % 75)
                .collect(),
            // Not in order.
            pages: (0..num_pages)
                .rev()
                .map(|p| PageId(first_page + p))
                .collect(),
        }
    }

    fn add_to(&self, batch: &mut StepBatch, rows: std::ops::Range<usize>, wants_logits: bool) {
        let row_begin = batch.num_rows() as u32;
        batch.tokens.extend(&self.tokens[rows.clone()]);
        batch.positions.extend(rows.clone().map(|p| p as u32));
        batch.sequences.push(SequenceSpan {
            row_begin,
            num_rows: rows.len() as u32,
            block_table: self.pages.clone(),
        });
        if wants_logits {
            let end = batch.num_rows() as u32;
            batch.logits_rows.extend(row_begin..end);
        }
    }
}

#[test]
fn chunks_pages_slices_and_threads_change_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for format in FORMATS {
        let backend = CpuBackend::new(&geometry(), format, config(1, None)).unwrap();
        let whole = [0, 8];
        let expected =
            Model::new(&checkpoint, &backend, &whole).prompt(&Prompt::new(1, 530, 0), 530);
        assert!(expected.iter().all(|&x| f32::from_bits(x).is_finite()));
        for (threads, chunk, first_page, cuts) in [
            (1, 7, 0, &[0, 4, 8][..]),
            (2, 512, 20, &[0, 3, 6, 8]),
            (3, 64, 9, &[0, 1, 2, 3, 4, 5, 6, 8]),
            (2, 1, 50, &[0, 5, 8]),
        ] {
            let backend = CpuBackend::new(&geometry(), format, config(threads, None)).unwrap();
            let mut model = Model::new(&checkpoint, &backend, cuts);
            let prompt = Prompt::new(1, 530, first_page);
            let got = model.prompt(&prompt, chunk);
            assert!(got == expected, "{format} {threads} {chunk} {cuts:?}");
            // Again over what the pages held: the cache is read nowhere before it is written.
            let prompt = Prompt::new(1, 530, 3);
            assert!(model.prompt(&prompt, 200) == expected, "{format} reused");
        }
    }
}

#[test]
fn a_long_context_has_the_same_bits_however_it_is_cut() {
    // More than one chunk of pages, all of them in sight.
    let geometry = ModelGeometry {
        sliding_window: None,
        ..geometry()
    };
    let checkpoint = Checkpoint::new(geometry.clone());
    for kv_format in [KvFormat::F16, KvFormat::Q8] {
        let run = |isa, threads, chunk, first_page| {
            let config = config(threads, Some(isa));
            let backend = CpuBackend::new(&geometry, WeightFormat::Q8, config).unwrap();
            let mut model = Model::with_kv(&checkpoint, &backend, &[0, 8], kv_format);
            model.prompt(&Prompt::new(1, 600, first_page), chunk)
        };
        let expected = run(Isa::detect(), 1, 600, 0);
        assert!(expected.iter().all(|&x| f32::from_bits(x).is_finite()));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
            for (threads, chunk, first_page) in [(2, 1, 7), (3, 9, 20), (2, 130, 3)] {
                let got = run(isa, threads, chunk, first_page);
                assert!(got == expected, "{kv_format} {isa} {threads} {chunk}");
            }
        }
    }
}

#[test]
fn the_rest_of_a_batch_changes_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for format in FORMATS {
        let backend = CpuBackend::new(&geometry(), format, config(2, None)).unwrap();
        let mut alone = Model::new(&checkpoint, &backend, &[0, 8]);
        let expected = alone.prompt(&Prompt::new(5, 80, 0), 80);
        let mut model = Model::new(&checkpoint, &backend, &[0, 2, 8]);
        let others: Vec<Prompt> = (0..16)
            .map(|i| Prompt::new(40 + i, 90, 3 * i + 6))
            .collect();
        let prompt = Prompt::new(5, 80, 62);
        let mut got = vec![];
        let mut next = 0;
        // One token each, then a chunk of ours beside single tokens, in changing places.
        for step in 0..30 {
            let ours = next..(next + 1 + step % 5).min(80);
            let mut batch = StepBatch::default();
            for (i, other) in others.iter().enumerate() {
                if i == step % 16 {
                    prompt.add_to(&mut batch, ours.clone(), true);
                }
                other.add_to(&mut batch, step..step + 1, false);
            }
            got.extend(model.step(&batch).iter().map(|x| x.to_bits()));
            next = ours.end;
            if next == 80 {
                break;
            }
        }
        assert_eq!(next, 80);
        assert!(got == expected, "{format}");
    }
}

#[test]
fn instruction_sets_of_one_class_agree() {
    let checkpoint = Checkpoint::new(geometry());
    for format in FORMATS {
        let mut seen: Vec<(String, Isa, Vec<u32>)> = vec![];
        for isa in Isa::ALL {
            if !isa.is_supported() {
                println!("skipped: this machine lacks {isa}");
                continue;
            }
            let backend = CpuBackend::new(&geometry(), format, config(2, Some(isa))).unwrap();
            let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
            let bits = model.prompt(&Prompt::new(3, 70, 0), 33);
            let class = backend.numeric_class().to_owned();
            for (other_class, other, expected) in &seen {
                if *other_class == class {
                    assert!(bits == *expected, "{class}: {isa} and {other}");
                } else {
                    check_near(&bits, expected);
                }
            }
            seen.push((class, isa, bits));
        }
    }
}

fn check_near(a: &[u32], b: &[u32]) {
    for (&a, &b) in a.iter().zip(b) {
        let (a, b) = (f32::from_bits(a), f32::from_bits(b));
        assert!((a - b).abs() < 0.1, "{a} {b}");
    }
}

#[test]
fn a_dense_model_is_one_expert_with_weight_one() {
    let dense = ModelGeometry {
        num_experts: 1,
        top_k: 1,
        sliding_window: None,
        ..geometry()
    };
    let checkpoint = Checkpoint::new(dense.clone());
    let backend = CpuBackend::new(&dense, WeightFormat::Q8, config(2, None)).unwrap();
    let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
    let expected = model.prompt(&Prompt::new(1, 70, 0), 70);
    let mut sliced = Model::new(&checkpoint, &backend, &[0, 3, 8]);
    assert!(sliced.prompt(&Prompt::new(1, 70, 0), 9) == expected);
    let mut batch = StepBatch::default();
    Prompt::new(1, 2, 0).add_to(&mut batch, 0..2, false);
    model.attention.begin(&batch).unwrap();
    let mut routed = RoutedRows::default();
    model
        .attention
        .attend(LayerId(0), &batch, &mut routed)
        .unwrap();
    assert_eq!(routed.topk_ids, [ExpertId(0); 2]);
    assert_eq!(routed.topk_weights, [1.0; 2]);
}

#[test]
fn slices_come_and_go_while_calls_run() {
    let checkpoint = Checkpoint::new(geometry());
    let backend = CpuBackend::new(&geometry(), WeightFormat::Q8, config(2, None)).unwrap();
    let experts = backend.experts();
    load(&checkpoint, &*experts, SegmentRange::WHOLE);
    let rows = vec![3_u8; 2 * backend.row_format().row_bytes(72)];
    let job = |expert| ExpertJob {
        expert: ExpertId(expert),
        range: SegmentRange::WHOLE,
        row_ids: &[1, 0],
    };
    let compute = || {
        let mut out = vec![];
        let jobs = [job(2), job(0), job(2)];
        experts
            .compute(LayerId(1), &rows, 2, &jobs, &mut out)
            .map(|()| out)
    };
    let expected = compute().unwrap();
    assert_eq!(expected.len(), 3 * 2 * 72);
    assert_eq!(expected[..144], expected[288..], "the same job twice");
    let slice = ExpertSlice {
        layer: LayerId(1),
        expert: ExpertId(2),
        range: SegmentRange::new(2, 5).unwrap(),
    };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2)
            .map(|_| {
                scope.spawn(|| {
                    let mut calls = 0;
                    while !done.load(Ordering::Relaxed) || calls < 50 {
                        calls += 1;
                        match compute() {
                            Ok(out) => assert!(out == expected),
                            Err(e) => assert!(matches!(e, Error::NotHeld { .. }), "{e}"),
                        }
                    }
                })
            })
            .collect();
        for _ in 0..100 {
            experts.unload(slice);
            assert_eq!(experts.held(LayerId(1), ExpertId(2)), 0b1110_0011);
            experts.load(slice, &checkpoint.expert(1, 2)).unwrap();
            assert_eq!(experts.held(LayerId(1), ExpertId(2)), 0xff);
        }
        done.store(true, Ordering::Relaxed);
        for caller in callers {
            caller.join().unwrap();
        }
    });
    assert!(compute().unwrap() == expected);
}

#[test]
fn a_residual_row_that_is_not_finite_gives_logits_that_are_not_finite() {
    for format in FORMATS {
        // The last squares to infinity: the norm of the row is unknown.
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30] {
            let mut checkpoint = Checkpoint::new(geometry());
            let at = 4 * (9 * 72 + 40);
            checkpoint.embed.data[at..at + 4].copy_from_slice(&poison.to_le_bytes());
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_supported()) {
                let backend = CpuBackend::new(&geometry(), format, config(2, Some(isa))).unwrap();
                let mut model = Model::new(&checkpoint, &backend, &[0, 5, 8]);
                let mut batch = StepBatch::default();
                Prompt::new(9, 1, 0).add_to(&mut batch, 0..1, true);
                Prompt::new(1, 2, 1).add_to(&mut batch, 0..2, true);
                assert_eq!(batch.tokens, [9, 1, 9]);
                let logits = model.step(&batch);
                let what = format!("{format} {poison} {isa}");
                let (poisoned, rest) = logits.split_at(75);
                let (fine, after) = rest.split_at(75);
                assert!(poisoned.iter().all(|x| !x.is_finite()), "{what}");
                assert!(fine.iter().all(|x| x.is_finite()), "{what}");
                assert!(after.iter().all(|x| !x.is_finite()), "{what}");
            }
        }
    }
}

#[test]
fn a_page_that_two_sequences_write_in_one_step_is_refused() {
    let checkpoint = Checkpoint::new(geometry());
    let backend = CpuBackend::new(&geometry(), WeightFormat::Q8, config(1, None)).unwrap();
    let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
    // Pages 0 and 1, of which the first is shared and only the second written; then 2 and 3 likewise.
    let two = |tables: [[u32; 2]; 2], begins: [usize; 2]| {
        let mut batch = StepBatch::default();
        for (table, begin) in tables.into_iter().zip(begins) {
            let mut prompt = Prompt::new(1, 128, 0);
            prompt.pages = table.map(PageId).to_vec();
            prompt.add_to(&mut batch, begin..70, false);
        }
        batch
    };
    let mut begin = |tables, begins| model.attention.begin(&two(tables, begins));
    assert!(begin([[0, 1], [0, 2]], [64, 66]).is_ok(), "a shared prefix");
    assert!(begin([[0, 1], [2, 3]], [60, 60]).is_ok());
    assert!(begin([[0, 1], [0, 1]], [64, 64]).is_err(), "one table");
    assert!(begin([[0, 1], [2, 1]], [64, 68]).is_err(), "one page");
    assert!(begin([[0, 1], [0, 2]], [60, 60]).is_err(), "first page");
    assert!(begin([[0, 1], [1, 2]], [60, 60]).is_err(), "other entries");
    assert!(begin([[5, 5], [1, 2]], [60, 60]).is_err(), "named twice");
}

#[test]
fn what_does_not_fit_is_refused() {
    let checkpoint = Checkpoint::new(geometry());
    let backend = CpuBackend::new(&geometry(), WeightFormat::Q8, config(1, None)).unwrap();
    let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
    let mut good = StepBatch::default();
    let prompt = Prompt::new(1, 300, 0);
    prompt.add_to(&mut good, 200..300, false);
    good.logits_rows = vec![0, 99];
    // Behind the window: never read.
    good.sequences[0].block_table[0] = PageId::RELEASED;
    let changes: [fn(&mut StepBatch); 11] = [
        |b| b.tokens[5] = 75,
        |b| b.positions[5] = 9,
        |b| b.positions.truncate(99),
        |b| b.sequences[0].row_begin = 1,
        |b| b.sequences[0].num_rows = 99,
        |b| b.sequences[0].num_rows = u32::MAX,
        |b| b.sequences[0].block_table.truncate(4),
        |b| b.sequences[0].block_table[3] = PageId::RELEASED,
        |b| b.sequences[0].block_table[2] = PageId(NUM_PAGES as u32),
        |b| b.logits_rows = vec![100],
        |b| b.logits_rows = vec![7, 7],
    ];
    model.attention.begin(&good).unwrap();
    for (i, change) in changes.iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        assert!(model.attention.begin(&bad).is_err(), "change {i}");
        let refused = model
            .attention
            .attend(LayerId(0), &bad, &mut RoutedRows::default());
        assert!(refused.is_err(), "change {i}");
    }
    let mut routed = RoutedRows::default();
    assert!(
        model
            .attention
            .attend(LayerId(2), &good, &mut routed)
            .is_err()
    );
    model
        .attention
        .attend(LayerId(0), &good, &mut routed)
        .unwrap();
    let nothing = Contributions {
        buffers: &[],
        pieces: &[],
        sums: &[],
        num_segments: geometry().num_segments(),
    };
    assert!(model.attention.combine(LayerId(0), &nothing).is_err());
}

#[test]
fn experts_refuse_what_they_do_not_hold() {
    let checkpoint = Checkpoint::new(geometry());
    let backend = CpuBackend::new(&geometry(), WeightFormat::Q8, config(1, None)).unwrap();
    let experts = backend.experts();
    load(&checkpoint, &*experts, SegmentRange::WHOLE);
    let rows = vec![0; 100 * backend.row_format().row_bytes(72)];
    let mut out = vec![4.0];
    let mut compute = |layer, rows: &[u8], expert, row| {
        let jobs = [ExpertJob {
            expert: ExpertId(expert),
            range: SegmentRange::WHOLE,
            row_ids: &[row],
        }];
        experts.compute(LayerId(layer), rows, 100, &jobs, &mut out)
    };
    compute(0, &rows, 3, 99).unwrap();
    let whole = ExpertSlice {
        layer: LayerId(1),
        expert: ExpertId(3),
        range: SegmentRange::WHOLE,
    };
    experts.unload(whole);
    let refused = compute(1, &rows, 3, 99);
    assert!(matches!(refused, Err(Error::NotHeld { slice }) if slice == whole));
    assert!(compute(2, &rows, 3, 99).is_err());
    assert!(compute(0, &rows[1..], 3, 99).is_err());
    assert!(compute(0, &rows, 4, 99).is_err());
    assert!(compute(0, &rows, 3, 100).is_err());
    let mut short = checkpoint.expert(0, 0);
    short.w2.cols = 199;
    let slice = ExpertSlice {
        layer: LayerId(0),
        expert: ExpertId(0),
        range: SegmentRange::WHOLE,
    };
    assert!(experts.load(slice, &short).is_err());
    assert_eq!(backend.experts().held(LayerId(0), ExpertId(0)), 0x80);
}
