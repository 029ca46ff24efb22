//! Answers as server-sent events. A stream ends with exactly one truth: a finish reason for every answer
//! and `[DONE]`, or an error event and nothing after it.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use futures::stream::unfold;
use serde_json::Value;
use tokio::time::timeout;

use super::{Render, error_body};
use crate::dispatch::Answer;
use crate::sequence::Delta;

const DONE: &[u8] = b"data: [DONE]\n\n";
const KEEPALIVE: &[u8] = b": keep-alive\n\n";

/// The events of `answer`; a comment when nothing happened for `keepalive`.
pub(crate) fn event_stream(
    answer: Answer,
    render: Box<dyn Render>,
    include_usage: bool,
    keepalive: Duration,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send {
    let num_choices = answer.num_choices();
    let events = Events {
        answer,
        render,
        include_usage,
        keepalive,
        opened: vec![false; num_choices],
        ready: VecDeque::new(),
        ended: false,
    };
    unfold(events, |mut events| async move {
        let event = events.next().await?;
        Some((Ok(event), events))
    })
}

struct Events {
    answer: Answer,
    render: Box<dyn Render>,
    include_usage: bool,
    keepalive: Duration,
    /// Which answers have said something.
    opened: Vec<bool>,
    ready: VecDeque<Bytes>,
    ended: bool,
}

impl Events {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match timeout(self.keepalive, self.answer.next()).await {
                Err(_elapsed) => return Some(Bytes::from_static(KEEPALIVE)),
                Ok(Some(Ok(delta))) => self.take(&delta),
                Ok(Some(Err(error))) => {
                    self.ready.push_back(event(&error_body(&error)));
                    self.ended = true;
                }
                Ok(None) => {
                    if self.include_usage {
                        self.ready
                            .push_back(event(&self.render.usage(self.answer.usage())));
                    }
                    self.ready.push_back(Bytes::from_static(DONE));
                    self.ended = true;
                }
            }
        }
    }

    fn take(&mut self, delta: &Delta) {
        if let Some(opened) = self.opened.get_mut(delta.choice).filter(|opened| !**opened) {
            *opened = true;
            let first = self
                .render
                .open(delta.choice, self.answer.echo(delta.choice));
            self.ready.extend(first.as_ref().map(event));
        }
        for chunk in self.render.chunks(delta) {
            self.ready.push_back(event(&chunk));
        }
    }
}

fn event(value: &Value) -> Bytes {
    Bytes::from(format!("data: {value}\n\n"))
}
