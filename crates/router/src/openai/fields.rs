//! Reads typed fields out of JSON, and names the path, what was expected and what came when they are not
//! there. `null` counts as absent, as it does in the OpenAI API.

use serde_json::{Map, Value};

use crate::error::{ApiError, ErrorKind};

/// A JSON object somewhere in the body.
#[derive(Clone, Debug)]
pub(crate) struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The object at `path`; empty for the body itself.
    pub(crate) fn of(value: &'a Value, path: &str) -> Result<Self, ApiError> {
        match value.as_object() {
            Some(map) => Ok(Self {
                path: path.to_owned(),
                map,
            }),
            None if path.is_empty() => {
                let message = format!("the body must be a JSON object, got {}", describe(value));
                Err(ApiError::new(ErrorKind::Invalid, message))
            }
            None => Err(wrong(path, "an object", value)),
        }
    }

    /// Path of a field of this object.
    pub(crate) fn path(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// The field, when it is there and not `null`.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    pub(crate) fn required(&self, name: &str) -> Result<&'a Value, ApiError> {
        self.get(name).ok_or_else(|| {
            let path = self.path(name);
            ApiError::invalid(&path, format!("{path} is required"))
        })
    }

    pub(crate) fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        string(value, &self.path(name)).map(Some)
    }

    pub(crate) fn boolean(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| wrong(&self.path(name), "a boolean", value))
    }

    pub(crate) fn number(&self, name: &str) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        number(value, &self.path(name)).map(Some)
    }

    /// A count or an id: `0..=u32::MAX`.
    pub(crate) fn unsigned(&self, name: &str) -> Result<Option<u32>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        unsigned(value, &self.path(name)).map(Some)
    }

    pub(crate) fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        let rule = "an integer that fits into 64 bits with a sign";
        value
            .as_i64()
            .map(Some)
            .ok_or_else(|| wrong(&self.path(name), rule, value))
    }

    pub(crate) fn array(&self, name: &str) -> Result<Option<&'a [Value]>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        array(value, &self.path(name)).map(Some)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<Self>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        Fields::of(value, &self.path(name)).map(Some)
    }

    /// Every field with its name.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&'a String, &'a Value)> {
        self.map.iter()
    }
}

pub(crate) fn string<'a>(value: &'a Value, path: &str) -> Result<&'a str, ApiError> {
    value.as_str().ok_or_else(|| wrong(path, "a string", value))
}

pub(crate) fn array<'a>(value: &'a Value, path: &str) -> Result<&'a [Value], ApiError> {
    value
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| wrong(path, "an array", value))
}

pub(crate) fn number(value: &Value, path: &str) -> Result<f32, ApiError> {
    // Values outside of f32 become infinite and break their range later, with a better message.
    value
        .as_f64()
        .map(|n| n as f32)
        .ok_or_else(|| wrong(path, "a number", value))
}

pub(crate) fn unsigned(value: &Value, path: &str) -> Result<u32, ApiError> {
    let number = value.as_u64().and_then(|n| u32::try_from(n).ok());
    number.ok_or_else(|| wrong(path, "an integer between 0 and 4294967295", value))
}

/// A list of token ids.
pub(crate) fn token_ids(values: &[Value], path: &str) -> Result<Vec<u32>, ApiError> {
    let mut ids = Vec::with_capacity(values.len());
    for (i, value) in values.iter().enumerate() {
        ids.push(match value.as_u64().and_then(|n| u32::try_from(n).ok()) {
            Some(id) => id,
            None => return Err(wrong(&format!("{path}[{i}]"), "a token id", value)),
        });
    }
    Ok(ids)
}

pub(crate) fn wrong(path: &str, expected: &str, got: &Value) -> ApiError {
    ApiError::invalid(
        path,
        format!("{path} must be {expected}, got {}", describe(got)),
    )
}

/// What came, without quoting text of a client.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(b) => b.to_string(),
        Value::Number(n) => n.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "an array".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
