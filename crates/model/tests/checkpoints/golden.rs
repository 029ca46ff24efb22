//! What transformers computes from the checkpoints of `/tests/golden/checkpoints`, computed by our backends.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::Value;
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{Backend, WeightFormat};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::emulator::Emulator;
use tramontane_compute_cuda::{CudaBackend, Target};
use tramontane_model::Checkpoint;
use tramontane_testkit::golden::{read_tensors, relative_distance, relative_error};
use tramontane_types::{ExpertId, ModelGeometry, TokenId};

use super::driver::{Driver, Part, pages};

/// Reference backend against transformers, both f32.
const F32_TOLERANCE: f32 = 1e-4;
/// CPU backend with bf16 weights against transformers f32, over all logits of a prompt.
const BF16_TOLERANCE: f32 = 2e-2;
/// CUDA backend with weights and rows as e4m3: each rounding is off by 2.6 % of a row's length (compute-cuda's `tests/exact.rs`), here that of
/// weights too; eight products in a row, each of two rounded factors, are off by 10 %.
const E4M3_TOLERANCE: f32 = 0.13;
/// Experts as q4: a matrix is off by 7 %, an expert of three by 12 %, and the layers of tiny models are little else; two of them.
const Q4_TOLERANCE: f32 = 0.2;
const CASES: [&str; 8] = [
    "mixtral-8x2-f32",
    "mixtral-8x2-bf16",
    "mixtral-4x1-gqa1",
    "mixtral-6x3-odd",
    "mixtral-headdim-gqa4",
    "mixtral-tied-window",
    "mistral-window",
    "mistral-gqa8",
];

struct Prompt {
    tokens: Vec<TokenId>,
    greedy: Vec<TokenId>,
    /// `[tokens, vocab]`.
    logits: Vec<f32>,
}

fn folder(case: &str) -> PathBuf {
    let root = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/golden/checkpoints"
    );
    PathBuf::from(root).join(case)
}

fn prompts(case: &str) -> Vec<Prompt> {
    let folder = folder(case);
    let mut tensors: BTreeMap<_, _> = read_tensors(&folder.join("golden.safetensors")).unwrap();
    let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let ids = |v: &Value| serde_json::from_value::<Vec<TokenId>>(v.clone()).unwrap();
    let cases = golden["cases"].as_array().unwrap().iter().enumerate();
    cases
        .map(|(i, case)| Prompt {
            tokens: ids(&case["prompt"]),
            greedy: ids(&case["greedy"]),
            logits: tensors.remove(&format!("logits.{i}")).unwrap(),
        })
        .collect()
}

/// Logits and chosen experts of every token of a prompt.
fn run(driver: &mut Driver, tokens: &[TokenId]) -> (Vec<f32>, Vec<Vec<ExpertId>>) {
    let part = Part {
        tokens,
        begin: 0,
        pages: pages(0, tokens.len()),
    };
    let logits = driver.step(&[part]);
    (logits, driver.chosen.clone())
}

fn reference(checkpoint: &Checkpoint) -> Driver {
    let backend = ReferenceBackend::new(checkpoint.geometry());
    Driver::new(checkpoint, &backend, &[0, 8])
}

#[test]
fn the_reference_backend_computes_what_transformers_computes() {
    for case in CASES {
        let checkpoint = Checkpoint::open(&folder(case)).unwrap();
        let mut driver = reference(&checkpoint);
        for prompt in prompts(case) {
            let (logits, _) = run(&mut driver, &prompt.tokens);
            let error = relative_error(&logits, &prompt.logits).unwrap();
            let len = prompt.tokens.len();
            assert!(
                error <= F32_TOLERANCE,
                "{case}, {len} tokens: error {error}"
            );
        }
    }
}

#[test]
fn the_reference_backend_goes_on_as_transformers_does() {
    for case in CASES {
        let checkpoint = Checkpoint::open(&folder(case)).unwrap();
        let mut driver = reference(&checkpoint);
        for prompt in prompts(case) {
            assert_eq!(prompt.greedy.len(), 64);
            let greedy = driver.greedy(&prompt.tokens, 64);
            assert_eq!(
                greedy,
                prompt.greedy,
                "{case}, {} tokens",
                prompt.tokens.len()
            );
        }
    }
}

/// A rounded gate may choose another expert where two are nearly equal, and everything after that token
/// differs: rows are compared up to the first such token, and few may be left out.
///
/// The share of the rows that were compared whose likeliest token is that of transformers.
fn comes_close(
    cases: &[&str],
    tolerance: f32,
    backend: &dyn Fn(&ModelGeometry) -> Box<dyn Backend>,
) -> f32 {
    let (mut compared, mut rows, mut same_tokens) = (0, 0, 0);
    for &case in cases {
        let checkpoint = Checkpoint::open(&folder(case)).unwrap();
        let geometry = checkpoint.geometry();
        let backend = backend(geometry);
        let mut ours_driver = Driver::new(&checkpoint, &*backend, &[0, 8]);
        let mut exact = reference(&checkpoint);
        for prompt in prompts(case) {
            let (logits, ours) = run(&mut ours_driver, &prompt.tokens);
            let (_, theirs) = run(&mut exact, &prompt.tokens);
            let same = |row: usize| {
                let chosen = row * geometry.top_k..(row + 1) * geometry.top_k;
                let layers = ours.iter().zip(&theirs);
                layers
                    .clone()
                    .all(|(a, b)| a[chosen.clone()] == b[chosen.clone()])
            };
            let len = prompt.tokens.len();
            let until = (0..len).find(|&row| !same(row)).unwrap_or(len);
            (compared, rows) = (compared + until, rows + len);
            if until == 0 {
                continue;
            }
            let numbers = ..until * geometry.vocab;
            let (got, expected) = (&logits[numbers], &prompt.logits[numbers]);
            let pairs = got
                .chunks_exact(geometry.vocab)
                .zip(expected.chunks_exact(geometry.vocab));
            same_tokens += pairs.filter(|(a, b)| likeliest(a) == likeliest(b)).count();
            let error = relative_distance(got, expected).unwrap();
            assert!(
                error <= tolerance,
                "{case}, {until} of {len} tokens: error {error}"
            );
        }
    }
    assert!(
        compared * 2 > rows,
        "only {compared} of {rows} rows chose the same experts"
    );
    same_tokens as f32 / compared as f32
}

fn likeliest(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]))
}

#[test]
fn the_cpu_backend_in_bf16_comes_close() {
    let same = comes_close(&CASES, BF16_TOLERANCE, &|geometry| {
        let config = CpuConfig {
            threads: NonZeroUsize::MIN,
            isa: None,
        };
        Box::new(CpuBackend::new(geometry, WeightFormat::Bf16, config).unwrap())
    });
    assert!(same > 0.95, "{same} of the tokens are the same");
}

/// Kernels and host code together, on the emulator.
#[test]
fn the_cuda_backend_in_bf16_comes_close() {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    for target in [Target::Sm80, Target::Sm90a] {
        let device: Arc<dyn Device> = Emulator::new(&dir, target).unwrap();
        let same = comes_close(&CASES, BF16_TOLERANCE, &|geometry| {
            Box::new(CudaBackend::new(&device, geometry, WeightFormat::Bf16).unwrap())
        });
        assert!(same > 0.95, "{same} of the tokens are the same");
    }
}

/// Without a choice of experts, which weights of fewer bits change too often to compare what follows: dense models.
#[test]
fn the_cuda_backend_in_fewer_bits_comes_close() {
    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    for (target, format, tolerance) in [
        (Target::Sm89, WeightFormat::E4m3, E4M3_TOLERANCE),
        (Target::Sm90a, WeightFormat::E4m3, E4M3_TOLERANCE),
        (Target::Sm90a, WeightFormat::Q4, Q4_TOLERANCE),
    ] {
        let device: Arc<dyn Device> = Emulator::new(&dir, target).unwrap();
        let same = comes_close(
            &["mistral-gqa8", "mistral-window"],
            tolerance,
            &|geometry| Box::new(CudaBackend::new(&device, geometry, format).unwrap()),
        );
        println!("{target} {format}: {same} of the tokens are the same");
        assert!(
            same > 0.8,
            "{target} {format}: {same} of the tokens are the same"
        );
    }
}
