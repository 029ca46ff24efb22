//! Our ids against those of mistral-common, sentencepiece and transformers, and hostile files.
//! The real tokenizer files come with the Python package mistral-common; `make test` installs it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests, which clippy.toml allows only inside test functions"
)]

mod agreement;
mod hostile;
mod templates;
mod texts;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tramontane_tokenizer::{
    CallPiece, ChatFormat, ChatMessage, ChatRequest, DecodeStart, DecodeStream, Error,
    InstructVersion, Role, TEXT_BYTES_MAX, Tokenizer, ToolCall, ToolCallParser,
};

const FILES: [(&str, &str); 5] = [
    ("v1", "tokenizer.model.v1"),
    ("v2", "mistral_instruct_tokenizer_240216.model.v2"),
    ("v3", "mistral_instruct_tokenizer_240323.model.v3"),
    ("v7", "mistral_instruct_tokenizer_241114.model.v7"),
    ("tekken", "tekken_240718.json"),
];

/// Versions of which no file comes with mistral-common: that of v3 with more control tokens, as in `make_golden.py`.
const DERIVED: [&str; 2] = ["v11", "v13"];
const LISTED: [&str; 22] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
    "[ARGS]",
    "[CALL_ID]",
];

fn derived(dir: &Path, version: &str) -> Tokenizer {
    let file = std::fs::read(dir.join("tekken_240718.json")).unwrap();
    let mut file: Value = serde_json::from_slice(&file).unwrap();
    file["config"]["version"] = version.into();
    let listed = LISTED.iter().enumerate();
    file["special_tokens"] = listed
        .map(|(rank, text)| json!({"rank": rank, "token_str": text, "is_control": true}))
        .collect();
    from_dir(&[("tekken.json", file.to_string().as_bytes())]).unwrap()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(name: &str) -> String {
    std::fs::read_to_string(repository().join("tests/golden/tokenizer").join(name)).unwrap()
}

/// Where mistral-common's files lie, or `None` with a word about it.
fn real_files() -> Option<PathBuf> {
    #[expect(
        clippy::disallowed_methods,
        reason = "says where test files lie, no configuration"
    )]
    let named = std::env::var("TRAMONTANE_TEST_TOKENIZERS")
        .ok()
        .filter(|dir| !dir.is_empty());
    let mut candidates: Vec<PathBuf> = named.into_iter().map(PathBuf::from).collect();
    let versions = repository().join(".venv/lib").read_dir();
    candidates.extend(
        versions
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path().join("site-packages/mistral_common/data")),
    );
    let found = candidates
        .into_iter()
        .find(|dir| FILES.iter().all(|(_, file)| dir.join(file).is_file()));
    if found.is_none() {
        // Not println: the test harness hides what a passing test prints.
        let _ = writeln!(
            std::io::stderr(),
            "NOT TESTED against mistral-common: its tokenizer files are not here. `make test` installs them; or \
             set TRAMONTANE_TEST_TOKENIZERS to the directory mistral_common/data of the Python package"
        );
    }
    found
}

fn real(name: &str) -> Option<&'static Tokenizer> {
    static LOADED: OnceLock<Option<Vec<(&str, Tokenizer)>>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let dir = real_files()?;
        let mut loaded: Vec<(&str, Tokenizer)> = FILES
            .map(|(name, file)| (name, Tokenizer::from_file(&dir.join(file)).unwrap()))
            .into();
        loaded.extend(DERIVED.map(|version| (version, derived(&dir, version))));
        Some(loaded)
    });
    let (_, tokenizer) = loaded
        .as_ref()?
        .iter()
        .find(|(loaded, _)| *loaded == name)?;
    Some(tokenizer)
}

fn demo() -> &'static Tokenizer {
    static LOADED: OnceLock<Tokenizer> = OnceLock::new();
    LOADED.get_or_init(|| Tokenizer::from_dir(&repository().join("models/demo")).unwrap())
}

fn digest(ids: &[u32]) -> String {
    let text: Vec<String> = ids.iter().map(u32::to_string).collect();
    let hash = Sha256::digest(text.join(","));
    let hex: String = hash[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}:{hex}", ids.len())
}

fn request(value: &Value) -> ChatRequest {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let message = |message: &Value| ChatMessage {
        role: match message["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            role => panic!("{role}"),
        },
        content: text(&message["content"]),
        tool_calls: message["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|call| ToolCall {
                id: text(&call["id"]),
                name: text(&call["function"]["name"]),
                arguments: text(&call["function"]["arguments"]),
            })
            .collect(),
        tool_call_id: message["tool_call_id"].as_str().map(str::to_owned),
        name: message["name"].as_str().map(str::to_owned),
        prefix: message["prefix"] == true,
    };
    ChatRequest {
        messages: value["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(message)
            .collect(),
        tools: value["tools"].as_array().cloned().unwrap_or_default(),
    }
}

fn say(messages: &[(Role, &str)]) -> ChatRequest {
    ChatRequest {
        messages: messages
            .iter()
            .map(|(role, text)| ChatMessage::new(*role, *text))
            .collect(),
        tools: Vec::new(),
    }
}

/// A directory with these files, and the tokenizer in it or why not.
fn from_dir(files: &[(&str, &[u8])]) -> Result<Tokenizer, Error> {
    let dir = tempfile::tempdir().unwrap();
    for (name, content) in files {
        std::fs::write(dir.path().join(name), content).unwrap();
    }
    Tokenizer::from_dir(dir.path())
}

fn demo_file(name: &str) -> Vec<u8> {
    std::fs::read(repository().join("models/demo").join(name)).unwrap()
}

fn demo_json() -> Value {
    serde_json::from_slice(&demo_file("tokenizer.json")).unwrap()
}

fn with_template(template: &str) -> Result<Tokenizer, Error> {
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template});
    from_dir(&[
        ("tokenizer.model", &demo_file("tokenizer.model")),
        ("tokenizer_config.json", config.to_string().as_bytes()),
    ])
}

/// What a parser makes of an answer: its text, and its calls as id, name and arguments.
fn read_calls(
    tokenizer: &Tokenizer,
    ids: &[u32],
) -> (String, Vec<(Option<String>, String, String)>) {
    let mut parser = ToolCallParser::new(tokenizer, DecodeStart::Text).unwrap();
    let mut pieces: Vec<CallPiece> = ids.iter().flat_map(|id| parser.push(*id)).collect();
    pieces.extend(parser.finish());
    let (mut text, mut calls) = (String::new(), Vec::new());
    for piece in pieces {
        match piece {
            CallPiece::Text(more) => text.push_str(&more),
            CallPiece::Begin { index, id, name } => {
                assert_eq!(index, calls.len());
                calls.push((id, name, String::new()));
            }
            CallPiece::Arguments { index, text } => {
                assert_eq!(index + 1, calls.len());
                calls[index].2.push_str(&text);
            }
        }
    }
    (text, calls)
}
