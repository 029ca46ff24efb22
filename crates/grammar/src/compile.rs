//! From a constraint to a grammar: what llguidance is asked for, and in which words. Decides nothing about tokens.

use std::sync::Arc;

use llguidance::ParserFactory;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};
use toktrie::TokEnv;
use tramontane_types::Constraint;
use tramontane_types::constraint::CONSTRAINT_BYTES_MAX;

use crate::limits::{JSON_SPACE_MAX, PARSER_LIMITS};
use crate::{Grammar, GrammarError, Vocabulary, check, matcher};

/// Under this key llguidance reads how JSON is to be written. A client's own is put aside: it could ask for what is no
/// JSON.
const OPTIONS_KEY: &str = "x-guidance";

/// What compiles for one vocabulary. Walks all of it: some milliseconds of work.
pub(crate) fn factory(vocabulary: &Vocabulary) -> Result<ParserFactory, GrammarError> {
    let made = matcher::guarded(|| {
        let tokens: TokEnv = Arc::new(vocabulary.trie());
        ParserFactory::new_simple(&tokens)
    });
    let mut factory = made.map_err(GrammarError::Internal)?;
    factory.quiet();
    *factory.limits_mut() = PARSER_LIMITS;
    Ok(factory)
}

/// Checks what costs nothing to check.
pub(crate) fn precheck(constraint: &Constraint) -> Result<(), GrammarError> {
    let source = constraint.source();
    check::at_most("bytes", CONSTRAINT_BYTES_MAX, source.len())?;
    if *constraint != Constraint::JsonObject && source.trim().is_empty() {
        return Err(GrammarError::Empty);
    }
    Ok(())
}

/// Compiles, within the limits of llguidance and of [`check`].
pub(crate) fn compile(
    factory: &ParserFactory,
    constraint: &Constraint,
) -> Result<Grammar, GrammarError> {
    let grammar = grammar(constraint)?;
    let parser = matcher::guarded(|| factory.create_parser(grammar));
    let parser = parser.map_err(|text| GrammarError::invalid(&text))?;
    Grammar::new(parser, constraint.source().len())
}

fn grammar(constraint: &Constraint) -> Result<TopLevelGrammar, GrammarError> {
    match constraint {
        Constraint::JsonObject => Ok(of_schema(json!({ "type": "object" }))),
        Constraint::JsonSchema(text) => {
            let schema = serde_json::from_str(text).map_err(|error| {
                GrammarError::invalid(&format!("it is not valid JSON: {error}"))
            })?;
            check::schema(&schema)?;
            Ok(of_schema(schema))
        }
        Constraint::Regex(text) => {
            check::expression(text)?;
            Ok(TopLevelGrammar::from_regex(without_anchors(text)))
        }
        Constraint::Lark(text) => {
            check::lark(text)?;
            Ok(TopLevelGrammar::from_lark(text.to_string()))
        }
    }
}

/// JSON of this schema, with little white space.
fn of_schema(schema: Value) -> TopLevelGrammar {
    TopLevelGrammar::from_json_schema(spaced(schema))
}

/// The schema as grammars are to have it (`%json {...}`): little white space, and nothing a client says of how JSON is to
/// be written.
#[must_use]
pub fn spaced(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Bool(true) => json!({}),
        schema => schema,
    };
    if let Value::Object(map) = &mut schema {
        let space = format!(r"[\x20\x0A\x0D\x09]{{1,{JSON_SPACE_MAX}}}");
        map.insert(
            OPTIONS_KEY.to_owned(),
            json!({ "whitespace_pattern": space }),
        );
    }
    schema
}

/// The whole text must match anyway; llguidance knows no anchors.
fn without_anchors(expression: &str) -> &str {
    let rest = expression.strip_prefix('^').unwrap_or(expression);
    let Some(inner) = rest.strip_suffix('$') else {
        return rest;
    };
    let num_backslashes = inner.bytes().rev().take_while(|&b| b == b'\\').count();
    if num_backslashes % 2 == 0 {
        inner
    } else {
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn anchors_at_the_ends_are_taken_off_and_dollars_are_kept() {
        for (expression, expected) in [
            ("^a+$", "a+"),
            ("a+", "a+"),
            (r"^\$", r"\$"),
            (r"a\\$", r"a\\"),
            (r"a\\\$", r"a\\\$"),
        ] {
            assert_eq!(without_anchors(expression), expected);
        }
    }
}
