//! Whether a worker shows a sign of life. Asked several times a second, whatever its sequences do: a step may
//! be long, but its process answers meanwhile, and says whether its step waits in vain for the experts of
//! others. Never says that a worker is dead because this process stood still.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;
use tonic::{Code, Status};
use tramontane_types::WorkerId;

use crate::worker_link::WorkerLink;

/// How often a worker is asked.
const PULSE_EVERY: Duration = Duration::from_millis(200);
/// How long it may take to answer. With [`PULSE_EVERY`] a stopped process or a cut link is known within 0.9 s,
/// and one that only waits for its core is not: the kernel lets it run several times in this time.
const PULSE_MAX: Duration = Duration::from_millis(700);
/// A worker whose step has lacked experts for this long has lost touch with their holders, which others
/// may have not. Counts from when a call is silent, or nobody could be asked, not from its beginning.
const STUCK_MAX: Duration = Duration::from_secs(1);
/// When our own timer is late by this, it was us who stood still.
const OWN_DELAY_MAX: Duration = Duration::from_millis(100);

/// Whether one worker could serve; dropped, nobody asks for them any more.
#[derive(Debug)]
pub(crate) struct Pulse {
    signs: Arc<Signs>,
    _stop: DropGuard,
}

impl Pulse {
    /// Asks through `link` until dropped or `stop`, as a task of `tasks`.
    pub(crate) fn start(
        worker: WorkerId,
        link: Arc<dyn WorkerLink>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
    ) -> Self {
        let signs = Arc::new(Signs::default());
        let (stop, seen) = (stop.child_token(), Arc::clone(&signs));
        let stopped = stop.clone();
        tasks.spawn(async move {
            stopped
                .run_until_cancelled(follow(worker, link, seen))
                .await
        });
        Self {
            signs,
            _stop: stop.drop_guard(),
        }
    }

    /// Whether it answered lately; so it is before it was first asked.
    pub(crate) fn is_alive(&self) -> bool {
        !self.signs.gone.load(Ordering::Relaxed)
    }

    /// Waits until it is no longer alive.
    pub(crate) async fn stops(&self) {
        self.becomes(false).await;
    }

    /// Waits until it is alive.
    pub(crate) async fn returns(&self) {
        self.becomes(true).await;
    }

    async fn becomes(&self, alive: bool) {
        loop {
            let changed = self.signs.changed.notified();
            if self.is_alive() == alive {
                return;
            }
            changed.await;
        }
    }
}

/// What is known; whoever waits is told in the order in which they came.
#[derive(Debug, Default)]
struct Signs {
    gone: AtomicBool,
    changed: Notify,
}

async fn follow(worker: WorkerId, link: Arc<dyn WorkerLink>, signs: Arc<Signs>) {
    loop {
        let asked = Instant::now();
        let answer = timeout(PULSE_MAX, link.status()).await;
        let is_alive = match &answer {
            Ok(Ok(status)) => status.stuck_ms < STUCK_MAX.as_millis() as u64,
            Ok(Err(status)) => is_its_own(status),
            Err(_elapsed) if asked.elapsed() > PULSE_MAX + OWN_DELAY_MAX => continue,
            Err(_elapsed) => false,
        };
        if signs.gone.swap(!is_alive, Ordering::Relaxed) == is_alive {
            let why = answer.ok().and_then(Result::err);
            let why = why.as_ref().map(Status::message);
            tracing::info!(%worker, is_alive, why, "sign of life");
            signs.changed.notify_waiters();
        }
        sleep_until(asked + PULSE_EVERY).await;
    }
}

/// Whether the worker itself answered so: one that is gone shows as these.
fn is_its_own(status: &Status) -> bool {
    !matches!(
        status.code(),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded
    )
}
