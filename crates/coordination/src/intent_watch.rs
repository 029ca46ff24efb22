//! Everybody's view of what the operator wants. Never forgets a cordon because the store is away, or
//! because somebody wrote there what cannot be read.

use std::sync::Arc;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::mirror::{View, mirror};
use crate::planner::{Intent, read_intent};
use crate::store::{Entry, Store, WatchEvent, keys};

/// The operator's wish at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeenIntent {
    /// The wish; the default when there is none.
    pub intent: Intent,
    /// Whether the store has been read at all.
    pub synced: bool,
    /// Values that could not be read: 1 while a wish stands that is not the one in the store.
    pub skipped: usize,
}

/// Watches the intent until `stop`, through any outage of the store.
pub fn watch_intent(
    store: Arc<dyn Store>,
    tasks: &TaskTracker,
    stop: CancellationToken,
) -> watch::Receiver<Arc<SeenIntent>> {
    let (sender, receiver) = watch::channel(Arc::default());
    let view = IntentView {
        seen: SeenIntent::default(),
        sender,
    };
    tasks.spawn(mirror(store, keys::INTENT.to_owned(), view, stop));
    receiver
}

struct IntentView {
    seen: SeenIntent,
    sender: watch::Sender<Arc<SeenIntent>>,
}

impl IntentView {
    fn take(&mut self, entry: Option<Entry>) {
        match read_intent(entry) {
            Ok(intent) => {
                self.seen.intent = intent;
                self.seen.skipped = 0;
            }
            Err(error) => {
                tracing::warn!(%error, "intent ignored, keeping the last one");
                self.seen.skipped = 1;
            }
        }
    }
}

impl View for IntentView {
    fn replace(&mut self, entries: Vec<Entry>) {
        self.take(entries.into_iter().find(|entry| entry.key == keys::INTENT));
        self.seen.synced = true;
    }

    fn apply(&mut self, event: WatchEvent) {
        if event.key() != keys::INTENT {
            return;
        }
        match event {
            WatchEvent::Put(entry) => self.take(Some(entry)),
            WatchEvent::Delete { .. } => self.take(None),
        }
    }

    /// The last wish stands while the store is away.
    fn set_stale(&mut self, _stale: bool) {}

    fn publish(&mut self) {
        self.sender.send_if_modified(|known| {
            let changed = **known != self.seen;
            if changed {
                *known = Arc::new(self.seen.clone());
            }
            changed
        });
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::time::Duration;

    use bytes::Bytes;
    use tokio::time::timeout;
    use tramontane_types::WorkerId;

    use super::*;
    use crate::planner::set_intent;
    use crate::{FaultStore, MemoryStore};

    const LONG: Duration = Duration::from_secs(600);

    async fn until(
        seen: &mut watch::Receiver<Arc<SeenIntent>>,
        reached: impl Fn(&SeenIntent) -> bool,
    ) -> SeenIntent {
        let seen = timeout(LONG, seen.wait_for(|seen| reached(seen))).await;
        SeenIntent::clone(&seen.unwrap().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_cordon_is_seen_and_outlives_an_outage_and_junk() {
        let memory = MemoryStore::new();
        let store = FaultStore::new(Arc::new(memory.clone()));
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        let mut seen = watch_intent(Arc::new(store.clone()), &tasks, stop.clone());
        until(&mut seen, |seen| seen.synced).await;
        let mut intent = Intent::default();
        intent.cordoned.insert(WorkerId::new("w-1"));
        let revision = set_intent(&memory, &intent, None).await.unwrap();
        until(&mut seen, |seen| seen.intent == intent).await;

        memory
            .put(keys::INTENT, Bytes::from_static(b"{"), None)
            .await
            .unwrap();
        until(&mut seen, |seen| seen.skipped == 1).await;
        memory
            .put("intent-of-a-neighbour", Bytes::from_static(b"{}"), None)
            .await
            .unwrap();
        intent.slices_per_expert = Some(2);
        let stored = memory.get(keys::INTENT).await.unwrap().unwrap();
        assert!(stored.revision > revision);
        set_intent(&memory, &intent, Some(stored.revision))
            .await
            .unwrap();
        let now = until(&mut seen, |seen| seen.intent.slices_per_expert.is_some()).await;
        assert_eq!((now.intent, now.skipped), (intent.clone(), 0));

        store.set_up(false);
        intent.replicas = NonZeroUsize::new(3);
        let stored = memory.get(keys::INTENT).await.unwrap().unwrap();
        set_intent(&memory, &intent, Some(stored.revision))
            .await
            .unwrap();
        assert_eq!(
            seen.borrow().intent.replicas,
            None,
            "nothing is seen, nothing forgotten"
        );
        store.set_up(true);
        let now = until(&mut seen, |seen| seen.intent.replicas.is_some()).await;
        assert_eq!(now.intent, intent);

        memory.delete(keys::INTENT).await.unwrap();
        until(&mut seen, |seen| seen.intent == Intent::default()).await;
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
