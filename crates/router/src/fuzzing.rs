//! What reads bytes of clients, issuers and operators, for fuzzing: up to the point where a request is ready to run.
//! Nothing here may panic, whatever comes.

use prost::Message as _;
use serde_json::Value;
use tramontane_proto::{inference as oip, v1};
use tramontane_tokenizer::Tokenizer;

use crate::answer_id::AnswerId;
use crate::asked::{EventId, Position};
use crate::auth::jwks;
use crate::auth::keys::parse_keys;
use crate::error::ApiError;
use crate::grpc::{completion, generation_request};
use crate::openai::{self, Parsed};
use crate::request::{GenerationRequest, prepare};
use crate::run::ServedModel;

/// The front of a router, without a cluster.
#[derive(Debug)]
pub struct Front {
    model: ServedModel,
    tokenizer: Tokenizer,
}

impl Front {
    /// Serves a model of this tokenizer.
    #[must_use]
    pub fn new(tokenizer: Tokenizer) -> Self {
        let model = ServedModel {
            id: "m".to_owned(),
            aliases: Vec::new(),
            context_length: 512,
            vocab: tokenizer.vocab_size(),
        };
        Self { model, tokenizer }
    }

    /// A body of `/v1/chat/completions`.
    pub fn chat(&self, bytes: &[u8]) {
        self.http(bytes, openai::parse_chat);
    }

    /// A body of `/v1/completions`.
    pub fn completion(&self, bytes: &[u8]) {
        self.http(bytes, openai::parse_completion);
    }

    /// A body of `/v1/responses`.
    pub fn response(&self, bytes: &[u8]) {
        self.http(bytes, openai::parse_response);
    }

    /// A body of `/tokenize` and of `/detokenize`.
    pub fn tokens(&self, bytes: &[u8]) {
        let Ok(body) = openai::parse_json(bytes) else {
            return;
        };
        if let Ok(asked) = openai::parse_tokenize(&body, &self.model) {
            let _ = asked.answer(&self.tokenizer, &self.model);
        }
        if let Ok(asked) = openai::parse_detokenize(&body, &self.model) {
            let _ = asked.answer(&self.tokenizer);
        }
    }

    /// `tramontane.v1.GenerateRequest`.
    pub fn generate(&self, bytes: &[u8]) {
        if let Ok(message) = v1::GenerateRequest::decode(bytes)
            && let Ok(request) = generation_request(message, &self.model)
        {
            self.prepare(request);
        }
    }

    /// `inference.ModelInferRequest`.
    pub fn infer(&self, bytes: &[u8]) {
        if let Ok(message) = oip::ModelInferRequest::decode(bytes)
            && let Ok(body) = completion(message)
            && let Ok(parsed) = openai::parse_completion(&body, &self.model)
        {
            self.prepare(parsed.request);
        }
    }

    fn http(&self, bytes: &[u8], parse: fn(&Value, &ServedModel) -> Result<Parsed, ApiError>) {
        if let Ok(body) = openai::parse_json(bytes)
            && let Ok(parsed) = parse(&body, &self.model)
        {
            self.prepare(parsed.request);
        }
    }

    fn prepare(&self, request: GenerationRequest) {
        let prepared = prepare(request, AnswerId::unique(0), &self.tokenizer, &self.model);
        let Ok(request) = prepared else {
            return;
        };
        for prompt in &request.prompts {
            let params = request.params(prompt, 0);
            assert!(params.validate(self.model.vocab).is_ok());
            assert!(prompt.ids.len() + params.max_tokens as usize <= 512);
        }
    }
}

/// The header `last-event-id`, files of API keys, and an issuer's keys.
pub fn proofs(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Ok(event) = text.parse::<EventId>()
        && let Position::Units(units) = &event.position
    {
        assert!(!units.is_empty());
    }
    let _ = parse_keys(bytes);
    let _ = jwks(bytes);
}
