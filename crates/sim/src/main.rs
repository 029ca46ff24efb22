//! Runs seeds of the simulation: `--seed N --trace` repeats one, `--seeds A..B` runs many.

use std::process::ExitCode;

use clap::Parser;
use tramontane_sim::{run_seed, run_seeds, tokenizer};

/// Deterministic simulation of a cluster.
#[derive(Debug, Parser)]
struct Args {
    /// Run this seed.
    #[arg(long)]
    seed: Option<u64>,
    /// Print what happens in it.
    #[arg(long, requires = "seed")]
    trace: bool,
    /// First of many seeds.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// How many.
    #[arg(long, default_value_t = 1000)]
    count: u64,
    /// Run them all, also after a violation.
    #[arg(long)]
    all: bool,
}

#[expect(clippy::print_stdout, reason = "the output of this program")]
fn main() -> Result<ExitCode, tramontane_tokenizer::Error> {
    let args = Args::parse();
    let tokenizer = tokenizer()?;
    let bad = if let Some(seed) = args.seed {
        let outcome = run_seed(seed, args.trace, &tokenizer);
        outcome.trace.iter().for_each(|line| println!("{line}"));
        println!(
            "seed {seed} hash {:016x} {:?}",
            outcome.hash, outcome.counts
        );
        Some(outcome).filter(|outcome| !outcome.violations.is_empty())
    } else {
        let totals = run_seeds(args.from..args.from + args.count, !args.all, &tokenizer);
        let per_second = totals.seeds as f64 / totals.took.as_secs_f64();
        println!(
            "{} seeds, {per_second:.0} per second, {:?}",
            totals.seeds, totals.took
        );
        println!("virtual time {:?}, {:?}", totals.lasted, totals.counts);
        totals.first_bad
    };
    let Some(bad) = bad else {
        return Ok(ExitCode::SUCCESS);
    };
    println!("seed {} violates:", bad.seed);
    bad.violations
        .iter()
        .for_each(|violation| println!("  {violation}"));
    Ok(ExitCode::FAILURE)
}
