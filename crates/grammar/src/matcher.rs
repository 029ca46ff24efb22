//! Where one sequence is in its grammar. Never waits, and never looks at anything but its tokens.

use std::collections::HashSet;
use std::fmt;
use std::panic::AssertUnwindSafe;

use llguidance::api::StopReason;
use llguidance::earley::CGrammar;
use llguidance::{CancellationHandle, TokenParser};
use toktrie::SimpleVob;
use tramontane_types::TokenId;

use crate::error::shortened;
use crate::limits::MATCHER_BYTES_MAX;
use crate::{GrammarError, MatchError};

/// What llguidance keeps per item of its parser, with room to grow.
const ITEM_BYTES: usize = 32;
/// What a sequence has beside tables that grow.
const BASE_BYTES: usize = 64 << 10;
/// What a compiled grammar takes, about and rather more: per byte of the constraint, and per symbol, part of a rule and
/// lexeme that was made of it. Measured with schemas of 3 to 1,200 properties, enumerations, expressions and rules:
/// 0.9 to 1.5 times what the process grew by.
const SOURCE_BYTES: usize = 16;
const SYMBOL_BYTES: usize = 512;
const RULE_PART_BYTES: usize = 32;
const LEXEME_BYTES: usize = 1024;

/// A compiled constraint, at its begin.
pub struct Grammar {
    begin: TokenParser,
    first: TokenMask,
    /// What a sequence begins with.
    state_bytes: usize,
    num_bytes: usize,
}

/// The place of one sequence in its grammar.
pub struct Matcher {
    parser: TokenParser,
    place: Place,
    canceller: Canceller,
    /// Items of the parser that are there to stay.
    num_items: usize,
    num_bytes: usize,
}

/// What is known of the next token.
#[derive(Debug)]
enum Place {
    /// Nothing yet.
    Unknown,
    /// One of these.
    Open(TokenMask),
    /// There is none: the text is whole.
    Ended,
    /// There is none, and the text is not whole.
    Broken(MatchError),
}

/// What may come next.
#[derive(Clone, Copy, Debug)]
pub enum Next<'a> {
    /// One of these tokens.
    OneOf(&'a TokenMask),
    /// Nothing: the text is whole.
    Ended,
}

/// A set of tokens.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenMask(SimpleVob);

/// Ends the work of a [`Matcher`] that another thread has, and with it the matcher.
#[derive(Clone, Debug)]
pub struct Canceller(CancellationHandle);

impl Grammar {
    pub(crate) fn new(mut begin: TokenParser, source_bytes: usize) -> Result<Self, GrammarError> {
        begin.start_without_prompt();
        let first = mask(&mut begin)?;
        let state_bytes =
            lexer_bytes(&begin) + begin.parser_stats().all_items * ITEM_BYTES + BASE_BYTES;
        let rules_bytes = rules_bytes(begin.parser.grammar());
        let num_bytes = state_bytes + rules_bytes + source_bytes * SOURCE_BYTES;
        Ok(Self {
            begin,
            first,
            state_bytes,
            num_bytes,
        })
    }

    /// A sequence that has sampled these tokens.
    ///
    /// # Errors
    /// When they are no begin of a word of the grammar.
    pub fn matcher(&self, resumed: &[TokenId]) -> Result<Matcher, GrammarError> {
        // Tables of its own: what it costs, and whether that is too much, depends on nobody else.
        let mut parser = self.begin.deep_clone();
        let canceller = Canceller(parser.enable_cancellation());
        let mut matcher = Matcher {
            parser,
            place: Place::Open(self.first.clone()),
            canceller,
            num_items: 0,
            num_bytes: self.state_bytes,
        };
        for (index, &id) in resumed.iter().enumerate() {
            matcher
                .accept(id)
                .map_err(|_not_allowed| GrammarError::Resumed { index, id })?;
        }
        matcher.allowed()?;
        Ok(matcher)
    }

    /// What it takes, about.
    #[must_use]
    pub const fn num_bytes(&self) -> usize {
        self.num_bytes
    }
}

impl Matcher {
    /// Goes on by a token.
    ///
    /// # Errors
    /// When it is not allowed here; then and later.
    pub fn accept(&mut self, id: TokenId) -> Result<(), MatchError> {
        match &self.place {
            Place::Broken(error) => return Err(error.clone()),
            Place::Ended => return self.breaks(MatchError::NotAllowed { id }),
            Place::Open(mask) if !mask.allows(id) => {
                return self.breaks(MatchError::NotAllowed { id });
            }
            Place::Open(_) | Place::Unknown => {}
        }
        let before = self.parser.parser_stats().all_items;
        let parser = &mut self.parser;
        let taken = guarded(|| {
            parser.consume_token(id)?;
            parser.check_stop()
        });
        self.num_items += self.parser.parser_stats().all_items.saturating_sub(before);
        match taken {
            Ok(true) => self.place = Place::Ended,
            Ok(false) => self.place = Place::Unknown,
            Err(text) => {
                let is_known = matches!(self.place, Place::Open(_));
                let error = match self.parser.stop_reason() {
                    StopReason::Cancelled => MatchError::Cancelled,
                    // Its mask has it, so it is not the token that is wrong.
                    _ if is_known => MatchError::NoMask(shortened(&text)),
                    _ => MatchError::NotAllowed { id },
                };
                return self.breaks(error);
            }
        }
        self.measure()
    }

    /// What may come next; found once.
    ///
    /// # Errors
    /// When that is too much work, or no token goes on.
    pub fn allowed(&mut self) -> Result<Next<'_>, MatchError> {
        if matches!(self.place, Place::Unknown) {
            match mask(&mut self.parser) {
                Ok(mask) => self.place = Place::Open(mask),
                Err(error) => return self.breaks(error),
            }
            self.measure()?;
        }
        match &self.place {
            Place::Open(mask) => Ok(Next::OneOf(mask)),
            Place::Ended => Ok(Next::Ended),
            Place::Broken(error) => Err(error.clone()),
            Place::Unknown => Err(MatchError::NoMask("it was not looked for".to_owned())),
        }
    }

    /// Whether the text is whole, and nothing may follow.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        matches!(self.place, Place::Ended)
    }

    /// Whether the text so far is a word of the grammar.
    pub fn is_accepting(&mut self) -> bool {
        let parser = &mut self.parser;
        self.place.is_ended() || guarded(|| Ok::<_, String>(parser.is_accepting())).unwrap_or(false)
    }

    /// Ends what another thread does with it.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// What it takes, about.
    #[must_use]
    pub const fn num_bytes(&self) -> usize {
        self.num_bytes
    }

    fn measure(&mut self) -> Result<(), MatchError> {
        self.num_bytes = BASE_BYTES + lexer_bytes(&self.parser) + self.num_items * ITEM_BYTES;
        if self.num_bytes > MATCHER_BYTES_MAX {
            let (limit, got) = (MATCHER_BYTES_MAX, self.num_bytes);
            return self.breaks(MatchError::TooLarge { limit, got });
        }
        Ok(())
    }

    fn breaks<T>(&mut self, error: MatchError) -> Result<T, MatchError> {
        self.place = Place::Broken(error.clone());
        Err(error)
    }
}

impl Place {
    const fn is_ended(&self) -> bool {
        matches!(self, Self::Ended)
    }
}

impl TokenMask {
    /// Whether a token is in it.
    #[must_use]
    pub fn allows(&self, id: TokenId) -> bool {
        (id as usize) < self.0.len() && self.0.is_allowed(id)
    }

    /// How many tokens are in it.
    #[must_use]
    pub fn num_allowed(&self) -> usize {
        self.0.num_set()
    }

    /// Takes all other tokens out of the choice. Tokens beyond the vocabulary are not in it.
    pub fn apply(&self, logits: &mut [f32]) {
        let mut words = self.0.as_slice().iter();
        let mut left = self.0.len();
        for block in logits.chunks_mut(u32::BITS as usize) {
            let mut word = words.next().copied().unwrap_or(0);
            if left < u32::BITS as usize {
                word &= (1_u32 << left) - 1;
            }
            left = left.saturating_sub(u32::BITS as usize);
            match word {
                u32::MAX => {}
                0 => block.fill(f32::NEG_INFINITY),
                _ => {
                    for (bit, logit) in block.iter_mut().enumerate() {
                        if word & (1 << bit) == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }
}

impl Canceller {
    /// Ends it, soon.
    pub fn cancel(&self) {
        self.0.cancel();
    }
}

fn lexer_bytes(parser: &TokenParser) -> usize {
    parser.parser.lexer_stats().num_bytes
}

/// What the rules take that can be reached from the first.
fn rules_bytes(grammar: &CGrammar) -> usize {
    let mut known = HashSet::from([grammar.start().as_index()]);
    let mut todo = vec![grammar.start()];
    let mut num_parts = 0;
    while let Some(symbol) = todo.pop() {
        for &rule in grammar.rules_of(symbol) {
            let (parts, _, _) = grammar.rule_rhs(rule);
            num_parts += parts.len() + 1;
            todo.extend(parts.iter().filter(|part| known.insert(part.as_index())));
        }
    }
    let num_lexemes = grammar.lexer_spec().lexemes.len();
    known.len() * SYMBOL_BYTES + num_parts * RULE_PART_BYTES + num_lexemes * LEXEME_BYTES
}

fn mask(parser: &mut TokenParser) -> Result<TokenMask, MatchError> {
    guarded(|| parser.compute_mask())
        .map(TokenMask)
        .map_err(|text| match parser.stop_reason() {
            StopReason::Cancelled => MatchError::Cancelled,
            StopReason::NoExtensionBias => {
                MatchError::NoMask("no token of the vocabulary goes on".to_owned())
            }
            _ => MatchError::NoMask(shortened(&text)),
        })
}

/// Calls into llguidance; its errors and panics as text.
pub(crate) fn guarded<T, E: fmt::Display>(
    work: impl FnOnce() -> Result<T, E>,
) -> Result<T, String> {
    // Its own guard keeps the panic's text and place out of standard error.
    let done = llguidance::panic_utils::catch_unwind(AssertUnwindSafe(|| Ok(work())));
    match done {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(format!("{error:#}")),
        Err(panic) => {
            let what = shortened(&panic.to_string());
            tracing::error!(what, "llguidance panicked");
            Err(what)
        }
    }
}

impl fmt::Debug for Grammar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grammar")
            .field("num_bytes", &self.num_bytes)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Matcher")
            .field("place", &self.place)
            .field("num_bytes", &self.num_bytes)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for TokenMask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenMask({} of {})", self.0.num_set(), self.0.len())
    }
}
