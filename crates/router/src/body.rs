//! Bodies of requests, read within limits on their size, their time and the memory of all of them together: JSON of
//! HTTP, and messages of gRPC calls that have one.

use axum::body::Body;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HeaderMap};
use http_body_util::BodyExt as _;
use tokio::time::{Instant, timeout, timeout_at};

use crate::body_room::{ArrivingBody, Share};
use crate::error::{ApiError, ErrorKind};
use crate::json_marks::{BODY_MARKS_MAX, JsonMarks};
use crate::run::App;

/// A body that is too large is refused at once, but read and thrown away up to this many times the limit,
/// so that a client that sends first and reads later sees the refusal instead of a broken connection.
const DISCARD_FACTOR: usize = 4;

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
    let mut body = request.into_body();
    let read = if declared > max {
        Err(too_large(max))
    } else {
        let marks = JsonMarks::at_most(BODY_MARKS_MAX);
        let read = read_whole(app, &mut body, (max, Some(marks)));
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

/// The whole message of a call, of at most `max` bytes with its frame, and the memory that it takes. `values_bytes`
/// says how much that is once it is decoded.
pub(crate) async fn read_message(
    app: &App,
    mut body: Body,
    max: usize,
    values_bytes: impl FnOnce(&[u8]) -> Result<usize, ApiError>,
) -> Result<(Bytes, Option<Share>), ApiError> {
    let (bytes, mut arriving) = read_whole(app, &mut body, (max, None)).await?;
    let size = bytes.len() + values_bytes(&bytes)?;
    let deadline = Instant::now() + app.config.body_timeout;
    arriving.grow(size, deadline).await?;
    Ok((bytes, arriving.arrived()))
}

/// Memory is taken as data arrives: who only announces a body holds up nobody.
async fn read_whole(
    app: &App,
    body: &mut Body,
    (max, mut marks): (usize, Option<JsonMarks>),
) -> Result<(Bytes, ArrivingBody), ApiError> {
    let deadline = Instant::now() + app.config.body_timeout;
    let mut bytes = BytesMut::new();
    let mut arriving = app.body_room.arrive();
    loop {
        let frame = tokio::select! {
            frame = timeout_at(deadline, body.frame()) => frame.map_err(|_elapsed| late(app))?,
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

fn late(app: &App) -> ApiError {
    let limit = humantime::format_duration(app.config.body_timeout);
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
