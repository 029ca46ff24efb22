//! One layer under way: what is open, what is answered, what has no home. Decides nothing.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tramontane_types::{Epoch, ExpertSlice, LayerId, WorkerId};

use crate::answers::{Answer, Routing};
use crate::desk::Seat;
use crate::mutation::{Mutation, is_on};
use crate::{Desk, Error, Job, Refusal, Reply, ReplySender};

/// A dispatched layer. Hand it to [`Exchange::combine`](crate::Exchange::combine); dropped instead, its
/// answers go nowhere.
#[derive(Debug)]
#[must_use = "the dispatched rows come back through `combine`"]
pub struct Ticket {
    pub(crate) layer: LayerId,
    pub(crate) num_rows: usize,
    /// Of the placement that it was planned on first.
    pub(crate) epoch: Epoch,
    pub(crate) routing: Routing,
    /// All rows of the step.
    pub(crate) rows: Bytes,
    /// Jobs for our own experts, not computed yet.
    pub(crate) local: Vec<Job>,
    /// Jobs that nobody could be asked for.
    pub(crate) homeless: Vec<Job>,
    pub(crate) open: BTreeMap<u64, OpenCall>,
    /// Calls that somebody else was asked for too; their answers may still come.
    given_up: BTreeMap<u64, OpenCall>,
    pub(crate) answers: Vec<Answer>,
    pub(crate) last_refusal: Option<(WorkerId, Refusal)>,
    /// Calls that were late; every one doubles the time until the next one is.
    pub(crate) num_late: u32,
    /// Those of them that nobody waited for any more; every one doubles the patience with the next.
    pub(crate) num_silent: u32,
    /// Whom they were made of, each once.
    silent: Vec<WorkerId>,
    next_call: u64,
    inbox: Arc<Inbox>,
}

/// A call that was sent and not answered yet.
#[derive(Clone, Debug)]
pub(crate) struct OpenCall {
    pub(crate) worker: WorkerId,
    /// In the numbering of the step.
    pub(crate) jobs: Vec<Job>,
    /// Bytes that a reply must have.
    pub(crate) outputs_len: usize,
    /// When to look for somebody else.
    pub(crate) check_at: Instant,
    /// From then on nobody believes that an answer comes.
    pub(crate) silent_at: Instant,
    pub(crate) sent_at: Instant,
    /// Time until its answer arrived, which may be long before the engine looks; 0 as long as it has not.
    pub(crate) trip: Duration,
}

impl OpenCall {
    /// Whether nobody believes any more that an answer comes.
    pub(crate) fn is_silent(&self, now: Instant) -> bool {
        now >= self.silent_at
    }
}

/// What came from a worker.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// An answer that is needed.
    Answer(OpenCall, Result<Reply, Refusal>),
    /// The answer to a call that was given up, and that others have computed or do in parts.
    Needless(OpenCall),
}

impl Ticket {
    pub(crate) fn new(
        layer: LayerId,
        num_rows: usize,
        rows: Bytes,
        routing: Routing,
        (desk, clock): (Arc<Desk>, fn() -> Instant),
    ) -> Self {
        Self {
            layer,
            num_rows,
            epoch: Epoch(0),
            routing,
            rows,
            local: Vec::new(),
            homeless: Vec::new(),
            open: BTreeMap::new(),
            given_up: BTreeMap::new(),
            answers: Vec::new(),
            last_refusal: None,
            num_late: 0,
            num_silent: 0,
            silent: Vec::new(),
            next_call: 0,
            inbox: Arc::new(Inbox {
                desk,
                clock,
                answers: Mutex::default(),
            }),
        }
    }

    /// Whether every job was answered or computed.
    pub(crate) fn is_complete(&self) -> bool {
        self.local.is_empty() && self.homeless.is_empty() && self.open.is_empty()
    }

    /// Notes that a call of `worker` was given up because nobody believes in its answer any more.
    pub(crate) fn note_silent(&mut self, worker: &WorkerId) {
        self.num_silent += 1;
        if !self.silent.contains(worker) {
            self.silent.push(worker.clone());
        }
    }

    /// Whether the layer lacks experts that nobody answers for: a call is silent and there is nobody else to ask, or
    /// one after the other is silent, and then it is we who are cut off.
    pub(crate) fn is_stuck(&self, now: Instant) -> bool {
        self.silent.len() > 1 || self.open.values().any(|call| call.is_silent(now))
    }

    /// Notes a call as open and makes the sender for its answer.
    pub(crate) fn open_call(&mut self, call: OpenCall) -> ReplySender {
        let id = self.next_call;
        self.next_call += 1;
        self.open.insert(id, call);
        let inbox = Arc::clone(&self.inbox);
        ReplySender::new(move |answer| inbox.put(id, answer))
    }

    /// The next arrival at `seat`, or `None` when `until` has passed without one.
    pub(crate) fn next_arrival(&mut self, until: Instant, seat: &mut Seat<'_>) -> Option<Arrival> {
        let inbox = Arc::clone(&self.inbox);
        self.sort(&mut || seat.wait(until, &mut || inbox.take()))
    }

    /// The next arrival that is there already.
    pub(crate) fn next_arrived(&mut self) -> Option<Arrival> {
        let inbox = Arc::clone(&self.inbox);
        self.sort(&mut || inbox.take())
    }

    /// The first thing of use among what `take` gives. A good reply to a call that was given up answers in
    /// place of the call that replaced it, if that one is still open; a refusal of such a call is ignored.
    fn sort(&mut self, take: &mut dyn FnMut() -> Option<Arrived>) -> Option<Arrival> {
        loop {
            let (id, at, answer) = take()?;
            if let Some(mut call) = self.open.remove(&id) {
                call.trip = at.saturating_duration_since(call.sent_at);
                return Some(Arrival::Answer(call, answer));
            }
            let Some(mut call) = self.given_up.remove(&id) else {
                continue;
            };
            call.trip = at.saturating_duration_since(call.sent_at);
            if !matches!(&answer, Ok(reply) if reply.outputs.len() == call.outputs_len) {
                continue;
            }
            if !self.drop_replacement(&call.jobs) && !is_on(Mutation::LateAnswersCount) {
                return Some(Arrival::Needless(call));
            }
            return Some(Arrival::Answer(call, answer));
        }
    }

    /// Gives up the open call for exactly `jobs`. Every job is in one open call at most.
    fn drop_replacement(&mut self, jobs: &[Job]) -> bool {
        let same = self.open.iter().find(|(_, open)| open.jobs == jobs);
        let Some((id, call)) = same
            .map(|(&id, _)| id)
            .and_then(|id| self.open.remove_entry(&id))
        else {
            return false;
        };
        self.given_up.insert(id, call);
        true
    }

    /// Takes the calls whose time to look for somebody else has come, if `elsewhere` knows somebody for
    /// all their jobs; the others wait on for `pause`.
    pub(crate) fn take_overdue(
        &mut self,
        now: Instant,
        pause: Duration,
        elsewhere: impl Fn(&OpenCall) -> bool,
    ) -> Vec<OpenCall> {
        let mut overdue = Vec::new();
        for (&id, call) in &mut self.open {
            if call.check_at > now {
                continue;
            }
            call.check_at = now + pause;
            if elsewhere(call) {
                overdue.push(id);
            }
        }
        let mut taken = Vec::with_capacity(overdue.len());
        for id in overdue {
            if let Some(call) = self.open.remove(&id) {
                self.given_up.insert(id, call.clone());
                taken.push(call);
            }
        }
        taken
    }

    /// The calls that were given up and are not answered yet; their answers may still come.
    pub(crate) fn leave(self) -> Option<Left> {
        let (inbox, calls) = (self.inbox, self.given_up);
        (!calls.is_empty()).then_some(Left { inbox, calls })
    }

    /// Earliest time at which an open call is to be looked at.
    pub(crate) fn next_check(&self) -> Option<Instant> {
        self.open.values().map(|call| call.check_at).min()
    }

    /// The error of a layer that ran out of time after `waited`.
    pub(crate) fn deadline(&self, waited: Duration) -> Error {
        let layer = self.layer;
        let open = self.open.values().flat_map(|call| &call.jobs);
        let slice = |job: &Job| ExpertSlice {
            layer,
            expert: job.expert,
            range: job.range,
        };
        let mut slices: Vec<_> = self.homeless.iter().chain(open).map(slice).collect();
        let refused = self.last_refusal.iter().map(|(worker, _)| worker);
        let mut workers: Vec<_> = self
            .open
            .values()
            .map(|call| &call.worker)
            .chain(refused)
            .cloned()
            .collect();
        slices.sort_unstable();
        slices.dedup();
        workers.sort_unstable();
        workers.dedup();
        let last = self
            .last_refusal
            .as_ref()
            .map(|(worker, why)| format!("{worker}: {why}"));
        Error::Deadline {
            layer,
            waited,
            slices,
            workers,
            last,
        }
    }
}

/// What a layer that is complete still waits for: nothing that is needed, but it tells who lives.
#[derive(Debug)]
pub(crate) struct Left {
    inbox: Arc<Inbox>,
    calls: BTreeMap<u64, OpenCall>,
}

impl Left {
    /// The calls that were answered well meanwhile; whatever else came is forgotten.
    pub(crate) fn answered(&mut self) -> impl Iterator<Item = OpenCall> + '_ {
        std::iter::from_fn(|| {
            while let Some((id, at, answer)) = self.inbox.take() {
                let call = self.calls.remove(&id).filter(|_| answer.is_ok());
                if let Some(mut call) = call {
                    call.trip = at.saturating_duration_since(call.sent_at);
                    return Some(call);
                }
            }
            None
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }
}

/// Answers on their way to the waiting engine: at most one per call of the ticket.
#[derive(Debug)]
struct Inbox {
    /// Where the engine waits.
    desk: Arc<Desk>,
    clock: fn() -> Instant,
    answers: Mutex<VecDeque<Arrived>>,
}

/// Which call was answered, when, and how.
type Arrived = (u64, Instant, Result<Reply, Refusal>);

impl Inbox {
    fn put(&self, call: u64, answer: Result<Reply, Refusal>) {
        self.answers
            .lock()
            .push_back((call, (self.clock)(), answer));
        self.desk.ring();
    }

    fn take(&self) -> Option<Arrived> {
        self.answers.lock().pop_front()
    }
}
