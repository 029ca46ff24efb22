//! What grammars allow.

use serde_json::{Value, json};
use tramontane_grammar::{MatchError, Next, TokenMask};
use tramontane_types::Constraint;

use super::{EOS, TOOL_CALLS, draw, grammars, json_schema, lark, regex, say, vocabulary};
use crate::Dice;

fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "maxLength": 8 },
            "age": { "type": "integer", "minimum": 0, "maximum": 150 },
            "tags": { "type": "array", "items": { "enum": ["a", "b", "é"] }, "maxItems": 3 },
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": false,
    })
}

#[test]
fn every_answer_is_json_of_its_schema() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let grammar = grammars.blocking_compile(&json_schema(&person())).unwrap();
    let mut num_whole = 0;
    for seed in 0..100 {
        let mut matcher = grammar.matcher(&[]).unwrap();
        let (_, text, is_whole) = say(&mut matcher, &vocabulary, seed, 400);
        if !is_whole {
            continue;
        }
        num_whole += 1;
        let value: Value = serde_json::from_slice(&text).unwrap();
        let map = value.as_object().unwrap();
        assert_eq!(map.len(), 3, "{value}");
        assert!(map["name"].as_str().unwrap().chars().count() <= 8);
        assert!(map["age"].as_u64().unwrap() <= 150);
        assert!(map["tags"].as_array().unwrap().len() <= 3);
    }
    assert!(num_whole > 90, "{num_whole}");
}

#[test]
fn any_object_is_json_and_white_space_comes_to_an_end() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let object = std::sync::Arc::new(Constraint::JsonObject);
    let mut matcher = grammars.blocking_matcher(&object, &[]).unwrap();
    matcher.accept(u32::from(b'{')).unwrap();
    let mut num_spaces = 0;
    while matches!(matcher.allowed().unwrap(), Next::OneOf(mask) if mask.allows(u32::from(b' '))) {
        matcher.accept(u32::from(b' ')).unwrap();
        num_spaces += 1;
    }
    assert_eq!(num_spaces, tramontane_grammar::limits::JSON_SPACE_MAX);
    for seed in 0..50 {
        let mut matcher = grammars.blocking_matcher(&object, &[]).unwrap();
        let (_, text, is_whole) = say(&mut matcher, &vocabulary, seed, 3000);
        // A number may be larger than what this parser takes.
        match serde_json::from_slice::<Value>(&text) {
            Ok(value) => assert!(value.is_object()),
            Err(error) => assert!(
                !is_whole || error.to_string().contains("out of range"),
                "{error}"
            ),
        }
    }
}

#[test]
fn a_regular_expression_matches_the_whole_text() {
    let vocabulary = vocabulary();
    for expression in ["^(ab|cd){2,3}$", "(ab|cd){2,3}"] {
        for seed in 0..20 {
            let mut matcher = grammars()
                .blocking_matcher(&regex(expression), &[])
                .unwrap();
            let (_, text, is_whole) = say(&mut matcher, &vocabulary, seed, 20);
            assert!(is_whole && matches!(text.len(), 4 | 6), "{text:?}");
            assert!(text.chunks(2).all(|two| two == b"ab" || two == b"cd"));
        }
    }
}

#[test]
fn the_end_is_only_allowed_where_a_word_ends() {
    let mut matcher = grammars().blocking_matcher(&regex("ab+"), &[]).unwrap();
    let ends = |mask: Next<'_>| matches!(mask, Next::OneOf(mask) if mask.allows(EOS));
    assert!(!ends(matcher.allowed().unwrap()) && !matcher.is_accepting());
    matcher.accept(u32::from(b'a')).unwrap();
    assert!(!ends(matcher.allowed().unwrap()) && !matcher.is_accepting());
    matcher.accept(u32::from(b'b')).unwrap();
    assert!(ends(matcher.allowed().unwrap()) && matcher.is_accepting());
    matcher.accept(EOS).unwrap();
    assert!(matcher.has_ended());
    // Where nothing can follow it has ended by itself.
    let mut short = grammars().blocking_matcher(&regex("ab"), &[]).unwrap();
    short.accept(u32::from(b'a')).unwrap();
    short.accept(u32::from(b'b')).unwrap();
    assert!(short.has_ended() && matches!(short.allowed().unwrap(), Next::Ended));
}

#[test]
fn a_grammar_may_name_control_tokens_and_nothing_else_lets_them_in() {
    for text in [
        r#"start: <TOOL_CALLS> %json { "type": "integer", "maximum": 9, "minimum": 0 }"#,
        r#"start: <[257]> %json { "type": "integer", "maximum": 9, "minimum": 0 }"#,
    ] {
        let mut matcher = grammars().blocking_matcher(&lark(text), &[]).unwrap();
        let Next::OneOf(mask) = matcher.allowed().unwrap() else {
            panic!("it has not begun");
        };
        assert!(mask.allows(TOOL_CALLS) && mask.num_allowed() == 1);
        matcher.accept(TOOL_CALLS).unwrap();
        matcher.accept(u32::from(b'7')).unwrap();
        assert!(matcher.has_ended());
    }
    let mut any = grammars().blocking_matcher(&regex("(.|\n)*"), &[]).unwrap();
    let Next::OneOf(mask) = any.allowed().unwrap() else {
        panic!("it has not begun");
    };
    assert!(!mask.allows(TOOL_CALLS) && mask.allows(EOS));
}

#[test]
fn what_may_come_next_depends_on_the_tokens_alone() {
    let (grammars, vocabulary) = (grammars(), vocabulary());
    let vocab = vocabulary.words().len();
    for constraint in [
        json_schema(&person()),
        regex("[a-z ]{3,30}(é|x)*"),
        json_schema(&json!(true)),
    ] {
        let grammar = grammars.blocking_compile(&constraint).unwrap();
        for seed in 0..8 {
            let (mut one, mut dice, mut tokens) =
                (grammar.matcher(&[]).unwrap(), Dice(seed), vec![]);
            for _ in 0..60 {
                let Some(id) = draw(&mut one, vocab, &mut dice) else {
                    break;
                };
                one.accept(id).unwrap();
                tokens.push(id);
                if tokens.len() % 7 != 3 {
                    continue;
                }
                // All at once, without a look at any mask in between.
                let mut again = grammar.matcher(&tokens).unwrap();
                let masks =
                    [one.allowed().unwrap(), again.allowed().unwrap()].map(|next| match next {
                        Next::OneOf(mask) => Some(mask.clone()),
                        Next::Ended => None,
                    });
                assert_eq!(masks[0], masks[1], "{constraint:?} after {tokens:?}");
            }
        }
    }
}

#[test]
fn a_token_that_is_not_allowed_is_an_error_then_and_later() {
    let grammar = grammars().blocking_compile(&regex("ab+")).unwrap();
    let mut matcher = grammar.matcher(&[]).unwrap();
    let error = MatchError::NotAllowed { id: 98 };
    assert_eq!(matcher.accept(98), Err(error.clone()));
    assert_eq!(matcher.accept(97), Err(error.clone()));
    assert_eq!(matcher.allowed().unwrap_err(), error);
    let resumed = grammar.matcher(&[97, 98, 97]).unwrap_err();
    assert_eq!(resumed.to_string(), "does not allow resumed token 2, id 97");
    assert!(grammar.matcher(&[97, 9999]).is_err());
}

#[test]
fn a_mask_takes_all_other_tokens_out() {
    let mut matcher = grammars().blocking_matcher(&regex("[ab]+"), &[]).unwrap();
    let mask: TokenMask = match matcher.allowed().unwrap() {
        Next::OneOf(mask) => mask.clone(),
        Next::Ended => panic!("it has not begun"),
    };
    // The model may have more logits than the tokenizer has tokens.
    let mut logits = vec![1.0; vocabulary().words().len() + 40];
    mask.apply(&mut logits);
    let left = |logits: &[f32]| logits.iter().filter(|logit| logit.is_finite()).count();
    assert_eq!(left(&logits), mask.num_allowed());
    for (id, logit) in logits.iter().enumerate() {
        assert_eq!(logit.is_finite(), mask.allows(id as u32), "{id}");
    }
    let mut few = vec![1.0; 98];
    mask.apply(&mut few);
    assert_eq!(left(&few), 1);
}

#[test]
fn a_matcher_that_is_given_up_ends_with_an_error() {
    let mut matcher = grammars().blocking_matcher(&regex("a+"), &[]).unwrap();
    matcher.canceller().cancel();
    assert_eq!(matcher.accept(97), Err(MatchError::Cancelled));
    let other = grammars().blocking_matcher(&regex("a+"), &[97]).unwrap();
    assert!(!other.has_ended(), "nobody else is");
}

#[test]
fn a_constraint_is_compiled_once_whoever_asks() {
    let grammars = grammars();
    let threads: Vec<_> = (0..8)
        .map(|_| {
            let grammars = grammars.clone();
            std::thread::spawn(move || {
                grammars.blocking_compile(&regex("[a-z]{1,9}")).unwrap();
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    grammars.blocking_compile(&regex("[a-z]{1,9}")).unwrap();
    let stats = grammars.stats();
    assert!(stats.cache_hits >= 1 && stats.cache_bytes > 0, "{stats:?}");
    assert_eq!(stats.refused, 0);
    // A refusal is remembered too.
    for _ in 0..2 {
        assert!(grammars.blocking_compile(&regex("(")).is_err());
    }
    assert_eq!(grammars.stats().refused, 2);
    assert!(grammars.stats().compiled <= stats.compiled + 1);
}
