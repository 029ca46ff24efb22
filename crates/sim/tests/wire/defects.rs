//! Deliberate defects of the parts that speak gRPC are noticed, each within a number of seeds, and their seeds are
//! clean without them.

use tramontane_coordination::mutation as coordination;
use tramontane_exchange::mutation as exchange;

use super::{Run, calls, run_seed, sequences};

/// A defect that survives so many seeds is not noticed.
const SEEDS_MAX: u64 = 100;

#[test]
fn every_defect_of_the_wire_is_noticed() {
    let defects: [(&str, Run, fn()); 4] = [
        ("no pings", calls::run, || {
            exchange::turn_on(Some(exchange::Mutation::NoPings));
        }),
        ("an answer goes to the oldest call", calls::run, || {
            exchange::turn_on(Some(exchange::Mutation::AnyCallAnswered));
        }),
        ("a refused call keeps its credit", calls::run, || {
            exchange::turn_on(Some(exchange::Mutation::RefusalsKeepCredit));
        }),
        ("journal off by one", sequences::run, || {
            coordination::turn_on(Some(coordination::Mutation::JournalOffByOne));
        }),
    ];
    for (name, run, break_it) in defects {
        break_it();
        let bad = (0..SEEDS_MAX).find_map(|seed| {
            let outcome = run_seed(run, seed);
            let first = outcome.violations.into_iter().next()?;
            Some((seed, first))
        });
        exchange::turn_on(None);
        coordination::turn_on(None);
        let Some((seed, violation)) = bad else {
            panic!("{name}: not noticed within {SEEDS_MAX} seeds");
        };
        println!("{name}: noticed at seed {seed}: {violation}");
        assert_eq!(
            run_seed(run, seed).violations,
            Vec::<String>::new(),
            "{name}"
        );
    }
}
