//! What is guessed changes no token and no page, and ends nothing too late.

use super::*;

/// Sixteen requests that can say two words: their last three tokens have always stood there before.
fn two_words() -> Vec<NewSequence> {
    let mut all = requests();
    for new in &mut all {
        new.params.logit_bias = vec![(5, 90.0), (6, 90.0)];
        (new.params.top_k, new.params.max_tokens) = (2, 40);
        (new.params.repetition_penalty, new.params.frequency_penalty) = (1.0, 0.0);
    }
    all
}

#[test]
fn nobody_notices_guesses() {
    let all = two_words();
    for window in [None, Some(40)] {
        let expected: Vec<Heard> = all.iter().map(|new| alone(new, window)).collect();
        for (name, config) in variants() {
            let config = EngineConfig {
                lookup_tokens: 8,
                ..config
            };
            let one_by_one = config.max_step_rows == 1;
            let mut bench = Bench::new(config, window);
            bench.serve(&all, true);
            for (new, expected) in all.iter().zip(&expected) {
                let got = bench.of(new);
                assert_eq!(got.said(), expected.said(), "{}, {name}", new.id);
            }
            let stats = bench.engine.stats();
            assert!(
                (stats.guesses_true > 20) != one_by_one,
                "{name}, window {window:?}: {stats:?}"
            );
            assert!(stats.guesses_true <= stats.tokens_guessed);
        }
    }
}

#[test]
fn pages_that_rejected_guesses_wrote_are_as_good_as_others() {
    let limits = EngineConfig {
        lookup_tokens: 8,
        prefix_cache: true,
        num_pages: 128,
        ..config()
    };
    let mut all = two_words();
    let mut bench = Bench::new(limits, None);
    for new in &mut all {
        new.params.max_tokens = 100;
    }
    bench.serve(&all, true);
    let stats = bench.engine.stats();
    assert!(stats.guesses_true < stats.tokens_guessed, "{stats:?}");
    // Prompt and output, of whose pages some begin in the output.
    let mut num_adopted = 0;
    for new in &all {
        let name = format!("again-{}", new.id);
        let whole = [&new.prompt[..], &bench.of(new).ids()].concat();
        let again = request(&name, whole, greedy(5));
        bench.submit(&again);
        bench.run();
        assert_eq!(
            bench.of(&again).said(),
            alone(&again, None).said(),
            "{name}"
        );
        let cached = bench.of(&again).cached_tokens.unwrap() as usize;
        num_adopted += usize::from(cached > new.prompt.len());
    }
    assert!(num_adopted >= 4, "{num_adopted}");
}

#[test]
fn a_sequence_that_guesses_ends_where_it_must() {
    let mut new = request("a", prompt(3, 60), greedy(50));
    new.params.logit_bias = vec![(5, 90.0), (6, 90.0)];
    let guesses = EngineConfig {
        lookup_tokens: 32,
        ..config()
    };
    let limits = EngineConfig {
        num_pages: 1,
        ..guesses.clone()
    };
    let mut bench = Bench::new(limits, None);
    bench.submit(&new);
    bench.run();
    let (reason, usage) = bench.of(&new).finished.unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 4));
    // A stop id ends it also in the midst of guesses that come true: the next of these five words is the best that may follow.
    let mut round = request("round", [5, 6, 7, 8, 9].repeat(11), greedy(50));
    round.params.logit_bias = vec![(5, 100.0), (6, 90.0), (7, 80.0)];
    round.params.bad_words = vec![vec![5, 5], vec![6, 5], vec![6, 6]];
    round.params.stop_ids = vec![7];
    let mut bench = Bench::new(guesses, None);
    bench.submit(&round);
    bench.run();
    let heard = bench.of(&round);
    assert_eq!(heard.ids(), [5, 6, 7]);
    assert_eq!(heard.said(), alone(&round, None).said());
    assert_eq!(heard.finished.unwrap().0, FinishReason::Stop);
    // All were guessed at once, with two words behind the stop id.
    let stats = bench.engine.stats();
    assert_eq!((stats.steps, stats.tokens_guessed), (1, 5));
    assert_eq!(stats.guesses_true, 2);
}
