//! At most one leader at a time, by a key bound to a lease. Never leads longer than its lease: the
//! leader's work is stopped before the lease can have ended anywhere.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::backoff::{Backoff, random};
use crate::store::{CasOutcome, Entry, LEASE_TTL_MIN, LeaseId, Store, WatchEvent, keys};

/// First pause after the store failed a candidate.
pub const CAMPAIGN_PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause after the store failed a candidate.
pub const CAMPAIGN_PAUSE_MAX: Duration = Duration::from_secs(5);
/// The lease is kept alive this many times per time to live.
pub const KEEP_ALIVES_PER_TTL: u32 = 4;
/// Leadership ends this part of a time to live before the lease can: time for work to stop.
pub const LEASE_MARGIN_DIVISOR: u32 = 4;
/// Longest time that giving up a key may take at the end: the lease ends by itself anyway.
pub const RESIGN_MAX: Duration = Duration::from_secs(2);

/// Who leads; the value of the key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Name of the process.
    pub id: String,
    /// Differs between two terms of the same process.
    pub term: u64,
}

/// Runs `lead` whenever this process is the leader, until `stop`.
///
/// `lead` gets a token that is cancelled when leadership ends and should return soon then; it is
/// dropped when it has not returned by the time that the lease may end. When it returns by itself the
/// leadership is given up and sought again.
pub async fn run_elected<F, Fut>(
    store: Arc<dyn Store>,
    id: &str,
    ttl: Duration,
    stop: CancellationToken,
    lead: F,
) where
    F: Fn(CancellationToken) -> Fut,
    Fut: Future<Output = ()>,
{
    let ttl = ttl.max(LEASE_TTL_MIN);
    let mut backoff = Backoff::new(CAMPAIGN_PAUSE_MIN, CAMPAIGN_PAUSE_MAX);
    while !stop.is_cancelled() {
        let won = tokio::select! {
            biased;
            won = campaign(&*store, id, ttl) => won,
            () = stop.cancelled() => return,
        };
        match won {
            Ok(term) => {
                tracing::info!(id, "leadership won");
                backoff.reset();
                term.serve(&*store, &stop, &lead).await;
                tracing::info!(id, "leadership ended");
            }
            Err(error) => tracing::warn!(id, %error, "election did not work, trying again"),
        }
        tokio::select! {
            biased;
            () = sleep(backoff.pause()) => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Who leads now, for status displays.
///
/// # Errors
/// The store's, or [`Error::Invalid`] for a value that names no leader.
pub async fn leader(store: &dyn Store) -> Result<Option<Leader>, Error> {
    let Some(entry) = store.get(keys::PLANNER).await? else {
        return Ok(None);
    };
    let leader = serde_json::from_slice(&entry.value);
    leader.map_err(|e| Error::invalid(keys::PLANNER, e.to_string()))
}

/// A won election.
struct Term {
    lease: LeaseId,
    ttl: Duration,
    /// When the lease was last known to be whole: taken before asking.
    renewed: Instant,
}

/// Waits until the key is free and takes it.
async fn campaign(store: &dyn Store, id: &str, ttl: Duration) -> Result<Term, Error> {
    loop {
        if let Some(held) = store.get(keys::PLANNER).await? {
            wait_until_free(store, &held, ttl).await?;
            continue;
        }
        let renewed = Instant::now();
        let lease = store.grant_lease(ttl).await?;
        let leader = Leader {
            id: id.to_owned(),
            term: random(),
        };
        let value = serde_json::to_vec(&leader);
        let value = value.map_err(|e| Error::invalid("leader", e.to_string()))?;
        let value = Bytes::from(value);
        let taken = store
            .compare_and_swap(keys::PLANNER, None, value, Some(lease))
            .await;
        match taken {
            Ok(CasOutcome::Swapped(_)) => {
                return Ok(Term {
                    lease,
                    ttl,
                    renewed,
                });
            }
            Ok(CasOutcome::Conflict(_)) => store.revoke(lease).await?,
            Err(error) => return Err(error),
        }
    }
}

/// Until the key may be free; looks again every `ttl` in case the watch missed it.
async fn wait_until_free(store: &dyn Store, held: &Entry, ttl: Duration) -> Result<(), Error> {
    let mut watch = store.watch(keys::PLANNER, held.revision.next());
    let freed = async {
        loop {
            match watch.next().await {
                Some(Ok(WatchEvent::Delete { key, .. })) if key == keys::PLANNER => return Ok(()),
                Some(Ok(_)) => {}
                Some(Err(Error::Compacted { .. } | Error::Replaced { .. })) | None => return Ok(()),
                Some(Err(error)) => return Err(error),
            }
        }
    };
    timeout(ttl, freed).await.unwrap_or(Ok(()))
}

impl Term {
    /// Leads until the lease is in doubt, `stop`, or `lead` returns; then gives the key up.
    async fn serve<F, Fut>(mut self, store: &dyn Store, stop: &CancellationToken, lead: &F)
    where
        F: Fn(CancellationToken) -> Fut,
        Fut: Future<Output = ()>,
    {
        let token = stop.child_token();
        let mut work = std::pin::pin!(lead(token.clone()));
        let returned = tokio::select! {
            biased;
            () = &mut work => true,
            () = self.keep(store) => false,
            () = stop.cancelled() => false,
        };
        token.cancel();
        let lease_ends = self.renewed + self.ttl;
        if !returned && timeout_at(lease_ends, work).await.is_err() {
            tracing::warn!("leader's work did not stop in time and was dropped");
        }
        let resigned = timeout(RESIGN_MAX, store.revoke(self.lease)).await;
        tracing::debug!(?resigned, "lease of the leader given back");
    }

    /// Keeps the lease alive and returns when it is lost or cannot be renewed in time.
    async fn keep(&mut self, store: &dyn Store) {
        let mut ticks = interval(self.ttl / KEEP_ALIVES_PER_TTL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let doubtful = self.renewed + (self.ttl - self.ttl / LEASE_MARGIN_DIVISOR);
            let renew = async {
                ticks.tick().await;
                let asked = Instant::now();
                (asked, store.keep_alive(self.lease).await)
            };
            match timeout_at(doubtful, renew).await {
                Ok((asked, Ok(true))) => self.renewed = asked,
                Ok((_, Ok(false))) => {
                    tracing::warn!("lease of the leader has ended");
                    return;
                }
                Ok((_, Err(error))) => tracing::debug!(%error, "leader's keep-alive did not work"),
                Err(_elapsed) => {
                    tracing::warn!("lease of the leader could not be renewed in time");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::sync::mpsc;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::{FaultStore, MemoryStore};

    const TTL: Duration = Duration::from_secs(8);
    const LONG: Duration = Duration::from_secs(300);

    #[derive(Clone)]
    struct Scene {
        tasks: TaskTracker,
        /// Leaders at this moment.
        leading: Arc<AtomicUsize>,
        events: mpsc::Sender<(&'static str, bool)>,
    }

    impl Scene {
        fn candidate(&self, name: &'static str, store: Arc<dyn Store>) -> CancellationToken {
            let stop = CancellationToken::new();
            let (scene, token) = (self.clone(), stop.clone());
            self.tasks.spawn(async move {
                run_elected(store, name, TTL, token, |leadership| {
                    let scene = scene.clone();
                    async move {
                        let others = scene.leading.fetch_add(1, Ordering::SeqCst);
                        assert_eq!(others, 0, "two leaders");
                        scene.events.send((name, true)).await.unwrap();
                        leadership.cancelled().await;
                        scene.leading.fetch_sub(1, Ordering::SeqCst);
                        scene.events.send((name, false)).await.unwrap();
                    }
                })
                .await;
            });
            stop
        }
    }

    fn scene() -> (Scene, mpsc::Receiver<(&'static str, bool)>) {
        let (events, seen) = mpsc::channel(16);
        let (tasks, leading) = (TaskTracker::new(), Arc::default());
        let scene = Scene {
            tasks,
            leading,
            events,
        };
        (scene, seen)
    }

    async fn next(seen: &mut mpsc::Receiver<(&'static str, bool)>) -> (&'static str, bool) {
        timeout(LONG, seen.recv()).await.unwrap().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn one_leads_and_the_next_follows() {
        let memory = MemoryStore::new();
        let (scene, mut seen) = scene();
        let stop_a = scene.candidate("a", Arc::new(memory.clone()));
        assert_eq!(next(&mut seen).await, ("a", true));
        let stop_b = scene.candidate("b", Arc::new(memory.clone()));
        assert!(
            timeout(TTL * 10, seen.recv()).await.is_err(),
            "leadership must not wander"
        );
        assert_eq!(leader(&memory).await.unwrap().unwrap().id, "a");
        stop_a.cancel();
        assert_eq!(next(&mut seen).await, ("a", false));
        let before = Instant::now();
        assert_eq!(next(&mut seen).await, ("b", true));
        assert!(
            before.elapsed() < TTL / 2,
            "resigning must not wait for the lease"
        );
        stop_b.cancel();
        scene.tasks.close();
        timeout(LONG, scene.tasks.wait()).await.unwrap();
        assert_eq!(leader(&memory).await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_without_its_store_stops_before_another_starts() {
        let memory = MemoryStore::new();
        let cut_off = FaultStore::new(Arc::new(memory.clone()));
        let (scene, mut seen) = scene();
        let stop_a = scene.candidate("a", Arc::new(cut_off.clone()));
        assert_eq!(next(&mut seen).await, ("a", true));
        let stop_b = scene.candidate("b", Arc::new(memory));
        cut_off.set_up(false);
        assert_eq!(next(&mut seen).await, ("a", false));
        assert_eq!(next(&mut seen).await, ("b", true));
        cut_off.set_up(true);
        stop_b.cancel();
        assert_eq!(next(&mut seen).await, ("b", false));
        assert_eq!(next(&mut seen).await, ("a", true));
        stop_a.cancel();
        scene.tasks.close();
        timeout(LONG, scene.tasks.wait()).await.unwrap();
    }
}
