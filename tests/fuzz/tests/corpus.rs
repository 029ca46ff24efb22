//! Every target with every file of its corpus, and with what becomes of them when somebody meddles with them.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must end"
)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tramontane_fuzz::TARGETS;
use tramontane_fuzz::mutate::Mutator;

/// Meddled inputs per target, and the time after which there are no more.
const INPUTS: usize = 4_000;
const TIME: Duration = Duration::from_secs(6);

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
            (target.run)(bytes);
        }
        let mut mutator = Mutator::new(target.name, &corpus);
        let begin = Instant::now();
        let mut num_inputs = 0;
        while num_inputs < INPUTS && begin.elapsed() < TIME {
            let bytes = mutator.input();
            let ran = std::panic::catch_unwind(|| (target.run)(&bytes));
            if ran.is_err() {
                let path = std::env::temp_dir().join(format!("tramontane-fuzz-{}", target.name));
                std::fs::write(&path, &bytes).unwrap();
                panic!("{} panicked; the input is {}", target.name, path.display());
            }
            num_inputs += 1;
        }
        println!(
            "{}: {} files, {num_inputs} inputs",
            target.name,
            corpus.len()
        );
    }
}
