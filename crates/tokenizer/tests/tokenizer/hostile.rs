//! Files that are cut off, altered or made to harm are refused at load, or harmless.

use super::*;

#[test]
fn truncated_and_altered_files_are_refused() {
    let model = demo_file("tokenizer.model");
    let json = demo_file("tokenizer.json");
    for cut in [0, 1, 10, 1000, 30_001] {
        for (name, bytes) in [("tokenizer.model", &model), ("tokenizer.json", &json)] {
            let error = from_dir(&[(name, &bytes[..cut])]).unwrap_err();
            assert!(error.to_string().contains(name), "{cut}: {error}");
            assert!(!error.is_invalid_request());
        }
    }
    for place in (0..4000).step_by(7) {
        let mut altered = model.clone();
        altered[place] ^= 0x5A;
        if let Ok(tokenizer) = from_dir(&[("tokenizer.model", &altered)]) {
            tokenizer.encode("still no panic: 🙂 ▁\u{0}").unwrap();
        }
    }
    assert!(matches!(from_dir(&[]), Err(Error::NoTokenizer { .. })));
    let sizes = from_dir(&[
        ("tokenizer.model", &model),
        ("config.json", br#"{"eos_token_id": [2, 99999]}"#),
    ]);
    assert!(sizes.unwrap_err().to_string().contains("99999"));
    assert!(from_dir(&[("tokenizer.model", &model), ("config.json", b"{")]).is_err());
}

#[test]
fn hostile_tokenizer_json_is_refused_at_load() {
    let long_id = 1u64 << 40;
    type Change = (&'static str, Box<dyn Fn(&mut Value)>);
    let changes: Vec<Change> = vec![
        (
            "merges",
            Box::new(|file| file["model"]["merges"] = json!([["zz", "qqq"]])),
        ),
        (
            "merges",
            Box::new(|file| file["model"]["merges"] = json!(["a"])),
        ),
        (
            "merges",
            Box::new(|file| file["model"]["merges"] = json!([["a", "[INST]"]])),
        ),
        (
            "vocab",
            Box::new(move |file| file["model"]["vocab"]["a"] = json!(long_id)),
        ),
        (
            "vocab",
            Box::new(|file| file["model"]["vocab"]["a"] = json!(-1)),
        ),
        (
            "vocab",
            Box::new(|file| file["model"]["vocab"]["a"] = json!(7)),
        ),
        ("vocab", Box::new(|file| file["model"]["vocab"] = json!([]))),
        (
            "added_tokens[0].id",
            Box::new(|file| file["added_tokens"][0]["id"] = json!(1u64 << 31)),
        ),
        (
            "added_tokens[1].content",
            Box::new(|file| file["added_tokens"][1]["content"] = json!("")),
        ),
        (
            "model.type",
            Box::new(|file| file["model"]["type"] = json!("WordLevel")),
        ),
        (
            "decoder",
            Box::new(|file| file["decoder"] = json!({"type": "CTC"})),
        ),
        (
            "test text",
            Box::new(|file| {
                file["normalizer"] =
                    json!({"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""});
            }),
        ),
        (
            "content",
            Box::new(|file| {
                file["normalizer"] =
                    json!({"type": "Replace", "pattern": {"Regex": "(((("}, "content": ""});
            }),
        ),
    ];
    for (field, change) in changes {
        let mut file = demo_json();
        change(&mut file);
        let error = from_dir(&[("tokenizer.json", file.to_string().as_bytes())]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains(field) && text.contains("tokenizer.json"),
            "{field}: {text}"
        );
    }
    assert!(from_dir(&[("tokenizer.json", demo_json().to_string().as_bytes())]).is_ok());
}

/// Every id that comes out is in the vocabulary, and none of `controls`.
fn check_encodes(tokenizer: &Tokenizer, text: &str, controls: &[u32]) -> Vec<u32> {
    let ids = tokenizer.encode(text).unwrap();
    let size = tokenizer.vocab_size();
    assert!(ids.iter().all(|id| (*id as usize) < size), "{ids:?}");
    assert!(ids.iter().all(|id| !controls.contains(id)), "{ids:?}");
    ids
}

fn added_token(id: u32, content: &str, special: bool) -> Value {
    json!({
        "id": id, "content": content, "special": special,
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
    })
}

#[test]
fn sparse_ids_are_a_vocabulary_with_holes() {
    let far = 900_000;
    let load = |id: u32, content: &str, special: bool| {
        let mut file = demo_json();
        let next = file["model"]["vocab"].as_object().unwrap().len() as u32;
        let added = file["added_tokens"].as_array_mut().unwrap();
        added.push(added_token(next, "kilowatt", false));
        added.push(added_token(id, content, special));
        from_dir(&[("tokenizer.json", file.to_string().as_bytes())])
    };
    // Ordinary text with an id that the library would give to something else: refused, not encoded as that.
    let error = load(far, "megawatt", false).unwrap_err().to_string();
    assert!(error.contains("id of added token \"megawatt\""), "{error}");
    let tokenizer = load(far, "<far>", true).unwrap();
    assert_eq!(tokenizer.vocab_size(), far as usize + 1);
    let ids = check_encodes(&tokenizer, "a <far> kilowatt \u{0}🦀", &[far]);
    let text = tokenizer.decode(&ids, false);
    assert!(
        text.starts_with("a <far> kilowatt ") && text.ends_with("\u{0}🦀"),
        "{text:?}"
    );
    // A hole stands for nothing.
    let hole = far - 1;
    assert!(tokenizer.token_bytes(hole).is_none_or(<[u8]>::is_empty));
    assert_eq!(tokenizer.decode(&[hole], false), "");
    assert_eq!(tokenizer.token_bytes(far + 1), None);
}

#[test]
fn added_tokens_that_shadow_bytes_are_refused() {
    let load = |file: &Value| from_dir(&[("tokenizer.json", file.to_string().as_bytes())]);
    let levels = golden("byte_level/tokenizer.json");
    let levels: Value = serde_json::from_str(&levels).unwrap();
    for (file, byte) in [
        (demo_json(), "<0x41>"),
        (demo_json(), "<0x00>"),
        (levels, "Ā"),
    ] {
        load(&file).unwrap();
        let id = file["model"]["vocab"][byte].as_u64().unwrap() as u32;
        for (content, special) in [
            ("A", true),
            ("kilowatt", false),
            (byte, true),
            ("<0x41>", false),
            ("\u{1}", true),
        ] {
            let mut file = file.clone();
            let added = file["added_tokens"].as_array_mut().unwrap();
            added.push(added_token(id, content, special));
            let text = load(&file).unwrap_err().to_string();
            let says = text.contains("id of added token") && text.contains("tokenizer.json");
            assert!(says, "{byte} {content:?} {special}: {text}");
        }
    }
}

/// `tokenizer.model`, written here: protobuf is small.
mod pieces {
    pub(crate) const NORMAL: u8 = 1;
    pub(crate) const UNKNOWN: u8 = 2;
    pub(crate) const CONTROL: u8 = 3;
    pub(crate) const BYTE: u8 = 6;

    fn varint(mut number: u64) -> Vec<u8> {
        let mut out = Vec::new();
        while number >= 128 {
            out.push(number as u8 | 128);
            number >>= 7;
        }
        out.push(number as u8);
        out
    }

    fn number(field: u64, value: u64) -> Vec<u8> {
        [varint(field << 3), varint(value)].concat()
    }

    pub(crate) fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
        [
            varint(field << 3 | 2),
            varint(value.len() as u64),
            value.to_vec(),
        ]
        .concat()
    }

    pub(crate) fn piece(text: &str, kind: u8) -> Vec<u8> {
        bytes(
            1,
            &[bytes(1, text.as_bytes()), number(3, kind.into())].concat(),
        )
    }

    /// The specifications behind the pieces: of byte pairs, with ids of bos and eos.
    pub(crate) fn specs(bos: u64, eos: u64) -> Vec<u8> {
        let trainer = [
            number(3, 2),
            number(35, 1),
            number(40, 0),
            number(41, bos),
            number(42, eos),
        ];
        let normalizer = [bytes(1, b"identity"), number(3, 1), number(4, 0)];
        [bytes(2, &trainer.concat()), bytes(3, &normalizer.concat())].concat()
    }

    /// The pieces that every model has: control tokens and bytes.
    pub(crate) fn base() -> Vec<u8> {
        let mut all = [
            piece("<unk>", UNKNOWN),
            piece("<s>", CONTROL),
            piece("</s>", CONTROL),
        ]
        .concat();
        for byte in 0..=255 {
            all.extend(piece(&format!("<0x{byte:02X}>"), BYTE));
        }
        for text in ["▁", "a", "b", "ab"] {
            all.extend(piece(text, NORMAL));
        }
        all
    }
}

#[test]
fn hostile_sentencepiece_files_are_refused_or_harmless() {
    use pieces::{BYTE, CONTROL, NORMAL, UNKNOWN, base, bytes, piece, specs};
    let load = |file: &[u8]| from_dir(&[("tokenizer.model", file)]);
    let with = |more: &[Vec<u8>]| [base(), more.concat(), specs(1, 2)].concat();
    let tokenizer = load(&with(&[])).unwrap();
    assert_eq!(
        tokenizer.decode(&tokenizer.encode("abc").unwrap(), false),
        "abc"
    );
    let refused = |file: &[u8], what: &str| {
        let text = load(file).unwrap_err().to_string();
        assert!(text.contains("tokenizer.model"), "{what}: {text}");
    };
    refused(&with(&[piece("</s>", CONTROL)]), "a control token twice");
    refused(&with(&[piece("<0x1>", BYTE)]), "a byte that is none");
    let empty = [piece("<unk>", UNKNOWN), piece("<s>", CONTROL), specs(1, 1)].concat();
    let text = load(&empty).unwrap_err().to_string();
    assert!(text.contains("pieces") && text.contains("none"), "{text}");
    refused(&[base(), specs(99_999, 2)].concat(), "a bos far off");
    refused(&[base(), specs(1, 99_999)].concat(), "an eos far off");
    // A length of 2^62 before three bytes; a varint that never ends.
    let huge = [&[0x0a][..], &[0xff; 8], &[0x3f], b"abc"].concat();
    refused(&huge, "a piece of 2^62 bytes");
    refused(&[0xff; 64], "a field without an end");
    let many = piece("x", NORMAL).repeat((1 << 20) + 1);
    refused(
        &[many, specs(1, 2)].concat(),
        "more pieces than a vocabulary may have",
    );
    refused(
        &with(&[piece(&"a".repeat(1025), NORMAL)]),
        "a piece of 1025 bytes",
    );
    // Of two equal pieces one is never encoded; both stand for their text.
    for twice in [
        piece("ab", NORMAL),
        piece("<0x41>", BYTE),
        piece(&"a".repeat(1024), NORMAL),
        piece("", NORMAL),
        bytes(1, &[0xff; 3]),
    ] {
        match load(&with(&[twice])) {
            Ok(tokenizer) => {
                let ids = check_encodes(&tokenizer, "ab A <0x41>", &[0, 1, 2]);
                assert_eq!(tokenizer.decode(&ids, false), "ab A <0x41>");
            }
            Err(error) => assert!(error.to_string().contains("tokenizer.model"), "{error}"),
        }
    }
}

#[test]
fn hostile_tekken_files_are_refused_at_load() {
    // All 256 bytes, twenty control tokens.
    let base64 = |byte: u8| {
        const DIGITS: &[u8; 64] =
            b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
        let digits = [
            DIGITS[usize::from(byte >> 2)],
            DIGITS[usize::from((byte & 3) << 4)],
        ];
        format!("{}==", std::str::from_utf8(&digits).unwrap())
    };
    let vocab: Vec<Value> = (0..=255u8)
        .map(|byte| json!({"rank": byte, "token_bytes": base64(byte), "token_str": null}))
        .collect();
    let good = json!({
        "config": {"pattern": "\\p{L}+|[^\\p{L}]", "num_vocab_tokens": 256, "default_vocab_size": 276,
            "default_num_special_tokens": 20, "version": "v3"},
        "vocab": vocab,
        "special_tokens": [{"rank": 1, "token_str": "<s>", "is_control": true}, {"rank": 2, "token_str": "</s>", "is_control": true}],
    });
    let load = |file: &Value| from_dir(&[("tekken.json", file.to_string().as_bytes())]);
    let tokenizer = load(&good).unwrap();
    assert_eq!(tokenizer.encode("<s>é").unwrap(), [80, 135, 82, 215, 189]);
    check_newer_format(&good);

    let set = |pointer: &str, value: Value| {
        let mut file = good.clone();
        *file.pointer_mut(pointer).unwrap() = value;
        load(&file).unwrap_err().to_string()
    };
    for (pointer, value, field) in [
        ("/vocab/3/rank", json!(4), "rank"),
        ("/vocab/3/rank", json!(u64::MAX), "tekken"),
        ("/vocab/3/token_bytes", json!("AA=="), "vocab"),
        ("/vocab/3/token_bytes", json!("!"), "tekken"),
        ("/vocab/3/token_bytes", json!(""), "rank"),
        (
            "/config/default_vocab_size",
            json!(1u64 << 40),
            "default_vocab_size",
        ),
        ("/config/default_vocab_size", json!(200), "vocab"),
        (
            "/config/default_num_special_tokens",
            json!(1u64 << 40),
            "default_num_special_tokens",
        ),
        ("/special_tokens/0/rank", json!(20), "special_tokens"),
        ("/special_tokens/0/token_str", json!("</s>"), "</s>"),
        ("/config/pattern", json!("(("), "tekken"),
        (
            "/config/pattern",
            json!("(a+)+(?=b)c|(a|a)+$(?!x)"),
            "test text",
        ),
    ] {
        let text = set(pointer, value.clone());
        assert!(
            text.contains(field) && text.contains("tekken.json"),
            "{pointer} {value}: {text}"
        );
    }
}

/// A format of after v13 is not guessed: texts are encoded, conversations only by a template.
fn check_newer_format(good: &Value) {
    for version in ["v15", "v99", "", "V3"] {
        let mut file = good.clone();
        file["config"]["version"] = version.into();
        let file = file.to_string();
        let tokenizer = from_dir(&[("tekken.json", file.as_bytes())]).unwrap();
        assert_eq!(tokenizer.chat_format(), ChatFormat::None);
        assert!(!tokenizer.supports_tools());
        assert_eq!(tokenizer.encode_with_bos("é").unwrap(), [1, 215, 189]);
        let conversation = say(&[(Role::User, "hi")]);
        let error = tokenizer.encode_chat(&conversation).unwrap_err();
        assert!(matches!(error, Error::NoChatFormat), "{error}");
        assert!(error.is_invalid_request());
        let with_template = from_dir(&[
            ("tekken.json", file.as_bytes()),
            ("chat_template.jinja", b"{{ messages[0].content }}"),
        ]);
        let with_template = with_template.unwrap();
        assert_eq!(with_template.chat_format(), ChatFormat::Template);
        with_template.encode_chat(&conversation).unwrap();
    }
}
