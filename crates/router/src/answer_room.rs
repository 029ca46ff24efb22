//! Answers that are given whole: written where that holds up nobody, as many at once as there are cores, and counted in
//! bytes until their clients have taken them. Their memory is not that of bodies: who takes nothing of an answer holds
//! up no request.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::body_room::kib;
use crate::error::ApiError;
use crate::preparing::off_the_runtime;

/// Answers up to this size are not counted: connections are.
const SMALL_BYTES: usize = 64 << 10;

/// Where whole answers are written and wait.
#[derive(Debug)]
pub(crate) struct AnswerRoom {
    /// KiB that are left.
    left: Arc<Semaphore>,
    /// KiB in all: an answer that is larger is alone.
    total: u32,
    writing: Arc<Semaphore>,
    /// Longest wait for a place to be written, or for memory.
    wait_max: Duration,
}

/// The bytes of an answer with their share of the memory.
struct Held {
    bytes: Vec<u8>,
    _share: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AnswerRoom {
    /// Room for so many bytes, and for so many answers that are written at once.
    pub(crate) fn new(bytes: usize, writers: usize, wait_max: Duration) -> Self {
        let total = kib(bytes);
        Self {
            left: Arc::new(Semaphore::new(total as usize)),
            total,
            writing: Arc::new(Semaphore::new(writers)),
            wait_max,
        }
    }

    /// Has an answer written. Dropping the future does not stop the work, which keeps its place until it ends.
    pub(crate) async fn write(
        &self,
        work: impl FnOnce() -> Result<Vec<u8>, ApiError> + Send + 'static,
    ) -> Result<Vec<u8>, ApiError> {
        let place = Arc::clone(&self.writing).acquire_owned();
        let Ok(Ok(place)) = timeout(self.wait_max, place).await else {
            return Err(ApiError::unavailable("too many answers are being written"));
        };
        off_the_runtime("writing an answer", place, work).await
    }

    /// The bytes with a share of the memory, which they keep until they are sent or dropped.
    pub(crate) async fn hold(&self, mut bytes: Vec<u8>) -> Result<Bytes, ApiError> {
        bytes.shrink_to_fit();
        let _share = self.share(bytes.len()).await?;
        Ok(Bytes::from_owner(Held { bytes, _share }))
    }

    /// The share of an answer of so many bytes, which is to be kept as long as they are; a small one has none.
    pub(crate) async fn share(
        &self,
        bytes: usize,
    ) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        if bytes <= SMALL_BYTES {
            return Ok(None);
        }
        let needed = kib(bytes).min(self.total);
        let taken = Arc::clone(&self.left).acquire_many_owned(needed);
        match timeout(self.wait_max, taken).await {
            Ok(Ok(taken)) => Ok(Some(taken)),
            _ => {
                let message = "too many large answers wait for their clients";
                Err(ApiError::unavailable(message))
            }
        }
    }
}

/// The response with this JSON.
pub(crate) fn json_response(bytes: Bytes) -> Response {
    let mut response = Response::new(Body::from(bytes));
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(CONTENT_TYPE, json);
    response
}

/// JSON text of what our own types say.
pub(crate) fn json_bytes(value: &impl serde::Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(value).map_err(|error| {
        tracing::error!(%error, "an answer cannot be written as JSON");
        ApiError::internal()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn room(bytes: usize) -> AnswerRoom {
        AnswerRoom::new(bytes, 1, Duration::from_secs(10))
    }

    #[tokio::test(start_paused = true)]
    async fn large_answers_are_counted_until_they_are_gone_and_small_ones_are_not() {
        let room = room(200 << 10);
        let large = || vec![b' '; 150 << 10];
        let first = room.hold(large()).await.unwrap();
        // A part of it keeps all of it.
        let part = first.slice(1..2);
        drop(first);
        let refused = room.hold(large()).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unavailable);
        assert!(refused.message.contains("wait for their clients"));
        room.hold(vec![b' '; SMALL_BYTES]).await.unwrap();
        drop(part);
        room.hold(large()).await.unwrap();
        // Larger than all of the room: it is alone.
        let alone = room.hold(vec![b' '; 1 << 20]).await.unwrap();
        assert!(room.hold(large()).await.is_err());
        drop(alone);
    }

    #[tokio::test]
    async fn an_answer_is_written_beside_the_threads_of_the_runtime_and_one_at_a_time() {
        let room = Arc::new(room(1 << 20));
        let here = std::thread::current().id();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let (say, mut started) = tokio::sync::mpsc::channel(1);
        let first = {
            let room = Arc::clone(&room);
            async move {
                let work = move || {
                    say.blocking_send(std::thread::current().id()).unwrap();
                    gone.recv().unwrap();
                    Ok(b"first".to_vec())
                };
                room.write(work).await
            }
        };
        let mut first = Box::pin(first);
        let there = tokio::select! {
            _ = &mut first => unreachable!("the work waits for the test"),
            thread = started.recv() => thread.unwrap(),
        };
        assert_ne!(there, here);
        let mut second = Box::pin(room.write(|| Ok(b"second".to_vec())));
        let waits = futures::poll!(&mut second);
        assert!(waits.is_pending() && room.writing.available_permits() == 0);
        go.send(()).unwrap();
        assert_eq!(first.await.unwrap(), b"first");
        assert_eq!(second.await.unwrap(), b"second");
    }
}
