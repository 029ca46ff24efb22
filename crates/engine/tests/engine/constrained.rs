//! Sequences whose output is a word of a grammar: the same tokens however they are run, and none but allowed ones.

use std::sync::{Arc, LazyLock};

use tramontane_engine::{EngineConfig, NewSequence, SubmitError};
use tramontane_grammar::{GrammarError, Grammars, Matcher, Token, Vocabulary};
use tramontane_types::{Constraint, FinishReason, SamplingParams, TokenId};

use super::{Bench, EOS, alone, config, greedy, prompt, request, requests, variants};

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
        for new in &all {
            bench.submit(new);
            if *name != "together" {
                bench.step();
            }
        }
        bench.run();
        for (new, expected) in all.iter().zip(&expected) {
            assert_eq!(bench.of(new).said(), expected.said(), "{}, {name}", new.id);
        }
        let stats = bench.engine.stats();
        assert!(stats.masks > 0, "{stats:?}");
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
    for new in &all {
        bench.submit(new);
    }
    bench.run();
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
        let expected = alone(&new, None);
        for num_resumed in 0..=expected.tokens.len() {
            let mut resumed = NewSequence {
                num_resumed,
                ..new.clone()
            };
            resumed.prompt.extend(&expected.ids()[..num_resumed]);
            let got = alone(&resumed, None);
            assert_eq!(got.tokens, expected.tokens[num_resumed..], "{}", new.id);
            assert_eq!(got.finished, expected.finished, "{}", new.id);
        }
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
    let (message, retryable) = bench.of(&dead).failed.clone().unwrap();
    assert!(
        message.contains("no token of the vocabulary goes on"),
        "{message}"
    );
    assert!(!retryable);
    assert_eq!(bench.of(&good).said(), alone(&good, None).said());
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
