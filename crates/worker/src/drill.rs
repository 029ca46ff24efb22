//! Faults on purpose, to see that the cluster survives them: this worker dies, stands still, is slow or is
//! cut off. Never unless its configuration allows it, one at a time, and never for long.

mod pause;
mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::runtime::Handle;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_exchange::{Faults, FaultyTransport, Transport};
use tramontane_proto::v1::{self, DrillKind};
use tramontane_types::WorkerId;

use self::pause::Helper;
use self::request::Drill;
pub use self::request::{DRILL_DELAY_MAX, DRILL_MAX, DRILL_PEERS_MAX, DrillError};

/// A worker that was told to die or to stand still answers first: for this long it goes on.
const LAST_WORDS: Duration = Duration::from_millis(50);

/// Whose process a worker runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessKind {
    /// Its own: the worker may stop or kill it.
    Own,
    /// That of other workers too.
    Shared,
}

/// What decides which drills a worker can have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub(crate) allowed: bool,
    pub(crate) process: ProcessKind,
    /// Whether calls to peers travel; what is handed over in memory cannot be cut.
    pub(crate) calls_travel: bool,
    pub(crate) incarnation: u64,
}

/// The drills of one worker.
#[derive(Debug)]
pub(crate) struct Drills {
    worker: WorkerId,
    setting: Setting,
    faults: Arc<Faults>,
    /// Cancelled by a kill in a shared process: everything of this worker breaks at once.
    crash: CancellationToken,
    running: Mutex<Option<DrillKind>>,
    over: Condvar,
    num_drills: AtomicU32,
    stopped_ms: AtomicU64,
    steps_delayed: AtomicU64,
    ended: CancellationToken,
    tasks: TaskTracker,
}

impl Drills {
    /// No drill yet. Its tasks are counted by `tasks`; `ended` ends them.
    pub(crate) fn new(
        worker: WorkerId,
        setting: Setting,
        ended: CancellationToken,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            worker,
            setting,
            faults: Arc::new(Faults::new(Handle::current(), tasks.clone())),
            crash: CancellationToken::new(),
            running: Mutex::new(None),
            over: Condvar::new(),
            num_drills: AtomicU32::new(0),
            stopped_ms: AtomicU64::new(0),
            steps_delayed: AtomicU64::new(0),
            ended,
            tasks,
        }
    }

    /// What may go wrong between this worker and its peers; `None` when nothing may.
    pub(crate) fn faults(&self) -> Option<Arc<Faults>> {
        self.setting.allowed.then(|| Arc::clone(&self.faults))
    }

    /// Cancelled when the worker is to break; `None` when it never is.
    pub(crate) fn crash(&self) -> Option<CancellationToken> {
        self.setting.allowed.then(|| self.crash.clone())
    }

    /// The transport, as the faults let it carry.
    pub(crate) fn on_the_way(&self, transport: Arc<dyn Transport>) -> Arc<dyn Transport> {
        match self.faults() {
            Some(faults) => Arc::new(FaultyTransport::new(transport, faults)),
            None => transport,
        }
    }

    /// Begins a drill; returns when all that it takes is there and it is about to happen.
    pub(crate) async fn start(
        self: &Arc<Self>,
        request: &v1::DrillRequest,
    ) -> Result<v1::DrillReport, DrillError> {
        let worker = || self.worker.to_string();
        if !self.setting.allowed {
            return Err(DrillError::Off { worker: worker() });
        }
        let drill = Drill::check(request, &self.worker)?;
        self.check_possible(&drill)?;
        let place = Place::take(self, drill.kind())?;
        tracing::warn!(worker = %self.worker, ?drill, "a drill begins");
        match drill {
            Drill::Kill => self.tasks.spawn(place.die()),
            Drill::Pause(duration) => {
                let helper = tokio::task::spawn_blocking(move || Helper::start(duration)).await;
                let helper = helper.map_err(std::io::Error::other).flatten();
                let helper = helper.map_err(|source| DrillError::Helper {
                    worker: worker(),
                    source,
                })?;
                self.tasks.spawn(place.stand_still(helper))
            }
            Drill::Slow { duration, delay } => {
                self.faults.slow(delay);
                self.tasks.spawn(place.last(duration))
            }
            Drill::Partition { duration, cut } => {
                self.faults.cut(cut);
                self.tasks.spawn(place.last(duration))
            }
        };
        self.num_drills.fetch_add(1, Ordering::Relaxed);
        Ok(self.report())
    }

    fn check_possible(&self, drill: &Drill) -> Result<(), DrillError> {
        let worker = self.worker.to_string();
        match (drill, self.setting) {
            (
                Drill::Pause(_),
                Setting {
                    process: ProcessKind::Shared,
                    ..
                },
            ) => Err(DrillError::SharedProcess { worker }),
            (
                Drill::Partition { .. },
                Setting {
                    calls_travel: false,
                    ..
                },
            ) => Err(DrillError::InMemory { worker }),
            _ => Ok(()),
        }
    }

    /// Called by the engine's thread after each step: takes longer while a slow drill runs.
    pub(crate) fn after_step(&self) {
        let delay = self.faults.delay();
        if delay.is_zero() {
            return;
        }
        let mut running = self.running.lock();
        if *running == Some(DrillKind::Slow) {
            self.steps_delayed.fetch_add(1, Ordering::Relaxed);
            let _end_or_delay = self.over.wait_for(&mut running, delay);
        }
    }

    /// What drills have done so far.
    pub(crate) fn report(&self) -> v1::DrillReport {
        let running = self.running.lock().unwrap_or(DrillKind::Unspecified);
        v1::DrillReport {
            allowed: self.setting.allowed,
            incarnation: self.setting.incarnation,
            running: running.into(),
            drills: self.num_drills.load(Ordering::Relaxed),
            stopped_ms: self.stopped_ms.load(Ordering::Relaxed),
            frames_dropped: self.faults.frames_dropped(),
            replies_delayed: self.faults.replies_delayed(),
            steps_delayed: self.steps_delayed.load(Ordering::Relaxed),
        }
    }
}

/// The place of the one drill that may run; dropped, the drill is over and everything works again.
struct Place(Arc<Drills>);

impl Place {
    fn take(drills: &Arc<Drills>, kind: DrillKind) -> Result<Self, DrillError> {
        let mut running = drills.running.lock();
        if let Some(kind) = *running {
            let worker = drills.worker.to_string();
            return Err(DrillError::Running { worker, kind });
        }
        *running = Some(kind);
        Ok(Self(Arc::clone(drills)))
    }

    /// The end of this worker: of its process, when that is its own.
    async fn die(self) {
        sleep(LAST_WORDS).await;
        match self.0.setting.process {
            ProcessKind::Own => {
                if let Err(error) = pause::signal_self(rustix::process::Signal::KILL) {
                    tracing::error!(%error, "the drill could not kill this process");
                }
            }
            ProcessKind::Shared => self.0.crash.cancel(),
        }
    }

    /// Stops this process until `helper` continues it.
    async fn stand_still(self, helper: Helper) {
        sleep(LAST_WORDS).await;
        let stopped = tokio::task::spawn_blocking(move || helper.stop_this_process()).await;
        match stopped.map_err(std::io::Error::other).flatten() {
            Ok(stopped) => {
                let stopped_ms = stopped.as_millis() as u64;
                self.0.stopped_ms.fetch_add(stopped_ms, Ordering::Relaxed);
            }
            Err(error) => tracing::error!(%error, "the drill could not stop this process"),
        }
    }

    /// Keeps the fault for `duration`, or until the worker ends.
    async fn last(self, duration: Duration) {
        let ended = self.0.ended.clone();
        let _ended = ended.run_until_cancelled(sleep(duration)).await;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.faults.end();
        *self.0.running.lock() = None;
        self.0.over.notify_all();
        tracing::warn!(worker = %self.0.worker, "the drill is over");
    }
}
