//! The seam between planning and carrying: a transport delivers a call or says why not, and never blocks.

use std::fmt;

use tramontane_types::WorkerId;

use crate::{ExpertCall, ReplySender};

/// Carries calls to other workers.
pub trait Transport: Send + Sync + fmt::Debug {
    /// Sends `call` to `to`. Returns at once; the answer, or why there is none, arrives through `reply`,
    /// perhaps before this returns.
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender);

    /// What was carried since the transport was made.
    fn stats(&self) -> TransportStats;
}

/// Counters of a transport. All of them only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportStats {
    /// Bytes of rows handed to other workers.
    pub bytes_sent: u64,
    /// Bytes of outputs that came back.
    pub bytes_received: u64,
    /// Calls handed to other workers.
    pub calls: u64,
    /// Calls that were lost with a connection or found none.
    pub lost: u64,
    /// Connections made.
    pub connects: u64,
}
