//! Our ids, and the calls that we read, are those of mistral-common, sentencepiece and transformers.

use super::*;

#[test]
fn strings_have_the_ids_of_mistral_common() {
    let lines = golden("strings.jsonl");
    assert!(lines.lines().count() >= 2000);
    for name in ["v1", "v2", "v3", "tekken"] {
        let Some(tokenizer) = real(name) else { return };
        let mut wrong = Vec::new();
        for line in lines.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let text = line["text"].as_str().unwrap();
            let ids = tokenizer.encode(text).unwrap();
            if digest(&ids) != line[name] {
                wrong.push(format!("{text:?}: {ids:?}"));
            }
            assert!(
                ids.iter().all(|id| !tokenizer.is_control(*id)),
                "{name} {text:?}"
            );
            // "▁" is how these models write a space, so it can not come back.
            if !text.contains('▁') || name == "tekken" {
                assert_eq!(tokenizer.decode(&ids, true), text, "{name}");
            }
        }
        assert!(
            wrong.is_empty(),
            "{name}: {} differ, first {}",
            wrong.len(),
            wrong[0]
        );
    }
}

#[test]
fn conversations_have_the_ids_of_mistral_common() {
    let golden: Value = serde_json::from_str(&golden("chat.json")).unwrap();
    for name in FILES.map(|(name, _)| name).into_iter().chain(DERIVED) {
        let Some(tokenizer) = real(name) else { return };
        for (case, body) in golden["requests"].as_object().unwrap() {
            let expected = &golden["ids"][name][case];
            let got = tokenizer.encode_chat(&request(body));
            match (expected.as_array(), got) {
                (Some(ids), Ok(got)) => {
                    let ids: Vec<u32> = ids.iter().map(|id| id.as_u64().unwrap() as u32).collect();
                    let shown = (tokenizer.decode(&got, false), tokenizer.decode(&ids, false));
                    assert_eq!(got, ids, "{name} {case}: {shown:#?}");
                }
                (None, Err(error)) => assert!(error.is_invalid_request(), "{name} {case}: {error}"),
                (_, got) => panic!("{name} {case}: {got:?} instead of {expected}"),
            }
        }
    }
}

#[test]
fn the_instruct_format_is_known_from_the_file() {
    use InstructVersion::{V1, V2, V3, V7};
    for ((name, _), version) in FILES.iter().zip([V1, V2, V3, V7, V3]) {
        let Some(tokenizer) = real(name) else { return };
        assert_eq!(tokenizer.chat_format(), ChatFormat::Instruct(version));
        assert_eq!(
            (tokenizer.bos_id(), tokenizer.eos_ids()),
            (Some(1), [2].as_slice())
        );
        assert_eq!(tokenizer.supports_tools(), version != V1);
    }
    let sizes = FILES.map(|(name, _)| real(name).map(Tokenizer::vocab_size));
    assert_eq!(sizes, [32_000, 32_768, 32_768, 32_768, 131_072].map(Some));
}

#[test]
fn texts_with_a_gap_have_the_ids_of_mistral_common() {
    let golden: Value = serde_json::from_str(&golden("fim.json")).unwrap();
    for (name, expected) in golden["ids"].as_object().unwrap() {
        let Some(tokenizer) = real(name) else { return };
        let gaps = golden["gaps"].as_array().unwrap();
        for (gap, ids) in gaps.iter().zip(expected.as_array().unwrap()) {
            let (prompt, suffix) = (gap[0].as_str().unwrap(), gap[1].as_str().unwrap());
            let got = tokenizer.encode_infill(prompt, suffix).unwrap();
            assert_eq!(json!(got), *ids, "{name} {prompt:?} {suffix:?}");
        }
    }
    for tokenizer in [Some(demo()), real("v1")].into_iter().flatten() {
        let error = tokenizer.encode_infill("a", "b").unwrap_err();
        assert!(error.is_invalid_request() && error.param() == Some("suffix"));
    }
}

#[test]
fn calls_of_tools_are_read_as_mistral_common_reads_them() {
    let golden: Value = serde_json::from_str(&golden("calls.json")).unwrap();
    for (name, cases) in golden.as_object().unwrap() {
        let Some(tokenizer) = real(name) else { return };
        for case in cases.as_array().unwrap() {
            let shown = format!("{name} {}", case["said"]);
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let (text, calls) = read_calls(tokenizer, &ids);
            let Some(expected) = case["calls"].as_array() else {
                // No call for mistral-common: text for us, or arguments that were said before the mistake.
                let said: Vec<String> = serde_json::from_value(case["said"].clone()).unwrap();
                let mut kept = text;
                kept.extend(calls.iter().map(|(_, _, arguments)| arguments.as_str()));
                let last = said.last().unwrap().trim();
                let last = if last == "[TOOL_CALLS]" { "" } else { last };
                assert!(last.ends_with(kept.trim()), "{shown}: {kept}");
                assert_eq!(kept.is_empty(), last.is_empty(), "{shown}");
                continue;
            };
            assert_eq!(text, case["content"], "{shown}");
            assert_eq!(calls.len(), expected.len(), "{shown}");
            for ((id, name, arguments), call) in calls.iter().zip(expected) {
                assert_eq!(*name, call["name"], "{shown}");
                let arguments: Value = serde_json::from_str(arguments).unwrap();
                assert_eq!(arguments, call["arguments"], "{shown}");
                // An id behind the arguments comes too late for a stream.
                if let Some(id) = id {
                    assert_eq!(*id, call["id"], "{shown}");
                }
            }
            let has_early_id = !name.starts_with("v3") && shown.contains("CALL_ID");
            assert!(!has_early_id || calls.iter().all(|(id, _, _)| id.is_some()));
        }
    }
}

#[test]
fn tools_that_the_tokenizer_has_no_tokens_for_are_the_requests_fault() {
    let tokenizer = from_dir(&[("tokenizer.model", &demo_file("tokenizer.model"))]).unwrap();
    let format = tokenizer.chat_format();
    assert_eq!(format, ChatFormat::Instruct(InstructVersion::V2));
    assert!(!tokenizer.supports_tools());
    let mut request = say(&[(Role::User, "hi")]);
    tokenizer.encode_chat(&request).unwrap();
    request.tools = vec![json!({"type": "function", "function": {"name": "f"}})];
    let error = tokenizer.encode_chat(&request).unwrap_err();
    assert!(error.is_invalid_request(), "{error}");
    assert!(error.to_string().contains("[AVAILABLE_TOOLS]"), "{error}");
}

#[test]
fn only_the_tokens_of_calls_make_calls() {
    let Some(tokenizer) = real("v3") else { return };
    let said = r#"[TOOL_CALLS][{"name": "f", "arguments": {}}]"#;
    let ids = tokenizer.encode(said).unwrap();
    assert_eq!(read_calls(tokenizer, &ids), (said.to_owned(), Vec::new()));
    assert!(ToolCallParser::new(demo(), DecodeStart::Text).is_none());
    assert!(real("v1").is_none_or(|v1| v1.call_tokens().is_none()));
}

#[test]
fn the_demo_model_has_the_ids_of_sentencepiece_and_transformers() {
    let golden: Value = serde_json::from_str(&golden("demo.json")).unwrap();
    for case in golden["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = demo().encode(text).unwrap();
        assert_eq!(json!(ids), case["ids"], "{text:?}");
        assert_eq!(json!(demo().decode(&ids, true)), case["decoded"]);
    }
    assert_eq!(demo().chat_format(), ChatFormat::Template);
    for (name, case) in golden["chats"].as_object().unwrap() {
        assert_eq!(
            json!(demo().encode_chat(&request(case)).unwrap()),
            case["ids"],
            "{name}"
        );
    }
    assert_eq!(demo().encode_with_bos("Hello").unwrap()[0], 1);
    assert_eq!(
        (demo().bos_id(), demo().eos_ids(), demo().vocab_size()),
        (Some(1), [2].as_slice(), 4096)
    );
    assert_eq!(demo().token_bytes(5 + 0xE2), Some([0xE2].as_slice()));
    assert_eq!(demo().token_bytes(4096), None);
}

#[test]
fn a_tokenizer_json_made_by_score_agrees_with_the_model_it_was_made_from() {
    let config = demo_file("tokenizer_config.json");
    let json = demo_file("tokenizer.json");
    let alone = from_dir(&[
        ("tokenizer.json", &json),
        ("tokenizer_config.json", &config),
    ])
    .unwrap();
    let golden: Value = serde_json::from_str(&golden("demo.json")).unwrap();
    for case in golden["texts"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = alone.encode(text).unwrap();
        assert_eq!(json!(ids), case["ids"], "{text:?}");
        assert_eq!(json!(alone.decode(&ids, true)), case["decoded"]);
    }
    for case in golden["chats"].as_object().unwrap().values() {
        assert_eq!(
            json!(alone.encode_chat(&request(case)).unwrap()),
            case["ids"]
        );
    }
    assert_eq!(
        (alone.bos_id(), alone.eos_ids(), alone.vocab_size()),
        (Some(1), [2].as_slice(), 4096)
    );
}

#[test]
fn a_byte_level_tokenizer_json_has_the_ids_of_transformers() {
    let golden: Value = serde_json::from_str(&golden("transformers.json")).unwrap();
    let dir = repository().join("tests/golden/tokenizer/byte_level");
    let tokenizer = Tokenizer::from_dir(&dir).unwrap();
    for case in golden["byte_level"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(json!(ids), case["ids"], "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true), text);
    }
    let ids = tokenizer.encode_chat(&request(&golden["chat"])).unwrap();
    assert_eq!(json!(ids), golden["byte_level_chat"]);
    assert_eq!(
        (tokenizer.bos_id(), tokenizer.eos_ids()),
        (Some(1), [2].as_slice())
    );
    assert_eq!(
        tokenizer.encode_with_bos("a").unwrap(),
        tokenizer.encode("a").unwrap()
    );
}

#[test]
fn a_prefix_scheme_first_puts_no_space_behind_control_tokens() {
    let golden: Value = serde_json::from_str(&golden("transformers.json")).unwrap();
    let mut file = demo_json();
    file["normalizer"] = Value::Null;
    file["pre_tokenizer"] =
        json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    let file = file.to_string();
    let config = demo_file("tokenizer_config.json");
    let mut files: Vec<(&str, &[u8])> = vec![
        ("tokenizer.json", file.as_bytes()),
        ("tokenizer_config.json", &config),
    ];
    let model = demo_file("tokenizer.model");
    for _ in 0..2 {
        let tokenizer = from_dir(&files).unwrap();
        let ids = tokenizer.encode_chat(&request(&golden["chat"])).unwrap();
        assert_eq!(json!(ids), golden["prepend_first_chat"]);
        assert_eq!(
            tokenizer.encode("Hi").unwrap(),
            demo().encode("Hi").unwrap()
        );
        files.push(("tokenizer.model", &model)); // the second time by the model, with the rule of the JSON file
    }
}
