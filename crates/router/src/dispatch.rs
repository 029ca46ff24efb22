//! One request's life: admission, the choice of workers, and the merged answers. Workers are followed by a
//! task, never by whoever reads the answer: a client that does not read holds its places no longer than a
//! limit.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::future::try_join_all;
use futures::stream::unfold;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;
use tramontane_coordination::Version;
use tramontane_tokenizer::Tokenizer;
use tramontane_types::Usage;

use crate::admission::{Admission, Admitted, Arrival, Counted};
use crate::answer::{Answer, Shape, Source, Told};
use crate::answer_id::AnswerId;
use crate::error::ApiError;
use crate::hold::Hold;
use crate::journal::Journal;
use crate::kept::{BodyDigest, Found, KeptAnswers, KeyDigest, Recorder};
use crate::metrics::Metrics;
use crate::preparing::Preparing;
use crate::random::choice_seed;
use crate::request::{PreparedPrompt, PreparedRequest};
use crate::running::{Progress, Running};
use crate::sequence::{Delta, Patience, Sequence, State};
use crate::tenants::{Ask, Caller, Quotas, Reserved, TenantName, Tenants};
use crate::text::AnswerText;
use crate::worker_pool::WorkerPool;

/// Deltas of one answer that wait for the client: some steps of many sequences, little memory.
const UNREAD_MAX: usize = 64;

/// Versions of the weights that a request tries to begin with, when they change meanwhile.
const VERSIONS_TRIED_MAX: u32 = 3;

/// Everything that requests share.
#[derive(Debug)]
pub(crate) struct Dispatcher {
    pub(crate) pool: Arc<WorkerPool>,
    pub(crate) admission: Admission,
    pub(crate) hold: Hold,
    pub(crate) tenants: Arc<Tenants>,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) journal: Journal,
    pub(crate) kept: Arc<KeptAnswers>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) patience: Patience,
    /// Bodies that are parsed and tokenized at once: CPU and memory of hostile prompts are bounded by it.
    pub(crate) preparing: Preparing,
    /// A client that reads nothing for this long is cut off.
    pub(crate) client_stall_max: Duration,
    /// What goes on beside the futures of requests.
    pub(crate) tasks: TaskTracker,
    /// Cancelled when the drain took too long.
    pub(crate) abort: CancellationToken,
}

impl Dispatcher {
    /// Runs long CPU work of one request of `tenant` where it holds up nobody. Dropping the future does not stop the
    /// work: what bounds its memory must be moved into it.
    pub(crate) async fn prepare<T, F>(&self, tenant: &TenantName, work: F) -> Result<T, ApiError>
    where
        F: FnOnce() -> Result<T, ApiError> + Send + 'static,
        T: Send + 'static,
    {
        self.preparing.run(tenant, work).await
    }

    /// Counts a request before it is read: whoever has used up a quota or meets a full queue is told at once. Holds
    /// no room for it: one that only announces its body holds up nobody.
    pub(crate) fn knock(&self, caller: &Caller) -> Result<(), ApiError> {
        let tenant = &caller.tenant;
        let allowed = self.admission.knock(tenant);
        let allowed = allowed.and_then(|()| self.quotas.request(tenant));
        allowed.inspect_err(|error| self.note_refusal(tenant, error))
    }

    /// Takes in a request that is read and not understood yet.
    pub(crate) fn arrive(&self, caller: &Caller) -> Result<Arrival, ApiError> {
        let tenant = &caller.tenant;
        let arrived = self.admission.arrive(tenant, self.tenants.limits(tenant));
        arrived.inspect_err(|error| self.note_refusal(tenant, error))
    }

    fn note_refusal(&self, tenant: &TenantName, error: &ApiError) {
        self.metrics.refused(error.kind);
        self.metrics.tenants.refused(tenant, error.kind);
    }

    /// Admits the request, starts all its sequences, and follows them for as long as the answer is read.
    pub(crate) async fn start(
        &self,
        request: PreparedRequest,
        name: Name,
    ) -> Result<Answer, ApiError> {
        let (shape, span) = (Shape::of(&request), name.span(&request));
        let (running, counted) = self.open(request, &name).await?;
        let version = Arc::clone(&running.version);
        let (tell, told) = mpsc::channel(UNREAD_MAX);
        self.tasks
            .spawn(running.follow(tell, self.client_stall_max).instrument(span));
        let (source, abort) = (Source::Made(told), self.abort.clone());
        let begun = (name.answer, version);
        Ok(Answer::new(begun, source, shape, abort, counted))
    }

    /// The answer to the request with this idempotency key: the one that is there, or one that is started
    /// and goes on for a while also when nobody reads it.
    pub(crate) async fn start_keyed(
        self: &Arc<Self>,
        request: PreparedRequest,
        name: Name,
        (key, body): (KeyDigest, BodyDigest),
    ) -> Result<Answer, ApiError> {
        let shape = Shape::of(&request);
        // Before the answer begins: who waits for it counts.
        let counted = self.admission.count();
        let tenant = &name.caller.tenant;
        let mut reader = match self.kept.find((tenant, key), body, name.answer)? {
            Found::Answer(reader) => {
                self.metrics.attached();
                reader
            }
            Found::Nothing(recorder, reader) => {
                let span = name.span(&request);
                let making = Arc::clone(self).record(request, name, recorder);
                self.tasks.spawn(making.instrument(span));
                reader
            }
        };
        let begun = (reader.id(), reader.began().await?);
        let abort = self.abort.clone();
        Ok(Answer::new(
            begun,
            Source::Kept(reader),
            shape,
            abort,
            counted,
        ))
    }

    /// Makes a whole answer and keeps it for its time, unless nobody reads it before it is whole.
    async fn record(self: Arc<Self>, request: PreparedRequest, name: Name, recorder: Recorder) {
        let making = async {
            // Its readers count it.
            let (mut running, _) = match self.open(request, &name).await {
                Ok(opened) => opened,
                Err(error) => {
                    recorder.began(Err(error));
                    return false;
                }
            };
            recorder.began(Ok(Arc::clone(&running.version)));
            while let Some(delta) = running.next().await {
                let (failed, spent) = (delta.is_err(), running.spent());
                recorder.push(Told { delta, spent });
                if failed {
                    return false;
                }
            }
            true
        };
        let is_whole = tokio::select! {
            is_whole = making => is_whole,
            () = recorder.abandoned() => false,
        };
        let kept = async {
            if is_whole {
                recorder.keep().await;
            } else {
                recorder.part().await;
            }
        };
        tokio::select! {
            () = kept => {}
            () = self.abort.cancelled() => {}
        }
    }

    /// Waits until anybody can serve the request, and until it may run. Its prompt counts as used from now on, unless
    /// it is not served after all.
    async fn admit(
        &self,
        request: &PreparedRequest,
        name: &Name,
    ) -> Result<(Admitted, Reserved), ApiError> {
        let tenant = &name.caller.tenant;
        let ask = Ask {
            tenant: tenant.clone(),
            class: self.tenants.class(tenant, request.priority),
            limits: self.tenants.limits(tenant),
            places: request.num_sequences(),
            prompt_tokens: request.prompt_tokens() as u64,
            bytes: request.size(),
        };
        let prompt_tokens = ask.prompt_tokens;
        let ready = self.ready(&ask, name).await;
        let allowed = ready.and_then(|()| self.quotas.prompt(tenant, prompt_tokens));
        // From here on it counts as one that waits or runs.
        if let Some(arrival) = &name.arrival {
            arrival.settle();
        }
        let reserved = allowed.inspect_err(|error| self.note_refusal(tenant, error))?;
        let admitted = self.admission.admit(ask).await;
        let admitted = admitted.inspect_err(|error| self.note_refusal(tenant, error))?;
        self.metrics.tenants.admitted(tenant, prompt_tokens);
        Ok((admitted, reserved))
    }

    /// Returns once workers can serve the request. One that goes on with weights that nobody has is not held.
    async fn ready(&self, ask: &Ask, name: &Name) -> Result<(), ApiError> {
        let cluster = self.pool.cluster();
        match &name.version {
            Some(version) => cluster
                .check_version(version)
                .map_err(ApiError::unavailable),
            None if cluster.check().is_ok() => Ok(()),
            None => {
                self.hold.until_ready(cluster, ask).await?;
                // All that were held come at once, and before the next look at the workers.
                self.admission.set_capacity(cluster.capacity());
                Ok(())
            }
        }
    }

    /// Admits the request and starts all its sequences.
    async fn open(
        &self,
        request: PreparedRequest,
        name: &Name,
    ) -> Result<(Running, Counted), ApiError> {
        let arrived = Instant::now();
        let (admitted, reserved) = self.admit(&request, name).await?;
        let queued = arrived.elapsed();
        self.metrics.queued_for(queued);
        let (version, sequences) = self.begin(&request, name).await?;
        reserved.served();
        let num_sequences = sequences.len();
        let streams = sequences
            .into_iter()
            .map(|sequence| deltas(sequence).boxed());
        let running = Running {
            version,
            streams: streams.collect(),
            n: request.n as usize,
            usage: Usage {
                prompt_tokens: u32::try_from(request.prompt_tokens()).unwrap_or(u32::MAX),
                ..Usage::default()
            },
            progress: vec![Progress::default(); num_sequences],
            arrived,
            queued,
            metrics: Arc::clone(&self.metrics),
            abort: self.abort.clone(),
            failed: false,
            tenant: name.caller.tenant.clone(),
            quotas: Arc::clone(&self.quotas),
            places: admitted.places,
        };
        Ok((running, admitted.running))
    }

    /// Starts all sequences with the same weights: those of an answer that goes on, or those that serve now.
    /// If others serve by the time that nobody has taken the request, it begins with them.
    async fn begin(
        &self,
        request: &PreparedRequest,
        name: &Name,
    ) -> Result<(Arc<Version>, Vec<Sequence>), ApiError> {
        let serving = || self.pool.cluster().serving();
        let mut attempt = 0;
        loop {
            attempt += 1;
            let version = name.version.clone().or_else(serving);
            let version = version.ok_or_else(|| ApiError::unavailable("no weights serve yet"))?;
            let begun = self.begin_with(request, name, &version).await;
            let is_over = name.version.is_some() || serving().is_none_or(|now| now == version);
            match begun {
                Ok(sequences) => return Ok((version, sequences)),
                Err(error) if is_over || attempt >= VERSIONS_TRIED_MAX => return Err(error),
                Err(_) => {}
            }
        }
    }

    async fn begin_with(
        &self,
        request: &PreparedRequest,
        name: &Name,
        version: &Arc<Version>,
    ) -> Result<Vec<Sequence>, ApiError> {
        let mut starting = Vec::with_capacity(request.num_sequences());
        for (index, prompt) in request.prompts.iter().enumerate() {
            let of = (name, version);
            starting.extend(self.sequences(request, prompt, index, of)?);
        }
        try_join_all(starting).await
    }

    /// The sequences of one prompt, all to start on the same worker: they share its prefix cache.
    fn sequences(
        &self,
        request: &PreparedRequest,
        prompt: &PreparedPrompt,
        prompt_index: usize,
        (name, version): (&Name, &Arc<Version>),
    ) -> Result<Vec<BoxStart>, ApiError> {
        let salt = self.tenants.salt(&name.caller.tenant);
        let blocks = self.pool.blocks(version, &prompt.ids, salt);
        let Some(worker) = self.pool.pick(version, &blocks, &[]) else {
            let reason = self.pool.cluster().check_version(version).err();
            return Err(ApiError::unavailable(
                reason.unwrap_or_else(|| "no worker is ready".to_owned()),
            ));
        };
        let mut starting: Vec<BoxStart> = Vec::with_capacity(request.n as usize);
        for i in 0..request.n {
            let mut params = request.params(prompt, choice_seed(request.sampling.seed, i));
            if i > 0 {
                // The first answer to a prompt tells of it for all.
                params.prompt_logprobs = None;
            }
            let choice = prompt_index * request.n as usize + i as usize;
            let mut text = AnswerText::new(
                &self.tokenizer,
                &params,
                request.stop.clone(),
                prompt.is_chat,
            );
            if request.reads_calls {
                text = text.with_calls(&self.tokenizer, name.answer, choice);
            }
            let id = format!("{}-{choice}", name.request);
            let (ids, version) = ((Arc::clone(&prompt.ids), salt), Arc::clone(version));
            let mut sequence = Sequence {
                choice,
                pool: Arc::clone(&self.pool),
                metrics: Arc::clone(&self.metrics),
                patience: self.patience,
                entry: self.journal.open(id, ids, params, version),
                blocks: blocks.clone(),
                text,
                constraint_name: request.constraint_name,
                state: State::default(),
            };
            let worker = Arc::clone(&worker);
            starting.push(Box::pin(async move {
                sequence.start(worker).await?;
                Ok(sequence)
            }));
        }
        Ok(starting)
    }
}

/// What one request and its answer are called, and whose they are.
#[derive(Debug)]
pub(crate) struct Name {
    /// In logs and on workers; no two requests have the same.
    pub(crate) request: String,
    pub(crate) answer: AnswerId,
    /// What an answer that is to go on began with; a new one begins with what serves.
    pub(crate) version: Option<Arc<Version>>,
    pub(crate) caller: Caller,
    /// Counts it until it is admitted; none where nobody counts.
    pub(crate) arrival: Option<Arrival>,
}

impl Name {
    /// The request's life, which outlasts the handler that started it.
    fn span(&self, request: &PreparedRequest) -> tracing::Span {
        let (request_id, sequences) = (&self.request, request.num_sequences());
        tracing::info_span!("generate", request_id, answer = %self.answer, sequences)
    }
}

type BoxStart = futures::future::BoxFuture<'static, Result<Sequence, ApiError>>;

/// Everything that a sequence says, up to its end or an error.
fn deltas(sequence: Sequence) -> impl futures::Stream<Item = Result<Delta, ApiError>> + Send {
    unfold(Some(sequence), |sequence| async move {
        let mut sequence = sequence?;
        match sequence.next().await {
            Ok(Some(delta)) => Some((Ok(delta), Some(sequence))),
            Ok(None) => None,
            Err(error) => Some((Err(error), None)),
        }
    })
}
