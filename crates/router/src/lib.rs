//! Serves clients: OpenAI HTTP and gRPC in, tokens to and from workers. Handles text; never holds weights.
//!
//! Start reading at [`run`].

mod admission;
mod answer;
mod answer_id;
mod answer_room;
mod asked;
pub mod auth;
mod bad_words;
mod body;
mod body_room;
mod cluster;
pub mod config;
mod constraint;
mod delta;
mod dispatch;
mod error;
mod events;
mod follow;
#[doc(hidden)]
pub mod fuzzing;
mod grpc;
mod hold;
mod http_server;
mod journal;
mod json_marks;
mod kept;
mod metrics;
mod openai;
mod policy;
mod preparing;
mod pulse;
mod random;
mod reported;
mod request;
mod request_id;
mod roster;
mod routes;
mod run;
mod running;
pub mod scaler;
mod sequence;
mod served;
#[doc(hidden)]
pub mod simulation;
pub mod tenants;
mod text;
mod text_limits;
mod token_routes;
mod tools;
mod worker_link;
mod worker_pool;

pub use auth::config::{AuthConfig, JwtConfig};
pub use config::{PolicyKind, RouterConfig};
pub use constraint::vocabulary;
pub use error::Error;
pub use run::{RouterParts, ServedModel, run};
pub use scaler::{ScaleError, ScaleStarted, Scaler};
pub use tenants::config::TenantConfig;
