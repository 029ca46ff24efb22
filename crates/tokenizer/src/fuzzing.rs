//! What reads tokenizer files and chat templates that somebody else made, for fuzzing. Nothing here may panic or
//! go on for ever, whatever comes.

use std::path::Path;
use std::time::SystemTime;

use crate::added::AddedTokens;
use crate::chat_template::ChatTemplate;
use crate::directory::{Companions, NamedTokens};
use crate::encoder::LeadingSpace;
use crate::tokenizer::{Parts, Tokenizer};
use crate::{ChatMessage, ChatRequest, Role, hugging_face, sentencepiece, tekken};

/// Text that a tokenizer that loads is to encode.
const PROBE: &str = "Zażółć [INST] gęślą\u{0}<s> jaźń 🦀";

/// `tokenizer.json`.
pub fn tokenizer_json(bytes: &[u8]) {
    let path = Path::new("tokenizer.json");
    if let Ok(parts) = hugging_face::load(path, bytes, &|text| text.starts_with('<')) {
        probe(path, parts, Companions::default());
    }
}

/// `tekken.json`.
pub fn tekken(bytes: &[u8]) {
    let path = Path::new("tekken.json");
    if let Ok(parts) = tekken::load(path, bytes) {
        probe(path, parts, Companions::default());
    }
}

/// `tokenizer.model`.
pub fn sentencepiece(bytes: &[u8]) {
    let path = Path::new("tokenizer.model");
    let added = AddedTokens::new();
    if let Ok(parts) = sentencepiece::load(path, bytes, &added, LeadingSpace::Every) {
        probe(path, parts, Companions::default());
    }
}

/// A chat template, and behind the first zero byte what a client says.
pub fn template(tokenizer: &Tokenizer, bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let (template, said) = text.split_once('\0').unwrap_or((text, "hello"));
    let named = NamedTokens::default();
    let Ok(template) = ChatTemplate::new(Path::new("x"), template.to_owned(), None, named) else {
        return;
    };
    let request = ChatRequest {
        messages: vec![
            ChatMessage::new(Role::System, said.to_owned()),
            ChatMessage::new(Role::User, said.to_owned()),
        ],
        tools: Vec::new(),
    };
    if let Ok(ids) = template.encode(tokenizer, &request, SystemTime::UNIX_EPOCH) {
        assert!(
            ids.iter()
                .all(|&id| (id as usize) < tokenizer.vocabulary().len())
        );
    }
}

fn probe(path: &Path, parts: Parts, companions: Companions) {
    if let Ok(tokenizer) = Tokenizer::finish(path, parts, companions)
        && let Ok(ids) = tokenizer.encode_with_bos(PROBE)
    {
        let _ = tokenizer.decode(&ids, false);
    }
}
