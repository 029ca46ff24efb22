//! What the parts of one running worker share: who it is, its two halves, where it is in its life.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use tramontane_coordination::{Roles, Version, WorkerLoad, WorkerState};
use tramontane_engine::EngineStats;
use tramontane_exchange::{ExchangeStats, ExpertServerHandle, Transport};
use tramontane_grammar::Grammars;
use tramontane_proto::v1;
use tramontane_types::{Epoch, ModelGeometry, WorkerId};

use crate::WorkerConfig;
use crate::drill::Drills;
use crate::engine_thread::EngineHandle;
use crate::expert_keeper::KeptExperts;
use crate::island::{Formation, Hub};
use crate::weights::WeightStats;

/// A running worker.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) id: WorkerId,
    /// What it computes with.
    pub(crate) version: Version,
    pub(crate) geometry: ModelGeometry,
    /// What it does now, which is not always what it is wanted to do.
    pub(crate) roles: watch::Sender<Roles>,
    /// `None` without the attention role.
    pub(crate) attention: ArcSwapOption<AttentionHalf>,
    /// Empty without the experts role.
    pub(crate) experts: ExpertHalf,
    /// How it reaches the experts of others.
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) weights: Arc<WeightStats>,
    /// What compiles constraints; `None` without a vocabulary.
    pub(crate) grammars: Option<Grammars>,
    /// Epoch of the placement that it serves on; 0 for none.
    pub(crate) epoch: Arc<AtomicU64>,
    pub(crate) state: watch::Sender<WorkerState>,
    pub(crate) drills: Arc<Drills>,
    /// Of a worker that is an island.
    pub(crate) hub: Option<Arc<Hub>>,
}

/// The attention half of a worker; its engine lives and dies with it.
#[derive(Debug)]
pub(crate) struct AttentionHalf {
    pub(crate) engine: EngineHandle,
    /// What the engine's exchange counts.
    pub(crate) exchange: Arc<ExchangeStats>,
}

/// The expert half of a worker.
#[derive(Debug)]
pub(crate) struct ExpertHalf {
    pub(crate) store: Arc<KeptExperts>,
    pub(crate) server: ExpertServerHandle,
    pub(crate) segment_bytes: u64,
}

impl Node {
    pub(crate) fn state(&self) -> WorkerState {
        *self.state.borrow()
    }

    pub(crate) fn roles(&self) -> Roles {
        *self.roles.borrow()
    }

    pub(crate) fn engine(&self) -> Option<EngineHandle> {
        let attention = self.attention.load();
        attention.as_ref().map(|half| half.engine.clone())
    }

    /// What the engine's exchange counts.
    pub(crate) fn exchange(&self) -> Option<Arc<ExchangeStats>> {
        let attention = self.attention.load();
        attention.as_ref().map(|half| Arc::clone(&half.exchange))
    }

    /// Goes on from `from` to `to`; nothing when the worker is elsewhere in its life.
    pub(crate) fn advance(&self, from: &[WorkerState], to: WorkerState) {
        let worker = &self.id;
        self.state.send_if_modified(|state| {
            let is_next = from.contains(state) && *state != to;
            if is_next {
                tracing::info!(%worker, from = name(*state), to = name(to), "worker state");
                *state = to;
            }
            is_next
        });
    }

    pub(crate) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::Acquire))
    }

    /// What its record says about how busy it is.
    pub(crate) fn load(&self) -> WorkerLoad {
        self.engine().map_or_else(WorkerLoad::default, |engine| {
            load_of(&engine.stats(), engine.num_running())
        })
    }

    /// Bytes that it offers for experts in these roles. What the ranks of an island keep for attention they keep.
    pub(crate) fn capacity(&self, config: &WorkerConfig, roles: Roles) -> u64 {
        let alone = || config.capacity(roles, &self.geometry);
        self.hub
            .as_ref()
            .map_or_else(alone, |hub| hub.offered(roles))
    }

    /// Who computes together, on an island.
    fn formation(&self) -> Formation {
        self.hub
            .as_ref()
            .map_or_else(Formation::default, |hub| *hub.formations().borrow())
    }

    pub(crate) fn status(&self) -> v1::WorkerStatus {
        let stats = self.engine().map(|engine| engine.stats());
        let stats = stats.unwrap_or_default();
        let stuck = self.exchange().map(|stats| stats.stuck_for());
        let carried = self.transport.stats();
        let segments = self.experts.store.num_segments_held();
        v1::WorkerStatus {
            worker_id: self.id.to_string(),
            state: name(self.state()).to_owned(),
            epoch: self.epoch().0,
            sequences_running: stats.running as u32,
            sequences_waiting: stats.waiting as u32,
            kv_pages_total: stats.pages_total as u32,
            kv_pages_free: stats.pages_free as u32,
            expert_segments_held: segments,
            expert_bytes: segments * self.experts.segment_bytes,
            steps: stats.steps,
            tokens_sampled: stats.tokens_sampled,
            bytes_sent: carried.bytes_sent,
            bytes_received: carried.bytes_received,
            version: tramontane_runtime::build_info::VERSION.to_owned(),
            stuck_ms: stuck.unwrap_or_default().as_millis() as u64,
            island_ranks: self.formation().num_ranks,
            island_epoch: self.formation().epoch,
            island_steps: self.hub.as_ref().map_or(0, |hub| hub.num_steps()),
            drill: Some(self.drills.report()),
        }
    }
}

/// The engine's gauges are those after its last step: a sequence in its first one, or before it, is only
/// known by its open generation. Each is counted once.
fn load_of(stats: &EngineStats, num_open: usize) -> WorkerLoad {
    let running = stats.running.max(num_open.saturating_sub(stats.waiting));
    WorkerLoad {
        running: running as u32,
        waiting: stats.waiting as u32,
        kv_pages_free: stats.pages_free as u32,
    }
}

/// A state as it is shown to people.
pub(crate) const fn name(state: WorkerState) -> &'static str {
    match state {
        WorkerState::Joining => "joining",
        WorkerState::Ready => "ready",
        WorkerState::Draining => "draining",
        WorkerState::Leaving => "leaving",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequence_before_the_end_of_its_first_step_is_load() {
        // (running, waiting, open generations) and what the record says of the first two.
        for ((running, waiting, open), expected) in [
            ((0, 0, 0), (0, 0)),
            ((0, 0, 1), (1, 0)),
            ((2, 3, 5), (2, 3)),
            ((2, 3, 6), (3, 3)),
            // Its reader has left, the engine has not seen it yet.
            ((2, 1, 1), (2, 1)),
        ] {
            let stats = EngineStats {
                running,
                waiting,
                ..EngineStats::default()
            };
            let load = load_of(&stats, open);
            assert_eq!((load.running, load.waiting), expected);
        }
    }
}
