//! How large a regular expression is: how deep its groups are, and how many ways to go on it may have.

use super::at_most;
use crate::GrammarError;
use crate::limits::NESTING_MAX;

/// What there is to know of an expression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size {
    /// Groups within groups.
    depth: usize,
    /// Its characters and classes, each as often as it is repeated: a state goes on in no more ways.
    pub(super) parts: usize,
}

/// Looks at an expression that stands alone.
pub(crate) fn expression(text: &str) -> Result<(), GrammarError> {
    size(text).map(|_size| ())
}

/// Looks at an expression, or a part of one.
pub(super) fn size(text: &str) -> Result<Size, GrammarError> {
    let mut size = scan(text);
    if is_verbose(text) {
        // Brackets may be in comments, so that nothing is known but the length and the largest count.
        size.parts = text.len().saturating_mul(largest_number(text));
    }
    at_most("brackets within brackets", NESTING_MAX, size.depth)?;
    Ok(size)
}

/// A group that is open.
#[derive(Default)]
struct Group {
    /// Parts before the last one.
    parts: usize,
    /// What a repetition behind it is about.
    last: usize,
}

impl Group {
    fn push(&mut self, parts: usize) {
        self.parts = self.parts.saturating_add(self.last);
        self.last = parts;
    }

    fn sum(&self) -> usize {
        self.parts.saturating_add(self.last)
    }
}

fn scan(text: &str) -> Size {
    let bytes = text.as_bytes();
    let mut outer: Vec<Group> = Vec::new();
    let mut group = Group::default();
    let (mut at, mut depth) = (0, 0);
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'\\' => {
                group.push(1);
                at = escape_end(bytes, at);
            }
            b'[' => {
                group.push(1);
                let (end, levels) = class_end(bytes, at);
                at = end;
                depth = depth.max(outer.len() + levels);
            }
            b'(' => {
                outer.push(std::mem::take(&mut group));
                depth = depth.max(outer.len());
            }
            b')' => {
                if let Some(around) = outer.pop() {
                    let inner = std::mem::replace(&mut group, around);
                    group.push(inner.sum());
                }
            }
            b'{' => {
                let end = bytes[at..].iter().position(|&b| b == b'}');
                let end = end.map_or(bytes.len(), |end| at + end);
                let count = largest_number(&text[at..end]);
                group.last = group.last.saturating_mul(count);
                at = (end + 1).min(bytes.len());
            }
            b'|' | b'*' | b'+' | b'?' | b'^' | b'$' => {}
            _ => group.push(1),
        }
    }
    while let Some(around) = outer.pop() {
        let inner = std::mem::replace(&mut group, around);
        group.push(inner.sum());
    }
    let parts = group.sum().max(1);
    Size { depth, parts }
}

/// Behind a character that a backslash was before: `\x{41}` and `\p{Lu}` are no repetitions.
fn escape_end(bytes: &[u8], at: usize) -> usize {
    if matches!(
        bytes.get(at..),
        Some([b'x' | b'u' | b'U' | b'p' | b'P', b'{', ..])
    ) {
        let end = bytes[at..].iter().position(|&b| b == b'}');
        return end.map_or(bytes.len(), |end| at + end + 1);
    }
    at + 1
}

/// Behind the bracket that closes a class, and how deep classes are in it. A bracket right at its begin is a character.
fn class_end(bytes: &[u8], begin: usize) -> (usize, usize) {
    let (mut at, mut depth, mut deepest) = (begin, 1_usize, 1);
    let mut is_begin = true;
    while let Some(&byte) = bytes.get(at) {
        at += 1;
        match byte {
            b'\\' => at += 1,
            b'^' if is_begin => continue,
            b'[' => {
                depth += 1;
                deepest = deepest.max(depth);
                is_begin = true;
                continue;
            }
            b']' if !is_begin => {
                depth -= 1;
                if depth == 0 {
                    return (at, deepest);
                }
            }
            _ => {}
        }
        is_begin = false;
    }
    (bytes.len(), deepest)
}

/// Whether some of it may be comments: the flag `x` is set in it.
fn is_verbose(text: &str) -> bool {
    text.match_indices("(?").any(|(at, found)| {
        let flags = text[at + found.len()..].bytes();
        let mut flags = flags.take_while(|b| b.is_ascii_alphabetic() || *b == b'-');
        flags.any(|b| b == b'x')
    })
}

fn largest_number(text: &str) -> usize {
    let numbers = text.split(|c: char| !c.is_ascii_digit());
    let numbers = numbers.filter(|digits| !digits.is_empty());
    let numbers = numbers.map(|digits| digits.parse().unwrap_or(usize::MAX));
    numbers.max().unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn brackets_in_classes_and_behind_backslashes_do_not_nest() {
        let many = NESTING_MAX + 1;
        assert!(size(&"(".repeat(many)).is_err());
        assert!(size(&"()".repeat(many)).is_ok());
        assert!(size(&r"\(".repeat(many)).is_ok());
        assert!(size(&"[(]".repeat(many)).is_ok());
        assert!(size(&"([)]".repeat(many)).is_err(), "each opens a group");
        assert!(
            size(&"([])]".repeat(many)).is_err(),
            "the first is a character"
        );
        assert!(size(&"[".repeat(many)).is_err());
    }

    #[test]
    fn parts_are_counted_as_often_as_they_are_repeated() {
        for (text, parts) in [
            ("", 1),
            ("abc", 3),
            (r"a\.[a-z\]]", 3),
            (r"\x{41}\p{Lu}{3}", 4),
            ("a*|b+|c?", 3),
            ("a{20}b", 21),
            ("(ab){2,5}c", 11),
            ("((a{10}b){10}c){2,}", 222),
            ("[]{9}]{3}", 3),
            ("(ab", 2),
            ("x{99999999999999999999999}", usize::MAX),
        ] {
            assert_eq!(size(text).unwrap().parts, parts, "{text}");
        }
        assert!(size("(?x) a # {[\n {7} b").unwrap().parts > 14);
    }
}
