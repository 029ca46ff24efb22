//! Refusals as gRPC statuses with details that a program can read.

use std::collections::HashMap;

use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::error::{ApiError, ErrorKind};
use crate::metrics::{Metrics, Route};

/// Whose reasons these are.
const DOMAIN: &str = "tramontane";

/// The status of a refusal: the reason, the field at fault, and when to come back.
pub(crate) fn status(error: &ApiError) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info(error.kind.reason(), DOMAIN, HashMap::new());
    if let Some(param) = &error.param {
        details.add_bad_request_violation(param, &error.message);
    }
    if error.kind == ErrorKind::RateLimited {
        details.add_quota_failure_violation("tenant", &error.message);
    }
    if error.retry_after.is_some() {
        details.set_retry_info(error.retry_after);
    }
    Status::with_error_details(error.kind.grpc_code(), &error.message, details)
}

/// Counts the answer to a call and turns its error into a status.
pub(super) fn counted<T>(
    metrics: &Metrics,
    route: Route,
    result: Result<T, ApiError>,
) -> Result<T, Status> {
    let code = result
        .as_ref()
        .map_or_else(|error| error.kind.status(), |_| http::StatusCode::OK);
    metrics.answered(route, code);
    result.map_err(|error| {
        tracing::debug!(kind = ?error.kind, %error, "request refused");
        status(&error)
    })
}

/// The whole answer to a call that is refused before its method is known.
pub(crate) fn refusal<B: Default>(error: &ApiError) -> http::Response<B> {
    status(error).into_http()
}

/// The refusal of something that is not there.
pub(crate) fn not_found(message: String, param: &str) -> Status {
    status(&ApiError::new(ErrorKind::NotFound, message).at(param))
}
