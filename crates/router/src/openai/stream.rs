//! Answers as server-sent events. A stream ends with exactly one truth: a finish reason for every answer
//! and `[DONE]`, or an error event and nothing after it. Every event has an id from which any router can go
//! on; where one event ends and the next begins may differ then, what they say together does not.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;
use futures::Stream;
use futures::stream::unfold;
use tokio::time::timeout;

use super::error::error_body;
use super::{Chunk, Render};
use crate::answer::Answer;
use crate::asked::{EventId, Position, Tag, beyond_the_end};
use crate::error::ApiError;
use crate::sequence::Delta;

const DONE: &[u8] = b"data: [DONE]\n\n";
const KEEPALIVE: &[u8] = b": keep-alive\n\n";

/// How an answer is streamed.
pub(crate) struct StreamOptions {
    /// A comment comes when nothing happened for so long.
    pub(crate) keepalive: Duration,
    pub(crate) tag: Tag,
    /// What the client has of the answer already.
    pub(crate) seen: Option<Position>,
}

/// The events of `answer` that the client has not seen.
pub(crate) fn event_stream(
    answer: Answer,
    render: Box<dyn Render>,
    options: StreamOptions,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> + Send {
    let mut cursors = vec![Cursor::default(); answer.num_choices()];
    if let Some(Position::Units(units)) = &options.seen {
        for (cursor, unit) in cursors.iter_mut().zip(units) {
            cursor.seen = *unit;
        }
    }
    let events = Events {
        answer,
        render,
        options,
        cursors,
        ready: VecDeque::new(),
        ended: false,
    };
    unfold(events, |mut events| async move {
        let event = events.next().await?;
        Some((Ok(event), events))
    })
}

/// The end of a stream of which the client has seen everything else.
pub(crate) const fn last_event() -> Bytes {
    Bytes::from_static(DONE)
}

/// The event that says why no more come. Without an id: a client may go on after the last event that has one.
pub(crate) fn error_event(error: &ApiError) -> Bytes {
    Bytes::from(format!("data: {}\n\n", error_body(error)))
}

/// How far one choice is, in the units of [`Position`].
#[derive(Clone, Copy, Debug, Default)]
struct Cursor {
    /// Units that were made.
    at: u32,
    /// Units that the client has seen.
    seen: u32,
}

/// The unit that opens a choice.
const OPENING: u32 = 1;

/// The unit of the token at `index`.
const fn unit_of_token(index: u32) -> u32 {
    index.saturating_add(OPENING + 1)
}

struct Events {
    answer: Answer,
    render: Box<dyn Render>,
    options: StreamOptions,
    cursors: Vec<Cursor>,
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
            match timeout(self.options.keepalive, self.answer.next()).await {
                Err(_elapsed) => return Some(Bytes::from_static(KEEPALIVE)),
                Ok(Some(Ok(delta))) => {
                    if let Err(error) = self.take(delta) {
                        self.fail(&error);
                    }
                }
                Ok(Some(Err(error))) => self.fail(&error),
                Ok(None) => self.end(),
            }
        }
    }

    fn fail(&mut self, error: &ApiError) {
        let error = self.render.failed(error);
        self.push(&error, None);
        self.ended = true;
    }

    fn end(&mut self) {
        let chunks = self.render.end(self.answer.spent());
        for (num_after, chunk) in (0..chunks.len()).rev().zip(&chunks) {
            self.push(chunk, (num_after == 0).then_some(Position::End));
        }
        if !self.render.names_events() {
            self.ready.push_back(last_event());
        }
        self.ended = true;
    }

    /// Makes events of what the client has not seen of `delta`.
    fn take(&mut self, delta: Delta) -> Result<(), ApiError> {
        let choice = delta.choice;
        let Some(cursor) = self.cursors.get(choice).copied() else {
            return Ok(());
        };
        if cursor.at < OPENING {
            self.reach(choice, OPENING);
            // Also for who has seen it: later chunks may depend on it.
            let opening = self.render.open(choice, self.answer.echo(choice));
            if cursor.seen < OPENING {
                self.push_all(&opening);
            }
        }
        let is_seen = |index: u32| unit_of_token(index) <= cursor.seen;
        let num_seen = delta.tokens.iter().filter(|t| is_seen(t.index)).count();
        if let Some(last) = delta.tokens.last() {
            self.reach(choice, unit_of_token(last.index));
        }
        let (seen, delta) = delta.split(num_seen);
        if num_seen > 0 {
            // Chunks may depend on those before them.
            let _seen = self.render.chunks(&seen);
        }
        if delta.finish.is_none() {
            let chunks = self.render.chunks(&delta);
            self.push_all(&chunks);
            return Ok(());
        }
        let rest = self.cursors.get(choice).map_or(0, |cursor| cursor.at) + 1;
        let finish = rest + 1;
        if cursor.seen > finish {
            return Err(beyond_the_end(choice, finish, cursor.seen));
        }
        let chunks = self.render.chunks(&delta);
        let (last, others) = chunks
            .split_last()
            .map_or((&[][..], &[][..]), |(last, others)| {
                (std::slice::from_ref(last), others)
            });
        self.reach(choice, rest);
        if cursor.seen < rest {
            self.push_all(others);
        }
        self.reach(choice, finish);
        if cursor.seen < finish {
            self.push_all(last);
        }
        Ok(())
    }

    fn reach(&mut self, choice: usize, unit: u32) {
        if let Some(cursor) = self.cursors.get_mut(choice) {
            cursor.at = unit;
        }
    }

    /// Events after which the client has everything up to the cursors.
    fn push_all(&mut self, chunks: &[Chunk]) {
        for (num_after, chunk) in (0..chunks.len()).rev().zip(chunks) {
            // Who has not seen all of them gets them again.
            let position = (num_after == 0).then(|| {
                let units = self.cursors.iter().map(|c| c.at.max(c.seen));
                Position::Units(units.collect())
            });
            self.push(chunk, position);
        }
    }

    /// An event, with an id where a client may go on behind it.
    fn push(&mut self, chunk: &Chunk, position: Option<Position>) {
        let mut event = String::new();
        if let Some(position) = position {
            let id = EventId {
                answer: self.answer.id(),
                tag: self.options.tag,
                position,
            };
            event.push_str(&format!("id: {id}\n"));
        }
        if let Some(name) = &chunk.name {
            event.push_str(&format!("event: {name}\n"));
        }
        event.push_str(&format!("data: {}\n\n", chunk.data));
        self.ready.push_back(Bytes::from(event));
    }
}
