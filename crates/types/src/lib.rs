//! Words that every process shares: ids, expert slices, placements, sampling parameters. No I/O.

pub mod constraint;
pub mod finish;
pub mod geometry;
pub mod ids;
pub mod placement;
pub mod sampling;
pub mod slice;
pub mod turn_queue;

pub use constraint::Constraint;
pub use finish::{FinishReason, TokenLogprob, TokenOutput, Usage};
pub use geometry::ModelGeometry;
pub use ids::{Epoch, ExpertId, LayerId, PageId, RequestId, TokenId, WorkerId};
pub use placement::{InvalidPlacement, Placement, SliceHolders};
pub use sampling::{InvalidSampling, SamplingParams};
pub use slice::{ExpertSlice, Node, SEGMENTS_PER_EXPERT, SegmentRange};
pub use turn_queue::TurnQueue;
