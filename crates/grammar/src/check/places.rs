//! What must hold at the same place of a JSON text: patterns, formats and divisors that meet because parts of a schema
//! must all hold. Two places are the same here when the last name on the way to them is: more than really meets is
//! counted, and what only meets through a schema that contains itself is not.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::meet::Meet;
use super::{at_most, expression};
use crate::GrammarError;
use crate::limits::{CONJUNCTION_PARTS_MAX, PLACES_MAX};

/// Parts of the longest expression that stands for a format.
const FORMAT_PARTS: usize = 300;
/// Digits behind the point of a divisor: llguidance counts in 32 bits.
const DIGITS_MAX: usize = 9;
/// Keywords whose schemas are about items, or about properties of any name.
const ELSEWHERE: [&str; 4] = [
    "items",
    "additionalItems",
    "prefixItems",
    "additionalProperties",
];

/// Looks at every schema of a document.
pub(super) fn check(root: &Value) -> Result<(), GrammarError> {
    let mut walk = Walk {
        root,
        known: HashMap::new(),
        num_places: 0,
    };
    walk.all(root)
}

/// What must hold, by the name of the property; by the empty name where it may be any.
type Places<'a> = HashMap<&'a str, Meet>;

struct Walk<'a> {
    root: &'a Value,
    /// What references lead to; nothing while that is being found.
    known: HashMap<&'a str, Option<Places<'a>>>,
    num_places: usize,
}

impl<'a> Walk<'a> {
    /// The root says what its parts meet to; what only references lead to is found when it is referred to.
    fn all(&mut self, root: &'a Value) -> Result<(), GrammarError> {
        self.places(root).map(|_places| ())
    }

    fn places(&mut self, schema: &'a Value) -> Result<Places<'a>, GrammarError> {
        let Value::Object(map) = schema else {
            return Ok(Places::new());
        };
        let mut all = self.own(map)?;
        for part in list(map, "allOf") {
            let part = self.places(part)?;
            all = self.and(all, part)?;
        }
        for name in ["anyOf", "oneOf"] {
            let mut any = Places::new();
            for option in list(map, name) {
                let option = self.places(option)?;
                self.or(&mut any, option)?;
            }
            all = self.and(all, any)?;
        }
        if let Some(reference) = map.get("$ref").and_then(Value::as_str) {
            let target = self.target(reference)?;
            all = self.and(all, target)?;
        }
        Ok(all)
    }

    fn target(&mut self, reference: &'a str) -> Result<Places<'a>, GrammarError> {
        if let Some(known) = self.known.get(reference) {
            return Ok(known.clone().unwrap_or_default());
        }
        let target = reference.strip_prefix('#');
        let target = target.and_then(|pointer| self.root.pointer(pointer));
        let Some(target) = target else {
            return Ok(Places::new());
        };
        self.known.insert(reference, None);
        let places = self.places(target)?;
        self.known.insert(reference, Some(places.clone()));
        Ok(places)
    }

    /// What keywords say that are no parts of their own.
    fn own(&mut self, map: &'a Map<String, Value>) -> Result<Places<'a>, GrammarError> {
        let mut all = Places::new();
        let here = leaf(map)?;
        if here != Meet::NOTHING {
            all.insert("", here);
        }
        let mut patterns = Places::new();
        for inner in object(map, "patternProperties").map(|(_, inner)| inner) {
            let inner = self.places(inner)?;
            self.or(&mut patterns, anywhere(inner))?;
        }
        for (name, inner) in object(map, "properties") {
            let mut inner = self.places(inner)?;
            if let Some(meet) = inner.remove("") {
                let there = Places::from([(name.as_str(), meet)]);
                self.or(&mut inner, there)?;
            }
            // Its name may match a pattern.
            let inner = self.and(inner, patterns.clone())?;
            self.or(&mut all, inner)?;
        }
        self.or(&mut all, patterns)?;
        for name in ELSEWHERE {
            for inner in map.get(name).into_iter().flat_map(schemas) {
                let inner = self.places(inner)?;
                self.or(&mut all, inner)?;
            }
        }
        Ok(all)
    }

    /// Both hold.
    fn and(&mut self, one: Places<'a>, other: Places<'a>) -> Result<Places<'a>, GrammarError> {
        if one.is_empty() || other.is_empty() {
            return Ok(if one.is_empty() { other } else { one });
        }
        let get = |places: &Places<'a>, name| {
            let any = places.get("").copied().unwrap_or(Meet::NOTHING);
            places.get(name).map_or(any, |meet| meet.widest(any))
        };
        let mut all = Places::with_capacity(one.len().max(other.len()));
        for name in one.keys().chain(other.keys()) {
            all.insert(*name, get(&one, *name).and(get(&other, *name))?);
        }
        self.pay(one.len() + other.len())?;
        Ok(all)
    }

    /// One of them holds, or each somewhere else.
    fn or(&mut self, all: &mut Places<'a>, other: Places<'a>) -> Result<(), GrammarError> {
        self.pay(other.len())?;
        for (name, meet) in other {
            let known = all.entry(name).or_insert(meet);
            *known = known.widest(meet);
        }
        Ok(())
    }

    fn pay(&mut self, num_places: usize) -> Result<(), GrammarError> {
        self.num_places += num_places + 1;
        let what = "places that parts of it are about, each as often as it is referred to";
        at_most(what, PLACES_MAX, self.num_places)
    }
}

/// The same for properties of any name.
fn anywhere(mut places: Places<'_>) -> Places<'_> {
    let here = places.get("").copied();
    let widest = places.values().fold(here, |widest, meet| {
        Some(widest.map_or(*meet, |widest| widest.widest(*meet)))
    });
    if let Some(widest) = widest {
        places.insert("", widest);
    }
    places
}

fn list<'a>(map: &'a Map<String, Value>, name: &str) -> impl Iterator<Item = &'a Value> {
    map.get(name)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
}

fn object<'a>(
    map: &'a Map<String, Value>,
    name: &str,
) -> impl Iterator<Item = (&'a String, &'a Value)> {
    map.get(name)
        .and_then(Value::as_object)
        .into_iter()
        .flatten()
}

/// A schema, or a list of some.
fn schemas(value: &Value) -> &[Value] {
    match value {
        Value::Array(list) => list,
        one => std::slice::from_ref(one),
    }
}

/// What must hold of the string or number itself.
fn leaf(map: &Map<String, Value>) -> Result<Meet, GrammarError> {
    let mut meet = Meet::NOTHING;
    if let Some(pattern) = map.get("pattern").and_then(Value::as_str) {
        // It is searched for: one way more at each character.
        let parts = expression::size(pattern)?.parts.saturating_add(1);
        meet = meet.and(Meet::expression(parts))?;
    }
    if map.get("format").is_some_and(Value::is_string) {
        meet = meet.and(Meet::expression(FORMAT_PARTS))?;
    }
    if let Some(divisor) = map.get("multipleOf").and_then(Value::as_f64) {
        meet = meet.and(Meet::multiple_of(digits(divisor)?))?;
    }
    Ok(meet)
}

/// The digits of a divisor without the zeros around them.
fn digits(divisor: f64) -> Result<usize, GrammarError> {
    let mut value = divisor.abs();
    let mut num_digits = 0;
    while value.fract() != 0.0 {
        value *= 10.0;
        num_digits += 1;
        at_most(
            "digits behind the point of multipleOf",
            DIGITS_MAX,
            num_digits,
        )?;
    }
    let mut digits = value as usize;
    while digits > 0 && digits.is_multiple_of(10) {
        digits /= 10;
    }
    Ok(digits)
}

/// The patterns of an object, each pair of which is intersected.
pub(super) fn overlaps(patterns: &Map<String, Value>) -> Result<(), GrammarError> {
    let (mut longest, mut second) = (0, 0);
    for pattern in patterns.keys() {
        let parts = expression::size(pattern)?.parts.saturating_add(1);
        (longest, second) = (longest.max(parts), second.max(parts.min(longest)));
    }
    let what = "as product of the lengths of two patternProperties";
    at_most(what, CONJUNCTION_PARTS_MAX, longest.saturating_mul(second))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(schema: &Value) -> String {
        check(schema).unwrap_err().to_string()
    }

    #[test]
    fn patterns_that_meet_are_counted_wherever_that_is_said() {
        let pattern = |i: usize| json!({ "type": "string", "pattern": format!("[a-z]{i}x") });
        let all = |n: usize| (0..n).map(pattern).collect::<Vec<_>>();
        assert_eq!(check(&json!({ "allOf": all(4) })), Ok(()));
        let property = |i: usize| json!({ "properties": { "a": pattern(i) } });
        let nested: Vec<Value> = (0..5).map(property).collect();
        for schema in [
            json!({ "allOf": all(5) }),
            json!({ "pattern": "x", "allOf": all(4) }),
            json!({ "items": { "allOf": [{ "allOf": all(3) }, { "anyOf": [{ "allOf": all(3) }] }] } }),
            json!({ "allOf": nested }),
            json!({ "allOf": all(3), "$ref": "#/$defs/b", "$defs": { "b": { "allOf": all(2) } } }),
            json!({
                "properties": { "a": { "allOf": all(3) } },
                "patternProperties": { "^a": { "allOf": all(2) } },
            }),
            json!({ "allOf": [
                { "properties": { "a": { "allOf": all(3) } } },
                { "additionalProperties": { "allOf": all(2) } },
            ] }),
        ] {
            assert!(refused(&schema).contains("hold at once"), "{schema}");
        }
        let apart = |i: usize| json!({ "properties": { i.to_string(): pattern(i) } });
        let apart: Vec<Value> = (0..50).map(apart).collect();
        assert_eq!(check(&json!({ "allOf": apart })), Ok(()));
    }

    #[test]
    fn long_patterns_may_not_meet() {
        let pattern = |c: char| json!({ "pattern": format!("({c}|x)[a-z]{{1000}}") });
        assert_eq!(check(&pattern('a')), Ok(()));
        let both = json!({ "allOf": [pattern('a'), pattern('b')] });
        assert!(refused(&both).contains("product of the lengths"));
        let patterns = |n: usize| json!({ format!("a{{{n}}}"): {}, format!("b{{{n}}}"): {} });
        assert_eq!(overlaps(patterns(100).as_object().unwrap()), Ok(()));
        assert!(overlaps(patterns(1000).as_object().unwrap()).is_err());
    }

    #[test]
    fn divisors_are_bounded_also_where_they_meet() {
        let multiple = |n: f64| json!({ "type": "number", "multipleOf": n });
        for divisor in [0.01, 0.5, 1.0, 7.0, 1000.0, 86400.0, 1_000_000.0, 9973.0] {
            assert_eq!(check(&multiple(divisor)), Ok(()), "{divisor}");
        }
        for divisor in [9_999_991.0, 65_536.0, 1e-300, 0.1 + 0.2] {
            assert!(
                refused(&multiple(divisor)).contains("multipleOf"),
                "{divisor}"
            );
        }
        let both = json!({ "allOf": [multiple(9973.0), multiple(9967.0)] });
        assert!(refused(&both).contains("multipleOf"));
    }

    #[test]
    fn a_schema_that_contains_itself_ends() {
        let tree = json!({
            "$ref": "#/$defs/tree",
            "$defs": { "tree": { "allOf": [
                { "properties": { "name": { "pattern": "^[a-z]+$" } } },
                { "properties": { "child": { "$ref": "#/$defs/tree" } } },
            ] } },
        });
        assert_eq!(check(&tree), Ok(()));
        let circle = json!({ "allOf": [{ "$ref": "#" }, { "$ref": "#" }] });
        assert_eq!(check(&circle), Ok(()));
    }
}
