//! gRPC under a simulated network: real tonic, HTTP/2 and keepalive over turmoil's connections, in virtual time,
//! with partitions, held messages, slow links and hosts that crash and come back. The seed decides all of it.
//!
//! `TRAMONTANE_WIRE_SEED=531 cargo test -p tramontane-sim --test wire -- --nocapture` repeats one seed and prints
//! what happens in it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests are not seen as tests by the lints"
)]

mod calls;
#[cfg(feature = "mutations")]
mod defects;
mod sequences;
mod sockets;
mod storm;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use tramontane_coordination::seed_this_thread;
use tramontane_sim::panics;

use self::storm::{Counts, Outcome};

/// Seeds of every test run, of each kind of run.
const SEEDS: u64 = 300;
/// Seeds of which it is checked that they repeat themselves.
const REPEATED: u64 = 20;
/// The variable that names the one seed to run.
const SEED: &str = "TRAMONTANE_WIRE_SEED";

type Run = fn(u64) -> Outcome;

/// A run with its chance taken from the seed, and its panics noticed.
fn run_seed(run: Run, seed: u64) -> Outcome {
    panics::watch();
    seed_this_thread(Some(seed));
    let before = panics::count();
    let mut outcome = run(seed);
    seed_this_thread(None);
    let panics = panics::count() - before;
    if panics > 0 {
        outcome.violations.push(format!("{panics} tasks panicked"));
    }
    outcome
}

/// Runs seeds on all cores until one violates something.
fn run_seeds(name: &str, run: Run) {
    let begin = Instant::now();
    let (next, bad) = (AtomicU64::new(0), Mutex::new(None));
    let (counts, faults) = (Mutex::new(Counts::default()), AtomicU64::new(0));
    let work = || {
        while bad.lock().is_none() {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= SEEDS {
                return;
            }
            let outcome = run_seed(run, seed);
            counts.lock().add(outcome.counts);
            faults.fetch_add(outcome.faults, Ordering::Relaxed);
            if !outcome.violations.is_empty() {
                bad.lock().get_or_insert((seed, outcome));
            }
        }
    };
    std::thread::scope(|scope| {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        (0..cores).for_each(|_| drop(scope.spawn(work)));
    });
    let (counts, faults) = (counts.into_inner(), faults.into_inner());
    println!(
        "{name}: {SEEDS} seeds, {faults} faults, {counts:?} in {:?}",
        begin.elapsed()
    );
    if let Some((seed, outcome)) = bad.into_inner() {
        show(name, seed, &outcome);
    }
    // The runs did what they are for.
    assert!(
        faults > SEEDS && counts.answered > counts.lost,
        "{counts:?}"
    );
    assert!(counts.lost + counts.replays > SEEDS, "{counts:?}");
}

fn show(name: &str, seed: u64, outcome: &Outcome) -> ! {
    panic!(
        "{name} seed {seed} violates {:#?}\n{}\nrepeat it: {SEED}={seed} cargo test -p tramontane-sim --test wire -- --nocapture",
        outcome.violations,
        outcome.trace()
    );
}

/// Runs the one seed that was asked for, or all of them.
fn test(name: &str, run: Run) {
    #[expect(clippy::disallowed_methods, reason = "a test has no configuration")]
    let asked = std::env::var(SEED);
    let Ok(asked) = asked else {
        return run_seeds(name, run);
    };
    let seed = asked
        .parse()
        .unwrap_or_else(|_| panic!("{SEED} is {asked:?}, expected a number"));
    let outcome = run_seed(run, seed);
    println!(
        "{name} seed {seed}: {:?}\n{}",
        outcome.counts,
        outcome.trace()
    );
    if !outcome.violations.is_empty() {
        show(name, seed, &outcome);
    }
}

fn repeats(run: Run) {
    for seed in 0..REPEATED {
        let one = run_seed(run, seed);
        // Another thread: what a thread keeps for itself must not matter either.
        let other = std::thread::scope(|scope| scope.spawn(|| run_seed(run, seed)).join().unwrap());
        let (one, other) = (one.repeated(), other.repeated());
        let differ = one.iter().zip(&other).position(|(a, b)| a != b);
        let at = differ.unwrap_or(one.len().min(other.len()));
        assert_eq!(one.get(at), other.get(at), "seed {seed} line {at}");
        assert!(one.len() > 20, "seed {seed}");
    }
}

#[test]
fn every_expert_call_has_one_outcome_and_no_credit_is_lost() {
    test("calls", calls::run);
}

#[test]
fn expert_calls_of_a_seed_repeat_themselves() {
    repeats(calls::run);
}

#[test]
fn every_request_over_grpc_ends_once_with_its_own_tokens() {
    test("sequences", sequences::run);
}

#[test]
fn requests_of_a_seed_repeat_themselves() {
    repeats(sequences::run);
}
