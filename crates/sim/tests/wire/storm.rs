//! One run: hosts come up, the network and the hosts suffer for a while, all is repaired, and what happened is
//! written down. Everything follows from the seed.

use std::collections::BTreeMap;
use std::fmt::{self, Arguments};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::{sleep, timeout};
use tramontane_sim::rng::Rng;
use turmoil::{Builder, Sim};

/// Step of the simulated network.
const TICK: Duration = Duration::from_millis(4);
/// Messages that a socket may have under way. Never reached: a connection whose peer takes nothing any more and
/// whose buffer is full cannot even be closed, in hyper; what ends it is the kernel, which is not simulated.
const SOCKET_MESSAGES_MAX: usize = 1 << 14;
/// Hosts look at what nobody tells them this often.
pub(crate) const LOOK: Duration = Duration::from_millis(5);
/// Until then things go wrong.
pub(crate) const STORM: Duration = Duration::from_secs(6);
/// Longest fault.
const FAULT_MS_MAX: u64 = 2500;
/// Longest way of a message on a slow link.
const SLOW_MS_MAX: u64 = 150;
/// Most faults of a run.
const FAULTS_MAX: u64 = 8;
/// Violations that are kept: what follows the first is mostly its consequence.
const VIOLATIONS_MAX: usize = 8;
/// No task is left this long after a host was told to stop: two sides say goodbye, or one waits for the other in
/// vain and gives up.
pub(crate) const TASKS_END: Duration = Duration::from_secs(4);

/// What happens to a host or between two.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fault {
    /// Nothing passes; what was sent is lost.
    Partition(String, String),
    /// The same, from the first to the second only.
    OneWay(String, String),
    /// Nothing passes; all of it arrives afterwards.
    Hold(String, String),
    /// Every message takes this many milliseconds.
    Slow(String, String, u64),
    /// The host is gone, and comes back with nothing.
    Crash(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Partition(a, b) => write!(f, "partition {a} {b}"),
            Self::OneWay(a, b) => write!(f, "partition from {a} to {b}"),
            Self::Hold(a, b) => write!(f, "hold {a} {b}"),
            Self::Slow(a, b, ms) => write!(f, "{ms} ms {a} {b}"),
            Self::Crash(host) => write!(f, "crash {host}"),
        }
    }
}

impl Fault {
    /// The two hosts whose link it is about.
    fn link(&self) -> Option<[&str; 2]> {
        match self {
            Self::Partition(a, b) | Self::OneWay(a, b) | Self::Hold(a, b) | Self::Slow(a, b, _) => {
                Some([a, b])
            }
            Self::Crash(_) => None,
        }
    }
}

/// When, what, and whether it begins or ends.
type Event = (Duration, Fault, bool);

/// What a run is made of.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) seed: u64,
    pub(crate) servers: Vec<String>,
    pub(crate) callers: Vec<String>,
    /// Longest way of a message, where no fault says otherwise.
    latency: Duration,
    /// In order.
    events: Vec<Event>,
}

impl Plan {
    /// The plan of a seed: some of each kind of host.
    pub(crate) fn new(seed: u64, servers: (u64, u64), callers: (u64, u64)) -> Self {
        let mut rng = Rng::new(seed, 1);
        let mut named = |kind: char, (min, max): (u64, u64)| {
            let count = rng.range(min, max + 1);
            (0..count).map(|i| format!("{kind}{i}")).collect()
        };
        let (servers, callers) = (named('w', servers), named('c', callers));
        let latency = Duration::from_millis(rng.range(2, 60));
        let mut plan = Self {
            seed,
            servers,
            callers,
            latency,
            events: Vec::new(),
        };
        for _ in 0..rng.range(1, FAULTS_MAX + 1) {
            plan.add_fault(&mut rng);
        }
        plan.events.sort_by_key(|(at, ..)| *at);
        plan
    }

    fn add_fault(&mut self, rng: &mut Rng) {
        let server = rng.pick(&self.servers).clone();
        let caller = rng.pick(&self.callers).clone();
        let fault = match rng.range(0, 12) {
            0..3 => Fault::Partition(caller, server),
            3 => Fault::OneWay(caller, server),
            4 => Fault::OneWay(server, caller),
            5..7 => Fault::Hold(caller, server),
            7..9 => Fault::Slow(caller, server, rng.range(60, SLOW_MS_MAX)),
            9..11 => Fault::Crash(server),
            _ => Fault::Crash(caller),
        };
        let begin = rng.range(0, STORM.as_millis() as u64 - 100);
        let end = begin + rng.range(20, FAULT_MS_MAX);
        let ms = |ms| Duration::from_millis(ms);
        self.events.push((ms(begin), fault.clone(), true));
        self.events.push((ms(end).min(STORM), fault, false));
    }

    /// Chance of one host in one of its lives.
    pub(crate) fn chance(&self, host: &str, life: u64) -> Rng {
        let label = host
            .bytes()
            .fold(life, |label, byte| label * 257 + u64::from(byte));
        Rng::new(self.seed, label + 1000)
    }

    /// An empty network with this plan's weather.
    pub(crate) fn network<'a>(&self) -> Sim<'a> {
        Builder::new()
            .rng_seed(self.seed)
            .tick_duration(TICK)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(self.latency)
            .tcp_capacity(SOCKET_MESSAGES_MAX)
            .simulation_duration(Duration::MAX)
            .enable_random_order()
            .build()
    }

    /// Runs until `end`, with the faults of the plan, and looks after every step.
    pub(crate) fn run(
        &self,
        sim: &mut Sim<'_>,
        history: &History,
        end: Duration,
        mut look: impl FnMut(Duration),
    ) {
        let mut next = 0;
        let mut repaired = false;
        while sim.elapsed() < end {
            let now = sim.elapsed();
            history.set_now(now);
            let is_due = |(at, ..): &&Event| *at <= now;
            while let Some((_, fault, begins)) = self.events.get(next).filter(is_due) {
                let what = if *begins { "FAULT " } else { "END of " };
                history.note(format_args!("{what}{fault}"));
                self.apply(sim, fault, *begins, &self.events[..next]);
                history.host_event(fault, *begins);
                next += 1;
            }
            if now >= STORM && !std::mem::replace(&mut repaired, true) {
                self.repair(sim);
            }
            if let Err(error) = sim.step() {
                history.violated(format_args!("a host ended with an error: {error}"));
                return;
            }
            look(sim.elapsed());
        }
    }

    /// `before` is what came before it.
    fn apply(&self, sim: &mut Sim<'_>, fault: &Fault, begins: bool, before: &[Event]) {
        match (fault, begins) {
            (Fault::Partition(a, b), true) => sim.partition(a.as_str(), b.as_str()),
            (Fault::Partition(a, b), false) => sim.repair(a.as_str(), b.as_str()),
            (Fault::OneWay(a, b), true) => sim.partition_oneway(a.as_str(), b.as_str()),
            (Fault::OneWay(a, b), false) => sim.repair_oneway(a.as_str(), b.as_str()),
            (Fault::Hold(a, b), true) => sim.hold(a.as_str(), b.as_str()),
            (Fault::Hold(a, b), false) => sim.release(a.as_str(), b.as_str()),
            (Fault::Slow(a, b, ms), true) => {
                sim.set_link_latency(a.as_str(), b.as_str(), Duration::from_millis(*ms));
            }
            // Back to what is usual, in the mean.
            (Fault::Slow(a, b, _), false) => {
                sim.set_link_latency(a.as_str(), b.as_str(), self.latency / 2);
            }
            (Fault::Crash(host), true) => self.crash(sim, host, before),
            (Fault::Crash(host), false) => {
                if !sim.is_host_running(host.as_str()) {
                    sim.bounce(host.as_str());
                }
            }
        }
    }

    /// Nothing that the host has sent, or says while it dies, arrives: its tasks die in an order by chance (tokio's, by
    /// task numbers of the whole process). Who sends to it afterwards is told that nobody is there.
    fn crash(&self, sim: &mut Sim<'_>, host: &str, before: &[Event]) {
        let peers = || {
            self.callers
                .iter()
                .chain(&self.servers)
                .filter(|peer| *peer != host)
        };
        for peer in peers() {
            sim.partition(host, peer.as_str());
        }
        sim.crash(host);
        for peer in peers() {
            sim.repair(host, peer.as_str());
        }
        // What was wrong with its links is wrong again.
        for (_, fault, begins) in before {
            if fault.link().is_some_and(|link| link.contains(&host)) {
                self.apply(sim, fault, *begins, &[]);
            }
        }
    }

    /// One fault may have ended another one on the same way; now none is left.
    fn repair(&self, sim: &mut Sim<'_>) {
        for caller in &self.callers {
            for server in &self.servers {
                sim.release(caller.as_str(), server.as_str());
                sim.repair(caller.as_str(), server.as_str());
            }
        }
        for host in self.callers.iter().chain(&self.servers) {
            if !sim.is_host_running(host.as_str()) {
                sim.bounce(host.as_str());
            }
        }
    }
}

/// What happened; clones share it.
#[derive(Clone, Debug, Default)]
pub(crate) struct History(Arc<Mutex<Told>>);

#[derive(Debug, Default)]
struct Told {
    now: Duration,
    /// Milliseconds, and what happened.
    trace: Vec<(u128, String)>,
    violations: Vec<String>,
    faults: u64,
    /// How often each host has come up.
    lives: BTreeMap<String, u64>,
    /// Hosts whose present life has ended without a task left.
    ended: Vec<String>,
    /// When lives ended in a crash.
    crashed: BTreeMap<(String, u64), Duration>,
}

impl History {
    fn set_now(&self, now: Duration) {
        self.0.lock().now = now;
    }

    /// Virtual time since the begin of the run, to a step.
    pub(crate) fn now(&self) -> Duration {
        self.0.lock().now
    }

    /// Something happened.
    pub(crate) fn note(&self, what: Arguments<'_>) {
        let mut told = self.0.lock();
        let ms = told.now.as_millis();
        told.trace.push((ms, what.to_string()));
    }

    /// Something happened that must not.
    pub(crate) fn violated(&self, what: Arguments<'_>) {
        self.note(format_args!("VIOLATION {what}"));
        let mut told = self.0.lock();
        if told.violations.len() < VIOLATIONS_MAX {
            told.violations.push(what.to_string());
        }
    }

    fn host_event(&self, fault: &Fault, begins: bool) {
        let mut told = self.0.lock();
        told.faults += u64::from(begins);
        if let (Fault::Crash(host), true) = (fault, begins) {
            let life = told.lives.get(host).copied().unwrap_or_default();
            let now = told.now;
            told.crashed.entry((host.clone(), life)).or_insert(now);
        }
    }

    /// A host comes up; which of its lives this is.
    pub(crate) fn comes_up(&self, host: &str) -> u64 {
        let mut told = self.0.lock();
        let lives = told.lives.entry(host.to_owned()).or_default();
        *lives += 1;
        *lives
    }

    /// For how long this life of a host has been over; `None` while it is not.
    pub(crate) fn dead_for(&self, host: &str, life: u64) -> Option<Duration> {
        let told = self.0.lock();
        let crashed = told.crashed.get(&(host.to_owned(), life));
        crashed.map(|&at| told.now.saturating_sub(at))
    }

    /// Waits until nothing runs on this host any more, and says so.
    pub(crate) async fn ends_without_tasks(&self, host: &str) {
        let metrics = Handle::current().metrics();
        let gone = async {
            while metrics.num_alive_tasks() > 0 {
                sleep(LOOK).await;
            }
        };
        if timeout(TASKS_END, gone).await.is_err() {
            let left = metrics.num_alive_tasks();
            self.violated(format_args!(
                "{host} has {left} tasks {TASKS_END:?} after it was told to stop"
            ));
        }
        self.note(format_args!("{host} has ended"));
        self.0.lock().ended.push(host.to_owned());
    }

    /// Every host must have ended.
    pub(crate) fn check_ends(&self, hosts: &[&[String]]) {
        let ended = self.0.lock().ended.clone();
        for host in hosts
            .iter()
            .copied()
            .flatten()
            .filter(|host| !ended.contains(host))
        {
            self.violated(format_args!("{host} did not end"));
        }
    }

    /// All of it. Hosts were told to stop at `stop`.
    pub(crate) fn take(self, stop: Duration, counts: Counts) -> Outcome {
        let mut told = self.0.lock();
        Outcome {
            trace: std::mem::take(&mut told.trace),
            violations: std::mem::take(&mut told.violations),
            faults: told.faults,
            counts,
            stop,
        }
    }
}

/// Waits until this long after the begin of the run.
pub(crate) async fn sleep_until(at: Duration) {
    let now = turmoil::sim_elapsed().unwrap_or_default();
    sleep(at.saturating_sub(now)).await;
}

/// How a run ended.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    trace: Vec<(u128, String)>,
    pub(crate) violations: Vec<String>,
    pub(crate) faults: u64,
    pub(crate) counts: Counts,
    stop: Duration,
}

impl Outcome {
    /// What happened, line by line.
    pub(crate) fn trace(&self) -> String {
        let lines = self
            .trace
            .iter()
            .map(|(ms, what)| format!("{ms:>6} {what}"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What must be the same in every run of a seed: all but the order of what happens at one instant, as when a
    /// host crashes, and what happens when everybody stops. Tokio drops tasks, and wakes those who wait for a
    /// server to stop, in an order by chance.
    pub(crate) fn repeated(&self) -> Vec<&(u128, String)> {
        let before_stop = |(ms, _): &&(u128, String)| *ms < self.stop.as_millis();
        let mut lines: Vec<_> = self.trace.iter().filter(before_stop).collect();
        lines.sort_unstable();
        lines
    }
}

/// What one kind of run counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Calls or requests.
    pub(crate) asked: u64,
    /// Of those, how many got what they asked for.
    pub(crate) answered: u64,
    /// Of those, how many were refused or failed, by a cause of the network.
    pub(crate) lost: u64,
    /// Sequences that were opened again from the journal.
    pub(crate) replays: u64,
    /// Longest time from asking to the outcome, milliseconds.
    pub(crate) slowest_ms: u64,
    /// Longest time after the repair until the last loss, milliseconds.
    pub(crate) last_loss_ms: u64,
}

impl Counts {
    pub(crate) fn add(&mut self, other: Self) {
        self.asked += other.asked;
        self.answered += other.answered;
        self.lost += other.lost;
        self.replays += other.replays;
        self.slowest_ms = self.slowest_ms.max(other.slowest_ms);
        self.last_loss_ms = self.last_loss_ms.max(other.last_loss_ms);
    }
}
