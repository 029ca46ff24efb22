//! The metadata of a file: typed values by key, borrowed from the file. Copies no array.

use std::collections::BTreeMap;
use std::fmt::Display;

use crate::Error;

use super::cursor::{Cursor, STRING_BYTES_MAX};

/// Longest key, by the format.
const KEY_BYTES_MAX: u64 = 65_535;
/// Most elements of an array: 16 times the largest vocabulary in use.
pub const ARRAY_LEN_MAX: u64 = 1 << 24;
/// Arrays inside arrays.
const ARRAY_DEPTH_MAX: usize = 4;

/// One value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// An unsigned number of 8 to 64 bits.
    Unsigned(u64),
    /// A signed number of 8 to 64 bits.
    Signed(i64),
    /// A number of 32 or 64 bits.
    Float(f64),
    /// True or false.
    Bool(bool),
    /// The bytes of a string, by the format UTF-8.
    Text(&'a [u8]),
    /// Elements of one type.
    Array(Array<'a>),
}

/// An array of a file.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Array<'a> {
    kind: Kind,
    len: u64,
    /// The elements, checked when the file was read.
    bytes: &'a [u8],
}

impl Array<'_> {
    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        // In range: at most `ARRAY_LEN_MAX`.
        self.len as usize
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Types of values, numbered as in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(cursor: &mut Cursor<'_>, what: &str) -> Result<Self, Error> {
        let number = cursor.u32(what)?;
        let kind = usize::try_from(number)
            .ok()
            .and_then(|n| Self::ALL.get(n).copied());
        kind.ok_or_else(|| cursor.wrong(format!("{what} has type {number}, expected 0 to 12")))
    }

    /// Bytes of an element; `None` where they differ.
    const fn size(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

impl<'a> Value<'a> {
    fn read(cursor: &mut Cursor<'a>, what: &str, kind: Kind, depth: usize) -> Result<Self, Error> {
        Ok(match kind {
            Kind::U8 => Self::Unsigned(cursor.array::<1>(what)?[0].into()),
            Kind::I8 => Self::Signed(i8::from_le_bytes(cursor.array(what)?).into()),
            Kind::U16 => Self::Unsigned(u16::from_le_bytes(cursor.array(what)?).into()),
            Kind::I16 => Self::Signed(i16::from_le_bytes(cursor.array(what)?).into()),
            Kind::U32 => Self::Unsigned(cursor.u32(what)?.into()),
            Kind::I32 => Self::Signed(i32::from_le_bytes(cursor.array(what)?).into()),
            Kind::F32 => Self::Float(f32::from_le_bytes(cursor.array(what)?).into()),
            Kind::U64 => Self::Unsigned(cursor.u64(what)?),
            Kind::I64 => Self::Signed(i64::from_le_bytes(cursor.array(what)?)),
            Kind::F64 => Self::Float(f64::from_le_bytes(cursor.array(what)?)),
            Kind::Bool => match cursor.array::<1>(what)?[0] {
                0 => Self::Bool(false),
                1 => Self::Bool(true),
                got => {
                    return Err(cursor.wrong(format!("{what} is {got}, expected 0 or 1 (boolean)")));
                }
            },
            Kind::String => Self::Text(cursor.string(what, STRING_BYTES_MAX)?),
            Kind::Array => Self::Array(Array::read(cursor, what, depth)?),
        })
    }

    /// What it is, for error texts.
    fn kind(&self) -> String {
        match self {
            Self::Unsigned(n) => n.to_string(),
            Self::Signed(n) => n.to_string(),
            Self::Float(x) => x.to_string(),
            Self::Bool(flag) => flag.to_string(),
            Self::Text(text) => {
                let shown: String = String::from_utf8_lossy(text).chars().take(60).collect();
                format!("{shown:?}")
            }
            Self::Array(array) => format!("{} elements of {:?}", array.len, array.kind),
        }
    }
}

impl<'a> Array<'a> {
    fn read(cursor: &mut Cursor<'a>, what: &str, depth: usize) -> Result<Self, Error> {
        if depth == ARRAY_DEPTH_MAX {
            let max = ARRAY_DEPTH_MAX;
            return Err(cursor.wrong(format!(
                "{what} has arrays inside arrays, expected at most {max} deep"
            )));
        }
        let kind = Kind::read(cursor, what)?;
        let len = cursor.count(&format!("number of elements of {what}"), ARRAY_LEN_MAX)?;
        let begin = cursor.position();
        match kind.size() {
            // No overflow: the count is limited.
            Some(size) => {
                cursor.take(what, len * size)?;
            }
            None => {
                for _ in 0..len {
                    Value::read(cursor, what, kind, depth + 1)?;
                }
            }
        }
        let bytes = cursor.since(begin);
        Ok(Self { kind, len, bytes })
    }
}

/// All entries of a file.
#[derive(Debug)]
pub struct Metadata<'a> {
    file: &'a str,
    entries: BTreeMap<&'a str, Value<'a>>,
}

impl<'a> Metadata<'a> {
    pub(super) fn read(cursor: &mut Cursor<'a>, num_entries: u64) -> Result<Self, Error> {
        let mut entries = BTreeMap::new();
        for index in 0..num_entries {
            let key = cursor.name(&format!("metadata key {index}"), KEY_BYTES_MAX)?;
            let kind = Kind::read(cursor, key)?;
            let value = Value::read(cursor, key, kind, 0)?;
            if entries.insert(key, value).is_some() {
                return Err(cursor.wrong(format!("metadata key {key} is listed twice")));
            }
        }
        let file = cursor.file();
        Ok(Self { file, entries })
    }

    /// Every key, ascending.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.entries.keys().copied()
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value<'a>> {
        self.entries.get(key).copied()
    }

    /// A whole number that is not negative; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn whole(&self, key: &str) -> Result<Option<u64>, Error> {
        self.typed(key, "a whole number", |value| match value {
            Value::Unsigned(n) => Some(n),
            Value::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        })
    }

    /// A number; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a number", |value| match value {
            Value::Float(x) => Some(x),
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            _ => None,
        })
    }

    /// True or false; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, Error> {
        self.typed(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    /// A string; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else, or no UTF-8.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, Error> {
        self.typed(key, "a string (UTF-8)", |value| match value {
            Value::Text(text) => std::str::from_utf8(text).ok(),
            _ => None,
        })
    }

    /// A list of strings; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else, or one of them is no UTF-8.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, Error> {
        self.list(key, "a list of strings (UTF-8)", |value| match value {
            Value::Text(text) => std::str::from_utf8(text).ok(),
            _ => None,
        })
    }

    /// A list of numbers; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f32>>, Error> {
        self.list(key, "a list of numbers", |value| match value {
            // Exact for lists of f32.
            Value::Float(x) => Some(x as f32),
            _ => None,
        })
    }

    /// A list of whole numbers; `None` without the key.
    ///
    /// # Errors
    /// When the value is anything else.
    pub fn wholes(&self, key: &str) -> Result<Option<Vec<i64>>, Error> {
        self.list(key, "a list of whole numbers", |value| match value {
            Value::Signed(n) => Some(n),
            Value::Unsigned(n) => i64::try_from(n).ok(),
            _ => None,
        })
    }

    /// A key's value breaks a rule.
    pub(crate) fn wrong(&self, key: &str, rule: &str, got: &dyn Display) -> Error {
        Error::File {
            file: self.file.to_owned(),
            what: format!("{key} must be {rule}, got {got}"),
        }
    }

    fn typed<T>(
        &self,
        key: &str,
        rule: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let converted = convert(value).ok_or_else(|| self.wrong(key, rule, &value.kind()));
        converted.map(Some)
    }

    fn list<T>(
        &self,
        key: &str,
        rule: &str,
        convert: impl Fn(Value<'a>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let Value::Array(array) = value else {
            return Err(self.wrong(key, rule, &value.kind()));
        };
        let mut cursor = Cursor::new(self.file, array.bytes);
        // Grows with what is really there.
        let mut list = Vec::new();
        for _ in 0..array.len {
            let element = Value::read(&mut cursor, key, array.kind, 1)?;
            list.push(convert(element).ok_or_else(|| self.wrong(key, rule, &element.kind()))?);
        }
        Ok(Some(list))
    }
}
