//! Checks the constraints of requests before a worker sees them: a grammar that nobody can follow is the client's to mend.
//! Never masks anything.

use std::sync::Arc;

use tramontane_grammar::{GrammarError, Grammars, InvalidVocabulary, Token, Vocabulary};
use tramontane_tokenizer::Tokenizer;
use tramontane_types::Constraint;

use crate::error::{ApiError, ErrorKind};
use crate::request::PreparedRequest;
use crate::run::App;
use crate::tenants::TenantName;

/// What the tokens of a tokenizer stand for.
///
/// # Errors
/// When it has no tokens, or too many.
pub fn vocabulary(tokenizer: &Tokenizer) -> Result<Vocabulary, InvalidVocabulary> {
    let tokens = (0..tokenizer.vocab_size() as u32).map(|id| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        if tokenizer.is_control(id) {
            Token::Control(bytes)
        } else {
            Token::Text(bytes)
        }
    });
    Vocabulary::new(tokens, tokenizer.eos_ids())
}

/// Compiles the constraint of a tenant's request, and keeps it for the next one. Waits for a bounded time.
pub(crate) async fn check(
    app: &App,
    tenant: &TenantName,
    request: &PreparedRequest,
) -> Result<(), ApiError> {
    let Some(constraint) = &request.sampling.constraint else {
        return Ok(());
    };
    // Each tenant has a salt of its own.
    let who = app.dispatcher.tenants.salt(tenant);
    compile(&app.grammars, who, constraint, request.constraint_name).await
}

async fn compile(
    grammars: &Grammars,
    who: u64,
    constraint: &Arc<Constraint>,
    param: &str,
) -> Result<(), ApiError> {
    let compiled = grammars.compile(who, constraint).await;
    compiled.map(drop).map_err(|error| refused(&error, param))
}

fn refused(error: &GrammarError, param: &str) -> ApiError {
    if error.is_internal() {
        tracing::error!(%error, "constraints do not work");
        return ApiError::internal();
    }
    let message = format!("{param} {error}");
    if error.is_retryable() {
        // Not the client's fault, or not for sure: the same may be compiled by now, or elsewhere.
        return ApiError::new(ErrorKind::QueueFull, message);
    }
    ApiError::invalid(param, message)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_bad_grammar_is_the_clients_to_mend() {
        let tokens = [
            Token::Text(b"a"),
            Token::Text(b"b"),
            Token::Control(b"</s>"),
        ];
        let grammars = Grammars::new(Vocabulary::new(tokens, &[2]).unwrap());
        let regex = |text: &str| Arc::new(Constraint::Regex(text.into()));
        let param = "structured_outputs.regex";
        assert_eq!(compile(&grammars, 1, &regex("a+b"), param).await, Ok(()));
        let error = compile(&grammars, 1, &regex("a{2"), param)
            .await
            .unwrap_err();
        assert_eq!(error.kind, ErrorKind::Invalid);
        assert_eq!(error.param.as_deref(), Some(param));
        let begin = "structured_outputs.regex cannot be followed: ";
        assert!(error.message.starts_with(begin), "{}", error.message);
        let error = compile(&grammars, 1, &regex(""), param).await.unwrap_err();
        assert_eq!(error.message, "structured_outputs.regex must not be empty");
    }

    #[test]
    fn what_may_be_compiled_later_is_no_bad_request() {
        let limit = Duration::from_secs(5);
        for error in [
            GrammarError::Busy { limit: 3 },
            GrammarError::Stuck { limit: 3 },
            GrammarError::Waited { limit },
            GrammarError::TooSlow { limit },
        ] {
            let refused = refused(&error, "guided_regex");
            assert_eq!(refused.kind, ErrorKind::QueueFull, "{error}");
            assert_eq!(refused.message, format!("guided_regex {error}"));
        }
    }
}
