//! Where sequences end, well or not, and what is not let in.

use super::*;

#[test]
fn an_aborted_sequence_is_gone_at_once_and_the_others_go_on() {
    let all = requests();
    let mut bench = Bench::new(
        EngineConfig {
            max_prefill_chunk: 16,
            ..config()
        },
        None,
    );
    let new = request("only", prompt(4, 300), greedy(9));
    bench.submit(&new);
    bench.step();
    assert!(bench.engine.stats().pages_free < 64);
    assert!(bench.engine.abort(&new.id), "while its prompt is computed");
    assert_eq!(bench.engine.stats().pages_free, 64);
    assert!(!bench.engine.has_work() && !bench.engine.abort(&new.id));
    for new in &all {
        bench.submit(new);
    }
    for i in [12, 3, 7] {
        bench.step();
        assert!(bench.engine.abort(&all[i].id));
    }
    bench.run();
    for (i, new) in all.iter().enumerate() {
        if ![3, 7, 12].contains(&i) {
            assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
        }
    }
}

#[test]
fn a_sequence_ends_where_its_request_says() {
    let free = SamplingParams {
        ignore_eos: true,
        ..greedy(40)
    };
    let new = request("a", prompt(5, 10), free.clone());
    let ids = alone(&new, None).ids();
    assert_eq!(ids.len(), 40);
    let ended = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = free.clone();
        change(&mut params);
        let heard = alone(&request("a", new.prompt.clone(), params), None);
        let (reason, usage) = heard.finished.unwrap();
        assert_eq!(usage.completion_tokens as usize, heard.tokens.len());
        assert_eq!(usage.prompt_tokens, 10);
        (heard.ids(), reason)
    };
    // The stop id itself is the last token that is reported.
    let stop = ids[6];
    let first = ids.iter().position(|&id| id == stop).unwrap();
    let until_stop = (ids[..=first].to_vec(), FinishReason::Stop);
    assert_eq!(ended(&|p| p.stop_ids = vec![stop]), until_stop);
    assert_eq!(
        ended(&|p| p.max_tokens = 3),
        (ids[..3].to_vec(), FinishReason::Length)
    );
    // The end of sequence ends it, unless ignored.
    let eos = |ignore_eos| {
        let eos_ids = vec![stop];
        let mut bench = Bench::new(
            EngineConfig {
                eos_ids,
                ..config()
            },
            None,
        );
        let params = SamplingParams {
            ignore_eos,
            ..free.clone()
        };
        bench.submit(&request("a", new.prompt.clone(), params));
        bench.run();
        let heard = bench.of(&new);
        (heard.ids(), heard.finished.unwrap().0)
    };
    assert_eq!(eos(false), until_stop);
    assert_eq!(eos(true), (ids, FinishReason::Length));
    // The model's context is full.
    let heard = alone(&request("b", prompt(5, 1020), free), None);
    assert_eq!(
        (heard.tokens.len(), heard.finished.unwrap().0),
        (4, FinishReason::Length)
    );
}

#[test]
fn what_can_never_run_is_refused_at_the_door() {
    let config = EngineConfig {
        num_pages: 2,
        max_waiting: 2,
        ..config()
    };
    let mut bench = Bench::new(config.clone(), None);
    let mut refused = |new: NewSequence| bench.engine.submit(new).unwrap_err();
    let good = request("good", prompt(1, 10), greedy(4));
    assert_eq!(
        refused(request("a", vec![], greedy(1))),
        SubmitError::EmptyPrompt
    );
    assert_eq!(
        refused(NewSequence {
            num_resumed: 10,
            ..good.clone()
        }),
        SubmitError::ResumedTooMany {
            num_resumed: 10,
            tokens: 10
        }
    );
    assert_eq!(
        refused(request("a", vec![48], greedy(1))),
        SubmitError::TokenOutOfRange { id: 48, vocab: 48 }
    );
    assert_eq!(
        refused(request("a", prompt(1, 1024), greedy(1))),
        SubmitError::TooLong {
            tokens: 1024,
            limit: 1023
        }
    );
    assert_eq!(
        refused(request("a", prompt(1, 128), greedy(1))),
        SubmitError::NeverFits { pages: 3, limit: 2 }
    );
    assert!(matches!(
        refused(request("a", vec![1], greedy(0))),
        SubmitError::InvalidSampling(_)
    ));
    bench.submit(&good);
    let duplicate = bench.engine.submit(good.clone()).unwrap_err();
    assert_eq!(duplicate, SubmitError::Duplicate { id: good.id });
    bench.submit(&request("b", prompt(1, 100), greedy(29)));
    let full = bench
        .engine
        .submit(request("c", vec![1], greedy(1)))
        .unwrap_err();
    assert!(full == SubmitError::QueueFull { limit: 2 } && full.is_retryable());
    bench.run();
    // A window needs its own pages only.
    Bench::new(config, Some(64)).submit(&request("a", prompt(1, 100), greedy(300)));
}

#[test]
fn logits_that_are_no_numbers_fail_their_sequence_alone_and_are_not_cached() {
    let mut bench = Bench::new(
        EngineConfig {
            prefix_cache: true,
            ..config()
        },
        None,
    );
    let bad = request("bad", [prompt(1, 127), vec![POISON]].concat(), greedy(5));
    let good = request("good", prompt(2, 70), greedy(5));
    bench.submit(&bad);
    bench.submit(&good);
    bench.run();
    let (message, kind) = bench.of(&bad).failed.clone().unwrap();
    assert_eq!(
        (message.as_str(), kind),
        (
            "the logit of token 3 is not a number or infinite",
            FailureKind::Sequence
        )
    );
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
    let next = request("next", [bad.prompt, vec![5]].concat(), greedy(5));
    bench.submit(&next);
    bench.run();
    assert_eq!(bench.of(&next).cached_tokens, Some(0));
}
