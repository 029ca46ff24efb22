//! Deliberately broken builds are noticed, each within a number of seeds. Needs the feature `mutations`.

use std::sync::Arc;

use tramontane_coordination::mutation::{Mutation, turn_on};
use tramontane_exchange::mutation::let_late_answers_count;
use tramontane_sim::{Outcome, run_seed, tokenizer};
use tramontane_tokenizer::Tokenizer;

/// A defect that survives so many seeds is not noticed.
const SEEDS_MAX: u64 = 3000;

/// The first seed that notices a defect, which `set` turns on and off for a thread.
fn first_caught(name: &str, set: impl Fn(bool) + Sync, tokenizer: &Arc<Tokenizer>) -> Outcome {
    let cores = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    for begin in (0..SEEDS_MAX).step_by(cores as usize) {
        let run = |seed: u64| {
            set(true);
            let broken = run_seed(seed, false, tokenizer);
            set(false);
            broken
        };
        let outcomes: Vec<Outcome> = std::thread::scope(|scope| {
            let run = &run;
            let spawn = |seed| scope.spawn(move || run(seed));
            let runs: Vec<_> = (begin..begin + cores).map(spawn).collect();
            runs.into_iter().map(|run| run.join().unwrap()).collect()
        });
        if let Some(caught) = outcomes.into_iter().find(|o| !o.violations.is_empty()) {
            let first = &caught.violations[0];
            println!("{name}: noticed at seed {}: {first}", caught.seed);
            let whole = run_seed(caught.seed, false, tokenizer);
            assert_eq!(whole.violations, Vec::<String>::new(), "without the defect");
            return caught;
        }
    }
    panic!("{name}: not noticed within {SEEDS_MAX} seeds");
}

#[test]
fn every_defect_is_noticed() {
    let tokenizer = tokenizer().unwrap();
    let defects = [
        Mutation::EpochCheckOff,
        Mutation::JournalOffByOne,
        Mutation::NoDropGrace,
    ];
    for defect in defects {
        let name = format!("{defect:?}");
        first_caught(&name, |on| turn_on(on.then_some(defect)), &tokenizer);
    }
    first_caught("LateAnswersCount", let_late_answers_count, &tokenizer);
}
