//! Mistral's `tekken.json`: byte-pair encoding over bytes after a split by pattern, control tokens at ids 0 to 999.

use std::panic::AssertUnwindSafe;
use std::path::Path;

use kitoken::{Definition, Kitoken, Model, SpecialTokenKind};
use serde::Deserialize;
use tramontane_types::TokenId;

use crate::control::ControlToken;
use crate::encoder::{Encoder, Engine, caught};
use crate::tokenizer::Parts;
use crate::vocabulary::{Token, VOCAB_MAX, Vocabulary};
use crate::{Error, InstructVersion};

/// Control tokens of files that do not list theirs (before v11), as in mistral-common's `DEPRECATED_SPECIAL_TOKENS`.
const UNLISTED: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// The parts of the file that kitoken does not read.
#[derive(Deserialize)]
struct File {
    config: Config,
    special_tokens: Option<Vec<Special>>,
}

#[derive(Deserialize)]
struct Config {
    version: String,
    default_vocab_size: usize,
    default_num_special_tokens: usize,
}

#[derive(Deserialize)]
struct Special {
    rank: TokenId,
    token_str: String,
}

/// Reads a tekken file.
pub(crate) fn load(path: &Path, bytes: &[u8]) -> Result<Parts, Error> {
    let file: File = serde_json::from_slice(bytes).map_err(|error| {
        Error::invalid_file(path, "content", "a tekken file", error.to_string())
    })?;
    let num_specials = file.config.default_num_special_tokens;
    let vocab_size = file.config.default_vocab_size;
    if vocab_size > VOCAB_MAX {
        return Err(Error::invalid_file(
            path,
            "config.default_vocab_size",
            format!("at most {VOCAB_MAX}"),
            vocab_size.to_string(),
        ));
    }
    if !(UNLISTED.len()..=vocab_size).contains(&num_specials) {
        return Err(Error::invalid_file(
            path,
            "config.default_num_special_tokens",
            format!("{} to {vocab_size}", UNLISTED.len()),
            num_specials.to_string(),
        ));
    }
    let controls = controls(path, &file, num_specials)?;
    let mut definition = caught(AssertUnwindSafe(|| {
        Definition::from_tekken_slice(bytes).map_err(|error| error.to_string())
    }))
    .map_err(|reason| Error::invalid_file(path, "content", "a tekken file", reason))?;
    // Control tokens are not known to the encoder, so no text can become one. Every byte is a token (checked below),
    // so the unknown token is not needed either.
    definition
        .specials
        .retain(|special| special.kind == SpecialTokenKind::Priority);
    let tokens = tokens(path, &definition.model, num_specials, vocab_size)?;
    let kitoken = caught(AssertUnwindSafe(|| {
        Kitoken::from_definition(definition).map_err(|error| error.to_string())
    }))
    .map_err(|reason| Error::invalid_file(path, "vocab", "a usable vocabulary", reason))?;
    let encoder = Encoder {
        start: Engine::Kitoken(Box::new(kitoken)),
        inside: None,
    };
    encoder.probe(path)?;
    let vocabulary = Vocabulary::new(path, tokens, &controls)?;
    Ok(Parts {
        bos: vocabulary.control_id("<s>"),
        eos: vocabulary.control_id("</s>"),
        unk: None,
        instruct: InstructVersion::from_name(&file.config.version),
        vocabulary,
        encoder,
        drops_leading_space: false,
        adds_bos: true,
    })
}

/// The listed control tokens, then `<SPECIAL_n>` up to the number the file reserves.
fn controls(path: &Path, file: &File, num_specials: usize) -> Result<Vec<ControlToken>, Error> {
    let mut texts: Vec<String> = (0..num_specials)
        .map(|id| format!("<SPECIAL_{id}>"))
        .collect();
    match &file.special_tokens {
        Some(listed) => {
            for special in listed {
                let place = texts.get_mut(special.rank as usize).ok_or_else(|| {
                    Error::invalid_file(
                        path,
                        format!("special_tokens: rank of {:?}", special.token_str),
                        format!("below {num_specials}"),
                        special.rank.to_string(),
                    )
                })?;
                place.clone_from(&special.token_str);
            }
        }
        None => {
            for (place, text) in texts.iter_mut().zip(UNLISTED) {
                text.clone_into(place);
            }
        }
    }
    let tokens = texts.into_iter().zip(0..).map(|(text, id)| ControlToken {
        id,
        text,
        trims_before: false,
        trims_after: false,
    });
    Ok(tokens.collect())
}

/// Bytes of every id; the ids from `num_specials` on must be complete and hold all 256 bytes.
fn tokens(
    path: &Path,
    model: &Model,
    num_specials: usize,
    vocab_size: usize,
) -> Result<Vec<Token>, Error> {
    let mut tokens = vec![Token::default(); vocab_size];
    let mut bytes_seen = [false; 256];
    for entry in model.vocab() {
        let place = (entry.id as usize >= num_specials)
            .then(|| tokens.get_mut(entry.id as usize))
            .flatten()
            .filter(|place| place.bytes.is_empty() && !entry.bytes.is_empty());
        let Some(place) = place else {
            return Err(Error::invalid_file(
                path,
                "vocab: rank",
                format!("each of 0 to {} once", vocab_size - num_specials),
                (entry.id as usize).saturating_sub(num_specials).to_string(),
            ));
        };
        if let [byte] = entry.bytes.as_slice() {
            bytes_seen[usize::from(*byte)] = true;
        }
        place.bytes = entry.bytes.as_slice().into();
    }
    if let Some(absent) = tokens[num_specials..]
        .iter()
        .position(|token| token.bytes.is_empty())
    {
        return Err(Error::invalid_file(
            path,
            format!("vocab: rank {absent}"),
            "a token",
            "absent",
        ));
    }
    if let Some(absent) = bytes_seen.iter().position(|seen| !seen) {
        return Err(Error::invalid_file(
            path,
            format!("vocab: byte {absent}"),
            "a token",
            "absent",
        ));
    }
    Ok(tokens)
}
