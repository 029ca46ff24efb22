//! The operations port: `/health/live`, `/health/ready`, `/metrics`. For processes that serve no other HTTP.
//!
//! Liveness never depends on etcd or on a peer: an outage of those must not restart the fleet.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use http::{StatusCode, header};

use crate::tls::Incoming;
use crate::{Readiness, Shutdown, metrics};

/// Says whether the process still does its work: `Err` with the reason makes `/health/live` fail.
pub type Liveness = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// Writes the current metrics.
pub type RenderMetrics = Arc<dyn Fn() -> String + Send + Sync>;

/// What the operations port answers from.
#[derive(Clone)]
pub struct Ops {
    /// Asked by `/health/live`.
    pub live: Liveness,
    /// Asked by `/health/ready`.
    pub ready: Readiness,
    /// Asked by `/metrics`.
    pub metrics: RenderMetrics,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ops")
            .field("ready", &self.ready)
            .finish_non_exhaustive()
    }
}

/// Serves the operations port until every tracked task but this one may end: it goes on answering while
/// the process drains, so that probes see the drain.
///
/// # Errors
/// When accepting connections fails for good.
pub async fn serve(incoming: Incoming, ops: Ops, stopped: Shutdown) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/metrics", get(render))
        .with_state(ops);
    axum::serve(incoming, routes)
        .with_graceful_shutdown(async move { stopped.token.cancelled().await })
        .await
}

async fn live(State(ops): State<Ops>) -> Response {
    answer((ops.live)())
}

async fn ready(State(ops): State<Ops>) -> Response {
    answer(ops.ready.check())
}

async fn render(State(ops): State<Ops>) -> Response {
    (
        [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)],
        (ops.metrics)(),
    )
        .into_response()
}

fn answer(state: Result<(), String>) -> Response {
    match state {
        Ok(()) => (StatusCode::OK, "ok\n").into_response(),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")).into_response(),
    }
}
