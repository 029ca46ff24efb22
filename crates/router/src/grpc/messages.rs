//! What comes before every method of both gRPC doors: the message of a call is read whole, within the limits on the
//! size, the time and the memory of HTTP bodies, and the caller's deadline runs. tonic has limits on the size alone:
//! calls whose message never ends would hold memory for ever, and it takes messages that cannot be decoded for a fault
//! of the server.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::Stream;
use futures::stream::unfold;
use http_body_util::BodyExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};

use super::HEALTH;
use super::deadline::Deadline;
use super::parts::{FRAME_BYTES, Shapes};
use super::status::{refusal, status};
use crate::auth::{PUBLIC, is_listed};
use crate::body::{newcomer, read_message};
use crate::body_room::{ArrivingBody, Share};
use crate::error::{ApiError, ErrorKind};
use crate::run::App;

/// Largest message of a health check: the name of a service.
pub(super) const HEALTH_BYTES_MAX: usize = 4 << 10;
/// Longest time for a message of those that nobody has to be known for: one packet, which probes send with the head.
pub(super) const PUBLIC_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest question of reflection: a name, or that of a file.
pub(super) const REFLECTION_BYTES_MAX: usize = 64 << 10;
/// Reflection is a stream of questions, the only one that clients may send. One that asks nothing for so long ends:
/// tools that look things up again open another.
const REFLECTION_SILENCE_MAX: Duration = Duration::from_secs(75);
/// Most bytes of all questions of one stream: no tool asks a thousand.
const QUESTIONS_BYTES_MAX: usize = 1 << 20;
/// Calls that follow the health of a door at once: they end when their clients want, who need not be known.
const WATCHES_MAX: usize = 1024;
const WATCH: &str = "/grpc.health.v1.Health/Watch";
/// Services whose calls send more than one message.
const STREAMS: [&str; 2] = [
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
];

/// The memory of a call's message, for as long as somebody keeps this.
#[derive(Clone, Debug)]
pub(super) struct Room {
    _share: Arc<Share>,
}

impl Room {
    /// That of this call; must be asked for before the message is taken out.
    pub(super) fn of<T>(request: &tonic::Request<T>) -> Option<Self> {
        request.extensions().get::<Self>().cloned()
    }
}

/// The memory of a call's answer, until its client has taken it.
#[derive(Clone, Debug)]
struct AnswerShare {
    _share: Arc<OwnedSemaphorePermit>,
}

/// The answer with its share of the memory of answers.
pub(super) async fn with_room<T: prost::Message>(
    app: &App,
    answer: T,
) -> Result<tonic::Response<T>, ApiError> {
    let share = app.answer_room.share(answer.encoded_len()).await?;
    let mut response = tonic::Response::new(answer);
    if let Some(share) = share {
        let _share = Arc::new(share);
        response.extensions_mut().insert(AnswerShare { _share });
    }
    Ok(response)
}

/// What the layer goes by.
#[derive(Clone, Debug)]
pub(super) struct Reader {
    app: Arc<App>,
    shapes: Arc<Shapes>,
    /// Places of those that follow the health.
    watches: Arc<Semaphore>,
}

/// Reads the message, then lets the method have it.
pub(super) async fn read(State(reader): State<Reader>, request: Request, next: Next) -> Response {
    let deadline = Deadline::of_call(request.headers());
    let answering = async {
        let watch = reader.watch(&request)?;
        let request = reader.with_message(request).await?;
        let mut response = next.run(request).await;
        let share = response.extensions_mut().remove::<AnswerShare>();
        if watch.is_none() && share.is_none() {
            return Ok(response);
        }
        // They are somebody else's when it ends.
        Ok(response.map(|body| {
            Body::new(body.map_frame(move |frame| {
                let _kept = (&watch, &share);
                frame
            }))
        }))
    };
    let answered = deadline.meet(answering).await;
    answered.unwrap_or_else(|error| {
        tracing::debug!(kind = ?error.kind, %error, "call refused");
        refusal(&error)
    })
}

impl Reader {
    pub(super) fn new(app: Arc<App>, shapes: Shapes) -> Self {
        Self {
            app,
            shapes: Arc::new(shapes),
            watches: Arc::new(Semaphore::new(WATCHES_MAX)),
        }
    }

    /// The place of a call that follows the health, if it is one.
    fn watch(&self, request: &Request) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        if request.uri().path() != WATCH {
            return Ok(None);
        }
        let place = Arc::clone(&self.watches).try_acquire_owned();
        place.map(Some).map_err(|_none_left| {
            let message =
                format!("health is followed by {WATCHES_MAX} calls, the most there may be");
            ApiError::new(ErrorKind::QueueFull, message)
        })
    }

    async fn with_message(&self, request: Request) -> Result<Request, ApiError> {
        let app = &self.app;
        let (mut parts, body) = request.into_parts();
        let service = parts.uri.path().split('/').nth(1).unwrap_or_default();
        let is_public = is_listed(&PUBLIC, parts.uri.path());
        // The head is kept, for the method: it counts.
        let newcomer = newcomer((&parts.uri, &parts.headers), !is_public);
        if STREAMS.contains(&service) {
            let by = Instant::now() + app.config.body_timeout;
            let mut place = app.body_room.arrive(newcomer, by).await?;
            place.grow(REFLECTION_BYTES_MAX, by).await?;
            let body = Body::from_stream(questions(body, place));
            return Ok(Request::from_parts(parts, body));
        }
        let max = match service {
            HEALTH => HEALTH_BYTES_MAX,
            _ => app.config.body_bytes_max,
        };
        let mut limit = app.config.body_timeout;
        if is_public {
            limit = limit.min(PUBLIC_TIMEOUT);
        }
        let values = |body: &[u8]| self.shapes.values_bytes(parts.uri.path(), body);
        let limits = (max + FRAME_BYTES, limit);
        let read = read_message(app, (newcomer, body), limits, values).await;
        let (message, share) = read?;
        if let Some(share) = share {
            let _share = Arc::new(share);
            parts.extensions.insert(Room { _share });
        }
        Ok(Request::from_parts(parts, Body::from(message)))
    }
}

/// The data of a stream of questions. Its place holds memory for the one that arrives, and makes way for others.
fn questions(
    body: Body,
    place: ArrivingBody,
) -> impl Stream<Item = Result<Bytes, tonic::Status>> + Send {
    unfold(Some((body, place, 0)), |state| async move {
        let (mut body, place, size) = state?;
        let next = tokio::select! {
            next = timeout(REFLECTION_SILENCE_MAX, body.frame()) => next.map_err(|_elapsed| silent()),
            error = place.gives_up() => Err(error),
        };
        let data = match next {
            Ok(None) => return None,
            Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
            Ok(Some(Err(error))) => {
                let status = tonic::Status::from_error(error.into());
                return Some((Err(status), None));
            }
            Err(error) => return Some((Err(status(&error)), None)),
        };
        let size = size + data.len();
        if size > QUESTIONS_BYTES_MAX {
            let rule = format!("at most {QUESTIONS_BYTES_MAX} bytes");
            let message = format!("all questions of one stream must have {rule}, got {size}");
            let error = ApiError::new(ErrorKind::TooLarge, message);
            return Some((Err(status(&error)), None));
        }
        Some((Ok(data), Some((body, place, size))))
    })
}

fn silent() -> ApiError {
    let limit = humantime::format_duration(REFLECTION_SILENCE_MAX);
    let message = format!("no question came for {limit}");
    ApiError::new(ErrorKind::BodyTimeout, message)
}
