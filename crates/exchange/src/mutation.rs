//! A deliberate defect, to prove that the simulation would notice it. Without the feature `mutations`, which
//! nothing that serves asks for, it is off at compile time.

use std::cell::Cell;

thread_local! {
    static LATE_ANSWERS_COUNT: Cell<bool> = const { Cell::new(false) };
}

/// Makes this thread take the answer to a call that was given up although another one has answered.
pub fn let_late_answers_count(on: bool) {
    LATE_ANSWERS_COUNT.set(on);
}

pub(crate) fn late_answers_count() -> bool {
    cfg!(feature = "mutations") && LATE_ANSWERS_COUNT.get()
}
