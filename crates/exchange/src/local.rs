//! The transport inside one process: hands calls to expert servers directly. Copies nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;
use tramontane_types::WorkerId;

use crate::stats::add;
use crate::{ExpertCall, ExpertServerHandle, Refusal, ReplySender, Transport, TransportStats};

/// Expert servers of this process by worker.
#[derive(Debug, Default)]
pub struct LocalTransport {
    servers: RwLock<HashMap<WorkerId, ExpertServerHandle>>,
    counters: Arc<Counters>,
}

/// What every transport counts.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes_sent: AtomicU64,
    pub(crate) bytes_received: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) lost: AtomicU64,
    pub(crate) connects: AtomicU64,
}

impl Counters {
    pub(crate) fn read(&self) -> TransportStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        TransportStats {
            bytes_sent: read(&self.bytes_sent),
            bytes_received: read(&self.bytes_received),
            calls: read(&self.calls),
            lost: read(&self.lost),
            connects: read(&self.connects),
        }
    }
}

impl LocalTransport {
    /// A transport that reaches nobody yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls for `worker` go to `server` from now on.
    pub fn insert(&self, worker: WorkerId, server: ExpertServerHandle) {
        self.servers.write().insert(worker, server);
    }

    /// Calls for `worker` are lost from now on.
    pub fn remove(&self, worker: &WorkerId) {
        self.servers.write().remove(worker);
    }
}

impl Transport for LocalTransport {
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
        let server = self.servers.read().get(to).cloned();
        let Some(server) = server else {
            add(&self.counters.lost, 1);
            reply.send(Err(Refusal::Lost(format!("worker {to} is not known here"))));
            return;
        };
        add(&self.counters.calls, 1);
        add(&self.counters.bytes_sent, call.rows.len());
        let counters = Arc::clone(&self.counters);
        let counted = ReplySender::new(move |answer| {
            if let Ok(answer) = &answer {
                add(&counters.bytes_received, answer.outputs.len());
            }
            reply.send(answer);
        });
        server.submit(call, counted);
    }

    fn stats(&self) -> TransportStats {
        self.counters.read()
    }
}
