//! Why a constraint is refused, and why a sequence cannot go on in its grammar. Never carries text of an answer.

use std::time::Duration;

use tramontane_types::TokenId;

use crate::limits::ERROR_CHARS_MAX;

/// Why a constraint cannot be used. Reads on from the name of the parameter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GrammarError {
    /// Nothing between the quotes.
    #[error("must not be empty")]
    Empty,
    /// A limit of [`crate::limits`].
    #[error("must have at most {limit} {what}, got {got}")]
    TooLarge {
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: usize,
        /// What came.
        got: usize,
    },
    /// It says nothing that can be followed.
    #[error("cannot be followed: {0}")]
    Invalid(String),
    /// Compiling it is not done in time.
    #[error("takes longer than {} s to compile", limit.as_secs())]
    TooSlow {
        /// The limit.
        limit: Duration,
    },
    /// Too many others wait.
    #[error("cannot be compiled now: {limit} others wait")]
    Busy {
        /// The limit.
        limit: usize,
    },
    /// It has waited for a thread too long.
    #[error("cannot be compiled now: it has waited for {} s", limit.as_secs())]
    Waited {
        /// The limit.
        limit: Duration,
    },
    /// Too many others take too long.
    #[error("cannot be compiled now: more than {limit} others take too long")]
    Stuck {
        /// The limit.
        limit: usize,
    },
    /// A fault of ours: no thread, or a vocabulary that llguidance does not take.
    #[error("cannot be compiled: {0}")]
    Internal(String),
    /// A token that was sampled earlier.
    #[error("does not allow resumed token {index}, id {id}")]
    Resumed {
        /// Its position in the output.
        index: usize,
        /// The token.
        id: TokenId,
    },
    /// The first tokens cannot be found.
    #[error(transparent)]
    Match(#[from] MatchError),
}

impl GrammarError {
    /// A fault around the compiler.
    #[must_use]
    pub fn internal(fault: &dyn std::fmt::Display) -> Self {
        Self::Internal(shortened(&fault.to_string()))
    }

    /// What llguidance says, in short.
    pub(crate) fn invalid(text: &str) -> Self {
        Self::Invalid(shortened(text))
    }

    /// Whether the same constraint may be taken later.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Busy { .. } | Self::Waited { .. } | Self::Stuck { .. } | Self::TooSlow { .. }
        )
    }

    /// Whether it says something about the server instead of the constraint.
    #[must_use]
    pub const fn is_internal(&self) -> bool {
        matches!(self, Self::Internal(_))
    }
}

/// Why a sequence cannot go on in its grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MatchError {
    /// The token is no word of the grammar here.
    #[error("the grammar does not allow token {id} here")]
    NotAllowed {
        /// The token.
        id: TokenId,
    },
    /// What may come next is too much work, or nothing.
    #[error("the grammar's next tokens cannot be found: {0}")]
    NoMask(String),
    /// The state has grown beyond its limit.
    #[error("the grammar's state has {got} bytes, expected at most {limit}")]
    TooLarge {
        /// The limit.
        limit: usize,
        /// What it has.
        got: usize,
    },
    /// Somebody did not want to wait any longer.
    #[error("the grammar was given up")]
    Cancelled,
}

/// The first lines of a text, without control characters and without the backtrace that llguidance adds to panics.
pub(crate) fn shortened(text: &str) -> String {
    let text = text.split("\n<").next().unwrap_or_default();
    let mut short = String::new();
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()) {
        if word.is_empty() {
            continue;
        }
        if !short.is_empty() {
            short.push(' ');
        }
        short.push_str(word);
        if short.chars().count() > ERROR_CHARS_MAX {
            let mut cut: String = short.chars().take(ERROR_CHARS_MAX).collect();
            cut.push('…');
            return cut;
        }
    }
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_text_of_llguidance_is_cut_and_has_no_control_characters() {
        assert_eq!(shortened("a\n\u{1b}[31m b\t c\n<state>x"), "a [31m b c");
        let long = shortened(&"ä".repeat(1000));
        assert_eq!(long.chars().count(), ERROR_CHARS_MAX + 1);
        assert!(long.ends_with('…'));
    }
}
