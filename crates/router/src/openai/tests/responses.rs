//! What a response may ask to be repeated, and what metadata may be.

use serde_json::{Value, json};

use super::*;

fn response_with(key: &str, value: Value) -> Result<Parsed, ApiError> {
    let mut body = json!({ "model": "demo", "input": "hi" });
    body[key] = value;
    parse_response(&body, &served())
}

#[test]
fn metadata_is_checked_at_every_route() {
    let entries = |num: usize, key: usize, value: usize| {
        let entry = |i: usize| (format!("{i:0key$}"), json!("ä".repeat(value)));
        Value::Object((0..num).map(entry).collect())
    };
    for door in [chat_with, completion_with, response_with] {
        door("metadata", entries(16, 64, 512)).unwrap();
        door("metadata", Value::Null).unwrap();
        for (value, end) in [
            (json!(17), "an object, got 17"),
            (entries(17, 2, 1), "at most 16 entries, got 17"),
            (entries(1, 65, 1), "at most 64 characters, got 65"),
            (entries(1, 1, 513), "at most 512 characters, got 513"),
            (json!({ "a": 5 }), "a string, got 5"),
        ] {
            let message = refused(door, "metadata", value, ErrorKind::Invalid, "metadata");
            assert!(message.ends_with(end), "{message}");
        }
    }
}

#[test]
fn a_response_repeats_no_more_than_its_limit_and_says_what_came() {
    let format = |note: Value| json!({ "format": { "type": "text" }, "note": note });
    let text = format(json!("x".repeat(1 << 19)));
    let parsed = response_with("text", text.clone()).unwrap();
    let mut render = ResponseRender::new(head(false, false), parsed.form.repeats);
    for event in render.open(0, None) {
        assert_eq!(event["response"]["text"], text);
        assert_eq!(event["response"]["tools"], json!([]));
    }
    for large in [json!("x".repeat(1 << 20)), json!(vec![0; 1 << 20])] {
        let text = format(large);
        let message = refused(response_with, "text", text, ErrorKind::Invalid, "text");
        assert!(message.contains("at most 1048576 bytes"), "{message}");
    }
}
