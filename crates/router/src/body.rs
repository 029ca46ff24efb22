//! Bodies of requests, read within limits on their size, their time and the memory of all of them together: JSON of
//! HTTP, and messages of gRPC calls that have one.

use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use http::Uri;
use http::header::{CONTENT_LENGTH, HeaderMap};
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout, timeout_at};

use crate::body_room::{ArrivingBody, Newcomer, Share};
use crate::error::{ApiError, ErrorKind};
use crate::json_marks::{BODY_MARKS_MAX, JsonMarks};
use crate::run::App;

/// A body that is too large is refused at once, but read and thrown away up to this many times the limit,
/// so that a client that sends first and reads later sees the refusal instead of a broken connection.
const DISCARD_FACTOR: usize = 4;
/// Memory of a body of which nothing has come yet, beside its head: its stream, its task and the buffers of both.
pub(crate) const ARRIVING_BYTES: usize = 16 << 10;
/// Memory of one header beside its bytes: its entries in the map, which holds room for more.
const HEADER_BYTES: usize = 256;

/// What one body may take.
struct BodyLimits {
    bytes_max: usize,
    marks: Option<JsonMarks>,
    timeout: Duration,
}

/// The body of a request with this head.
pub(crate) fn newcomer((uri, headers): (&Uri, &HeaderMap), is_known: bool) -> Newcomer {
    let mut bytes = ARRIVING_BYTES + uri.path().len() + uri.query().map_or(0, str::len);
    for (name, value) in headers {
        bytes += HEADER_BYTES + name.as_str().len() + value.len();
    }
    Newcomer { bytes, is_known }
}

fn declared_size(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The whole body of JSON, within the limits of size and time, and the memory that it and its values take.
pub(crate) async fn read_body(
    app: &App,
    request: Request,
) -> Result<(Bytes, Option<Share>), ApiError> {
    let max = app.config.body_bytes_max;
    let declared = declared_size(request.headers()).unwrap_or_default();
    let newcomer = newcomer((request.uri(), request.headers()), true);
    let mut body = request.into_body();
    let read = if declared > max {
        Err(too_large(max))
    } else {
        let limits = BodyLimits {
            bytes_max: max,
            marks: Some(JsonMarks::at_most(BODY_MARKS_MAX)),
            timeout: app.config.body_timeout,
        };
        let read = read_whole(app, (newcomer, &mut body), limits);
        read.await
            .map(|(bytes, arriving)| (bytes, arriving.arrived()))
    };
    if let Err(error) = &read
        && error.kind == ErrorKind::TooLarge
    {
        throw_away(app, body);
    }
    read
}

/// The whole message of a call, of at most so many bytes with its frame, which comes within this time, and the memory
/// that it takes. `values_bytes` says how much that is once it is decoded.
pub(crate) async fn read_message(
    app: &App,
    (newcomer, mut body): (Newcomer, Body),
    (bytes_max, timeout): (usize, Duration),
    values_bytes: impl FnOnce(&[u8]) -> Result<usize, ApiError>,
) -> Result<(Bytes, Option<Share>), ApiError> {
    let limits = BodyLimits {
        bytes_max,
        marks: None,
        timeout,
    };
    let (bytes, mut arriving) = read_whole(app, (newcomer, &mut body), limits).await?;
    let size = bytes.len() + values_bytes(&bytes)?;
    let deadline = Instant::now() + app.config.body_timeout;
    arriving.grow(size, deadline).await?;
    Ok((bytes, arriving.arrived()))
}

/// Memory is taken as data arrives: who only announces a body holds little, and that no longer than others let it.
async fn read_whole(
    app: &App,
    (newcomer, body): (Newcomer, &mut Body),
    limits: BodyLimits,
) -> Result<(Bytes, ArrivingBody), ApiError> {
    let BodyLimits {
        bytes_max: max,
        mut marks,
        timeout: limit,
    } = limits;
    let deadline = Instant::now() + limit;
    let mut bytes = BytesMut::new();
    let mut arriving = app.body_room.arrive(newcomer, deadline).await?;
    loop {
        let frame = tokio::select! {
            frame = timeout_at(deadline, body.frame()) => frame.map_err(|_elapsed| late(limit))?,
            error = arriving.gives_up() => return Err(error),
        };
        let Some(frame) = frame else {
            return Ok((bytes.freeze(), arriving));
        };
        let Ok(frame) = frame else {
            return Err(ApiError::new(ErrorKind::Invalid, "the body ended early"));
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if data.len() > max - bytes.len() {
            return Err(too_large(max));
        }
        let mut size = bytes.len() + data.len();
        if let Some(marks) = &mut marks {
            marks.count(&data, "the body")?;
            size += marks.values_bytes();
        }
        arriving.grow(size, deadline).await?;
        bytes.extend_from_slice(&data);
    }
}

fn too_large(max: usize) -> ApiError {
    let message = format!("the body must have at most {max} bytes");
    ApiError::new(ErrorKind::TooLarge, message)
}

fn late(limit: Duration) -> ApiError {
    let limit = humantime::format_duration(limit);
    let message = format!("the body did not arrive within {limit}");
    ApiError::new(ErrorKind::BodyTimeout, message)
}

/// Reads the body of a request that was refused, within limits, and keeps nothing of it.
pub(crate) fn throw_away(app: &App, body: Body) {
    let max = app.config.body_bytes_max.saturating_mul(DISCARD_FACTOR);
    let discarding = timeout(app.config.body_timeout, discard(body, max));
    app.dispatcher.tasks.spawn(discarding);
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
