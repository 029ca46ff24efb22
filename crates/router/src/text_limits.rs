//! What is refused by its length before it is tokenized, which takes long and counts against no quota. Never looks at
//! what a text says.

use tramontane_tokenizer::Tokenizer;

use crate::error::{ApiError, ErrorKind};
use crate::request::{Prompt, prompt_name};
use crate::run::ServedModel;

/// Longest word that may not appear. What is allowed of one are 32 tokens.
pub(crate) const WORD_BYTES_MAX: usize = 1 << 10;
/// Times that a text may be as long as the longest tokens that fit the context. A text may shrink before it is cut into
/// tokens: normalisation composes characters, templates trim messages, and a space may be written as `▁`, which has
/// three bytes where its token counts one.
const SHRINKING: usize = 4;

/// Refuses prompts of which one cannot fit the context, before any is tokenized. Those that are not much too long are
/// tokenized to find out.
pub(crate) fn check_prompts(
    prompts: &[Prompt],
    tokenizer: &Tokenizer,
    model: &ServedModel,
) -> Result<(), ApiError> {
    let context = model.context_length as usize;
    let max = context
        .saturating_mul(tokenizer.token_bytes_max())
        .saturating_mul(SHRINKING);
    for (i, prompt) in prompts.iter().enumerate() {
        let got = match prompt {
            Prompt::Text(text) => text.len(),
            Prompt::Infill { prompt, suffix } => prompt.len() + suffix.len(),
            Prompt::Chat(chat) => chat.messages.iter().map(|m| m.content.len()).sum(),
            Prompt::Ids(_) => 0,
        };
        if got > max {
            let message = format!(
                "this model's context is {context} tokens, which is at most {max} bytes of text, the prompt has {got}"
            );
            let error = ApiError::new(ErrorKind::ContextLength, message);
            return Err(error.at(&prompt_name(prompts, i)));
        }
    }
    Ok(())
}

/// Refuses words that are too long to be words.
pub(crate) fn check_words(words: &[String]) -> Result<(), ApiError> {
    for (i, word) in words.iter().enumerate() {
        let got = word.len();
        if got > WORD_BYTES_MAX {
            let path = format!("bad_words[{i}]");
            let message = format!("{path} must be at most {WORD_BYTES_MAX} bytes, got {got}");
            return Err(ApiError::invalid(&path, message));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tramontane_tokenizer::{ChatMessage, ChatRequest, Role};

    use super::*;
    use crate::answer_id::AnswerId;
    use crate::request::{GenerationRequest, Options, prepare};

    fn demo() -> (Tokenizer, ServedModel) {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
        let tokenizer = Tokenizer::from_dir(Path::new(dir)).unwrap();
        let model = ServedModel {
            id: "demo".to_owned(),
            aliases: Vec::new(),
            context_length: 16,
            vocab: tokenizer.vocab_size(),
        };
        (tokenizer, model)
    }

    fn refused(prompts: Vec<Prompt>) -> ApiError {
        let (tokenizer, model) = demo();
        let request = GenerationRequest::new(prompts, &Options::default(), &model).unwrap();
        prepare(request, AnswerId::unique(0), &tokenizer, &model).unwrap_err()
    }

    #[test]
    fn what_cannot_fit_the_context_is_refused_by_its_bytes() {
        let (tokenizer, model) = demo();
        let longest = (0..tokenizer.vocab_size() as u32)
            .filter(|&id| !tokenizer.is_control(id))
            .filter_map(|id| tokenizer.token_bytes(id).map(<[u8]>::len))
            .max();
        assert_eq!(longest, Some(tokenizer.token_bytes_max()));
        let max = model.context_length as usize * tokenizer.token_bytes_max() * SHRINKING;
        let by_bytes = format!("at most {max} bytes of text, the prompt has {}", max + 1);
        let text = |bytes: usize| "a".repeat(bytes);
        let infill = |bytes: usize| Prompt::Infill {
            prompt: text(bytes / 2),
            suffix: text(bytes.div_ceil(2)),
        };
        let chat = |bytes: usize| {
            let message = |bytes| ChatMessage::new(Role::User, text(bytes));
            Prompt::Chat(ChatRequest {
                messages: vec![message(bytes / 2), message(bytes.div_ceil(2))],
                tools: Vec::new(),
            })
        };
        for prompts in [
            vec![Prompt::Text(text(max + 1))],
            vec![infill(max + 1)],
            vec![chat(max + 1)],
            // Also behind one that is refused for its tokens.
            vec![Prompt::Text(text(max)), Prompt::Text(text(max + 1))],
        ] {
            let error = refused(prompts);
            assert_eq!(error.kind, ErrorKind::ContextLength);
            assert!(error.message.contains(&by_bytes), "{error}");
        }
        let by_tokens = refused(vec![Prompt::Text(text(max))]);
        assert_eq!(by_tokens.kind, ErrorKind::ContextLength);
        assert!(by_tokens.message.contains("leaves no room"), "{by_tokens}");
    }

    #[test]
    fn what_is_no_word_is_refused_by_its_bytes() {
        let (tokenizer, model) = demo();
        let asked = |word: String| {
            let options = Options {
                bad_words: vec!["sea".to_owned(), word],
                ..Options::default()
            };
            let prompts = vec![Prompt::Text("a".to_owned())];
            GenerationRequest::new(prompts, &options, &model)
        };
        let error = asked("x".repeat(WORD_BYTES_MAX + 1)).unwrap_err();
        assert_eq!(
            (error.param.as_deref(), &*error.message),
            (
                Some("bad_words[1]"),
                "bad_words[1] must be at most 1024 bytes, got 1025"
            )
        );
        // Whether it has few tokens is found out.
        let request = asked(" ".repeat(WORD_BYTES_MAX - 1) + "x").unwrap();
        prepare(request, AnswerId::unique(0), &tokenizer, &model).unwrap();
    }
}
