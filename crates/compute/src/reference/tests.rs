//! What the reference backend refuses, and its operations on numbers that can be checked by hand.

use tramontane_types::{ExpertId, ExpertSlice, LayerId, PageId, SegmentRange};

use super::ops::{Linear, rms_norm, rope, silu, softmax, top_k};
use super::*;
use crate::{
    AttentionLayerWeights, Contributions, DType, ExpertJob, ExpertWeights, HostTensor, KvFormat,
    RoutedRows, SequenceSpan, StepBatch,
};

const HIDDEN: usize = 4;

fn geometry() -> ModelGeometry {
    ModelGeometry {
        hidden: HIDDEN,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 2,
        ff: 40,
        num_experts: 3,
        top_k: 2,
        vocab: 5,
        rope_theta: 1e4,
        rms_eps: 1e-5,
        sliding_window: Some(3),
        max_positions: 200,
    }
}

/// Numbers for every tensor: `x(i) = sin(i)`.
fn numbers() -> Vec<u8> {
    (0..400)
        .flat_map(|i| (i as f32).sin().to_le_bytes())
        .collect()
}

fn tensor(data: &[u8], rows: usize, cols: usize) -> HostTensor<'_> {
    HostTensor {
        dtype: DType::F32,
        rows,
        cols,
        order: Default::default(),
        data: &data[..rows * cols * 4],
    }
}

fn attention_weights(data: &[u8]) -> AttentionWeights<'_> {
    AttentionWeights {
        embed: tensor(data, 5, HIDDEN),
        layers: vec![AttentionLayerWeights {
            input_norm: tensor(data, 1, HIDDEN),
            q: tensor(data, 4, HIDDEN),
            k: tensor(data, 2, HIDDEN),
            v: tensor(data, 2, HIDDEN),
            o: tensor(data, HIDDEN, 4),
            post_norm: tensor(data, 1, HIDDEN),
            gate: Some(tensor(data, 3, HIDDEN)),
        }],
        norm: tensor(data, 1, HIDDEN),
        lm_head: tensor(data, 5, HIDDEN),
    }
}

fn expert_weights(data: &[u8]) -> ExpertWeights<'_> {
    ExpertWeights {
        w1: tensor(data, 40, HIDDEN),
        w2: tensor(data, HIDDEN, 40),
        w3: tensor(data, 40, HIDDEN),
    }
}

fn attention(data: &[u8]) -> Box<dyn Attention> {
    let config = AttentionConfig {
        num_pages: 2,
        max_rows: 8,
        kv_format: KvFormat::F16,
    };
    let backend = ReferenceBackend::new(&geometry());
    backend.attention(&attention_weights(data), config).unwrap()
}

fn batch(tokens: &[u32], begin: u32, pages: &[u32]) -> StepBatch {
    StepBatch {
        tokens: tokens.to_vec(),
        positions: (begin..begin + tokens.len() as u32).collect(),
        sequences: vec![SequenceSpan {
            row_begin: 0,
            num_rows: tokens.len() as u32,
            block_table: pages.iter().map(|&p| PageId(p)).collect(),
        }],
        logits_rows: vec![0],
    }
}

fn slice(layer: u16, expert: u16, begin: u8, end: u8) -> ExpertSlice {
    ExpertSlice {
        layer: LayerId(layer),
        expert: ExpertId(expert),
        range: SegmentRange::new(begin, end).unwrap(),
    }
}

#[test]
fn the_operations_are_those_of_the_paper() {
    assert_eq!(rms_norm(&[3.0, 4.0], &[2.0, 1.0], 0.0), {
        let rms = 12.5_f32.sqrt();
        [3.0 * (1.0 / rms) * 2.0, 4.0 * (1.0 / rms)]
    });
    // Pairs are (0, 2) and (1, 3); the second turns 100 times slower.
    let mut head = [1.0, 1.0, 0.0, 0.0];
    rope(&mut head, 4, 2, 1e4);
    let expected = [2_f32.cos(), 0.02_f32.cos(), 2_f32.sin(), 0.02_f32.sin()];
    for (x, y) in head.iter().zip(expected) {
        assert!((x - y).abs() < 1e-6, "{head:?}");
    }
    let mut p = [1000.0, 1000.0, f32::NEG_INFINITY];
    softmax(&mut p);
    assert_eq!(p, [0.5, 0.5, 0.0]);
    assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
    assert_eq!(silu(-200.0), 0.0);
    let matrix = Linear::from_values(vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, 3).unwrap();
    assert_eq!(matrix.apply(&[1.0, 0.0, -1.0]).unwrap(), [-2.0, -2.0]);
    assert_eq!(matrix.row(1).unwrap(), [4.0, 5.0, 6.0]);
}

#[test]
fn of_equal_experts_the_lowest_is_chosen_and_ids_ascend() {
    assert_eq!(top_k(&[0.1, 0.3, 0.3, 0.3], 2), [1, 2]);
    assert_eq!(top_k(&[0.1, 0.2, 0.3, 0.4], 2), [2, 3]);
    assert_eq!(top_k(&[0.4, 0.1, 0.1, 0.5], 3), [0, 1, 3]);
}

#[test]
fn a_batch_that_does_not_fit_is_refused_and_changes_nothing() {
    let data = numbers();
    let mut attention = attention(&data);
    let good = batch(&[1, 2], 0, &[1]);
    attention.begin(&good).unwrap();
    let mut before = Vec::new();
    attention.logits(&good, &mut before).unwrap();
    let broken = [
        batch(&[5], 0, &[0]),
        batch(&[1], 0, &[2]),
        batch(&[1], 0, &[]),
        batch(&[1], 64, &[0]),
        batch(&[1], 200, &[0, 0, 0, 0]),
        batch(&[1; 9], 0, &[0]),
        StepBatch {
            logits_rows: vec![2],
            ..good.clone()
        },
        StepBatch {
            logits_rows: vec![1, 0],
            ..good.clone()
        },
        StepBatch {
            positions: vec![0, 2],
            ..good.clone()
        },
        StepBatch {
            positions: vec![0],
            ..good.clone()
        },
        StepBatch {
            sequences: vec![],
            ..good.clone()
        },
        // Two sequences that write the same page.
        StepBatch {
            sequences: [0, 1]
                .map(|row_begin| SequenceSpan {
                    row_begin,
                    num_rows: 1,
                    ..good.sequences[0].clone()
                })
                .to_vec(),
            positions: vec![0, 0],
            ..good.clone()
        },
    ];
    for batch in broken {
        assert!(attention.begin(&batch).is_err(), "{batch:?}");
        let mut after = Vec::new();
        attention.logits(&good, &mut after).unwrap();
        assert_eq!(before, after, "{batch:?}");
    }
}

#[test]
fn a_page_behind_the_window_may_be_gone() {
    let data = numbers();
    let mut attention = attention(&data);
    let mut late = batch(&[1], 66, &[0, 1]);
    late.sequences[0].block_table[0] = PageId::RELEASED;
    attention.begin(&late).unwrap();
    attention
        .attend(LayerId(0), &late, &mut RoutedRows::default())
        .unwrap();
    // Position 65 still sees position 63.
    let mut early = late.clone();
    early.positions = vec![65];
    assert!(attention.begin(&early).is_err());
}

#[test]
fn steps_out_of_order_are_refused() {
    let data = numbers();
    let mut attention = attention(&data);
    let begun = batch(&[1, 2], 0, &[1]);
    attention.begin(&begun).unwrap();
    let mut routed = RoutedRows::default();
    assert!(attention.attend(LayerId(1), &begun, &mut routed).is_err());
    let other = batch(&[1, 3], 0, &[1]);
    assert!(attention.attend(LayerId(0), &other, &mut routed).is_err());
    attention.attend(LayerId(0), &begun, &mut routed).unwrap();
    assert_eq!(routed.topk_ids.len(), 4);
    assert_eq!(routed.rows.len(), 2 * HIDDEN * 4);
    let sums = routed.topk_weights.chunks(2).map(|w| w[0] + w[1]);
    assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-6));
    let nothing = Contributions {
        buffers: &[],
        pieces: &[],
        sums: &[],
        num_segments: 8,
    };
    assert!(attention.combine(LayerId(0), &nothing).is_err());
}

#[test]
fn weights_of_another_shape_are_refused_by_name() {
    let data = numbers();
    let backend = ReferenceBackend::new(&geometry());
    let config = AttentionConfig {
        num_pages: 1,
        max_rows: 1,
        kv_format: KvFormat::F16,
    };
    let mut weights = attention_weights(&data);
    weights.layers[0].k = tensor(&data, 3, HIDDEN);
    let error = backend.attention(&weights, config).unwrap_err().to_string();
    assert_eq!(error, "rows of k: expected 2, got 3");
    let mut weights = attention_weights(&data);
    weights.layers[0].gate = None;
    assert!(backend.attention(&weights, config).is_err());
    let mut weights = expert_weights(&data);
    weights.w2 = tensor(&data, 40, HIDDEN);
    let experts = backend.experts();
    assert!(experts.load(slice(0, 0, 0, 8), &weights).is_err());
    // Forty columns make two segments; what lies behind counts as held.
    assert_eq!(experts.held(LayerId(0), ExpertId(0)), 0b1111_1100);
}

#[test]
fn slices_are_held_until_unloaded_and_others_are_refused() {
    let data = numbers();
    let experts = ReferenceBackend::new(&geometry()).experts();
    experts
        .load(slice(0, 1, 0, 1), &expert_weights(&data))
        .unwrap();
    assert_eq!(experts.held(LayerId(0), ExpertId(1)), 0b1111_1101);
    assert_eq!(experts.held(LayerId(1), ExpertId(1)), 0);
    let row = &data[..HIDDEN * 4];
    let compute = |begin, end, row_ids: &[u32]| {
        let job = ExpertJob {
            expert: ExpertId(1),
            range: SegmentRange::new(begin, end).unwrap(),
            row_ids,
        };
        let mut out = Vec::new();
        let done = experts.compute(LayerId(0), row, 1, &[job], &mut out);
        done.map(|()| out)
    };
    assert_eq!(compute(0, 1, &[0]).unwrap().len(), HIDDEN);
    assert_eq!(compute(0, 1, &[0, 0]).unwrap().len(), 2 * HIDDEN);
    assert!(matches!(compute(0, 2, &[0]), Err(Error::NotHeld { .. })));
    assert!(matches!(compute(0, 1, &[1]), Err(Error::OutOfRange { .. })));
    experts
        .load(slice(0, 1, 1, 8), &expert_weights(&data))
        .unwrap();
    let whole = compute(0, 8, &[0]).unwrap();
    let (left, right) = (compute(0, 1, &[0]).unwrap(), compute(1, 2, &[0]).unwrap());
    let sum: Vec<f32> = left.iter().zip(right).map(|(a, b)| a + b).collect();
    assert_eq!(whole, sum);
    experts.unload(slice(0, 1, 0, 8));
    assert!(matches!(compute(0, 1, &[0]), Err(Error::NotHeld { .. })));
    let error = experts.load(slice(0, 3, 0, 8), &expert_weights(&data));
    assert!(matches!(error, Err(Error::OutOfRange { .. })));
}
