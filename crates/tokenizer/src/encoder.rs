//! Text to token ids by one of two libraries. Never produces a control token, and turns their panics into errors.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use kitoken::{Kitoken, SpecialTokenKind};
use tramontane_types::TokenId;

use crate::Error;

/// Tried on every tokenizer at load: patterns that backtrack without end show it on runs like these.
const PROBES: [&str; 6] = [
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!",
    "                                                                x",
    "1111111111111111111111111111111111111111111111111111111111111111x",
    "\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n!",
    "ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab ab!",
    "Îñţérñåţîöñåļ 🙂 [INST] </s> ............................",
];

/// Where a stretch of text stands in a prompt: SentencePiece models put a space before the first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Position {
    Start,
    Inside,
}

/// When the space that SentencePiece models put before a text is put there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LeadingSpace {
    /// Before every stretch between control tokens (Mistral's own code, `Prepend`).
    Every,
    /// Only before a stretch that opens the prompt (`prepend_scheme: first`).
    First,
    /// Nowhere.
    Never,
}

/// One library's encoder.
#[derive(Debug)]
pub(crate) enum Engine {
    Kitoken(Box<Kitoken>),
    HuggingFace(Box<tokenizers::Tokenizer>),
}

/// The engine for the start of a text and, where it differs, the one for the rest.
#[derive(Debug)]
pub(crate) struct Encoder {
    pub(crate) start: Engine,
    pub(crate) inside: Option<Engine>,
}

impl Encoder {
    pub(crate) fn encode(&self, text: &str, position: Position) -> Result<Vec<TokenId>, Error> {
        let engine = match (&self.inside, position) {
            (Some(inside), Position::Inside) => inside,
            _ => &self.start,
        };
        engine
            .encode(text)
            .map_err(|reason| Error::Encode { reason })
    }

    /// Encodes a few hard texts, so that a pattern that runs away is found before the first request.
    pub(crate) fn probe(&self, path: &Path) -> Result<(), Error> {
        for engine in [Some(&self.start), self.inside.as_ref()]
            .into_iter()
            .flatten()
        {
            for probe in PROBES {
                engine.encode(probe).map_err(|reason| {
                    Error::invalid_file(path, "encoding of a test text", "token ids", reason)
                })?;
            }
        }
        Ok(())
    }
}

impl Engine {
    fn encode(&self, text: &str) -> Result<Vec<TokenId>, String> {
        if text.is_empty() {
            return Ok(Vec::new());
        }
        // Both engines are only read, so a panic leaves nothing half done.
        caught(AssertUnwindSafe(|| match self {
            Self::Kitoken(kitoken) => kitoken
                .encode(text, [SpecialTokenKind::Priority].as_slice())
                .map_err(|error| error.to_string()),
            Self::HuggingFace(tokenizer) => tokenizer
                .encode_fast(text, false)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| error.to_string()),
        }))
    }
}

/// Runs `work` and turns a panic into its message.
pub(crate) fn caught<T>(
    work: impl FnOnce() -> Result<T, String> + std::panic::UnwindSafe,
) -> Result<T, String> {
    catch_unwind(work).unwrap_or_else(|panic| {
        let message = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(message.unwrap_or("the library panicked").to_owned())
    })
}
