//! The gRPC service `Worker`: checks what comes in once, hands it to the engine, streams what comes out.
//! Never sees text.

use std::pin::Pin;
use std::sync::Arc;

use futures::{Stream, stream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tracing::{Instrument as _, Span};
use tramontane_coordination::WorkerState;
use tramontane_engine::NewSequence;
use tramontane_grammar::Matcher;
use tramontane_proto::v1::{
    self, sequence_event::Kind, worker_server::Worker, worker_server::WorkerServer,
};
use tramontane_proto::{InvalidWire, finish_reason_to_wire};
use tramontane_runtime::trace_context;
use tramontane_types::constraint::CONSTRAINT_BYTES_MAX;
use tramontane_types::{RequestId, SamplingParams};

use crate::engine_thread::{Generation, GenerationEvent};
use crate::state::Node;
use crate::status::GenerateError;

/// Longest id of a request.
pub(crate) const REQUEST_ID_BYTES_MAX: usize = 256;
/// Most tokens of one message: a reader that lags catches up in few messages of bounded size.
const TOKENS_PER_MESSAGE_MAX: usize = 64;
/// Encoded size of everything in a request but the prompt, at most.
const REQUEST_OVERHEAD_BYTES: usize = 64 * 1024 + CONSTRAINT_BYTES_MAX;
/// Encoded size of one prompt id, at most.
const PROMPT_ID_BYTES: usize = 5;
/// Characters of a version that an error repeats.
const NAMED_CHARS_MAX: usize = 64;

/// The service in front of one worker.
#[derive(Clone, Debug)]
pub(crate) struct GenerateService {
    node: Arc<Node>,
    drain: CancellationToken,
}

type EventStream = Pin<Box<dyn Stream<Item = Result<v1::SequenceEvent, Status>> + Send>>;

impl GenerateService {
    /// A service that cancels `drain` when it is asked to.
    pub(crate) const fn new(node: Arc<Node>, drain: CancellationToken) -> Self {
        Self { node, drain }
    }

    /// The service with its message limits set, to be added to a server.
    pub(crate) fn into_service(self) -> WorkerServer<Self> {
        let prompt_bytes = self
            .node
            .geometry
            .max_positions
            .saturating_mul(PROMPT_ID_BYTES);
        let limit = prompt_bytes.saturating_add(REQUEST_OVERHEAD_BYTES);
        WorkerServer::new(self).max_decoding_message_size(limit)
    }

    async fn start(
        &self,
        request: v1::GenerateSequenceRequest,
    ) -> Result<Generation, GenerateError> {
        let worker = || self.node.id.to_string();
        let Some(engine) = self.node.engine() else {
            return Err(GenerateError::NoAttention { worker: worker() });
        };
        self.check_version(&request)?;
        let new = check(request, self.node.geometry.vocab)?;
        if self.node.state() == WorkerState::Joining {
            return Err(GenerateError::NotReady { worker: worker() });
        }
        let matcher = self.matcher(&new).await?;
        Ok(engine.generate_in(new, matcher).await?)
    }

    /// The place of a constrained sequence in its grammar, behind what it has sampled elsewhere.
    async fn matcher(&self, new: &NewSequence) -> Result<Option<Matcher>, GenerateError> {
        let Some(constraint) = new.params.constraint.clone() else {
            return Ok(None);
        };
        let Some(grammars) = &self.node.grammars else {
            let worker = self.node.id.to_string();
            return Err(GenerateError::NoVocabulary { worker });
        };
        let num_prompt = new.prompt.len().saturating_sub(new.num_resumed);
        // Each tenant has a salt of its own.
        let (who, resumed) = (new.cache_salt, &new.prompt[num_prompt..]);
        let matcher = grammars.matcher(who, &constraint, resumed);
        Ok(Some(matcher.await?))
    }

    /// Another process of our name may have had other weights when the router looked last.
    fn check_version(&self, request: &v1::GenerateSequenceRequest) -> Result<(), GenerateError> {
        let version = &self.node.version;
        let pairs = [
            (&request.model, &version.model),
            (&request.numeric_class, &version.numeric_class),
        ];
        for (expected, got) in pairs {
            if !expected.is_empty() && **expected != **got {
                return Err(GenerateError::OtherWeights {
                    worker: self.node.id.to_string(),
                    expected: expected.chars().take(NAMED_CHARS_MAX).collect(),
                    got: got.to_string(),
                });
            }
        }
        Ok(())
    }
}

pub(crate) fn check(
    request: v1::GenerateSequenceRequest,
    vocab: usize,
) -> Result<NewSequence, GenerateError> {
    let (got, limit) = (request.request_id.len(), REQUEST_ID_BYTES_MAX);
    if got == 0 || got > limit {
        return Err(GenerateError::RequestId { got, limit });
    }
    let sampling = request.sampling.ok_or(InvalidWire::Missing {
        message: "GenerateSequenceRequest",
        field: "sampling",
    })?;
    let params = SamplingParams::try_from(sampling)?;
    params.validate(vocab)?;
    Ok(NewSequence {
        id: RequestId::new(&request.request_id),
        prompt: request.prompt_ids,
        num_resumed: request.num_resumed as usize,
        params,
        cache_salt: request.cache_salt,
    })
}

#[tonic::async_trait]
impl Worker for GenerateService {
    type GenerateStream = EventStream;

    async fn generate(
        &self,
        request: Request<v1::GenerateSequenceRequest>,
    ) -> Result<Response<EventStream>, Status> {
        let (worker, request_id) = (&self.node.id, request.get_ref().request_id.clone());
        let span = tracing::info_span!("sequence", %worker, request_id);
        trace_context::join(&span, request.metadata().as_ref());
        let started = self.start(request.into_inner()).instrument(span.clone());
        match started.await {
            Ok(generation) => {
                tracing::debug!(%worker, request_id, "sequence taken");
                let reader = Reader {
                    generation,
                    held: None,
                    _span: span,
                };
                Ok(Response::new(Box::pin(stream::unfold(
                    reader,
                    Reader::next,
                ))))
            }
            Err(error) => {
                tracing::debug!(%worker, request_id, %error, "sequence refused");
                Err(error.into())
            }
        }
    }

    async fn status(
        &self,
        _request: Request<v1::WorkerStatusRequest>,
    ) -> Result<Response<v1::WorkerStatus>, Status> {
        Ok(Response::new(self.node.status()))
    }

    async fn drain(
        &self,
        _request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        tracing::info!(worker = %self.node.id, "asked to drain");
        self.drain.cancel();
        Ok(Response::new(v1::DrainResponse {}))
    }

    async fn drill(
        &self,
        request: Request<v1::DrillRequest>,
    ) -> Result<Response<v1::DrillReport>, Status> {
        Ok(Response::new(
            self.node.drills.start(request.get_ref()).await?,
        ))
    }
}

/// Turns events into messages; tokens that wait travel together.
struct Reader {
    generation: Generation,
    /// An event that came behind the tokens of the last message.
    held: Option<GenerationEvent>,
    /// Lasts as long as its answer is read.
    _span: Span,
}

impl Reader {
    async fn next(mut self) -> Option<(Result<v1::SequenceEvent, Status>, Self)> {
        let event = match self.held.take() {
            Some(event) => event,
            None => self.generation.next().await?,
        };
        let kind = match event {
            GenerationEvent::Started { cached_tokens } => {
                Kind::Started(v1::SequenceStarted { cached_tokens })
            }
            GenerationEvent::PromptTokens(tokens) => {
                let tokens = tokens.iter().map(v1::SampledToken::from).collect();
                Kind::PromptTokens(v1::SampledTokens { tokens })
            }
            GenerationEvent::Token(token) => {
                let mut tokens = vec![v1::SampledToken::from(&token)];
                self.take_waiting(&mut tokens);
                Kind::Tokens(v1::SampledTokens { tokens })
            }
            GenerationEvent::Finished { reason, usage } => Kind::Finished(v1::SequenceFinished {
                reason: finish_reason_to_wire(reason).into(),
                usage: Some(usage.into()),
            }),
            GenerationEvent::Failed(failure) => {
                return Some((Err(GenerateError::from(failure).into()), self));
            }
        };
        Some((Ok(v1::SequenceEvent { kind: Some(kind) }), self))
    }

    fn take_waiting(&mut self, tokens: &mut Vec<v1::SampledToken>) {
        while tokens.len() < TOKENS_PER_MESSAGE_MAX {
            match self.generation.try_next() {
                Some(GenerationEvent::Token(token)) => tokens.push((&token).into()),
                other => {
                    self.held = other;
                    return;
                }
            }
        }
    }
}
