//! Words that may not appear in an answer become tokens.

use tramontane_tokenizer::Tokenizer;
use tramontane_types::TokenId;
use tramontane_types::sampling::BAD_WORD_TOKENS_MAX;

use crate::error::ApiError;

/// The tokens of words that may not appear, as vLLM makes them: each as it begins a text, and as it follows a space
/// where that is a word of another first token and the same length. Those of too many tokens are not made twice.
pub(crate) fn bad_words(
    words: &[String],
    tokenizer: &Tokenizer,
) -> Result<Vec<Vec<TokenId>>, ApiError> {
    let mut found: Vec<Vec<TokenId>> = Vec::with_capacity(words.len());
    for (i, word) in words.iter().enumerate() {
        let path = format!("bad_words[{i}]");
        let word = word.trim_start();
        let encode = |text: &str| {
            let ids = tokenizer.encode(text);
            ids.map_err(|error| ApiError::from(error).at(&path))
        };
        let plain = encode(word)?;
        if plain.is_empty() {
            return Err(ApiError::invalid(
                &path,
                format!("{path} must have at least one token"),
            ));
        }
        if plain.len() > BAD_WORD_TOKENS_MAX {
            // Whoever validates it says so.
            return Ok(vec![plain]);
        }
        let spaced = encode(&format!(" {word}"))?;
        let is_another = spaced.first() != plain.first() && spaced.len() == plain.len();
        found.push(plain);
        if is_another {
            found.push(spaced);
        }
    }
    Ok(found)
}
