//! Who can reach whom, how long it takes, and who is alive. Messages between two processes are late or held
//! back, never out of order within one stream: it stands for TCP.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::sleep;

use crate::rng::Rng;

/// A process or the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Node(pub u8);

/// The store.
pub const STORE: Node = Node(0);
/// Routers begin here.
const ROUTERS: u8 = 1;
/// Workers begin here.
const WORKERS: u8 = 10;

impl Node {
    /// A router.
    #[must_use]
    pub const fn router(index: usize) -> Self {
        Self(ROUTERS + index as u8)
    }

    /// A worker.
    #[must_use]
    pub const fn worker(index: usize) -> Self {
        Self(WORKERS + index as u8)
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => write!(f, "etcd"),
            n if n < WORKERS => write!(f, "r{}", n - ROUTERS),
            n => write!(f, "w{}", n - WORKERS),
        }
    }
}

/// A life of a process: a restart is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Life {
    /// The process.
    pub node: Node,
    /// Which of its lives.
    pub number: u32,
}

/// The network; clones share it.
#[derive(Clone, Debug)]
pub struct Net(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// What can be reached has changed. Wakes in the order in which others wait.
    changed: Notify,
}

#[derive(Debug)]
struct State {
    rng: Rng,
    /// Directed: messages from the first to the second are held back.
    clogged: BTreeSet<(Node, Node)>,
    /// Messages from and to a paused process are held back.
    paused: BTreeSet<Node>,
    /// The present life of each process; absent when it is dead.
    lives: BTreeMap<Node, u32>,
    /// Largest delay of every message, in milliseconds.
    delay_ms_max: u64,
    /// How many expert calls of a hundred are delivered twice.
    twice_percent: u64,
}

impl Net {
    /// A quick network without faults.
    #[must_use]
    pub fn new(rng: Rng) -> Self {
        let state = State {
            rng,
            clogged: BTreeSet::new(),
            paused: BTreeSet::new(),
            lives: BTreeMap::from([(STORE, 1)]),
            delay_ms_max: 3,
            twice_percent: 0,
        };
        Self(Arc::new(Inner {
            state: Mutex::new(state),
            changed: Notify::new(),
        }))
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let result = change(&mut self.0.state.lock());
        self.0.changed.notify_waiters();
        result
    }

    /// A new life of a process.
    #[must_use]
    pub fn start(&self, node: Node, number: u32) -> Life {
        self.change(|state| state.lives.insert(node, number));
        Life { node, number }
    }

    /// The process dies.
    pub fn kill(&self, node: Node) {
        self.change(|state| state.lives.remove(&node));
    }

    /// Whether this life goes on.
    #[must_use]
    pub fn is_alive(&self, life: Life) -> bool {
        self.0.state.lock().lives.get(&life.node) == Some(&life.number)
    }

    /// Whether the process runs in any life.
    #[must_use]
    pub fn is_up(&self, node: Node) -> bool {
        self.0.state.lock().lives.contains_key(&node)
    }

    /// Holds messages from `from` to `to` back, or lets them go.
    pub fn clog(&self, from: Node, to: Node, clogged: bool) {
        self.change(|state| {
            if clogged {
                state.clogged.insert((from, to));
            } else {
                state.clogged.remove(&(from, to));
            }
        });
    }

    /// Holds all messages of a process back, or lets them go.
    pub fn pause(&self, node: Node, paused: bool) {
        self.change(|state| {
            if paused {
                state.paused.insert(node);
            } else {
                state.paused.remove(&node);
            }
        });
    }

    /// Largest delay of a message, and how many expert calls of a hundred come twice.
    pub fn set_weather(&self, delay_ms_max: u64, twice_percent: u64) {
        self.change(|state| {
            (state.delay_ms_max, state.twice_percent) = (delay_ms_max, twice_percent);
        });
    }

    /// Nothing is held back, nobody is paused, messages are quick.
    pub fn heal(&self) {
        self.change(|state| {
            state.clogged.clear();
            state.paused.clear();
            (state.delay_ms_max, state.twice_percent) = (3, 0);
        });
    }

    /// Whether messages pass.
    #[must_use]
    pub fn passes(&self, from: Node, to: Node) -> bool {
        let state = self.0.state.lock();
        !state.clogged.contains(&(from, to))
            && !state.paused.contains(&from)
            && !state.paused.contains(&to)
    }

    /// Whether both reach each other.
    #[must_use]
    pub fn talks(&self, a: Node, b: Node) -> bool {
        self.passes(a, b) && self.passes(b, a)
    }

    /// Whether a paused process must not go on.
    #[must_use]
    pub fn is_paused(&self, node: Node) -> bool {
        self.0.state.lock().paused.contains(&node)
    }

    /// Whether this expert call is delivered twice.
    #[must_use]
    pub fn comes_twice(&self) -> bool {
        let mut state = self.0.state.lock();
        let percent = state.twice_percent;
        percent > 0 && state.rng.chance(percent)
    }

    /// Waits for as long as a message from `from` to `to` takes.
    pub async fn carry(&self, from: Node, to: Node) {
        let delay = {
            let mut state = self.0.state.lock();
            let max = state.delay_ms_max;
            state.rng.range(0, max + 1)
        };
        if delay > 0 {
            sleep(Duration::from_millis(delay)).await;
        }
        self.until(|net| net.passes(from, to)).await;
    }

    /// Waits until something is so.
    pub async fn until(&self, is_so: impl Fn(&Self) -> bool) {
        if is_so(self) {
            return;
        }
        loop {
            let mut changed = pin!(self.0.changed.notified());
            changed.as_mut().enable();
            if is_so(self) {
                return;
            }
            changed.await;
        }
    }

    /// Waits until a connection would break: the other is dead, or has not been reached for `patience`.
    pub async fn broken(&self, me: Node, peer: Life, patience: Duration) {
        loop {
            self.until(|net| !net.is_alive(peer) || !net.talks(me, peer.node))
                .await;
            if !self.is_alive(peer) && self.passes(peer.node, me) {
                return;
            }
            let again = self.until(|net| net.is_alive(peer) && net.talks(me, peer.node));
            if tokio::time::timeout(patience, again).await.is_err() {
                return;
            }
        }
    }
}
