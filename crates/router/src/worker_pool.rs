//! Connections to the attention workers and who of them takes the next sequence. Never gives a sequence
//! to a worker that is joining, cordoned, draining or leaving.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tonic::transport::{Channel, Endpoint};
use tramontane_coordination::{Members, WorkerRecord};
use tramontane_proto::v1::worker_client::WorkerClient;
use tramontane_types::{TokenId, WorkerId};

use crate::admission::Counted;
use crate::cluster::{ClusterView, attention_workers};
use crate::config::PolicyKind;
use crate::events::EventLog;
use crate::policy::{BlockHasher, Candidate, Policy, PromptBlocks, policy};

/// Longest wait for a connection to a worker.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A connection is asked for a sign of life this often, so that a paused machine is noticed soon.
const PING_INTERVAL: Duration = Duration::from_millis(500);
/// Longest wait for the sign of life: a live worker whose cores are throttled or busy is late by a second
/// or two, and every sequence on it would be computed anew elsewhere.
const PING_TIMEOUT: Duration = Duration::from_secs(3);
/// Token events are small: a window of this size never stops a stream.
const WINDOW_BYTES: u32 = 1024 * 1024;

/// One attention worker.
#[derive(Debug)]
pub(crate) struct PoolWorker {
    pub(crate) id: WorkerId,
    pub(crate) client: WorkerClient<Channel>,
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
    pub(crate) fn new(cluster: ClusterView, kind: PolicyKind, events: Arc<EventLog>) -> Self {
        let inner = Inner {
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
        let seen = self.cluster.intent();
        let mut inner = self.inner.lock();
        inner.follow(&members);
        let mut workers = Vec::new();
        let mut candidates = Vec::new();
        for (id, record) in attention_workers(&members, &placements, &seen.intent) {
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
            match connect(&record.address) {
                Ok(client) => {
                    let worker = PoolWorker {
                        id: id.clone(),
                        client,
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

/// A client that connects when first used, and again when the connection is lost.
pub(crate) fn connect(address: &str) -> Result<WorkerClient<Channel>, tonic::transport::Error> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES);
    Ok(WorkerClient::new(endpoint.connect_lazy()))
}
