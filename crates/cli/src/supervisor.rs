//! The services of one process, and who starts and stops them: a router, and workers that come and go on
//! an operator's word. Never restarts a worker, and never ends one that is to stay.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU16, NonZeroUsize};
use std::sync::Arc;

use anyhow::{Context as _, anyhow};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tramontane_coordination::store::keys;
use tramontane_coordination::{Store, WorkerRecord};
use tramontane_exchange::LocalTransport;
use tramontane_grammar::Vocabulary;
use tramontane_model::Checkpoint;
use tramontane_router::{RouterConfig, RouterParts, ScaleError, ScaleStarted, Scaler};
use tramontane_runtime::Shutdown;
use tramontane_runtime::tls::Tls;
use tramontane_types::WorkerId;
use tramontane_worker::{ExchangeKind, ProcessKind, WorkerConfig, WorkerParts};

use crate::args::ExchangeArg;
use crate::doors::bind;
use crate::model::progress_bar;
use crate::output;

/// Changes of scale that wait; each takes milliseconds to begin.
const SCALE_QUEUE_MAX: usize = 4;

/// The services of this process, and how to stop them in order.
pub(crate) struct Supervisor {
    recipe: WorkerRecipe,
    workers: JoinSet<(u16, anyhow::Result<()>)>,
    /// How to stop each worker that has not ended.
    running: BTreeMap<u16, Shutdown>,
    workers_stop: Shutdown,
    router: JoinSet<anyhow::Result<()>>,
    router_stop: Shutdown,
    requests: mpsc::Receiver<ScaleRequest>,
}

/// What every worker of this process is made of.
pub(crate) struct WorkerRecipe {
    /// Of all workers together: each takes its share.
    pub(crate) config: WorkerConfig,
    /// Compute threads of the workers that the process began with.
    pub(crate) threads: usize,
    /// Workers that the process began with: they divide threads and memory, and later ones take as much.
    pub(crate) workers: NonZeroU16,
    pub(crate) store: Arc<dyn Store>,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) model_name: String,
    pub(crate) vocabulary: Option<Vocabulary>,
    pub(crate) exchange: ExchangeArg,
    pub(crate) local: Arc<LocalTransport>,
}

/// Asks the supervisor on behalf of the router.
#[derive(Debug)]
struct LocalScaler {
    requests: mpsc::Sender<ScaleRequest>,
}

#[derive(Debug)]
struct ScaleRequest {
    count: u16,
    answer: oneshot::Sender<Result<ScaleStarted, ScaleError>>,
}

impl Supervisor {
    /// Runs nothing yet; also who hands it an operator's wishes.
    pub(crate) fn new(recipe: WorkerRecipe) -> (Self, Arc<dyn Scaler>) {
        let (ask, requests) = mpsc::channel(SCALE_QUEUE_MAX);
        let supervisor = Self {
            recipe,
            workers: JoinSet::new(),
            running: BTreeMap::new(),
            workers_stop: Shutdown::new(),
            router: JoinSet::new(),
            router_stop: Shutdown::new(),
            requests,
        };
        (supervisor, Arc::new(LocalScaler { requests: ask }))
    }

    /// Starts `worker-{index}`.
    pub(crate) async fn start_worker(&mut self, index: u16) -> anyhow::Result<WorkerId> {
        let (config, parts) = (self.recipe.config(index), self.recipe.parts(index).await?);
        let id = WorkerId::new(&config.id);
        let stop = self.workers_stop.child();
        self.running.insert(index, stop.clone());
        self.workers.spawn(async move {
            let name = config.id.clone();
            let ended = tramontane_worker::run(config, parts, stop).await;
            (index, ended.with_context(|| format!("worker {name}")))
        });
        Ok(id)
    }

    pub(crate) fn start_router(&mut self, config: RouterConfig, parts: RouterParts) {
        let stop = self.router_stop.clone();
        self.router
            .spawn(async move { Ok(tramontane_router::run(config, parts, stop).await?) });
    }

    /// Scales on request until something has failed: the router must not end before it is asked to, nor
    /// must the last worker. Another one that ends well was drained by an operator.
    pub(crate) async fn supervise(&mut self) -> anyhow::Error {
        loop {
            tokio::select! {
                Some(ended) = self.workers.join_next() => match ended {
                    Ok((index, ended)) => if let Err(error) = self.worker_ended(index, ended) {
                        return error;
                    },
                    Err(panicked) => return panicked.into(),
                },
                Some(ended) = self.router.join_next() => return match ended {
                    Ok(Ok(())) => anyhow!("the router ended by itself"),
                    Ok(Err(error)) => error,
                    Err(panicked) => panicked.into(),
                },
                Some(ScaleRequest { count, answer }) = self.requests.recv() => {
                    // Nobody listens any more when the operator has gone: it was still asked for.
                    let _ = answer.send(self.scale(count).await);
                }
                else => return anyhow!("nothing runs"),
            }
        }
    }

    /// The router finishes its requests while the workers still serve; then these stop together.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        self.router_stop.trigger();
        while let Some(ended) = self.router.join_next().await {
            ended??;
        }
        self.workers_stop.trigger();
        while let Some(ended) = self.workers.join_next().await {
            ended?.1?;
        }
        Ok(())
    }

    fn worker_ended(&mut self, index: u16, ended: anyhow::Result<()>) -> anyhow::Result<()> {
        self.running.remove(&index);
        let is_newcomer = index >= self.recipe.workers.get();
        match ended {
            Ok(()) if self.running.is_empty() => Err(anyhow!("the last worker ended by itself")),
            Ok(()) => Ok(()),
            // Those that were there before do not end because one more was too many.
            Err(error) if is_newcomer && !self.running.is_empty() => {
                output::note(&format!("{error:#}; the other workers go on"));
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Starts workers under the lowest free numbers, or lets those of the highest numbers drain.
    async fn scale(&mut self, count: u16) -> Result<ScaleStarted, ScaleError> {
        let failed = |error: anyhow::Error| ScaleError::Failed(format!("{error:#}"));
        let staying = self.staying().await.map_err(failed)?;
        let (from, wanted) = (staying.len(), usize::from(count));
        let mut begun = ScaleStarted {
            from,
            ..ScaleStarted::default()
        };
        for index in staying.iter().rev().take(from.saturating_sub(wanted)) {
            if let Some(stop) = self.running.get(index) {
                stop.trigger();
                begun.draining.push(WorkerId::new(&worker_name(*index)));
            }
        }
        let free = (0..=u16::MAX).filter(|index| !self.running.contains_key(index));
        let free: Vec<u16> = free.take(wanted.saturating_sub(from)).collect();
        for index in free {
            match self.start_worker(index).await {
                Ok(id) => begun.started.push(id),
                Err(error) if begun.started.is_empty() && begun.draining.is_empty() => {
                    return Err(failed(error));
                }
                // What was begun goes on, and the answer says how much that is.
                Err(error) => {
                    output::note(&format!("no further worker starts: {error:#}"));
                    break;
                }
            }
        }
        Ok(begun)
    }

    /// Workers that nobody has asked to drain: neither this process nor an operator.
    async fn staying(&self) -> anyhow::Result<BTreeSet<u16>> {
        let records = self.recipe.store.list(keys::WORKERS).await?.entries;
        let records = records.iter().filter_map(|e| WorkerRecord::decode(e).ok());
        let leaving: BTreeSet<WorkerId> = records
            .filter(|record| !record.state.is_staying())
            .map(|record| record.id)
            .collect();
        let stays = |(index, stop): &(&u16, &Shutdown)| {
            !stop.token.is_cancelled() && !leaving.contains(&WorkerId::new(&worker_name(**index)))
        };
        let staying = self.running.iter().filter(stays);
        Ok(staying.map(|(index, _)| *index).collect())
    }
}

impl WorkerRecipe {
    fn config(&self, index: u16) -> WorkerConfig {
        share_of(&self.config, self.threads, self.workers, index)
    }

    async fn parts(&self, index: u16) -> anyhow::Result<WorkerParts> {
        let shows_progress = index == 0;
        Ok(WorkerParts {
            store: Arc::clone(&self.store),
            checkpoint: Arc::clone(&self.checkpoint),
            model_name: self.model_name.clone(),
            vocabulary: self.vocabulary.clone(),
            grpc: bind("127.0.0.1:0").await?,
            ops: None,
            progress: shows_progress
                .then(|| progress_bar("experts", "{bytes} of {total_bytes}, {eta} left")),
            exchange: match self.exchange {
                ExchangeArg::Grpc => ExchangeKind::Grpc,
                ExchangeArg::Local => ExchangeKind::Local(Arc::clone(&self.local)),
            },
            process: ProcessKind::Shared,
            // Of one process, and reached on this machine only.
            tls: Tls::default(),
        })
    }
}

/// Divides threads and memory among the first workers: each gets its share, at least one thread.
pub(crate) fn share_of(
    all: &WorkerConfig,
    threads: usize,
    workers: NonZeroU16,
    index: u16,
) -> WorkerConfig {
    let num_workers = usize::from(workers.get());
    let share = threads / num_workers + usize::from(usize::from(index) < threads % num_workers);
    let of_memory = |bytes: u64| bytes / u64::from(workers.get());
    WorkerConfig {
        id: worker_name(index),
        threads: NonZeroUsize::new(share.max(1)),
        expert_memory: Some(of_memory(all.expert_bytes())),
        kv_memory: Some(of_memory(all.kv_bytes())),
        ..all.clone()
    }
}

fn worker_name(index: u16) -> String {
    format!("worker-{index}")
}

#[tonic::async_trait]
impl Scaler for LocalScaler {
    async fn scale(&self, count: u16) -> Result<ScaleStarted, ScaleError> {
        let (answer, answered) = oneshot::channel();
        self.requests
            .try_send(ScaleRequest { count, answer })
            .map_err(|_full| {
                ScaleError::Refused(format!(
                    "{SCALE_QUEUE_MAX} changes of scale are waiting already; try again"
                ))
            })?;
        answered
            .await
            .map_err(|_stopped| ScaleError::Failed("the process is stopping".to_owned()))?
    }
}
