//! A real model on the reference backend.

use super::*;

/// Random weights of a small Mixtral, by name and shape.
fn weights(name: u64, rows: usize, cols: usize) -> Vec<u8> {
    let scale = 2.0 / (cols as f32).sqrt();
    let number = |i: u64| (unit(mix(name, i)) - 0.5) * if rows == 1 { 0.2 } else { scale };
    let bias = if rows == 1 { 1.0 } else { 0.0 };
    (0..(rows * cols) as u64)
        .flat_map(|i| (number(i) + bias).to_le_bytes())
        .collect()
}

fn tensor(rows: usize, cols: usize, data: &[u8]) -> HostTensor<'_> {
    HostTensor {
        dtype: DType::F32,
        rows,
        cols,
        order: Default::default(),
        data,
    }
}

fn load_experts(experts: &dyn Experts) {
    for layer in (0..2).map(LayerId) {
        for expert in (0..5).map(ExpertId) {
            let name = 1000 + u64::from(layer.0) * 100 + u64::from(expert.0) * 10;
            let [w1, w3] = [1, 3].map(|i| weights(name + i, 64, 32));
            let w2 = weights(name + 2, 32, 64);
            let (w1, w3) = (tensor(64, 32, &w1), tensor(64, 32, &w3));
            let tensors = ExpertWeights {
                w1,
                w2: tensor(32, 64, &w2),
                w3,
            };
            let slice = ExpertSlice {
                layer,
                expert,
                range: SegmentRange::WHOLE,
            };
            experts.load(slice, &tensors).unwrap();
        }
    }
}

/// A real model on the reference backend.
fn reference_bench(config: EngineConfig, window: Option<usize>) -> Bench {
    let geometry = ModelGeometry {
        hidden: 32,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 8,
        ff: 64,
        ..geometry(window)
    };
    let backend = ReferenceBackend::new(&geometry);
    let (embed, norm) = (weights(1, VOCAB, 32), weights(2, 1, 32));
    let layers: Vec<Vec<Vec<u8>>> = (0..2)
        .map(|layer| {
            let shapes = [
                (1, 32),
                (32, 32),
                (16, 32),
                (16, 32),
                (32, 32),
                (1, 32),
                (5, 32),
            ];
            let named = shapes.iter().zip(10 + layer * 10..);
            named
                .map(|(&(rows, cols), name)| weights(name, rows, cols))
                .collect()
        })
        .collect();
    let attention = AttentionWeights {
        embed: tensor(VOCAB, 32, &embed),
        layers: layers
            .iter()
            .map(|t| AttentionLayerWeights {
                input_norm: tensor(1, 32, &t[0]),
                q: tensor(32, 32, &t[1]),
                k: tensor(16, 32, &t[2]),
                v: tensor(16, 32, &t[3]),
                o: tensor(32, 32, &t[4]),
                post_norm: tensor(1, 32, &t[5]),
                gate: Some(tensor(5, 32, &t[6])),
            })
            .collect(),
        norm: tensor(1, 32, &norm),
        lm_head: tensor(VOCAB, 32, &embed),
    };
    let (num_pages, max_rows) = (config.num_pages, config.max_step_rows);
    let reserved = AttentionConfig {
        num_pages,
        max_rows,
        kv_format: KvFormat::F16,
    };
    let attention = backend.attention(&attention, reserved).unwrap();
    let experts = backend.experts();
    load_experts(&*experts);
    Bench::around(config, geometry, attention, experts)
}

#[test]
fn a_real_model_says_the_same_however_it_is_run() {
    let with_scores = |new: &NewSequence| {
        let mut new = new.clone();
        new.params.logprobs = Some(2);
        new.params.max_tokens = 6;
        new.params.min_tokens = 0;
        new
    };
    let all: Vec<_> = requests()
        .iter()
        .filter(|r| r.prompt.len() < 90)
        .map(with_scores)
        .collect();
    for window in [None, Some(30)] {
        let expected: Vec<Heard> = all
            .iter()
            .map(|new| {
                let mut bench = reference_bench(config(), window);
                bench.submit(new);
                bench.run();
                bench.of(new).clone()
            })
            .collect();
        let limits = EngineConfig {
            num_pages: 5,
            max_step_rows: 40,
            max_prefill_chunk: 17,
            prefix_cache: true,
            ..config()
        };
        let mut bench = reference_bench(limits, window);
        for new in &all {
            bench.submit(new);
        }
        bench.fail_in.store(3, Ordering::Relaxed);
        bench.run();
        assert_eq!(bench.num_errors, 1);
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(
                bench.of(new).said(),
                expected.said(),
                "{}, window {window:?}",
                new.id
            );
        }
    }
}
