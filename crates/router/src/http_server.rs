//! Serves the connections of HTTP and gRPC, within limits on their headers and their patience. Knows nothing about what
//! is served.

mod turns;

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;
use tonic::transport::server::Connected as _;
use tramontane_runtime::Accepted;
use tramontane_runtime::tls::{Incoming, Socket};

use self::turns::{Attended, Turns};
use crate::random::random;
use crate::run::Doors;

/// Longest time for a request's headers.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// A connection without a request is closed after this time, whatever it says to pings.
const IDLE_MAX: Duration = HEADER_TIMEOUT;
/// A connection says good-bye at this age, give or take a tenth, and answers what it has been asked: behind a balancer that
/// spreads connections, routers that are new get their share. As gRPC's `MAX_CONNECTION_AGE`.
const AGE_MAX: Duration = Duration::from_secs(30 * 60);
/// Largest request head over HTTP/1, of which a connection has one at a time.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Largest request head over HTTP/2, of which a connection has as many as streams.
const STREAM_HEADER_BYTES_MAX: u32 = 16 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 100;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 256;
/// HTTP/2 streams that a client may reset before they are accepted.
const RESET_STREAMS_MAX: usize = 64;
/// HTTP/2 connections are asked for a sign of life this often.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Aborted answers get this long to send their last event, connections without a request to say good-bye.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// Versions of HTTP that a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Versions {
    All,
    /// gRPC has no other.
    Http2,
}

/// Serves until `doors.refuse`, and then until every connection has ended.
pub(crate) async fn serve(
    mut incoming: Incoming,
    (routes, versions): (Router, Versions),
    doors: Doors,
) {
    let tasks = TaskTracker::new();
    let builder = Arc::new(builder(versions));
    loop {
        let stream = tokio::select! {
            accepted = poll_fn(|cx| incoming.poll_accept(cx)) => accepted,
            () = doors.refuse.cancelled() => break,
        };
        let builder = Arc::clone(&builder);
        tasks.spawn(connection(stream, routes.clone(), builder, doors.clone()));
    }
    drop(incoming);
    tasks.close();
    tasks.wait().await;
}

fn builder(versions: Versions) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    if versions == Versions::Http2 {
        builder = builder.http2_only();
    }
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(RESET_STREAMS_MAX)
        .max_header_list_size(STREAM_HEADER_BYTES_MAX);
    builder
}

async fn connection(
    stream: Accepted<Socket>,
    routes: Router,
    builder: Arc<Builder<TokioExecutor>>,
    doors: Doors,
) {
    let turns = Arc::new(Turns::new());
    let service = TowerToHyperService::new(Attended {
        routes,
        turns: Arc::clone(&turns),
        peer: stream.connect_info(),
    });
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => Some(ended),
        () = doors.refuse.cancelled() => None,
        () = turns.quiet(IDLE_MAX) => None,
        () = sleep(age_max()) => None,
    };
    let ended = match ended {
        Some(ended) => ended,
        None => {
            // What has been asked is still answered, also what was asked at the last moment.
            serving.as_mut().graceful_shutdown();
            turns.part();
            tokio::select! {
                ended = serving.as_mut() => ended,
                () = turns.quiet(ABORT_GRACE) => Ok(()),
                () = doors.abort.cancelled() => {
                    timeout(ABORT_GRACE, serving.as_mut()).await.unwrap_or(Ok(()))
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "connection ended early");
    }
}

/// Connections that came together do not go together.
fn age_max() -> Duration {
    let tenths = (random() % 1000) as f64 / 1000.0;
    AGE_MAX.mul_f64(0.9 + 0.2 * tenths)
}

#[cfg(test)]
mod tests;
