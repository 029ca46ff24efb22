//! Hugging Face's `tokenizer.json`, byte-pair models only. The file is checked before the library reads it, because
//! the library panics on some files; afterwards its panics are caught.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::path::Path;

use serde_json::{Value, json};
use tramontane_types::TokenId;

use crate::Error;
use crate::InstructVersion;
use crate::added::{AddedTokens, from_list, kind_of};
use crate::control::ControlToken;
use crate::encoder::{Encoder, Engine, LeadingSpace, caught};
use crate::sentencepiece::{SPACE, parse_byte};
use crate::tokenizer::Parts;
use crate::vocabulary::{Token, VOCAB_MAX, Vocabulary};

/// Reads a file; `is_control` says which added tokens stand for control beside those marked `special`.
pub(crate) fn load(
    path: &Path,
    bytes: &[u8],
    is_control: &dyn Fn(&str) -> bool,
) -> Result<Parts, Error> {
    let mut file: Value = serde_json::from_slice(bytes)
        .map_err(|error| Error::invalid_file(path, "content", "JSON", error.to_string()))?;
    let vocab = read_vocab(path, &file)?;
    check_merges(path, &file, &vocab)?;
    let decoder = Decoder::read(path, &file["decoder"])?;
    let mut added = match &file["added_tokens"] {
        Value::Null => AddedTokens::new(),
        list => from_list(path, list)?,
    };
    for token in added.values_mut() {
        token.special |= is_control(&token.content);
    }
    check_bytes(path, &decoder, &vocab, &added)?;
    let adds_bos = adds_bos(&file["post_processor"]);
    mark_controls(&mut file, &added);
    let encoder = build_encoder(path, &mut file, &added)?;
    encoder.probe(path)?;

    let mut tokens = Vec::new();
    for (text, id) in &vocab {
        set_token(&mut tokens, *id, decoder.bytes_of(text));
    }
    let mut controls = Vec::new();
    for (id, token) in &added {
        set_token(&mut tokens, *id, token.content.as_bytes().to_vec());
        if token.special {
            controls.push(ControlToken {
                id: *id,
                text: token.content.clone(),
                trims_before: token.lstrip,
                trims_after: token.rstrip,
            });
        }
    }
    let vocabulary = Vocabulary::new(path, tokens, &controls)?;
    Ok(Parts {
        bos: vocabulary.control_id("<s>"),
        eos: vocabulary.control_id("</s>"),
        unk: file["model"]["unk_token"]
            .as_str()
            .and_then(|text| vocab.get(text).copied()),
        instruct: InstructVersion::of_controls(&vocabulary),
        vocabulary,
        encoder,
        drops_leading_space: decoder.drops_leading_space,
        adds_bos,
    })
}

/// When this file's tokenizer puts a space before text; for files that lie beside a `tokenizer.model`.
pub(crate) fn leading_space(file: &Value) -> LeadingSpace {
    let metaspace = steps(&file["pre_tokenizer"], "pretokenizers")
        .into_iter()
        .find(|step| step["type"] == "Metaspace");
    match metaspace.map(|step| step["prepend_scheme"].as_str()) {
        Some(Some("first")) => LeadingSpace::First,
        Some(Some("never")) => LeadingSpace::Never,
        _ => LeadingSpace::Every,
    }
}

fn read_vocab(path: &Path, file: &Value) -> Result<HashMap<String, TokenId>, Error> {
    let model = &file["model"];
    // Files of before 2021 do not name the type; theirs is BPE if it has merges.
    let kind = model["type"]
        .as_str()
        .unwrap_or(if model["merges"].is_array() {
            "BPE"
        } else {
            ""
        });
    if kind != "BPE" {
        return Err(Error::invalid_file(
            path,
            "model.type",
            "BPE",
            format!("{kind:?}"),
        ));
    }
    let Some(entries) = model["vocab"].as_object() else {
        let actual = kind_of(&model["vocab"]);
        return Err(Error::invalid_file(
            path,
            "model.vocab",
            "an object",
            actual,
        ));
    };
    if entries.is_empty() || entries.len() > VOCAB_MAX {
        return Err(Error::invalid_file(
            path,
            "number of entries of model.vocab",
            format!("1 to {VOCAB_MAX}"),
            entries.len().to_string(),
        ));
    }
    let mut vocab = HashMap::with_capacity(entries.len());
    let mut owners: HashMap<TokenId, &str> = HashMap::with_capacity(entries.len());
    for (text, id) in entries {
        let field = || format!("model.vocab[{text:?}]");
        let number = id.as_u64().filter(|id| *id < VOCAB_MAX as u64);
        let Some(number) = number.and_then(|id| TokenId::try_from(id).ok()) else {
            let expected = format!("a number below {VOCAB_MAX}");
            return Err(Error::invalid_file(path, field(), expected, id.to_string()));
        };
        if let Some(owner) = owners.insert(number, text) {
            let actual = format!("{number}, the id of {owner:?}");
            return Err(Error::invalid_file(
                path,
                field(),
                "an id of its own",
                actual,
            ));
        }
        vocab.insert(text.clone(), number);
    }
    Ok(vocab)
}

/// A merge of or to something unknown makes the library index out of range.
fn check_merges(path: &Path, file: &Value, vocab: &HashMap<String, TokenId>) -> Result<(), Error> {
    let merges = &file["model"]["merges"];
    let Some(merges) = merges.as_array() else {
        return Err(Error::invalid_file(
            path,
            "model.merges",
            "a list",
            kind_of(merges),
        ));
    };
    let mut whole = String::new();
    for (index, merge) in merges.iter().enumerate() {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) => match pair.as_slice() {
                [Value::String(left), Value::String(right)] => {
                    Some((left.as_str(), right.as_str()))
                }
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = pair else {
            let field = format!("model.merges[{index}]");
            return Err(Error::invalid_file(
                path,
                field,
                "a pair of tokens",
                merge.to_string(),
            ));
        };
        whole.clear();
        whole.push_str(left);
        whole.push_str(right);
        for text in [left, right, whole.as_str()] {
            if !vocab.contains_key(text) {
                return Err(Error::invalid_file(
                    path,
                    format!("model.merges[{index}]"),
                    "tokens of model.vocab",
                    format!("{text:?}"),
                ));
            }
        }
    }
    Ok(())
}

/// Bytes are what any text can be written with: no added token may stand where one of them does.
fn check_bytes(
    path: &Path,
    decoder: &Decoder,
    vocab: &HashMap<String, TokenId>,
    added: &AddedTokens,
) -> Result<(), Error> {
    for (text, id) in vocab {
        let Some((byte, token)) = decoder.byte_of(text).zip(added.get(id)) else {
            continue;
        };
        if token.special || token.content.as_bytes() != [byte] {
            return Err(Error::invalid_file(
                path,
                format!("id of added token {:?}", token.content),
                format!("another one than that of byte {byte}"),
                id.to_string(),
            ));
        }
    }
    Ok(())
}

/// Tokens whose text the template writes, or that are named in the configuration, count as `special`.
fn mark_controls(file: &mut Value, added: &AddedTokens) {
    let Some(list) = file["added_tokens"].as_array_mut() else {
        return;
    };
    for (value, id) in list.iter_mut().filter_map(|value| {
        let id = value["id"]
            .as_u64()
            .and_then(|id| TokenId::try_from(id).ok())?;
        Some((value, id))
    }) {
        if added.get(&id).is_some_and(|token| token.special) {
            value["special"] = json!(true);
        }
    }
}

fn build_encoder(path: &Path, file: &mut Value, added: &AddedTokens) -> Result<Encoder, Error> {
    for unused in ["truncation", "padding", "post_processor"] {
        file[unused] = Value::Null;
    }
    let engine = |tokenizer| Engine::HuggingFace(Box::new(tokenizer));
    let start = build(path, file)?;
    check_added(path, &start, added)?;
    let start = engine(start);
    if leading_space(file) != LeadingSpace::First {
        return Ok(Encoder {
            start,
            inside: None,
        });
    }
    set_prepend_scheme_never(&mut file["pre_tokenizer"]);
    let inside = Some(engine(build(path, file)?));
    Ok(Encoder { start, inside })
}

fn build(path: &Path, file: &Value) -> Result<tokenizers::Tokenizer, Error> {
    let built = caught(AssertUnwindSafe(|| {
        let bytes = serde_json::to_vec(file).map_err(|error| error.to_string())?;
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| error.to_string())?;
        // Text that looks like a control token stays text.
        tokenizer.set_encode_special_tokens(true);
        Ok(tokenizer)
    }));
    built.map_err(|reason| Error::invalid_file(path, "content", "a usable tokenizer", reason))
}

/// The library numbers added tokens itself, whatever the file says. Those that text becomes must be what the file says; control
/// tokens, which no text becomes, are ours to number.
fn check_added(
    path: &Path,
    tokenizer: &tokenizers::Tokenizer,
    added: &AddedTokens,
) -> Result<(), Error> {
    for (id, token) in added.iter().filter(|(_, token)| !token.special) {
        let known = tokenizer.token_to_id(&token.content);
        if known != Some(*id) {
            let expected = known.map_or_else(|| "no id".to_owned(), |known| known.to_string());
            return Err(Error::invalid_file(
                path,
                format!("id of added token {:?}", token.content),
                format!("{expected}, behind or in model.vocab"),
                id.to_string(),
            ));
        }
    }
    Ok(())
}

fn set_prepend_scheme_never(step: &mut Value) {
    if step["type"] == "Metaspace" {
        step["prepend_scheme"] = json!("never");
    }
    if let Some(steps) = step["pretokenizers"].as_array_mut() {
        steps.iter_mut().for_each(set_prepend_scheme_never);
    }
}

/// The steps of a `Sequence`, or the one step there is.
fn steps<'v>(value: &'v Value, list: &str) -> Vec<&'v Value> {
    match (&value["type"], &value[list]) {
        (_, _) if value.is_null() => Vec::new(),
        (kind, Value::Array(steps)) if kind == "Sequence" => steps.iter().collect(),
        _ => vec![value],
    }
}

/// True if the file puts a token before a text on its own (`TemplateProcessing`, `BertProcessing` and the like).
fn adds_bos(post_processor: &Value) -> bool {
    steps(post_processor, "processors").into_iter().any(|step| {
        step["type"] == "TemplateProcessing" && step["single"][0].get("SpecialToken").is_some()
    })
}

fn set_token(tokens: &mut Vec<Token>, id: TokenId, bytes: Vec<u8>) {
    let index = id as usize;
    if index >= tokens.len() {
        tokens.resize_with(index + 1, Token::default);
    }
    tokens[index].bytes = bytes.into();
}

/// How the text of a token becomes bytes of running text.
#[derive(Debug, Default)]
struct Decoder {
    byte_level: Option<HashMap<char, u8>>,
    has_spaces: bool,
    has_byte_tokens: bool,
    drops_leading_space: bool,
}

impl Decoder {
    fn read(path: &Path, decoder: &Value) -> Result<Self, Error> {
        let mut read = Self::default();
        for step in steps(decoder, "decoders") {
            match step["type"].as_str().unwrap_or_default() {
                "ByteLevel" => read.byte_level = Some(byte_level_alphabet()),
                "ByteFallback" => read.has_byte_tokens = true,
                "Fuse" => {}
                "Metaspace" => {
                    read.has_spaces = true;
                    read.drops_leading_space = step["prepend_scheme"] != "never";
                }
                "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => {
                    read.has_spaces = true;
                }
                "Strip" if step["content"] == " " && step["stop"] == 0 => {
                    read.drops_leading_space = step["start"] == 1;
                }
                _ => {
                    return Err(Error::invalid_file(
                        path,
                        "decoder",
                        "ByteLevel, ByteFallback, Fuse, Metaspace, Replace of ▁, Strip of one space",
                        step.to_string(),
                    ));
                }
            }
        }
        if read.byte_level.is_none() && !read.has_spaces {
            let actual = decoder.to_string();
            return Err(Error::invalid_file(
                path,
                "decoder",
                "ByteLevel, Metaspace or Replace",
                actual,
            ));
        }
        Ok(read)
    }

    /// The byte that a token stands for, if it is one of the 256.
    fn byte_of(&self, text: &str) -> Option<u8> {
        match &self.byte_level {
            Some(alphabet) => {
                let mut chars = text.chars();
                let byte = chars.next().and_then(|c| alphabet.get(&c).copied());
                byte.filter(|_| chars.next().is_none())
            }
            None => parse_byte(text).filter(|_| self.has_byte_tokens),
        }
    }

    fn bytes_of(&self, text: &str) -> Vec<u8> {
        if let Some(alphabet) = &self.byte_level {
            let bytes: Option<Vec<u8>> = text.chars().map(|c| alphabet.get(&c).copied()).collect();
            return bytes.unwrap_or_else(|| text.as_bytes().to_vec());
        }
        if self.has_byte_tokens
            && let Some(byte) = parse_byte(text)
        {
            return vec![byte];
        }
        text.replace(SPACE, " ").into_bytes()
    }
}

/// GPT-2's way to write bytes as printable characters (`bytes_to_unicode` of its encoder.py).
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut alphabet = HashMap::with_capacity(256);
    let mut next_free = 256u32;
    for byte in 0..=255u8 {
        let is_printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let code = if is_printable {
            u32::from(byte)
        } else {
            next_free
        };
        if !is_printable {
            next_free += 1;
        }
        if let Some(c) = char::from_u32(code) {
            alphabet.insert(c, byte);
        }
    }
    alphabet
}
