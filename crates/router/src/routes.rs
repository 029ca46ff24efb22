//! The HTTP routes: what is read from a request and what becomes of it. Every answer has an `x-request-id`,
//! every error has the OpenAI form.

use std::any::Any;
use std::sync::Arc;
use std::task::Poll;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Extension, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures::{StreamExt as _, poll};
use http::header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{HeaderName, StatusCode};
use serde_json::{Value, json};
use tokio::time::Instant;
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;
use tramontane_coordination::{GroupPlacements, Version};
use tramontane_runtime::{build_info, metrics as shared_metrics, trace_context};

use crate::answer::Answer;
use crate::answer_room::json_response;
use crate::asked::{Asked, EventId, Position, Tag, mismatch};
use crate::auth::{Door, Guard, guard};
use crate::body::{read_body, throw_away};
use crate::constraint;
use crate::dispatch::Name;
use crate::error::{ApiError, ErrorKind};
use crate::kept::{BodyDigest, KeyDigest};
use crate::metrics::Route;
use crate::openai::{
    self, ChatRender, CompletionRender, EventBytes, Failed, Form, Head, Parsed, Render,
    ResponseRender, StreamOptions, error_event, error_response, event_stream, fingerprint,
    held_stream, last_event, response_error,
};
use crate::request::{PreparedRequest, prepare};
use crate::request_id::{REQUEST_ID, RequestId};
use crate::run::{App, ServedModel};
use crate::tenants::Caller;
use crate::token_routes;

const PROCESSING_MS: HeaderName = HeaderName::from_static("openai-processing-ms");

/// All routes.
pub(crate) fn routes(app: &Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses))
        .route("/tokenize", post(token_routes::tokenize))
        .route("/detokenize", post(token_routes::detokenize))
        .route("/tokenizer_info", get(token_routes::tokenizer_info))
        .route("/health", get(token_routes::health))
        .route(
            "/ping",
            get(token_routes::health).post(token_routes::health),
        )
        .route("/load", get(token_routes::load))
        .route("/openapi.json", get(token_routes::openapi))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        // Around all of them, and around those that do not exist.
        .layer(middleware::from_fn_with_state(
            Guard::new(Door::Http, app),
            guard,
        ))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(name_request))
        .with_state(Arc::clone(app))
}

async fn name_request(mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = RequestId::unique();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("http", request_id = %id, %method, path);
    trace_context::join(&span, request.headers());
    request.extensions_mut().insert(id);
    let mut response = next.run(request).instrument(span).await;
    let value = id.header();
    response
        .headers_mut()
        .extend(value.map(|value| (REQUEST_ID, value)));
    let took = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    response.headers_mut().insert(PROCESSING_MS, took.into());
    response
}

fn panicked(_panic: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!("a request's code panicked");
    error_response(&ApiError::internal())
}

async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    answer(&app, id, Route::ChatCompletions, request).await
}

async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    answer(&app, id, Route::Completions, request).await
}

async fn responses(
    State(app): State<Arc<App>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Response {
    answer(&app, id, Route::Responses, request).await
}

async fn answer(app: &Arc<App>, id: RequestId, route: Route, request: Request) -> Response {
    let response = match generate(app, id, route, request).await {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(request = %id, kind = ?error.kind, %error, "request refused");
            error_response(&error)
        }
    };
    app.metrics.answered(route, response.status());
    response
}

async fn generate(
    app: &Arc<App>,
    id: RequestId,
    route: Route,
    request: Request,
) -> Result<Response, ApiError> {
    check_media_type(request.headers())?;
    // Of the layer around all routes; without it nobody has asked.
    let caller = request.extensions().get::<Caller>().cloned();
    let caller = caller.ok_or_else(ApiError::internal)?;
    let asked = Asked::read(request.headers(), &caller.tenant, id.answer().created())?;
    if let Err(error) = app.dispatcher.knock(&caller) {
        throw_away(app, request.into_body());
        return Err(error);
    }
    let mut name = Name {
        request: id.to_string(),
        answer: asked.answer().unwrap_or(id.answer()),
        version: None,
        caller,
        arrival: None,
    };
    let read = read(app, request, (route, &mut name)).await?;
    if let Some(event) = &asked.resume {
        name.version = Some(resumed(app, event, &read)?);
        if event.position == Position::End {
            let rest = match route {
                Route::Responses => Body::empty(),
                _ => Body::from(last_event()),
            };
            return Ok(event_response(rest));
        }
    }
    let key = asked.key.map(|key| (key.digest, read.digest));
    let asking = Asking {
        route,
        seen: asked.resume.map(|event| event.position),
        form: read.form,
        digest: read.digest,
    };
    let is_new = name.version.is_none();
    if is_new && asking.form.stream && app.dispatcher.hold.would_hold(&app.cluster) {
        return held(app, asking, (read.request, name, key)).await;
    }
    let answer = start(app, (read.request, name, key)).await?;
    answer.check_seen(asking.seen.as_ref())?;
    if !asking.form.stream {
        let render = render(app, route, asking.form, &answer);
        return whole(app, answer, render).await;
    }
    Ok(event_response(Body::from_stream(
        asking.events(app, answer),
    )))
}

/// The weights that an answer began with that goes on after `event`.
fn resumed(app: &App, event: &EventId, read: &Read) -> Result<Arc<Version>, ApiError> {
    // Who has not seen the cluster yet does not know what it serves.
    app.cluster.check().map_err(ApiError::unavailable)?;
    if !read.form.stream {
        let message = "last-event-id is only allowed when stream is true";
        return Err(ApiError::invalid("last-event-id", message));
    }
    let version = event.version(read.digest, versions(app))?;
    event.check_choices(read.request.num_sequences())?;
    app.metrics.resumed();
    Ok(Arc::new(version))
}

/// What is asked for, how it is called, and the idempotency key if it has one.
type Start = (PreparedRequest, Name, Option<(KeyDigest, BodyDigest)>);

async fn start(app: &Arc<App>, (request, name, key): Start) -> Result<Answer, ApiError> {
    let resumed = name.version.clone();
    let answer = match key {
        Some(key) => app.dispatcher.start_keyed(request, name, key).await?,
        None => app.dispatcher.start(request, name).await?,
    };
    if resumed.is_some_and(|version| version != *answer.version()) {
        let message = "the answer of this idempotency-key began with other weights than that of last-event-id";
        return Err(mismatch(message));
    }
    Ok(answer)
}

/// How an answer is wanted.
struct Asking {
    route: Route,
    seen: Option<Position>,
    form: Form,
    digest: BodyDigest,
}

impl Asking {
    fn events(self, app: &App, answer: Answer) -> EventBytes {
        let render = render(app, self.route, self.form, &answer);
        let options = StreamOptions {
            keepalive: app.config.sse_keepalive,
            tag: Tag::of(self.digest, answer.version()),
            seen: self.seen,
        };
        event_stream(answer, render, options).boxed()
    }
}

/// The stream of an answer that nobody can make yet: it begins at once, with comments that tell how far the
/// workers are. What is refused at once is refused with its status.
async fn held(app: &Arc<App>, asking: Asking, asked: Start) -> Result<Response, ApiError> {
    let cluster = app.cluster.clone();
    let keepalive = app.config.sse_keepalive;
    let failed: Failed = match asking.route {
        Route::Responses => response_error,
        _ => error_event,
    };
    let app = Arc::clone(app);
    let mut starting = Box::pin(async move {
        let answer = start(&app, asked).await?;
        Ok(asking.events(&app, answer))
    });
    let events = match poll!(&mut starting) {
        Poll::Ready(started) => Body::from_stream(started?),
        Poll::Pending => Body::from_stream(held_stream(cluster, keepalive, failed, starting)),
    };
    Ok(event_response(events))
}

/// The weights that an answer can go on with: placed, and some worker has them.
fn versions(app: &App) -> Vec<Version> {
    let (members, placements) = (app.cluster.members(), app.cluster.placements());
    let placed = placements.groups.values().filter(|g| g.published.is_some());
    let versions = placed.filter_map(GroupPlacements::version);
    let is_there = |version: &Version| members.workers.values().any(|w| version.has(w));
    versions.filter(is_there).collect()
}

/// A body that was read and understood.
struct Read {
    form: Form,
    request: PreparedRequest,
    digest: BodyDigest,
}

async fn read(
    app: &Arc<App>,
    request: Request,
    (route, name): (Route, &mut Name),
) -> Result<Read, ApiError> {
    let (body, room) = read_body(app, request).await?;
    name.arrival = Some(app.dispatcher.arrive(&name.caller)?);
    let answer = name.answer;
    let (model, tokenizer) = (Arc::clone(&app.model), Arc::clone(&app.tokenizer));
    let tenant = &name.caller.tenant;
    let prepared = app.dispatcher.prepare(tenant, move || {
        let digest = BodyDigest::of(route.name(), &body);
        let Parsed { request, form } = parse(route, &body, &model)?;
        drop(body);
        let mut request = prepare(request, answer, &tokenizer, &model)?;
        request.repeated_bytes = form.repeats.len();
        // The body has become token ids and the form of the answer, which are counted as long as they wait.
        drop(room);
        Ok(Read {
            form,
            request,
            digest,
        })
    });
    let read: Read = prepared.await?;
    constraint::check(app, &name.caller.tenant, &read.request).await?;
    Ok(read)
}

fn render(app: &App, route: Route, form: Form, answer: &Answer) -> Box<dyn Render> {
    let id = answer.id();
    let head = |prefix| Head {
        id: format!("{prefix}{id}"),
        created: id.created(),
        model: app.model.id.clone(),
        system_fingerprint: fingerprint(answer.version()),
        tokenizer: (*app.tokenizer).clone(),
        logprobs: form.logprobs,
        include_usage: form.include_usage,
        include_metrics: form.include_metrics,
    };
    match route {
        Route::ChatCompletions => Box::new(ChatRender::new(head("chatcmpl-"))),
        Route::Responses => Box::new(ResponseRender::new(head("resp_"), form.repeats)),
        _ => {
            let num_choices = answer.num_choices();
            let head = head("cmpl-");
            Box::new(CompletionRender::new(head, num_choices))
        }
    }
}

fn parse(route: Route, body: &Bytes, model: &ServedModel) -> Result<Parsed, ApiError> {
    let json = openai::parse_json(body)?;
    match route {
        Route::ChatCompletions => openai::parse_chat(&json, model),
        Route::Responses => openai::parse_response(&json, model),
        _ => openai::parse_completion(&json, model),
    }
}

fn event_response(events: Body) -> Response {
    let mut response = Response::new(events);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies of the nginx kind collect a whole answer otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

async fn whole(
    app: &App,
    mut answer: Answer,
    mut render: Box<dyn Render>,
) -> Result<Response, ApiError> {
    let choices = answer.collect_with(|delta| render.note(delta)).await?;
    let spent = answer.spent();
    let written = app.answer_room.write(move || render.whole(&choices, spent));
    Ok(json_response(app.answer_room.hold(written.await?).await?))
}

/// A body is JSON as it is: nothing is decompressed, so that what is small on the wire is small in memory.
pub(crate) fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
    for value in headers.get_all(CONTENT_ENCODING) {
        if !value.as_bytes().eq_ignore_ascii_case(b"identity") {
            let message =
                "content-encoding must be identity or absent: bodies are not decompressed";
            return Err(ApiError::new(ErrorKind::MediaType, message).at("content-encoding"));
        }
    }
    let Some(value) = headers.get(CONTENT_TYPE) else {
        return Ok(());
    };
    let media_type = value
        .to_str()
        .unwrap_or_default()
        .split(';')
        .next()
        .unwrap_or_default();
    let media_type = media_type.trim().to_ascii_lowercase();
    let is_json = media_type == "application/json"
        || (media_type.starts_with("application/") && media_type.ends_with("+json"));
    if is_json {
        return Ok(());
    }
    let message = "content-type must be application/json";
    Err(ApiError::new(ErrorKind::MediaType, message))
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let serving = app.cluster.serving();
    Json(openai::models(&app.model, serving.as_deref(), app.started))
}

async fn model(State(app): State<Arc<App>>, id: Result<Path<String>, PathRejection>) -> Response {
    let Ok(Path(id)) = id else {
        let message = "the model's name in the path must be percent-encoded UTF-8, got other bytes";
        return error_response(&ApiError::invalid("model", message));
    };
    match app.model.check(Some(&id)) {
        Ok(()) => {
            let serving = app.cluster.serving();
            let served = (&*app.model, serving.as_deref());
            Json(openai::model(served, &id, app.started)).into_response()
        }
        Err(error) => error_response(&error),
    }
}

/// The process answers: that is all that liveness says, so that no outage elsewhere restarts it.
async fn live() -> Json<Value> {
    Json(json!({ "live": true }))
}

async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.ready.check() {
        Ok(()) => Json(json!({ "ready": true })).into_response(),
        Err(reason) => {
            let body = Json(json!({ "ready": false, "reason": reason }));
            (StatusCode::SERVICE_UNAVAILABLE, body).into_response()
        }
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    (
        [(CONTENT_TYPE, shared_metrics::CONTENT_TYPE)],
        app.render_metrics(),
    )
        .into_response()
}

async fn version() -> Json<Value> {
    Json(json!({ "version": build_info::VERSION }))
}

/// Routes of such servers that this one does not have, with what to use instead.
async fn not_found(request: Request) -> Response {
    let path = request.uri().path();
    let message = match path {
        _ if path.starts_with("/v1/embeddings") => {
            "this server generates text and has no embeddings"
        }
        _ if path.starts_with("/v1/responses/") => "responses are not kept by this server",
        _ if path.starts_with("/v1/chat/completions/") => "completions are not kept by this server",
        "/chat/completions" | "/completions" | "/models" | "/responses" => {
            "there is no such route; the API is below /v1"
        }
        _ => "there is no such route; /openapi.json lists all",
    };
    error_response(&ApiError::new(ErrorKind::NotFound, message))
}

async fn method_not_allowed() -> Response {
    error_response(&ApiError::new(
        ErrorKind::MethodNotAllowed,
        "this route has another method",
    ))
}
