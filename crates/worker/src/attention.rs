//! The attention half of a worker: made, put into use, taken out of use, while the expert half serves on.
//! Never decides when.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_compute::{AttentionConfig, Backend, Experts};
use tramontane_engine::{Engine, StepReport};
use tramontane_exchange::{Desk, ExchangeConfig, ExpertExchange};
use tramontane_model::Checkpoint;

use crate::assemble::Serving;
use crate::engine_thread::EngineThread;
use crate::metrics::StepMetrics;
use crate::state::{AttentionHalf, Node};
use crate::{Error, WorkerConfig};

/// Everything that an attention half is made from.
#[derive(Clone, Debug)]
pub(crate) struct AttentionMaker {
    pub(crate) config: WorkerConfig,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) serving: Serving,
    pub(crate) steps: StepMetrics,
}

/// The thread of the engine that is in use, and who hears when it ends by itself.
#[derive(Debug)]
pub(crate) struct EngineSlot {
    node: Arc<Node>,
    tasks: TaskTracker,
    thread: Mutex<Option<EngineThread>>,
    /// Cancelled when an engine ended that nobody had asked to.
    broken: CancellationToken,
}

/// A half that is not in use yet.
#[derive(Debug)]
pub(crate) struct Made {
    thread: EngineThread,
    half: AttentionHalf,
}

impl AttentionMaker {
    /// Reads and packs the weights and reserves the KV cache, on a thread that may take its time.
    pub(crate) async fn make(&self, node: &Arc<Node>) -> Result<Made, Error> {
        let (maker, node) = (self.clone(), Arc::clone(node));
        let what = "packing the attention weights";
        let made = tokio::task::spawn_blocking(move || maker.make_now(&node)).await;
        made.map_err(|source| Error::Task { what, source })?
    }

    fn make_now(&self, node: &Arc<Node>) -> Result<Made, Error> {
        let geometry = self.checkpoint.geometry();
        let eos_ids = self.checkpoint.config().eos_token_ids.clone();
        let limits = self.config.engine(geometry, eos_ids);
        let sizes = AttentionConfig {
            num_pages: limits.num_pages,
            max_rows: limits.max_step_rows,
            kv_format: self.config.kv_format,
        };
        let attention = {
            let bytes = self.checkpoint.attention_weights();
            let bytes = bytes.map_err(Error::Checkpoint)?;
            let made = self.backend.attention(&bytes.weights(), sizes);
            made.map_err(Error::Backend)?
        };
        if let Some(hub) = &node.hub {
            hub.renew();
        }
        let exchange = self.exchange(node);
        let stats = exchange.stats();
        let engine = Engine::new(limits, geometry.clone(), attention, Box::new(exchange))
            .map_err(Error::Engine)?;
        let (observed, drills) = (self.steps.clone(), Arc::clone(&node.drills));
        let on_step = move |report: &StepReport| {
            observed.observe(report);
            drills.after_step();
        };
        let thread = EngineThread::start(engine, Box::new(on_step))?;
        let half = AttentionHalf {
            engine: thread.handle(),
            exchange: stats,
        };
        Ok(Made { thread, half })
    }

    fn exchange(&self, node: &Node) -> ExpertExchange {
        let geometry = self.checkpoint.geometry().clone();
        let mut config = ExchangeConfig::new(node.id.clone(), geometry, self.backend.row_format());
        config.layer_deadline = self.config.layer_deadline;
        let local = Arc::clone(&node.experts.store) as Arc<dyn Experts>;
        let (serving, transport) = (Arc::clone(&self.serving), Arc::clone(&node.transport));
        ExpertExchange::new(config, Some(local), serving, transport)
            .at(Arc::clone(&self.desk), Some(node.experts.server.clone()))
    }
}

impl EngineSlot {
    pub(crate) fn new(node: Arc<Node>, tasks: TaskTracker) -> Self {
        Self {
            node,
            tasks,
            thread: Mutex::new(None),
            broken: CancellationToken::new(),
        }
    }

    /// Sequences are taken from now on.
    pub(crate) fn put(&self, made: Made) {
        let Made { thread, half } = made;
        let (ended, asked) = (thread.ended(), thread.asked_to_stop());
        let broken = self.broken.clone();
        self.tasks.spawn(async move {
            ended.cancelled().await;
            if !asked.is_cancelled() {
                broken.cancel();
            }
        });
        *self.thread.lock() = Some(thread);
        self.node.attention.store(Some(Arc::new(half)));
    }

    /// Stops the engine after its running step: what still runs on it is handed back. Its memory is free
    /// afterwards; false when that did not come about within `limit`.
    pub(crate) async fn take_out(&self, limit: Duration) -> bool {
        let thread = self.thread.lock().take();
        let Some(thread) = thread else {
            return true;
        };
        self.node.attention.store(None);
        thread.stop();
        timeout(limit, thread.ended().cancelled()).await.is_ok()
    }

    /// Cancelled when an engine ended by itself.
    pub(crate) fn broken(&self) -> CancellationToken {
        self.broken.clone()
    }
}
