//! Pages are found again, given up and used to the last one.

use super::*;

#[test]
fn nobody_notices_preemption() {
    let long = |i: u64| {
        let params = SamplingParams {
            seed: i,
            ignore_eos: true,
            max_tokens: 200,
            frequency_penalty: 0.1,
            ..SamplingParams::default()
        };
        request(&format!("long{i}"), prompt(i, 20 + i as usize), params)
    };
    let all: Vec<_> = (0..5).map(long).collect();
    for (window, prefix_cache) in [(None, false), (None, true), (Some(120), true)] {
        let limits = EngineConfig {
            num_pages: 6,
            prefix_cache,
            ..config()
        };
        let mut bench = Bench::new(limits, window);
        bench.serve(&all, false);
        for new in &all {
            assert_eq!(
                bench.of(new).said(),
                alone(new, window).said(),
                "{}",
                new.id
            );
        }
        let stats = bench.engine.stats();
        assert!(stats.preemptions > 0, "window {window:?}: {stats:?}");
        assert!(
            stats.rows > all.len() as u64 * 200,
            "what was preempted is computed again"
        );
        assert_eq!((stats.tokens_sampled, stats.prompt_tokens), (1000, 110));
    }
}

/// CVE-2025-46570: the prefixes of other tenants are found by how fast an answer begins.
#[test]
fn a_prompt_is_found_again_but_for_its_last_token_and_not_under_another_salt() {
    let mut bench = Bench::new(
        EngineConfig {
            prefix_cache: true,
            ..config()
        },
        None,
    );
    let first = request("first", prompt(1, 192), greedy(5));
    let again = NewSequence {
        id: RequestId::new("again"),
        ..first.clone()
    };
    let longer = request(
        "longer",
        [&first.prompt[..], &[7, 8, 9]].concat(),
        greedy(5),
    );
    let stranger = NewSequence {
        id: RequestId::new("stranger"),
        cache_salt: 1,
        ..first.clone()
    };
    for new in [&first, &again, &longer, &stranger] {
        bench.submit(new);
        bench.run();
    }
    let cached = |new| bench.of(new).cached_tokens.unwrap();
    assert_eq!(
        [&first, &again, &longer, &stranger].map(cached),
        [0, 128, 192, 0]
    );
    assert_eq!(bench.of(&again).finished.unwrap().1.cached_tokens, 128);
    assert_eq!(bench.of(&again).tokens, bench.of(&first).tokens);
    assert_eq!(bench.of(&stranger).tokens, bench.of(&first).tokens);
    let stats = bench.engine.stats();
    assert_eq!(
        (stats.prefix_query_tokens, stats.prefix_hit_tokens),
        (192 * 3 + 195, 320)
    );
    assert!(stats.pages_cached > 0);
}

#[test]
fn a_sequence_may_use_the_whole_cache_and_ends_where_it_is_full() {
    let endless = SamplingParams {
        ignore_eos: true,
        ..greedy(100_000)
    };
    let config = EngineConfig {
        num_pages: 2,
        prefix_cache: false,
        ..config()
    };
    let first = request("a", prompt(1, 100), endless.clone());
    let expected = by_hand(&first.prompt, 28, None);
    let mut bench = Bench::new(config.clone(), None);
    bench.submit(&first);
    bench.run();
    let stats = bench.engine.stats();
    assert_eq!((stats.preemptions, stats.pages_free), (0, 2));
    assert_eq!(bench.of(&first).ids(), expected);
    assert_eq!(
        bench.of(&first).finished.unwrap().0,
        FinishReason::Length,
        "100 + 28 tokens fill both pages"
    );
    // Rivals for the whole cache: each comes to the same end, one after the other.
    let requests = [
        first,
        request("b", prompt(2, 60), endless.clone()),
        request("c", prompt(3, 127), endless.clone()),
    ];
    let mut bench = Bench::new(config, None);
    for new in &requests {
        bench.submit(new);
    }
    bench.run();
    for new in &requests {
        let room = 2 * KV_PAGE_TOKENS - new.prompt.len();
        let heard = bench.of(new);
        assert_eq!(heard.ids(), by_hand(&new.prompt, room, None), "{}", new.id);
        assert_eq!(heard.finished.unwrap().0, FinishReason::Length);
    }
    // What a window leaves behind is no limit.
    let windowed = EngineConfig {
        num_pages: 2,
        ..self::config()
    };
    let mut bench = Bench::new(windowed, Some(64));
    let long = request("d", prompt(4, 1000), endless);
    bench.submit(&long);
    bench.run();
    assert_eq!(bench.of(&long).tokens.len(), 24, "the model's context");
}
