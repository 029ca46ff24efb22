//! The outermost layer of both gRPC doors: every call has a name, which the log, the metadata of its answer and the
//! details of its error have, whoever refuses it. Never looks at what is asked.

use axum::body::Body;
use axum::extract::Request;
use axum::middleware::Next;
use axum::response::Response;
use http::HeaderMap;
use http_body::Frame;
use http_body_util::BodyExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use tracing::Instrument as _;
use tramontane_runtime::trace_context;

use crate::request_id::{REQUEST_ID, RequestId};

/// Names a call, its answer and its error.
pub(super) async fn name_call(mut request: Request, next: Next) -> Response {
    let id = RequestId::unique();
    let path = request.uri().path();
    let span = tracing::info_span!("grpc", request_id = %id, %path);
    trace_context::join(&span, request.headers());
    request.extensions_mut().insert(id);
    let response = next.run(request).instrument(span).await;
    let (mut parts, body) = response.into_parts();
    name_error(&mut parts.headers, id);
    let value = id.header();
    parts.headers.extend(value.map(|value| (REQUEST_ID, value)));
    let body = body.map_frame(move |frame| match frame.into_trailers() {
        Ok(mut trailers) => {
            name_error(&mut trailers, id);
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    });
    Response::from_parts(parts, Body::new(body))
}

/// Adds the name to the error in the begin or the end of an answer, if there is one.
fn name_error(headers: &mut HeaderMap, id: RequestId) {
    let Some(status) = Status::from_header_map(headers) else {
        return;
    };
    if status.code() == Code::Ok {
        return;
    }
    let mut details = status.get_error_details();
    details.set_request_info(id.to_string(), "");
    let named = Status::with_error_details(status.code(), status.message(), details);
    if let Err(error) = named.add_header(headers) {
        tracing::error!(%error, "the status of a call is no header");
    }
}
