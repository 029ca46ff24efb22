//! Ten thousand simulated clusters, none of which violates anything, and a run repeats itself.

use tramontane_sim::{run_seed, run_seeds, tokenizer};

/// Seeds of every test run.
const SEEDS: u64 = 10_000;

#[test]
fn no_seed_violates_anything() {
    let tokenizer = tokenizer().unwrap();
    let totals = run_seeds(0..SEEDS, true, &tokenizer);
    let per_second = totals.seeds as f64 / totals.took.as_secs_f64();
    println!(
        "{} seeds, {per_second:.0} per second, {:?}",
        totals.seeds, totals.counts
    );
    if let Some(bad) = totals.first_bad {
        let again = run_seed(bad.seed, true, &tokenizer);
        let seed = bad.seed;
        panic!(
            "seed {seed} violates {:#?}\n{}\nrepeat it: cargo run -p tramontane-sim -- --seed {seed} --trace",
            bad.violations,
            again.trace.join("\n")
        );
    }
    assert_eq!(totals.seeds, SEEDS);
    // The runs did what they are for.
    let counts = totals.counts;
    assert!(
        counts.finished > SEEDS && counts.tokens > SEEDS * 10,
        "{counts:?}"
    );
    assert!(
        counts.replays > SEEDS / 10 && counts.stale > 0,
        "{counts:?}"
    );
    assert!(counts.updated > SEEDS / 20, "{counts:?}");
    assert!(
        counts.faults > SEEDS && counts.drops > SEEDS / 10,
        "{counts:?}"
    );
}

#[test]
fn a_seed_repeats_itself() {
    let tokenizer = tokenizer().unwrap();
    for seed in 0..40 {
        let one = run_seed(seed, true, &tokenizer);
        let other = std::thread::scope(|scope| {
            // Another thread: what a thread keeps for itself must not matter either.
            let run = scope.spawn(|| run_seed(seed, true, &tokenizer));
            run.join().unwrap()
        });
        assert_eq!(one.trace, other.trace, "seed {seed}");
        assert_eq!(
            (one.hash, one.counts),
            (other.hash, other.counts),
            "seed {seed}"
        );
        assert!(one.trace.len() > 20, "seed {seed}");
    }
}
