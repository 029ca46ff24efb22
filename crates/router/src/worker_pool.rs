//! Connections to the attention workers and who of them takes the next sequence. Never gives a sequence
//! to a worker that is joining, cordoned, draining or leaving, or of other weights than it began with.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{Members, Version, WorkerRecord};
use tramontane_types::{TokenId, WorkerId};

use crate::admission::Counted;
use crate::cluster::{ClusterView, attention_workers};
use crate::config::PolicyKind;
use crate::events::EventLog;
use crate::policy::{BlockHasher, Candidate, Policy, PromptBlocks, policy};
use crate::pulse::Pulse;
use crate::worker_link::{Connect, WorkerLink};

/// How often a sequence on a silent worker looks whether another one lives.
const LOOK_AROUND: Duration = Duration::from_millis(200);

/// One attention worker.
#[derive(Debug)]
pub(crate) struct PoolWorker {
    pub(crate) id: WorkerId,
    pub(crate) link: Arc<dyn WorkerLink>,
    address: String,
    incarnation: u64,
    in_flight: Arc<AtomicUsize>,
    pub(crate) pulse: Pulse,
}

impl PoolWorker {
    /// Counts one more sequence on this worker for as long as the value lives.
    pub(crate) fn occupy(&self) -> Counted {
        Counted::new(&self.in_flight)
    }
}

/// All attention workers and the policy over them.
#[derive(Debug)]
pub(crate) struct WorkerPool {
    cluster: ClusterView,
    hasher: BlockHasher,
    events: Arc<EventLog>,
    inner: Mutex<Inner>,
}

/// Where the pulses of workers are felt.
#[derive(Clone, Debug, Default)]
pub(crate) struct PulseTasks {
    pub(crate) tasks: TaskTracker,
    pub(crate) stop: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    connect: Arc<dyn Connect>,
    policy: Box<dyn Policy>,
    workers: HashMap<WorkerId, Arc<PoolWorker>>,
    /// The members that `workers` was made from.
    known: Arc<Members>,
    pulses: PulseTasks,
}

impl WorkerPool {
    pub(crate) fn new(
        cluster: ClusterView,
        kind: PolicyKind,
        events: Arc<EventLog>,
        (connect, pulses): (Arc<dyn Connect>, PulseTasks),
    ) -> Self {
        let inner = Inner {
            connect,
            pulses,
            policy: policy(kind),
            workers: HashMap::new(),
            known: Arc::default(),
        };
        Self {
            cluster,
            hasher: BlockHasher::default(),
            events,
            inner: Mutex::new(inner),
        }
    }

    pub(crate) const fn cluster(&self) -> &ClusterView {
        &self.cluster
    }

    /// A worker cannot go on with a sequence.
    pub(crate) fn sequence_moved(&self, from: &WorkerId) {
        self.events.sequence_moved(from);
    }

    pub(crate) fn blocks(&self, version: &Version, prompt: &[TokenId]) -> PromptBlocks {
        self.hasher.blocks(version, prompt)
    }

    /// The policy's choice among the ready workers of `version` that are not excluded; of those that show
    /// signs of life, if any does.
    pub(crate) fn pick(
        &self,
        version: &Version,
        prompt: &PromptBlocks,
        excluded: &[WorkerId],
    ) -> Option<Arc<PoolWorker>> {
        let (members, seen) = (self.cluster.members(), self.cluster.intent());
        let mut inner = self.inner.lock();
        inner.follow(&members);
        let mut found = Vec::new();
        for (id, record) in attention_workers(&members, version, &seen.intent) {
            if let Some(worker) = inner.workers.get(id).filter(|_| !excluded.contains(id)) {
                found.push((Arc::clone(worker), record));
            }
        }
        if found.iter().any(|(worker, _)| worker.pulse.is_alive()) {
            found.retain(|(worker, _)| worker.pulse.is_alive());
        }
        let candidate = |(worker, record): &(Arc<PoolWorker>, &Arc<WorkerRecord>)| Candidate {
            id: worker.id.clone(),
            load: load(worker, record),
        };
        let candidates: Vec<Candidate> = found.iter().map(candidate).collect();
        let chosen = inner.policy.pick(prompt, &candidates)?;
        found.into_iter().nth(chosen).map(|(worker, _)| worker)
    }

    /// Waits until `worker` shows no sign of life while another one of `version` does that could take over.
    pub(crate) async fn deserted(&self, worker: &PoolWorker, version: &Version) {
        loop {
            worker.pulse.stops().await;
            if self.has_alive(version, &worker.id) {
                return;
            }
            // Nobody else is there: perhaps it is this router that is cut off.
            let _ = timeout(LOOK_AROUND, worker.pulse.returns()).await;
        }
    }

    /// Whether a ready worker of `version` other than `but` shows signs of life.
    fn has_alive(&self, version: &Version, but: &WorkerId) -> bool {
        let (members, seen) = (self.cluster.members(), self.cluster.intent());
        let mut inner = self.inner.lock();
        inner.follow(&members);
        attention_workers(&members, version, &seen.intent).any(|(id, _)| {
            let worker = inner.workers.get(id).filter(|_| id != but);
            worker.is_some_and(|worker| worker.pulse.is_alive())
        })
    }
}

/// What this router has running there, or what the worker last said when other routers use it too.
fn load(worker: &PoolWorker, record: &WorkerRecord) -> u32 {
    let own = u32::try_from(worker.in_flight.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
    own.max(record.load.running.saturating_add(record.load.waiting))
}

impl Inner {
    /// Connects to workers that came and drops those that left or were replaced.
    fn follow(&mut self, members: &Arc<Members>) {
        if Arc::ptr_eq(&self.known, members) {
            return;
        }
        self.known = Arc::clone(members);
        let policy = &mut self.policy;
        self.workers.retain(|id, worker| {
            let same = members.workers.get(id).is_some_and(|record| {
                // One that gave attention up has no cached prefix any more.
                record.address == worker.address
                    && record.incarnation == worker.incarnation
                    && record.roles.attention
            });
            if !same {
                policy.forget(id);
            }
            same
        });
        for (id, record) in &members.workers {
            if !record.roles.attention || self.workers.contains_key(id) {
                continue;
            }
            match self.connect.connect(&record.address) {
                Ok(link) => {
                    let PulseTasks { tasks, stop } = &self.pulses;
                    let worker = PoolWorker {
                        id: id.clone(),
                        pulse: Pulse::start(id.clone(), Arc::clone(&link), tasks, stop),
                        link,
                        address: record.address.clone(),
                        incarnation: record.incarnation,
                        in_flight: Arc::default(),
                    };
                    self.workers.insert(id.clone(), Arc::new(worker));
                }
                Err(error) => {
                    tracing::warn!(worker = %id, address = record.address, %error, "address not usable");
                }
            }
        }
    }
}
