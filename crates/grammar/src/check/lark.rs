//! The size of a grammar: how much is defined in it, how deep groups and definitions go, what is intersected, and the
//! schemas in it. Reads tokens as llguidance does, and refuses what it cannot read.

use std::collections::HashMap;

use serde_json::Value;

use super::meet::Meet;
use super::{at_most, expression, schema};
use crate::GrammarError;
use crate::limits::{DEFINITIONS_MAX, LEVELS_MAX, NESTING_MAX, SUBSTRING_BYTES_MAX};

/// A grammar, before anything is made of it.
pub(crate) fn lark(text: &str) -> Result<(), GrammarError> {
    let tokens = Reader { text, at: 0 }.tokens()?;
    let definitions = definitions(&tokens)?;
    at_most("definitions", DEFINITIONS_MAX, definitions.len())?;
    let num_levels = definitions.iter().map(|one| one.depth + 1).sum();
    at_most("definitions and groups within them", LEVELS_MAX, num_levels)?;
    let mut by_name: HashMap<&str, usize> = HashMap::new();
    for (index, one) in definitions.iter().enumerate() {
        by_name.insert(one.name, index);
    }
    let mut meets = Meets {
        definitions: &definitions,
        by_name: &by_name,
        known: vec![State::Unknown; definitions.len()],
    };
    (0..definitions.len()).try_for_each(|index| meets.of(index).map(|_meet| ()))
}

/// What matters of a token.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Token<'a> {
    Name(&'a str),
    /// A string, a special token, a schema.
    Simple,
    /// An expression of this many parts.
    Expression(usize),
    Number(usize),
    Open(u8),
    Close(u8),
    Or,
    And,
    Not,
    Colon,
    /// `%lark`; what follows in braces is a grammar.
    Nested,
    /// The begin of a statement, such as `%ignore`.
    Statement,
    Newline,
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Reader<'a> {
    fn tokens(mut self) -> Result<Vec<Token<'a>>, GrammarError> {
        let mut tokens = Vec::new();
        let mut num_substrings = 0;
        while let Some(byte) = self.peek(0) {
            let token = match byte {
                b'#' => self.comment(),
                b'/' if self.peek(1) == Some(b'/') => self.comment(),
                b'\n' => self.sign(Token::Newline),
                b'"' => Some(self.string()?),
                b'/' => Some(self.expression()?),
                b'<' => Some(self.special()?),
                b'%' => self.keyword(&mut num_substrings)?,
                b'0'..=b'9' => Some(self.number()),
                b'@' => {
                    self.at += 1;
                    self.take(|b| b.is_ascii_alphabetic() || is_in_word(b));
                    Some(Token::Simple)
                }
                b'(' | b'[' | b'{' => self.sign(Token::Open(byte)),
                b')' | b']' | b'}' => self.sign(Token::Close(byte)),
                b'|' => self.sign(Token::Or),
                b'&' => self.sign(Token::And),
                b'~' => self.sign(Token::Not),
                b':' if self.peek(1) == Some(b':') => {
                    self.at += 2;
                    None
                }
                b':' => self.sign(Token::Colon),
                _ => self.word_or_sign(),
            };
            tokens.extend(token);
        }
        Ok(tokens)
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.text.as_bytes().get(self.at + ahead).copied()
    }

    fn take(&mut self, is_part: impl Fn(u8) -> bool) -> &'a str {
        let rest = &self.text[self.at..];
        let len = rest.bytes().position(|b| !is_part(b)).unwrap_or(rest.len());
        self.at += len;
        &rest[..len]
    }

    fn sign(&mut self, token: Token<'a>) -> Option<Token<'a>> {
        self.at += 1;
        Some(token)
    }

    fn comment(&mut self) -> Option<Token<'a>> {
        let rest = &self.text[self.at..];
        self.at += rest.find('\n').unwrap_or(rest.len());
        None
    }

    /// A name of small or of large letters, without the marks before it; nothing for any other sign.
    fn word_or_sign(&mut self) -> Option<Token<'a>> {
        let rest = &self.text[self.at..];
        let letter = rest.strip_prefix('_').unwrap_or(rest).bytes().next();
        let is_part: fn(u8) -> bool = match letter {
            Some(b'a'..=b'z') => |b| b.is_ascii_lowercase() || is_in_word(b),
            Some(b'A'..=b'Z') => |b| b.is_ascii_uppercase() || is_in_word(b),
            _ => {
                self.at += rest.chars().next().map_or(1, char::len_utf8);
                return None;
            }
        };
        Some(Token::Name(self.take(is_part)))
    }

    fn string(&mut self) -> Result<Token<'a>, GrammarError> {
        self.delimited(b'"', "a string")?;
        if self.peek(0) == Some(b'i') {
            self.at += 1;
        }
        Ok(Token::Simple)
    }

    fn expression(&mut self) -> Result<Token<'a>, GrammarError> {
        let inner = self.delimited(b'/', "an expression")?;
        let flags = self.take(|b| b"imslux".contains(&b));
        let size = expression::size(&format!("(?{flags}:{inner})"))?;
        Ok(Token::Expression(size.parts))
    }

    /// What is between two of a sign, in which a backslash takes the next character with it.
    fn delimited(&mut self, end: u8, what: &str) -> Result<&'a str, GrammarError> {
        let begin = self.at + 1;
        self.at = begin;
        while let Some(byte) = self.peek(0) {
            self.at += if byte == b'\\' { 2 } else { 1 };
            if byte == end {
                return Ok(self.text.get(begin..self.at - 1).unwrap_or_default());
            }
        }
        self.at = self.text.len();
        Err(GrammarError::invalid(&format!("{what} does not end")))
    }

    fn special(&mut self) -> Result<Token<'a>, GrammarError> {
        let rest = &self.text[self.at..];
        let end = rest.find(['>', '\n']).unwrap_or(rest.len());
        if !rest[end..].starts_with('>') {
            let text = "a special token does not end on its line";
            return Err(GrammarError::invalid(text));
        }
        self.at += end + 1;
        Ok(Token::Simple)
    }

    fn number(&mut self) -> Token<'a> {
        if self.text[self.at..].starts_with("0x") || self.text[self.at..].starts_with("0X") {
            self.at += 2;
            self.take(|b| b.is_ascii_hexdigit());
            return Token::Number(1);
        }
        let digits = self.take(|b| b.is_ascii_digit());
        Token::Number(digits.parse().unwrap_or(usize::MAX))
    }

    fn keyword(&mut self, num_substrings: &mut usize) -> Result<Option<Token<'a>>, GrammarError> {
        self.at += 1;
        let token = match self.take(|b| b.is_ascii_lowercase()) {
            "json" => {
                schema(&self.json()?)?;
                Token::Simple
            }
            "regex" => {
                let begin = self.at;
                self.json()?;
                let num_bytes = self.at - begin;
                *num_substrings += num_bytes;
                at_most("bytes after %regex", SUBSTRING_BYTES_MAX, *num_substrings)?;
                Token::Expression(num_bytes)
            }
            "llguidance" => {
                self.json()?;
                Token::Statement
            }
            "lark" => Token::Nested,
            "if" => return Ok(None),
            _ => Token::Statement,
        };
        Ok(Some(token))
    }

    fn json(&mut self) -> Result<Value, GrammarError> {
        let rest = &self.text[self.at..];
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        let value = match values.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                let text = format!("there is JSON in it that is not valid: {error}");
                return Err(GrammarError::invalid(&text));
            }
            None => return Err(GrammarError::invalid("there is JSON missing at its end")),
        };
        self.at += values.byte_offset();
        Ok(value)
    }
}

const fn is_in_word(byte: u8) -> bool {
    byte.is_ascii_digit() || byte == b'_' || byte == b'-'
}

/// What a rule or a terminal is, or a statement, which has no name.
#[derive(Debug)]
struct Definition<'a> {
    name: &'a str,
    body: Vec<Token<'a>>,
    /// Groups within groups.
    depth: usize,
}

/// Takes tokens apart into definitions. Those of nested grammars are among them, as if they were one grammar.
fn definitions<'a>(tokens: &[Token<'a>]) -> Result<Vec<Definition<'a>>, GrammarError> {
    let statement = |name| Definition {
        name,
        body: Vec::new(),
        depth: 0,
    };
    let mut all = vec![statement("")];
    let mut current = 0;
    // Open brackets; with what was defined around it and how many brackets there were, where it is a nested grammar.
    let mut open: Vec<(u8, Option<(usize, usize)>)> = Vec::new();
    let mut base = 0;
    let mut is_nested = false;
    for (index, &token) in tokens.iter().enumerate() {
        let is_outside = open.len() == base;
        if let Some(name) = is_outside.then(|| header(tokens, index)).flatten() {
            current = all.len();
            all.push(statement(name));
            continue;
        }
        match token {
            Token::Statement if is_outside => {
                current = all.len();
                all.push(statement(""));
            }
            Token::Open(bracket) => {
                let around = is_nested.then_some((current, base));
                open.push((bracket, around));
                if around.is_some() {
                    base = open.len();
                }
            }
            Token::Close(bracket) => match open.pop() {
                Some((opened, around)) if closes(opened, bracket) => {
                    (current, base) = around.unwrap_or((current, base));
                }
                _ => return Err(GrammarError::invalid("its brackets do not match")),
            },
            _ => {}
        }
        is_nested = token == Token::Nested;
        at_most("brackets within brackets", NESTING_MAX, open.len())?;
        if let Some(definition) = all.get_mut(current) {
            definition.depth = definition.depth.max(open.len());
            definition.body.push(token);
        }
    }
    Ok(all)
}

const fn closes(opened: u8, bracket: u8) -> bool {
    matches!(
        (opened, bracket),
        (b'(', b')') | (b'[', b']') | (b'{', b'}')
    )
}

/// The name that is defined from here on: one with a colon behind it, and what may be between.
fn header<'a>(tokens: &[Token<'a>], at: usize) -> Option<&'a str> {
    let Token::Name(name) = *tokens.get(at)? else {
        return None;
    };
    let mut depth = 0_usize;
    for token in tokens.get(at + 1..)? {
        match token {
            Token::Colon if depth == 0 => return Some(name),
            Token::Open(b'[' | b'{') => depth += 1,
            Token::Close(_) if depth > 0 => depth -= 1,
            Token::Number(_) => {}
            _ if depth > 0 && *token != Token::Newline => {}
            _ => return None,
        }
    }
    None
}

#[derive(Clone, Copy, Debug)]
enum State {
    Unknown,
    /// Further up: a terminal that is part of itself is refused by llguidance, and rules are never intersected.
    InWork,
    Known(Meet),
}

struct Meets<'a> {
    definitions: &'a [Definition<'a>],
    by_name: &'a HashMap<&'a str, usize>,
    known: Vec<State>,
}

impl Meets<'_> {
    /// Calls itself along definitions, of which there are few.
    fn of(&mut self, index: usize) -> Result<Meet, GrammarError> {
        match self.known.get(index) {
            Some(State::Unknown) => {}
            Some(State::Known(meet)) => return Ok(*meet),
            Some(State::InWork) | None => return Ok(Meet::NOTHING),
        }
        self.known[index] = State::InWork;
        let definitions = self.definitions;
        let mut outer: Vec<Part> = Vec::new();
        let mut part = Part::default();
        for &token in &definitions[index].body {
            match token {
                Token::Simple => part.push(Meet::simple())?,
                Token::Expression(parts) => part.push(Meet::expression(parts))?,
                Token::Name(name) => {
                    let meet = match self.by_name.get(name) {
                        Some(&other) => self.of(other)?,
                        None => Meet::NOTHING,
                    };
                    part.push(meet)?;
                }
                Token::Number(count) => part.repeat(count),
                Token::Not => part.is_negated = true,
                Token::And => part.and()?,
                Token::Or | Token::Newline | Token::Colon => part.or()?,
                // What is in braces is how often the last part comes, or another grammar.
                Token::Open(b'{') | Token::Close(b'}') => {}
                Token::Open(_) => outer.push(std::mem::take(&mut part)),
                Token::Close(_) => {
                    let inner = std::mem::replace(&mut part, outer.pop().unwrap_or_default());
                    part.push(inner.end()?)?;
                }
                Token::Nested | Token::Statement => {}
            }
        }
        let meet = part.end()?;
        self.known[index] = State::Known(meet);
        Ok(meet)
    }
}

/// A group, as far as it is read.
#[derive(Default)]
struct Part {
    /// Alternatives that are over.
    alternatives: Option<Meet>,
    /// Operands of an intersection that are over.
    operands: Option<Meet>,
    /// What is one behind the other, but the last.
    sequence: Option<Meet>,
    last: Option<Meet>,
    is_negated: bool,
}

impl Part {
    fn push(&mut self, mut meet: Meet) -> Result<(), GrammarError> {
        if std::mem::take(&mut self.is_negated) {
            // `~` is an operand more: the complement of it.
            meet = meet.and(Meet::expression(1))?;
        }
        self.sequence = beside(self.sequence, self.last);
        self.last = Some(meet);
        Ok(())
    }

    fn repeat(&mut self, count: usize) {
        // What is between `~` and a number is none.
        self.is_negated = false;
        self.last = self.last.map(|last| last.times(count));
    }

    fn and(&mut self) -> Result<(), GrammarError> {
        let operand = beside(self.sequence.take(), self.last.take()).unwrap_or(Meet::NOTHING);
        self.operands = Some(match self.operands {
            Some(others) => others.and(operand)?,
            None => operand,
        });
        self.is_negated = false;
        Ok(())
    }

    fn or(&mut self) -> Result<(), GrammarError> {
        self.and()?;
        self.alternatives = beside(self.alternatives, self.operands.take());
        Ok(())
    }

    fn end(mut self) -> Result<Meet, GrammarError> {
        self.or()?;
        Ok(self.alternatives.unwrap_or(Meet::NOTHING))
    }
}

fn beside(one: Option<Meet>, other: Option<Meet>) -> Option<Meet> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.beside(other)),
        (one, other) => one.or(other),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(text: &str) -> String {
        lark(text).unwrap_err().to_string()
    }

    #[test]
    fn what_looks_like_brackets_in_strings_expressions_and_comments_is_none() {
        let many = NESTING_MAX + 1;
        for text in [
            r#""{" "#, r"/\(/ ", r"/[(]/ ", "// \"(\n", "# (/\n", "<[(]> ",
        ] {
            let text = format!("start: a\na: {}", text.repeat(many));
            assert_eq!(lark(&text), Ok(()), "{text}");
        }
        let deep = format!("{}\"a\"{}", "(".repeat(many), ")".repeat(many));
        for before in ["", "/\"/ ", "// \"\n| ", r#""\"" "#] {
            let error = refused(&format!("start: {before}{deep}"));
            assert!(error.contains("brackets within brackets"), "{error}");
        }
        assert!(refused("start: ([)]").contains("brackets do not match"));
        assert!(refused("start: \"a").contains("does not end"));
    }

    #[test]
    fn definitions_and_their_groups_are_counted() {
        let rules = |n: usize| -> String { (0..n).map(|i| format!("a{i}: \"x\"\n")).collect() };
        assert!(lark(&rules(DEFINITIONS_MAX - 1)).is_ok());
        let error = refused(&rules(DEFINITIONS_MAX));
        assert!(error.contains("definitions, got"), "{error}");
        let groups = |n: usize| -> String {
            let one = |i| format!("a{i}[capture]: {}\"x\"{}\n", "(".repeat(20), ")".repeat(20));
            (0..n).map(one).collect()
        };
        assert!(lark(&groups(100)).is_ok());
        assert!(refused(&groups(300)).contains("groups within them"));
        // In one line with a statement, and within another grammar.
        let tokens = Reader {
            text: "%ignore A B: \"b\" -> c d: B | %lark { e.5: f } g\n h::_: i",
            at: 0,
        };
        let tokens = tokens.tokens().unwrap();
        let names: Vec<&str> = definitions(&tokens)
            .unwrap()
            .iter()
            .map(|d| d.name)
            .collect();
        assert_eq!(names, ["", "", "B", "d", "e", "h"]);
    }

    #[test]
    fn intersections_are_counted_through_names_and_groups() {
        let all = |n: usize| vec!["/../"; n].join(" & ");
        assert!(lark(&format!("start: A\nA: {}", all(4))).is_ok());
        for text in [
            format!("A: {}", all(5)),
            format!("A: \"x\" | /b{{24}}/ ({})", all(5)),
            format!("A: B & C\nB: {0}\nC: {0} \"c\"", all(3)),
            format!("A: ~(~({} & ~B))\nB: /./", all(2)),
            format!("start: %lark {{ start: A\nA: {} }}", all(5)),
            format!("A: /x/\n | /y/ | {}", all(5)),
        ] {
            let error = refused(&text);
            assert!(error.contains("hold at once"), "{text}: {error}");
        }
        for text in [
            "A: /(.|\\n)*[a-z]{1000}x/ & /(.|\\n)*[a-z]{1000}y/",
            "A: B & C\nB: /ab/ ~ 500\nC: (/cd/ /e/){2,500}",
        ] {
            let error = refused(text);
            assert!(error.contains("product of the lengths"), "{text}: {error}");
        }
        assert!(lark("A: /a/ ~ 3..5 \"b\" ~2 /c/ | /d/~1..3").is_ok());
    }

    #[test]
    fn a_schema_inside_of_a_grammar_is_looked_at_too() {
        assert!(lark(r#"start: %json { "type": "array", "maxItems": 3 } "x""#).is_ok());
        let many = json!({ "type": "array", "minItems": 4_000_000_000_u64 });
        assert_eq!(
            refused(&format!("start: a\na: %json {many}")),
            "must have at most 10000 items or properties, got 4000000000"
        );
        let long = json!({ "substring_chars": "ab".repeat(SUBSTRING_BYTES_MAX) });
        assert!(refused(&format!("start: A\nA: %regex {long}")).contains("after %regex"));
    }
}
