//! Deliberately broken builds are noticed, each within a number of seeds. Needs the feature `mutations`.

use tramontane_coordination::mutation::{Mutation, turn_on};
use tramontane_exchange::mutation as exchange;
use tramontane_sim::{run_seed, run_seeds_with, tokenizer};

/// A defect that survives so many seeds is not noticed.
const SEEDS_MAX: u64 = 3000;

#[test]
fn every_defect_is_noticed_and_its_seed_is_clean_without_it() {
    let tokenizer = tokenizer().unwrap();
    let defects: [(&str, fn()); 5] = [
        ("epoch check off", || turn_on(Some(Mutation::EpochCheckOff))),
        ("journal off by one", || {
            turn_on(Some(Mutation::JournalOffByOne));
        }),
        ("no drop grace", || turn_on(Some(Mutation::NoDropGrace))),
        ("weights mixed", || turn_on(Some(Mutation::WeightsMixed))),
        ("late answers count", || {
            exchange::turn_on(Some(exchange::Mutation::LateAnswersCount));
        }),
    ];
    for (name, break_it) in defects {
        let broken = run_seeds_with(break_it, 0..SEEDS_MAX, true, &tokenizer);
        let Some(bad) = broken.first_bad else {
            panic!("{name}: not noticed within {SEEDS_MAX} seeds");
        };
        println!(
            "{name}: noticed at seed {}: {}",
            bad.seed, bad.violations[0]
        );
        let whole = run_seed(bad.seed, false, &tokenizer);
        assert_eq!(whole.violations, Vec::<String>::new(), "{name}");
    }
}
