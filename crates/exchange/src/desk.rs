//! Where one thread at a time takes answers and serves calls: the engine's own while it waits for a layer,
//! otherwise the expert server's. Never two at once, and never one that computes something else.
//!
//! A worker with one core has one thread that matters. Handing a call to another thread and its answer
//! back costs two wake-ups, tens of microseconds each on a virtual machine; the thread that waits anyway
//! does the work instead. It looks for work without sleeping for a while, and lends its core to
//! whoever else is ready to run meanwhile.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread::yield_now;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::host::{Doorbell, Sockets};
use crate::server::{Served, Shared};

/// How long a thread looks for work before it sleeps. A little more than what lies between two layers of
/// a small batch; parking costs two wake-ups, looking costs an otherwise idle core.
pub const LOOK_TIME: Duration = Duration::from_millis(2);

/// The engine has nothing to do.
const RESTS: u8 = 0;
/// The engine computes something that takes long.
const AWAY: u8 = 1;
/// The engine sits here, or is about to.
const HERE: u8 = 2;

/// The desk of one worker.
pub struct Desk {
    /// Held by whoever sits here.
    seat: Mutex<Option<Sockets>>,
    /// Wakes a thread that sleeps on sockets.
    doorbell: Option<Arc<Doorbell>>,
    /// Whether somebody sleeps in the seat, or is about to.
    asleep: AtomicBool,
    bell: Mutex<bool>,
    rung: Condvar,
    engine: AtomicU8,
    /// Guards nothing but the wait for the engine to leave.
    leaving: Mutex<()>,
    left: Condvar,
}

impl fmt::Debug for Desk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Desk")
            .field("engine", &self.engine)
            .finish_non_exhaustive()
    }
}

impl Default for Desk {
    fn default() -> Self {
        Self::new(None)
    }
}

impl Desk {
    /// A desk that takes what comes through `sockets` too.
    pub(crate) fn new(sockets: Option<Sockets>) -> Self {
        Self {
            doorbell: sockets.as_ref().map(Sockets::doorbell),
            seat: Mutex::new(sockets),
            asleep: AtomicBool::new(false),
            bell: Mutex::new(false),
            rung: Condvar::new(),
            engine: AtomicU8::new(RESTS),
            leaving: Mutex::new(()),
            left: Condvar::new(),
        }
    }

    /// Wakes whoever sleeps here: something came.
    pub(crate) fn ring(&self) {
        if !self.asleep.load(Ordering::SeqCst) {
            return;
        }
        match &self.doorbell {
            Some(doorbell) => doorbell.ring(),
            None => {
                *self.bell.lock() = true;
                self.rung.notify_one();
            }
        }
    }

    /// The engine is about to sit down.
    pub(crate) fn engine_comes(&self) {
        if self.engine.swap(HERE, Ordering::SeqCst) != HERE {
            self.ring();
        }
    }

    /// The engine computes something long; the server's thread may sit here meanwhile.
    pub(crate) fn engine_goes(&self) {
        self.engine_leaves(AWAY);
    }

    /// The engine has nothing to do.
    pub(crate) fn engine_rests(&self) {
        self.engine_leaves(RESTS);
    }

    fn engine_leaves(&self, state: u8) {
        if self.engine.swap(state, Ordering::SeqCst) == HERE {
            let _guard = self.leaving.lock();
            self.left.notify_all();
        }
    }

    /// Whether the engine sits here or wants to.
    pub(crate) fn is_engine_here(&self) -> bool {
        self.engine.load(Ordering::SeqCst) == HERE
    }

    /// Waits until the engine has left, or `stop`, which is to be told with [`Desk::stop_waiting`].
    pub(crate) fn wait_for_engine(&self, stop: impl Fn() -> bool) {
        let mut guard = self.leaving.lock();
        while self.is_engine_here() && !stop() {
            self.left.wait(&mut guard);
        }
    }

    /// Lets whoever waits or sleeps here look again.
    pub(crate) fn stop_waiting(&self) {
        {
            let _guard = self.leaving.lock();
            self.left.notify_all();
        }
        self.ring();
    }

    /// What sockets are opened with; `None` when this desk reads none.
    pub(crate) const fn doorbell(&self) -> Option<&Arc<Doorbell>> {
        self.doorbell.as_ref()
    }

    /// Ends all connections that are read here.
    pub fn close(&self) {
        if let Some(doorbell) = &self.doorbell {
            doorbell.close_all();
        }
    }

    /// Sits down, after whoever sits here has left.
    pub(crate) fn sit<'a>(&'a self, server: Option<&'a Shared>) -> Seat<'a> {
        Seat {
            desk: self,
            sockets: self.seat.lock(),
            server,
        }
    }

    /// How long to look for work: not at all when that takes the core from the engine.
    pub(crate) fn look_time(&self) -> Duration {
        match self.engine.load(Ordering::SeqCst) {
            AWAY => Duration::ZERO,
            _ => LOOK_TIME,
        }
    }
}

/// A thread at the desk.
pub(crate) struct Seat<'a> {
    desk: &'a Desk,
    sockets: MutexGuard<'a, Option<Sockets>>,
    server: Option<&'a Shared>,
}

impl fmt::Debug for Seat<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").finish_non_exhaustive()
    }
}

impl Seat<'_> {
    /// Serves until `take` gives something, or `until` has passed.
    pub(crate) fn wait<T>(
        &mut self,
        until: Instant,
        take: &mut dyn FnMut() -> Option<T>,
    ) -> Option<T> {
        let mut active = None;
        loop {
            if let Some(taken) = take() {
                return Some(taken);
            }
            let read = self.read(Some(Duration::ZERO));
            let served = self.server.map_or(Served::Nothing, Shared::serve_one);
            let now = Instant::now();
            if read || served == Served::Batch {
                active = Some(now);
            }
            if now >= until {
                return take();
            }
            let looked = now.duration_since(*active.get_or_insert(now));
            if read || served == Served::Batch {
                continue;
            }
            if served == Served::Later || looked < self.desk.look_time() {
                yield_now();
                continue;
            }
            if let Some(taken) = self.sleep(until, take) {
                return Some(taken);
            }
        }
    }

    /// Sleeps until somebody rings, something comes, or `until`; looks first, as it may have come just now.
    fn sleep<T>(&mut self, until: Instant, take: &mut dyn FnMut() -> Option<T>) -> Option<T> {
        self.desk.asleep.store(true, Ordering::SeqCst);
        let taken = take();
        if taken.is_none() && !self.server.is_some_and(Shared::has_calls) {
            let left = until.saturating_duration_since(Instant::now());
            if !self.read(Some(left)) && self.sockets.is_none() {
                let mut bell = self.desk.bell.lock();
                if !*bell {
                    self.desk.rung.wait_for(&mut bell, left);
                }
                *bell = false;
            }
        }
        self.desk.asleep.store(false, Ordering::SeqCst);
        taken
    }

    /// Takes what has come through the sockets, waiting for `limit` at most. Whether there was anything.
    fn read(&mut self, limit: Option<Duration>) -> bool {
        self.sockets
            .as_mut()
            .is_some_and(|sockets| sockets.read(limit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_ends_the_sleep_and_time_ends_it_without_one() {
        let desk = Desk::default();
        let begin = Instant::now();
        let until = begin + LOOK_TIME * 3;
        assert_eq!(desk.sit(None).wait(until, &mut || None::<()>), None);
        assert!(begin.elapsed() >= LOOK_TIME * 3);
        let arrivals = Mutex::new(None);
        std::thread::scope(|scope| {
            let sleeping = || desk.asleep.load(Ordering::SeqCst);
            scope.spawn(|| {
                let far = Instant::now() + Duration::from_secs(60);
                let got = desk.sit(None).wait(far, &mut || arrivals.lock().take());
                assert_eq!(got, Some(7));
            });
            while !sleeping() {
                yield_now();
            }
            *arrivals.lock() = Some(7);
            desk.ring();
        });
    }

    #[test]
    fn the_server_waits_while_the_engine_is_here() {
        let desk = Desk::default();
        desk.engine_comes();
        assert!(desk.is_engine_here());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| desk.wait_for_engine(|| false));
            desk.engine_goes();
            waiter.join().unwrap();
        });
        assert_eq!(desk.look_time(), Duration::ZERO);
        desk.engine_rests();
        assert_eq!(desk.look_time(), LOOK_TIME);
        desk.engine_comes();
        desk.wait_for_engine(|| true);
    }
}
