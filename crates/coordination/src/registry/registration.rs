//! Keeps one worker's record in the store while the worker lives. Never gives up: a lost lease, a lost
//! store and an emptied store all end in registering again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::record::WorkerRecord;
use crate::Error;
use crate::backoff::Backoff;
use crate::store::{CasOutcome, LEASE_TTL_MIN, LeaseId, Revision, Store};

/// Shortest pause between two writes of a record: changes in between are written together.
pub const RECORD_WRITE_SPACING: Duration = Duration::from_millis(200);
/// First pause before registering again.
pub const REREGISTER_PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause before registering again.
pub const REREGISTER_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The lease is kept alive this many times per time to live.
pub const KEEP_ALIVES_PER_TTL: u32 = 3;
/// Longest time that deregistering may take at the end: the lease ends by itself anyway.
pub const DEREGISTER_MAX: Duration = Duration::from_secs(3);

/// A worker's place in the cluster, kept until its token is cancelled.
#[derive(Clone, Debug)]
pub struct Registration {
    record: watch::Sender<WorkerRecord>,
    registered: watch::Receiver<bool>,
    abandoned: Arc<AtomicBool>,
}

impl Registration {
    /// Registers in the background on `tasks` and keeps the record there until `stop`, then removes it.
    ///
    /// # Errors
    /// A record that nobody would accept. An absent store is none.
    pub fn start(
        store: Arc<dyn Store>,
        record: WorkerRecord,
        ttl: Duration,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Self, Error> {
        record.validate()?;
        record.encode()?;
        let (record, changes) = watch::channel(record);
        let (registered, seen) = watch::channel(false);
        let abandoned = Arc::new(AtomicBool::new(false));
        let keeper = Keeper {
            abandoned: Arc::clone(&abandoned),
            store,
            ttl: ttl.max(LEASE_TTL_MIN),
            changes,
            registered,
        };
        tasks.spawn(keeper.run(stop));
        Ok(Self {
            record,
            registered: seen,
            abandoned,
        })
    }

    /// Changes the record; it is written soon. The id cannot be changed.
    pub fn update(&self, change: impl FnOnce(&mut WorkerRecord)) {
        self.record.send_if_modified(|record| {
            let before = record.clone();
            change(record);
            record.id = before.id.clone();
            *record != before
        });
    }

    /// From now on the stop leaves the record to its lease, as a process does that dies.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::Release);
    }

    /// The record as last updated.
    #[must_use]
    pub fn record(&self) -> WorkerRecord {
        self.record.borrow().clone()
    }

    /// Whether the record is in the store, as far as is known.
    #[must_use]
    pub fn registered(&self) -> watch::Receiver<bool> {
        self.registered.clone()
    }
}

struct Keeper {
    abandoned: Arc<AtomicBool>,
    store: Arc<dyn Store>,
    ttl: Duration,
    changes: watch::Receiver<WorkerRecord>,
    registered: watch::Sender<bool>,
}

/// What the store holds for us.
struct Held {
    lease: LeaseId,
    revision: Revision,
    alive: Instant,
}

impl Keeper {
    async fn run(mut self, stop: CancellationToken) {
        let mut lease = None;
        let worker = self.changes.borrow().id.clone();
        let work = async {
            let mut backoff = Backoff::new(REREGISTER_PAUSE_MIN, REREGISTER_PAUSE_MAX);
            loop {
                let lost = match self.register(&mut lease).await {
                    Ok(held) => {
                        tracing::info!(%worker, lease = %held.lease, "worker registered");
                        self.registered.send_replace(true);
                        backoff.reset();
                        self.hold(held).await
                    }
                    Err(error) => error,
                };
                self.registered.send_replace(false);
                tracing::warn!(%worker, error = %lost, "worker is not registered, trying again");
                sleep(backoff.pause()).await;
            }
        };
        tokio::select! {
            biased;
            () = work => {}
            () = stop.cancelled() => {}
        }
        self.registered.send_replace(false);
        let is_abandoned = self.abandoned.load(Ordering::Acquire);
        let Some(lease) = lease.filter(|_| !is_abandoned) else {
            return;
        };
        // Ending the lease removes the record, but not one that a successor has written since.
        match timeout(DEREGISTER_MAX, self.store.revoke(lease)).await {
            Ok(Ok(())) => tracing::info!(%worker, "worker deregistered"),
            Ok(Err(error)) => tracing::warn!(%worker, %error, "record stays until its lease ends"),
            Err(_elapsed) => tracing::warn!(%worker, "record stays until its lease ends"),
        }
    }

    /// Takes the key of our id, from an older process of the same id if need be.
    async fn register(&mut self, lease: &mut Option<LeaseId>) -> Result<Held, Error> {
        let asked = Instant::now();
        let granted = self.store.grant_lease(self.ttl).await?;
        let old = lease.replace(granted);
        let record = self.changes.borrow_and_update().clone();
        let key = record.key();
        let found = self.store.get(&key).await?;
        if let Some(other) = found.as_ref().and_then(|e| WorkerRecord::decode(e).ok()) {
            let successor = other.incarnation != record.incarnation
                && (other.started_ms, other.incarnation) > (record.started_ms, record.incarnation);
            if successor {
                let detail = "a younger process of the same id is registered";
                return Err(Error::invalid(key, detail));
            }
        }
        let expected = found.map(|entry| entry.revision);
        let revision = self.write(&record, expected, granted).await?;
        if let Some(old) = old {
            // Only now: ending it earlier would show everybody a worker that left. If it does not
            // work the lease ends by itself.
            let revoked = self.store.revoke(old).await;
            tracing::debug!(lease = %old, ?revoked, "old lease replaced");
        }
        Ok(Held {
            lease: granted,
            revision,
            alive: asked,
        })
    }

    async fn write(
        &self,
        record: &WorkerRecord,
        expected: Option<Revision>,
        lease: LeaseId,
    ) -> Result<Revision, Error> {
        let key = record.key();
        let value = record.encode()?;
        let outcome = self
            .store
            .compare_and_swap(&key, expected, value, Some(lease))
            .await?;
        match outcome {
            CasOutcome::Swapped(revision) => Ok(revision),
            CasOutcome::Conflict(_) => Err(Error::Conflict { key, expected }),
        }
    }

    /// Keeps the lease and the record until one of them is lost, and says how.
    async fn hold(&mut self, mut held: Held) -> Error {
        let mut ticks = interval(self.ttl / KEEP_ALIVES_PER_TTL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        loop {
            let kept = tokio::select! {
                biased;
                _at = ticks.tick() => self.keep(&mut held).await,
                changed = self.changes.changed() => match changed {
                    Ok(()) => self.refresh(&mut held).await,
                    // Nobody can change the record any more; it stays as it is.
                    Err(_closed) => {
                        ticks.tick().await;
                        self.keep(&mut held).await
                    }
                },
            };
            match kept {
                Ok(()) => {}
                // The store is away. The lease may well outlive that: keep it, only say so.
                Err(error) if error.is_retryable() => self.doubt(&held, &error),
                Err(error) => return error,
            }
        }
    }

    fn doubt(&self, held: &Held, error: &Error) {
        tracing::debug!(%error, "keep-alive did not work");
        if held.alive.elapsed() < self.ttl {
            return;
        }
        self.registered.send_if_modified(|registered| {
            if *registered {
                tracing::warn!(%error, "lease may have ended while the store is away");
            }
            std::mem::take(registered)
        });
    }

    async fn keep(&self, held: &mut Held) -> Result<(), Error> {
        let asked = Instant::now();
        let lease = held.lease;
        if !self.store.keep_alive(lease).await? {
            return Err(Error::LeaseNotFound { lease });
        }
        let key = self.changes.borrow().key();
        let found = self.store.get(&key).await?.map(|entry| entry.revision);
        if found != Some(held.revision) {
            let expected = Some(held.revision);
            return Err(Error::Conflict { key, expected });
        }
        held.alive = asked;
        self.registered
            .send_if_modified(|known| !std::mem::replace(known, true));
        Ok(())
    }

    /// Writes the newest record. A write whose answer was lost shows as a conflict later, and ends in
    /// registering again.
    async fn refresh(&mut self, held: &mut Held) -> Result<(), Error> {
        let record = self.changes.borrow_and_update().clone();
        let written = self.write(&record, Some(held.revision), held.lease).await;
        match written {
            Ok(revision) => held.revision = revision,
            Err(error) => {
                // Not written yet as far as we know: the next tick or change tries again.
                self.changes.mark_changed();
                sleep(RECORD_WRITE_SPACING).await;
                return Err(error);
            }
        }
        sleep(RECORD_WRITE_SPACING).await;
        Ok(())
    }
}
