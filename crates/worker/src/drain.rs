//! Leaving without losing anything: refuse, finish, hand over the experts, then end. Never waits longer
//! than its deadline.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};
use tramontane_coordination::{Members, Placements, WorkerState};

use crate::following::{Need, need};
use crate::state::Node;

/// How often a worker that waits for its replacement looks whether its experts were asked.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// Nobody may have asked our experts for this long before we go, once no placement names us: time for
/// every caller to see the newest placement.
pub(crate) const QUIET: Duration = Duration::from_secs(2);

/// What a drain looks at.
#[derive(Debug)]
pub(crate) struct Drain {
    pub(crate) node: Arc<Node>,
    pub(crate) placements: watch::Receiver<Arc<Placements>>,
    pub(crate) members: watch::Receiver<Arc<Members>>,
}

impl Drain {
    /// Refuses new sequences, waits for the running ones, and serves experts until they are not needed.
    pub(crate) async fn run(self, limit: Duration) {
        let (worker, deadline) = (&self.node.id, Instant::now() + limit);
        let before = [WorkerState::Joining, WorkerState::Ready];
        // First: a record that says "draining" counts every sequence that this worker will ever run.
        let engine = self.node.engine();
        if let Some(engine) = &engine {
            engine.refuse_new();
        }
        self.node.advance(&before, WorkerState::Draining);
        if let Some(engine) = &engine
            && timeout_at(deadline, engine.idle()).await.is_err()
        {
            let left = engine.num_running();
            tracing::warn!(%worker, left, ?limit, "sequences did not end, handed back");
        }
        let not_needed = self.experts_not_needed();
        if self.node.roles().experts && timeout_at(deadline, not_needed).await.is_err() {
            tracing::warn!(%worker, ?limit, "nobody took over the experts in time");
        }
        self.node
            .advance(&[WorkerState::Draining], WorkerState::Leaving);
    }

    /// Waits until no placement names us and nobody has asked our experts for a while.
    async fn experts_not_needed(&self) {
        let half = &self.node.experts;
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut calls, mut quiet_since) = (half.server.stats().calls, Instant::now());
        loop {
            ticks.tick().await;
            let stats = half.server.stats();
            if stats.calls != calls || stats.waiting > 0 {
                (calls, quiet_since) = (stats.calls, Instant::now());
            }
            match self.need() {
                Need::Nobody => return,
                Need::Unlikely if quiet_since.elapsed() >= QUIET => return,
                Need::Unlikely | Need::Likely => {}
            }
        }
    }

    fn need(&self) -> Need {
        let placements = self.placements.borrow().clone();
        let me = (&self.node.id, &self.node.version);
        need(me, &placements, &self.members.borrow())
    }
}
