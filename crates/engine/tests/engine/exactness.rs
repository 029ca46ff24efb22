//! What a sequence says depends on its request alone.

use proptest::prelude::*;

use super::*;

#[test]
fn the_tokens_are_those_of_the_model() {
    for window in [None, Some(50)] {
        for len in [1, 64, 150] {
            let params = SamplingParams {
                ignore_eos: true,
                ..greedy(30)
            };
            let new = request("a", prompt(9, len), params);
            let expected = by_hand(&new.prompt, 30, window);
            assert_eq!(
                alone(&new, window).ids(),
                expected,
                "window {window:?}, prompt of {len}"
            );
        }
    }
}

#[test]
fn nobody_notices_batches_chunks_or_caches() {
    let all = requests();
    for window in [None, Some(40), Some(64), Some(100)] {
        let expected: Vec<Heard> = all.iter().map(|new| alone(new, window)).collect();
        for (name, config) in &variants() {
            let mut bench = Bench::new(config.clone(), window);
            bench.serve(&all, *name != "together");
            for (new, expected) in all.iter().zip(&expected) {
                let got = bench.of(new);
                assert_eq!(
                    got.said(),
                    expected.said(),
                    "{}, {name}, window {window:?}",
                    new.id
                );
            }
            let stats = bench.engine.stats();
            if config.prefix_cache && config.num_pages > 7 {
                assert!(
                    stats.prefix_hit_tokens >= 128,
                    "{name} found nothing: {stats:?}"
                );
            }
        }
    }
}

#[test]
fn the_prompt_is_reported_as_if_it_had_been_sampled() {
    let params = SamplingParams {
        logprobs: Some(2),
        prompt_logprobs: Some(2),
        ..greedy(3)
    };
    let new = request("a", prompt(5, 150), params.clone());
    let whole = alone(&new, None);
    assert_eq!(whole.prompt.len(), 149);
    for (i, reported) in whole.prompt.iter().enumerate() {
        let position = i + 1;
        assert_eq!(
            (reported.index as usize, reported.id),
            (position, new.prompt[position])
        );
        // The model's own answer to the tokens before it.
        let mut cut = request("cut", new.prompt[..position].to_vec(), params.clone());
        cut.params.logit_bias = vec![(reported.id, 100.0)];
        let sampled = alone(&cut, None).tokens.swap_remove(0);
        assert_eq!(
            (sampled.id, sampled.logprob, sampled.top_logprobs),
            (reported.id, reported.logprob, reported.top_logprobs.clone()),
            "position {position}"
        );
    }
    // Cut, cached, preempted or resumed: each token of the prompt is told once.
    for (name, config) in variants() {
        let mut bench = Bench::new(config, None);
        let others: Vec<_> = (0..4)
            .map(|i| {
                let id = RequestId::new(&format!("b{i}"));
                NewSequence { id, ..new.clone() }
            })
            .collect();
        for other in &others {
            bench.submit(other);
        }
        bench.run();
        for other in &others {
            assert_eq!(bench.of(other).prompt, whole.prompt, "{name}");
            assert_eq!(bench.of(other).said(), whole.said(), "{name}");
        }
    }
    let mut resumed = new;
    resumed.prompt.push(whole.tokens[0].id);
    resumed.num_resumed = 1;
    let resumed = alone(&resumed, None);
    assert_eq!(resumed.prompt, whole.prompt);
    assert_eq!(resumed.tokens, whole.tokens[1..]);
}

#[test]
fn a_step_that_the_backend_computes_whole_is_the_same() {
    let all = requests();
    let config = config();
    let count = Arc::new(AtomicU32::new(0));
    let attention = ToyAttention {
        whole_steps: Some(Arc::clone(&count)),
        ..ToyAttention::new(config.num_pages, None)
    };
    let experts = Arc::new(ToyExperts);
    let mut bench = Bench::around(config, geometry(None), Box::new(attention), experts);
    // The next exchange would fail: there is none.
    bench.fail_in.store(1, Ordering::Relaxed);
    bench.serve(&all, false);
    assert_eq!(bench.num_errors, 0);
    assert!(count.load(Ordering::Relaxed) > 0);
    for new in &all {
        assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
    }
}

/// Something that happens to a running engine.
#[derive(Clone, Debug)]
enum Act {
    Submit(usize),
    Abort(usize),
    Step(usize),
    Fail(u32),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..16_usize).prop_map(Act::Submit),
        1 => (0..16_usize).prop_map(Act::Abort),
        4 => (1..12_usize).prop_map(Act::Step),
        1 => (1..3_u32).prop_map(Act::Fail),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_happens_the_tokens_are_the_same(
        acts in prop::collection::vec(act(), 1..60),
        limits in (1..6_usize, 1..80_usize, 1..70_usize, 6..20_usize, any::<bool>()),
        window in prop_oneof![Just(None), Just(Some(33)), Just(Some(128))],
    ) {
        let (max_running, max_step_rows, max_prefill_chunk, num_pages, prefix_cache) = limits;
        let limits = EngineConfig {
            max_running, max_step_rows, max_prefill_chunk, num_pages, prefix_cache,
            step_attempts_max: 1000, ..config()
        };
        let all = requests();
        let mut bench = Bench::new(limits, window);
        let mut submitted = BTreeSet::new();
        let mut aborted = BTreeSet::new();
        for act in acts {
            match act {
                Act::Submit(i) => {
                    if submitted.insert(i) {
                        bench.submit(&all[i]);
                    }
                }
                Act::Abort(i) => {
                    if bench.engine.abort(&all[i].id) {
                        aborted.insert(i);
                    }
                }
                Act::Step(n) => (0..n).for_each(|_| bench.step()),
                Act::Fail(n) => bench.fail_in.store(n, Ordering::Relaxed),
            }
        }
        bench.run();
        for &i in submitted.difference(&aborted) {
            let expected = alone(&all[i], window);
            prop_assert_eq!(bench.of(&all[i]).said(), expected.said(), "{}", i);
        }
        let stats = bench.engine.stats();
        prop_assert_eq!(stats.pages_free, stats.pages_total);
        prop_assert!(!bench.engine.has_work());
    }
}
