//! Taking a worker out of the records by hand. Never touches its process: one that lives registers again.

use tramontane_types::WorkerId;

use super::record::WorkerRecord;
use crate::Error;
use crate::store::{CasOutcome, Entry, Store, keys};

/// Tries until the removal is given up: the worker itself, or another router, writes the record as well.
pub const REMOVE_ATTEMPTS_MAX: u32 = 8;

/// Removes the record of `id` for everybody who watches; false when there was none.
///
/// `unconfirmed` is the record of a worker that the store does not list any more but that watchers still
/// wait for, see [`Members::unconfirmed`](super::Members::unconfirmed): it is written and deleted again,
/// which tells all of them.
///
/// # Errors
/// The store's, or [`Error::Conflict`] when somebody kept writing the record.
pub async fn remove_worker(
    store: &dyn Store,
    id: &WorkerId,
    unconfirmed: Option<&WorkerRecord>,
) -> Result<bool, Error> {
    let key = format!("{}{id}", keys::WORKERS);
    for _ in 0..REMOVE_ATTEMPTS_MAX {
        let entry = match (store.get(&key).await?, unconfirmed) {
            (Some(Entry { revision, .. }), _) => Some(revision),
            (None, Some(record)) => {
                let value = record.encode()?;
                match store.compare_and_swap(&key, None, value, None).await? {
                    CasOutcome::Swapped(revision) => Some(revision),
                    CasOutcome::Conflict(_) => continue,
                }
            }
            (None, None) => None,
        };
        let Some(revision) = entry else {
            return Ok(false);
        };
        if store.delete_if(&key, revision).await? {
            return Ok(true);
        }
    }
    Err(Error::Conflict {
        key,
        expected: None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;
    use tokio_util::task::TaskTracker;

    use super::super::record::tests::record;
    use super::super::watch_members;
    use super::*;
    use crate::{FaultStore, MemoryStore};

    const LONG: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_is_only_waited_for_is_gone_for_every_watcher() {
        let memory = MemoryStore::new();
        let store = FaultStore::new(Arc::new(memory.clone()));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut members = watch_members(Arc::new(store.clone()), &tasks, stop.clone());
        let record = record("a");
        let text = serde_json::to_vec(&record).unwrap();
        memory.put(&record.key(), text.into(), None).await.unwrap();
        members
            .wait_for(|m| m.workers.contains_key(&record.id))
            .await
            .unwrap();
        store.set_up(false);
        members.wait_for(|m| m.stale).await.unwrap();
        memory.delete(&record.key()).await.unwrap();
        store.set_up(true);
        members
            .wait_for(|m| m.unconfirmed.contains(&record.id))
            .await
            .unwrap();

        // Less than the grace in which it might register again.
        let removed = remove_worker(&store, &record.id, Some(&record)).await;
        assert!(removed.unwrap());
        let gone = members.wait_for(|m| m.workers.is_empty());
        timeout(LONG, gone).await.unwrap().unwrap();
        assert!(!remove_worker(&store, &record.id, None).await.unwrap());
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
