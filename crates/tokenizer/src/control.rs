//! Control tokens in rendered prompts: found where the template wrote them, never where a client did.
//!
//! Text that comes from a client is *guarded* before the template sees it: wherever it could be read as a control
//! token, alone or together with what the template writes beside it, a Unicode noncharacter is put in between. The
//! rendered prompt is split at control tokens, and only then are the guards taken out again.

use std::collections::HashSet;

use aho_corasick::{AhoCorasick, MatchKind};
use tramontane_types::TokenId;

/// Noncharacters (Unicode 15, section 23.7): reserved for internal use, so almost never in a text.
const NONCHARACTERS: std::ops::RangeInclusive<char> = '\u{FDD0}'..='\u{FDEF}';

/// One control token as a template may write it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ControlToken {
    pub(crate) id: TokenId,
    pub(crate) text: String,
    /// Swallows white space before it (`lstrip` of Hugging Face's files).
    pub(crate) trims_before: bool,
    /// Swallows white space after it (`rstrip`).
    pub(crate) trims_after: bool,
}

/// A stretch of a rendered prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stretch<'t> {
    /// Ordinary text, and whether anything stands before it in the prompt.
    Text {
        text: &'t str,
        is_first: bool,
    },
    Control(TokenId),
}

/// Finds and hides the texts of control tokens.
#[derive(Debug)]
pub(crate) struct ControlTexts {
    tokens: Vec<ControlToken>,
    longest_first: AhoCorasick,
    overlapping: AhoCorasick,
    proper_prefixes: HashSet<String>,
    proper_suffixes: HashSet<String>,
    joined: String, // all texts, to search for the middle of one
    longest: usize, // bytes
}

impl ControlTexts {
    /// Tokens whose text is a single character are left out: they could not be told from a client's text.
    pub(crate) fn new(tokens: &[ControlToken]) -> Result<Self, aho_corasick::BuildError> {
        let tokens: Vec<ControlToken> = tokens
            .iter()
            .filter(|token| token.text.chars().nth(1).is_some())
            .cloned()
            .collect();
        let texts: Vec<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
        let mut proper_prefixes = HashSet::new();
        let mut proper_suffixes = HashSet::new();
        for text in &texts {
            for (at, _) in text.char_indices().skip(1) {
                proper_prefixes.insert(text[..at].to_owned());
                proper_suffixes.insert(text[at..].to_owned());
            }
        }
        Ok(Self {
            longest_first: AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(&texts)?,
            overlapping: AhoCorasick::new(&texts)?,
            joined: texts.join("\0"),
            longest: texts.iter().map(|text| text.len()).max().unwrap_or(0),
            proper_prefixes,
            proper_suffixes,
            tokens,
        })
    }

    /// Splits a rendered prompt; empty stretches are left out.
    pub(crate) fn split<'t>(&self, prompt: &'t str) -> Vec<Stretch<'t>> {
        let mut stretches = Vec::new();
        let mut start = 0;
        let mut trim_start = false;
        for found in self.longest_first.find_iter(prompt) {
            let token = &self.tokens[found.pattern().as_usize()];
            let text = &prompt[start..found.start()];
            push_text(
                &mut stretches,
                text,
                trim_start,
                token.trims_before,
                start == 0,
            );
            stretches.push(Stretch::Control(token.id));
            start = found.end();
            trim_start = token.trims_after;
        }
        push_text(
            &mut stretches,
            &prompt[start..],
            trim_start,
            false,
            start == 0,
        );
        stretches
    }

    /// Puts `guard` wherever `text` could become part of a control token.
    pub(crate) fn guard(&self, text: &str, guard: char) -> String {
        let mut places: Vec<usize> = Vec::new();
        if self.may_end_a_control(text) {
            places.push(0);
        }
        for found in self.overlapping.find_overlapping_iter(text) {
            let first = text[found.start()..]
                .chars()
                .next()
                .map_or(0, char::len_utf8);
            places.push(found.start() + first);
        }
        if self.may_begin_a_control(text) {
            places.push(text.len());
        }
        places.sort_unstable();
        places.dedup();

        let mut guarded = String::with_capacity(text.len() + places.len() * guard.len_utf8());
        let mut start = 0;
        for place in places {
            guarded.push_str(&text[start..place]);
            guarded.push(guard);
            start = place;
        }
        guarded.push_str(&text[start..]);
        guarded
    }

    /// True if what stands before `text` could complete it to a control token, or to the middle of one.
    fn may_end_a_control(&self, text: &str) -> bool {
        let begins_with_an_end = text
            .char_indices()
            .map(|(at, c)| at + c.len_utf8())
            .take_while(|end| *end <= self.longest)
            .any(|end| self.proper_suffixes.contains(&text[..end]));
        let is_a_middle =
            !text.is_empty() && text.len() < self.longest && self.joined.contains(text);
        begins_with_an_end || is_a_middle
    }

    /// True if what stands after `text` could complete it to a control token.
    fn may_begin_a_control(&self, text: &str) -> bool {
        text.char_indices()
            .rev()
            .map(|(at, _)| at)
            .take_while(|at| text.len() - at <= self.longest)
            .any(|at| self.proper_prefixes.contains(&text[at..]))
    }
}

fn push_text<'t>(
    stretches: &mut Vec<Stretch<'t>>,
    mut text: &'t str,
    trim_start: bool,
    trim_end: bool,
    is_first: bool,
) {
    if trim_start {
        text = text.trim_start();
    }
    if trim_end {
        text = text.trim_end();
    }
    if !text.is_empty() {
        stretches.push(Stretch::Text { text, is_first });
    }
}

/// Which noncharacters occur in some texts.
#[derive(Debug, Default)]
pub(crate) struct Noncharacters {
    used: HashSet<char>,
}

impl Noncharacters {
    pub(crate) fn note(&mut self, text: &str) {
        self.used
            .extend(text.chars().filter(|c| NONCHARACTERS.contains(c)));
    }

    pub(crate) fn unused(&self) -> impl Iterator<Item = char> {
        NONCHARACTERS.filter(|c| !self.used.contains(c))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn texts(all: &[&str]) -> ControlTexts {
        let tokens: Vec<ControlToken> = all
            .iter()
            .zip(0..)
            .map(|(text, id)| ControlToken {
                id,
                text: (*text).to_owned(),
                trims_before: false,
                trims_after: *text == "<trim>",
            })
            .collect();
        ControlTexts::new(&tokens).unwrap()
    }

    fn show(stretches: &[Stretch<'_>]) -> String {
        let shown: Vec<String> = stretches
            .iter()
            .map(|stretch| match stretch {
                Stretch::Text { text, is_first } => {
                    format!("{text:?}{}", if *is_first { "^" } else { "" })
                }
                Stretch::Control(id) => id.to_string(),
            })
            .collect();
        shown.join(" ")
    }

    #[test]
    fn a_prompt_is_split_at_the_longest_control_tokens() {
        let texts = texts(&["<s>", "[INST]", "[INST]x", "<trim>"]);
        assert_eq!(
            show(&texts.split("a<s>[INST] b[INST]xc")),
            r#""a"^ 0 1 " b" 2 "c""#
        );
        assert_eq!(show(&texts.split("<trim> \n a")), r#"3 "a""#);
        assert_eq!(show(&texts.split("")), "");
    }

    #[test]
    fn noncharacters_that_a_text_holds_are_not_chosen() {
        let mut seen = Noncharacters::default();
        seen.note("a\u{FDD0}b\u{FDD2}");
        assert_eq!(
            seen.unused().take(2).collect::<String>(),
            "\u{FDD1}\u{FDD3}"
        );
        seen.note(&NONCHARACTERS.collect::<String>());
        assert_eq!(seen.unused().next(), None);
    }

    proptest! {
        /// Whatever stands around guarded texts, every control token found lies outside of them.
        #[test]
        fn guarded_text_never_takes_part_in_a_control_token(
            parts in proptest::collection::vec(("[<>ab/]{0,4}", "[<>ab/]{0,5}"), 1..5),
        ) {
            let texts = texts(&["<a>", "</a>", "ab<", "<<", "<a>b"]);
            let mut prompt = String::new();
            let mut client = Vec::new(); // for each byte of the prompt: does it come from a client
            let mut kept = String::new();
            for (template, content) in &parts {
                prompt.push_str(template);
                client.resize(prompt.len(), false);
                prompt.push_str(&texts.guard(content, '\u{FDD0}'));
                client.resize(prompt.len(), true);
                kept.push_str(template);
                kept.push_str(content);
            }
            for found in texts.longest_first.find_iter(&prompt) {
                prop_assert!(client[found.start()..found.end()].iter().all(|client| !client), "{prompt:?}");
            }
            prop_assert_eq!(prompt.replace('\u{FDD0}', ""), kept);
        }
    }
}
