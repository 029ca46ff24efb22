//! Grammars from the outside: what they allow, that it depends on tokens alone, and what hostile ones cost.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says so at once"
)]

mod hostile;
mod words;

use std::sync::Arc;

use tramontane_grammar::{Grammars, Matcher, Next, Token, Vocabulary};
use tramontane_types::{Constraint, TokenId};

/// Longer tokens than bytes: parts of JSON, of words, and of characters.
const LONGER: [&str; 24] = [
    "{\"", "\":", "\": ", "\",", "\"}", "},", "[\"", "\"]", "true", "false", "null", "12", "3.5",
    "e", " a", " the", "name", "ab", "aab", "é", "  ", "\n", "-1", "},{",
];
/// The token that ends an answer.
pub(crate) const EOS: TokenId = 256;
/// `[TOOL_CALLS]`.
pub(crate) const TOOL_CALLS: TokenId = 257;

/// All bytes, some longer tokens, and two control tokens.
pub(crate) fn vocabulary() -> Vocabulary {
    let bytes: Vec<[u8; 1]> = (0..=255).map(|byte| [byte]).collect();
    let mut tokens: Vec<Token<'_>> = bytes.iter().map(|byte| Token::Text(byte)).collect();
    tokens.push(Token::Control(b"</s>"));
    tokens.push(Token::Control(b"[TOOL_CALLS]"));
    // An id that is not used, and one with the bytes of another.
    tokens.push(Token::Text(b""));
    tokens.push(Token::Text(b"{"));
    tokens.extend(LONGER.iter().map(|text| Token::Text(text.as_bytes())));
    Vocabulary::new(tokens, &[EOS]).unwrap()
}

pub(crate) fn grammars() -> Grammars {
    Grammars::new(vocabulary())
}

pub(crate) fn json_schema(schema: &serde_json::Value) -> Arc<Constraint> {
    Arc::new(Constraint::JsonSchema(schema.to_string().into()))
}

pub(crate) fn regex(text: &str) -> Arc<Constraint> {
    Arc::new(Constraint::Regex(text.into()))
}

pub(crate) fn lark(text: &str) -> Arc<Constraint> {
    Arc::new(Constraint::Lark(text.into()))
}

/// Numbers that look random and are the same every time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }
}

/// A token that is allowed, or nothing at the end.
pub(crate) fn draw(matcher: &mut Matcher, vocab: usize, dice: &mut Dice) -> Option<TokenId> {
    let Next::OneOf(mask) = matcher.allowed().unwrap() else {
        return None;
    };
    let allowed: Vec<TokenId> = (0..vocab as TokenId)
        .filter(|&id| mask.allows(id))
        .collect();
    assert_eq!(allowed.len(), mask.num_allowed());
    Some(allowed[dice.below(allowed.len())])
}

/// The tokens of some word of the grammar, as far as `tokens_max`; its text, and whether it is whole.
pub(crate) fn say(
    matcher: &mut Matcher,
    vocabulary: &Vocabulary,
    seed: u64,
    tokens_max: usize,
) -> (Vec<TokenId>, Vec<u8>, bool) {
    let (mut tokens, mut text, mut dice) = (Vec::new(), Vec::new(), Dice(seed));
    for _ in 0..tokens_max {
        let Some(id) = draw(matcher, vocabulary.words().len(), &mut dice) else {
            return (tokens, text, true);
        };
        matcher.accept(id).unwrap();
        tokens.push(id);
        if id == EOS {
            assert!(matcher.has_ended());
            return (tokens, text, true);
        }
        text.extend_from_slice(&vocabulary.words()[id as usize]);
    }
    (tokens, text, matcher.has_ended())
}
