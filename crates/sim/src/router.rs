//! A router: election, planner, watches, admission, journal and sequences are the real ones; its doors are
//! not there. Never outlives its life on the network.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use futures::{StreamExt, stream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Status;
use tramontane_coordination::{
    Planner, Scope, Store, run_elected, watch_intent, watch_members, watch_placements,
};
use tramontane_proto::v1::{GenerateSequenceRequest, SequenceEvent, WorkerStatus};
use tramontane_router::RouterConfig;
use tramontane_router::simulation::{
    Connect, PING_INTERVAL, PING_TIMEOUT, RouterCore, SequenceEvents, WorkerLink,
};
use tramontane_tokenizer::Tokenizer;
use tramontane_types::WorkerId;

use crate::engine::{Opened, node_of};
use crate::net::{Life, Node};
use crate::worker::Shared;

/// After so long without a sign of life a connection to a worker is broken.
const PATIENCE: Duration = PING_INTERVAL.saturating_add(PING_TIMEOUT);

/// One life of a router.
#[derive(Debug)]
pub struct SimRouter {
    /// Its life.
    pub life: Life,
    /// What runs sequences.
    pub core: RouterCore,
    /// What it knows about the placements.
    pub placements: tokio::sync::watch::Receiver<Arc<tramontane_coordination::Placements>>,
    shared: Shared,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl SimRouter {
    /// Starts a router.
    #[must_use]
    pub fn start(
        shared: &Shared,
        life: Life,
        config: &RouterConfig,
        tokenizer: Arc<Tokenizer>,
        store: Arc<dyn Store>,
    ) -> Arc<Self> {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let members = watch_members(Arc::clone(&store), &tasks, stop.clone());
        let placements = watch_placements(Arc::clone(&store), Scope::All, &tasks, stop.clone());
        let intent = watch_intent(Arc::clone(&store), &tasks, stop.clone());
        let planner = Planner::new(
            Arc::clone(&store),
            config.planner(),
            members.clone(),
            placements.clone(),
        );
        let (id, ttl, ended) = (config.id.clone(), config.election_ttl, stop.clone());
        tasks.spawn(async move {
            run_elected(store, &id, ttl, ended, |leading| {
                let planner = planner.clone();
                async move { planner.run(leading).await }
            })
            .await;
        });
        let connect = SimConnect {
            shared: shared.clone(),
            me: life,
        };
        let core = RouterCore::new(
            config,
            tokenizer,
            members,
            placements.clone(),
            intent,
            Arc::new(connect),
        );
        Arc::new(Self {
            life,
            core,
            placements,
            shared: shared.clone(),
            stop,
            tasks,
        })
    }

    /// Whether this life goes on.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.net.is_alive(self.life)
    }

    /// Dies at once: nobody is told.
    pub fn kill(&self) {
        self.shared.net.kill(self.life.node);
        self.stop.cancel();
        self.tasks.close();
        self.core.abort();
    }
}

#[derive(Debug)]
struct SimConnect {
    shared: Shared,
    me: Life,
}

impl Connect for SimConnect {
    fn connect(&self, address: &str) -> Result<Arc<dyn WorkerLink>, tonic::transport::Error> {
        let name = address.split(':').next().unwrap_or_default();
        Ok(Arc::new(SimLink {
            shared: self.shared.clone(),
            me: self.me,
            to: node_of(&WorkerId::new(name)),
        }))
    }
}

#[derive(Debug)]
struct SimLink {
    shared: Shared,
    me: Life,
    to: Option<Node>,
}

#[async_trait]
impl WorkerLink for SimLink {
    async fn generate(&self, request: GenerateSequenceRequest) -> Result<SequenceEvents, Status> {
        let to = self
            .to
            .ok_or_else(|| Status::unavailable("no such worker"))?;
        let (shared, me) = (&self.shared, self.me.node);
        if request.num_resumed > 0 {
            shared.check.count(|counts| counts.replays += 1);
        }
        let opening = async {
            shared.net.carry(me, to).await;
            let worker = shared.peers.lock().get(&to).cloned();
            let worker = worker.ok_or_else(|| Status::unavailable("connection refused"))?;
            let opened = worker.open(&request);
            Ok::<_, Status>((worker.life, opened))
        };
        let opened = timeout(PATIENCE, opening).await;
        let (life, opened) =
            opened.unwrap_or_else(|_| Err(Status::unavailable("no sign of life")))?;
        shared.check.note(format_args!(
            "{} opens {} on {to} at token {}: {}",
            self.me.node,
            request.request_id,
            request.num_resumed,
            if opened.is_ok() { "taken" } else { "refused" },
        ));
        let reader = opened.map(|opened| Reader {
            shared: shared.clone(),
            me: self.me,
            worker: life,
            opened: Some(opened),
        });
        // From here on the reader aborts the sequence when it is dropped, answered or not.
        let back = timeout(PATIENCE, shared.net.carry(to, me)).await;
        if back.is_err() {
            return Err(Status::unavailable("no sign of life"));
        }
        Ok(stream::unfold(reader?, Reader::next).boxed())
    }

    async fn status(&self) -> Result<WorkerStatus, Status> {
        let gone = || Status::unavailable("no sign of life");
        let (shared, me, to) = (&self.shared, self.me.node, self.to.ok_or_else(gone)?);
        let asking = async {
            shared.net.carry(me, to).await;
            let is_there = shared.peers.lock().contains_key(&to);
            shared.net.carry(to, me).await;
            is_there.then(WorkerStatus::default).ok_or_else(gone)
        };
        timeout(PATIENCE, asking)
            .await
            .unwrap_or_else(|_| Err(gone()))
    }
}

/// The events of one sequence on their way to the router.
struct Reader {
    shared: Shared,
    me: Life,
    worker: Life,
    opened: Option<Opened>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader")
            .field("worker", &self.worker)
            .finish_non_exhaustive()
    }
}

impl Reader {
    async fn next(mut self) -> Option<(Result<SequenceEvent, Status>, Self)> {
        let (net, me, from) = (self.shared.net.clone(), self.me.node, self.worker);
        let events = &mut self.opened.as_mut()?.events;
        let next = async {
            let event = events.recv().await;
            net.carry(from.node, me).await;
            event
        };
        let event = tokio::select! {
            biased;
            event = next => event,
            () = net.broken(me, from, PATIENCE) => Some(Err(Status::unavailable("no sign of life"))),
        };
        match event {
            Some(event) => {
                if event.is_err() {
                    self.abort();
                }
                Some((event, self))
            }
            // The worker is gone, or has said everything.
            None if net.is_alive(from) => None,
            None => {
                self.opened = None;
                Some((Err(Status::unknown("connection reset")), self))
            }
        }
    }

    /// Tells the worker, which goes on until it hears of it.
    fn abort(&mut self) {
        let Some(opened) = self.opened.take() else {
            return;
        };
        let (shared, me, to) = (self.shared.clone(), self.me.node, self.worker.node);
        let sent = shared.sent.clone();
        sent.spawn(async move {
            // A worker that hears nothing for so long ends the sequence itself.
            let _ = timeout(PATIENCE, shared.net.carry(me, to)).await;
            opened.cancelled.store(true, Ordering::Relaxed);
            let worker = shared.peers.lock().get(&to).cloned();
            if let Some(worker) = worker {
                worker.woken.notify_one();
            }
        });
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.abort();
    }
}
