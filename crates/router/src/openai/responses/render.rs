//! A response and its events. What comes out depends on the tokens of the answer alone, token by token, so that an
//! event has the same number whichever router makes it.

use bytes::Bytes;
use serde_json::{Map, Value, json};
use tramontane_tokenizer::ToolCall;
use tramontane_types::{FinishReason, TokenOutput, Usage};

use crate::answer::{Choice, Spent};
use crate::error::ApiError;
use crate::openai::logprobs::{ChatLogprobs, ResponseLogprobs};
use crate::openai::{Chunk, Head, Render};
use crate::sequence::Delta;
use crate::text::CallDelta;

/// The event that says why no more come.
const ERROR: &str = "error";

/// Renders `response`, whole and in events.
#[derive(Debug)]
pub(crate) struct ResponseRender {
    head: Head,
    /// Fields of the request, as the text of an object.
    repeats: Box<str>,
    /// Items that are whole, as JSON text: of log probabilities a tenth of the values.
    items: Vec<String>,
    open: Option<Item>,
    finish: Option<FinishReason>,
    /// Log probabilities of tokens whose text is held back: entries of a list as JSON text.
    logprobs: String,
    /// Number of the next event.
    next_number: u64,
}

/// The item that is being said.
#[derive(Debug)]
enum Item {
    Message {
        text: String,
        /// Entries of a list, as JSON text.
        logprobs: String,
    },
    Call(ToolCall),
}

impl ResponseRender {
    pub(crate) fn new(head: Head, repeats: Box<str>) -> Self {
        Self {
            head,
            repeats,
            items: Vec::new(),
            open: None,
            finish: None,
            logprobs: String::new(),
            next_number: 0,
        }
    }

    /// An event; `large` is one more field, as JSON text.
    fn event(&mut self, kind: &str, mut event: Value, large: Option<(&str, &str)>) -> Chunk {
        event["type"] = kind.into();
        event["sequence_number"] = self.next_number.into();
        self.next_number += 1;
        let mut data = event.to_string();
        if let Some((name, json)) = large {
            add_field(&mut data, name, json);
        }
        Chunk {
            name: Some(kind.to_owned()),
            data,
        }
    }

    fn response(&self, status: &str, items: &[String], usage: Option<Usage>) -> String {
        let is_incomplete = status == "incomplete";
        let details = is_incomplete.then(|| json!({ "reason": "max_output_tokens" }));
        let mut response = json!({
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": status,
            "error": null,
            "incomplete_details": details,
            "model": self.head.model,
            "previous_response_id": null,
            "reasoning": { "effort": null, "summary": null },
            "store": false,
            "truncation": "disabled",
            "usage": usage.map(usage_object),
            "system_fingerprint": self.head.system_fingerprint,
        });
        // It is our own text: there is always an object in it.
        let repeats = serde_json::from_str::<Map<String, Value>>(&self.repeats);
        for (name, value) in repeats.into_iter().flatten() {
            response[name] = value;
        }
        let mut response = response.to_string();
        add_field(&mut response, "output", &list(&items.join(",")));
        response
    }

    fn item_id(&self, kind: &str, index: usize) -> String {
        let answer = self.head.id.trim_start_matches("resp_");
        format!("{kind}_{answer}_{index}")
    }

    /// The item at `index`, as far as it is said.
    fn item(&self, item: &Item, index: usize, status: &str) -> String {
        match item {
            Item::Message { text, logprobs } => {
                let message = json!({
                    "id": self.item_id("msg", index),
                    "type": "message",
                    "role": "assistant",
                    "status": status,
                });
                let mut message = message.to_string();
                add_field(&mut message, "content", &list(&text_part(text, logprobs)));
                message
            }
            Item::Call(call) => {
                let call = json!({
                    "id": self.item_id("fc", index),
                    "type": "function_call",
                    "status": status,
                    "call_id": call.id,
                    "name": call.name,
                    "arguments": call.arguments,
                });
                call.to_string()
            }
        }
    }

    fn say(&mut self, text: &str, events: &mut Vec<Chunk>) {
        if text.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Item::Message { .. })) {
            self.close(events);
            events.extend(self.open_message());
        }
        let index = self.items.len();
        let new_logprobs = std::mem::take(&mut self.logprobs);
        if let Some(Item::Message {
            text: so_far,
            logprobs,
        }) = &mut self.open
        {
            so_far.push_str(text);
            add_entries(logprobs, &new_logprobs);
        }
        let delta = json!({
            "item_id": self.item_id("msg", index),
            "output_index": index,
            "content_index": 0,
            "delta": text,
        });
        let logprobs = list(&new_logprobs);
        let large = Some(("logprobs", logprobs.as_str()));
        events.push(self.event("response.output_text.delta", delta, large));
    }

    fn open_message(&mut self) -> [Chunk; 2] {
        let index = self.items.len();
        let id = self.item_id("msg", index);
        self.open = Some(Item::Message {
            text: String::new(),
            logprobs: String::new(),
        });
        let item = json!({
            "id": id, "type": "message", "role": "assistant", "status": "in_progress", "content": [],
        });
        let added = json!({ "output_index": index, "item": item });
        let place = json!({ "item_id": id, "output_index": index, "content_index": 0 });
        let part = text_part("", "");
        [
            self.event("response.output_item.added", added, None),
            self.event("response.content_part.added", place, Some(("part", &part))),
        ]
    }

    fn call(&mut self, delta: &CallDelta, events: &mut Vec<Chunk>) {
        if let Some(head) = &delta.begins {
            self.close(events);
            let call = Item::Call(ToolCall {
                id: head.id.clone(),
                name: head.name.clone(),
                arguments: String::new(),
            });
            let index = self.items.len();
            let item = self.item(&call, index, "in_progress");
            let added = json!({ "output_index": index });
            self.open = Some(call);
            let kind = "response.output_item.added";
            events.push(self.event(kind, added, Some(("item", &item))));
        }
        // Of a token that only belongs to a call.
        self.logprobs.clear();
        if delta.arguments.is_empty() {
            return;
        }
        let index = self.items.len();
        if let Some(Item::Call(call)) = &mut self.open {
            call.arguments.push_str(&delta.arguments);
            let more = json!({
                "item_id": self.item_id("fc", index),
                "output_index": index,
                "delta": delta.arguments,
            });
            events.push(self.event("response.function_call_arguments.delta", more, None));
        }
    }

    /// Nothing more comes of the open item.
    fn close(&mut self, events: &mut Vec<Chunk>) {
        let Some(item) = self.open.take() else {
            return;
        };
        let index = self.items.len();
        // The last item of an answer that was cut off is not whole; all others are.
        let is_cut = self
            .finish
            .is_some_and(|reason| reason != FinishReason::Stop);
        let status = if is_cut { "incomplete" } else { "completed" };
        let done = self.item(&item, index, status);
        match &item {
            Item::Message { text, logprobs } => {
                let place = json!({
                    "item_id": self.item_id("msg", index), "output_index": index, "content_index": 0,
                });
                let mut whole = place.clone();
                whole["text"] = text.as_str().into();
                let (part, logprobs) = (text_part(text, logprobs), list(logprobs));
                let (part, logprobs) = (("part", part.as_str()), ("logprobs", logprobs.as_str()));
                events.push(self.event("response.output_text.done", whole, Some(logprobs)));
                events.push(self.event("response.content_part.done", place, Some(part)));
            }
            Item::Call(call) => {
                let whole = json!({
                    "item_id": self.item_id("fc", index),
                    "output_index": index,
                    "name": call.name,
                    "arguments": call.arguments,
                });
                events.push(self.event("response.function_call_arguments.done", whole, None));
            }
        }
        let item = json!({ "output_index": index });
        events.push(self.event("response.output_item.done", item, Some(("item", &done))));
        self.items.push(done);
    }

    fn note_logprobs(&mut self, tokens: &[TokenOutput]) {
        if !self.head.logprobs {
            return;
        }
        let entries = ChatLogprobs::of(tokens, false, &self.head.tokenizer);
        // What is our own is JSON; of anything else there would be nothing to show.
        let entries = serde_json::to_string(&ResponseLogprobs(entries)).unwrap_or_default();
        let entries = entries.trim_start_matches('[').trim_end_matches(']');
        add_entries(&mut self.logprobs, entries);
    }
}

impl Render for ResponseRender {
    fn open(&mut self, _choice: usize, _echo: Option<&str>) -> Vec<Chunk> {
        let response = self.response("in_progress", &[], None);
        let response = Some(("response", response.as_str()));
        vec![
            self.event("response.created", json!({}), response),
            self.event("response.in_progress", json!({}), response),
        ]
    }

    fn chunks(&mut self, delta: &Delta) -> Vec<Chunk> {
        let mut events = Vec::new();
        let (mut text_at, mut call_at) = (0, 0);
        let last = delta.tokens.len().saturating_sub(1);
        for (i, token) in delta.tokens.iter().enumerate() {
            if !(delta.has_end_token && i == last) {
                self.note_logprobs(std::slice::from_ref(token));
            }
            let text_end = delta.text_ends.get(i).copied().unwrap_or(text_at);
            let call_end = delta.call_ends.get(i).copied().unwrap_or(call_at);
            self.say(
                delta.text.get(text_at..text_end).unwrap_or_default(),
                &mut events,
            );
            for call in delta.calls.get(call_at..call_end).unwrap_or_default() {
                self.call(call, &mut events);
            }
            (text_at, call_at) = (text_end, call_end);
        }
        self.say(delta.text.get(text_at..).unwrap_or_default(), &mut events);
        for call in delta.calls.get(call_at..).unwrap_or_default() {
            self.call(call, &mut events);
        }
        if delta.finish.is_some() {
            self.finish = delta.finish;
            self.close(&mut events);
        }
        events
    }

    fn end(&mut self, spent: Spent) -> Vec<Chunk> {
        let status = status(self.finish);
        let response = self.response(status, &self.items, Some(spent.usage));
        let kind = format!("response.{status}");
        vec![self.event(&kind, json!({}), Some(("response", &response)))]
    }

    /// By the same code as the events, so that both say the same.
    fn note(&mut self, delta: &Delta) {
        let _events = self.chunks(delta);
    }

    fn whole(&self, _choices: &[Choice], spent: Spent) -> Result<Vec<u8>, ApiError> {
        let response = self.response(status(self.finish), &self.items, Some(spent.usage));
        Ok(response.into_bytes())
    }

    fn failed(&mut self, error: &ApiError) -> Chunk {
        self.event(ERROR, failure(error), None)
    }

    fn names_events(&self) -> bool {
        true
    }
}

/// The only event of a stream that ends before there is a response.
pub(crate) fn response_error(error: &ApiError) -> Bytes {
    let mut event = failure(error);
    event["type"] = ERROR.into();
    event["sequence_number"] = 0.into();
    Bytes::from(format!("event: {ERROR}\ndata: {event}\n\n"))
}

fn failure(error: &ApiError) -> Value {
    json!({
        "code": error.kind.code().unwrap_or("invalid_request"),
        "message": error.message,
        "param": error.param,
    })
}

fn status(finish: Option<FinishReason>) -> &'static str {
    match finish {
        Some(FinishReason::Length | FinishReason::Aborted) => "incomplete",
        Some(FinishReason::Stop) | None => "completed",
    }
}

/// Adds a field to the text of an object that has some.
fn add_field(object: &mut String, name: &str, json: &str) {
    object.truncate(object.len().saturating_sub(1));
    object.extend([",\"", name, "\":", json, "}"]);
}

/// Adds entries of a list to those before them.
fn add_entries(entries: &mut String, more: &str) {
    if !entries.is_empty() && !more.is_empty() {
        entries.push(',');
    }
    entries.push_str(more);
}

/// The list with these entries.
fn list(entries: &str) -> String {
    ["[", entries, "]"].concat()
}

fn text_part(text: &str, logprobs: &str) -> String {
    let part = json!({ "type": "output_text", "text": text, "annotations": [] });
    let mut part = part.to_string();
    add_field(&mut part, "logprobs", &list(logprobs));
    part
}

/// Nothing is billed here for filling the cache, and nothing is thought in secret.
fn usage_object(usage: Usage) -> Value {
    json!({
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": { "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0 },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": { "reasoning_tokens": 0 },
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
    })
}
