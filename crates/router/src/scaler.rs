//! Who can start and end workers on an operator's word. The router itself never does.

use std::fmt;

use tramontane_types::WorkerId;

/// Most workers that may be asked for.
pub const WORKERS_MAX: u16 = 64;

/// Starts and ends workers: the process that runs them, or an orchestrator.
#[tonic::async_trait]
pub trait Scaler: Send + Sync + fmt::Debug {
    /// Begins to start or to drain workers until `count` of them stay. The answer comes when that has
    /// begun, not when it is done. Never ends a worker that is to stay.
    ///
    /// # Errors
    /// Why nothing was begun.
    async fn scale(&self, count: u16) -> Result<ScaleStarted, ScaleError>;
}

/// What a [`Scaler`] has begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScaleStarted {
    /// Workers that were there to stay.
    pub from: usize,
    /// Workers that are starting.
    pub started: Vec<WorkerId>,
    /// Workers that finish what they have and leave.
    pub draining: Vec<WorkerId>,
}

/// Why a [`Scaler`] began nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScaleError {
    /// It cannot be done as things are.
    #[error("{0}")]
    Refused(String),
    /// It should have worked.
    #[error("starting workers: {0}")]
    Failed(String),
}
