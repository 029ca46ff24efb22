//! What goes wrong, in two words: [`Error`] ends the router, [`ApiError`] ends one request.
//! Never carries prompt or output text, and never the inner text of a fault of our own.

use std::time::Duration;

use http::StatusCode;
use tonic::Code;

/// When a client that met a full queue should come back.
pub(crate) const RETRY_AFTER_FULL: Duration = Duration::from_secs(1);
/// When a client that met no worker should come back: about the time in which one joins.
pub(crate) const RETRY_AFTER_UNAVAILABLE: Duration = Duration::from_secs(2);

/// Why the router cannot start or cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting outside its rule.
    #[error("router.{key} must be {rule}, got {got}")]
    Config {
        /// The key.
        key: &'static str,
        /// The rule.
        rule: String,
        /// What came.
        got: String,
    },
    /// A setting of another section outside its rule.
    #[error("{key} must be {rule}, got {got}")]
    Setting {
        /// Section and key.
        key: String,
        /// The rule.
        rule: String,
        /// What came.
        got: String,
    },
    /// The address of a listening socket cannot be read.
    #[error("listening socket")]
    Listener(#[source] std::io::Error),
    /// The tokenizer's tokens cannot be those of a grammar.
    #[error("constraints")]
    Vocabulary(#[source] tramontane_grammar::InvalidVocabulary),
    /// The definitions of our own messages cannot be read.
    #[error("definitions of messages")]
    Descriptors(#[source] prost::DecodeError),
    /// The descriptors of our own services cannot be read.
    #[error("gRPC reflection")]
    Reflection(#[source] tonic_reflection::server::Error),
}

impl Error {
    /// Whether a setting is outside its rule: the operator's to mend.
    #[must_use]
    pub const fn is_setting(&self) -> bool {
        matches!(self, Self::Config { .. } | Self::Setting { .. })
    }
}

/// What kind of refusal, the same for HTTP and gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// The request breaks a rule.
    Invalid,
    /// Prompt and answer do not fit the model's context.
    ContextLength,
    /// A known parameter that this server does not offer.
    Unsupported,
    /// Nobody is known who sent this.
    Unauthenticated,
    /// Whoever sent this may not do it.
    Forbidden,
    /// No such model here.
    ModelNotFound,
    /// No such route, worker or placement.
    NotFound,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The body did not come in time.
    BodyTimeout,
    /// The caller wanted the answer earlier.
    Deadline,
    /// The body is larger than the limit.
    TooLarge,
    /// The body is not declared as JSON.
    MediaType,
    /// The cluster is not in a state in which it can be done.
    Precondition,
    /// The idempotency key belongs to another request.
    KeyReused,
    /// The event belongs to the answer to another request.
    ResumeMismatch,
    /// The queue is full.
    QueueFull,
    /// The tenant has used up a quota.
    RateLimited,
    /// Nobody can serve this now.
    Unavailable,
    /// A fault of ours.
    Internal,
}

impl ErrorKind {
    pub(crate) const fn status(self) -> StatusCode {
        match self {
            Self::Invalid | Self::ContextLength | Self::Unsupported => StatusCode::BAD_REQUEST,
            Self::Unauthenticated => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::ModelNotFound | Self::NotFound => StatusCode::NOT_FOUND,
            Self::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::Deadline => StatusCode::GATEWAY_TIMEOUT,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::MediaType => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::Precondition => StatusCode::CONFLICT,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::ResumeMismatch => StatusCode::CONFLICT,
            Self::QueueFull | Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The `type` of the OpenAI error object.
    pub(crate) const fn class(self) -> &'static str {
        match self {
            Self::Unauthenticated => "authentication_error",
            Self::Forbidden => "permission_error",
            Self::QueueFull | Self::RateLimited => "rate_limit_error",
            Self::Unavailable => "overloaded_error",
            Self::Internal => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// The `code` of the OpenAI error object.
    pub(crate) const fn code(self) -> Option<&'static str> {
        match self {
            Self::Invalid => None,
            Self::ContextLength => Some("context_length_exceeded"),
            Self::Unsupported => Some("unsupported_parameter"),
            Self::Unauthenticated => Some("invalid_api_key"),
            Self::Forbidden => Some("permission_denied"),
            Self::ModelNotFound => Some("model_not_found"),
            Self::NotFound => Some("not_found"),
            Self::MethodNotAllowed => Some("method_not_allowed"),
            Self::BodyTimeout => Some("request_timeout"),
            Self::Deadline => Some("deadline_exceeded"),
            Self::TooLarge => Some("request_too_large"),
            Self::MediaType => Some("unsupported_media_type"),
            Self::Precondition => Some("precondition_failed"),
            Self::KeyReused => Some("idempotency_key_reused"),
            Self::ResumeMismatch => Some("resume_mismatch"),
            Self::QueueFull | Self::RateLimited => Some("rate_limit_exceeded"),
            Self::Unavailable => Some("service_unavailable"),
            Self::Internal => Some("internal_error"),
        }
    }

    pub(crate) const fn grpc_code(self) -> Code {
        match self {
            Self::Invalid | Self::ContextLength | Self::Unsupported | Self::MediaType => {
                Code::InvalidArgument
            }
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Forbidden => Code::PermissionDenied,
            Self::ModelNotFound | Self::NotFound => Code::NotFound,
            Self::MethodNotAllowed => Code::Unimplemented,
            Self::BodyTimeout | Self::Deadline => Code::DeadlineExceeded,
            Self::TooLarge | Self::QueueFull | Self::RateLimited => Code::ResourceExhausted,
            Self::Precondition => Code::FailedPrecondition,
            Self::KeyReused | Self::ResumeMismatch => Code::FailedPrecondition,
            Self::Unavailable => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }

    /// The `reason` of gRPC's `ErrorInfo`.
    pub(crate) const fn reason(self) -> &'static str {
        match self {
            Self::Invalid => "INVALID_PARAMETER",
            Self::ContextLength => "CONTEXT_LENGTH_EXCEEDED",
            Self::Unsupported => "UNSUPPORTED_PARAMETER",
            Self::Unauthenticated => "UNAUTHENTICATED",
            Self::Forbidden => "PERMISSION_DENIED",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::NotFound => "NOT_FOUND",
            Self::MethodNotAllowed => "METHOD_NOT_ALLOWED",
            Self::BodyTimeout => "REQUEST_TIMEOUT",
            Self::Deadline => "DEADLINE_EXCEEDED",
            Self::TooLarge => "REQUEST_TOO_LARGE",
            Self::MediaType => "UNSUPPORTED_MEDIA_TYPE",
            Self::Precondition => "PRECONDITION",
            Self::KeyReused => "IDEMPOTENCY_KEY_REUSED",
            Self::ResumeMismatch => "RESUME_MISMATCH",
            Self::QueueFull => "QUEUE_FULL",
            Self::RateLimited => "QUOTA_EXCEEDED",
            Self::Unavailable => "UNAVAILABLE",
            Self::Internal => "INTERNAL",
        }
    }
}

/// Why one request is refused or ends early.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct ApiError {
    pub(crate) kind: ErrorKind,
    pub(crate) message: String,
    /// Path of the field at fault, such as `messages[0].role`.
    pub(crate) param: Option<String>,
    /// When trying again may help.
    pub(crate) retry_after: Option<Duration>,
}

impl ApiError {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let retry_after = match kind {
            ErrorKind::QueueFull => Some(RETRY_AFTER_FULL),
            ErrorKind::Unavailable => Some(RETRY_AFTER_UNAVAILABLE),
            _ => None,
        };
        Self {
            kind,
            message: message.into(),
            param: None,
            retry_after,
        }
    }

    /// The field at `param` breaks its rule; `message` says which and what came.
    pub(crate) fn invalid(param: &str, message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message).at(param)
    }

    /// A known parameter that has an effect that this server does not offer.
    pub(crate) fn unsupported(param: &str) -> Self {
        Self::new(
            ErrorKind::Unsupported,
            format!("{param} is not supported by this server"),
        )
        .at(param)
    }

    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unavailable, message)
    }

    /// The cluster is not in a state in which it can be done; `message` says what to do first.
    pub(crate) fn precondition(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Precondition, message)
    }

    /// A fault of ours; the log has the details under the request's id.
    pub(crate) fn internal() -> Self {
        Self::new(
            ErrorKind::Internal,
            "internal error; the server's log has the details",
        )
    }

    pub(crate) fn at(mut self, param: &str) -> Self {
        self.param = Some(param.to_owned());
        self
    }

    /// The same error with its field below `parent`.
    pub(crate) fn below(mut self, parent: &str) -> Self {
        self.param = self.param.map(|param| format!("{parent}.{param}"));
        self
    }
}

impl From<tramontane_tokenizer::Error> for ApiError {
    fn from(error: tramontane_tokenizer::Error) -> Self {
        if !error.is_invalid_request() {
            tracing::error!(%error, "tokenizer does not work");
            return Self::internal();
        }
        let refused = Self::new(ErrorKind::Invalid, error.to_string());
        match error.param() {
            Some(param) => refused.at(param),
            None => refused,
        }
    }
}
