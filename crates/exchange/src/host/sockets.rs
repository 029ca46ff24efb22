//! All Unix sockets of one worker, read by whoever sits at its desk. Decides nothing.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mio::{Events, Poll, Registry, Token, Waker};
use parking_lot::Mutex;

use super::link::Link;

/// Events that are taken at once.
const EVENTS_MAX: usize = 64;
const BELL: Token = Token(0);

/// The sockets; their owner reads them.
pub(crate) struct Sockets {
    poll: Poll,
    events: Events,
    doorbell: Arc<Doorbell>,
}

/// Wakes the reader of the sockets and adds new ones, from any thread.
pub(crate) struct Doorbell {
    waker: Waker,
    registry: Registry,
    next_token: AtomicUsize,
    links: Mutex<HashMap<Token, Arc<Link>>>,
}

impl fmt::Debug for Sockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sockets")
            .field("links", &self.doorbell.links.lock().len())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Doorbell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbell").finish_non_exhaustive()
    }
}

impl Sockets {
    /// No sockets yet.
    ///
    /// # Errors
    /// When the system refuses what it takes to wait for them.
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Poll::new()?;
        let doorbell = Doorbell {
            waker: Waker::new(poll.registry(), BELL)?,
            registry: poll.registry().try_clone()?,
            next_token: AtomicUsize::new(BELL.0 + 1),
            links: Mutex::default(),
        };
        Ok(Self {
            poll,
            events: Events::with_capacity(EVENTS_MAX),
            doorbell: Arc::new(doorbell),
        })
    }

    pub(crate) fn doorbell(&self) -> Arc<Doorbell> {
        Arc::clone(&self.doorbell)
    }

    /// Takes what has come, waiting for `limit` at most. Whether there was anything.
    pub(crate) fn read(&mut self, limit: Option<Duration>) -> bool {
        if let Err(error) = self.poll.poll(&mut self.events, limit) {
            if error.kind() != io::ErrorKind::Interrupted {
                tracing::error!(%error, "waiting for sockets");
            }
            return false;
        }
        let mut any = false;
        for event in &self.events {
            let Some(link) = self.doorbell.link(event.token()) else {
                continue;
            };
            any = true;
            if !link.on_ready() {
                self.doorbell.links.lock().remove(&event.token());
            }
        }
        any
    }
}

impl Doorbell {
    pub(crate) fn ring(&self) {
        if let Err(error) = self.waker.wake() {
            tracing::error!(%error, "waking the reader of the sockets");
        }
    }

    pub(super) fn token(&self) -> Token {
        Token(self.next_token.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Has `link` read from now on.
    pub(super) fn add(&self, token: Token, link: &Arc<Link>) -> io::Result<()> {
        self.links.lock().insert(token, Arc::clone(link));
        let registered = link.register(&self.registry);
        if registered.is_err() {
            self.links.lock().remove(&token);
        }
        registered
    }

    pub(super) fn link(&self, token: Token) -> Option<Arc<Link>> {
        self.links.lock().get(&token).cloned()
    }

    /// Ends all connections.
    pub(crate) fn close_all(&self) {
        let links: Vec<_> = self.links.lock().drain().collect();
        for (_, link) in links {
            link.close("this worker is stopping");
        }
    }
}
