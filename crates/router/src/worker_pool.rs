//! Connections to the attention workers and who of them takes the next sequence. Never gives a sequence
//! to a worker that is joining, draining or leaving.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tramontane_coordination::{Members, WorkerRecord};
use tramontane_types::{TokenId, WorkerId};

use crate::admission::Counted;
use crate::cluster::{ClusterView, attention_workers};
use crate::config::PolicyKind;
use crate::policy::{BlockHasher, Candidate, Policy, PromptBlocks, policy};
use crate::worker_link::{Connect, WorkerLink};

/// One attention worker.
#[derive(Debug)]
pub(crate) struct PoolWorker {
    pub(crate) id: WorkerId,
    pub(crate) link: Arc<dyn WorkerLink>,
    address: String,
    incarnation: u64,
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
    hasher: BlockHasher,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    connect: Arc<dyn Connect>,
    policy: Box<dyn Policy>,
    workers: HashMap<WorkerId, Arc<PoolWorker>>,
    /// The members that `workers` was made from.
    known: Arc<Members>,
}

impl WorkerPool {
    pub(crate) fn new(cluster: ClusterView, kind: PolicyKind, connect: Arc<dyn Connect>) -> Self {
        let inner = Inner {
            connect,
            policy: policy(kind),
            workers: HashMap::new(),
            known: Arc::default(),
        };
        Self {
            cluster,
            hasher: BlockHasher::default(),
            inner: Mutex::new(inner),
        }
    }

    pub(crate) const fn cluster(&self) -> &ClusterView {
        &self.cluster
    }

    pub(crate) fn blocks(&self, prompt: &[TokenId]) -> PromptBlocks {
        self.hasher.blocks(prompt)
    }

    /// The policy's choice among the ready workers that are not excluded.
    pub(crate) fn pick(
        &self,
        prompt: &PromptBlocks,
        excluded: &[WorkerId],
    ) -> Option<Arc<PoolWorker>> {
        let (members, placements) = (self.cluster.members(), self.cluster.placements());
        let mut inner = self.inner.lock();
        inner.follow(&members);
        let mut workers = Vec::new();
        let mut candidates = Vec::new();
        for (id, record) in attention_workers(&members, &placements) {
            if excluded.contains(id) {
                continue;
            }
            let Some(worker) = inner.workers.get(id) else {
                continue;
            };
            candidates.push(Candidate {
                id: id.clone(),
                load: load(worker, record),
            });
            workers.push(Arc::clone(worker));
        }
        let chosen = inner.policy.pick(prompt, &candidates)?;
        workers.get(chosen).cloned()
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
                record.address == worker.address && record.incarnation == worker.incarnation
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
                    let worker = PoolWorker {
                        id: id.clone(),
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
