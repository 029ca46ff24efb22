//! JSON as Python's `json.dumps(value, ensure_ascii=False)` writes it: `", "` and `": "`, floats by `repr`.
//! Whole numbers beyond 64 bits were floats before they came here.

use serde_json::{Number, Value};

/// The keyword arguments of `json.dumps` that chat templates use.
#[derive(Debug, Clone, Default)]
pub(crate) struct JsonStyle {
    /// Spaces per level; `None` keeps everything on one line.
    pub(crate) indent: Option<usize>,
    /// Between items and between key and value.
    pub(crate) separators: Option<(String, String)>,
    pub(crate) ensure_ascii: bool,
    pub(crate) sort_keys: bool,
}

/// `json.dumps(value, ensure_ascii=False)`.
pub(crate) fn dumps(value: &Value) -> String {
    dumps_styled(value, &JsonStyle::default())
}

/// `json.dumps` with more of its arguments.
pub(crate) fn dumps_styled(value: &Value, style: &JsonStyle) -> String {
    let between_items = if style.indent.is_some() { "," } else { ", " };
    let (items, keys) = style
        .separators
        .as_ref()
        .map_or((between_items, ": "), |(items, keys)| {
            (items.as_str(), keys.as_str())
        });
    let mut writer = Writer {
        out: String::new(),
        style,
        items,
        keys,
    };
    writer.value(value, 0);
    writer.out
}

struct Writer<'s> {
    out: String,
    style: &'s JsonStyle,
    items: &'s str,
    keys: &'s str,
}

impl Writer<'_> {
    fn value(&mut self, value: &Value, level: usize) {
        match value {
            Value::Null => self.out.push_str("null"),
            Value::Bool(yes) => self.out.push_str(if *yes { "true" } else { "false" }),
            Value::Number(number) => self.out.push_str(&repr(number)),
            Value::String(text) => self.string(text),
            Value::Array(items) if items.is_empty() => self.out.push_str("[]"),
            Value::Object(entries) if entries.is_empty() => self.out.push_str("{}"),
            Value::Array(items) => {
                self.out.push('[');
                for (index, item) in items.iter().enumerate() {
                    self.next_item(index, level + 1);
                    self.value(item, level + 1);
                }
                self.new_line(level);
                self.out.push(']');
            }
            Value::Object(entries) => {
                self.out.push('{');
                let mut entries: Vec<(&String, &Value)> = entries.iter().collect();
                if self.style.sort_keys {
                    entries.sort_by(|left, right| left.0.cmp(right.0));
                }
                for (index, (key, value)) in entries.into_iter().enumerate() {
                    self.next_item(index, level + 1);
                    self.string(key);
                    self.out.push_str(self.keys);
                    self.value(value, level + 1);
                }
                self.new_line(level);
                self.out.push('}');
            }
        }
    }

    fn next_item(&mut self, index: usize, level: usize) {
        if index > 0 {
            self.out.push_str(self.items);
        }
        self.new_line(level);
    }

    fn new_line(&mut self, level: usize) {
        if let Some(indent) = self.style.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', indent * level));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                '\0'..='\u{1f}' => self.escape(c),
                '\u{7f}'.. if self.style.ensure_ascii => self.escape(c),
                _ => self.out.push(c),
            }
        }
        self.out.push('"');
    }

    fn escape(&mut self, c: char) {
        let mut units = [0; 2];
        for unit in c.encode_utf16(&mut units) {
            self.out.push_str(&format!("\\u{unit:04x}"));
        }
    }
}

/// A number by Python's `repr`: floats keep a point, and have an exponent below 1e-4 and from 1e16 on.
fn repr(number: &Number) -> String {
    if number.is_i64() || number.is_u64() {
        return number.to_string();
    }
    let Some(value) = number.as_f64() else {
        return number.to_string();
    };
    let scientific = format!("{value:e}"); // the shortest digits that read back as the same float
    let Some((digits, exponent)) = scientific.split_once('e') else {
        return scientific;
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if value != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = value.to_string();
    if plain.contains('.') {
        plain
    } else {
        plain + ".0"
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_written_as_python_writes_them() {
        let value: Value = serde_json::from_str(
            r#"{"b":[1,-2,1.0,1e16,1e-7,123456.789,1.5e300,-0.0,0.0001],"a":"é\"\\\n\u0001\u007f🙂","e":{},"l":[],"n":null,"t":true}"#,
        )
        .unwrap();
        // Python 3.11: json.dumps(json.loads(text), ensure_ascii=False)
        let expected = r#"{"b": [1, -2, 1.0, 1e+16, 1e-07, 123456.789, 1.5e+300, -0.0, 0.0001], "a": "é\"\\\n\u0001"#
            .to_owned()
            + "\u{7f}🙂\", \"e\": {}, \"l\": [], \"n\": null, \"t\": true}";
        assert_eq!(dumps(&value), expected);
    }

    #[test]
    fn indent_sorting_and_ascii_are_as_in_python() {
        let style = JsonStyle {
            indent: Some(2),
            ensure_ascii: true,
            sort_keys: true,
            separators: None,
        };
        let value = json!({"b": [1, {}], "a": "é🙂\u{7f}"});
        let expected =
            "{\n  \"a\": \"\\u00e9\\ud83d\\ude42\\u007f\",\n  \"b\": [\n    1,\n    {}\n  ]\n}";
        assert_eq!(dumps_styled(&value, &style), expected);
    }
}
