//! Why a layer could not be exchanged, naming the layer, the workers and the slices.

use std::time::Duration;

use tramontane_types::{ExpertSlice, LayerId, WorkerId};

/// Most slices and workers that an error names one by one.
const NAMED_MAX: usize = 8;

/// What [`Exchange`](crate::Exchange) may refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The routed rows do not fit the geometry or each other.
    #[error("layer {layer}: routed {what}: expected {expected}, got {got}")]
    Routing {
        /// The layer.
        layer: LayerId,
        /// Which part of the routed rows.
        what: &'static str,
        /// What the geometry asks for.
        expected: usize,
        /// What came.
        got: usize,
    },
    /// A row chose an expert that the model does not have.
    #[error("layer {layer}: row {row} chose expert {got}, expected less than {num_experts}")]
    NoExpert {
        /// The layer.
        layer: LayerId,
        /// Row of the step.
        row: usize,
        /// Experts per layer.
        num_experts: usize,
        /// What was chosen.
        got: usize,
    },
    /// Not every slice was answered in time.
    #[error(
        "layer {layer}: no answer within {waited:?} for {}; asked {}; last refusal: {}",
        named(.slices), named(.workers), .last.as_deref().unwrap_or("none")
    )]
    Deadline {
        /// The layer.
        layer: LayerId,
        /// How long was waited.
        waited: Duration,
        /// What is missing.
        slices: Vec<ExpertSlice>,
        /// Who has not answered, or refused.
        workers: Vec<WorkerId>,
        /// Who refused last, and why.
        last: Option<String>,
    },
    /// A worker says that a call, or we say that a reply, does not fit the model, and nobody else can be asked.
    #[error("layer {layer}: worker {worker}: {reason}")]
    Invalid {
        /// The layer.
        layer: LayerId,
        /// Who.
        worker: WorkerId,
        /// What does not fit.
        reason: String,
    },
    /// The backend refused.
    #[error(transparent)]
    Compute(#[from] tramontane_compute::Error),
}

impl Error {
    /// Whether the same rows may succeed later: nothing was wrong with them.
    #[must_use]
    pub const fn is_retryable(&self) -> bool {
        matches!(self, Self::Deadline { .. })
    }
}

fn named<T: ToString>(things: &[T]) -> String {
    if things.is_empty() {
        return "nobody".to_owned();
    }
    let mut text: Vec<String> = things.iter().take(NAMED_MAX).map(T::to_string).collect();
    if things.len() > NAMED_MAX {
        text.push(format!("and {} more", things.len() - NAMED_MAX));
    }
    text.join(", ")
}
