//! Stopping in order: refuse, drain, deregister, end. Every task has a parent here.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The stop signal of a process and the tasks that it waits for.
///
/// `stopping` asks every part to refuse new work and finish what it has. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    /// Cancelled when the process is asked to stop.
    pub token: CancellationToken,
    /// Every background task; [`Shutdown::finish`] waits for them.
    pub tasks: TaskTracker,
}

impl Shutdown {
    /// A shutdown that nobody has asked for yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A part of this process that can be stopped alone, and stops when the whole does.
    #[must_use]
    pub fn child(&self) -> Self {
        Self {
            token: self.token.child_token(),
            tasks: TaskTracker::new(),
        }
    }

    /// Asks everything to stop.
    pub fn trigger(&self) {
        self.token.cancel();
    }

    /// Triggers on SIGTERM or SIGINT. A second signal ends the process at once with `128 + signal`,
    /// for an operator who does not want to wait for the drain.
    ///
    /// # Errors
    /// When the operating system refuses the signal handlers.
    pub fn trigger_on_signals(&self) -> std::io::Result<()> {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let token = self.token.clone();
        // Not tracked: it waits for a second signal for as long as the process lives.
        #[expect(clippy::disallowed_methods, reason = "must outlive every tracked task")]
        tokio::spawn(async move {
            let mut asked = false;
            loop {
                let code = tokio::select! {
                    _ = terminate.recv() => 128 + 15,
                    _ = interrupt.recv() => 128 + 2,
                };
                if asked {
                    tracing::warn!("second signal, ending without drain");
                    std::process::exit(code);
                }
                asked = true;
                tracing::info!("stopping: refusing new work, finishing what runs");
                token.cancel();
            }
        });
        Ok(())
    }

    /// Waits until every tracked task has ended, at most `limit`.
    ///
    /// Returns how many tasks had not ended by then.
    pub async fn finish(&self, limit: Duration) -> usize {
        self.tasks.close();
        if tokio::time::timeout(limit, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(left = self.tasks.len(), ?limit, "tasks did not end in time");
        }
        self.tasks.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn finish_waits_for_tasks_and_counts_the_stubborn() {
        let shutdown = Shutdown::new();
        let token = shutdown.token.clone();
        shutdown.tasks.spawn(async move { token.cancelled().await });
        shutdown.tasks.spawn(std::future::pending::<()>());
        shutdown.trigger();
        assert_eq!(shutdown.finish(Duration::from_secs(5)).await, 1);
    }

    #[test]
    fn a_child_stops_with_its_parent_but_not_the_other_way() {
        let parent = Shutdown::new();
        let (one, two) = (parent.child(), parent.child());
        one.trigger();
        assert!(!parent.token.is_cancelled());
        parent.trigger();
        assert!(two.token.is_cancelled());
    }
}
