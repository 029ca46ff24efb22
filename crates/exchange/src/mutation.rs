//! Deliberate defects, to prove that a simulation would notice them. Without the feature `mutations`, which
//! nothing that serves asks for, `is_on` is false at compile time.

use std::cell::Cell;
use std::time::Duration;

/// The pause between the pings of a connection that has [`Mutation::NoPings`].
pub(crate) const NO_PING: Duration = Duration::from_secs(3600);

/// One defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// The answer to a call that was given up counts although another one has answered.
    LateAnswersCount,
    /// A caller does not ping its peers.
    NoPings,
    /// An answer goes to the oldest open call, whatever call it answers.
    AnyCallAnswered,
    /// A refused call keeps its credit.
    RefusalsKeepCredit,
}

thread_local! {
    static ON: Cell<Option<Mutation>> = const { Cell::new(None) };
}

/// Turns a defect on for this thread, or all of them off.
pub fn turn_on(mutation: Option<Mutation>) {
    ON.set(mutation);
}

/// Whether this thread has the defect.
#[must_use]
pub(crate) fn is_on(mutation: Mutation) -> bool {
    cfg!(feature = "mutations") && ON.get() == Some(mutation)
}
