//! What an answer must look like: `response_format`, vLLM's `structured_outputs` and the older `guided_...` become one
//! constraint. Never compiles it.

use std::sync::Arc;

use serde_json::Value;
use tramontane_types::Constraint;

use super::fields::{self, Fields, wrong};
use crate::error::ApiError;

/// Most strings of a choice.
pub(crate) const CHOICES_MAX: usize = 4096;
/// Characters with a meaning of their own in a regular expression.
const META: &str = r"\.+*?()|[]{}^$#&-~";
/// Options of `structured_outputs` that would change an answer.
const REFUSED: [&str; 5] = [
    "structural_tag",
    "whitespace_pattern",
    "disable_any_whitespace",
    "disable_additional_properties",
    "backend",
];

/// A constraint, and what the client calls it.
pub(crate) type Named = (Constraint, &'static str);

/// The constraint of a body, if it has one.
pub(crate) fn constraint(
    body: &Fields<'_>,
) -> Result<Option<(Arc<Constraint>, &'static str)>, ApiError> {
    let mut found = response_format(body)?;
    let outputs = structured_outputs(body)?;
    for (constraint, name) in outputs.into_iter().chain(guided(body)?) {
        if let Some((_, other)) = &found {
            let message = format!("only one of {other} and {name} is allowed");
            return Err(ApiError::invalid(name, message));
        }
        found = Some((constraint, name));
    }
    Ok(found.map(|(constraint, name)| (Arc::new(constraint), name)))
}

fn response_format(body: &Fields<'_>) -> Result<Option<Named>, ApiError> {
    let Some(format) = body.object("response_format")? else {
        return Ok(None);
    };
    let path = format.path("type");
    match fields::string(format.required("type")?, &path)? {
        "text" => Ok(None),
        "json_object" => Ok(Some((Constraint::JsonObject, "response_format"))),
        "json_schema" => {
            format.required("json_schema")?;
            let Some(named) = format.object("json_schema")? else {
                return Ok(None);
            };
            named.string("name")?;
            named.string("description")?;
            // It is always followed.
            named.boolean("strict")?;
            let schema = named.required("schema")?;
            let name = "response_format.json_schema.schema";
            Ok(Some((json_schema(schema, name)?, name)))
        }
        _ => {
            let message = format!("{path} must be text, json_object or json_schema");
            Err(ApiError::invalid(&path, message))
        }
    }
}

fn structured_outputs(body: &Fields<'_>) -> Result<Vec<Named>, ApiError> {
    let Some(outputs) = body.object("structured_outputs")? else {
        return Ok(Vec::new());
    };
    for name in REFUSED {
        if outputs
            .get(name)
            .is_some_and(|value| *value != Value::Bool(false))
        {
            return Err(ApiError::unsupported(&outputs.path(name)));
        }
    }
    let names = [
        "structured_outputs.json",
        "structured_outputs.regex",
        "structured_outputs.choice",
        "structured_outputs.grammar",
    ];
    let mut found = of_names(&outputs, ["json", "regex", "choice", "grammar"], names)?;
    if outputs.boolean("json_object")? == Some(true) {
        found.push((Constraint::JsonObject, "structured_outputs.json_object"));
    }
    if found.is_empty() {
        let message = "structured_outputs must have json, regex, choice, grammar or json_object";
        return Err(ApiError::invalid("structured_outputs", message));
    }
    Ok(found)
}

fn guided(body: &Fields<'_>) -> Result<Vec<Named>, ApiError> {
    let names = [
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
    ];
    of_names(body, names, names)
}

/// A schema, an expression, a choice and a grammar under these keys.
fn of_names(
    fields: &Fields<'_>,
    keys: [&str; 4],
    names: [&'static str; 4],
) -> Result<Vec<Named>, ApiError> {
    let mut found = Vec::new();
    if let Some(schema) = fields.get(keys[0]) {
        found.push((json_schema(schema, names[0])?, names[0]));
    }
    if let Some(expression) = fields.string(keys[1])? {
        found.push((Constraint::Regex(expression.into()), names[1]));
    }
    if let Some(choices) = fields.array(keys[2])? {
        found.push((choice(choices, names[2])?, names[2]));
    }
    if let Some(grammar) = fields.string(keys[3])? {
        found.push((Constraint::Lark(grammar.into()), names[3]));
    }
    Ok(found)
}

/// A schema, or its text.
fn json_schema(schema: &Value, path: &str) -> Result<Constraint, ApiError> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Constraint::JsonSchema(schema.to_string().into())),
        Value::String(text) => Ok(Constraint::JsonSchema(text.as_str().into())),
        other => Err(wrong(path, "a JSON schema", other)),
    }
}

/// One of some strings.
fn choice(choices: &[Value], path: &str) -> Result<Constraint, ApiError> {
    if !(1..=CHOICES_MAX).contains(&choices.len()) {
        let got = choices.len();
        let message = format!("{path} must have 1 to {CHOICES_MAX} strings, got {got}");
        return Err(ApiError::invalid(path, message));
    }
    let mut expression = String::from("(?:");
    for (i, value) in choices.iter().enumerate() {
        let path = format!("{path}[{i}]");
        let text = fields::string(value, &path)?;
        if text.is_empty() {
            return Err(ApiError::invalid(
                &path,
                format!("{path} must not be empty"),
            ));
        }
        if i > 0 {
            expression.push('|');
        }
        for c in text.chars() {
            if META.contains(c) {
                expression.push('\\');
            }
            expression.push(c);
        }
    }
    expression.push(')');
    Ok(Constraint::Regex(expression.into()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn found(body: &Value) -> Result<Option<(Arc<Constraint>, &'static str)>, ApiError> {
        constraint(&Fields::of(body, "").unwrap())
    }

    fn refused(body: &Value) -> (String, String) {
        let error = found(body).unwrap_err();
        (error.param.unwrap_or_default(), error.message)
    }

    #[test]
    fn every_form_becomes_one_constraint_with_the_clients_name_for_it() {
        let schema = json!({ "type": "integer" });
        let of_schema = || Constraint::JsonSchema(schema.to_string().into());
        let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema, "strict": true } });
        for (body, constraint, name) in [
            (
                json!({ "response_format": format }),
                of_schema(),
                "response_format.json_schema.schema",
            ),
            (
                json!({ "response_format": { "type": "json_object" } }),
                Constraint::JsonObject,
                "response_format",
            ),
            (
                json!({ "structured_outputs": { "json": schema } }),
                of_schema(),
                "structured_outputs.json",
            ),
            (
                json!({ "guided_json": schema.to_string() }),
                of_schema(),
                "guided_json",
            ),
            (
                json!({ "structured_outputs": { "regex": "a+" } }),
                Constraint::Regex("a+".into()),
                "structured_outputs.regex",
            ),
            (
                json!({ "guided_choice": ["a.b", "c\"d"] }),
                Constraint::Regex(r#"(?:a\.b|c"d)"#.into()),
                "guided_choice",
            ),
            (
                json!({ "guided_grammar": "start: \"a\"" }),
                Constraint::Lark("start: \"a\"".into()),
                "guided_grammar",
            ),
        ] {
            assert_eq!(
                found(&body).unwrap(),
                Some((Arc::new(constraint), name)),
                "{body}"
            );
        }
        for body in [
            json!({}),
            json!({ "response_format": { "type": "text" } }),
            json!({ "guided_json": null }),
        ] {
            assert_eq!(found(&body).unwrap(), None);
        }
    }

    #[test]
    fn what_cannot_be_followed_is_refused_by_name() {
        for (body, param) in [
            (json!({ "response_format": "json" }), "response_format"),
            (json!({ "response_format": {} }), "response_format.type"),
            (
                json!({ "response_format": { "type": "xml" } }),
                "response_format.type",
            ),
            (
                json!({ "response_format": { "type": "json_schema" } }),
                "response_format.json_schema",
            ),
            (
                json!({ "response_format": { "type": "json_schema", "json_schema": {} } }),
                "response_format.json_schema.schema",
            ),
            (json!({ "structured_outputs": {} }), "structured_outputs"),
            (
                json!({ "structured_outputs": { "regex": 3 } }),
                "structured_outputs.regex",
            ),
            (
                json!({ "structured_outputs": { "json": {}, "whitespace_pattern": " " } }),
                "structured_outputs.whitespace_pattern",
            ),
            (
                json!({ "structured_outputs": { "choice": [] } }),
                "structured_outputs.choice",
            ),
            (
                json!({ "structured_outputs": { "choice": ["a", ""] } }),
                "structured_outputs.choice[1]",
            ),
            (
                json!({ "structured_outputs": { "json": {}, "regex": "a" } }),
                "structured_outputs.regex",
            ),
            (
                json!({ "guided_json": {}, "response_format": { "type": "json_object" } }),
                "guided_json",
            ),
            (json!({ "guided_json": 7 }), "guided_json"),
        ] {
            let (at, message) = refused(&body);
            assert_eq!(at, param, "{message}");
            assert!(message.contains(param), "{message}");
        }
    }
}
