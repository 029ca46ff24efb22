//! A router without its doors, for simulations: the same admission, journal, sequences and pool, driven by
//! token ids. Never part of a serving router.

use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{Members, Placements, SeenIntent};
use tramontane_tokenizer::{StopDecoder, Tokenizer};
use tramontane_types::{FinishReason, SamplingParams, TokenId, TokenOutput};

use crate::RouterConfig;
use crate::answer::Answer;
use crate::answer_id::AnswerId;
use crate::cluster::ClusterView;
use crate::dispatch::{Dispatcher, Name};
use crate::error::{ApiError, ErrorKind};
use crate::metrics::Metrics;
use crate::request::{PreparedPrompt, PreparedRequest};
use crate::roster::{PulseTasks, Roster};
use crate::run::{Doors, dispatcher};
use crate::tenants::{Caller, Tenants};
use crate::worker_pool::WorkerPool;

pub use crate::worker_link::{
    Connect, GrpcConnect, GrpcLink, PING_INTERVAL, PING_TIMEOUT, SequenceEvents, WorkerLink,
    endpoint,
};

/// The part of a router that runs sequences.
#[derive(Debug)]
pub struct RouterCore {
    dispatcher: Dispatcher,
    pulse_stop: CancellationToken,
}

/// What must be zero when nothing runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Requests that run.
    pub running: usize,
    /// Requests that wait for a place.
    pub waiting: usize,
    /// Sequences in the journal.
    pub journal_entries: usize,
    /// Tokens in the journal.
    pub journal_tokens: usize,
    /// Requests that are followed by a task.
    pub tasks: usize,
}

/// Why a request did not end with its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The class of the error, as `Debug` names it.
    pub kind: String,
    /// What the client is told.
    pub message: String,
    /// Whether it says that the router itself is wrong.
    pub is_internal: bool,
}

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self {
            kind: format!("{:?}", error.kind),
            is_internal: error.kind == ErrorKind::Internal,
            message: error.message,
        }
    }
}

/// What is new of an answer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct News {
    /// The new tokens.
    pub tokens: Vec<TokenOutput>,
    /// The end, with the last news.
    pub finish: Option<FinishReason>,
}

/// One answer on its way. Dropping it aborts the sequence.
pub struct Generation(Answer);

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation").finish_non_exhaustive()
    }
}

impl RouterCore {
    /// A router over these views of the cluster, reaching workers through `connect`.
    #[must_use]
    pub fn new(
        config: &RouterConfig,
        tokenizer: Arc<Tokenizer>,
        members: watch::Receiver<Arc<Members>>,
        placements: watch::Receiver<Arc<Placements>>,
        intent: watch::Receiver<Arc<SeenIntent>>,
        connect: Arc<dyn Connect>,
    ) -> Self {
        let tasks = TaskTracker::new();
        let pulses = PulseTasks::default();
        let pulse_stop = pulses.stop.clone();
        let roster = Roster::follow(quietly(members, &tasks), connect, pulses);
        let cluster = ClusterView {
            members: quietly(roster.members(), &tasks),
            placements: quietly(placements, &tasks),
            intent: quietly(intent, &tasks),
        };
        let tenants = Arc::new(Tenants::of(config, Vec::new()));
        let metrics = Arc::new(Metrics::new("simulated", Arc::clone(&tenants)));
        let doors = Doors::default();
        let pool = WorkerPool::new(cluster, config.policy, Arc::default(), roster);
        let dispatcher = dispatcher(config, (pool, tenants), tokenizer, metrics, &doors);
        Self {
            dispatcher,
            pulse_stop,
        }
    }

    /// Starts one sequence.
    ///
    /// # Errors
    /// What a client would be told.
    pub async fn generate(
        &self,
        request_id: &str,
        prompt: &[TokenId],
        sampling: SamplingParams,
    ) -> Result<Generation, Failure> {
        let prompt = PreparedPrompt {
            ids: Arc::from(prompt),
            echo: None,
            is_chat: false,
            max_tokens: sampling.max_tokens,
        };
        let request = PreparedRequest {
            constraint_name: "constraint",
            prompts: vec![prompt],
            sampling,
            reads_calls: false,
            repeated_bytes: 0,
            stop: StopDecoder::new(&[]).map_err(|_| ApiError::internal())?,
            n: 1,
            kept: 1,
            priority: 0,
        };
        let name = Name {
            request: request_id.to_owned(),
            answer: AnswerId::of_key(request_id, 0),
            version: None,
            caller: Caller::default(),
            arrival: None,
        };
        Ok(Generation(self.dispatcher.start(request, name).await?))
    }

    /// What must be zero when nothing runs.
    #[must_use]
    pub fn gauges(&self) -> Gauges {
        let dispatcher = &self.dispatcher;
        Gauges {
            running: dispatcher.admission.running(),
            waiting: dispatcher.admission.waiting(),
            journal_entries: dispatcher.journal.num_entries(),
            journal_tokens: dispatcher.journal.num_tokens(),
            tasks: dispatcher.tasks.len(),
        }
    }

    /// Ends everything that still runs, as a process that dies does.
    pub fn abort(&self) {
        let abort: &CancellationToken = &self.dispatcher.abort;
        abort.cancel();
        self.pulse_stop.cancel();
    }
}

/// The same view, of which nobody who waits for it is told: tokio wakes several who do in an order by
/// chance. They look again after their own pauses.
fn quietly<T: Clone + Send + Sync + 'static>(
    mut view: watch::Receiver<T>,
    tasks: &TaskTracker,
) -> watch::Receiver<T> {
    let (sender, quiet) = watch::channel(view.borrow_and_update().clone());
    tasks.spawn(async move {
        while view.changed().await.is_ok() && !sender.is_closed() {
            sender.send_if_modified(|known| {
                known.clone_from(&view.borrow_and_update());
                false
            });
        }
    });
    quiet
}

impl Generation {
    /// What is new; `None` after the end.
    ///
    /// # Errors
    /// What a client would be told; nothing follows it.
    pub async fn next(&mut self) -> Result<Option<News>, Failure> {
        let Some(delta) = self.0.next().await else {
            return Ok(None);
        };
        let delta = delta?;
        Ok(Some(News {
            tokens: delta.tokens,
            finish: delta.finish,
        }))
    }
}
