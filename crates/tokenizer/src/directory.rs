//! The files of a model directory that say something about text. Reads bounded files, decides nothing about tokens.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tramontane_types::TokenId;

use crate::Error;
use crate::added::{AddedToken, AddedTokens, from_decoder, from_list, kind_of};
use crate::encoder::LeadingSpace;
use crate::hugging_face::leading_space;

/// Longest file that is read; the largest known one, a tekken.json, has 20 MB.
pub(crate) const FILE_BYTES_MAX: u64 = 128 << 20;

/// What kind of tokenizer file a path is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Tekken,
    SentencePiece,
    HuggingFace,
}

/// What the files beside the tokenizer file say.
#[derive(Debug, Default)]
pub(crate) struct Companions {
    /// Source of the chat template, and of the one for requests with tools where that is another.
    pub(crate) template: Option<String>,
    pub(crate) tool_template: Option<String>,
    /// Texts of `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    pub(crate) named: NamedTokens,
    /// Ids from `generation_config.json` or `config.json`.
    pub(crate) bos_id: Option<TokenId>,
    pub(crate) eos_ids: Vec<TokenId>,
    pub(crate) adds_bos: Option<bool>,
    pub(crate) added: AddedTokens,
    pub(crate) leading_space: Option<LeadingSpace>,
}

/// Texts of the tokens that `tokenizer_config.json` gives a role.
#[derive(Debug, Default, Clone)]
pub(crate) struct NamedTokens {
    pub(crate) bos: Option<String>,
    pub(crate) eos: Option<String>,
    pub(crate) unk: Option<String>,
    pub(crate) pad: Option<String>,
}

impl NamedTokens {
    pub(crate) fn contains(&self, text: &str) -> bool {
        [&self.bos, &self.eos, &self.unk, &self.pad]
            .into_iter()
            .flatten()
            .any(|named| named == text)
    }
}

/// The tokenizer file of a directory. `tekken.json` and `tokenizer.model` come before `tokenizer.json`: they are
/// Mistral's own, and the `tokenizer.json` that transformers converts from them cuts runs of spaces differently.
pub(crate) fn find(dir: &Path) -> Result<(PathBuf, FileKind), Error> {
    let fixed = [
        ("tekken.json", FileKind::Tekken),
        ("tokenizer.model", FileKind::SentencePiece),
    ];
    for (name, kind) in fixed {
        let path = dir.join(name);
        if path.is_file() {
            return Ok((path, kind));
        }
    }
    let entries = dir.read_dir().map_err(|source| Error::Read {
        path: dir.to_path_buf(),
        source,
    })?;
    // Mistral's repositories also have names such as tokenizer.model.v3.
    let versioned = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file() && name_of(path).contains(".model.v"))
        .max();
    if let Some(path) = versioned {
        return Ok((path, FileKind::SentencePiece));
    }
    let path = dir.join("tokenizer.json");
    if path.is_file() {
        return Ok((path, FileKind::HuggingFace));
    }
    Err(Error::NoTokenizer {
        dir: dir.to_path_buf(),
    })
}

/// The kind of a single file, by its name and, for JSON, its content.
pub(crate) fn kind_of_file(path: &Path, bytes: &[u8]) -> FileKind {
    #[derive(serde::Deserialize)]
    struct Peek {
        config: Option<serde::de::IgnoredAny>,
    }
    if path.extension().is_none_or(|extension| extension != "json") {
        return FileKind::SentencePiece;
    }
    match serde_json::from_slice(bytes) {
        Ok(Peek { config: Some(_) }) => FileKind::Tekken,
        _ => FileKind::HuggingFace,
    }
}

/// Reads a file of at most [`FILE_BYTES_MAX`] bytes.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::Read {
        path: path.to_path_buf(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(FILE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(Error::FileTooLarge {
            path: path.to_path_buf(),
            actual: bytes.len() as u64,
            max: FILE_BYTES_MAX,
        });
    }
    Ok(bytes)
}

impl Companions {
    /// Reads what is there; no file is required.
    pub(crate) fn read(dir: &Path, kind: FileKind) -> Result<Self, Error> {
        let mut found = Self::default();
        if let Some((path, config)) = read_json(dir, "tokenizer_config.json")? {
            found.read_tokenizer_config(&path, &config)?;
        }
        found.read_template_files(dir)?;
        if kind == FileKind::SentencePiece {
            found.read_beside_sentencepiece(dir)?;
        }
        // What generation_config.json says of the end replaces what config.json says, as in transformers.
        for name in ["generation_config.json", "config.json"] {
            let Some((path, config)) = read_json(dir, name)? else {
                continue;
            };
            if found.eos_ids.is_empty() {
                found.eos_ids = ids(&path, "eos_token_id", &config["eos_token_id"])?;
            }
            if found.bos_id.is_none() {
                found.bos_id = ids(&path, "bos_token_id", &config["bos_token_id"])?
                    .first()
                    .copied();
            }
        }
        Ok(found)
    }

    fn read_tokenizer_config(&mut self, path: &Path, config: &Value) -> Result<(), Error> {
        self.named = NamedTokens {
            bos: named(&config["bos_token"]),
            eos: named(&config["eos_token"]),
            unk: named(&config["unk_token"]),
            pad: named(&config["pad_token"]),
        };
        self.adds_bos = config["add_bos_token"].as_bool();
        if config["legacy"] == false {
            self.leading_space = Some(LeadingSpace::First);
        }
        if let Some(decoder) = config.get("added_tokens_decoder") {
            self.added = from_decoder(path, decoder)?;
        }
        match &config["chat_template"] {
            Value::Null => {}
            Value::String(template) => self.template = Some(template.clone()),
            Value::Array(templates) => {
                for entry in templates {
                    let template = entry["template"].as_str().map(str::to_owned);
                    match entry["name"].as_str() {
                        Some("default") => self.template = template,
                        Some("tool_use") => self.tool_template = template,
                        _ => {}
                    }
                }
            }
            other => {
                return Err(Error::invalid_file(
                    path,
                    "chat_template",
                    "a string or a list",
                    kind_of(other),
                ));
            }
        }
        Ok(())
    }

    /// Files of their own come before `tokenizer_config.json`, as in transformers.
    fn read_template_files(&mut self, dir: &Path) -> Result<(), Error> {
        if let Some((_, file)) = read_json(dir, "chat_template.json")?
            && let Some(template) = file["chat_template"].as_str()
        {
            self.template = Some(template.to_owned());
        }
        let path = dir.join("chat_template.jinja");
        if path.is_file() {
            let template = String::from_utf8(read(&path)?).map_err(|error| {
                Error::invalid_file(&path, "content", "UTF-8", error.to_string())
            })?;
            self.template = Some(template);
        }
        Ok(())
    }

    /// Fine-tuned models add tokens in JSON files beside a `tokenizer.model` that does not have them.
    fn read_beside_sentencepiece(&mut self, dir: &Path) -> Result<(), Error> {
        if let Some((path, file)) = read_json(dir, "added_tokens.json")? {
            let Some(entries) = file.as_object() else {
                return Err(Error::invalid_file(
                    &path,
                    "content",
                    "an object",
                    kind_of(&file),
                ));
            };
            for (content, id) in entries {
                let Some(id) = ids(&path, content, id)?.first().copied() else {
                    continue;
                };
                // This file does not say what is special; most of what it lists is.
                self.added.entry(id).or_insert_with(|| AddedToken {
                    content: content.clone(),
                    special: true,
                    lstrip: false,
                    rstrip: false,
                });
            }
        }
        if let Some((path, file)) = read_json(dir, "tokenizer.json")? {
            self.leading_space = Some(leading_space(&file));
            if let Some(list) = file.get("added_tokens") {
                for (id, token) in from_list(&path, list)? {
                    self.added.entry(id).or_insert(token);
                }
            }
        }
        for token in self.added.values_mut() {
            token.special |= self.named.contains(&token.content)
                || self
                    .template
                    .as_ref()
                    .is_some_and(|source| source.contains(&token.content));
        }
        Ok(())
    }
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn read_json(dir: &Path, name: &str) -> Result<Option<(PathBuf, Value)>, Error> {
    let path = dir.join(name);
    if !path.is_file() {
        return Ok(None);
    }
    let value = serde_json::from_slice(&read(&path)?)
        .map_err(|error| Error::invalid_file(&path, "content", "JSON", error.to_string()))?;
    Ok(Some((path, value)))
}

/// `"<s>"` or `{"content": "<s>"}`.
fn named(value: &Value) -> Option<String> {
    value
        .as_str()
        .or_else(|| value["content"].as_str())
        .map(str::to_owned)
}

/// One id, a list of ids, or null.
fn ids(path: &Path, field: &str, value: &Value) -> Result<Vec<TokenId>, Error> {
    let one = std::slice::from_ref(value);
    let values = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(values) => values.as_slice(),
        _ => one,
    };
    let parsed = values.iter().map(|value| {
        value
            .as_u64()
            .and_then(|id| TokenId::try_from(id).ok())
            .ok_or_else(|| {
                Error::invalid_file(
                    path,
                    field,
                    "a token id or a list of them",
                    value.to_string(),
                )
            })
    });
    parsed.collect()
}
