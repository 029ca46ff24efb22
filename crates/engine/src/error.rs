//! Why an engine could not be made, a sequence not be taken, or a step not be computed.

use tramontane_types::{InvalidSampling, LayerId, RequestId, TokenId};

/// Why an engine could not be made or a step not be computed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A limit breaks its rule.
    #[error("{key} must be {rule}, got {got}")]
    InvalidConfig {
        /// Which limit.
        key: &'static str,
        /// What is allowed.
        rule: String,
        /// What came.
        got: usize,
    },
    /// Rows could not be sent to the experts, or their results did not come back.
    #[error("layer {layer}: the exchange did not complete")]
    Exchange {
        /// Where the step stopped.
        layer: LayerId,
        /// What the exchange says.
        #[source]
        source: tramontane_exchange::Error,
    },
    /// The attention backend refused.
    #[error("the attention backend refused to {stage}")]
    Backend {
        /// `begin`, `attend` or `compute logits`.
        stage: &'static str,
        /// What the backend says.
        #[source]
        source: tramontane_compute::Error,
    },
    /// The system gives no thread.
    #[error("no thread to find masks with")]
    Thread {
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// The backend returned fewer or more than was wanted.
    #[error("expected {expected} {what}, got {got}")]
    OutputsLen {
        /// `logits`, or `tokens` that it has chosen.
        what: &'static str,
        /// One for each row that wants it; of logits, times the vocabulary.
        expected: usize,
        /// What came.
        got: usize,
    },
}

impl Error {
    /// Whether calling [`crate::Engine::step`] again may succeed: true when workers did not answer, for
    /// they may come back or be replaced; false when somebody refused what the step asked for.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Exchange { source, .. } if source.is_retryable())
    }

    /// The error and its causes in one line.
    pub(crate) fn with_causes(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(inner) = cause {
            text = format!("{text}: {inner}");
            cause = inner.source();
        }
        text
    }
}

/// Why a sequence was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The queue is full; another worker may have room.
    #[error("the queue holds {limit} sequences, its limit")]
    QueueFull {
        /// Length of the queue.
        limit: usize,
    },
    /// The prompt leaves no room to sample a token.
    #[error("the prompt has {tokens} tokens, expected at most {limit}")]
    TooLong {
        /// Length of the prompt.
        tokens: usize,
        /// One less than the model's context.
        limit: usize,
    },
    /// The whole KV cache is too small for the prompt and one token.
    #[error("the prompt and a token need {pages} pages of KV cache, this worker has {limit}")]
    NeverFits {
        /// Pages needed at once.
        pages: usize,
        /// Pages of this engine.
        limit: usize,
    },
    /// No prompt token.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// More sampled tokens than the prompt carries (it must keep at least one token of its own).
    #[error("{num_resumed} resumed tokens in a prompt of {tokens} tokens, expected fewer")]
    ResumedTooMany {
        /// Tokens said to be sampled earlier.
        num_resumed: usize,
        /// Length of the prompt, resumed tokens included.
        tokens: usize,
    },
    /// A prompt token is not in the vocabulary.
    #[error("token id {id} is not below the vocabulary size {vocab}")]
    TokenOutOfRange {
        /// The token.
        id: TokenId,
        /// Size of the vocabulary.
        vocab: usize,
    },
    /// A sampling parameter is outside its range.
    #[error(transparent)]
    InvalidSampling(#[from] InvalidSampling),
    /// It has a constraint, and came without a place in its grammar.
    #[error("the sequence has a constraint, and nobody has compiled it")]
    NoGrammar,
    /// The grammars of all sequences take too much; another worker may have room.
    #[error("the grammars of all sequences have {limit} bytes, their limit")]
    GrammarsFull {
        /// The limit.
        limit: usize,
    },
    /// Masks of others take too long; another worker may have threads for them.
    #[error("more than {limit} masks take too long, and a constraint would wait for them")]
    MasksSlow {
        /// Masks that may.
        limit: usize,
    },
    /// A sequence of this id is already here.
    #[error("request {id} is already here")]
    Duplicate {
        /// The id.
        id: RequestId,
    },
}

impl SubmitError {
    /// Whether the same sequence may be taken later or by another worker of the same kind.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::QueueFull { .. } | Self::GrammarsFull { .. } | Self::MasksSlow { .. }
        )
    }
}
