//! Looks at a constraint before llguidance does: sizes that its own limits do not bound. Never says whether a
//! constraint makes sense.

use serde_json::Value;

use crate::GrammarError;
use crate::limits::{
    NESTING_MAX, PATTERN_PROPERTIES_MAX, SCHEMA_COUNT_MAX, SCHEMA_DEPTH_MAX, SCHEMA_EXPANSION_MAX,
    SCHEMA_VALUES_MAX,
};

/// Keywords that a count bounds, each of which is written out so many times.
const COUNTS: [&str; 4] = ["minItems", "maxItems", "minProperties", "maxProperties"];
/// Keywords that hold alternatives.
const ALTERNATIVES: [&str; 2] = ["anyOf", "oneOf"];
/// Keywords that say nothing about values.
const ANNOTATIONS: [&str; 9] = [
    "$schema",
    "$id",
    "$defs",
    "definitions",
    "$comment",
    "title",
    "description",
    "default",
    "examples",
];
/// References that are followed, one behind the other, to count alternatives.
const REFERENCES_MAX: usize = 32;
/// Schemas that are looked at to count alternatives.
const VISITS_MAX: usize = 100_000;

/// Brackets within brackets. Those in strings of a grammar, and those behind a backslash, are none.
pub(crate) fn nesting(text: &str, has_strings: bool) -> Result<(), GrammarError> {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut is_escaped, mut in_string) = (false, false);
    for byte in text.bytes() {
        if is_escaped {
            is_escaped = false;
            continue;
        }
        match byte {
            b'\\' => is_escaped = true,
            b'"' if has_strings => in_string = !in_string,
            b'(' | b'[' | b'{' if !in_string => depth += 1,
            b')' | b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    at_most("brackets within brackets", NESTING_MAX, deepest)
}

/// The schemas inside of a grammar.
pub(crate) fn embedded(grammar: &str) -> Result<(), GrammarError> {
    for (at, found) in grammar.match_indices("%json") {
        let rest = &grammar[at + found.len()..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        // What is no JSON is refused with its place in the grammar, by who reads that.
        if let Some(Ok(value)) = values.next() {
            schema(&value)?;
        }
    }
    Ok(())
}

/// A schema, before anything is made of it.
pub(crate) fn schema(root: &Value) -> Result<(), GrammarError> {
    let mut walk = Walk {
        root,
        num_values: 0,
        num_visits: 0,
    };
    walk.count(root, 0)?;
    walk.expand(root)
}

struct Walk<'a> {
    root: &'a Value,
    num_values: usize,
    num_visits: usize,
}

impl Walk<'_> {
    fn count(&mut self, value: &Value, depth: usize) -> Result<(), GrammarError> {
        at_most("values within values", SCHEMA_DEPTH_MAX, depth)?;
        self.num_values += 1;
        at_most("values", SCHEMA_VALUES_MAX, self.num_values)?;
        match value {
            Value::Array(list) => list.iter().try_for_each(|one| self.count(one, depth + 1)),
            Value::Object(map) => {
                if let Some(Value::Object(patterns)) = map.get("patternProperties") {
                    let got = patterns.len();
                    at_most(
                        "patternProperties of an object",
                        PATTERN_PROPERTIES_MAX,
                        got,
                    )?;
                }
                for name in COUNTS {
                    let got = map.get(name).and_then(Value::as_u64).unwrap_or(0);
                    if got > SCHEMA_COUNT_MAX {
                        let got = usize::try_from(got).unwrap_or(usize::MAX);
                        at_most("items or properties", SCHEMA_COUNT_MAX as usize, got)?;
                    }
                }
                map.values().try_for_each(|one| self.count(one, depth + 1))
            }
            _ => Ok(()),
        }
    }

    /// Looks at every schema in which alternatives meet something else.
    fn expand(&mut self, value: &Value) -> Result<(), GrammarError> {
        match value {
            Value::Array(list) => list.iter().try_for_each(|one| self.expand(one)),
            Value::Object(map) => {
                if num_parts(value) > 1 {
                    let num_alternatives = self.alternatives(value, 0)?;
                    let got = num_alternatives.saturating_mul(self.num_values);
                    let what = "values when its alternatives are written out";
                    at_most(what, SCHEMA_EXPANSION_MAX, got)?;
                }
                map.values().try_for_each(|one| self.expand(one))
            }
            _ => Ok(()),
        }
    }

    /// How many schemas without alternatives a schema stands for.
    fn alternatives(
        &mut self,
        schema: &Value,
        num_references: usize,
    ) -> Result<usize, GrammarError> {
        self.num_visits += 1;
        at_most(
            "schemas that refer to each other",
            VISITS_MAX,
            self.num_visits,
        )?;
        let Value::Object(map) = schema else {
            return Ok(1);
        };
        let mut product = 1_usize;
        for name in ALTERNATIVES {
            if let Some(Value::Array(options)) = map.get(name) {
                let mut sum = 0_usize;
                for option in options {
                    sum = sum.saturating_add(self.alternatives(option, num_references)?);
                }
                product = product.saturating_mul(sum.max(1));
            }
        }
        if let Some(Value::Array(all)) = map.get("allOf") {
            for one in all {
                product = product.saturating_mul(self.alternatives(one, num_references)?);
            }
        }
        let target = map.get("$ref").and_then(Value::as_str);
        let target = target.and_then(|target| self.root.pointer(target.strip_prefix('#')?));
        if let Some(target) = target.filter(|_| num_references < REFERENCES_MAX) {
            product = product.saturating_mul(self.alternatives(target, num_references + 1)?);
        }
        Ok(product)
    }
}

/// Parts of a schema that must all hold.
fn num_parts(schema: &Value) -> usize {
    let Value::Object(map) = schema else {
        return 0;
    };
    let is_applied = |name: &str| ALTERNATIVES.contains(&name) || name == "$ref";
    let mut num_parts = 0;
    let mut has_own = false;
    for (name, value) in map {
        match name.as_str() {
            "allOf" => num_parts += value.as_array().map_or(0, Vec::len),
            name if is_applied(name) => num_parts += 1,
            name if ANNOTATIONS.contains(&name) => {}
            _ => has_own = true,
        }
    }
    num_parts + usize::from(has_own)
}

/// Refuses what is more than its limit.
pub(crate) fn at_most(what: &'static str, limit: usize, got: usize) -> Result<(), GrammarError> {
    if got > limit {
        return Err(GrammarError::TooLarge { what, limit, got });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn brackets_in_strings_and_behind_backslashes_do_not_nest() {
        let many = NESTING_MAX + 1;
        assert!(nesting(&"(".repeat(many), false).is_err());
        assert!(nesting(&"()".repeat(many), false).is_ok());
        assert!(nesting(&r"\(".repeat(many), false).is_ok());
        let strings = r#""{" "#.repeat(many);
        assert!(nesting(&strings, true).is_ok());
        assert!(nesting(&strings, false).is_err());
    }

    #[test]
    fn alternatives_multiply_where_all_of_them_must_hold() {
        let one_of_ten = json!({ "anyOf": vec![json!({ "minimum": 1 }); 10] });
        let product = |n| json!({ "allOf": vec![one_of_ten.clone(); n] });
        assert!(schema(&product(3)).is_ok());
        let error = schema(&product(6)).unwrap_err().to_string();
        assert!(error.contains("written out"), "{error}");
        // Through references the same, and going round in circles ends.
        let part = json!({ "$ref": "#/$defs/a" });
        let hidden = json!({ "$defs": { "a": one_of_ten }, "allOf": vec![part; 6] });
        assert!(schema(&hidden).is_err());
        let circle = json!({ "type": "object", "anyOf": [{ "$ref": "#" }, { "$ref": "#" }] });
        assert!(schema(&circle).is_err());
        // On their own they only add up.
        let many = json!({ "anyOf": vec![json!({ "type": "integer" }); 5000] });
        assert!(schema(&many).is_ok());
    }

    #[test]
    fn a_schema_inside_of_a_grammar_is_looked_at_too() {
        assert!(embedded(r#"start: %json { "type": "array", "maxItems": 3 }"#).is_ok());
        let many = format!(
            "start: a\na: %json {}",
            json!({ "type": "array", "minItems": 4_000_000_000_u64 })
        );
        let error = embedded(&many).unwrap_err().to_string();
        assert_eq!(
            error,
            "must have at most 10000 items or properties, got 4000000000"
        );
    }
}
