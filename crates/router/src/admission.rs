//! Who may run now, who waits, who is refused. Never lets more in than the named limits, and never makes
//! anybody wait for ever. Whose turn it is, [`FairQueue`] decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::error::{ApiError, ErrorKind};
use crate::tenants::{Ask, Entered, FairQueue, Granted, Limits, QueueMax, TenantName, Ticket};

/// How much may run and wait, and how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdmissionLimits {
    pub(crate) sequences_max: usize,
    /// Whether there are several tenants: then none of them gets all places.
    pub(crate) is_shared: bool,
    pub(crate) queue: QueueMax,
    pub(crate) queue_wait: Duration,
    /// A request that waits so long counts as one class higher.
    pub(crate) age: Duration,
}

/// The door to the workers: a number of sequences, and a bounded queue before it.
#[derive(Debug)]
pub(crate) struct Admission {
    limits: AdmissionLimits,
    door: Arc<Door>,
    running: Arc<AtomicUsize>,
    stopping: CancellationToken,
}

/// The queue, shared with those who hold places.
#[derive(Debug)]
struct Door(Mutex<FairQueue<oneshot::Sender<Places>>>);

/// The right to run.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) places: Places,
    /// Counts the request as running until its answer is out.
    pub(crate) running: Counted,
}

/// Places among the sequences that run; gives them back when dropped.
#[derive(Debug)]
pub(crate) struct Places {
    door: Arc<Door>,
    tenant: TenantName,
    num: usize,
}

impl Places {
    /// Gives back all but what `num_sequences` need.
    pub(crate) fn shrink_to(&mut self, num_sequences: usize) {
        let unneeded = self.num.saturating_sub(num_sequences);
        if unneeded > 0 {
            self.num -= unneeded;
            self.door.0.lock().give_back(&self.tenant, unneeded);
            Door::let_in(&self.door);
        }
    }

    /// Notes tokens that were generated in these places.
    pub(crate) fn generated(&self, num_tokens: u32) {
        let mut queue = self.door.0.lock();
        queue.generated(&self.tenant, num_tokens.into());
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        let mut queue = self.door.0.lock();
        queue.give_back(&self.tenant, self.num);
        queue.finish(&self.tenant);
        drop(queue);
        Door::let_in(&self.door);
    }
}

impl Door {
    fn places(door: &Arc<Self>, tenant: TenantName, num: usize) -> Places {
        let door = Arc::clone(door);
        Places { door, tenant, num }
    }

    /// Lets in whoever is next, as long as somebody is.
    fn let_in(door: &Arc<Self>) {
        loop {
            // Not in the condition of a loop: the lock must be free again before places can be dropped.
            let next = door.0.lock().pop(Instant::now());
            let Some(granted) = next else { return };
            let Granted {
                tenant,
                places,
                waiter,
            } = granted;
            // Whoever is gone drops them, which lets in the next.
            let _gone = waiter.send(Self::places(door, tenant, places));
        }
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

/// A request that came and asks for nothing yet. Counts among those who wait until it is settled or dropped.
#[derive(Debug)]
pub(crate) struct Arrival {
    door: Arc<Door>,
    tenant: TenantName,
    is_settled: AtomicBool,
}

impl Arrival {
    /// The request is read, and asks for places or gives up.
    pub(crate) fn settle(&self) {
        if !self.is_settled.swap(true, Ordering::Relaxed) {
            self.door.0.lock().settle(&self.tenant);
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.settle();
    }
}

/// A request in the queue; leaves it when dropped.
struct Queued<'a> {
    door: &'a Arc<Door>,
    tenant: TenantName,
    ticket: Ticket,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        let was_there = self.door.0.lock().leave(&self.tenant, self.ticket);
        if was_there {
            // It may have held up others with its size.
            Door::let_in(self.door);
        }
    }
}

impl Admission {
    /// `stopping` refuses whoever still waits.
    pub(crate) fn new(limits: AdmissionLimits, stopping: CancellationToken) -> Self {
        let (places, is_shared) = (limits.sequences_max, limits.is_shared);
        let queue = FairQueue::new(places, is_shared, limits.queue, limits.age);
        Self {
            limits,
            door: Arc::new(Door(Mutex::new(queue))),
            running: Arc::default(),
            stopping,
        }
    }

    /// What all workers run at once, if that is known: so many places there are, but no more than configured.
    pub(crate) fn set_capacity(&self, sequences: Option<usize>) {
        let places = sequences
            .unwrap_or(usize::MAX)
            .min(self.limits.sequences_max);
        self.door.0.lock().set_places(places);
        Door::let_in(&self.door);
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
        self.door.0.lock().num_waiting()
    }

    /// Memory that they take.
    pub(crate) fn waiting_bytes(&self) -> usize {
        self.door.0.lock().bytes()
    }

    /// Refuses a request that there is no room for, before it is read.
    pub(crate) fn knock(&self, tenant: &TenantName) -> Result<(), ApiError> {
        let has_room = self.door.0.lock().has_room(tenant);
        has_room.then_some(()).ok_or_else(|| self.full())
    }

    /// Notes a request before it is understood, which costs more than to refuse it.
    pub(crate) fn arrive(&self, tenant: &TenantName, limits: Limits) -> Result<Arrival, ApiError> {
        if !self.door.0.lock().arrive(tenant, limits) {
            return Err(self.full());
        }
        Ok(Arrival {
            door: Arc::clone(&self.door),
            tenant: tenant.clone(),
            is_settled: AtomicBool::new(false),
        })
    }

    /// Waits for the places that `ask` asks for. A request for more sequences than there are places takes all
    /// of them.
    pub(crate) async fn admit(&self, ask: Ask) -> Result<Admitted, ApiError> {
        let tenant = ask.tenant.clone();
        let (sender, receiver) = oneshot::channel();
        let entered = self.door.0.lock().enter(ask, sender, Instant::now());
        let (ticket, had_to_go) = match entered {
            Entered::Now(granted) => {
                let places = Door::places(&self.door, granted.tenant, granted.places);
                return Ok(self.admitted(places));
            }
            Entered::Waits { ticket, gone } => {
                // Who had to give way is told so by the end of its channel.
                (ticket, !gone.is_empty())
            }
            Entered::Full(_) => return Err(self.full()),
        };
        let _queued = Queued {
            door: &self.door,
            tenant,
            ticket,
        };
        if had_to_go {
            // One of them may have held up others with its size.
            Door::let_in(&self.door);
        }
        let granted = tokio::select! {
            biased;
            granted = timeout(self.limits.queue_wait, receiver) => granted,
            () = self.stopping.cancelled() => return Err(stopping()),
        };
        match granted {
            Ok(Ok(places)) => Ok(self.admitted(places)),
            Ok(Err(_turned_out)) => {
                let message = "the queue is full, and others have fewer requests in it";
                Err(ApiError::new(ErrorKind::QueueFull, message))
            }
            Err(_elapsed) => {
                let waited = humantime::format_duration(self.limits.queue_wait);
                Err(ApiError::unavailable(format!(
                    "no place was free within {waited}"
                )))
            }
        }
    }

    fn full(&self) -> ApiError {
        let QueueMax { requests, bytes } = self.limits.queue;
        let message =
            format!("the queue is full; it holds {requests} requests and {bytes} bytes of them");
        ApiError::new(ErrorKind::QueueFull, message)
    }

    fn admitted(&self, places: Places) -> Admitted {
        Admitted {
            places,
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
    use crate::tenants::config::Class;

    fn door(sequences: usize, queue: usize) -> (Arc<Admission>, CancellationToken) {
        let stop = CancellationToken::new();
        let limits = AdmissionLimits {
            sequences_max: sequences,
            is_shared: false,
            queue: QueueMax {
                requests: queue,
                bytes: 1 << 20,
            },
            queue_wait: Duration::from_secs(10),
            age: Duration::from_secs(20),
        };
        (Arc::new(Admission::new(limits, stop.clone())), stop)
    }

    fn of(tenant: &str, places: usize) -> Ask {
        Ask {
            tenant: TenantName::new(tenant).unwrap(),
            class: Class::Normal,
            limits: Limits::default(),
            places,
            prompt_tokens: 1,
            bytes: 1,
        }
    }

    fn ask(places: usize) -> Ask {
        of("default", places)
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
        let first = door.admit(ask(1)).await.unwrap();
        let second = door.admit(ask(1)).await.unwrap();
        let third = queued!(door.admit(ask(1)));
        assert_eq!((door.running(), door.waiting()), (2, 1));
        let refused = door.admit(ask(1)).await.unwrap_err();
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
        let held = door.admit(ask(1)).await.unwrap();
        let left = queued!(door.admit(ask(1)));
        drop(left);
        assert_eq!(door.waiting(), 0);
        let late = door.admit(ask(1)).await.unwrap_err();
        assert_eq!(late.kind, ErrorKind::Unavailable);
        assert_eq!(late.message, "no place was free within 10s");
        drop(held);
        door.admit(ask(1)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_for_more_than_the_house_takes_the_house() {
        let (door, stop) = door(3, 4);
        let all = door.admit(ask(100)).await.unwrap();
        let waiting = queued!(door.admit(ask(1)));
        stop.cancel();
        assert_eq!(
            waiting.await.unwrap_err().message,
            "this router is stopping"
        );
        drop(all);
    }

    #[tokio::test(start_paused = true)]
    async fn there_are_as_many_places_as_workers_have_and_no_more_than_configured() {
        let (door, _stop) = door(3, 4);
        door.set_capacity(Some(1));
        let first = door.admit(ask(1)).await.unwrap();
        let mut second = queued!(door.admit(ask(1)));
        assert!(futures::poll!(&mut second).is_pending());
        door.set_capacity(Some(9));
        let second = second.await.unwrap();
        let third = door.admit(ask(1)).await.unwrap();
        let mut fourth = queued!(door.admit(ask(1)));
        door.set_capacity(None);
        assert!(futures::poll!(&mut fourth).is_pending());
        drop((first, second, third));
    }

    #[tokio::test(start_paused = true)]
    async fn places_go_back_one_by_one_while_the_request_runs() {
        let (door, _stop) = door(2, 4);
        let mut all = door.admit(ask(5)).await.unwrap();
        let mut waiting = queued!(door.admit(ask(1)));
        all.places.shrink_to(2);
        assert!(futures::poll!(&mut waiting).is_pending());
        all.places.shrink_to(1);
        let second = waiting.await.unwrap();
        assert_eq!(door.running(), 2);
        drop((all, second));
        door.admit(ask(2)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_large_request_that_leaves_lets_in_those_behind_it() {
        let (door, _stop) = door(2, 4);
        let first = door.admit(ask(1)).await.unwrap();
        let large = queued!(door.admit(ask(2)));
        let small = queued!(door.admit(ask(1)));
        drop(large);
        let small = timeout(Duration::from_secs(1), small)
            .await
            .unwrap()
            .unwrap();
        drop((first, small));
    }

    #[tokio::test(start_paused = true)]
    async fn places_for_one_who_left_meanwhile_go_to_the_next() {
        let (door, _stop) = door(1, 4);
        let first = door.admit(ask(1)).await.unwrap();
        let left = queued!(door.admit(ask(1)));
        let next = queued!(door.admit(ask(1)));
        // Granted, but nobody looks any more.
        drop(first);
        drop(left);
        drop(
            timeout(Duration::from_secs(1), next)
                .await
                .unwrap()
                .unwrap(),
        );
        door.admit(ask(1)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn another_tenant_turns_out_the_last_of_one_that_fills_the_queue() {
        let (door, _stop) = door(1, 2);
        let first = door.admit(of("a", 1)).await.unwrap();
        let kept = queued!(door.admit(of("a", 1)));
        let out = queued!(door.admit(of("a", 1)));
        let other = queued!(door.admit(of("b", 1)));
        assert_eq!(out.await.unwrap_err().kind, ErrorKind::QueueFull);
        drop(first);
        drop(kept.await.unwrap());
        drop(other.await.unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn who_stood_behind_a_large_request_that_is_turned_out_goes_on_at_once() {
        let (door, _stop) = door(2, 2);
        let first = door.admit(of("a", 1)).await.unwrap();
        let kept = queued!(door.admit(of("b", 2)));
        let mut out = queued!(door.admit(of("b", 1)));
        // One place is free, but b's large request stays and is not passed.
        let mut other = queued!(door.admit(of("c", 1)));
        assert!(futures::poll!(&mut out).is_ready());
        assert!(futures::poll!(&mut other).is_pending());
        drop(kept);
        drop(other.await.unwrap());

        // The large one is the only one of its tenant, and takes most of the memory.
        let large = queued!(door.admit(Ask {
            bytes: 900 << 10,
            ..of("b", 2)
        }));
        let small = Ask {
            bytes: 200 << 10,
            ..of("c", 1)
        };
        let small = door.admit(small).await.unwrap();
        assert_eq!(large.await.unwrap_err().kind, ErrorKind::QueueFull);
        drop((first, small));
    }

    #[tokio::test(start_paused = true)]
    async fn who_arrives_is_counted_until_it_asks_or_is_gone() {
        let (door, _stop) = door(1, 0);
        let tenant = TenantName::default();
        let first = door.arrive(&tenant, Limits::default()).unwrap();
        let refused = door.arrive(&tenant, Limits::default()).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::QueueFull);
        first.settle();
        drop(first);
        let admitted = door.admit(ask(1)).await.unwrap();
        assert!(door.arrive(&tenant, Limits::default()).is_err());
        drop(admitted);
        drop(door.arrive(&tenant, Limits::default()).unwrap());
    }
}
