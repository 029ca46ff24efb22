//! One answer to "can you serve?", with the reason when not.

use tokio::sync::watch;

/// Whether a process can serve, watched by its health endpoints.
#[derive(Clone, Debug)]
pub struct Readiness(watch::Receiver<Result<(), String>>);

/// The one place that sets a [`Readiness`].
#[derive(Debug)]
pub struct ReadinessSetter(watch::Sender<Result<(), String>>);

impl Readiness {
    /// Not ready yet, for the given reason.
    #[must_use]
    pub fn starting(reason: &str) -> (ReadinessSetter, Self) {
        let (sender, receiver) = watch::channel(Err(reason.to_owned()));
        (ReadinessSetter(sender), Self(receiver))
    }

    /// `Ok` when ready, else why not.
    ///
    /// # Errors
    /// The reason, when not ready.
    pub fn check(&self) -> Result<(), String> {
        self.0.borrow().clone()
    }

    /// Waits for the next change; `false` when the setter is gone.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

impl ReadinessSetter {
    /// Sets the state; watchers wake only when it changed.
    pub fn set(&self, state: Result<(), String>) {
        self.0.send_if_modified(|current| {
            let changed = *current != state;
            *current = state;
            changed
        });
    }
}
