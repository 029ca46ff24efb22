//! The JSON list of calls of formats v2 to v7, read a character at a time: arguments go out while they come.
//! A list that is none becomes text from where it stopped being one.

use super::{CallPiece, is_call_id, is_function_name, push_arguments, push_text};

/// A list of calls that is being read.
#[derive(Debug, Clone, Default)]
pub(super) struct CallList {
    at: At,
    call: Call,
    /// What was read and has not come out as a call, for when it turns out to be text.
    raw: String,
}

/// Where the next character stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
enum At {
    /// Before `[`.
    #[default]
    Start,
    /// Before `{` or `]`.
    Item,
    /// Behind an object.
    AfterItem,
    /// Before a key or `}`.
    Key,
    /// In a key, from its quote on.
    InKey(Scan),
    /// Before `:`.
    Colon,
    /// Before a value.
    Value,
    /// In a value.
    InValue(Scan),
    /// Behind a value.
    AfterValue,
    /// Behind `]`.
    End,
    /// This is no list of calls.
    Broken,
}

/// One object of the list.
#[derive(Debug, Clone, Default)]
struct Call {
    /// The key that is being read, and then its value's.
    key: String,
    /// The value that is being read, unless it goes out at once.
    value: String,
    name: Option<String>,
    id: Option<String>,
    /// Arguments that came before the name.
    arguments: Option<String>,
    /// Its number, once it has begun.
    index: Option<usize>,
    /// The value that is being read are its arguments, which go out at once.
    streams: bool,
}

/// How deep in a JSON value the next character is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Scan {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Scan {
    /// Takes a character of a string, list or object; whether the value ends with it.
    fn ends_with(&mut self, c: char) -> bool {
        if self.in_string {
            match c {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
        } else {
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
        }
        self.depth == 0 && !self.in_string
    }

    /// A number or a word: it ends before what follows it.
    fn is_scalar(&self) -> bool {
        self.depth == 0 && !self.in_string
    }
}

impl CallList {
    /// Takes the next text; new calls get their number from `num_calls`.
    pub(super) fn take(&mut self, text: &str, num_calls: &mut usize, out: &mut Vec<CallPiece>) {
        for c in text.chars() {
            if self.at == At::Broken {
                push_text(out, c.encode_utf8(&mut [0; 4]));
                continue;
            }
            let streams = self.call.streams;
            if !streams {
                self.raw.push(c);
            }
            if !self.step(c, num_calls, out) {
                self.at = At::Broken;
                push_text(out, &std::mem::take(&mut self.raw));
            }
        }
    }

    /// Whether it has turned out to be text.
    pub(super) fn is_text(&self) -> bool {
        self.at == At::Broken
    }

    /// What was read of a call that never began.
    pub(super) fn rest(&self) -> String {
        let is_between = matches!(self.at, At::AfterItem | At::End | At::Broken)
            || (self.at == At::Item && self.raw.trim() == ",");
        if is_between || self.call.index.is_some() || self.raw.trim().is_empty() {
            return String::new();
        }
        self.raw.clone()
    }

    /// Whether the list goes on to be one with this character.
    fn step(&mut self, c: char, num_calls: &mut usize, out: &mut Vec<CallPiece>) -> bool {
        if let At::InKey(scan) = &mut self.at {
            self.call.key.push(c);
            if scan.ends_with(c) {
                self.at = At::Colon;
            }
            return true;
        }
        if let At::InValue(scan) = &mut self.at
            && !(scan.is_scalar() && is_after_scalar(c))
        {
            let ends = !scan.is_scalar() && scan.ends_with(c);
            self.call.push_value(c, out);
            return !ends || self.end_value();
        }
        if matches!(self.at, At::InValue(_)) && !self.end_value() {
            return false;
        }
        c.is_ascii_whitespace() || self.step_between(c, num_calls, out)
    }

    /// A character outside of keys and values that is no white space.
    fn step_between(&mut self, c: char, num_calls: &mut usize, out: &mut Vec<CallPiece>) -> bool {
        let next = match (&self.at, c) {
            (At::Start, '[') | (At::AfterItem, ',') => At::Item,
            (At::Item, '{') => {
                self.call = Call::default();
                At::Key
            }
            (At::Item | At::AfterItem, ']') => {
                self.raw.clear();
                At::End
            }
            (At::Key, '"') => {
                self.call.key.clear();
                self.call.key.push(c);
                At::InKey(Scan {
                    in_string: true,
                    ..Scan::default()
                })
            }
            (At::Colon, ':') => At::Value,
            (At::Value, _) => return self.begin_value(c, num_calls, out),
            (At::AfterValue, ',') => At::Key,
            (At::AfterValue | At::Key, '}') => {
                if !self.call.end(num_calls, out) {
                    return false;
                }
                self.call = Call::default();
                self.raw.clear();
                At::AfterItem
            }
            _ => return false,
        };
        self.at = next;
        true
    }

    fn begin_value(&mut self, c: char, num_calls: &mut usize, out: &mut Vec<CallPiece>) -> bool {
        let mut scan = Scan::default();
        scan.ends_with(c);
        let is_arguments = self.call.key == "\"arguments\"";
        if is_arguments && c != '{' {
            return false;
        }
        self.call.value.clear();
        self.at = At::InValue(scan);
        if is_arguments && self.call.begin(num_calls, out) {
            self.raw.clear();
            self.call.streams = true;
        }
        self.call.push_value(c, out);
        true
    }

    fn end_value(&mut self) -> bool {
        self.at = At::AfterValue;
        if std::mem::take(&mut self.call.streams) {
            return true;
        }
        let value = std::mem::take(&mut self.call.value);
        match self.call.key.as_str() {
            "\"name\"" => match serde_json::from_str::<String>(&value) {
                Ok(name) if is_function_name(&name) => self.call.name = Some(name),
                _ => return false,
            },
            "\"id\"" => {
                let id = serde_json::from_str::<String>(&value).ok();
                self.call.id = id.filter(|id| is_call_id(id));
            }
            "\"arguments\"" => self.call.arguments = Some(value),
            _ => {}
        }
        true
    }
}

impl Call {
    fn push_value(&mut self, c: char, out: &mut Vec<CallPiece>) {
        match self.index {
            Some(index) if self.streams => push_arguments(out, index, c.encode_utf8(&mut [0; 4])),
            _ => self.value.push(c),
        }
    }

    /// Begins it when its name is known; whether it has begun just now.
    fn begin(&mut self, num_calls: &mut usize, out: &mut Vec<CallPiece>) -> bool {
        let Some(name) = self.name.take().filter(|_| self.index.is_none()) else {
            return false;
        };
        out.push(CallPiece::Begin {
            index: *num_calls,
            id: self.id.take(),
            name,
        });
        self.index = Some(*num_calls);
        *num_calls += 1;
        true
    }

    /// At the end of the object: whether it was a call.
    fn end(&mut self, num_calls: &mut usize, out: &mut Vec<CallPiece>) -> bool {
        let Some(arguments) = self.arguments.take() else {
            return self.index.is_some();
        };
        if !self.begin(num_calls, out) {
            return self.index.is_some();
        }
        if let Some(index) = self.index {
            push_arguments(out, index, &arguments);
        }
        true
    }
}

fn is_after_scalar(c: char) -> bool {
    c.is_ascii_whitespace() || matches!(c, ',' | '}' | ']')
}
