//! Every parser of foreign bytes as a function of bytes. What it must not do is panic, run for ever, or take memory
//! without a bound; what it says of the bytes is tested where it lives.
//!
//! `cargo test -p tramontane-fuzz` runs each over its corpus and what is close to it; `make fuzz` has libFuzzer look
//! for more.

pub mod mutate;

use std::path::Path;
use std::sync::{Arc, LazyLock};

use tramontane_coordination::fuzzing as coordination;
use tramontane_exchange::CallLimits;
use tramontane_exchange::fuzzing as exchange;
use tramontane_grammar::{Grammars, Matcher, Next, TokenMask};
use tramontane_model::fuzzing as model;
use tramontane_router::fuzzing::{Front, proofs};
use tramontane_tokenizer::Tokenizer;
use tramontane_tokenizer::fuzzing as tokenizer;
use tramontane_types::{Constraint, ModelGeometry, TokenId};
use tramontane_worker::fuzzing as worker;

/// One parser.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Reads bytes.
    pub run: fn(&[u8]),
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("chat", |bytes| FRONT.chat(bytes)),
    target("completion", |bytes| FRONT.completion(bytes)),
    target("response", |bytes| FRONT.response(bytes)),
    target("tokens", |bytes| FRONT.tokens(bytes)),
    target("generate", |bytes| FRONT.generate(bytes)),
    target("infer", |bytes| FRONT.infer(bytes)),
    target("proofs", proofs),
    target("constraint", constraint),
    target("sequence", worker::sequence),
    target("expert_frame", |bytes| {
        exchange::frame(bytes, &GEOMETRY, &LIMITS);
    }),
    target("host_socket", |bytes| {
        exchange::socket(bytes, &GEOMETRY, &LIMITS);
    }),
    target("island", |bytes| worker::island(bytes, &GEOMETRY)),
    target("weights", worker::weights),
    target("store_value", coordination::values),
    target("safetensors", model::safetensors),
    target("gguf", model::gguf),
    target("model_config", model::config),
    target("tokenizer_json", tokenizer::tokenizer_json),
    target("tekken", tokenizer::tekken),
    target("sentencepiece", tokenizer::sentencepiece),
    target("template", |bytes| tokenizer::template(&TOKENIZER, bytes)),
];

/// The target of this name.
#[must_use]
pub fn named(name: &str) -> Option<Target> {
    TARGETS.iter().find(|target| target.name == name).copied()
}

const fn target(name: &'static str, run: fn(&[u8])) -> Target {
    Target { name, run }
}

#[expect(clippy::expect_used, reason = "a file of this repository")]
static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| {
    let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/demo");
    Tokenizer::from_dir(Path::new(dir)).expect("the demo's tokenizer")
});
static FRONT: LazyLock<Front> = LazyLock::new(|| Front::new(TOKENIZER.clone()));
#[expect(clippy::expect_used, reason = "of a tokenizer of this repository")]
static GRAMMARS: LazyLock<Grammars> = LazyLock::new(|| {
    Grammars::new(tramontane_router::vocabulary(&TOKENIZER).expect("the demo's vocabulary"))
});

/// The small model that other workers send frames, steps and calls for.
const GEOMETRY: ModelGeometry = ModelGeometry {
    hidden: 8,
    num_layers: 2,
    num_heads: 1,
    num_kv_heads: 1,
    head_dim: 8,
    ff: 256,
    num_experts: 4,
    top_k: 2,
    vocab: 16,
    max_positions: 64,
    rope_theta: 1e4,
    rms_eps: 1e-5,
    sliding_window: None,
};
const LIMITS: CallLimits = CallLimits {
    rows_max: 16,
    vectors_max: 64,
    row_bytes: 16,
    vector_bytes: 32,
};

/// Tokens that an answer in a constraint goes on by.
const TOKENS: usize = 16;

/// A constraint, of the kind that the first byte says.
fn constraint(bytes: &[u8]) {
    let Some((kind, text)) = bytes.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    let constraint = match kind {
        b's' => Constraint::JsonSchema(text.into()),
        b'r' => Constraint::Regex(text.into()),
        _ => Constraint::Lark(text.into()),
    };
    let constraint = Arc::new(constraint);
    let mut matcher = match GRAMMARS.blocking_matcher(&constraint, &[]) {
        Ok(matcher) => matcher,
        Err(error) => {
            assert!(!error.is_retryable(), "{error}");
            return;
        }
    };
    let tokens = walk(&mut matcher, bytes);
    if matcher.allowed().is_err() {
        return;
    }
    // Elsewhere the sequence goes on as here.
    match GRAMMARS.blocking_matcher(&constraint, &tokens) {
        Ok(mut resumed) => assert!(next(&mut resumed) == next(&mut matcher), "another mask"),
        Err(error) => assert!(tokens.is_empty(), "resumed tokens are refused: {error}"),
    }
}

/// What may come next; nothing at the end.
fn next(matcher: &mut Matcher) -> Option<TokenMask> {
    match matcher.allowed() {
        Ok(Next::OneOf(mask)) => Some(mask.clone()),
        Ok(Next::Ended) | Err(_) => None,
    }
}

/// Goes on by tokens that are allowed, chosen by `bytes`.
fn walk(matcher: &mut Matcher, bytes: &[u8]) -> Vec<TokenId> {
    let vocab = GRAMMARS.vocabulary().words().len();
    let mut tokens = Vec::new();
    for &byte in bytes.iter().rev().take(TOKENS) {
        let Ok(Next::OneOf(mask)) = matcher.allowed() else {
            break;
        };
        let first = usize::from(byte) * vocab / 256;
        let mut ids = (first..vocab).chain(0..first).map(|id| id as TokenId);
        let Some(id) = ids.find(|&id| mask.allows(id)) else {
            break;
        };
        if matcher.accept(id).is_err() {
            break;
        }
        tokens.push(id);
    }
    tokens
}
