//! The tokenizer of a model: text to ids, ids to text, conversations to ids. Cheap to clone, never changes.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use tramontane_types::TokenId;

use crate::chat::ChatRequest;
use crate::chat_template::ChatTemplate;
use crate::decode_stream::{DecodeStart, DecodedBytes};
use crate::directory::{Companions, FileKind, find, kind_of_file, read};
use crate::encoder::{Encoder, LeadingSpace, Position};
use crate::tool_calls::CallTokens;
use crate::vocabulary::Vocabulary;
use crate::{Error, GgufTokenizer, InstructVersion, hugging_face, instruct, sentencepiece, tekken};

/// Longest text that is tokenized, in bytes: a million tokens of ordinary text.
pub const TEXT_BYTES_MAX: usize = 4 << 20;

/// Tokenizer, control tokens and chat format of one model. Cloning shares it.
///
/// Encoding is CPU work (some 10 MB of text per second): call it from a blocking thread for long texts.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    vocabulary: Vocabulary,
    encoder: Encoder,
    bos: Option<TokenId>,
    eos: Vec<TokenId>,
    unk: Option<TokenId>,
    adds_bos: bool,
    drops_leading_space: bool,
    token_bytes_max: usize,
    chat: Chat,
}

/// What a loader makes of a tokenizer file.
pub(crate) struct Parts {
    pub(crate) vocabulary: Vocabulary,
    pub(crate) encoder: Encoder,
    pub(crate) bos: Option<TokenId>,
    pub(crate) eos: Option<TokenId>,
    /// What the encoder gives out for a character it has no token for.
    pub(crate) unk: Option<TokenId>,
    pub(crate) instruct: Option<InstructVersion>,
    pub(crate) drops_leading_space: bool,
    pub(crate) adds_bos: bool,
}

#[derive(Debug)]
enum Chat {
    Template(Box<ChatTemplate>),
    Instruct(InstructVersion),
    None,
}

/// How conversations are turned into prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatFormat {
    /// By the chat template of the model directory.
    Template,
    /// By one of Mistral's formats, built in.
    Instruct(InstructVersion),
    /// Not at all: a base model without a template.
    None,
}

impl Tokenizer {
    /// Loads the tokenizer of a model directory.
    ///
    /// In this order: `tekken.json`, `tokenizer.model`, `*.model.v*`, `tokenizer.json`. The first two kinds are
    /// Mistral's own and byte-exact; a `tokenizer.json` written by transformers cuts runs of spaces differently, so
    /// where it lies beside a `tokenizer.model` only its added tokens and its leading-space rule are used.
    /// `tokenizer_config.json`, `generation_config.json`, `config.json`, `added_tokens.json` and
    /// `chat_template.jinja` are read where present.
    pub fn from_dir(dir: &Path) -> Result<Self, Error> {
        let (path, kind) = find(dir)?;
        let companions = Companions::read(dir, kind)?;
        Self::build(&path, kind, &read(&path)?, companions)
    }

    /// Loads a single tokenizer file, with the built-in chat format that belongs to it.
    pub fn from_file(path: &Path) -> Result<Self, Error> {
        let bytes = read(path)?;
        Self::build(
            path,
            kind_of_file(path, &bytes),
            &bytes,
            Companions::default(),
        )
    }

    /// Makes the tokenizer that the GGUF file `path` carries in its metadata.
    pub fn from_gguf(path: &Path, metadata: &GgufTokenizer<'_>) -> Result<Self, Error> {
        let (parts, companions) = metadata.load(path)?;
        Self::finish(path, parts, companions)
    }

    fn build(
        path: &Path,
        kind: FileKind,
        bytes: &[u8],
        companions: Companions,
    ) -> Result<Self, Error> {
        let parts = match kind {
            FileKind::Tekken => tekken::load(path, bytes)?,
            FileKind::SentencePiece => {
                let spaces = companions.leading_space.unwrap_or(LeadingSpace::Every);
                sentencepiece::load(path, bytes, &companions.added, spaces)?
            }
            FileKind::HuggingFace => hugging_face::load(path, bytes, &|text| {
                companions.named.contains(text)
                    || companions
                        .template
                        .as_ref()
                        .is_some_and(|source| source.contains(text))
            })?,
        };
        Self::finish(path, parts, companions)
    }

    pub(crate) fn finish(path: &Path, parts: Parts, companions: Companions) -> Result<Self, Error> {
        let named_id = |text: &Option<String>| {
            text.as_ref()
                .and_then(|text| parts.vocabulary.control_id(text))
        };
        let bos = named_id(&companions.named.bos)
            .or(companions.bos_id)
            .or(parts.bos);
        let mut eos = companions.eos_ids;
        if eos.is_empty() {
            eos.extend(named_id(&companions.named.eos).or(parts.eos));
        }
        for id in bos.iter().chain(&eos) {
            if *id as usize >= parts.vocabulary.len() {
                return Err(Error::invalid_file(
                    path,
                    "number of tokens",
                    format!(
                        "more than {id}, an id that the model's configuration gives to bos or eos"
                    ),
                    parts.vocabulary.len().to_string(),
                ));
            }
        }
        let mut named = companions.named;
        let name_of = |id: Option<TokenId>| id.and_then(|id| parts.vocabulary.control_name(id));
        named.bos = named.bos.or_else(|| name_of(bos));
        named.eos = named.eos.or_else(|| name_of(eos.first().copied()));
        named.unk = named.unk.or_else(|| name_of(parts.unk));
        let chat = match (companions.template, parts.instruct) {
            (Some(template), _) => {
                let tool_template = companions.tool_template;
                let template = ChatTemplate::new(path, template, tool_template, named)?;
                Chat::Template(Box::new(template))
            }
            (None, Some(version)) => Chat::Instruct(version),
            (None, None) => Chat::None,
        };
        Ok(Self {
            inner: Arc::new(Inner {
                adds_bos: companions.adds_bos.unwrap_or(parts.adds_bos),
                token_bytes_max: parts.vocabulary.text_bytes_max(),
                vocabulary: parts.vocabulary,
                encoder: parts.encoder,
                bos,
                eos,
                unk: parts.unk,
                drops_leading_space: parts.drops_leading_space,
                chat,
            }),
        })
    }

    /// Ids of a plain text, without bos. Text that looks like a control token stays text.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        self.encode_at(text, Position::Start)
    }

    /// Ids of a plain prompt, with bos before it if this model's prompts begin with one.
    pub fn encode_with_bos(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        let mut ids = self.encode(text)?;
        if let Some(bos) = self.inner.bos.filter(|_| self.inner.adds_bos) {
            ids.insert(0, bos);
        }
        Ok(ids)
    }

    /// Ids of a conversation up to where the model goes on, bos included.
    pub fn encode_chat(&self, request: &ChatRequest) -> Result<Vec<TokenId>, Error> {
        check_length(
            request
                .messages
                .iter()
                .map(|message| message.content.len())
                .sum(),
        )?;
        match &self.inner.chat {
            Chat::Template(template) => template.encode(self, request, SystemTime::now()),
            Chat::Instruct(version) => instruct::encode(self, *version, request),
            Chat::None => Err(Error::NoChatFormat),
        }
    }

    /// Ids of a text with a gap, up to where the model fills it, bos included: `suffix` is what follows the gap.
    pub fn encode_infill(&self, prompt: &str, suffix: &str) -> Result<Vec<TokenId>, Error> {
        check_length(prompt.len().saturating_add(suffix.len()))?;
        instruct::encode_infill(self, prompt, suffix)
    }

    /// How conversations become prompts.
    pub fn chat_format(&self) -> ChatFormat {
        match &self.inner.chat {
            Chat::Template(_) => ChatFormat::Template,
            Chat::Instruct(version) => ChatFormat::Instruct(*version),
            Chat::None => ChatFormat::None,
        }
    }

    /// False if the tools of a [`ChatRequest`] would not reach the model: format v1, tokenizers that lack the tokens for
    /// them, and templates without `tools`.
    pub fn supports_tools(&self) -> bool {
        match &self.inner.chat {
            Chat::Template(template) => template.mentions_tools(),
            Chat::Instruct(version) => {
                let has_place = self.control_id("[AVAILABLE_TOOLS]").is_some();
                *version != InstructVersion::V1 && has_place && self.call_tokens().is_some()
            }
            Chat::None => false,
        }
    }

    /// The tokens by which the model calls tools, if it has any.
    pub fn call_tokens(&self) -> Option<CallTokens> {
        CallTokens::of(self)
    }

    /// The token before every prompt, if the model has one.
    pub fn bos_id(&self) -> Option<TokenId> {
        self.inner.bos
    }

    /// The tokens that end an answer.
    pub fn eos_ids(&self) -> &[TokenId] {
        &self.inner.eos
    }

    /// Number of ids, unused ones included: every id is below it.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocabulary.len()
    }

    /// The bytes of a token in running text, not always whole characters; for a control token its name.
    /// `None` outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> Option<&[u8]> {
        self.inner
            .vocabulary
            .get(id)
            .map(|token| token.bytes.as_ref())
    }

    /// Bytes of the longest token of running text, control tokens apart. A text of more bytes has more than one token, save
    /// where it becomes shorter before it is cut.
    pub fn token_bytes_max(&self) -> usize {
        self.inner.token_bytes_max
    }

    /// True for tokens that are not text: bos, eos, unk, `[INST]` and their like.
    pub fn is_control(&self, id: TokenId) -> bool {
        self.inner
            .vocabulary
            .get(id)
            .is_some_and(|token| token.is_control)
    }

    /// The id of the control token with this name.
    pub fn control_id(&self, name: &str) -> Option<TokenId> {
        self.inner.vocabulary.control_id(name)
    }

    /// The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, ids: &[TokenId], skip_special: bool) -> String {
        let mut bytes = DecodedBytes::new(DecodeStart::Text);
        for id in ids {
            bytes.push(self, *id, skip_special);
        }
        bytes.take_rest()
    }

    pub(crate) fn encode_at(&self, text: &str, position: Position) -> Result<Vec<TokenId>, Error> {
        check_length(text.len())?;
        let ids = self.inner.encoder.encode(text, position)?;
        // A tokenizer.json may reach a control token by merges; a text that does so is not served.
        let is_unsafe = |id: &&TokenId| self.is_control(**id) && Some(**id) != self.inner.unk;
        if let Some(id) = ids.iter().find(is_unsafe) {
            return Err(Error::Encode {
                reason: format!("a part of it becomes the control token {id}"),
            });
        }
        Ok(ids)
    }

    pub(crate) fn vocabulary(&self) -> &Vocabulary {
        &self.inner.vocabulary
    }

    pub(crate) fn has_leading_space(&self) -> bool {
        self.inner.drops_leading_space
    }
}

fn check_length(actual: usize) -> Result<(), Error> {
    if actual > TEXT_BYTES_MAX {
        return Err(Error::TextTooLong {
            actual,
            max: TEXT_BYTES_MAX,
        });
    }
    Ok(())
}
