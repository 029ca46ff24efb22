//! Errors as the OpenAI API has them: four keys, always, and what tells a client to come back.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use http::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER, WWW_AUTHENTICATE};
use serde_json::{Value, json};

use crate::error::{ApiError, ErrorKind};

/// The body of an error.
pub(crate) fn error_body(error: &ApiError) -> Value {
    json!({
        "error": {
            "message": error.message,
            "type": error.kind.class(),
            "param": error.param,
            "code": error.kind.code(),
        }
    })
}

/// The whole answer to a request that is refused.
pub(crate) fn error_response(error: &ApiError) -> Response {
    let mut response = Response::new(Body::from(error_body(error).to_string()));
    *response.status_mut() = error.kind.status();
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    let can_help = if error.retry_after.is_some() {
        "true"
    } else {
        "false"
    };
    headers.insert("x-should-retry", HeaderValue::from_static(can_help));
    if error.kind == ErrorKind::Unauthenticated {
        let scheme = HeaderValue::from_static("Bearer realm=\"tramontane\"");
        headers.insert(WWW_AUTHENTICATE, scheme);
    }
    if let Some(after) = error.retry_after {
        headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(after)));
        headers.insert("retry-after-ms", HeaderValue::from(millis(after)));
    }
    response
}

fn whole_seconds(after: Duration) -> u64 {
    after.as_secs() + u64::from(after.subsec_nanos() > 0)
}

fn millis(after: Duration) -> u64 {
    u64::try_from(after.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_four_keys_are_there_and_only_what_passes_may_be_retried() {
        let refused = ApiError::invalid("messages[0].role", "messages[0].role must be a string");
        assert_eq!(
            error_body(&refused).to_string(),
            r#"{"error":{"message":"messages[0].role must be a string","type":"invalid_request_error","param":"messages[0].role","code":null}}"#
        );
        let response = error_response(&refused);
        assert_eq!(response.headers()["x-should-retry"], "false");
        assert!(!response.headers().contains_key(RETRY_AFTER));
        let full = error_response(&ApiError::new(ErrorKind::QueueFull, "full"));
        assert_eq!(full.status(), 429);
        assert_eq!(full.headers()[RETRY_AFTER], "1");
        assert_eq!(full.headers()["retry-after-ms"], "1000");
        assert_eq!(full.headers()["x-should-retry"], "true");
    }
}
