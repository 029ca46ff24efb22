//! SentencePiece models (`tokenizer.model`), Mistral's v1, v2, v3 and v7 among them. Only the kind these are:
//! byte-pair encoding, no normalisation, a space put before the text.

use std::collections::{BTreeMap, HashSet};
use std::panic::AssertUnwindSafe;
use std::path::Path;

use kitoken::{Definition, Kitoken, Normalization, SpecialToken, SpecialTokenKind};
use sentencepiece_model::{ModelType, SentencePieceModel, Type};
use tramontane_types::TokenId;

use crate::added::AddedTokens;
use crate::control::ControlToken;
use crate::encoder::{Encoder, Engine, LeadingSpace, caught};
use crate::tokenizer::Parts;
use crate::vocabulary::{Token, VOCAB_MAX, Vocabulary};
use crate::{Error, InstructVersion};

/// Longest piece: far above any real one (16 characters by default). Each is looked at in all its halves when it is read.
const PIECE_BYTES_MAX: usize = 1024;
/// How SentencePiece writes a space inside a piece.
pub(crate) const SPACE: char = '▁';

/// Reads a model; `added` are tokens of the model directory that lie behind it or rename its control tokens.
pub(crate) fn load(
    path: &Path,
    bytes: &[u8],
    added: &AddedTokens,
    spaces: LeadingSpace,
) -> Result<Parts, Error> {
    let model = SentencePieceModel::from_slice(bytes).map_err(|error| {
        Error::invalid_file(path, "content", "a SentencePiece model", error.to_string())
    })?;
    check(path, &model)?;
    let mut definition = caught(AssertUnwindSafe(|| {
        Definition::from_sentencepiece_slice(bytes).map_err(|error| error.to_string())
    }))
    .map_err(|reason| Error::invalid_file(path, "content", "a SentencePiece model", reason))?;
    if definition.model.vocab().is_empty() {
        let expected = "at least one of text or of a byte";
        return Err(Error::invalid_file(path, "pieces", expected, "none"));
    }

    let (tokens, mut controls) = read_pieces(path, &model)?;
    // Control tokens are not known to the encoder, so no text can become one.
    definition
        .specials
        .retain(|special| special.kind != SpecialTokenKind::Control);
    for (id, token) in added {
        let index = *id as usize;
        let is_own = index < tokens.len();
        let is_own_control = controls.contains_key(id);
        if is_own && !is_own_control {
            continue; // an ordinary piece, listed once more
        }
        if is_own_control || token.special {
            controls.insert(*id, control(*id, token));
        } else {
            definition
                .specials
                .push(matched_in_text(*id, &token.content));
        }
    }
    let dummy_prefix = model
        .normalizer()
        .is_none_or(|normalizer| normalizer.add_dummy_prefix());
    let encoder = build_encoder(path, definition, dummy_prefix, spaces)?;
    let trainer = model.trainer();
    let tokens = with_matched(tokens, added, &controls);
    let controls: Vec<ControlToken> = controls.into_values().collect();
    let vocabulary = Vocabulary::new(path, tokens, &controls)?;
    Ok(Parts {
        bos: trainer.and_then(|trainer| TokenId::try_from(trainer.bos_id()).ok()),
        eos: trainer.and_then(|trainer| TokenId::try_from(trainer.eos_id()).ok()),
        unk: trainer.and_then(|trainer| TokenId::try_from(trainer.unk_id()).ok()),
        instruct: Some(InstructVersion::of_sentencepiece(&vocabulary)),
        vocabulary,
        encoder,
        drops_leading_space: dummy_prefix,
        adds_bos: true,
    })
}

/// Everything that would make our output differ from SentencePiece's is refused here.
fn check(path: &Path, model: &SentencePieceModel) -> Result<(), Error> {
    if model.pieces.is_empty() || model.pieces.len() > VOCAB_MAX {
        return Err(Error::invalid_file(
            path,
            "number of pieces",
            format!("1 to {VOCAB_MAX}"),
            model.pieces.len().to_string(),
        ));
    }
    let mut lens = model
        .pieces
        .iter()
        .map(|piece| piece.piece().len())
        .enumerate();
    if let Some((id, len)) = lens.find(|(_, len)| *len > PIECE_BYTES_MAX) {
        return Err(Error::invalid_file(
            path,
            format!("length of piece {id}"),
            format!("at most {PIECE_BYTES_MAX} bytes"),
            len.to_string(),
        ));
    }
    if let Some(trainer) = model.trainer() {
        if trainer.model_type() != ModelType::Bpe {
            let actual = format!("{:?}", trainer.model_type());
            return Err(Error::invalid_file(
                path,
                "trainer_spec.model_type",
                "Bpe",
                actual,
            ));
        }
        if trainer.treat_whitespace_as_suffix() {
            return Err(Error::invalid_file(
                path,
                "trainer_spec.treat_whitespace_as_suffix",
                "false",
                "true",
            ));
        }
    } else {
        return Err(Error::invalid_file(
            path,
            "trainer_spec",
            "present",
            "absent",
        ));
    }
    if let Some(normalizer) = model.normalizer() {
        if !normalizer.precompiled_charsmap().is_empty() || normalizer.name() != "identity" {
            return Err(Error::invalid_file(
                path,
                "normalizer_spec.name",
                "identity",
                normalizer.name(),
            ));
        }
        if normalizer.remove_extra_whitespaces() {
            return Err(Error::invalid_file(
                path,
                "normalizer_spec.remove_extra_whitespaces",
                "false",
                "true",
            ));
        }
    }
    Ok(())
}

type Controls = BTreeMap<TokenId, ControlToken>;

fn read_pieces(path: &Path, model: &SentencePieceModel) -> Result<(Vec<Token>, Controls), Error> {
    let mut tokens = Vec::with_capacity(model.pieces.len());
    let mut controls = Controls::new();
    let mut bytes_seen = HashSet::new();
    for (piece, id) in model.pieces.iter().zip(0..) {
        let text = piece.piece();
        let bytes = match piece.r#type() {
            Type::Byte => {
                let byte = parse_byte(text).ok_or_else(|| {
                    Error::invalid_file(path, format!("byte piece {id}"), "<0x00> to <0xFF>", text)
                })?;
                bytes_seen.insert(byte);
                vec![byte]
            }
            Type::Control | Type::Unknown => {
                let token = ControlToken {
                    id,
                    text: text.to_owned(),
                    trims_before: false,
                    trims_after: false,
                };
                controls.insert(id, token);
                text.as_bytes().to_vec()
            }
            Type::Normal | Type::UserDefined | Type::Unused => {
                text.replace(SPACE, " ").into_bytes()
            }
        };
        tokens.push(Token {
            bytes: bytes.into(),
            is_control: false,
        });
    }
    let falls_back = model
        .trainer()
        .is_some_and(|trainer| trainer.byte_fallback());
    if falls_back && bytes_seen.len() != 256 {
        return Err(Error::invalid_file(
            path,
            "number of byte pieces",
            "256",
            bytes_seen.len().to_string(),
        ));
    }
    Ok((tokens, controls))
}

/// `<0x0A>` as byte 10.
pub(crate) fn parse_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

fn control(id: TokenId, token: &crate::added::AddedToken) -> ControlToken {
    ControlToken {
        id,
        text: token.content.clone(),
        trims_before: token.lstrip,
        trims_after: token.rstrip,
    }
}

/// An added token that is ordinary text and is found before anything else.
fn matched_in_text(id: TokenId, text: &str) -> SpecialToken {
    SpecialToken {
        id,
        bytes: text.as_bytes().to_vec(),
        kind: SpecialTokenKind::Priority,
        ident: None,
        score: 0.0,
        extract: true,
    }
}

/// `tokens` with the added tokens behind them that are ordinary text.
fn with_matched(mut tokens: Vec<Token>, added: &AddedTokens, controls: &Controls) -> Vec<Token> {
    for (id, token) in added {
        let index = *id as usize;
        if index < tokens.len() || controls.contains_key(id) {
            continue;
        }
        tokens.resize_with(index + 1, Token::default);
        tokens[index].bytes = token.content.as_bytes().into();
    }
    tokens
}

fn build_encoder(
    path: &Path,
    definition: Definition,
    dummy_prefix: bool,
    spaces: LeadingSpace,
) -> Result<Encoder, Error> {
    let mut bare = definition.clone();
    bare.config
        .normalization
        .retain(|step| !matches!(step, Normalization::Extend { .. }));
    let build = |definition: Definition| {
        let built = caught(AssertUnwindSafe(|| {
            Kitoken::from_definition(definition).map_err(|error| error.to_string())
        }));
        let kitoken = built
            .map_err(|reason| Error::invalid_file(path, "pieces", "a usable vocabulary", reason))?;
        Ok::<_, Error>(Engine::Kitoken(Box::new(kitoken)))
    };
    let encoder = match spaces {
        LeadingSpace::First if dummy_prefix => Encoder {
            start: build(definition)?,
            inside: Some(build(bare)?),
        },
        LeadingSpace::Never => Encoder {
            start: build(bare)?,
            inside: None,
        },
        LeadingSpace::First | LeadingSpace::Every => Encoder {
            start: build(definition)?,
            inside: None,
        },
    };
    encoder.probe(path)?;
    Ok(encoder)
}
