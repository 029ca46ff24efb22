//! The HTTP routes: what is read from a request and what becomes of it. Every answer has an `x-request-id`,
//! every error has the OpenAI form.

use std::any::Any;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Path, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::{Bytes, BytesMut};
use http::header::{CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use http::{HeaderName, StatusCode};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument as _;
use tramontane_coordination::{GroupPlacements, Version};
use tramontane_runtime::{build_info, metrics as shared_metrics};

use crate::answer::Answer;
use crate::answer_id::AnswerId;
use crate::asked::{Asked, Position, Tag, mismatch};
use crate::constraint;
use crate::dispatch::Name;
use crate::error::{ApiError, ErrorKind};
use crate::kept::BodyDigest;
use crate::metrics::Route;
use crate::openai::{
    self, ChatRender, CompletionRender, Head, Parsed, Render, StreamOptions, error_response,
    event_stream, fingerprint, last_event,
};
use crate::request::{PreparedRequest, prepare};
use crate::run::{App, ServedModel, unix_seconds};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A body that is too large is refused at once, but read and thrown away up to this many times the limit,
/// so that a client that sends first and reads later sees the refusal instead of a broken connection.
const DISCARD_FACTOR: usize = 4;

/// Name of one HTTP request in logs and answers; never a client's own. Its answer has the same one unless the
/// client asks for an answer that has a name already.
#[derive(Clone, Copy, Debug)]
struct HttpRequestId(AnswerId);

impl std::fmt::Display for HttpRequestId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "req_{}", self.0)
    }
}

/// All routes.
pub(crate) fn routes(app: &Arc<App>) -> Router {
    Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(name_request))
        .with_state(Arc::clone(app))
}

async fn name_request(mut request: Request, next: Next) -> Response {
    let id = HttpRequestId(AnswerId::unique(unix_seconds()));
    let value = HeaderValue::from_str(&id.to_string());
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let span = tracing::info_span!("http", request_id = %id, %method, path);
    request.extensions_mut().insert(id);
    let mut response = next.run(request).instrument(span).await;
    if let Ok(value) = value {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    response
}

fn panicked(_panic: Box<dyn Any + Send + 'static>) -> Response {
    tracing::error!("a request's code panicked");
    error_response(&ApiError::internal())
}

async fn chat(
    State(app): State<Arc<App>>,
    Extension(id): Extension<HttpRequestId>,
    request: Request,
) -> Response {
    answer(&app, id, Route::ChatCompletions, request).await
}

async fn completions(
    State(app): State<Arc<App>>,
    Extension(id): Extension<HttpRequestId>,
    request: Request,
) -> Response {
    answer(&app, id, Route::Completions, request).await
}

async fn answer(app: &Arc<App>, id: HttpRequestId, route: Route, request: Request) -> Response {
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
    id: HttpRequestId,
    route: Route,
    request: Request,
) -> Result<Response, ApiError> {
    check_media_type(request.headers())?;
    let asked = Asked::read(request.headers(), id.0.created())?;
    let mut name = Name {
        request: id.to_string(),
        answer: asked.answer().unwrap_or(id.0),
        version: None,
    };
    let read = read(app, route, request, name.answer).await?;
    let num_choices = read.request.num_sequences();
    if let Some(event) = &asked.resume {
        // Who has not seen the cluster yet does not know what it serves.
        app.cluster.check().map_err(ApiError::unavailable)?;
        if !read.parsed.stream {
            let message = "last-event-id is only allowed when stream is true";
            return Err(ApiError::invalid("last-event-id", message));
        }
        let version = event.version(read.digest, versions(app))?;
        event.check_choices(num_choices)?;
        app.metrics.resumed();
        if event.position == Position::End {
            return Ok(event_response(Body::from(last_event())));
        }
        name.version = Some(Arc::new(version));
    }
    let resumed = name.version.clone();
    let answer = match asked.key {
        Some(key) => {
            let key = (key.digest, read.digest);
            app.dispatcher.start_keyed(read.request, name, key).await?
        }
        None => app.dispatcher.start(read.request, name).await?,
    };
    if resumed.is_some_and(|version| version != *answer.version()) {
        let message = "the answer of this idempotency-key began with other weights than that of last-event-id";
        return Err(mismatch(message));
    }
    let parsed = read.parsed;
    let render = render(app, route, &parsed, &answer);
    if !parsed.stream {
        return whole(answer, render).await;
    }
    let options = StreamOptions {
        include_usage: parsed.include_usage,
        keepalive: app.config.sse_keepalive,
        tag: Tag::of(read.digest, answer.version()),
        seen: asked.resume.map(|event| event.position),
    };
    let events = event_stream(answer, render, options);
    Ok(event_response(Body::from_stream(events)))
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
    parsed: Parsed,
    request: PreparedRequest,
    digest: BodyDigest,
}

async fn read(
    app: &Arc<App>,
    route: Route,
    request: Request,
    answer: AnswerId,
) -> Result<Read, ApiError> {
    let (body, room) = read_body(app, request).await?;
    let (model, tokenizer) = (Arc::clone(&app.model), Arc::clone(&app.tokenizer));
    let prepared = app.dispatcher.prepare(move || {
        let digest = BodyDigest::of(route.name(), &body);
        let parsed = parse(route, &body, &model)?;
        drop(body);
        let request = prepare(parsed.request.clone(), answer, &tokenizer, &model)?;
        // The body has become token ids.
        drop(room);
        Ok(Read {
            parsed,
            request,
            digest,
        })
    });
    let read: Read = prepared.await?;
    constraint::check(&app.grammars, &read.request).await?;
    Ok(read)
}

fn render(app: &App, route: Route, parsed: &Parsed, answer: &Answer) -> Box<dyn Render> {
    let id = answer.id();
    let head = |prefix| Head {
        id: format!("{prefix}-{id}"),
        created: id.created(),
        model: app.model.id.clone(),
        system_fingerprint: fingerprint(answer.version()),
        tokenizer: (*app.tokenizer).clone(),
        logprobs: parsed.logprobs,
        include_usage: parsed.include_usage,
    };
    match route {
        Route::ChatCompletions => Box::new(ChatRender::new(head("chatcmpl"))),
        _ => Box::new(CompletionRender::new(head("cmpl"), answer.num_choices())),
    }
}

fn parse(route: Route, body: &Bytes, model: &ServedModel) -> Result<Parsed, ApiError> {
    let json = openai::parse_json(body)?;
    match route {
        Route::ChatCompletions => openai::parse_chat(&json, model),
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

async fn whole(mut answer: Answer, render: Box<dyn Render>) -> Result<Response, ApiError> {
    let choices = answer.collect().await?;
    Ok(Json(render.whole(&choices, answer.usage())).into_response())
}

fn check_media_type(headers: &HeaderMap) -> Result<(), ApiError> {
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

fn declared_size(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The whole body, within the limits of size and time, and the memory that it takes among all bodies.
/// Memory is taken as data arrives: who only announces a body holds up nobody.
async fn read_body(
    app: &App,
    request: Request,
) -> Result<(Bytes, Option<OwnedSemaphorePermit>), ApiError> {
    let deadline = Instant::now() + app.config.body_timeout;
    let max = app.config.body_bytes_max;
    let declared = declared_size(request.headers()).unwrap_or_default();
    let mut body = request.into_body();
    let mut bytes = BytesMut::new();
    let mut room = None;
    let mut is_too_large = declared > max;
    while !is_too_large {
        let frame = timeout_at(deadline, body.frame()).await;
        let frame = frame.map_err(|_elapsed| late_body(app))?;
        let Some(frame) = frame else {
            return Ok((bytes.freeze(), room));
        };
        let Ok(frame) = frame else {
            return Err(ApiError::new(ErrorKind::Invalid, "the body ended early"));
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        is_too_large = data.len() > max - bytes.len();
        if !is_too_large {
            grow_room(app, &mut room, bytes.len() + data.len(), deadline).await?;
            bytes.extend_from_slice(&data);
        }
    }
    let discarding = discard(body, max.saturating_mul(DISCARD_FACTOR));
    app.dispatcher
        .tasks
        .spawn(timeout(app.config.body_timeout, discarding));
    let message = format!("the body must have at most {max} bytes");
    Err(ApiError::new(ErrorKind::TooLarge, message))
}

fn late_body(app: &App) -> ApiError {
    let limit = humantime::format_duration(app.config.body_timeout);
    let message = format!("the body did not arrive within {limit}");
    ApiError::new(ErrorKind::BodyTimeout, message)
}

/// Waits for memory so that `room` covers `size` bytes.
async fn grow_room(
    app: &App,
    room: &mut Option<OwnedSemaphorePermit>,
    size: usize,
    deadline: Instant,
) -> Result<(), ApiError> {
    let held = room.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
    let missing = size.div_ceil(1024).saturating_sub(held);
    if missing == 0 {
        return Ok(());
    }
    let missing = u32::try_from(missing).unwrap_or(u32::MAX);
    let more = Arc::clone(&app.body_room).acquire_many_owned(missing);
    let Ok(Ok(more)) = timeout_at(deadline, more).await else {
        return Err(ApiError::unavailable(
            "too many large requests are being read",
        ));
    };
    match room {
        Some(room) => room.merge(more),
        None => *room = Some(more),
    }
    Ok(())
}

/// Reads up to `max` bytes of a body that was refused.
async fn discard(mut body: Body, max: usize) {
    let mut size = 0_usize;
    while let Some(Ok(frame)) = body.frame().await {
        size = size.saturating_add(frame.data_ref().map_or(0, Bytes::len));
        if size > max {
            return;
        }
    }
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let serving = app.cluster.serving();
    Json(openai::models(&app.model, serving.as_deref(), app.started))
}

async fn model(State(app): State<Arc<App>>, Path(id): Path<String>) -> Response {
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

async fn not_found() -> Response {
    error_response(&ApiError::new(
        ErrorKind::NotFound,
        "there is no such route",
    ))
}

async fn method_not_allowed() -> Response {
    error_response(&ApiError::new(
        ErrorKind::MethodNotAllowed,
        "this route has another method",
    ))
}
