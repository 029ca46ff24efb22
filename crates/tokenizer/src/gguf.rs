//! The tokenizer that a GGUF file carries in its metadata, rewritten as the file of the library that reads its
//! kind. Supports exactly what it names; anything else is refused, never approximated.

use std::path::Path;

use serde_json::{Map, Value, json};
use tramontane_types::TokenId;

use crate::directory::{Companions, NamedTokens};
use crate::encoder::LeadingSpace;
use crate::tokenizer::Parts;
use crate::vocabulary::VOCAB_MAX;
use crate::{Error, hugging_face, sentencepiece};

/// How Mistral's tekken cuts text into words (`config.pattern` of every tekken.json).
const TEKKEN_PATTERN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Types of tokens; SentencePiece has the same numbers.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;
/// All types.
const TYPES: std::ops::RangeInclusive<i64> = 1..=6;

/// What the metadata of a GGUF file says of its tokenizer; keys are named without `tokenizer.ggml.`.
#[derive(Clone, Debug, Default)]
pub struct GgufTokenizer<'a> {
    /// `model`.
    pub model: Option<&'a str>,
    /// `pre`.
    pub pre: Option<&'a str>,
    /// `tokens`, by id.
    pub tokens: Vec<&'a str>,
    /// `scores`, one for each token.
    pub scores: Vec<f32>,
    /// `token_type`, one for each token.
    pub types: Vec<i64>,
    /// `merges`.
    pub merges: Vec<&'a str>,
    /// `bos_token_id`.
    pub bos: Option<TokenId>,
    /// `eos_token_id`, and `eot_token_id` where there is one.
    pub eos: Vec<TokenId>,
    /// `unknown_token_id`.
    pub unk: Option<TokenId>,
    /// `add_bos_token`.
    pub adds_bos: Option<bool>,
    /// `add_space_prefix`.
    pub adds_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`, or a `precompiled_charsmap` is there.
    pub normalizes: bool,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<&'a str>,
}

impl GgufTokenizer<'_> {
    /// Vocabulary and encoder, and what else the loader is to know.
    pub(crate) fn load(&self, path: &Path) -> Result<(Parts, Companions), Error> {
        self.check(path)?;
        let parts = match (self.model, self.pre) {
            (Some("llama"), _) => self.load_sentencepiece(path)?,
            (Some("gpt2"), Some("tekken")) => {
                let split = json!({"type": "Split", "pattern": {"Regex": TEKKEN_PATTERN}, "behavior": "Isolated", "invert": false});
                self.load_byte_pairs(path, &split, true)?
            }
            (Some("gpt2"), Some("smollm")) => {
                let split = json!({"type": "Digits", "individual_digits": true});
                self.load_byte_pairs(path, &split, false)?
            }
            (model, pre) => {
                let name = |name: Option<&str>| name.unwrap_or("nothing").to_owned();
                return Err(Error::invalid_file(
                    path,
                    "tokenizer.ggml.model and .pre",
                    "llama, gpt2 with tekken or gpt2 with smollm (put tokenizer.model, tekken.json or tokenizer.json \
                     of this model into a directory with the GGUF file)",
                    format!("{} with {}", name(model), name(pre)),
                ));
            }
        };
        let named = |id: Option<TokenId>| Some((*self.tokens.get(id? as usize)?).to_owned());
        let companions = Companions {
            template: self.chat_template.map(str::to_owned),
            named: NamedTokens {
                bos: named(self.bos),
                eos: named(self.eos.first().copied()),
                unk: named(self.unk),
                pad: None,
            },
            bos_id: self.bos,
            eos_ids: self.eos.clone(),
            // Where the file does not say: as SentencePiece models and tekken have it, not the others.
            adds_bos: Some(self.adds_bos.unwrap_or(self.pre != Some("smollm"))),
            ..Companions::default()
        };
        Ok((parts, companions))
    }

    /// Everything that the libraries would trip over, or do differently.
    fn check(&self, path: &Path) -> Result<(), Error> {
        let len = self.tokens.len();
        if len == 0 || len > VOCAB_MAX {
            let expected = format!("1 to {VOCAB_MAX}");
            let field = "number of tokenizer.ggml.tokens";
            return Err(Error::invalid_file(path, field, expected, len.to_string()));
        }
        if self.types.len() != len {
            let got = self.types.len().to_string();
            let field = "number of tokenizer.ggml.token_type";
            return Err(Error::invalid_file(path, field, len.to_string(), got));
        }
        if let Some(got) = self.types.iter().find(|kind| !TYPES.contains(*kind)) {
            let field = "tokenizer.ggml.token_type";
            return Err(Error::invalid_file(path, field, "1 to 6", got.to_string()));
        }
        if self.normalizes {
            return Err(Error::invalid_file(
                path,
                "tokenizer.ggml.remove_extra_whitespaces or .precompiled_charsmap",
                "absent",
                "present",
            ));
        }
        let ids = [self.bos, self.unk].into_iter().flatten();
        match ids
            .chain(self.eos.iter().copied())
            .find(|id| *id as usize >= len)
        {
            Some(id) => Err(Error::invalid_file(
                path,
                "tokenizer.ggml: id of bos, eos or unknown",
                format!("below {len}"),
                id.to_string(),
            )),
            None => Ok(()),
        }
    }

    /// Tokens that are not text: by their type, and those that the template writes between texts.
    fn is_control(&self, text: &str, kind: i64) -> bool {
        let in_template = |template: &str| template.contains(text);
        let is_word = !text.is_empty() && !text.contains(char::is_whitespace);
        kind == CONTROL
            || kind == UNKNOWN
            || kind == USER_DEFINED && is_word && self.chat_template.is_some_and(in_template)
    }

    fn load_sentencepiece(&self, path: &Path) -> Result<Parts, Error> {
        if self.scores.len() != self.tokens.len() {
            return Err(Error::invalid_file(
                path,
                "number of tokenizer.ggml.scores",
                self.tokens.len().to_string(),
                self.scores.len().to_string(),
            ));
        }
        let bytes = self.to_sentencepiece();
        let added = crate::added::AddedTokens::new();
        sentencepiece::load(path, &bytes, &added, LeadingSpace::Every)
    }

    /// The bytes of a `tokenizer.model` (`sentencepiece_model.proto`) with these tokens.
    fn to_sentencepiece(&self) -> Vec<u8> {
        const BPE: u64 = 2;
        let mut model = Message::default();
        let pieces = self.tokens.iter().zip(&self.scores).zip(&self.types);
        for ((text, score), &kind) in pieces {
            let kind = match self.is_control(text, kind) && kind != UNKNOWN {
                true => CONTROL,
                false => kind,
            };
            let mut piece = Message::default();
            piece.bytes(1, text.as_bytes());
            piece.float(2, *score);
            // In range: types are checked.
            piece.number(3, kind as u64);
            model.bytes(1, &piece.0);
        }
        let mut trainer = Message::default();
        trainer.number(3, BPE);
        trainer.number(35, self.types.contains(&BYTE).into());
        // The ids that such models have when their file does not say.
        let ids = [(40, self.unk, 0), (41, self.bos, 1)];
        let eos = (42, self.eos.first().copied(), 2);
        for (field, id, default) in ids.into_iter().chain([eos]) {
            let id = id.unwrap_or(default);
            trainer.number(field, id.into());
            if let Some(text) = self.tokens.get(id as usize) {
                trainer.bytes(field + 5, text.as_bytes());
            }
        }
        model.bytes(2, &trainer.0);
        let mut normalizer = Message::default();
        normalizer.bytes(1, b"identity");
        normalizer.number(3, self.adds_space_prefix.unwrap_or(true).into());
        normalizer.number(4, 0);
        model.bytes(3, &normalizer.0);
        model.0
    }

    fn load_byte_pairs(
        &self,
        path: &Path,
        split: &Value,
        ignore_merges: bool,
    ) -> Result<Parts, Error> {
        let uses_regex = !ignore_merges;
        let mut vocab = Map::new();
        let mut added = Vec::new();
        for (id, (text, &kind)) in self.tokens.iter().zip(&self.types).enumerate() {
            if vocab.insert((*text).to_owned(), json!(id)).is_some() {
                let field = format!("tokenizer.ggml.tokens[{id}]");
                let got = format!("{text:?} once more");
                return Err(Error::invalid_file(path, field, "another text", got));
            }
            if kind == USER_DEFINED || self.is_control(text, kind) {
                let special = self.is_control(text, kind);
                added.push(json!({
                    "id": id, "content": text, "special": special,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                }));
            }
        }
        let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": uses_regex});
        let file = json!({
            "version": "1.0",
            "added_tokens": added,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": self.merges, "ignore_merges": ignore_merges},
        });
        hugging_face::load(path, file.to_string().as_bytes(), &|_text| false)
    }
}

/// A protobuf message that is being written.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut number: u64) {
        while number >= 128 {
            self.0.push(number as u8 | 128);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    fn number(&mut self, field: u64, number: u64) {
        self.varint(field << 3);
        self.varint(number);
    }

    fn float(&mut self, field: u64, number: f32) {
        self.varint(field << 3 | 5);
        self.0.extend(number.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, bytes: &[u8]) {
        self.varint(field << 3 | 2);
        self.varint(bytes.len() as u64);
        self.0.extend(bytes);
    }
}
