//! Tokens that the backend chooses are those that the engine would have sampled from the logits.

use super::*;

/// An engine around a toy; how many tokens that has chosen.
fn bench(
    attention: ToyAttention,
    config: EngineConfig,
    window: Option<usize>,
) -> (Bench, Arc<AtomicU32>) {
    let chosen = Arc::clone(&attention.chosen);
    let (attention, experts) = (Box::new(attention), Arc::new(ToyExperts));
    let bench = Bench::around(config, geometry(window), attention, experts);
    (bench, chosen)
}

/// One that computes whole steps and chooses tokens.
fn choosing(config: EngineConfig, window: Option<usize>) -> (Bench, Arc<AtomicU32>) {
    let attention = ToyAttention {
        whole_steps: Some(Arc::default()),
        ..ToyAttention::new(config.num_pages, window)
    };
    bench(attention, config, window)
}

/// All kinds of requests side by side: greedy ones, with and without a word on the prompt, those that draw from all tokens,
/// and those that need logits. Some prompts say the same again and again, so that guesses come true.
fn all_kinds() -> Vec<NewSequence> {
    let mut all = requests();
    for (i, new) in all.iter_mut().enumerate() {
        let params = &mut new.params;
        match i {
            0 => params.prompt_logprobs = Some(1),
            4 => (params.min_tokens, params.stop_ids) = (4, (3..20).collect()),
            8 => params.logit_bias = vec![(5, 3.0)],
            12 => params.bad_words = vec![vec![7], vec![8, 9]],
            // These draw from all tokens.
            1 | 9 => params.top_k = 0,
            7 | 15 => params.logprobs = None,
            _ => {}
        }
    }
    let repeats = (0..3).map(|i| {
        let said = [prompt(900 + i, 4), vec![POISON - 1]].concat().repeat(9);
        let params = SamplingParams {
            ignore_eos: true,
            ..greedy(30)
        };
        request(&format!("again-{i}"), said, params)
    });
    all.extend(repeats);
    all
}

#[test]
fn nobody_notices_who_chooses() {
    let all = all_kinds();
    for window in [None, Some(40)] {
        let expected: Vec<Heard> = all.iter().map(|new| alone(new, window)).collect();
        for (name, config) in variants() {
            let (mut bench, chosen) = choosing(config, window);
            bench.serve(&all, name != "together");
            for (new, expected) in all.iter().zip(&expected) {
                let got = bench.of(new);
                assert_eq!(got.said(), expected.said(), "{}, {name}", new.id);
                assert_eq!(got.prompt, expected.prompt, "{}, {name}", new.id);
            }
            let sampled = bench.engine.stats().tokens_sampled;
            let chosen = u64::from(chosen.load(Ordering::Relaxed));
            assert!(
                0 < chosen && chosen < sampled,
                "{name}: {chosen} of {sampled}"
            );
        }
    }
}

/// A model that can say two words: its last three tokens have always stood there before.
#[test]
fn tokens_are_chosen_for_guesses_too() {
    let guesses = EngineConfig {
        lookup_tokens: 8,
        ..config()
    };
    let bench = |is_whole: bool, config: EngineConfig| {
        let attention = ToyAttention {
            whole_steps: is_whole.then(Arc::default),
            has_two_words: true,
            ..ToyAttention::new(config.num_pages, None)
        };
        bench(attention, config, None)
    };
    for temperature in [0.0, 1.0] {
        let params = SamplingParams {
            temperature,
            ..greedy(300)
        };
        let new = request("a", prompt(3, 10), params);
        let (mut one_by_one, _) = bench(false, config());
        one_by_one.serve(std::slice::from_ref(&new), false);
        let (mut guessing, chosen) = bench(true, guesses.clone());
        guessing.serve(std::slice::from_ref(&new), false);
        assert_eq!(guessing.of(&new).said(), one_by_one.of(&new).said());
        let stats = guessing.engine.stats();
        assert!(stats.guesses_true > 20, "{stats:?}");
        assert!(stats.guesses_true < stats.tokens_guessed, "{stats:?}");
        // Every row of a guess, true or not.
        let rows = stats.tokens_guessed + stats.tokens_sampled - stats.guesses_true;
        assert_eq!(u64::from(chosen.load(Ordering::Relaxed)), rows);
    }
}

#[test]
fn logits_that_are_no_numbers_are_refused_alike() {
    let prefix_cache = EngineConfig {
        prefix_cache: true,
        ..config()
    };
    let bad = request("bad", [prompt(1, 127), vec![POISON]].concat(), greedy(5));
    let good = request("good", prompt(2, 70), greedy(5));
    let (mut bench, chosen) = choosing(prefix_cache, None);
    bench.serve(&[bad.clone(), good.clone()], false);
    assert_eq!(bench.of(&bad).failed, alone(&bad, None).failed);
    assert!(bench.of(&bad).failed.is_some());
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
    assert!(chosen.load(Ordering::Relaxed) > 0);
    // What gave such logits is not found by others.
    let next = request("next", [bad.prompt, vec![5]].concat(), greedy(5));
    bench.submit(&next);
    bench.run();
    assert_eq!(bench.of(&next).cached_tokens, Some(0));
}
