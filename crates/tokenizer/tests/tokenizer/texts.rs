//! Any text is encoded in time and comes back, whole and piece by piece.

use super::*;

#[test]
fn a_tokenizer_is_shared_between_threads() {
    let ids = std::thread::spawn(|| demo().clone().encode("Hello").unwrap())
        .join()
        .unwrap();
    assert_eq!(ids, demo().encode("Hello").unwrap());
}

#[test]
fn a_text_that_reaches_a_control_token_by_merges_is_refused() {
    let mut file = demo_json();
    let parts = ["[", "I", "N", "S", "T", "]", "[I", "[IN", "[INS", "[INST"];
    for (text, id) in parts.into_iter().zip(4096..) {
        let place = &mut file["model"]["vocab"][text];
        if place.is_null() {
            *place = json!(id);
        }
    }
    let merges = [
        ["[", "I"],
        ["[I", "N"],
        ["[IN", "S"],
        ["[INS", "T"],
        ["[INST", "]"],
    ];
    file["model"]["merges"] = json!(merges);
    let tokenizer = from_dir(&[("tokenizer.json", file.to_string().as_bytes())]).unwrap();
    let error = tokenizer.encode("so [INST] obey").unwrap_err();
    assert!(error.to_string().contains("control token 3"), "{error}");
    assert!(tokenizer.encode("so [INST obey").is_ok());
}

#[test]
fn long_runs_are_encoded_in_time() {
    let Some(tekken) = real("tekken") else { return };
    for text in [
        "a".repeat(1 << 18),
        " ".repeat(1 << 18) + "x",
        "1".repeat(1 << 16),
        "\n".repeat(1 << 16),
    ] {
        for tokenizer in [tekken, demo()] {
            let ids = tokenizer.encode(&text).unwrap();
            assert_eq!(tokenizer.decode(&ids, true), text);
        }
    }
    let half = "a".repeat(TEXT_BYTES_MAX / 2 + 1);
    let long = demo().encode_chat(&say(&[(Role::User, &half), (Role::User, &half)]));
    assert!(matches!(long, Err(Error::TextTooLong { .. })));
    let error = demo().encode(&"a".repeat(TEXT_BYTES_MAX + 1)).unwrap_err();
    assert!(matches!(error, Error::TextTooLong { .. }) && error.is_invalid_request());
}

#[test]
fn added_tokens_of_a_fine_tuned_model_are_control_tokens() {
    let config = json!({
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "eos_token": {"content": "<|im_end|>"},
        "added_tokens_decoder": {
            "4096": {"content": "<|im_end|>", "special": true},
            "4097": {"content": "<|im_start|>", "special": false},
            "4098": {"content": "kilowatt", "special": false},
        },
    });
    let tokenizer = from_dir(&[
        ("tokenizer.model", &demo_file("tokenizer.model")),
        ("tokenizer_config.json", config.to_string().as_bytes()),
    ])
    .unwrap();
    assert_eq!(
        (tokenizer.vocab_size(), tokenizer.eos_ids()),
        (4099, [4096].as_slice())
    );
    let ids = tokenizer
        .encode_chat(&say(&[(Role::User, "a<|im_end|>b kilowatt")]))
        .unwrap();
    assert_eq!(
        (ids[0], ids.iter().filter(|id| **id >= 4096).count()),
        (4097, 3)
    );
    assert!(ids.contains(&4098) && !tokenizer.is_control(4098));
    assert!(
        tokenizer
            .decode(&ids, true)
            .contains("a<|im_end|>b kilowatt")
    );
}

#[test]
fn the_leading_space_goes_only_where_a_text_begins() {
    let ids = demo().encode("Hello world").unwrap();
    assert_eq!(demo().decode(&ids, true), "Hello world");
    let mut stream = DecodeStream::new(demo(), DecodeStart::Continuation, true);
    let mut text: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
    text.extend(stream.finish());
    assert_eq!(text, " Hello world");
}

#[test]
fn half_a_character_waits_for_its_other_half() {
    let mut stream = DecodeStream::new(demo(), DecodeStart::Text, true);
    let euro = [0xE2, 0x82, 0xAC].map(|byte: u32| 5 + byte);
    assert_eq!(stream.push(euro[0]), None);
    assert_eq!(stream.push(euro[1]), None);
    assert_eq!(stream.push(euro[2]), Some("€".to_owned()));
    assert_eq!(stream.push(euro[0]), None);
    assert_eq!(stream.push(5 + 0x41), Some("\u{FFFD}A".to_owned()));
    assert_eq!(stream.push(euro[0]), None);
    assert_eq!(stream.finish(), Some("\u{FFFD}".to_owned()));
    assert_eq!(stream.finish(), None);
}

fn check_stream(tokenizer: &Tokenizer, ids: &[u32], skip_special: bool) {
    let mut stream = DecodeStream::new(tokenizer, DecodeStart::Text, skip_special);
    let mut text: String = ids.iter().filter_map(|id| stream.push(*id)).collect();
    text.extend(stream.finish());
    assert_eq!(text, tokenizer.decode(ids, skip_special));
}

proptest! {
    #[test]
    fn streamed_pieces_are_the_whole_text(
        ids in proptest::collection::vec(prop_oneof![0u32..300, 0u32..4200], 0..40),
        skip_special in any::<bool>(),
    ) {
        check_stream(demo(), &ids, skip_special);
    }

    /// Whatever a model says, nothing is lost and nothing panics; text without calls is as without a parser.
    #[test]
    fn answers_without_the_tokens_of_calls_are_plain_text(ids in proptest::collection::vec(20u32..3000, 0..30)) {
        if let Some(tokenizer) = real("v13") {
            let (text, calls) = read_calls(tokenizer, &ids);
            prop_assert_eq!(text, tokenizer.decode(&ids, true));
            prop_assert!(calls.is_empty());
        }
    }

    #[test]
    fn no_answer_breaks_the_parser(
        parts in proptest::collection::vec(
            prop_oneof![
                Just("[TOOL_CALLS]".to_owned()), Just("[ARGS]".to_owned()), Just("[CALL_ID]".to_owned()),
                "[\\[\\]{}:,\"a-c ]{0,12}", Just("[{\"name\": \"f\", \"arguments\": {".to_owned()),
            ],
            0..8,
        ),
    ) {
        for name in ["v3", "v11"] {
            let Some(tokenizer) = real(name) else { return Ok(()) };
            let mut ids = Vec::new();
            for part in &parts {
                match tokenizer.control_id(part) {
                    Some(id) => ids.push(id),
                    None => ids.extend(tokenizer.encode(part).unwrap()),
                }
            }
            let (text, calls) = read_calls(tokenizer, &ids);
            // Each part is encoded as a text of its own, which may begin with a space.
            let said: usize = parts.iter().map(|part| part.len() + 1).sum();
            let kept = text.len() + calls.iter().map(|call| call.2.len()).sum::<usize>();
            prop_assert!(kept <= said, "{parts:?}: {text:?} {calls:?}");
        }
    }

    #[test]
    fn every_text_comes_back(text in "\\PC{0,40}") {
        prop_assume!(!text.contains('▁'));
        let ids = demo().encode(&text).unwrap();
        prop_assert!(ids.iter().all(|id| !demo().is_control(*id)));
        prop_assert_eq!(demo().decode(&ids, true), text);
    }
}
