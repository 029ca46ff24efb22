//! Checkpoints that must be refused, with file and tensor named, and those that must not.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{Backend as _, DType};
use tramontane_model::{Checkpoint, Error, Overrides, demo, load_slices, manifest};
use tramontane_testkit::tiny::{TinyDtype, TinyModel};
use tramontane_types::{ExpertId, LayerId, SegmentRange};

use super::driver::slices;

const SINGLE: &str = "model.safetensors";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";
const INDEX: &str = "model.safetensors.index.json";

fn written(model: &TinyModel) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path()).unwrap();
    folder
}

fn refused(directory: &Path) -> String {
    let error: Error = Checkpoint::open(directory).unwrap_err();
    error.to_string()
}

fn edit_json(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Changes the header of a safetensors file and keeps its data.
fn edit_header(path: &Path, change: impl FnOnce(&mut Value)) {
    let file = fs::read(path).unwrap();
    let len = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..8 + len]).unwrap();
    change(&mut header);
    let header = header.to_string();
    let mut changed = (header.len() as u64).to_le_bytes().to_vec();
    changed.extend_from_slice(header.as_bytes());
    changed.extend_from_slice(&file[8 + len..]);
    fs::write(path, changed).unwrap();
}

#[test]
fn every_element_type_and_any_number_of_files_is_read() {
    let types = [
        (TinyDtype::F32, DType::F32),
        (TinyDtype::F16, DType::F16),
        (TinyDtype::Bf16, DType::Bf16),
    ];
    let mut first = Vec::new();
    for (dtype, expected) in types {
        let folder = written(&TinyModel::mixtral().dtype(dtype).shards(3));
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let weights = checkpoint.attention_weights().unwrap();
        assert_eq!(weights.embed.dtype, expected);
        let w2 = checkpoint
            .expert_weights(LayerId(1), ExpertId(7))
            .unwrap()
            .w2;
        assert_eq!((w2.rows, w2.cols), (32, 64));
        first.push(w2.to_f32()[0]);
        assert_eq!(checkpoint.inspect().files.len(), 3);
    }
    assert!((first[0] - first[1]).abs() < 1e-3 && (first[0] - first[2]).abs() < 1e-2);
}

#[test]
fn a_tied_head_is_the_embedding_and_a_dense_block_is_expert_zero() {
    let folder = written(&TinyModel::mistral().tied());
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let weights = checkpoint.attention_weights().unwrap();
    assert!(std::ptr::eq(weights.lm_head.data, weights.embed.data));
    assert!(weights.layers[0].gate.is_none());
    let expert = checkpoint.expert_weights(LayerId(0), ExpertId(0)).unwrap();
    assert_eq!(
        (expert.w1.rows, expert.w2.rows, expert.w3.rows),
        (64, 32, 64)
    );
    let beyond = checkpoint
        .expert_weights(LayerId(0), ExpertId(1))
        .unwrap_err();
    assert_eq!(
        beyond.to_string(),
        "expert 1 is out of range, expected less than 1"
    );
}

#[test]
fn a_wrong_shape_is_refused_with_file_tensor_expected_and_got() {
    let folder = written(&TinyModel::mixtral());
    edit_header(&folder.path().join(SINGLE), |header| {
        header["model.layers.1.block_sparse_moe.experts.3.w2.weight"]["shape"] = json!([64, 32]);
    });
    assert_eq!(
        refused(folder.path()),
        "model.safetensors: tensor model.layers.1.block_sparse_moe.experts.3.w2.weight has shape \
         [64, 32], expected [32, 64] by the configuration"
    );
}

#[test]
fn a_configuration_that_does_not_fit_the_tensors_is_refused_before_anything_is_allocated() {
    let folder = written(&TinyModel::mixtral());
    edit_json(&folder.path().join("config.json"), |config| {
        config["vocab_size"] = json!(16_000_000);
    });
    let text = refused(folder.path());
    assert!(
        text.contains("model.embed_tokens.weight has shape [97, 32], expected [16000000, 32]"),
        "{text}"
    );
    edit_json(&folder.path().join("config.json"), |config| {
        config["vocab_size"] = json!(97);
        config["num_hidden_layers"] = json!(1024);
    });
    let text = refused(folder.path());
    assert!(
        text.contains("model.layers.2.") && text.contains("is in none of"),
        "{text}"
    );
}

#[test]
fn a_truncated_or_extended_file_is_refused() {
    let folder = written(&TinyModel::mixtral().shards(2));
    let path = folder.path().join(SECOND);
    let file = fs::read(&path).unwrap();
    for (len, part) in [
        (file.len() - 1, "file is truncated"),
        (100, "is truncated: header"),
        (3, "at least 8"),
    ] {
        fs::write(&path, &file[..len]).unwrap();
        let text = refused(folder.path());
        assert!(text.starts_with(SECOND) && text.contains(part), "{text}");
    }
    fs::write(&path, [file.as_slice(), &[0]].concat()).unwrap();
    assert!(refused(folder.path()).contains("bytes, expected"));
    fs::write(&path, []).unwrap();
    assert!(refused(folder.path()).contains(SECOND));
}

#[test]
fn a_missing_shard_and_a_missing_tensor_are_named() {
    let folder = written(&TinyModel::mixtral().shards(2));
    fs::rename(folder.path().join(SECOND), folder.path().join("elsewhere")).unwrap();
    assert!(refused(folder.path()).contains(SECOND));

    let folder = written(&TinyModel::mixtral());
    edit_header(&folder.path().join(SINGLE), |header| {
        let norm = header
            .as_object_mut()
            .unwrap()
            .remove("model.norm.weight")
            .unwrap();
        header["model.other.weight"] = norm;
    });
    assert_eq!(
        refused(folder.path()),
        "tensor model.norm.weight is in none of model.safetensors"
    );
}

#[test]
fn an_index_that_lies_is_refused() {
    let lying = |file: &str| {
        let folder = written(&TinyModel::mixtral().shards(2));
        edit_json(&folder.path().join(INDEX), |index| {
            index["weight_map"]["model.norm.weight"] = json!(file);
        });
        refused(folder.path())
    };
    assert!(
        lying(FIRST).contains("tensor model.norm.weight: is not here, though"),
        "{}",
        lying(FIRST)
    );
    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "..",
        "",
        "a/b.safetensors",
        "a\\b",
    ] {
        let text = lying(outside);
        assert!(
            text.starts_with(INDEX) && text.contains("model.norm.weight"),
            "{text}"
        );
    }
    let folder = written(&TinyModel::mixtral().shards(2));
    fs::write(folder.path().join(INDEX), "{}").unwrap();
    assert!(refused(folder.path()).contains("weight_map"));
}

#[test]
fn a_tensor_in_two_files_is_refused() {
    let folder = written(&TinyModel::mixtral().shards(2));
    edit_header(&folder.path().join(SECOND), |header| {
        let entries = header.as_object_mut().unwrap();
        let norm = entries.remove("model.norm.weight").unwrap();
        entries.insert("model.layers.0.input_layernorm.weight".to_owned(), norm);
    });
    edit_json(&folder.path().join(INDEX), |index| {
        index["weight_map"]
            .as_object_mut()
            .unwrap()
            .remove("model.norm.weight");
    });
    let text = refused(folder.path());
    assert!(
        text.contains("input_layernorm.weight: is also in model-00001"),
        "{text}"
    );
}

#[test]
fn a_single_file_goes_before_an_index() {
    let folder = written(&TinyModel::mixtral());
    fs::write(folder.path().join(INDEX), "not json").unwrap();
    assert!(Checkpoint::open(folder.path()).is_ok());
}

#[test]
fn a_shifted_bit_is_refused_by_the_manifest() {
    let folder = written(&TinyModel::mixtral().shards(2));
    let report = Checkpoint::open(folder.path())
        .unwrap()
        .verify(&|_, _| {})
        .unwrap();
    assert_eq!(report.digests.len(), 2);
    manifest::write(&folder.path().join(manifest::FILE), &report.digests).unwrap();
    Checkpoint::open(folder.path()).unwrap();

    let path = folder.path().join(SECOND);
    let mut file = fs::read(&path).unwrap();
    let middle = file.len() / 2;
    file[middle] ^= 4;
    fs::write(&path, file).unwrap();
    let text = refused(folder.path());
    assert!(
        text.starts_with(SECOND) && text.contains("sha-256"),
        "{text}"
    );

    manifest::write(&folder.path().join(manifest::FILE), &report.digests[..1]).unwrap();
    let text = refused(folder.path());
    assert!(text.contains("has no digest of model-00002"), "{text}");
}

#[test]
fn verify_names_a_tensor_that_is_not_finite() {
    let folder = written(&TinyModel::mixtral().dtype(TinyDtype::F32));
    let path = folder.path().join(SINGLE);
    let mut file = fs::read(&path).unwrap();
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let done = std::sync::atomic::AtomicU64::new(0);
    let report =
        checkpoint.verify(&|bytes, _| done.store(bytes, std::sync::atomic::Ordering::Relaxed));
    let report = report.unwrap();
    assert_eq!(
        (report.bytes, report.tensors),
        (done.into_inner(), TinyModel::mixtral().tensors().len())
    );
    drop(checkpoint);

    // The last four bytes are the last element of the LM head.
    let last = file.len() - 4;
    file[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, file).unwrap();
    let error = Checkpoint::open(folder.path())
        .unwrap()
        .verify(&|_, _| {})
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "model.safetensors: tensor lm_head.weight: row 96 column 31 is NaN, expected a finite number"
    );
}

#[test]
fn the_fingerprint_changes_with_weights_shape_and_window_and_with_nothing_else() {
    let model = TinyModel::mixtral();
    let of = |model: &TinyModel| {
        Checkpoint::open(written(model).path())
            .unwrap()
            .fingerprint()
            .to_owned()
    };
    assert_eq!(of(&model), of(&model));
    assert_eq!(of(&model).len(), 16);
    assert_ne!(of(&model), of(&model.clone().seed(2)));
    assert_ne!(of(&model), of(&model.clone().ff(96)));
    let folder = written(&model);
    let overrides = Overrides {
        sliding_window: Some(Some(8)),
    };
    let narrow = Checkpoint::open_with(folder.path(), overrides).unwrap();
    assert_eq!(narrow.geometry().sliding_window, Some(8));
    assert_ne!(narrow.fingerprint(), of(&model));
}

#[test]
fn the_fingerprint_changes_with_each_single_tensor() {
    let folder = written(&TinyModel::mixtral());
    let path = folder.path().join(SINGLE);
    let whole = fs::read(&path).unwrap();
    let fingerprint = || {
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        checkpoint.fingerprint().to_owned()
    };
    let (prefix, rest) = whole.split_first_chunk::<8>().unwrap();
    let size = u64::from_le_bytes(*prefix) as usize;
    let header: Value = serde_json::from_slice(&rest[..size]).unwrap();
    let mut header = header.as_object().unwrap().clone();
    header.remove("__metadata__");
    let mut names = std::collections::BTreeSet::from([fingerprint()]);
    for tensor in header.values() {
        let mut changed = whole.clone();
        let offset = |i: usize| 8 + size + tensor["data_offsets"][i].as_u64().unwrap() as usize;
        let (begin, end) = (offset(0), offset(1));
        // Trained anew: every element has another sign.
        for byte in &mut changed[begin..end] {
            *byte ^= 0x80;
        }
        fs::write(&path, changed).unwrap();
        names.insert(fingerprint());
    }
    assert_eq!(names.len(), header.len() + 1);
}

#[test]
fn the_demo_is_opened_from_memory_and_loads_in_parallel() {
    let checkpoint = Checkpoint::from_embedded().unwrap();
    assert!(checkpoint.manifest_path().is_none());
    let about = checkpoint.inspect();
    assert_eq!(
        (about.parameters / 10_000, about.parameters_active / 10_000),
        (905, 374)
    );
    let experts = ReferenceBackend::new(checkpoint.geometry()).experts();
    let range = SegmentRange::new(2, 4).unwrap();
    let wanted = slices(checkpoint.geometry(), range);
    let calls = std::sync::Mutex::new(Vec::new());
    load_slices(&checkpoint, &*experts, &wanted, &|done, all| {
        calls.lock().unwrap().push((done, all));
    })
    .unwrap();
    let mut calls = calls.into_inner().unwrap();
    calls.sort_unstable();
    assert_eq!(calls, (1..=32).map(|i| (i, 32)).collect::<Vec<_>>());
    // Six segments of 64 columns; what lies behind counts as held.
    assert_eq!(experts.held(LayerId(3), ExpertId(7)), 0b1100_1100);
    assert_eq!(demo::files().len(), 7);
}

#[test]
fn a_slice_of_an_expert_that_is_not_there_is_refused() {
    let checkpoint = Checkpoint::from_embedded().unwrap();
    let experts = ReferenceBackend::new(checkpoint.geometry()).experts();
    let mut wanted = slices(checkpoint.geometry(), SegmentRange::WHOLE);
    wanted.truncate(1);
    wanted[0].layer = LayerId(4);
    let error = load_slices(&checkpoint, &*experts, &wanted, &|_, _| {}).unwrap_err();
    assert!(
        matches!(error, Error::OutOfRange { what: "layer", .. }),
        "{error}"
    );
}
