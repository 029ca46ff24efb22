//! Sequences whose output is a word of a grammar: the same tokens however they are run, and none but allowed ones.

use std::sync::{Arc, LazyLock, RwLock};
use std::time::{Duration, Instant};

use tramontane_engine::masks::MASK_STEP_WAIT_MAX;
use tramontane_engine::{EngineConfig, FailureKind, NewSequence, SubmitError};
use tramontane_grammar::{GrammarError, Grammars, Matcher, Token, Vocabulary};
use tramontane_types::{Constraint, FinishReason, SamplingParams, TokenId};

use super::{
    Bench, EOS, alone, assert_resumes, config, greedy, prompt, request, requests, variants,
};

/// Texts of the toy model's tokens from id 3 on.
const TEXTS: [&str; 44] = [
    "{", "}", "\"", ":", ",", "[", "]", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "-", ".",
    " ", "a", "b", "c", "d", "e", "f", "true", "false", "null", "{\"", "\":", "\",", "\"a", "ab",
    "12", "e\"", "\n", "[1", "l", "s", "t", "r", "u", "n",
];

/// Constraints over the toy model's tokens.
pub(crate) static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    let controls: [&[u8]; 3] = [b"<unk>", b"<s>", b"</s>"];
    let controls = controls.into_iter().map(Token::Control);
    let texts = TEXTS.iter().map(|text| Token::Text(text.as_bytes()));
    Grammars::new(Vocabulary::new(controls.chain(texts), &[EOS]).unwrap())
});

/// The place of a sequence behind its resumed tokens.
pub(crate) fn matcher(new: &NewSequence) -> Result<Matcher, GrammarError> {
    let constraint = new.params.constraint.as_ref().unwrap();
    let num_prompt = new.prompt.len() - new.num_resumed;
    GRAMMARS.blocking_matcher(constraint, &new.prompt[num_prompt..])
}

fn text(ids: &[TokenId]) -> String {
    let texts = ids
        .iter()
        .filter_map(|&id| TEXTS.get((id as usize).checked_sub(3)?));
    texts.copied().collect()
}

fn regex(text: &str) -> Option<Arc<Constraint>> {
    Some(Arc::new(Constraint::Regex(text.into())))
}

fn schema() -> Option<Arc<Constraint>> {
    let schema = r#"{
        "type": "object",
        "properties": {
            "a": { "type": "integer", "minimum": 0, "maximum": 99 },
            "ab": { "enum": ["a", "b", "fade"] },
            "e": { "type": "array", "items": { "type": "boolean" }, "minItems": 1, "maxItems": 3 }
        },
        "required": ["a", "ab", "e"],
        "additionalProperties": false
    }"#;
    Some(Arc::new(Constraint::JsonSchema(schema.into())))
}

/// The requests of other tests, each in a grammar; sampled ones as a client's `n` would have them.
fn constrained() -> Vec<NewSequence> {
    let with_grammar = |(i, mut new): (usize, NewSequence)| {
        new.params.max_tokens = 120;
        new.params.constraint = match i % 4 {
            0 | 1 => schema(),
            2 => regex("(ab|cd|e){4,20}f"),
            _ => Some(Arc::new(Constraint::JsonObject)),
        };
        new
    };
    requests()
        .into_iter()
        .enumerate()
        .map(with_grammar)
        .collect()
}

#[test]
fn nobody_notices_batches_chunks_or_caches() {
    let all = constrained();
    let expected: Vec<_> = all.iter().map(|new| alone(new, None)).collect();
    for (name, config) in &variants() {
        let mut bench = Bench::new(config.clone(), None);
        bench.serve(&all, *name != "together");
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(bench.of(new).said(), expected.said(), "{}, {name}", new.id);
        }
        let stats = bench.engine.stats();
        assert!(stats.masks > 0, "{stats:?}");
    }
}

#[test]
fn nobody_notices_guesses() {
    // Two words, of which the grammar allows any number: the last tokens have always stood there before.
    let mut all = requests();
    for new in &mut all {
        new.params.logit_bias = vec![(5, 90.0), (6, 90.0)];
        (new.params.top_k, new.params.max_tokens) = (2, 40);
        (new.params.repetition_penalty, new.params.frequency_penalty) = (1.0, 0.0);
        new.params.constraint = regex("[\":]*");
    }
    let expected: Vec<_> = all.iter().map(|new| alone(new, None)).collect();
    let mut num_true = 0;
    for (name, config) in variants() {
        let limits = EngineConfig {
            lookup_tokens: 8,
            ..config
        };
        let mut bench = Bench::new(limits, None);
        bench.serve(&all, true);
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(bench.of(new).said(), expected.said(), "{}, {name}", new.id);
        }
        num_true += bench.engine.stats().guesses_true;
    }
    assert!(num_true > 0);
}

/// An engine that gives up no mask, however slow the machine is.
fn patient(mut config: EngineConfig) -> Bench {
    config.masks.find_max = Duration::from_secs(600);
    config.masks.queue_wait_max = Duration::from_secs(600);
    Bench::new(config, None)
}

/// A gate for the masks behind some tokens, closed for as long as the guard lives.
fn gate(
    bench: &Bench,
    is_slow: impl Fn(TokenId) -> bool + Send + Sync + 'static,
) -> Arc<RwLock<()>> {
    let gate = Arc::new(RwLock::new(()));
    let seen = Arc::clone(&gate);
    let before = move |id| {
        if is_slow(id) {
            drop(seen.read().unwrap());
        }
    };
    bench.engine.before_each_mask(Box::new(before));
    gate
}

#[test]
fn nobody_waits_for_a_mask_that_is_late() {
    let params = SamplingParams {
        constraint: regex("(ab|cd|e){4,20}f"),
        ..greedy(60)
    };
    let slow = request("slow", prompt(1, 5), params);
    let others = requests();
    let mut bench = patient(config());
    let gate = gate(&bench, |_| true);
    let closed = gate.write().unwrap();
    bench.submit(&slow);
    // The mask of its first token was known, that of the second is awaited for a moment.
    bench.step();
    bench.step();
    for _ in 0..3 {
        let mut events = Vec::new();
        let report = bench.engine.step(&mut events).unwrap();
        assert_eq!((report.num_rows, events.len()), (0, 0));
    }
    assert_eq!(bench.of(&slow).tokens.len(), 1);
    for new in &others {
        bench.submit(new);
    }
    bench.run_until(|bench| others.iter().all(|new| bench.has_ended(new)));
    for new in &others {
        assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
    }
    assert_eq!(bench.of(&slow).tokens.len(), 1);
    assert_eq!(bench.engine.stats().masks_late, 1);
    drop(closed);
    bench.run();
    assert_eq!(bench.of(&slow).said(), alone(&slow, None).said());
}

#[test]
fn nobody_notices_which_masks_are_late() {
    let all = constrained();
    let expected: Vec<_> = all.iter().map(|new| alone(new, None)).collect();
    for (name, config) in variants() {
        let mut bench = patient(config);
        // Longer than any step waits.
        let delay = 2 * MASK_STEP_WAIT_MAX;
        let before = move |id: TokenId| {
            let begun = Instant::now();
            while id.is_multiple_of(11) && begun.elapsed() < delay {
                std::thread::yield_now();
            }
        };
        bench.engine.before_each_mask(Box::new(before));
        bench.serve(&all, false);
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(bench.of(new).said(), expected.said(), "{}, {name}", new.id);
        }
        assert!(bench.engine.stats().masks_late > 0, "{name}");
    }
}

#[test]
fn a_mask_that_takes_too_long_fails_its_sequence_and_its_thread_is_replaced() {
    let mut limits = config();
    limits.masks.relief_after = Duration::from_millis(50);
    limits.masks.find_max = Duration::from_secs(2);
    let mut bench = Bench::new(limits, None);
    // One token says only the slow ones, and their masks are never found.
    let l = 3 + TEXTS.iter().position(|text| *text == "l").unwrap() as TokenId;
    let gate = gate(&bench, move |id| id == l);
    let closed = gate.write().unwrap();
    let in_grammar = |name: &str, text| {
        let params = SamplingParams {
            constraint: regex(text),
            ..greedy(40)
        };
        request(name, prompt(1, 9), params)
    };
    let slow = ["s0", "s1", "s2", "s3"].map(|name| in_grammar(name, "l{9}"));
    let good = in_grammar("good", "(ab|cd|e){4,20}f");
    for new in slow[..2].iter().chain([&good]) {
        bench.submit(new);
    }
    // Both threads are taken, and yet the masks of others are found.
    bench.run_until(|bench| bench.has_ended(&good));
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
    bench.run();
    for new in &slow[..2] {
        let (message, kind) = bench.of(new).failed.clone().unwrap();
        assert_eq!(kind, FailureKind::Constraint, "{message}");
        assert!(message.contains("not found within 2000 ms"), "{message}");
        assert_eq!(bench.of(new).tokens.len(), 1);
    }
    // The threads that took their places are taken too: nobody else is let in, until they are done.
    for new in &slow[2..] {
        bench.submit(new);
    }
    let mut refused = None;
    bench.run_until(|bench| {
        refused = bench.submits(&good).err();
        bench.engine.abort(&good.id);
        refused.is_some()
    });
    let refused = refused.unwrap();
    assert!(matches!(refused, SubmitError::MasksSlow { .. }) && refused.is_retryable());
    drop(closed);
    bench.heard.clear();
    bench.run_until(|bench| bench.submits(&good).is_ok());
    bench.run_until(|bench| bench.has_ended(&good));
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
}

#[test]
fn a_text_that_waits_to_know_whether_it_is_whole_holds_no_pages() {
    let params = SamplingParams {
        constraint: regex("elst"),
        ..greedy(4)
    };
    for abort in [false, true] {
        let new = request("a", prompt(1, 5), params.clone());
        let mut bench = patient(config());
        let t = 3 + TEXTS.iter().position(|text| *text == "t").unwrap() as TokenId;
        let gate = gate(&bench, move |id| id == t);
        let closed = gate.write().unwrap();
        bench.submit(&new);
        bench.run_until(|bench| {
            bench
                .heard
                .get(&new.id)
                .is_some_and(|h| h.tokens.len() == 4)
        });
        bench.step();
        let stats = bench.engine.stats();
        assert_eq!(stats.pages_free, stats.pages_total);
        assert!(bench.engine.has_work() && !bench.has_ended(&new));
        if abort {
            assert!(bench.engine.abort(&new.id));
            assert!(!bench.engine.has_work());
            continue;
        }
        drop(closed);
        bench.run();
        assert_eq!(bench.of(&new).finished.unwrap().0, FinishReason::Stop);
    }
}

#[test]
fn nobody_notices_preemption() {
    let long = |i: u64| {
        let params = SamplingParams {
            seed: i,
            ignore_eos: true,
            max_tokens: 200,
            constraint: regex("((ab|cd){2}e*)*"),
            ..SamplingParams::default()
        };
        request(&format!("long{i}"), prompt(i, 20 + i as usize), params)
    };
    let all: Vec<_> = (0..5).map(long).collect();
    let limits = EngineConfig {
        num_pages: 6,
        ..config()
    };
    let mut bench = Bench::new(limits, None);
    bench.serve(&all, false);
    for new in &all {
        assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
    }
    assert!(bench.engine.stats().preemptions > 0);
}

#[test]
fn what_is_said_is_a_word_of_the_grammar() {
    let mut num_whole = 0;
    for new in constrained() {
        let heard = alone(&new, None);
        let (reason, usage) = heard.finished.unwrap();
        let said = text(&heard.ids());
        assert_eq!(usage.completion_tokens as usize, heard.tokens.len());
        if reason == FinishReason::Length {
            assert_eq!(heard.tokens.len(), 120);
            continue;
        }
        num_whole += 1;
        match new.params.constraint.as_deref().unwrap() {
            Constraint::Regex(_) => assert!(said.ends_with('f') && said.len() > 4, "{said}"),
            _ => match serde_json::from_str::<serde_json::Value>(&said) {
                Ok(value) => assert!(value.is_object()),
                // JSON has no largest number, this parser has.
                Err(error) => assert!(error.to_string().contains("out of range"), "{said}"),
            },
        }
    }
    assert!(num_whole >= 10, "{num_whole}");
}

#[test]
fn a_resumed_sequence_goes_on_where_it_was_lost() {
    for new in constrained() {
        assert_resumes(&new);
    }
}

#[test]
fn it_ends_where_nothing_may_follow_or_the_model_says_so() {
    let of = |constraint, params: SamplingParams| SamplingParams {
        constraint,
        ..params
    };
    // Nothing follows: no token is spent on saying so, whatever else is asked for.
    for (min_tokens, ignore_eos) in [(0, false), (9, false), (0, true)] {
        let params = SamplingParams {
            min_tokens,
            ignore_eos,
            ..greedy(40)
        };
        let heard = alone(&request("a", prompt(1, 5), of(regex("abc"), params)), None);
        assert_eq!(text(&heard.ids()), "abc");
        assert_eq!(heard.finished.unwrap().0, FinishReason::Stop);
    }
    // Something may follow: the model ends it by its own token.
    let ends = SamplingParams {
        logit_bias: vec![(EOS, 100.0)],
        ..greedy(40)
    };
    let heard = alone(
        &request("a", prompt(1, 5), of(regex("ab(c|d)*"), ends.clone())),
        None,
    );
    assert_eq!(
        (text(&heard.ids()), heard.ids().last()),
        ("ab".to_owned(), Some(&EOS))
    );
    // Not before its least tokens, and never when it is ignored.
    let later = SamplingParams {
        min_tokens: 6,
        ..ends.clone()
    };
    let heard = alone(
        &request("a", prompt(1, 5), of(regex("ab(c|d)*"), later)),
        None,
    );
    assert!(heard.tokens.len() >= 7 && heard.ids().last() == Some(&EOS));
    let never = SamplingParams {
        ignore_eos: true,
        ..ends
    };
    let heard = alone(
        &request("a", prompt(1, 5), of(regex("ab(c|d)*"), never)),
        None,
    );
    assert_eq!(heard.finished.unwrap().0, FinishReason::Length);
    assert!(!text(&heard.ids()).contains(|c| !"abcd".contains(c)));
    // A stop id ends it in the middle of a word.
    let stop_ids = vec![3 + 22];
    let params = SamplingParams {
        stop_ids,
        ..greedy(40)
    };
    let heard = alone(&request("a", prompt(1, 5), of(regex("abcd"), params)), None);
    assert_eq!(text(&heard.ids()), "abc");
}

#[test]
fn a_text_that_is_whole_with_its_last_token_stops_and_one_that_could_go_on_is_cut() {
    let of = |constraint, max_tokens| {
        let params = SamplingParams {
            constraint,
            ..greedy(max_tokens)
        };
        request("a", prompt(1, 5), params)
    };
    let whole = alone(&of(regex("[0-9]{4}"), 40), None);
    assert_eq!(whole.finished.unwrap().0, FinishReason::Stop);
    let num_tokens = whole.tokens.len() as u32;
    let exact = alone(&of(regex("[0-9]{4}"), num_tokens), None);
    assert_eq!(exact.said(), whole.said());
    let reason = |constraint, max_tokens| {
        let heard = alone(&of(constraint, max_tokens), None);
        assert_eq!(heard.tokens.len() as u32, max_tokens);
        heard.finished.unwrap().0
    };
    assert_eq!(
        reason(regex("[0-9]{4}"), num_tokens - 1),
        FinishReason::Length
    );
    assert_eq!(reason(regex("[0-9]{9}"), num_tokens), FinishReason::Length);
    // Also on the worker that is only asked how it ended, and where the pages are full.
    let mut resumed = of(regex("[0-9]{4}"), num_tokens);
    resumed.prompt.extend(whole.ids());
    resumed.num_resumed = whole.tokens.len();
    let ended = alone(&resumed, None);
    assert_eq!(ended.finished, whole.finished);
    assert_eq!(ended.tokens.len(), 0);
    let limits = EngineConfig {
        num_pages: 1,
        ..config()
    };
    let mut bench = Bench::new(limits, None);
    // Four tokens, whoever writes them, and the last of the page.
    let mut last = of(regex("elst"), 40);
    last.prompt = prompt(1, 60);
    bench.submit(&last);
    bench.run();
    let heard = bench.of(&last);
    let (reason, usage) = heard.finished.unwrap();
    assert_eq!((reason, usage.completion_tokens), (FinishReason::Stop, 4));
}

#[test]
fn bias_does_not_open_what_the_grammar_closes_and_log_probabilities_are_raw() {
    let params = SamplingParams {
        logit_bias: (0..40)
            .map(|id| (id, if id == 30 { 100.0 } else { -100.0 }))
            .collect(),
        logprobs: Some(3),
        constraint: regex("abc"),
        ..greedy(9)
    };
    let heard = alone(&request("a", prompt(1, 5), params.clone()), None);
    assert_eq!(text(&heard.ids()), "abc");
    let free = SamplingParams {
        constraint: None,
        ..params
    };
    let free = alone(&request("a", prompt(1, 5), free), None);
    assert_eq!(heard.tokens[0].top_logprobs, free.tokens[0].top_logprobs);
}

#[test]
fn a_grammar_without_a_next_token_fails_its_sequence_alone() {
    // No token has a Z.
    let dead = SamplingParams {
        constraint: regex("abZ"),
        ..greedy(9)
    };
    let (dead, good) = (request("dead", prompt(1, 5), dead), constrained().remove(0));
    let mut bench = Bench::new(config(), None);
    bench.submit(&dead);
    bench.submit(&good);
    bench.run();
    assert_eq!(text(&bench.of(&dead).ids()), "ab");
    let (message, kind) = bench.of(&dead).failed.clone().unwrap();
    assert!(
        message.contains("no token of the vocabulary goes on"),
        "{message}"
    );
    assert_eq!(kind, FailureKind::Constraint);
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
}

#[test]
fn parameters_that_leave_no_token_of_the_grammar_are_its_fault_and_cost_no_cached_page() {
    let limits = EngineConfig {
        prefix_cache: true,
        ..config()
    };
    let mut bench = Bench::new(limits, None);
    let first = request("first", prompt(1, 194), greedy(4));
    // Only the end of the text may follow its begin, and that is ignored.
    let closed = SamplingParams {
        constraint: regex("()"),
        ignore_eos: true,
        ..greedy(9)
    };
    let closed = request("closed", first.prompt.clone(), closed);
    let later = NewSequence {
        params: SamplingParams {
            constraint: regex("()"),
            min_tokens: 1,
            ..greedy(9)
        },
        ..request("later", first.prompt.clone(), greedy(9))
    };
    let again = request("again", first.prompt.clone(), greedy(4));
    for new in [&first, &closed, &later, &again] {
        bench.submit(new);
        bench.run();
    }
    for new in [&closed, &later] {
        let (message, kind) = bench.of(new).failed.clone().unwrap();
        assert_eq!(kind, FailureKind::Constraint, "{message}");
        assert!(message.contains("no token is left"), "{message}");
    }
    assert_eq!(bench.of(&again).cached_tokens, Some(192));
}

/// How large the state of a sequence is behind each of its tokens.
fn sizes(new: &NewSequence) -> Vec<usize> {
    let mut matcher = matcher(new).unwrap();
    let size_behind = |id| {
        matcher.accept(id).unwrap();
        matcher.allowed().unwrap();
        matcher.num_bytes()
    };
    alone(new, None)
        .ids()
        .into_iter()
        .map(size_behind)
        .collect()
}

#[test]
fn where_grammars_grow_too_large_the_largest_fails_and_the_others_go_on() {
    let array = r#"{ "type": "array", "items": { "enum": [1, 2] }, "minItems": 10000 }"#;
    let constraint = Some(Arc::new(Constraint::JsonSchema(array.into())));
    let of = |name, max_tokens| {
        let params = SamplingParams {
            constraint: constraint.clone(),
            ..greedy(max_tokens)
        };
        request(name, prompt(1, 5), params)
    };
    let (large, small) = (of("large", 300), of("small", 100));
    let (sizes_of_large, sizes_of_small) = (sizes(&large), sizes(&small));
    assert!(
        sizes_of_large[249] > sizes_of_small[99],
        "{sizes_of_large:?}"
    );
    // Both together have this when one has said 250 tokens and the other 50.
    let mut limits = config();
    limits.masks.bytes_max = sizes_of_large[249] + sizes_of_small[49];
    let mut bench = Bench::new(limits, None);
    bench.submit(&large);
    bench.run_until(|bench| {
        bench
            .heard
            .get(&large.id)
            .is_some_and(|h| h.tokens.len() == 200)
    });
    bench.submit(&small);
    bench.run();
    let (message, kind) = bench.of(&large).failed.clone().unwrap();
    assert_eq!(kind, FailureKind::Full, "{message}");
    assert_eq!(bench.of(&small).said(), alone(&small, None).said());
}

#[test]
fn a_matcher_takes_room_from_when_it_is_made_until_it_is_dropped() {
    let new = constrained().remove(0);
    let mut limits = config();
    limits.masks.bytes_max = matcher(&new).unwrap().num_bytes();
    let room = Bench::new(limits, None).engine.matcher_room();
    let first = room.hold(matcher(&new).unwrap()).unwrap();
    let error = room.hold(matcher(&new).unwrap()).unwrap_err();
    assert!(error.is_retryable(), "{error}");
    drop(first);
    assert!(room.hold(matcher(&new).unwrap()).is_ok());
}

#[test]
fn an_aborted_sequence_leaves_its_mask_behind_and_the_others_go_on() {
    let all = constrained();
    let mut bench = Bench::new(
        EngineConfig {
            max_running: 8,
            ..config()
        },
        None,
    );
    for new in &all {
        bench.submit(new);
    }
    for new in all.iter().step_by(2) {
        bench.step();
        bench.engine.abort(&new.id);
    }
    bench.run();
    for new in all.iter().skip(1).step_by(2) {
        assert_eq!(bench.of(new).said(), alone(new, None).said(), "{}", new.id);
    }
}

#[test]
fn what_nobody_has_compiled_or_does_not_belong_to_its_grammar_is_refused() {
    let mut bench = Bench::new(config(), None);
    let new = constrained().remove(2);
    assert_eq!(
        bench.engine.submit(new.clone()),
        Err(SubmitError::NoGrammar)
    );
    let mut resumed = NewSequence {
        num_resumed: 2,
        ..new
    };
    resumed.prompt.extend([3 + 20, 3 + 20]);
    let error = matcher(&resumed).unwrap_err();
    assert_eq!(error, GrammarError::Resumed { index: 1, id: 23 });
}

#[test]
fn a_resumed_sequence_that_is_whole_ends_without_a_step() {
    let params = SamplingParams {
        constraint: regex("ab"),
        ..greedy(9)
    };
    let mut new = request("a", prompt(1, 5), params);
    new.prompt.extend([3 + 20, 3 + 21]);
    new.num_resumed = 2;
    let mut bench = Bench::new(config(), None);
    bench.submit(&new);
    bench.run();
    let heard = bench.of(&new);
    assert_eq!(heard.finished.unwrap().0, FinishReason::Stop);
    assert_eq!(heard.tokens.len(), 0);
    assert_eq!(bench.engine.stats().steps, 0);
}
