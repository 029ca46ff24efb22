//! The answering side: greets, counts credits, and hands calls to the expert server. Computes nothing.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::mpsc::{self, OwnedPermit};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming, transport::Server};
use tramontane_proto::v1::{
    self,
    expert_exchange_server::{ExpertExchange, ExpertExchangeServer},
    expert_frame::Kind,
};
use tramontane_types::WorkerId;

use super::{
    CONNECTION_STREAMS_MAX, CREDITS, CREDITS_MAX, EXCHANGE_STREAMS_MAX, Group, HTTP2_FRAME_BYTES,
    LinkSettings, codec,
};
use crate::faults::{Faults, Gate};
use crate::host::new_caller;
use crate::mutation::{Mutation, is_on};
use crate::rhythm::Caller;
use crate::stats::add;
use crate::{ExpertServerHandle, Refusal, ReplySender};

/// How long a caller may take for its hello.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// Refusals of calls beyond the credits that may wait to be sent; then we stop reading.
const OVERDRAFT: usize = 4;

/// Who answers, and for whom.
#[derive(Clone, Debug)]
pub struct ExpertServiceConfig {
    /// The answering worker.
    pub me: WorkerId,
    /// Name of the cluster.
    pub cluster: String,
    /// Fingerprint of the checkpoint.
    pub model: String,
    /// Calls that one stream may have open.
    pub credits: usize,
    /// Streams that are served at once, those that have not greeted yet included.
    pub streams_max: usize,
    /// What may go wrong on purpose; `None` where nothing may.
    pub faults: Option<Arc<Faults>>,
}

impl ExpertServiceConfig {
    /// The configuration with the default numbers of credits and streams.
    #[must_use]
    pub const fn new(me: WorkerId, cluster: String, model: String) -> Self {
        Self {
            me,
            cluster,
            model,
            credits: CREDITS,
            streams_max: EXCHANGE_STREAMS_MAX,
            faults: None,
        }
    }
}

/// The tonic service `ExpertExchange` in front of an [`ExpertServer`](crate::ExpertServer).
#[derive(Clone, Debug)]
pub struct ExpertService {
    config: ExpertServiceConfig,
    server: ExpertServerHandle,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    frames_dropped: Arc<AtomicU64>,
    /// A place for every stream that may still come.
    streams: Arc<Semaphore>,
}

impl ExpertService {
    /// A service in front of `server`. Its tasks are counted by `tasks`; with `shutdown` it reads no
    /// further call, answers those it has, and ends its streams.
    #[must_use]
    pub fn new(
        mut config: ExpertServiceConfig,
        server: ExpertServerHandle,
        shutdown: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        config.credits = config.credits.clamp(1, CREDITS_MAX);
        config.streams_max = config.streams_max.clamp(1, Semaphore::MAX_PERMITS);
        let streams = Arc::new(Semaphore::new(config.streams_max));
        Self {
            config,
            server,
            shutdown,
            tasks,
            frames_dropped: Arc::default(),
            streams,
        }
    }

    /// Frames that were no calls and were dropped, readable from any thread.
    #[must_use]
    pub fn frames_dropped(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.frames_dropped)
    }

    /// The service with its message limits set, to be added to a server.
    #[must_use]
    pub fn into_service(self) -> ExpertExchangeServer<Self> {
        let limits = self.server.limits();
        ExpertExchangeServer::new(self)
            .max_decoding_message_size(limits.request_bytes_max())
            .max_encoding_message_size(limits.reply_bytes_max())
    }

    /// Sets what the connections of expert calls need on the server that carries them.
    #[must_use]
    pub fn tune(server: Server, link: LinkSettings) -> Server {
        server
            .tcp_nodelay(true)
            .http2_keepalive_interval(Some(link.keepalive_interval))
            .http2_keepalive_timeout(Some(link.keepalive_timeout))
            .max_concurrent_streams(Some(CONNECTION_STREAMS_MAX))
            .max_frame_size(HTTP2_FRAME_BYTES)
            .initial_stream_window_size(link.stream_window_bytes)
            .initial_connection_window_size(link.connection_window_bytes)
    }

    /// Takes the place of one stream, for as long as the permit lives.
    fn take_place(&self) -> Result<OwnedSemaphorePermit, Status> {
        let place = Arc::clone(&self.streams).try_acquire_owned();
        place.map_err(|_none| {
            let max = self.config.streams_max;
            tracing::warn!(
                max,
                "a stream of expert calls was refused, too many are open"
            );
            Status::resource_exhausted(format!("{max} streams of expert calls are open already"))
        })
    }

    /// Reads the caller's hello and compares it with ours.
    async fn greet(
        &self,
        incoming: &mut Streaming<v1::ExpertFrame>,
    ) -> Result<(v1::Hello, Option<Gate>), Status> {
        let first = tokio::time::timeout(HELLO_TIMEOUT, incoming.message())
            .await
            .map_err(|_elapsed| Status::deadline_exceeded("no hello came"))??;
        let Some(Kind::Hello(theirs)) = first.and_then(|frame| frame.kind) else {
            return Err(Status::invalid_argument("the first frame is not a hello"));
        };
        let group = Group {
            cluster: &self.config.cluster,
            numeric_class: self.server.numeric_class(),
            model: &self.config.model,
        };
        group.check(&theirs).map_err(Status::failed_precondition)?;
        let gate = Gate::new(self.config.faults.as_ref(), &theirs.worker_id);
        if let Some(gate) = &gate {
            let heard = gate.hear(HELLO_TIMEOUT).await;
            heard.map_err(|_elapsed| Status::deadline_exceeded("no hello came"))?;
        }
        tracing::info!(worker = %codec::clip(theirs.worker_id), "expert calls accepted");
        let ours = group.hello(self.config.me.as_str(), self.config.credits);
        Ok((ours, gate))
    }

    /// Reads calls until the caller leaves or we stop. A place in the outgoing queue is taken before a
    /// frame is read: a caller that does not read its answers is not read either.
    async fn read_calls(
        self,
        mut incoming: Streaming<v1::ExpertFrame>,
        outgoing: mpsc::Sender<Result<v1::ExpertFrame, Status>>,
        gate: Option<Gate>,
    ) {
        let from = Calling {
            caller: new_caller(),
            open: Arc::default(),
            gate,
        };
        let server = self.server.clone();
        let _gone = Gone(&server, from.caller);
        while let Ok(place) = outgoing.clone().reserve_owned().await {
            match incoming.message().await {
                Ok(Some(v1::ExpertFrame {
                    kind: Some(Kind::Call(call)),
                })) => {
                    self.accept(&from, call, place);
                }
                Ok(Some(_)) => add(&self.frames_dropped, 1),
                Ok(None) => return,
                Err(status) => {
                    tracing::debug!(%status, "stream of expert calls ended");
                    return;
                }
            }
        }
    }

    fn accept(
        &self,
        from: &Calling,
        call: v1::ExpertCall,
        place: OwnedPermit<Result<v1::ExpertFrame, Status>>,
    ) {
        let call_id = call.call_id;
        let epoch = self.server.epoch();
        let answer = move |answer| Ok(codec::answer_to_wire(call_id, answer, epoch));
        // Only this task adds to `open`, so the count can but fall between the two lines.
        if from.open.load(Ordering::Acquire) >= self.config.credits {
            place.send(answer(Err(Refusal::Busy)));
            return;
        }
        from.open.fetch_add(1, Ordering::AcqRel);
        let open = Arc::clone(&from.open);
        let reply = ReplySender::new(move |result| {
            // First the count: with the answer the caller may send its next call.
            if result.is_ok() || !is_on(Mutation::RefusalsKeepCredit) {
                open.fetch_sub(1, Ordering::AcqRel);
            }
            place.send(answer(result));
        });
        let Some(reply) = Gate::through(from.gate.as_ref(), reply) else {
            return;
        };
        match codec::call_from_wire(call) {
            Ok(call) => self.server.submit_from(from.caller, call, reply),
            Err(reason) => reply.send(Err(Refusal::Invalid(reason))),
        }
    }
}

/// Who calls on one stream.
struct Calling {
    caller: Caller,
    /// Calls that were not answered yet.
    open: Arc<AtomicUsize>,
    gate: Option<Gate>,
}

/// A stream of calls; dropped, its caller is not expected any more.
struct Gone<'a>(&'a ExpertServerHandle, Caller);

impl Drop for Gone<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1);
    }
}

#[tonic::async_trait]
impl ExpertExchange for ExpertService {
    type ExchangeStream = Answers;

    async fn exchange(
        &self,
        request: Request<Streaming<v1::ExpertFrame>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let place = self.take_place()?;
        let mut incoming = request.into_inner();
        let (hello, gate) = self.greet(&mut incoming).await?;
        // A place for every credit and for some refusals beyond them.
        let (outgoing, frames) = mpsc::channel(self.config.credits + OVERDRAFT);
        let hello = Ok(codec::frame(Kind::Hello(hello)));
        outgoing
            .try_send(hello)
            .map_err(|_full| Status::internal("no place for the hello"))?;
        let (service, shutdown) = (self.clone(), self.shutdown.clone());
        self.tasks.spawn(async move {
            let gone = outgoing.clone();
            let reading = service.read_calls(incoming, outgoing, gate);
            tokio::select! {
                biased;
                () = shutdown.cancelled() => {}
                () = gone.closed() => {}
                () = reading => {}
            }
        });
        Ok(Response::new(Answers {
            frames: ReceiverStream::new(frames),
            _place: place,
        }))
    }
}

/// The answers to one caller. They keep the stream's place until the caller has taken them or is gone.
#[derive(Debug)]
pub struct Answers {
    frames: ReceiverStream<Result<v1::ExpertFrame, Status>>,
    _place: OwnedSemaphorePermit,
}

impl Stream for Answers {
    type Item = Result<v1::ExpertFrame, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.frames).poll_next(context)
    }
}
