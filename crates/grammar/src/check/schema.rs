//! The size of a schema: its values, what its counts and alternatives are written out to, how deep its references lead,
//! and what must hold at once in it.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::{at_most, places};
use crate::GrammarError;
use crate::limits::{
    LEVELS_MAX, PATTERN_PROPERTIES_MAX, PROPERTY_PAIRS_MAX, SCHEMA_COUNT_MAX, SCHEMA_DEPTH_MAX,
    SCHEMA_EXPANSION_MAX, SCHEMA_VALUES_MAX,
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

/// A schema, before anything is made of it.
pub(crate) fn schema(root: &Value) -> Result<(), GrammarError> {
    let mut walk = Walk {
        root,
        num_values: 0,
        num_pairs: 0,
        num_visits: 0,
    };
    walk.count(root, 0)?;
    levels(root)?;
    walk.expand(root)?;
    places::check(root)
}

/// How deep it goes when each reference is followed where it is met first, however they are arranged.
fn levels(root: &Value) -> Result<(), GrammarError> {
    let mut found = References::default();
    found.collect(root, true);
    // Where parts have addresses of their own, the same reference may mean something else each time.
    let unknown = if found.has_addresses {
        found.all.len() * SCHEMA_DEPTH_MAX
    } else {
        0
    };
    let distinct: HashSet<&str> = found.all.into_iter().collect();
    let inside = distinct.iter().map(|reference| {
        let target = reference.strip_prefix('#');
        let target = target.and_then(|pointer| root.pointer(pointer));
        target.map_or(SCHEMA_DEPTH_MAX, depth) + 1
    });
    let got = inside.sum::<usize>().max(unknown) + depth(root);
    at_most("values within values and references", LEVELS_MAX, got)
}

/// Bounded by [`SCHEMA_DEPTH_MAX`].
fn depth(value: &Value) -> usize {
    let inner = match value {
        Value::Array(list) => list.iter().map(depth).max(),
        Value::Object(map) => map.values().map(depth).max(),
        _ => return 0,
    };
    inner.unwrap_or(0) + 1
}

#[derive(Default)]
struct References<'a> {
    all: Vec<&'a str>,
    has_addresses: bool,
}

impl<'a> References<'a> {
    fn collect(&mut self, value: &'a Value, is_root: bool) {
        match value {
            Value::Array(list) => list.iter().for_each(|one| self.collect(one, false)),
            Value::Object(map) => {
                for (name, value) in map {
                    match (name.as_str(), value.as_str()) {
                        ("$ref", Some(reference)) => self.all.push(reference),
                        ("$id" | "id", Some(_)) if !is_root => self.has_addresses = true,
                        _ => self.collect(value, false),
                    }
                }
            }
            _ => {}
        }
    }
}

struct Walk<'a> {
    root: &'a Value,
    num_values: usize,
    num_pairs: usize,
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
                    places::overlaps(patterns)?;
                }
                for name in COUNTS {
                    let got = map.get(name).and_then(Value::as_u64).unwrap_or(0);
                    if got > SCHEMA_COUNT_MAX {
                        let got = usize::try_from(got).unwrap_or(usize::MAX);
                        at_most("items or properties", SCHEMA_COUNT_MAX as usize, got)?;
                    }
                }
                let num_properties = self.properties(map);
                self.num_pairs += num_properties * num_properties;
                let what = "pairs of properties in all its objects";
                at_most(what, PROPERTY_PAIRS_MAX, self.num_pairs)?;
                map.values().try_for_each(|one| self.count(one, depth + 1))
            }
            _ => Ok(()),
        }
    }

    /// Properties of a schema, with those that one look at its parts shows.
    fn properties(&self, map: &Map<String, Value>) -> usize {
        let own = |map: &Map<String, Value>| {
            let properties = map.get("properties").and_then(Value::as_object);
            properties.map_or(0, Map::len)
        };
        let parts = map.get("allOf").and_then(Value::as_array);
        let parts = parts.into_iter().flatten().filter_map(Value::as_object);
        let parts = parts.map(|part| {
            let target = part.get("$ref").and_then(Value::as_str);
            let target = target.and_then(|target| self.root.pointer(target.strip_prefix('#')?));
            let target = target.and_then(Value::as_object);
            1 + own(part) + target.map_or(0, own)
        });
        own(map) + parts.sum::<usize>()
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
    fn references_are_followed_once_each_and_lead_only_so_deep() {
        let chain = |n: usize, part: &Value| {
            let define = |i: usize| {
                let mut part = part.clone();
                part["items"] = json!({ "$ref": format!("#/$defs/d{}", (i + 1) % n) });
                (format!("d{i}"), part)
            };
            let defs: Map<String, Value> = (0..n).map(define).collect();
            json!({ "$defs": defs, "$ref": "#/$defs/d0" })
        };
        let part = json!({ "type": "array" });
        assert!(schema(&chain(500, &part)).is_ok());
        let error = schema(&chain(2000, &part)).unwrap_err().to_string();
        assert!(
            error.contains("values within values and references"),
            "{error}"
        );
        let deep = json!({ "type": "array", "prefixItems": [[[[[[[[[]]]]]]]]] });
        assert!(schema(&chain(500, &deep)).is_err());
        // The same again costs nothing, unless it may be something else.
        let mut many = json!({ "anyOf": vec![json!({ "$ref": "#/$defs/a" }); 1000] });
        assert!(schema(&many).is_ok());
        many["$defs"] = json!({ "a": { "$id": "http://a/" } });
        assert!(schema(&many).is_err());
    }
}
