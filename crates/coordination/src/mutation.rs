//! Deliberate defects, to prove that the simulation would notice them. Without the feature `mutations`, which
//! nothing that serves asks for, [`is_on`] is false at compile time.

use std::cell::Cell;

/// One defect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    /// An older placement is taken for a newer one.
    EpochCheckOff,
    /// The journal leaves out the first sampled token when it replays a sequence.
    JournalOffByOne,
    /// Slices that no placement asks for are dropped at once.
    NoDropGrace,
    /// A sequence that is moved goes on with the weights that serve now.
    WeightsMixed,
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
pub fn is_on(mutation: Mutation) -> bool {
    cfg!(feature = "mutations") && ON.get() == Some(mutation)
}
