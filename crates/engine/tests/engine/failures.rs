//! Steps that are not computed are tried again or handed back, and go on elsewhere.

use super::*;

#[test]
fn a_step_that_was_not_exchanged_is_simply_tried_again() {
    let all = requests();
    for prefix_cache in [false, true] {
        let mut bench = Bench::new(
            EngineConfig {
                prefix_cache,
                ..config()
            },
            Some(70),
        );
        for (i, new) in all.iter().enumerate() {
            bench.submit(new);
            bench.fail_in.store(1 + i as u32 % 2, Ordering::Relaxed);
            bench.step();
            bench.step();
        }
        bench.run();
        assert_eq!(bench.num_errors, all.len());
        for new in &all {
            assert_eq!(
                bench.of(new).said(),
                alone(new, Some(70)).said(),
                "{}",
                new.id
            );
        }
        assert_eq!(bench.engine.stats().steps_failed, all.len() as u64);
    }
}

#[test]
fn after_too_many_attempts_the_sequences_of_the_step_are_handed_back() {
    let mut bench = Bench::new(
        EngineConfig {
            max_running: 1,
            ..config()
        },
        None,
    );
    let (first, second) = (
        request("a", prompt(1, 9), greedy(5)),
        request("b", prompt(2, 9), greedy(5)),
    );
    bench.submit(&first);
    bench.submit(&second);
    for expected in [1, 2, 2] {
        bench.fail_in.store(2, Ordering::Relaxed);
        bench.step();
        assert_eq!(bench.num_errors, expected);
    }
    let (message, kind) = bench.of(&first).failed.clone().unwrap();
    assert_eq!(kind, FailureKind::Step);
    assert!(message.contains("layer 1"), "{message}");
    bench.run();
    assert_eq!(bench.of(&second).said(), alone(&second, None).said());
}

#[test]
fn all_running_sequences_can_be_handed_back() {
    let mut bench = Bench::new(
        EngineConfig {
            max_running: 2,
            ..config()
        },
        None,
    );
    let all = requests();
    for new in &all[..3] {
        bench.submit(new);
    }
    bench.step();
    let mut events = Vec::new();
    bench.engine.fail_running("device lost", &mut events);
    bench.hear(events);
    for new in &all[..2] {
        let lost = ("device lost".to_owned(), FailureKind::Step);
        assert_eq!(bench.of(new).failed, Some(lost));
    }
    bench.run();
    assert_eq!(bench.of(&all[2]).said(), alone(&all[2], None).said());
}

/// What [`requests`] leave out and a replay could get wrong.
fn requests_with_state() -> Vec<NewSequence> {
    let sampled = |seed| SamplingParams {
        temperature: 1.0,
        seed,
        max_tokens: 24,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    let table = [
        SamplingParams {
            presence_penalty: 1.5,
            ..sampled(1)
        },
        SamplingParams {
            frequency_penalty: -1.5,
            presence_penalty: -0.5,
            repetition_penalty: 0.8,
            ..sampled(2)
        },
        SamplingParams {
            logit_bias: vec![(5, 4.0), (6, -100.0), (7, 2.5)],
            logprobs: Some(2),
            ..sampled(3)
        },
        SamplingParams {
            stop_ids: (3..15).collect(),
            min_tokens: 9,
            ..sampled(4)
        },
        SamplingParams {
            repetition_penalty: 1.4,
            ..greedy(24)
        },
    ];
    let request = |(i, params): (usize, SamplingParams)| {
        request(&format!("s{i}"), prompt(i as u64, 60 + i), params)
    };
    table.into_iter().enumerate().map(request).collect()
}

#[test]
fn a_resumed_sequence_goes_on_where_it_was_lost() {
    for new in requests().into_iter().chain(requests_with_state()) {
        assert_resumes(&new);
    }
}
