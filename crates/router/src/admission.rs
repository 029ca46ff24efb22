//! Who may run now, who waits, who is refused. Never lets more in than the named limits, and never makes
//! anybody wait for ever.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::error::{ApiError, ErrorKind};

/// The door to the workers: a number of sequences, and a bounded queue before it.
#[derive(Debug)]
pub(crate) struct Admission {
    places: Arc<Semaphore>,
    sequences_max: usize,
    queue_max: usize,
    queue_wait: Duration,
    waiting: Arc<AtomicUsize>,
    running: Arc<AtomicUsize>,
    stopping: CancellationToken,
}

/// The right to run.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) places: Places,
    /// Counts the request as running until its answer is out.
    pub(crate) running: Counted,
}

/// Places among the sequences that run; gives them back when dropped.
#[derive(Debug)]
pub(crate) struct Places(OwnedSemaphorePermit);

impl Places {
    /// Gives back all but what `num_sequences` need.
    pub(crate) fn shrink_to(&mut self, num_sequences: usize) {
        let unneeded = self.0.num_permits().saturating_sub(num_sequences);
        drop(self.0.split(unneeded));
    }
}

/// Counts one for as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(crate) fn new(counter: &Arc<AtomicUsize>) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(counter))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    /// `stopping` refuses whoever still waits.
    pub(crate) fn new(
        sequences_max: usize,
        queue_max: usize,
        queue_wait: Duration,
        stopping: CancellationToken,
    ) -> Self {
        Self {
            places: Arc::new(Semaphore::new(sequences_max)),
            sequences_max,
            queue_max,
            queue_wait,
            waiting: Arc::default(),
            running: Arc::default(),
            stopping,
        }
    }

    /// Counts a request as running whose answer another one may already make.
    pub(crate) fn count(&self) -> Counted {
        Counted::new(&self.running)
    }

    /// Requests that run.
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::Relaxed)
    }

    /// Requests that wait.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Waits for places for `num_sequences`, first come first served. A request for more sequences than
    /// there are places takes all of them.
    pub(crate) async fn admit(&self, num_sequences: usize) -> Result<Admitted, ApiError> {
        // In range: the configuration bounds the number of places.
        let places = u32::try_from(num_sequences.min(self.sequences_max)).unwrap_or(u32::MAX);
        if let Ok(permit) = Arc::clone(&self.places).try_acquire_many_owned(places) {
            return Ok(self.admitted(permit));
        }
        let queued = Counted::new(&self.waiting);
        if self.waiting() > self.queue_max {
            let message = format!("the queue is full with {} requests", self.queue_max);
            return Err(ApiError::new(ErrorKind::QueueFull, message));
        }
        let acquired = timeout(
            self.queue_wait,
            Arc::clone(&self.places).acquire_many_owned(places),
        );
        let acquired = tokio::select! {
            biased;
            acquired = acquired => acquired,
            () = self.stopping.cancelled() => return Err(stopping()),
        };
        drop(queued);
        match acquired {
            Ok(Ok(permit)) => Ok(self.admitted(permit)),
            Ok(Err(_closed)) => Err(stopping()),
            Err(_elapsed) => {
                let waited = humantime::format_duration(self.queue_wait);
                Err(ApiError::unavailable(format!(
                    "no place was free within {waited}"
                )))
            }
        }
    }

    fn admitted(&self, places: OwnedSemaphorePermit) -> Admitted {
        Admitted {
            places: Places(places),
            running: Counted::new(&self.running),
        }
    }
}

fn stopping() -> ApiError {
    ApiError::unavailable("this router is stopping")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door(sequences: usize, queue: usize) -> (Arc<Admission>, CancellationToken) {
        let stop = CancellationToken::new();
        let wait = Duration::from_secs(10);
        (
            Arc::new(Admission::new(sequences, queue, wait, stop.clone())),
            stop,
        )
    }

    /// Polls a future once, so that it takes its place in the queue.
    macro_rules! queued {
        ($future:expr) => {{
            let mut future = Box::pin($future);
            assert!(futures::poll!(&mut future).is_pending());
            future
        }};
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_house_queues_then_refuses_and_lets_in_by_turn() {
        let (door, _stop) = door(2, 1);
        let first = door.admit(1).await.unwrap();
        let second = door.admit(1).await.unwrap();
        let third = queued!(door.admit(1));
        assert_eq!((door.running(), door.waiting()), (2, 1));
        let refused = door.admit(1).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::QueueFull);
        assert!(refused.retry_after.is_some());
        drop(first);
        let third = third.await.unwrap();
        assert_eq!((door.running(), door.waiting()), (2, 0));
        drop((second, third));
        assert_eq!(door.running(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_longer_than_the_limit_and_leaving_frees_the_place_in_the_queue() {
        let (door, _stop) = door(1, 1);
        let held = door.admit(1).await.unwrap();
        let left = queued!(door.admit(1));
        drop(left);
        assert_eq!(door.waiting(), 0);
        let late = door.admit(1).await.unwrap_err();
        assert_eq!(late.kind, ErrorKind::Unavailable);
        assert_eq!(late.message, "no place was free within 10s");
        drop(held);
        door.admit(1).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_for_more_than_the_house_takes_the_house() {
        let (door, stop) = door(3, 4);
        let all = door.admit(100).await.unwrap();
        let waiting = queued!(door.admit(1));
        stop.cancel();
        assert_eq!(
            waiting.await.unwrap_err().message,
            "this router is stopping"
        );
        drop(all);
    }

    #[tokio::test(start_paused = true)]
    async fn places_go_back_one_by_one_while_the_request_runs() {
        let (door, _stop) = door(2, 4);
        let mut all = door.admit(5).await.unwrap();
        let mut waiting = queued!(door.admit(1));
        all.places.shrink_to(2);
        assert!(futures::poll!(&mut waiting).is_pending());
        all.places.shrink_to(1);
        let second = waiting.await.unwrap();
        assert_eq!(door.running(), 2);
        drop((all, second));
        door.admit(2).await.unwrap();
    }
}
