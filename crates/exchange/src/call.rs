//! One call to another worker's experts, its reply, and why it may be refused. Knows no wire format.

use std::fmt;

use bytes::Bytes;
use tramontane_types::{Epoch, ExpertId, LayerId, SegmentRange};

/// Rows that one slice of one expert computes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Job {
    /// The expert.
    pub expert: ExpertId,
    /// Which part of it.
    pub range: SegmentRange,
    /// Row indices: of the step in a plan, of the call's rows in a call. Ascending when we made it.
    pub row_ids: Vec<u32>,
}

/// Rows of one layer of one step for one worker. Pure: it may be sent again, and to anybody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertCall {
    /// Placement epoch that the caller planned with.
    pub epoch: Epoch,
    /// The layer.
    pub layer: LayerId,
    /// Number of rows.
    pub num_rows: usize,
    /// `[num_rows * row_bytes]` in the group's row format.
    pub rows: Bytes,
    /// What to compute, expert-major.
    pub jobs: Vec<Job>,
}

/// What a call returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Job after job, row after row, node after node: `hidden` little-endian f32 each.
    pub outputs: Bytes,
    /// Microseconds from the arrival of the call to its reply: waiting and computing.
    pub service_us: u64,
}

/// Why a call was not computed. None of them says anything about the rows: asking elsewhere is fine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// A slice asked for is not held there; plan again.
    #[error("a slice is not held at epoch {epoch}")]
    Stale {
        /// Epoch of the placement that the refusing worker serves.
        epoch: Epoch,
    },
    /// More calls wait than the worker, or our queue towards it, takes.
    #[error("too many calls wait")]
    Busy,
    /// The call, or the reply to it, does not fit the model.
    #[error("invalid: {0}")]
    Invalid(String),
    /// The worker is stopping.
    #[error("the worker is stopping")]
    Stopping,
    /// The connection was lost, or there is none.
    #[error("connection lost: {0}")]
    Lost(String),
    /// The worker belongs to another cluster, numeric class or model, or is somebody else.
    #[error("not of this group: {0}")]
    Mismatch(String),
}

type Deliver = dyn FnOnce(Result<Reply, Refusal>) + Send;

/// Takes the one answer of one call, on any thread, and never blocks. Dropped without an answer, it
/// delivers [`Refusal::Lost`]: a caller always hears back.
pub struct ReplySender {
    deliver: Option<Box<Deliver>>,
}

impl ReplySender {
    /// A sender that hands the answer to `deliver`, which must not block.
    #[must_use]
    pub fn new(deliver: impl FnOnce(Result<Reply, Refusal>) + Send + 'static) -> Self {
        Self {
            deliver: Some(Box::new(deliver)),
        }
    }

    /// Delivers the answer.
    pub fn send(mut self, answer: Result<Reply, Refusal>) {
        if let Some(deliver) = self.deliver.take() {
            deliver(answer);
        }
    }
}

impl Drop for ReplySender {
    fn drop(&mut self) {
        if let Some(deliver) = self.deliver.take() {
            deliver(Err(Refusal::Lost("the call was dropped".to_owned())));
        }
    }
}

impl fmt::Debug for ReplySender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplySender").finish_non_exhaustive()
    }
}

// Outputs travel as the bytes of f32 in memory.
const _: () = assert!(
    cfg!(target_endian = "little"),
    "the wire format is little-endian"
);

/// Lends a result buffer out as bytes without copying it.
pub(crate) fn outputs_of(values: Vec<f32>) -> Bytes {
    struct Owner(Vec<f32>);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            bytemuck::cast_slice(&self.0)
        }
    }
    Bytes::from_owner(Owner(values))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_dropped_sender_answers_lost_and_a_used_one_answers_once() {
        let (sender, answers) = mpsc::sync_channel(4);
        let to = sender.clone();
        drop(ReplySender::new(move |answer| to.send(answer).unwrap()));
        ReplySender::new(move |answer| sender.send(answer).unwrap()).send(Err(Refusal::Busy));
        let got: Vec<_> = answers.iter().collect();
        assert!(matches!(got[0], Err(Refusal::Lost(_))));
        assert_eq!(got[1], Err(Refusal::Busy));
        assert_eq!(got.len(), 2);
    }

    #[test]
    fn outputs_are_the_little_endian_bytes_of_the_values() {
        let bytes = outputs_of(vec![1.0, -2.5]);
        assert_eq!(bytes[..4], 1.0_f32.to_le_bytes());
        assert_eq!(bytes[4..], (-2.5_f32).to_le_bytes());
    }
}
