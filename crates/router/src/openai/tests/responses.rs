//! A response says the same whole and in events, whatever the order of its text and its calls.

use serde_json::{Value, json};

use super::*;
use crate::text::{CallDelta, CallHead};

/// Text before, between and behind two calls, and an end token.
fn said() -> Delta {
    let call = |index: usize, name: Option<&str>, arguments: &str| CallDelta {
        index,
        begins: name.map(|name| CallHead {
            id: format!("call_{index}"),
            name: name.to_owned(),
        }),
        arguments: arguments.to_owned(),
    };
    let parts = [
        ("Let ", None),
        ("me see.", None),
        ("", Some(call(0, Some("clock"), ""))),
        ("", Some(call(0, None, "{}"))),
        (" And", None),
        (" then", None),
        ("", Some(call(1, Some("sun"), ""))),
        ("", Some(call(1, None, "{\"a\":"))),
        ("", Some(call(1, None, "1}"))),
        ("Done.", None),
        ("", None),
    ];
    let mut delta = Delta::default();
    for (index, (text, call)) in (0..).zip(parts) {
        delta.tokens.push(token(index, 300 + index, -0.5, &[]));
        delta.text.push_str(text);
        delta.text_ends.push(delta.text.len());
        delta.calls.extend(call);
        delta.call_ends.push(delta.calls.len());
    }
    delta.has_end_token = true;
    delta.finish = Some(FinishReason::Stop);
    delta
}

fn in_pieces(num_tokens: usize) -> Vec<Delta> {
    let mut pieces = Vec::new();
    let mut rest = said();
    while rest.tokens.len() > num_tokens {
        let (first, later) = rest.split(num_tokens);
        pieces.push(first);
        rest = later;
    }
    pieces.push(rest);
    pieces
}

/// An item's type, what it says, and how many log probabilities it has.
type Said = (String, String, usize);

/// What the pieces in events add up to.
fn added_up(events: &[Value]) -> Vec<Said> {
    let mut items: Vec<Said> = Vec::new();
    for event in events {
        let kind = event["type"].as_str().unwrap();
        if kind == "response.output_item.added" {
            assert_eq!(event["output_index"], items.len());
            let kind = event["item"]["type"].as_str().unwrap();
            items.push((kind.to_owned(), String::new(), 0));
        }
        if kind.ends_with(".delta") {
            let item = items.last_mut().unwrap();
            item.1.push_str(event["delta"].as_str().unwrap());
            item.2 += event["logprobs"].as_array().map_or(0, Vec::len);
        }
    }
    items
}

fn of_output(response: &Value) -> Vec<Said> {
    let said = |item: &Value| {
        let part = &item["content"][0];
        let text = part["text"].as_str().or_else(|| item["arguments"].as_str());
        let kind = item["type"].as_str().unwrap().to_owned();
        let num_logprobs = part["logprobs"].as_array().map_or(0, Vec::len);
        (kind, text.unwrap().to_owned(), num_logprobs)
    };
    let output = response["output"].as_array().unwrap();
    output.iter().map(said).collect()
}

#[test]
fn a_whole_response_is_what_its_events_add_up_to() {
    let item = |kind: &str, text: &str, num: usize| (kind.to_owned(), text.to_owned(), num);
    let expected = [
        item("message", "Let me see.", 2),
        item("function_call", "{}", 0),
        item("message", " And then", 2),
        item("function_call", "{\"a\":1}", 0),
        item("message", "Done.", 1),
    ];
    for num_tokens in 1..=11 {
        let mut streamed = ResponseRender::new(head(true, true), "{}".into());
        let mut whole = ResponseRender::new(head(true, true), "{}".into());
        let mut chunks = streamed.open(0, None);
        for piece in in_pieces(num_tokens) {
            chunks.extend(streamed.chunks(&piece));
            whole.note(&piece);
        }
        chunks.extend(streamed.end(Spent::default()));
        let (events, whole) = (values(&chunks), whole_of(&whole, &[]));
        for (chunk, event) in chunks.iter().zip(&events) {
            assert_eq!(chunk.name.as_deref(), event["type"].as_str());
        }
        assert_eq!(events.last().unwrap()["response"], whole);
        assert_eq!(of_output(&whole), expected, "{num_tokens}");
        assert_eq!(added_up(&events), expected, "{num_tokens}");
    }
}

pub(super) fn response_with(key: &str, value: Value) -> Result<Parsed, ApiError> {
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
    for event in values(&render.open(0, None)) {
        assert_eq!(event["response"]["text"], text);
        assert_eq!(event["response"]["tools"], json!([]));
    }
    for large in [json!("x".repeat(1 << 20)), json!(vec![0; 1 << 20])] {
        let text = format(large);
        let message = refused(response_with, "text", text, ErrorKind::Invalid, "text");
        assert!(message.contains("at most 1048576 bytes"), "{message}");
    }
}

#[test]
fn only_one_field_says_what_a_response_looks_like() {
    for (other, value) in [
        ("guided_regex", json!("a")),
        ("structured_outputs", json!({ "regex": "a" })),
        ("response_format", json!({ "type": "json_object" })),
    ] {
        let body =
            json!({ "input": "hi", "text": { "format": { "type": "json_object" } }, other: value });
        let error = parse_response(&body, &served()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some("text.format"));
        assert!(error.message.starts_with("only one of "), "{error}");
        assert!(error.message.contains(other), "{error}");
    }
}

#[test]
fn a_response_that_never_begins_fails_in_the_form_of_its_events() {
    let error = ApiError::unavailable("nobody is there");
    let event = String::from_utf8(response_error(&error).to_vec()).unwrap();
    let data = event.strip_prefix("event: error\ndata: ").unwrap();
    let data: Value = serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap();
    assert_eq!(data["type"], "error");
    assert_eq!(data["sequence_number"], 0);
    assert_eq!(data["message"], "nobody is there");
    let mut render = ResponseRender::new(head(false, false), "{}".into());
    assert_eq!(values(&[render.failed(&error)]), [data]);
}
