//! `tramontane.v1.Inference`: messages become the same request as over HTTP, deltas become messages.

use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use futures::stream::unfold;
use tonic::{Request, Response, Status};
use tramontane_proto::v1::inference_server::Inference;
use tramontane_proto::{finish_reason_to_wire, v1};
use tramontane_types::{Constraint, FinishReason};

use super::conversation::{call_pieces, calls, conversation};
use super::deadline::Deadline;
use super::messages::with_room;
use super::status::{counted, status};
use super::{Arrived, arrived, start};
use crate::answer::Answer;
use crate::answer_id::AnswerId;
use crate::error::{ApiError, ErrorKind};
use crate::metrics::Route;
use crate::openai::{check_num_tokens, fingerprint};
use crate::request::{CONSTRAINT_NAME, GenerationRequest, Options, Prompt, chooses, prepare};
use crate::run::{App, ServedModel};

/// What names of answers begin with.
const NAME_PREFIX: &str = "gen-";

/// The service over what both doors share.
#[derive(Debug)]
pub(crate) struct InferenceService {
    app: Arc<App>,
}

impl InferenceService {
    pub(crate) const fn new(app: Arc<App>) -> Self {
        Self { app }
    }

    async fn start(&self, request: Request<v1::GenerateRequest>) -> Result<Answer, ApiError> {
        let arrived = arrived(&self.app, &request)?;
        let request = request.into_inner();
        let (model, tokenizer) = (Arc::clone(&self.app.model), Arc::clone(&self.app.tokenizer));
        let read = move |answer| {
            let request = generation_request(request, &model)?;
            prepare(request, answer, &tokenizer, &model).map_err(in_message)
        };
        start(&self.app, arrived, read, |error| error).await
    }

    /// Has `work` done for a call that no worker is needed for. It counts like any other request of its caller.
    async fn prepared<M, T>(
        &self,
        request: Request<M>,
        work: impl FnOnce(M) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<Response<T>, ApiError>
    where
        M: Send + 'static,
        T: prost::Message + 'static,
    {
        let Arrived {
            caller,
            arrival,
            room,
            ..
        } = arrived(&self.app, &request)?;
        let message = request.into_inner();
        let work = move || {
            let _counted = arrival;
            Ok((work(message)?, room))
        };
        // Until the answer has room of its own.
        let (answer, _room) = self.app.dispatcher.prepare(&caller.tenant, work).await?;
        with_room(&self.app, answer).await
    }

    fn answered<T>(&self, route: Route, result: Result<T, ApiError>) -> Result<T, Status> {
        counted(&self.app.metrics, route, result)
    }
}

type ResponseStream = Pin<Box<dyn Stream<Item = Result<v1::GenerateResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Inference for InferenceService {
    type GenerateStream = ResponseStream;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let deadline = Deadline::of(request.metadata());
        let options = request.get_ref().options.as_ref();
        let refused = options.map_or(Ok(()), fits_a_stream);
        let started = match deadline.and_then(|deadline| refused.map(|()| deadline)) {
            Ok(deadline) => deadline
                .meet(self.start(request))
                .await
                .map(|answer| (answer, deadline)),
            Err(error) => Err(error),
        };
        let (answer, deadline) = self.answered(Route::GrpcGenerate, started)?;
        Ok(Response::new(Box::pin(responses(answer, deadline))))
    }

    async fn generate_once(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResult>, Status> {
        let deadline = Deadline::of(request.metadata());
        let options = request.get_ref().options.as_ref();
        let reports = options.is_some_and(|asked| asked.logprobs.is_some());
        let work = async {
            // It runs until its message has room.
            let mut answer = self.start(request).await?;
            let name = self.app.model.id.clone();
            let result = collect(&mut answer, name, reports).await?;
            with_room(&self.app, result).await
        };
        let result = match deadline {
            Ok(deadline) => deadline.meet(work).await,
            Err(error) => Err(error),
        };
        self.answered(Route::GrpcGenerateOnce, result)
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let model = &self.app.model;
        let info = |id: &String| v1::ModelInfo {
            id: id.clone(),
            context_length: model.context_length,
            vocab_size: u32::try_from(model.vocab).unwrap_or(u32::MAX),
        };
        let models = std::iter::once(&model.id)
            .chain(&model.aliases)
            .map(info)
            .collect();
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let tokenizer = Arc::clone(&self.app.tokenizer);
        let ids = self.prepared(request, move |request| {
            let ids = if request.add_bos {
                tokenizer.encode_with_bos(&request.text)
            } else {
                tokenizer.encode(&request.text)
            };
            let ids = ids.map_err(|error| ApiError::from(error).at("text"))?;
            check_num_tokens(ids.len(), "text")?;
            Ok(v1::TokenizeResponse { ids })
        });
        self.answered(Route::GrpcTokenize, ids.await)
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let (model, tokenizer) = (Arc::clone(&self.app.model), Arc::clone(&self.app.tokenizer));
        let text = self.prepared(request, move |request| {
            let ids = request.ids;
            check_num_tokens(ids.len(), "ids")?;
            if let Some(id) = ids.iter().find(|&&id| id as usize >= model.vocab) {
                let message = format!("ids must be token ids below {}, got {id}", model.vocab);
                return Err(ApiError::invalid("ids", message));
            }
            let text = tokenizer.decode(&ids, false);
            Ok(v1::DetokenizeResponse { text })
        });
        self.answered(Route::GrpcDetokenize, text.await)
    }
}

/// Refuses what is only known when all answers have ended.
fn fits_a_stream(asked: &v1::GenerateOptions) -> Result<(), ApiError> {
    let (param, message) = if asked.prompt_logprobs.is_some() {
        (
            "prompt_logprobs",
            "prompt_logprobs are only given by GenerateOnce",
        )
    } else if chooses(asked.n, asked.best_of) {
        (
            "best_of",
            "best_of is only allowed with GenerateOnce, unless it equals n",
        )
    } else {
        return Ok(());
    };
    Err(ApiError::invalid(param, message).below("options"))
}

/// Ends with an error at the caller's deadline.
fn responses(
    answer: Answer,
    deadline: Deadline,
) -> impl Stream<Item = Result<v1::GenerateResponse, Status>> + Send {
    unfold(Some(answer), move |answer| async move {
        let mut answer = answer?;
        let next = deadline.meet(async { answer.next().await.transpose() });
        match next.await.transpose()? {
            Ok(delta) => {
                // The last delta of the last answer is the last message.
                let usage = answer.has_ended().then(|| answer.usage().into());
                let last = usage.is_some();
                let response = v1::GenerateResponse {
                    index: u32::try_from(delta.choice).unwrap_or(u32::MAX),
                    text: delta.text,
                    tokens: delta.tokens.iter().map(v1::SampledToken::from).collect(),
                    finish_reason: delta.finish.map(|r| finish_reason_to_wire(r) as i32),
                    usage,
                    system_fingerprint: last.then(|| fingerprint(answer.version())),
                    tool_calls: call_pieces(delta.calls),
                };
                Some((Ok(response), Some(answer)))
            }
            Err(error) => Some((Err(status(&error)), None)),
        }
    })
}

/// The name of an answer.
fn answer_name(id: AnswerId) -> String {
    format!("{NAME_PREFIX}{id}")
}

/// All answers; `reports` says whether log probabilities were asked for, which the best ones are also found by.
async fn collect(
    answer: &mut Answer,
    model: String,
    reports: bool,
) -> Result<v1::GenerateResult, ApiError> {
    let choices = answer.collect().await?;
    let mut answers = Vec::with_capacity(choices.len());
    for (index, mut choice) in choices.into_iter().enumerate() {
        if !reports {
            choice
                .tokens
                .iter_mut()
                .for_each(|token| token.logprob = None);
        }
        answers.push(v1::Answer {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            text: choice.text,
            tokens: choice.tokens.iter().map(v1::SampledToken::from).collect(),
            finish_reason: finish_reason_to_wire(choice.finish.unwrap_or(FinishReason::Length))
                as i32,
            tool_calls: calls(choice.calls),
            prompt_tokens: choice
                .prompt_tokens
                .iter()
                .map(v1::SampledToken::from)
                .collect(),
        });
    }
    Ok(v1::GenerateResult {
        id: answer_name(answer.id()),
        model,
        answers,
        usage: Some(answer.usage().into()),
        system_fingerprint: fingerprint(answer.version()),
    })
}

/// Checks a message.
pub(crate) fn generation_request(
    message: v1::GenerateRequest,
    model: &ServedModel,
) -> Result<GenerationRequest, ApiError> {
    use v1::generate_request::Input;
    model.check(Some(message.model.as_str()).filter(|name| !name.is_empty()))?;
    let mut options = options(message.options.unwrap_or_default())?;
    let suffix = message.suffix;
    if !suffix.is_empty() && !matches!(message.input, Some(Input::Prompt(_))) {
        let message = "suffix is only allowed with prompt";
        return Err(ApiError::invalid("suffix", message));
    }
    let prompt = match message.input {
        Some(Input::Prompt(prompt)) if !suffix.is_empty() => Prompt::Infill { prompt, suffix },
        Some(Input::Prompt(text)) => Prompt::Text(text),
        Some(Input::PromptIds(ids)) => Prompt::Ids(ids.ids),
        Some(Input::Chat(chat)) => {
            let (chat, tool_use) = conversation(chat)?;
            options.tool_use = tool_use;
            Prompt::Chat(chat)
        }
        None => {
            let message = "one of prompt, prompt_ids and chat is required";
            return Err(ApiError::invalid("input", message));
        }
    };
    GenerationRequest::new(vec![prompt], &options, model).map_err(in_options)
}

fn options(wire: v1::GenerateOptions) -> Result<Options, ApiError> {
    let constraint = wire.constraint.map(Constraint::try_from).transpose();
    let constraint = constraint.map_err(|_no_kind| {
        let message = format!("{CONSTRAINT_NAME} must be one of its kinds, got none");
        ApiError::invalid(CONSTRAINT_NAME, message)
    })?;
    Ok(Options {
        temperature: wire.temperature,
        top_k: wire.top_k,
        top_p: wire.top_p,
        min_p: wire.min_p,
        presence_penalty: wire.presence_penalty,
        frequency_penalty: wire.frequency_penalty,
        repetition_penalty: wire.repetition_penalty,
        logit_bias: wire.logit_bias.iter().map(|b| (b.id, b.bias)).collect(),
        seed: wire.seed,
        max_tokens: wire.max_tokens,
        max_tokens_name: None,
        min_tokens: wire.min_tokens,
        stop: wire.stop,
        stop_token_ids: wire.stop_token_ids,
        ignore_eos: wire.ignore_eos,
        logprobs: wire.logprobs,
        logprobs_name: Some("logprobs"),
        prompt_logprobs: wire.prompt_logprobs,
        n: wire.n,
        best_of: wire.best_of,
        bad_words: wire.bad_words,
        priority: wire.priority,
        constraint_name: constraint.is_some().then_some(CONSTRAINT_NAME),
        constraint: constraint.map(Arc::new),
        ..Options::default()
    })
}

/// The path of a field of the options, or of the tools.
fn in_options(error: ApiError) -> ApiError {
    match error.param.as_deref() {
        Some("tools" | "tool_choice") => error.below("chat"),
        Some(CONSTRAINT_NAME) => error,
        _ => error.below("options"),
    }
}

/// The path of a field as it is in the message instead of in an HTTP body.
fn in_message(error: ApiError) -> ApiError {
    if error.kind == ErrorKind::Internal {
        return error;
    }
    match error.param.as_deref() {
        Some("max_tokens" | "min_tokens" | "logprobs" | "prompt_logprobs" | "best_of") => {
            error.below("options")
        }
        Some(param) if param.starts_with("bad_words") => error.below("options"),
        Some(param) if param.starts_with("messages") || param.starts_with("tool") => {
            error.below("chat")
        }
        _ => error,
    }
}
