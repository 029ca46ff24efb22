//! Tokenizers from GGUF metadata cut text as the files that the metadata was made from.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy.toml allows only inside test functions"
)]

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use proptest::prelude::*;
use sentencepiece_model::SentencePieceModel;
use serde_json::Value;
use tramontane_tokenizer::{ChatFormat, ChatMessage, ChatRequest, GgufTokenizer, Role, Tokenizer};

/// Ranks of tekken that are compared: merges of all of them would take long to find.
const TEKKEN_RANKS: usize = 6000;
const FILE: &str = "model.gguf";

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// What a GGUF file would own.
#[derive(Default)]
struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i64>,
    merges: Vec<String>,
}

impl Vocabulary {
    fn metadata(&self) -> GgufTokenizer<'_> {
        GgufTokenizer {
            model: Some("llama"),
            tokens: self.tokens.iter().map(String::as_str).collect(),
            scores: self.scores.clone(),
            types: self.types.clone(),
            merges: self.merges.iter().map(String::as_str).collect(),
            bos: Some(1),
            eos: vec![2],
            unk: Some(0),
            ..GgufTokenizer::default()
        }
    }
}

fn demo_vocabulary() -> Vocabulary {
    let file = std::fs::read(repository().join("models/demo/tokenizer.model")).unwrap();
    let model = SentencePieceModel::from_slice(file).unwrap();
    let mut vocabulary = Vocabulary::default();
    for piece in &model.pieces {
        vocabulary.tokens.push(piece.piece().to_owned());
        vocabulary.scores.push(piece.score());
        vocabulary.types.push(piece.r#type() as i64);
    }
    vocabulary
}

fn demo() -> &'static [Tokenizer; 2] {
    static LOADED: OnceLock<[Tokenizer; 2]> = OnceLock::new();
    LOADED.get_or_init(|| {
        let own = Tokenizer::from_dir(&repository().join("models/demo")).unwrap();
        let vocabulary = demo_vocabulary();
        let gguf = Tokenizer::from_gguf(Path::new(FILE), &vocabulary.metadata()).unwrap();
        [own, gguf]
    })
}

/// GPT-2's characters for bytes.
fn alphabet() -> Vec<char> {
    let mut next = 256;
    let character = |byte: u8| {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            return char::from(byte);
        }
        next += 1;
        char::from_u32(next - 1).unwrap()
    };
    (0..=255).map(character).collect()
}

/// The pair that a token was merged from, by the ranks below its own.
fn parts(ranks: &HashMap<&[u8], usize>, token: &[u8]) -> [Vec<u8>; 2] {
    let own = ranks[token];
    let mut parts: Vec<Vec<u8>> = token.iter().map(|byte| vec![*byte]).collect();
    while parts.len() > 2 {
        let pairs = parts.windows(2).enumerate();
        let rank = |pair: &[Vec<u8>]| ranks.get(pair.concat().as_slice()).copied();
        let best = pairs.filter_map(|(at, pair)| Some((rank(pair)?, at)));
        let (_, at) = best.filter(|(rank, _)| *rank < own).min().unwrap();
        let right = parts.remove(at + 1);
        parts[at].extend(right);
    }
    parts.try_into().unwrap()
}

/// The first ranks of a real tekken file: the file as it is, and as metadata.
fn tekken() -> Option<&'static [Tokenizer; 2]> {
    static LOADED: OnceLock<Option<[Tokenizer; 2]>> = OnceLock::new();
    LOADED.get_or_init(load_tekken).as_ref()
}

fn load_tekken() -> Option<[Tokenizer; 2]> {
    #[expect(
        clippy::disallowed_methods,
        reason = "says where test files lie, no configuration"
    )]
    let folder = std::env::var("TRAMONTANE_TEST_TOKENIZERS").ok();
    let file = PathBuf::from(folder.unwrap_or_default()).join("tekken_240718.json");
    let Ok(text) = std::fs::read_to_string(&file) else {
        let hint = "NOT TESTED against tekken: TRAMONTANE_TEST_TOKENIZERS names no folder with tekken_240718.json";
        let _ = writeln!(std::io::stderr(), "{hint}");
        return None;
    };
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let specials = file["config"]["default_num_special_tokens"]
        .as_u64()
        .unwrap();
    file["config"]["default_vocab_size"] = (specials + TEKKEN_RANKS as u64).into();
    file["vocab"].as_array_mut().unwrap().truncate(TEKKEN_RANKS);
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tekken.json"), file.to_string()).unwrap();
    let own = Tokenizer::from_dir(folder.path()).unwrap();

    let alphabet = alphabet();
    let spelled = |bytes: &[u8]| -> String {
        bytes
            .iter()
            .map(|byte| alphabet[usize::from(*byte)])
            .collect()
    };
    let ids = 0..specials as u32 + TEKKEN_RANKS as u32;
    let (controls, texts): (Vec<u32>, Vec<u32>) = ids.partition(|id| own.is_control(*id));
    let bytes = |id: &u32| own.token_bytes(*id).unwrap();
    let ranks: HashMap<&[u8], usize> = texts.iter().map(bytes).zip(0..).collect();
    let mut vocabulary = Vocabulary::default();
    for id in &controls {
        vocabulary
            .tokens
            .push(String::from_utf8(bytes(id).to_vec()).unwrap());
        vocabulary.types.push(3);
    }
    for id in &texts {
        vocabulary.tokens.push(spelled(bytes(id)));
        vocabulary.types.push(1);
        if bytes(id).len() > 1 {
            let pair = parts(&ranks, bytes(id)).map(|part| spelled(&part));
            vocabulary.merges.push(pair.join(" "));
        }
    }
    let metadata = GgufTokenizer {
        model: Some("gpt2"),
        pre: Some("tekken"),
        ..vocabulary.metadata()
    };
    let gguf = Tokenizer::from_gguf(Path::new(FILE), &metadata).unwrap();
    Some([own, gguf])
}

fn check_equal([own, gguf]: &[Tokenizer; 2], text: &str) {
    let ids = own.encode_with_bos(text).unwrap();
    assert_eq!(gguf.encode_with_bos(text).unwrap(), ids, "{text:?}");
    assert_eq!(gguf.decode(&ids, false), own.decode(&ids, false));
}

const TEXTS: [&str; 8] = [
    "",
    " ",
    "Once upon a time, there was a  little girl.\n\n  12345 ",
    "Îñţérñåţîöñåļ 🙂 naïve Straße ΑΒΓ 你好",
    "[INST] </s> <s> <unk> <0x0A> <SPECIAL_20>",
    "\t\r\n fn main() { println!(\"{:?}\", x_1.f()); }",
    "ÉCOLE École don't I'LL",
    "▁▁ ▁a",
];

#[test]
fn sentencepiece_metadata_is_the_model() {
    for text in TEXTS {
        check_equal(demo(), text);
    }
    let [own, gguf] = demo();
    assert_eq!(gguf.vocab_size(), own.vocab_size());
    assert_eq!(
        (gguf.bos_id(), gguf.eos_ids()),
        (own.bos_id(), own.eos_ids())
    );
}

#[test]
fn tekken_metadata_is_the_file() {
    let Some(pair) = tekken() else { return };
    for text in TEXTS {
        check_equal(pair, text);
    }
    assert_eq!(pair[1].control_id("[INST]"), pair[0].control_id("[INST]"));
}

#[test]
fn the_template_of_the_metadata_is_used() {
    let vocabulary = demo_vocabulary();
    let mut metadata = vocabulary.metadata();
    let chat =
        |metadata: &GgufTokenizer<'_>| Tokenizer::from_gguf(Path::new(FILE), metadata).unwrap();
    assert!(matches!(
        chat(&metadata).chat_format(),
        ChatFormat::Instruct(_)
    ));
    metadata.chat_template =
        Some("{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}");
    let tokenizer = chat(&metadata);
    let request = ChatRequest {
        messages: vec![ChatMessage::new(Role::User, "Hello")],
        tools: Vec::new(),
    };
    let own = &demo()[0];
    assert_eq!(
        tokenizer.encode_chat(&request).unwrap(),
        own.encode_chat(&request).unwrap()
    );
    metadata.adds_bos = Some(false);
    assert_eq!(
        chat(&metadata).encode_with_bos("a").unwrap(),
        own.encode("a").unwrap()
    );
    metadata.adds_space_prefix = Some(false);
    assert_ne!(
        chat(&metadata).encode("a").unwrap(),
        own.encode("a").unwrap()
    );
}

#[test]
fn what_is_not_supported_is_refused_with_what_to_do() {
    let vocabulary = demo_vocabulary();
    let good = vocabulary.metadata();
    let refused = |change: &dyn Fn(&mut GgufTokenizer<'_>)| {
        let mut metadata = good.clone();
        change(&mut metadata);
        let error = Tokenizer::from_gguf(Path::new(FILE), &metadata).unwrap_err();
        error.to_string()
    };
    type Change = fn(&mut GgufTokenizer<'_>);
    let cases: [(Change, &str); 8] = [
        (
            |m| m.model = None,
            "put tokenizer.model, tekken.json or tokenizer.json",
        ),
        (
            |m| (m.model, m.pre) = (Some("gpt2"), Some("llama-bpe")),
            "gpt2 with llama-bpe",
        ),
        (|m| m.tokens.clear(), "number of tokenizer.ggml.tokens"),
        (|m| m.types[5] = 9, "tokenizer.ggml.token_type is 9"),
        (
            |m| m.types.truncate(9),
            "number of tokenizer.ggml.token_type",
        ),
        (|m| m.scores.clear(), "number of tokenizer.ggml.scores"),
        (|m| m.bos = Some(1 << 30), "id of bos"),
        (|m| m.normalizes = true, "remove_extra_whitespaces"),
    ];
    for (change, part) in cases {
        let error = refused(&change);
        assert!(
            error.contains(part) && error.contains(FILE),
            "{error:?} does not say {part:?}"
        );
    }
}

proptest! {
    #[test]
    fn any_text_is_cut_alike(text in "\\PC{0,40}|[a-z ▁\n<>/0-9]{0,40}") {
        check_equal(demo(), &text);
        if let Some(pair) = tekken() {
            check_equal(pair, &text);
        }
    }
}
