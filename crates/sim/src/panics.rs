//! Counts panics per thread: a runtime catches those of its tasks, and nobody would see them.

use std::cell::Cell;
use std::sync::Once;

thread_local! {
    static PANICS: Cell<u64> = const { Cell::new(0) };
}

static WATCHED: Once = Once::new();

/// Counts from now on, in the whole process.
pub fn watch() {
    WATCHED.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            before(info);
        }));
    });
}

/// Panics of this thread.
#[must_use]
pub fn count() -> u64 {
    PANICS.get()
}
