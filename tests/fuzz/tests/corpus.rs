//! Every target with every file of its corpus, and with what becomes of them when somebody meddles with them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must end"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tramontane_fuzz::mutate::Mutator;
use tramontane_fuzz::{TARGETS, Target};

/// Meddled inputs per target, and the time after which there are no more.
const INPUTS: usize = 4_000;
const TIME: Duration = Duration::from_secs(6);
/// Inputs that each target must have had by then, on the slowest machine.
const INPUTS_MIN: usize = 50;
/// What one input may take on a busy machine: four times what any takes here.
const INPUT_TIME: Duration = Duration::from_secs(4);

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target);
    let mut paths: Vec<PathBuf> = std::fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty", dir.display());
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

#[test]
fn every_target_takes_its_corpus_and_what_is_close_to_it() {
    for target in TARGETS {
        let corpus = corpus(target.name);
        for bytes in &corpus {
            run(*target, bytes);
        }
        let mut mutator = Mutator::new(target.name, &corpus);
        let begin = Instant::now();
        let mut num_inputs = 0;
        while num_inputs < INPUTS && begin.elapsed() < TIME {
            run(*target, &mutator.input());
            num_inputs += 1;
        }
        assert!(
            num_inputs >= INPUTS_MIN,
            "{} is slow: {num_inputs} inputs",
            target.name
        );
        println!(
            "{}: {} files, {num_inputs} inputs",
            target.name,
            corpus.len()
        );
    }
}

/// Leaves the input in a file when the target panics or takes too long.
fn run(target: Target, bytes: &[u8]) {
    let begin = Instant::now();
    let ran = std::panic::catch_unwind(|| (target.run)(bytes));
    let took = begin.elapsed();
    if ran.is_err() || took > INPUT_TIME {
        let name = target.name;
        let path = std::env::temp_dir().join(format!("tramontane-fuzz-{name}"));
        std::fs::write(&path, bytes).unwrap();
        let what = if ran.is_err() { "panicked" } else { "was slow" };
        panic!(
            "{name} {what} after {took:?}; the input is {}",
            path.display()
        );
    }
}
