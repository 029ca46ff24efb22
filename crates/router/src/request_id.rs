//! The name of one request at either door: in the log, in the headers of its answer, and in errors of gRPC. Never a
//! client's own.

use std::fmt;

use http::{HeaderName, HeaderValue};

use crate::answer_id::AnswerId;
use crate::run::unix_seconds;

/// The header, and the metadata, with it.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Its answer has the same digits unless the client asks for an answer that has a name already.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequestId(AnswerId);

impl RequestId {
    /// A name that no other request has.
    pub(crate) fn unique() -> Self {
        Self(AnswerId::unique(unix_seconds()))
    }

    /// The name of its answer, where that is a new one.
    pub(crate) const fn answer(self) -> AnswerId {
        self.0
    }

    pub(crate) fn header(self) -> Option<HeaderValue> {
        HeaderValue::from_str(&self.to_string()).ok()
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "req_{}", self.0)
    }
}
