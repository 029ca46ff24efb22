//! Connections to the attention workers and who of them takes the next sequence. Never gives a sequence
//! to a worker that is joining, cordoned, draining or leaving, or of other weights than it began with.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tramontane_coordination::{Members, Version, WorkerRecord};
use tramontane_types::{TokenId, WorkerId};

use crate::admission::Counted;
use crate::cluster::{ClusterView, attention_workers};
use crate::config::PolicyKind;
use crate::events::EventLog;
use crate::policy::{BlockHasher, Candidate, Policy, PromptBlocks, policy};
use crate::roster::{Contact, Roster};

/// How often a sequence on a silent worker looks whether another one lives.
const LOOK_AROUND: Duration = Duration::from_millis(200);

/// One attention worker.
#[derive(Debug)]
pub(crate) struct PoolWorker {
    pub(crate) contact: Arc<Contact>,
    in_flight: Arc<AtomicUsize>,
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
    roster: Roster,
    hasher: BlockHasher,
    events: Arc<EventLog>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    policy: Box<dyn Policy>,
    workers: HashMap<WorkerId, Arc<PoolWorker>>,
    /// The members that `workers` was made from.
    known: Arc<Members>,
}

impl WorkerPool {
    pub(crate) fn new(
        cluster: ClusterView,
        kind: PolicyKind,
        events: Arc<EventLog>,
        roster: Roster,
    ) -> Self {
        let inner = Inner {
            policy: policy(kind),
            workers: HashMap::new(),
            known: Arc::default(),
        };
        Self {
            cluster,
            roster,
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

    pub(crate) fn blocks(&self, version: &Version, prompt: &[TokenId], salt: u64) -> PromptBlocks {
        self.hasher.blocks(version, prompt, salt)
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
        inner.follow(&members, &self.roster);
        let mut found = Vec::new();
        for (id, record) in attention_workers(&members, version, &seen.intent) {
            if let Some(worker) = inner.workers.get(id).filter(|_| !excluded.contains(id)) {
                found.push((Arc::clone(worker), record));
            }
        }
        if found
            .iter()
            .any(|(worker, _)| worker.contact.pulse.is_alive())
        {
            found.retain(|(worker, _)| worker.contact.pulse.is_alive());
        }
        let candidate = |(worker, record): &(Arc<PoolWorker>, &Arc<WorkerRecord>)| Candidate {
            id: worker.contact.id.clone(),
            load: load(worker, record),
        };
        let candidates: Vec<Candidate> = found.iter().map(candidate).collect();
        let chosen = inner.policy.pick(prompt, &candidates)?;
        found.into_iter().nth(chosen).map(|(worker, _)| worker)
    }

    /// Waits until `worker` shows no sign of life while another one of `version` does that could take over.
    pub(crate) async fn deserted(&self, worker: &PoolWorker, version: &Version) {
        loop {
            worker.contact.pulse.stops().await;
            if self.has_alive(version, &worker.contact.id) {
                return;
            }
            // Nobody else is there: perhaps it is this router that is cut off.
            let _ = timeout(LOOK_AROUND, worker.contact.pulse.returns()).await;
        }
    }

    /// Whether a ready worker of `version` other than `but` shows signs of life.
    fn has_alive(&self, version: &Version, but: &WorkerId) -> bool {
        let (members, seen) = (self.cluster.members(), self.cluster.intent());
        let mut inner = self.inner.lock();
        inner.follow(&members, &self.roster);
        attention_workers(&members, version, &seen.intent).any(|(id, _)| {
            let worker = inner.workers.get(id).filter(|_| id != but);
            worker.is_some_and(|worker| worker.contact.pulse.is_alive())
        })
    }
}

/// What this router has running there, or what the worker last said when other routers use it too.
fn load(worker: &PoolWorker, record: &WorkerRecord) -> u32 {
    let own = u32::try_from(worker.in_flight.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
    own.max(record.load.running.saturating_add(record.load.waiting))
}

impl Inner {
    /// Takes in workers that came and drops those that left or were replaced.
    fn follow(&mut self, members: &Arc<Members>, roster: &Roster) {
        if Arc::ptr_eq(&self.known, members) {
            return;
        }
        self.known = Arc::clone(members);
        let policy = &mut self.policy;
        self.workers.retain(|id, worker| {
            // One that gave attention up has no cached prefix any more, and no contact either.
            let contact = roster.contact(id);
            let same = contact.is_some_and(|contact| Arc::ptr_eq(&contact, &worker.contact));
            if !same {
                policy.forget(id);
            }
            same
        });
        for id in members.workers.keys() {
            let contact = roster
                .contact(id)
                .filter(|_| !self.workers.contains_key(id));
            let Some(contact) = contact else { continue };
            let worker = PoolWorker {
                contact,
                in_flight: Arc::default(),
            };
            self.workers.insert(id.clone(), Arc::new(worker));
        }
    }
}
