//! The exactness contract of the CUDA backend, host code and kernels together: on the emulator, and on a GPU where there is one.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test may panic and say what it skips, its functions too"
)]

mod choices;
mod island;
mod model;

use std::sync::Arc;

use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{
    AttentionConfig, Backend, Contributions, Error, ExpertJob, KvFormat, RoutedRows, StepBatch,
    StepOutputs, Wanted, WeightFormat,
};
use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::emulator::Emulator;
use tramontane_compute_cuda::{
    CudaBackend, RandomModel, Target, check_format, check_geometry, working_bytes,
};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, ModelGeometry, PageId, SegmentRange};

use model::devices::{REQUIRE_GPU, devices, emulator, gpu, variable, work_dir};
use model::{ATTENTION, Checkpoint, Model, NUM_PAGES, Prompt, bits, geometry, load};

fn backend(device: &Arc<dyn Device>, geometry: &ModelGeometry) -> CudaBackend {
    backend_of(device, geometry, WeightFormat::Bf16)
}

fn backend_of(
    device: &Arc<dyn Device>,
    geometry: &ModelGeometry,
    format: WeightFormat,
) -> CudaBackend {
    CudaBackend::new(device, geometry, format).unwrap()
}

/// The formats of fewer bits, on every kind of device that multiplies them another way.
fn cases() -> Vec<(Arc<dyn Device>, WeightFormat)> {
    let formats = [WeightFormat::E4m3, WeightFormat::Q4];
    let mut cases = vec![];
    if variable(REQUIRE_GPU).is_none() {
        let kinds = [
            (Target::Sm89, WeightFormat::E4m3),
            (Target::Sm90a, WeightFormat::E4m3),
            (Target::Sm80, WeightFormat::Q4),
            (Target::Sm90a, WeightFormat::Q4),
        ];
        cases.extend(kinds.map(|(target, format)| (emulator(target), format)));
    }
    if let Ok(gpu) = gpu() {
        let target = Some(gpu.info().target);
        let has = |format: &WeightFormat| check_format(*format, target).is_ok();
        let of_gpu = formats.into_iter().filter(has);
        cases.extend(of_gpu.map(|format| (Arc::clone(&gpu), format)));
    }
    cases
}

#[test]
fn logits_are_those_of_the_reference() {
    let shapes = [
        geometry(),
        ModelGeometry {
            num_experts: 1,
            top_k: 1,
            sliding_window: None,
            ..geometry()
        },
        ModelGeometry {
            hidden: 64,
            num_heads: 8,
            num_kv_heads: 1,
            head_dim: 64,
            ff: 96,
            num_experts: 6,
            top_k: 3,
            ..geometry()
        },
    ];
    for device in devices() {
        for geometry in &shapes {
            let checkpoint = Checkpoint::new(geometry.clone());
            let reference = ReferenceBackend::new(geometry);
            let mut exact = Model::new(&checkpoint, &reference, &[0, 8]);
            let mut ours = Model::new(&checkpoint, &backend(&device, geometry), &[0, 8]);
            let (error, rows) = distance(&mut exact, &mut ours, geometry);
            assert!(error < 2e-2, "{device:?}: error {error} over {rows} rows");
        }
    }
}

/// How far our logits of a prompt are from the reference's, over the rows whose experts are the same in both: a rounded
/// gate may choose another one where two are nearly equal, and then all later rows differ.
fn distance(exact: &mut Model, ours: &mut Model, geometry: &ModelGeometry) -> (f32, usize) {
    let mut batch = StepBatch::default();
    Prompt::new(3, 70, 0).add_to(&mut batch, 0..70, true);
    let (expected, got) = (exact.step(&batch), ours.step(&batch));
    let same = |row: usize| {
        let chosen = row * geometry.top_k..(row + 1) * geometry.top_k;
        let mut pairs = exact.chosen.iter().zip(&ours.chosen);
        pairs.all(|(a, b)| a[chosen.clone()] == b[chosen.clone()])
    };
    let until = (0..70).find(|&row| !same(row)).unwrap_or(70);
    assert!(until >= 8, "{until} rows chose the same experts");
    let values = ..until * geometry.vocab;
    let (expected, got) = (&expected[values], &got[values]);
    let off: f32 = expected.iter().zip(got).map(|(a, b)| (a - b).powi(2)).sum();
    let size: f32 = expected.iter().map(|a| a.powi(2)).sum();
    ((off / size).sqrt(), until)
}

/// The reference has the weights as they were rounded, so what differs is the rounding of rows.
///
/// In q4 that is to bf16, as above. To e4m3, with steps of 1/8 to 1/16 of a number, it is off by about 2.6 % of a row's length, and so is a
/// product. There are four in a row in a layer, in two layers, beside the residual stream, which is not rounded. Whoever is off by
/// a wrong scale is off by more than everything.
///
/// All experts are chosen here: one that is not, because a rounded row has another score, would be off by more.
#[test]
fn logits_of_fewer_bits_are_those_of_the_reference_with_rounded_weights() {
    let shapes = [
        ModelGeometry {
            top_k: 4,
            ..geometry()
        },
        ModelGeometry {
            hidden: 160,
            num_heads: 8,
            num_kv_heads: 1,
            head_dim: 64,
            ff: 296,
            num_experts: 1,
            top_k: 1,
            ..geometry()
        },
    ];
    for (device, format) in cases() {
        for geometry in &shapes {
            let rounded = Checkpoint::rounded(geometry.clone(), format);
            let reference = ReferenceBackend::new(geometry);
            let mut exact = Model::new(&rounded, &reference, &[0, 8]);
            let checkpoint = Checkpoint::new(geometry.clone());
            let ours = backend_of(&device, geometry, format);
            let mut ours = Model::new(&checkpoint, &ours, &[0, 8]);
            let (error, rows) = distance(&mut exact, &mut ours, geometry);
            println!(
                "{format} on {}: error {error} over {rows} rows",
                device.info().target
            );
            let most = if format == WeightFormat::E4m3 {
                0.1
            } else {
                2e-2
            };
            assert_eq!(rows, 70);
            assert!(error < most, "{format} on {device:?}: error {error}");
        }
    }
}

#[test]
fn the_class_names_the_format_and_what_a_device_does_not_have_is_refused() {
    for (device, format) in cases() {
        let class = device.info().target.class(&format.to_string());
        let backend = backend_of(&device, &geometry(), format);
        assert_eq!(backend.numeric_class(), class);
    }
    let device = emulator(Target::Sm80);
    for format in [WeightFormat::E4m3, WeightFormat::Q8] {
        let refused = CudaBackend::new(&device, &geometry(), format).unwrap_err();
        let expected = format!(
            "backend cuda on sm_80 offers weights as bf16 or q4 (e4m3 from sm_89 on), got {format}"
        );
        assert_eq!(refused.to_string(), expected);
    }
}

#[test]
fn in_fewer_bits_chunks_slices_and_whole_steps_change_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for (device, format) in cases() {
        let backend = backend_of(&device, &geometry(), format);
        let mut first = Model::new(&checkpoint, &backend, &[0, 8]);
        let expected = first.prompt(&Prompt::new(1, 75, 0), 75);
        assert!(expected.iter().all(|&x| f32::from_bits(x).is_finite()));
        let mut sliced = Model::new(&checkpoint, &backend, &[0, 1, 3, 4, 8]);
        let got = sliced.prompt(&Prompt::new(1, 75, 3), 20);
        assert!(got == expected, "{format} on {device:?} in slices");
        let mut whole = Model::new(&checkpoint, &backend, &[0, 8]);
        whole.is_whole = true;
        for chunk in [9, 33, 75] {
            let got = whole.prompt(&Prompt::new(1, 75, 5), chunk);
            assert!(got == expected, "{format} on {device:?}, {chunk} at once");
        }
    }
}

#[test]
fn in_fewer_bits_the_rest_of_a_batch_changes_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for (device, format) in cases() {
        let backend = backend_of(&device, &geometry(), format);
        let mut alone = Model::new(&checkpoint, &backend, &[0, 8]);
        let expected = alone.prompt(&Prompt::new(5, 24, 0), 24);
        let others: Vec<Prompt> = (0..20).map(|i| Prompt::new(40 + i, 10, i + 6)).collect();
        for is_whole in [false, true] {
            let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
            model.is_whole = is_whole;
            let prompt = Prompt::new(5, 24, 30);
            let (mut got, mut next) = (vec![], 0);
            for (step, len) in [3, 1, 20].into_iter().enumerate() {
                let mut batch = StepBatch::default();
                let before = 9 * step;
                for other in &others[..before] {
                    other.add_to(&mut batch, step..step + 1, false);
                }
                prompt.add_to(&mut batch, next..next + len, true);
                for other in &others[before..] {
                    other.add_to(&mut batch, step..step + 1, false);
                }
                got.extend(bits(&model.step(&batch)));
                next += len;
            }
            assert!(got == expected, "{format} on {device:?}, whole: {is_whole}");
        }
    }
}

#[test]
fn keys_and_values_of_eight_bits_are_those_of_the_reference() {
    let checkpoint = Checkpoint::new(geometry());
    for device in devices() {
        let kv = KvFormat::Q8;
        let reference = ReferenceBackend::new(&geometry());
        let mut exact = Model::with_kv(&checkpoint, &reference, &[0, 8], kv);
        let ours = backend(&device, &geometry());
        let mut model = Model::with_kv(&checkpoint, &ours, &[0, 8], kv);
        let (error, rows) = distance(&mut exact, &mut model, &geometry());
        assert!(error < 3e-2, "{device:?}: error {error} over {rows} rows");
        let expected = model.prompt(&Prompt::new(1, 110, 0), 110);
        let mut whole = Model::with_kv(&checkpoint, &ours, &[0, 8], kv);
        whole.is_whole = true;
        assert!(whole.prompt(&Prompt::new(1, 110, 9), 40) == expected);
    }
}

#[test]
fn chunks_pages_and_slices_change_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for device in devices() {
        let mut whole = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
        let expected = whole.prompt(&Prompt::new(1, 110, 0), 110);
        assert!(expected.iter().all(|&x| f32::from_bits(x).is_finite()));
        for (chunk, first_page, cuts) in [
            (7, 3, &[0, 4, 8][..]),
            (64, 9, &[0, 1, 2, 3, 4, 5, 6, 8]),
            (110, 20, &[0, 5, 8]),
        ] {
            let mut model = Model::new(&checkpoint, &backend(&device, &geometry()), cuts);
            let prompt = Prompt::new(1, 110, first_page);
            let got = model.prompt(&prompt, chunk);
            assert!(got == expected, "{chunk} {cuts:?}");
        }
    }
}

#[test]
fn the_order_of_warps_changes_no_bit() {
    if variable(REQUIRE_GPU).is_some() {
        println!("skipped: a GPU has an order of its own");
        return;
    }
    let checkpoint = Checkpoint::new(geometry());
    for (target, format) in [
        (Target::Sm80, WeightFormat::Bf16),
        (Target::Sm90a, WeightFormat::Bf16),
        (Target::Sm89, WeightFormat::E4m3),
        (Target::Sm90a, WeightFormat::E4m3),
        (Target::Sm90a, WeightFormat::Q4),
    ] {
        let run = |seed| {
            let emulator = Emulator::new(&work_dir().join("emulator"), target).unwrap();
            emulator.set_seed(seed);
            let device: Arc<dyn Device> = emulator;
            let backend = backend_of(&device, &geometry(), format);
            let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
            model.is_whole = true;
            model.prompt(&Prompt::new(1, 70, 0), 35)
        };
        let expected = run(1);
        assert!(run(2) == expected, "{target} {format}");
        let is_new = format != WeightFormat::Bf16;
        assert!(is_new || run(77) == expected, "{target} {format}");
    }
}

#[test]
fn a_whole_step_has_the_bits_of_its_layers() {
    let checkpoint = Checkpoint::new(geometry());
    for device in devices() {
        let mut by_layers = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 3, 8]);
        let expected = by_layers.prompt(&Prompt::new(1, 110, 0), 110);
        let chosen = counts(&by_layers.chosen, geometry().num_experts);
        for chunk in [9, 40, 110] {
            let mut whole = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
            whole.is_whole = true;
            let got = whole.prompt(&Prompt::new(1, 110, 7), chunk);
            assert!(got == expected, "{chunk}");
            let mut counted = vec![];
            for expected in [&chosen, &vec![0; chosen.len()]] {
                whole.attention.take_chosen(&mut counted).unwrap();
                assert_eq!(counted, *expected, "{chunk}");
            }
            // Again, by graphs that are there already, over what the pages held.
            let got = whole.prompt(&Prompt::new(1, 110, 5), chunk);
            assert!(got == expected, "{chunk} again");
        }
    }
}

/// How often each expert of each layer is among these.
fn counts(chosen: &[Vec<ExpertId>], num_experts: usize) -> Vec<u64> {
    let mut counts = vec![0; chosen.len() * num_experts];
    for (layer, ids) in chosen.iter().enumerate() {
        for id in ids {
            counts[layer * num_experts + usize::from(id.0)] += 1;
        }
    }
    counts
}

#[test]
fn a_step_of_more_rows_than_a_graph_has_the_same_bits() {
    let checkpoint = Checkpoint::new(geometry());
    for device in devices() {
        let prompt = Prompt::new(2, 270, 0);
        let mut by_layers = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
        let expected = by_layers.prompt(&prompt, 270);
        let mut whole = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
        whole.is_whole = true;
        // Attention in tiles of 128, 64 and 16 (row, head).
        for chunk in [270, 33, 8] {
            assert!(whole.prompt(&prompt, chunk) == expected, "{chunk}");
        }
    }
}

#[test]
fn the_rest_of_a_batch_changes_no_bit() {
    let checkpoint = Checkpoint::new(geometry());
    for device in devices() {
        let mut alone = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
        let expected = alone.prompt(&Prompt::new(5, 40, 0), 40);
        let mut model = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 2, 8]);
        let others: Vec<Prompt> = (0..11)
            .map(|i| Prompt::new(40 + i, 90, 3 * i + 6))
            .collect();
        let prompt = Prompt::new(5, 40, 62);
        let (mut got, mut next) = (vec![], 0);
        for (step, len) in [3, 1, 1, 20, 2, 13].into_iter().enumerate() {
            let mut batch = StepBatch::default();
            let before = (5 * step) % others.len();
            for other in &others[..before] {
                other.add_to(&mut batch, step..step + 1, false);
            }
            let begin = batch.num_rows();
            prompt.add_to(&mut batch, next..next + len, true);
            for other in &others[before..] {
                other.add_to(&mut batch, step..step + 1, false);
            }
            model.is_whole = false;
            let logits = model.step(&batch);
            assert_eq!(logits.len(), len * 75, "from row {begin}");
            got.extend(bits(&logits));
            next += len;
        }
        assert!(got == expected);
    }
}

#[test]
fn a_long_context_is_shared_and_joined_with_the_same_bits() {
    let geometry = ModelGeometry {
        sliding_window: None,
        num_layers: 1,
        ..geometry()
    };
    let checkpoint = Checkpoint::new(geometry.clone());
    for device in devices() {
        let run = |first_page, chunk| {
            let mut model = Model::new(&checkpoint, &backend(&device, &geometry), &[0, 8]);
            model.is_whole = true;
            // The last row alone: a narrow tile of three chunks, which several blocks share.
            model.prompt(&Prompt::new(1, 1_100, first_page), chunk)[1_099 * 75..].to_vec()
        };
        let expected = run(0, 550);
        assert!(run(9, 1_099 / 7) == expected);
    }
}

/// Sums as long as those of real models, in tiles of every size: only a GPU says whether its tensor cores round a column
/// alike in all of them.
#[test]
fn tiles_of_every_size_have_the_same_bits_at_real_widths() {
    let gpu = match gpu() {
        Ok(gpu) => gpu,
        Err(error) => return println!("skipped on a GPU: {error}"),
    };
    let geometry = ModelGeometry {
        hidden: 2048,
        num_layers: 1,
        // So many that a step of all rows has attention tiles of every size.
        num_heads: 80,
        num_kv_heads: 20,
        head_dim: 128,
        ff: 4096,
        sliding_window: None,
        ..geometry()
    };
    let checkpoint = Checkpoint::new(geometry.clone());
    let formats = [WeightFormat::Bf16, WeightFormat::E4m3, WeightFormat::Q4];
    for format in formats {
        let Ok(backend) = CudaBackend::new(&gpu, &geometry, format) else {
            println!("skipped {format}: {gpu:?} has no kernels for it");
            continue;
        };
        let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
        model.is_whole = true;
        let prompt = Prompt::new(3, 560, 0);
        let expected = model.prompt(&prompt, 1);
        for chunk in [9, 16, 24, 33, 70, 130, 256, 300, 560] {
            let is_same = model.prompt(&prompt, chunk) == expected;
            assert!(is_same, "{format}: chunks of {chunk}");
        }
    }
}

/// Long steps by panels and clusters, which only models of whole blocks have: the same bits as short ones.
#[test]
fn a_step_by_panels_has_the_bits_of_shorter_ones() {
    if variable(REQUIRE_GPU).is_some() {
        return println!("skipped: the test of real widths has such steps on a GPU");
    }
    // The least of which all parts are whole steps.
    for (format, cols) in [(WeightFormat::Bf16, 1024), (WeightFormat::E4m3, 2048)] {
        let geometry = ModelGeometry {
            hidden: cols,
            num_layers: 1,
            num_heads: cols / 128,
            num_kv_heads: 2,
            head_dim: 128,
            ff: cols,
            sliding_window: None,
            ..geometry()
        };
        let checkpoint = Checkpoint::new(geometry.clone());
        let device = emulator(Target::Sm90a);
        let before = device.memory_free().unwrap();
        let backend = backend_of(&device, &geometry, format);
        let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
        model.is_whole = true;
        let prompts: Vec<Prompt> = (0..10).map(|i| Prompt::new(5 + i, 53, i)).collect();
        let mut batch = StepBatch::default();
        for prompt in &prompts {
            prompt.add_to(&mut batch, 0..53, true);
        }
        let together = bits(&model.step(&batch));
        let values = 53 * geometry.vocab;
        for i in [0, 9] {
            let alone = model.prompt(&prompts[i], 53);
            assert!(together[i * values..][..values] == alone, "{format}, {i}");
        }
        // The most that it can take: long steps and short ones, whole and layer by layer, with all buffers.
        model.is_whole = false;
        assert!(model.prompt(&prompts[9], 53) == together[9 * values..]);
        let taken = before - device.memory_free().unwrap();
        let experts = backend.segment_bytes() * 8 * geometry.num_experts as u64;
        let cache = (NUM_PAGES * 2 * 2 * 64 * 128 * 2) as u64;
        let working = working_bytes(&geometry, format, ATTENTION.max_rows);
        assert!(
            taken <= working + experts + cache,
            "{format}: {taken}, {working} foreseen beside {experts} and {cache}"
        );
    }
}

/// What the benchmark measures: it has no weights to compare with, but it must compute.
#[test]
fn a_model_with_random_weights_computes_whole_steps() {
    let geometry = geometry();
    let bf16 = devices()
        .into_iter()
        .map(|device| (device, WeightFormat::Bf16));
    for (device, format) in bf16.chain(cases()) {
        let config = AttentionConfig {
            num_pages: NUM_PAGES,
            max_rows: 64,
            kv_format: KvFormat::F16,
        };
        let mut model = RandomModel::new(&device, &geometry, config, format).unwrap();
        let mut batch = StepBatch::default();
        Prompt::new(1, 40, 0).add_to(&mut batch, 0..40, true);
        let mut out = StepOutputs::default();
        let wanted = [Wanted::Logits; 40];
        let step = model
            .attention
            .step(&batch, &wanted, &*model.experts, &mut out);
        let what = format!("{format} on {device:?}");
        assert!(step.unwrap(), "{what}: it holds all experts");
        let logits = out.logits;
        assert_eq!(logits.len(), batch.logits_rows.len() * geometry.vocab);
        assert!(logits.iter().all(|x| x.is_finite()), "{what}");
        assert!(logits.iter().any(|x| *x != logits[0]), "{what}");
    }
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let checkpoint = Checkpoint::new(geometry());
    let device = devices().remove(0);
    let mut model = Model::new(&checkpoint, &backend(&device, &geometry()), &[0, 8]);
    let mut good = StepBatch::default();
    Prompt::new(1, 130, 0).add_to(&mut good, 100..130, false);
    good.logits_rows = vec![0, 29];
    let changes: [fn(&mut StepBatch); 6] = [
        |b| b.tokens[5] = 75,
        |b| b.positions[5] = 9,
        |b| b.sequences[0].num_rows = 29,
        |b| b.sequences[0].block_table.truncate(2),
        |b| b.sequences[0].block_table[2] = PageId(NUM_PAGES as u32),
        |b| b.logits_rows = vec![30],
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
    assert!(
        check_geometry(&ModelGeometry {
            head_dim: 130,
            ..geometry()
        })
        .is_err()
    );
}

#[test]
fn experts_refuse_what_they_do_not_hold_and_a_whole_step_then_is_none() {
    let checkpoint = Checkpoint::new(geometry());
    let device = devices().remove(0);
    let backend = backend(&device, &geometry());
    let experts = backend.experts();
    assert_eq!(experts.held(LayerId(0), ExpertId(0)), 0x80);
    load(&checkpoint, &*experts, SegmentRange::WHOLE);
    let rows = vec![0; 100 * 144];
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
    let mut model = Model::new(&checkpoint, &backend, &[0, 8]);
    let mut batch = StepBatch::default();
    Prompt::new(1, 3, 0).add_to(&mut batch, 0..3, true);
    let mut out = StepOutputs::default();
    let mut step = |wanted: &[Wanted]| {
        let done = model.attention.step(&batch, wanted, &*experts, &mut out);
        done.map(|done| (done, out.logits.len()))
    };
    let wanted = [Wanted::Logits; 3];
    assert_eq!(step(&wanted).unwrap(), (true, 3 * 75));
    let refused = step(&wanted[1..]).unwrap_err().to_string();
    assert_eq!(refused, "outputs of logits rows: expected 3, got 2");
    experts.unload(whole);
    assert!(!step(&wanted).unwrap().0);
    let refused = compute(1, &rows, 3, 99);
    assert!(matches!(refused, Err(Error::NotHeld { slice }) if slice == whole));
    assert!(compute(2, &rows, 3, 99).is_err());
    assert!(compute(0, &rows[1..], 3, 99).is_err());
    assert!(compute(0, &rows, 4, 99).is_err());
    assert!(compute(0, &rows, 3, 100).is_err());
}
