//! Which tokens may come next when an answer must be a word of a language: the one door to llguidance.
//! Never sees logits, never samples, never reads a file or a socket.
//!
//! [`Grammars`] compiles constraints against one [`Vocabulary`], on threads of its own, and keeps what it compiled. A
//! [`Grammar`] gives a [`Matcher`] to each sequence, which says what is allowed after the tokens that it accepted.
//! What it says depends on the constraint, the vocabulary and those tokens alone: never on other sequences, on time,
//! or on whether the tokens came one by one or all together.
//!
//! Constraints come from clients. So everything that they cost has a limit ([`limits`]), a panic inside of llguidance
//! is an error of that request, and nothing is ever fetched for them.

mod cache;
mod check;
mod compile;
mod error;
mod grammars;
pub mod limits;
mod matcher;
mod pool;
mod vocabulary;

pub use compile::spaced;
pub use error::{GrammarError, MatchError};
pub use grammars::{GrammarStats, Grammars};
pub use matcher::{Canceller, Grammar, Matcher, Next, TokenMask};
pub use vocabulary::{InvalidVocabulary, TOKEN_BYTES_MAX, Token, VOCABULARY_MAX, Vocabulary};
