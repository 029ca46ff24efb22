//! The memory that request bodies of both doors may take together. A body gets its share as it arrives, the first part
//! before anything of it is here; when there is none left, the one that has been arriving for the longest makes way,
//! those first that nobody is known to send, then those that wait for their client and not for memory. Never lets who
//! sends slowly hold up the others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::error::ApiError;

/// A body that still arrives after this time makes way for others when memory is short. What a client in the next
/// city sends in that time is megabytes; who waits for memory waits so long at most for those that stand still.
pub(crate) const SLOW_AFTER: Duration = Duration::from_secs(1);

/// A share of the memory; given back when dropped.
pub(crate) type Share = OwnedSemaphorePermit;

/// The memory, and who holds some of it while it still arrives.
#[derive(Debug)]
pub(crate) struct BodyRoom {
    /// KiB that are left.
    left: Arc<Semaphore>,
    /// KiB in all: nobody asks for more.
    total: u32,
    arriving: Mutex<Arriving>,
}

/// A body that is to arrive.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Newcomer {
    /// Memory that it takes before anything of it is here, until it is here.
    pub(crate) bytes: usize,
    /// Whether it is known who sends it.
    pub(crate) is_known: bool,
}

#[derive(Debug, Default)]
struct Arriving {
    next_number: u64,
    /// By number, which is by age.
    bodies: BTreeMap<u64, Holder>,
    /// KiB that are waited for.
    wanted: u64,
    /// KiB of those that were told to make way and have not done so yet.
    leaving: u64,
}

#[derive(Debug)]
struct Holder {
    since: Instant,
    held: u32,
    is_known: bool,
    /// Whether it waits for memory: its client has sent something.
    waits: bool,
    give_up: CancellationToken,
}

/// A body that is arriving.
#[derive(Debug)]
pub(crate) struct ArrivingBody {
    room: Arc<BodyRoom>,
    number: u64,
    /// Memory that it takes until it is here.
    base_bytes: usize,
    /// Memory that is needed for longer.
    bytes: usize,
    share: Option<Share>,
    give_up: CancellationToken,
}

/// In the unit of memory that is counted, rounded up.
pub(crate) fn kib(bytes: usize) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

impl BodyRoom {
    pub(crate) fn new(bytes: usize) -> Self {
        let total = kib(bytes).min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self {
            left: Arc::new(Semaphore::new(total as usize)),
            total,
            arriving: Mutex::default(),
        }
    }

    /// Takes in a body of which nothing has come yet. Waits until `deadline` for what it takes all the same.
    pub(crate) async fn arrive(
        self: &Arc<Self>,
        newcomer: Newcomer,
        deadline: Instant,
    ) -> Result<ArrivingBody, ApiError> {
        let mut body = self.enter(newcomer);
        body.grow(0, deadline).await?;
        Ok(body)
    }

    fn enter(self: &Arc<Self>, newcomer: Newcomer) -> ArrivingBody {
        let give_up = CancellationToken::new();
        let mut arriving = self.arriving.lock();
        // Under the lock, so that those with higher numbers are not older.
        let holder = Holder {
            since: Instant::now(),
            held: 0,
            is_known: newcomer.is_known,
            waits: false,
            give_up: give_up.clone(),
        };
        let number = arriving.next_number;
        arriving.next_number += 1;
        arriving.bodies.insert(number, holder);
        ArrivingBody {
            room: Arc::clone(self),
            number,
            base_bytes: newcomer.bytes,
            bytes: 0,
            share: None,
            give_up,
        }
    }

    /// Tells the oldest slow bodies but `asker` to make way, as many as it takes for all that is waited for. Says when
    /// to look again.
    fn make_way(&self, asker: u64) -> Instant {
        let now = Instant::now();
        let mut arriving = self.arriving.lock();
        // Who has to go itself asks for nothing.
        while arriving.leaving < arriving.wanted && arriving.bodies.contains_key(&asker) {
            let Some(number) = arriving.first_to_go(asker, now) else {
                break;
            };
            if let Some(slow) = arriving.bodies.remove(&number) {
                arriving.leaving += u64::from(slow.held);
                slow.give_up.cancel();
            }
        }
        if arriving.leaving >= arriving.wanted {
            return now + SLOW_AFTER;
        }
        let mut times = arriving.bodies.values().map(|h| h.since + SLOW_AFTER);
        let next = times.find(|at| *at > now);
        next.unwrap_or(now + SLOW_AFTER)
    }

    fn note_waiting(&self, number: u64, kib: u32, waits: bool) {
        let mut arriving = self.arriving.lock();
        if waits {
            arriving.wanted += u64::from(kib);
        } else {
            arriving.wanted -= u64::from(kib);
        }
        if let Some(holder) = arriving.bodies.get_mut(&number) {
            holder.waits = waits;
        }
    }
}

impl Arriving {
    /// Of those that are slow and hold some memory. Stops at the first that is not slow: there may be tens of thousands.
    fn first_to_go(&self, asker: u64, now: Instant) -> Option<u64> {
        let slow = || {
            let old = self.bodies.iter();
            let old = old.take_while(|(_, holder)| holder.since + SLOW_AFTER <= now);
            old.filter(|(number, holder)| **number != asker && holder.held > 0)
        };
        let unknown = slow().find(|(_, holder)| !holder.is_known && !holder.waits);
        let stands = || slow().find(|(_, holder)| !holder.waits);
        let first = unknown.or_else(stands).or_else(|| slow().next());
        first.map(|(number, _)| *number)
    }
}

/// A body waits for so many KiB.
struct Wanted<'a> {
    room: &'a BodyRoom,
    number: u64,
    kib: u32,
}

impl<'a> Wanted<'a> {
    fn new(room: &'a BodyRoom, number: u64, kib: u32) -> Self {
        room.note_waiting(number, kib, true);
        Self { room, number, kib }
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.room.note_waiting(self.number, self.kib, false);
    }
}

impl ArrivingBody {
    /// Ends when this body has to make way, with the reason.
    pub(crate) async fn gives_up(&self) -> ApiError {
        self.give_up.cancelled().await;
        ApiError::unavailable(
            "too many bodies are being read, and this one has taken the longest to arrive",
        )
    }

    /// Waits until `deadline` for memory, so that this body's share covers `bytes`.
    pub(crate) async fn grow(&mut self, bytes: usize, deadline: Instant) -> Result<(), ApiError> {
        self.bytes = self.bytes.max(bytes);
        let held = self.held();
        let needed = kib(bytes.saturating_add(self.base_bytes));
        // In a room that is smaller than what may be made of its largest body, that one is alone.
        let missing = needed.min(self.room.total).saturating_sub(held);
        if missing == 0 {
            return Ok(());
        }
        let more = match Arc::clone(&self.room.left).try_acquire_many_owned(missing) {
            Ok(more) => more,
            Err(_none_left) => self.wait(missing, deadline).await?,
        };
        match &mut self.share {
            Some(share) => share.merge(more),
            None => self.share = Some(more),
        }
        let held = self.held();
        let mut arriving = self.room.arriving.lock();
        match arriving.bodies.get_mut(&self.number) {
            Some(holder) => holder.held = held,
            // It was told to make way meanwhile; what it took since leaves with it.
            None => arriving.leaving += u64::from(missing),
        }
        Ok(())
    }

    async fn wait(&self, missing: u32, deadline: Instant) -> Result<Share, ApiError> {
        let _wanted = Wanted::new(&self.room, self.number, missing);
        let more = Arc::clone(&self.room.left).acquire_many_owned(missing);
        tokio::pin!(more);
        loop {
            let look = self.room.make_way(self.number).min(deadline);
            tokio::select! {
                more = &mut more => return more.map_err(|_closed| ApiError::internal()),
                error = self.gives_up() => return Err(error),
                () = sleep_until(look) => {}
            }
            if Instant::now() >= deadline {
                return Err(ApiError::unavailable("too many bodies are being read"));
            }
        }
    }

    fn held(&self) -> u32 {
        let held = self.share.as_ref().map_or(0, Share::num_permits);
        u32::try_from(held).unwrap_or(u32::MAX)
    }

    /// The body is there: its share is kept for as long as what was made of it needs, and makes way for nobody.
    pub(crate) fn arrived(mut self) -> Option<Share> {
        let mut share = self.share.take();
        let held = share.as_ref().map_or(0, Share::num_permits);
        let needed = held.min(kib(self.bytes) as usize);
        let kept = share.as_mut().and_then(|share| share.split(needed));
        drop(share);
        self.leave(held);
        kept
    }

    /// Nobody waits for `held` any more.
    fn leave(&self, held: usize) {
        let mut arriving = self.room.arriving.lock();
        if arriving.bodies.remove(&self.number).is_none() {
            arriving.leaving = arriving.leaving.saturating_sub(held as u64);
        }
    }
}

impl Drop for ArrivingBody {
    fn drop(&mut self) {
        let share = self.share.take();
        let held = share.as_ref().map_or(0, Share::num_permits);
        drop(share);
        self.leave(held);
    }
}

#[cfg(test)]
mod tests;
