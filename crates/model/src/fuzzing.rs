//! What reads bytes of a checkpoint that somebody else made, for fuzzing. Nothing here may panic, whatever comes.

use crate::gguf::{Header, config, tensors};
use crate::manifest;

/// The begin of a safetensors file.
pub fn safetensors(bytes: &[u8]) {
    let _ = crate::tensors::read_header("x.safetensors", bytes, bytes.len());
}

/// A GGUF file without its tensors' data: header, places of tensors, and every value as what it may be asked for.
pub fn gguf(bytes: &[u8]) {
    let Ok(header) = Header::read("x.gguf", bytes) else {
        return;
    };
    let _ = tensors::entries("x.gguf", &header, bytes.len());
    let tables = config::Tables {
        vocab: 4,
        is_tied: true,
    };
    let _ = config::read(&header.metadata, tables);
    for key in header.metadata.keys() {
        let _ = header.metadata.texts(key);
        let _ = header.metadata.numbers(key);
        let _ = header.metadata.wholes(key);
        let _ = header.metadata.flag(key);
    }
}

/// `config.json`, and a manifest.
pub fn config(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = crate::ModelConfig::parse(text);
        let _ = manifest::parse(text);
    }
}
