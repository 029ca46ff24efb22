//! The layer itself: every request of both doors goes through it, to routes that do not exist too. It writes down who
//! asks for those behind it, and never reads a body.

use std::sync::Arc;
use std::time::SystemTime;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;

use super::{Auth, OPERATORS, PUBLIC, Refusal, is_listed};
use crate::error::ApiError;
use crate::grpc;
use crate::metrics::Metrics;
use crate::openai::error_response;
use crate::run::App;
use crate::tenants::{Caller, Quotas, rate_headers};

/// Which form refusals have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Door {
    Http,
    Grpc,
}

/// What the layer goes by.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    pub(crate) door: Door,
    pub(crate) auth: Arc<Auth>,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) metrics: Arc<Metrics>,
}

/// Lets a request through, with its [`Caller`], or refuses it.
pub(crate) async fn guard(
    State(guard): State<Guard>,
    mut request: Request,
    next: Next,
) -> Response {
    let path = request.uri().path();
    if is_listed(&PUBLIC, path) {
        return next.run(request).await;
    }
    let allowed = guard.auth.caller(request.headers(), SystemTime::now());
    let allowed = allowed.and_then(|caller| {
        let is_allowed = caller.is_operator || !is_listed(&OPERATORS, path);
        is_allowed.then_some(caller).ok_or(Refusal::Forbidden)
    });
    let caller = match allowed {
        Ok(caller) => caller,
        Err(refusal) => {
            guard.metrics.tenants.not_let_in(refusal.label());
            tracing::debug!(reason = refusal.label(), "a caller is not let through");
            return guard.refuse(&refusal.error());
        }
    };
    request.extensions_mut().insert(caller.clone());
    let mut response = next.run(request).await;
    if guard.door == Door::Http {
        guard.show_quotas(&caller, &mut response);
    }
    response
}

impl Guard {
    pub(crate) fn new(door: Door, app: &App) -> Self {
        Self {
            door,
            auth: Arc::clone(&app.auth),
            quotas: Arc::clone(&app.dispatcher.quotas),
            metrics: Arc::clone(&app.metrics),
        }
    }

    fn refuse(&self, error: &ApiError) -> Response {
        match self.door {
            Door::Http => error_response(error),
            Door::Grpc => grpc::refusal::<Body>(error),
        }
    }

    fn show_quotas(&self, caller: &Caller, response: &mut Response) {
        for (name, value) in rate_headers(self.quotas.left(&caller.tenant)) {
            response.headers_mut().insert(name, value);
        }
    }
}
