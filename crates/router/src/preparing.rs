//! Places where requests are parsed and tokenized: long CPU work. Tenants take turns for them, so that who sends much
//! waits for itself. Never makes anybody wait for ever, and never lets more wait than its limit.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tramontane_types::TurnQueue;

use crate::error::ApiError;
use crate::tenants::TenantName;

/// Requests that wait for a place: more than the default queue and all that run have together.
pub(crate) const PREPARE_WAITING_MAX: usize = 4096;

/// The places, and who waits for one.
#[derive(Clone, Debug)]
pub(crate) struct Preparing {
    turnstile: Arc<Turnstile>,
    wait: Duration,
}

#[derive(Debug)]
struct Turnstile {
    queue: Mutex<Queue>,
    waiting_max: usize,
}

#[derive(Debug)]
struct Queue {
    /// Places that nobody has; none while somebody waits.
    free: usize,
    waiting: TurnQueue<TenantName, Waiter>,
    next_number: u64,
}

#[derive(Debug)]
struct Waiter {
    number: u64,
    place: oneshot::Sender<Place>,
}

/// One of the places; goes to whoever is next when dropped.
#[derive(Debug)]
struct Place(Arc<Turnstile>);

impl Drop for Place {
    fn drop(&mut self) {
        // Not while the lock is held: whoever is gone drops the place again, and so lets in the next.
        let next = self.0.queue.lock().pop();
        if let Some(next) = next {
            let _gone = next.place.send(Self(Arc::clone(&self.0)));
        }
    }
}

/// A request that waits; leaves the queue when dropped.
struct Waiting<'a> {
    turnstile: &'a Turnstile,
    tenant: &'a TenantName,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut queue = self.turnstile.queue.lock();
        let is_this = |waiter: &Waiter| waiter.number == self.number;
        let _left = queue.waiting.remove(self.tenant, is_this);
    }
}

impl Preparing {
    /// `wait` is the longest wait for a place.
    pub(crate) fn new(places: usize, waiting_max: usize, wait: Duration) -> Self {
        let queue = Queue {
            free: places,
            waiting: TurnQueue::default(),
            next_number: 0,
        };
        let queue = Mutex::new(queue);
        Self {
            turnstile: Arc::new(Turnstile { queue, waiting_max }),
            wait,
        }
    }

    /// Does the work of a request of `tenant` where it holds up nobody, when its turn comes. Dropping the future does
    /// not stop the work, which keeps its place until it ends.
    pub(crate) async fn run<T, F>(&self, tenant: &TenantName, work: F) -> Result<T, ApiError>
    where
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
        T: Send + 'static,
    {
        let place = self.place(tenant).await?;
        off_the_runtime("preparing a request", place, work).await
    }

    async fn place(&self, tenant: &TenantName) -> Result<Place, ApiError> {
        let (sender, receiver) = oneshot::channel();
        let (number, gone) = {
            let mut queue = self.turnstile.queue.lock();
            if queue.free > 0 {
                queue.free -= 1;
                queue.waiting.had_turn(tenant.clone());
                return Ok(Place(Arc::clone(&self.turnstile)));
            }
            let number = queue.next_number;
            queue.next_number += 1;
            let (place, max) = (sender, self.turnstile.waiting_max);
            let pushed = queue
                .waiting
                .push(tenant.clone(), Waiter { number, place }, max);
            (number, pushed.map_err(|_refused| too_many())?)
        };
        // Whoever gives way is told so by the end of its channel.
        drop(gone);
        let _waiting = Waiting {
            turnstile: &self.turnstile,
            tenant,
            number,
        };
        match timeout(self.wait, receiver).await {
            Ok(Ok(place)) => Ok(place),
            Ok(Err(_gave_way)) => Err(ApiError::unavailable(
                "too many requests are being read, and others have fewer among them",
            )),
            Err(_elapsed) => Err(too_many()),
        }
    }
}

/// Does long CPU work where it holds up nobody; `place` goes along with it until it ends, also when nobody waits any more.
pub(crate) async fn off_the_runtime<T, F>(
    what: &'static str,
    place: impl Send + 'static,
    work: F,
) -> Result<T, ApiError>
where
    F: FnOnce() -> Result<T, ApiError> + Send + 'static,
    T: Send + 'static,
{
    let work = move || {
        let _place = place;
        work()
    };
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            tracing::error!(%error, what, "long work did not end");
            Err(ApiError::internal())
        })
}

fn too_many() -> ApiError {
    ApiError::unavailable("too many requests are being read")
}

impl Queue {
    /// The first request of whoever is next. Without any the place that it would get is free.
    fn pop(&mut self) -> Option<Waiter> {
        let next = self.waiting.pop();
        self.free += usize::from(next.is_none());
        next
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use tokio::sync::mpsc;
    use tokio::time::Instant;

    use super::*;
    use crate::error::ErrorKind;

    const WAIT: Duration = Duration::from_secs(10);

    fn tenant(name: &str) -> TenantName {
        TenantName::new(name).unwrap()
    }

    fn places(num: usize, waiting_max: usize) -> Preparing {
        Preparing::new(num, waiting_max, WAIT)
    }

    type Asking<'a> = Pin<Box<dyn Future<Output = Result<Place, ApiError>> + 'a>>;

    /// One that has begun to wait.
    async fn asks<'a>(preparing: &'a Preparing, tenant: &'a TenantName) -> Asking<'a> {
        let mut asking: Asking<'a> = Box::pin(preparing.place(tenant));
        assert!(futures::poll!(&mut asking).is_pending());
        asking
    }

    fn free(preparing: &Preparing) -> usize {
        preparing.turnstile.queue.lock().free
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_take_turns_however_much_one_of_them_asks_for() {
        let (preparing, a, b, c) = (places(1, 10), tenant("a"), tenant("b"), tenant("c"));
        let mut place = preparing.place(&a).await.unwrap();
        let mut waiting = Vec::new();
        for name in [&a, &a, &a, &c, &b, &b] {
            waiting.push((name, asks(&preparing, name).await));
        }
        let mut order = Vec::new();
        while !waiting.is_empty() {
            drop(place);
            let mut next = None;
            for (index, (name, asking)) in waiting.iter_mut().enumerate() {
                if let std::task::Poll::Ready(got) = futures::poll!(asking) {
                    assert!(next.is_none(), "there is one place");
                    next = Some((index, got.unwrap()));
                    order.push(name.as_str());
                }
            }
            let (index, got) = next.expect("a place that is free is somebody's");
            drop(waiting.remove(index));
            place = got;
        }
        assert_eq!(order.join(" "), "b c a b a a");
        drop(place);
        assert_eq!(free(&preparing), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_goes_away_gives_its_place_on() {
        let (preparing, a, b) = (places(1, 10), tenant("a"), tenant("b"));
        let place = preparing.place(&a).await.unwrap();
        let (leaves, got, next) = (
            asks(&preparing, &a).await,
            asks(&preparing, &b).await,
            asks(&preparing, &b).await,
        );
        drop(leaves);
        // It has the place and has not noticed.
        drop(place);
        drop(got);
        let place = next.await.unwrap();
        assert_eq!((free(&preparing), Arc::strong_count(&place.0)), (0, 2));
        drop(place);
        assert_eq!(free(&preparing), 1);
        let queue = preparing.turnstile.queue.lock();
        assert!(queue.waiting.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn where_nobody_else_fits_who_has_most_gives_way_to_who_has_less() {
        let (preparing, a, b) = (places(1, 3), tenant("a"), tenant("b"));
        let _place = preparing.place(&a).await.unwrap();
        let first = asks(&preparing, &a).await;
        let second = asks(&preparing, &a).await;
        let last = asks(&preparing, &a).await;
        let refused = preparing.place(&a).await.unwrap_err();
        assert_eq!(refused, too_many());
        let other = asks(&preparing, &b).await;
        let told = last.await.unwrap_err();
        assert_eq!(told.kind, ErrorKind::Unavailable);
        assert!(told.message.contains("others have fewer"), "{told}");
        // It would have as many as the other.
        assert_eq!(preparing.place(&b).await.unwrap_err(), too_many());
        drop((first, second, other));
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_longer_than_the_limit() {
        let (preparing, a) = (places(1, 10), tenant("a"));
        let _place = preparing.place(&a).await.unwrap();
        let begin = Instant::now();
        assert_eq!(preparing.place(&a).await.unwrap_err(), too_many());
        assert_eq!(begin.elapsed(), WAIT);
        assert!(preparing.turnstile.queue.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn work_that_nobody_waits_for_keeps_its_place_until_it_ends() {
        let (preparing, a) = (places(1, 10), tenant("a"));
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let (say, mut started) = mpsc::channel(1);
        let work = move || {
            say.blocking_send(()).unwrap();
            ended.recv().unwrap();
            Ok(())
        };
        let mut running = Box::pin(preparing.run(&a, work));
        tokio::select! {
            _ = &mut running => unreachable!("the work waits for the test"),
            started = started.recv() => started.unwrap(),
        }
        drop(running);
        assert_eq!(free(&preparing), 0);
        end.send(()).unwrap();
        drop(preparing.place(&a).await.unwrap());
    }
}
