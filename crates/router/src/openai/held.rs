//! A stream that begins before anybody can serve it: comments tell how far the workers are, then come the events of
//! the answer, or why there are none.

use std::convert::Infallible;
use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use futures::stream::{BoxStream, unfold};
use futures::{Stream, StreamExt as _};
use tokio::time::sleep;

use crate::cluster::ClusterView;
use crate::error::ApiError;

/// The events of an answer, as bytes.
pub(crate) type EventBytes = BoxStream<'static, Result<Bytes, Infallible>>;

/// The event that says why no answer comes, in the form of the route.
pub(crate) type Failed = fn(&ApiError) -> Bytes;

/// Longest comment: reasons name few things, and what they name is an operator's.
const COMMENT_BYTES_MAX: usize = 512;

/// Comments until `starting` has ended, one per `keepalive` at least, then the events that it made, or one of `failed`.
pub(crate) fn held_stream<F>(
    cluster: ClusterView,
    keepalive: Duration,
    failed: Failed,
    starting: F,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send
where
    F: Future<Output = Result<EventBytes, ApiError>> + Unpin + Send,
{
    let holding = Holding {
        cluster,
        keepalive,
        failed,
        starting,
        said: String::new(),
    };
    unfold(State::Holds(holding), |state| async move {
        let (event, state) = match state {
            State::Holds(holding) => holding.next().await,
            State::Goes(mut events) => (events.next().await?, State::Goes(events)),
            State::Ended => return None,
        };
        Some((event, state))
    })
}

enum State<F> {
    Holds(Holding<F>),
    Goes(EventBytes),
    Ended,
}

struct Holding<F> {
    cluster: ClusterView,
    keepalive: Duration,
    failed: Failed,
    starting: F,
    /// The last comment.
    said: String,
}

impl<F> Holding<F>
where
    F: Future<Output = Result<EventBytes, ApiError>> + Unpin + Send,
{
    async fn next(mut self) -> (Result<Bytes, Infallible>, State<F>) {
        loop {
            let now = self.cluster.progress();
            if now != self.said {
                self.said = now;
                return self.say();
            }
            tokio::select! {
                biased;
                started = &mut self.starting => return begin(started, self.failed).await,
                () = self.cluster.changed() => {}
                () = sleep(self.keepalive) => return self.say(),
            }
        }
    }

    fn say(self) -> (Result<Bytes, Infallible>, State<F>) {
        let comment = format!(": waiting: {}\n\n", on_one_line(&self.said));
        (Ok(Bytes::from(comment)), State::Holds(self))
    }
}

async fn begin<F>(
    started: Result<EventBytes, ApiError>,
    failed: Failed,
) -> (Result<Bytes, Infallible>, State<F>) {
    match started {
        Ok(mut events) => match events.next().await {
            Some(event) => (event, State::Goes(events)),
            None => (Ok(Bytes::new()), State::Ended),
        },
        Err(error) => (Ok(failed(&error)), State::Ended),
    }
}

/// A line end would end the comment, and what follows would be an event.
fn on_one_line(text: &str) -> String {
    let plain = |c: char| if c.is_control() { ' ' } else { c };
    text.chars()
        .map(plain)
        .take(COMMENT_BYTES_MAX / 4)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comment_is_one_line_whatever_it_says() {
        assert_eq!(on_one_line("a\n\ndata: x\r"), "a  data: x ");
        assert!(on_one_line(&"\u{1f600}".repeat(1000)).len() <= COMMENT_BYTES_MAX);
    }
}
