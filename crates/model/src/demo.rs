//! The demo model, built into the binary: 18 MB that greet, tell stories and know capitals in five languages.
//!
//! Its README (`/models/demo/README.md`, [`README`]) says what it can do and whom to thank for its
//! training text. Touches no disk.

/// `config.json`.
pub const CONFIG: &str = include_str!("../../../models/demo/config.json");
/// `model.safetensors`.
pub const WEIGHTS: &[u8] = include_bytes!("../../../models/demo/model.safetensors");
/// What it can do, and the attribution that must stay with the weights.
pub const README: &str = include_str!("../../../models/demo/README.md");
/// Name that clients use for it.
pub const NAME: &str = "tramontane-demo";

/// The small files that a tokenizer and a chat template are made from.
pub const TOKENIZER_FILES: [(&str, &[u8]); 4] = [
    ("config.json", CONFIG.as_bytes()),
    (
        "generation_config.json",
        include_bytes!("../../../models/demo/generation_config.json"),
    ),
    (
        "tokenizer.model",
        include_bytes!("../../../models/demo/tokenizer.model"),
    ),
    (
        "tokenizer_config.json",
        include_bytes!("../../../models/demo/tokenizer_config.json"),
    ),
];

/// Every file of the model's directory, by name.
#[must_use]
pub fn files() -> &'static [(&'static str, &'static [u8])] {
    const FILES: [(&str, &[u8]); 7] = [
        TOKENIZER_FILES[0],
        TOKENIZER_FILES[1],
        TOKENIZER_FILES[2],
        TOKENIZER_FILES[3],
        (
            "tokenizer.json",
            include_bytes!("../../../models/demo/tokenizer.json"),
        ),
        ("model.safetensors", WEIGHTS),
        ("README.md", README.as_bytes()),
    ];
    &FILES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_attribution_stays_with_the_weights() {
        assert!(README.contains("Tatoeba") && README.contains("CC-BY"));
        assert!(files().iter().any(|(name, _)| *name == "README.md"));
    }
}
