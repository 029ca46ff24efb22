//! Bodies of HTTP requests, read within limits on their size, their time and the memory of all of them together.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Request;
use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, HeaderMap};
use http_body_util::BodyExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{ApiError, ErrorKind};
use crate::run::App;

/// A body that is too large is refused at once, but read and thrown away up to this many times the limit,
/// so that a client that sends first and reads later sees the refusal instead of a broken connection.
const DISCARD_FACTOR: usize = 4;

fn declared_size(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The whole body, within the limits of size and time, and the memory that it takes among all bodies.
/// Memory is taken as data arrives: who only announces a body holds up nobody.
pub(crate) async fn read_body(
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
    throw_away(app, body);
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
