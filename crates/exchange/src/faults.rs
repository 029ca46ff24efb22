//! What goes wrong between workers on purpose: calls that vanish, answers that are late. Nothing does
//! unless a drill says so, and all of it ends with the drill.
//!
//! What vanishes is not refused: nobody hears of it, as behind a cable that was pulled. Its answer is
//! kept until the drill ends and is "lost" then, so that both sides get back what the call held.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tramontane_types::WorkerId;

use crate::stats::add;
use crate::{ExpertCall, Refusal, Reply, ReplySender, Transport, TransportStats};

/// Calls whose answers are kept back; with one more, the oldest is lost at once.
pub const FAULTS_KEPT_MAX: usize = 1024;

/// From whom a worker is cut off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// From everybody.
    All,
    /// From these.
    From(BTreeSet<WorkerId>),
}

impl Cut {
    fn holds(&self, peer: &WorkerId) -> bool {
        match self {
            Self::All => true,
            Self::From(peers) => peers.contains(peer),
        }
    }
}

/// The faults of one worker.
#[derive(Debug)]
pub struct Faults {
    /// Whether there is any: asked for each call.
    any: AtomicBool,
    state: Mutex<State>,
    frames_dropped: AtomicU64,
    replies_delayed: AtomicU64,
    /// Grows whenever the faults change.
    changes: watch::Sender<u64>,
    runtime: Handle,
    tasks: TaskTracker,
}

#[derive(Debug, Default)]
struct State {
    cut: Option<Cut>,
    delay: Duration,
    /// Answers that nobody hears until the end.
    kept: VecDeque<ReplySender>,
}

impl Faults {
    /// No fault yet. Late answers are sent by tasks on `runtime` that `tasks` counts.
    #[must_use]
    pub fn new(runtime: Handle, tasks: TaskTracker) -> Self {
        Self {
            any: AtomicBool::new(false),
            state: Mutex::default(),
            frames_dropped: AtomicU64::new(0),
            replies_delayed: AtomicU64::new(0),
            changes: watch::Sender::new(0),
            runtime,
            tasks,
        }
    }

    /// From now on nothing goes to these peers, and nothing comes from them.
    pub fn cut(&self, cut: Cut) {
        self.change(|state| state.cut = Some(cut));
    }

    /// From now on answers to other workers take this much longer.
    pub fn slow(&self, delay: Duration) {
        self.change(|state| state.delay = delay);
    }

    /// Ends all faults; what had vanished is lost now.
    pub fn end(&self) {
        let mut kept = VecDeque::new();
        self.change(|state| kept = std::mem::take(state).kept);
        // Without the lock: a lost answer may lead to the next call.
        drop(kept);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.lock();
        change(&mut state);
        let any = state.cut.is_some() || !state.delay.is_zero();
        self.any.store(any, Ordering::Release);
        drop(state);
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// How much longer answers take.
    #[must_use]
    pub fn delay(&self) -> Duration {
        if !self.any.load(Ordering::Acquire) {
            return Duration::ZERO;
        }
        self.state.lock().delay
    }

    /// Calls and answers that vanished.
    #[must_use]
    pub fn frames_dropped(&self) -> u64 {
        self.frames_dropped.load(Ordering::Relaxed)
    }

    /// Answers that were late.
    #[must_use]
    pub fn replies_delayed(&self) -> u64 {
        self.replies_delayed.load(Ordering::Relaxed)
    }

    fn cuts(&self, peer: &WorkerId) -> bool {
        let any = self.any.load(Ordering::Acquire);
        any && self
            .state
            .lock()
            .cut
            .as_ref()
            .is_some_and(|cut| cut.holds(peer))
    }

    /// Nobody hears the answer before the end.
    fn keep(&self, reply: ReplySender) {
        add(&self.frames_dropped, 1);
        let mut state = self.state.lock();
        // The cut may have ended just now: then the answer is lost at once.
        let lost = if state.cut.is_none() {
            Some(reply)
        } else {
            state.kept.push_back(reply);
            let is_full = state.kept.len() > FAULTS_KEPT_MAX;
            is_full.then(|| state.kept.pop_front()).flatten()
        };
        // Without the lock: a lost answer may lead to the next call.
        drop(state);
        drop(lost);
    }

    fn answer_later(&self, delay: Duration, reply: ReplySender, answer: Result<Reply, Refusal>) {
        add(&self.replies_delayed, 1);
        let late = async move {
            tokio::time::sleep(delay).await;
            reply.send(answer);
        };
        self.tasks.spawn_on(late, &self.runtime);
    }
}

/// Stands between a worker's experts and one of their callers.
#[derive(Clone, Debug)]
pub(crate) struct Gate {
    faults: Arc<Faults>,
    caller: WorkerId,
}

impl Gate {
    /// A gate for the calls of `caller`, where there may be faults at all.
    pub(crate) fn new(faults: Option<&Arc<Faults>>, caller: &str) -> Option<Self> {
        let (faults, caller) = (Arc::clone(faults?), WorkerId::new(caller));
        Some(Self { faults, caller })
    }

    /// [`Gate::pass`], where there is a gate.
    pub(crate) fn through(gate: Option<&Self>, reply: ReplySender) -> Option<ReplySender> {
        match gate {
            Some(gate) => gate.pass(reply),
            None => Some(reply),
        }
    }

    /// What the call is to be answered through; `None` when it has vanished.
    fn pass(&self, reply: ReplySender) -> Option<ReplySender> {
        if self.faults.cuts(&self.caller) {
            self.faults.keep(reply);
            return None;
        }
        let Self { faults, caller } = self.clone();
        Some(ReplySender::new(move |answer| {
            let delay = faults.delay();
            if faults.cuts(&caller) {
                faults.keep(reply);
            } else if delay.is_zero() {
                reply.send(answer);
            } else {
                faults.answer_later(delay, reply, answer);
            }
        }))
    }

    /// Waits while the caller is cut off: its hello has vanished, and it greets again or gives up. It is
    /// not waited for longer than `limit`.
    pub(crate) async fn hear(&self, limit: Duration) -> Result<(), tokio::time::error::Elapsed> {
        let mut changes = self.faults.changes.subscribe();
        let heard = changes.wait_for(|_| !self.faults.cuts(&self.caller));
        // The sender lives in `faults`: the wait ends well or not at all.
        timeout(limit, heard).await.map(|_heard| ())
    }
}

/// A transport that the faults of its worker can cut.
#[derive(Debug)]
pub struct FaultyTransport {
    inner: Arc<dyn Transport>,
    faults: Arc<Faults>,
}

impl FaultyTransport {
    /// Carries over `inner` what `faults` let through.
    #[must_use]
    pub const fn new(inner: Arc<dyn Transport>, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl Transport for FaultyTransport {
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
        if self.faults.cuts(to) {
            return self.faults.keep(reply);
        }
        let (faults, peer) = (Arc::clone(&self.faults), to.clone());
        let heard = ReplySender::new(move |answer| {
            if faults.cuts(&peer) {
                faults.keep(reply);
            } else {
                reply.send(answer);
            }
        });
        self.inner.send(to, call, heard);
    }

    fn stats(&self) -> TransportStats {
        self.inner.stats()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};

    use bytes::Bytes;
    use tramontane_types::{Epoch, LayerId};

    use super::*;

    type Answers = Receiver<Result<Reply, Refusal>>;

    fn reply() -> (ReplySender, Answers) {
        let (sender, answers) = sync_channel(4);
        // A test may end before it has heard all.
        let send = ReplySender::new(move |answer| drop(sender.send(answer)));
        (send, answers)
    }

    fn good() -> Result<Reply, Refusal> {
        Ok(Reply {
            outputs: Bytes::new(),
            service_us: 0,
        })
    }

    fn faults() -> Arc<Faults> {
        Arc::new(Faults::new(Handle::current(), TaskTracker::new()))
    }

    fn gate(faults: &Arc<Faults>, caller: &str) -> Gate {
        Gate::new(Some(faults), caller).unwrap()
    }

    /// Answers everything at once.
    #[derive(Debug)]
    struct Prompt;

    impl Transport for Prompt {
        fn send(&self, _to: &WorkerId, _call: ExpertCall, reply: ReplySender) {
            reply.send(good());
        }

        fn stats(&self) -> TransportStats {
            TransportStats::default()
        }
    }

    #[tokio::test]
    async fn behind_a_cut_nothing_is_heard_until_it_ends_and_others_hear_all() {
        let faults = faults();
        let from_a = gate(&faults, "a");
        let (under_way, first) = reply();
        let under_way = from_a.pass(under_way).unwrap();
        faults.cut(Cut::From([WorkerId::new("a")].into()));
        under_way.send(good());
        let (called, second) = reply();
        assert!(from_a.pass(called).is_none());
        let transport = FaultyTransport::new(Arc::new(Prompt), Arc::clone(&faults));
        let call = || ExpertCall {
            epoch: Epoch(1),
            layer: LayerId(0),
            num_rows: 0,
            rows: Bytes::new(),
            jobs: Vec::new(),
        };
        let (sent, third) = reply();
        transport.send(&WorkerId::new("a"), call(), sent);
        let (other, fourth) = reply();
        transport.send(&WorkerId::new("b"), call(), other);
        assert_eq!(fourth.recv().unwrap(), good());
        for unheard in [&first, &second, &third] {
            assert_eq!(unheard.try_recv(), Err(TryRecvError::Empty));
        }
        assert_eq!(faults.frames_dropped(), 3);
        faults.end();
        for lost in [first, second, third] {
            assert!(matches!(lost.recv().unwrap(), Err(Refusal::Lost(_))));
        }
        let (after, heard) = reply();
        from_a.pass(after).unwrap().send(good());
        assert_eq!(heard.recv().unwrap(), good());
        assert_eq!(faults.frames_dropped(), 3);
    }

    #[tokio::test]
    async fn what_is_kept_back_is_bounded_and_the_oldest_is_lost_first() {
        let faults = faults();
        faults.cut(Cut::All);
        let from_a = gate(&faults, "a");
        let mut answers = Vec::new();
        for _ in 0..=FAULTS_KEPT_MAX {
            let (called, answer) = reply();
            assert!(from_a.pass(called).is_none());
            answers.push(answer);
        }
        assert!(matches!(answers[0].try_recv(), Ok(Err(Refusal::Lost(_)))));
        assert_eq!(answers[1].try_recv(), Err(TryRecvError::Empty));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_answer_is_late_by_the_delay_and_no_other() {
        let faults = faults();
        let delay = Duration::from_millis(50);
        faults.slow(delay);
        let (called, answer) = reply();
        let begin = tokio::time::Instant::now();
        gate(&faults, "a").pass(called).unwrap().send(good());
        assert_eq!(answer.try_recv(), Err(TryRecvError::Empty));
        faults.tasks.close();
        faults.tasks.wait().await;
        assert_eq!(answer.recv().unwrap(), good());
        assert_eq!((begin.elapsed(), faults.replies_delayed()), (delay, 1));
        faults.end();
        let (called, answer) = reply();
        gate(&faults, "a").pass(called).unwrap().send(good());
        assert_eq!(answer.try_recv().unwrap(), good());
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_from_behind_a_cut_is_heard_when_it_ends() {
        let faults = faults();
        faults.cut(Cut::All);
        let from_a = gate(&faults, "a");
        let limit = Duration::from_secs(2);
        assert!(from_a.hear(limit).await.is_err());
        let ending = async {
            tokio::time::sleep(limit / 2).await;
            faults.end();
        };
        let (heard, ()) = tokio::join!(from_a.hear(limit), ending);
        assert!(heard.is_ok());
    }
}
