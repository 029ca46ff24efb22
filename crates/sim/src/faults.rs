//! What goes wrong in a run, and when: decided by the seed before the run begins.

use std::fmt;

use crate::net::{Node, STORE};
use crate::rng::Rng;

/// Longest time of faults in the profile of many faults, in milliseconds.
pub const CHAOS_MS: u64 = 15_000;
/// Time between two episodes of the profile of single faults: long enough for the cluster to rest.
const EPISODE_MS: u64 = 40_000;
/// Episodes of the profile of single faults.
const EPISODES: u64 = 2;
/// Runs of a hundred that have two versions of the weights.
const UPDATES_PERCENT: u64 = 20;

/// One thing that goes wrong, or is put right again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A process dies and loses its state.
    Kill(Node),
    /// A process starts anew, if it is dead.
    Start(Node),
    /// A process hangs.
    Pause(Node),
    /// It goes on.
    Resume(Node),
    /// Messages from the first to the second are held back.
    Clog(Node, Node),
    /// They are let go.
    Unclog(Node, Node),
    /// The store is away.
    StoreDown,
    /// The store is back.
    StoreUp,
    /// The store loses its data.
    Wipe,
    /// The store forgets its history.
    Compact,
    /// A worker is asked to leave.
    Drain(Node),
    /// A worker shall get no slices.
    Cordon(Node),
    /// It may get slices again.
    Uncordon(Node),
    /// Workers that hold each slice.
    Replicas(usize),
    /// New requests shall begin with this version of the weights.
    Use(u8),
    /// Largest delay of messages in milliseconds, and calls of a hundred that come twice.
    Weather(u64, u64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(node) => write!(f, "kill {node}"),
            Self::Start(node) => write!(f, "start {node}"),
            Self::Pause(node) => write!(f, "pause {node}"),
            Self::Resume(node) => write!(f, "resume {node}"),
            Self::Clog(a, b) => write!(f, "clog {a} -> {b}"),
            Self::Unclog(a, b) => write!(f, "unclog {a} -> {b}"),
            Self::StoreDown => write!(f, "store down"),
            Self::StoreUp => write!(f, "store up"),
            Self::Wipe => write!(f, "store wiped"),
            Self::Compact => write!(f, "store compacted"),
            Self::Drain(node) => write!(f, "drain {node}"),
            Self::Cordon(node) => write!(f, "cordon {node}"),
            Self::Uncordon(node) => write!(f, "uncordon {node}"),
            Self::Replicas(count) => write!(f, "{count} replicas"),
            Self::Use(version) => write!(f, "use version {version}"),
            Self::Weather(delay, twice) => write!(f, "delay {delay} ms, {twice} % twice"),
        }
    }
}

/// What a run is like.
#[derive(Clone, Debug)]
pub struct Plan {
    /// One fault at a time, with rest between them: then no request may fail.
    pub is_gentle: bool,
    /// Routers at the start.
    pub num_routers: usize,
    /// Workers at the start.
    pub num_workers: usize,
    /// Workers that may ever be.
    pub workers_max: usize,
    /// Workers of a second version of the weights, under the numbers behind.
    pub others: usize,
    /// Workers that hold each slice.
    pub replicas: usize,
    /// When what goes wrong, ascending, in milliseconds.
    pub faults: Vec<(u64, Fault)>,
    /// Length of the time of faults.
    pub faults_ms: u64,
}

impl Plan {
    /// The plan of a seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let (mut rng, mut versions) = (Rng::new(seed, 1), Rng::new(seed, 7));
        let is_gentle = seed.is_multiple_of(4);
        let others = match (versions.chance(UPDATES_PERCENT), is_gentle) {
            (false, _) => 0,
            (true, true) => 3,
            (true, false) => versions.range(1, 4) as usize,
        };
        let mut plan = if is_gentle {
            Self::gentle(&mut rng, others)
        } else {
            Self::rough(&mut rng, others)
        };
        if others > 0 {
            plan.update(&mut versions);
        }
        plan.sort();
        plan
    }

    /// Over to the second version at some time, and perhaps back.
    fn update(&mut self, rng: &mut Rng) {
        let mut at = rng.range(200, self.faults_ms / 2);
        self.faults.push((at, Fault::Use(1)));
        while rng.chance(60) {
            at += rng.range(100, self.faults_ms / 4);
            self.faults.push((at, Fault::Use(rng.range(0, 2) as u8)));
        }
    }

    /// Many faults at once.
    fn rough(rng: &mut Rng, others: usize) -> Self {
        let num_workers = rng.range(2, 6) as usize;
        let mut plan = Self {
            is_gentle: false,
            num_routers: rng.range(1, 3) as usize,
            num_workers,
            workers_max: num_workers + rng.range(0, 2) as usize,
            others,
            replicas: rng.range(1, 3) as usize,
            faults: Vec::new(),
            faults_ms: CHAOS_MS,
        };
        for _ in 0..rng.range(2, 7) {
            let at = rng.range(0, CHAOS_MS - 2000);
            let until = at + rng.range(100, CHAOS_MS);
            let fault = plan.any(rng);
            plan.add(at, until, &fault, rng);
        }
        if rng.chance(25) {
            plan.swizzle(rng);
        }
        plan
    }

    fn gentle(rng: &mut Rng, others: usize) -> Self {
        let num_workers = rng.range(3, 6) as usize;
        let mut plan = Self {
            is_gentle: true,
            num_routers: rng.range(1, 3) as usize,
            num_workers,
            workers_max: num_workers + 1,
            others,
            replicas: 2,
            faults: Vec::new(),
            faults_ms: EPISODES * EPISODE_MS,
        };
        for episode in 0..EPISODES {
            let at = episode * EPISODE_MS + rng.range(500, 2500);
            let until = at + rng.range(200, 9000);
            let fault = plan.any_gentle(rng);
            plan.add(at, until, &fault, rng);
        }
        plan
    }

    /// Workers that are there at the start.
    pub fn workers(&self) -> impl Iterator<Item = Node> + use<> {
        let others = self.workers_max..self.workers_max + self.others;
        (0..self.num_workers).chain(others).map(Node::worker)
    }

    fn sort(&mut self) {
        let end = self.faults_ms;
        self.faults.retain(|(at, _)| *at < end);
        self.faults.sort_by_key(|(at, _)| *at);
    }

    fn worker(&self, rng: &mut Rng) -> Node {
        let index = rng.range(0, (self.num_workers + self.others) as u64) as usize;
        match index.checked_sub(self.num_workers) {
            None => Node::worker(index),
            Some(other) => Node::worker(self.workers_max + other),
        }
    }

    fn router(&self, rng: &mut Rng) -> Node {
        Node::router(rng.range(0, self.num_routers as u64) as usize)
    }

    fn process(&self, rng: &mut Rng) -> Node {
        if rng.chance(30) {
            return self.router(rng);
        }
        self.worker(rng)
    }

    fn any(&self, rng: &mut Rng) -> Vec<Fault> {
        let (one, other) = (self.process(rng), self.process(rng));
        match rng.range(0, 17) {
            0..3 => vec![Fault::Kill(one)],
            3..5 => vec![Fault::Pause(one)],
            5 => both(one, other),
            6 => vec![Fault::Clog(one, other)],
            7 => both(one, STORE),
            8 => vec![Fault::Clog(STORE, one)],
            9 => vec![Fault::StoreDown],
            10 | 11 => vec![Fault::StoreDown, Fault::Wipe],
            12 => vec![Fault::Compact],
            13 => vec![Fault::Drain(self.worker(rng))],
            14 => vec![Fault::Cordon(self.worker(rng))],
            15 => vec![Fault::Replicas(rng.range(1, 4) as usize)],
            _ if self.workers_max > self.num_workers => {
                vec![Fault::Start(Node::worker(self.num_workers))]
            }
            _ => vec![Fault::Weather(rng.range(20, 900), rng.range(0, 30))],
        }
    }

    fn any_gentle(&self, rng: &mut Rng) -> Vec<Fault> {
        let (one, router) = (self.worker(rng), self.router(rng));
        match rng.range(0, 12) {
            0..3 => vec![Fault::Kill(one)],
            3 => vec![Fault::Pause(one)],
            4 => both(one, self.worker(rng)),
            5 => both(one, STORE),
            6 => both(router, STORE),
            7 => both(router, one),
            8 => vec![Fault::StoreDown],
            9 => vec![Fault::StoreDown, Fault::Wipe],
            10 => vec![Fault::Drain(one)],
            _ => vec![Fault::Start(Node::worker(self.num_workers))],
        }
    }

    /// Adds faults and, later, what puts them right.
    fn add(&mut self, at: u64, until: u64, faults: &[Fault], rng: &mut Rng) {
        for &fault in faults {
            self.faults.push((at, fault));
            let undo = match fault {
                Fault::Kill(node) | Fault::Drain(node) => Fault::Start(node),
                Fault::Pause(node) => Fault::Resume(node),
                Fault::Clog(a, b) => Fault::Unclog(a, b),
                Fault::StoreDown => Fault::StoreUp,
                Fault::Cordon(node) => Fault::Uncordon(node),
                Fault::Replicas(_) => Fault::Replicas(rng.range(1, 3) as usize),
                Fault::Weather(..) => Fault::Weather(3, 0),
                _ => continue,
            };
            self.faults.push((until, undo));
        }
    }

    /// Clogs a part of the processes one after the other, and unclogs them in another order.
    fn swizzle(&mut self, rng: &mut Rng) {
        let mut nodes: Vec<Node> = self.workers().collect();
        nodes.extend((0..self.num_routers).map(Node::router));
        nodes.push(STORE);
        let chosen: Vec<Node> = nodes.iter().copied().filter(|_| rng.chance(50)).collect();
        let mut at = rng.range(0, CHAOS_MS / 3);
        let mut go = |order: &[Node], clogs: bool, rng: &mut Rng| {
            for &node in order {
                at += rng.range(50, 800);
                for &other in nodes.iter().filter(|&&other| other != node) {
                    let pairs = [(node, other), (other, node)];
                    let fault = |(a, b)| {
                        if clogs {
                            Fault::Clog(a, b)
                        } else {
                            Fault::Unclog(a, b)
                        }
                    };
                    self.faults.extend(pairs.map(|pair| (at, fault(pair))));
                }
            }
        };
        go(&rng.shuffled(&chosen), true, rng);
        go(&rng.shuffled(&chosen), false, rng);
    }
}

fn both(a: Node, b: Node) -> Vec<Fault> {
    vec![Fault::Clog(a, b), Fault::Clog(b, a)]
}
