//! What happened in the cluster, as this router saw it: the last of it, in memory. Never holds up whoever
//! reports something, and never grows.

pub(crate) mod changes;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::Stream;
use futures::stream::unfold;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tramontane_types::WorkerId;

pub(crate) use changes::Change;
use changes::{Snapshot, changes};

use crate::cluster::ClusterView;

/// Events that are kept; older ones are forgotten.
pub(crate) const EVENTS_MAX: usize = 1024;
/// Sequences that lose their worker within this time are one event.
const MOVES_TOGETHER: Duration = Duration::from_millis(200);

/// Something that happened, and when.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// From 1, without gaps.
    pub(crate) sequence: u64,
    pub(crate) time_ms: u64,
    pub(crate) change: Change,
}

/// The last events of this router.
#[derive(Debug, Default)]
pub(crate) struct EventLog {
    events: Mutex<VecDeque<Event>>,
    newest: watch::Sender<u64>,
    /// Sequences that lost their worker and are in no event yet; emptied every [`MOVES_TOGETHER`].
    moved: Mutex<BTreeMap<WorkerId, u32>>,
    has_moved: Notify,
}

impl EventLog {
    /// A sequence cannot go on where it was.
    pub(crate) fn sequence_moved(&self, from: &WorkerId) {
        *self.moved.lock().entry(from.clone()).or_default() += 1;
        self.has_moved.notify_one();
    }

    /// The newest `limit` events, oldest first.
    pub(crate) fn last(&self, limit: usize) -> Vec<Event> {
        let events = self.events.lock();
        let skipped = events.len().saturating_sub(limit);
        events.iter().skip(skipped).cloned().collect()
    }

    /// Every event that is kept and younger than `after`, and then what comes, until `stop`.
    pub(crate) fn follow(
        self: &Arc<Self>,
        after: u64,
        stop: CancellationToken,
    ) -> impl Stream<Item = Event> + Send + use<> {
        let newest = self.newest.subscribe();
        unfold(
            (Arc::clone(self), newest, after, stop),
            |(log, mut newest, after, stop)| async move {
                loop {
                    if let Some(event) = log.first_after(after) {
                        let after = event.sequence;
                        return Some((event, (log, newest, after, stop)));
                    }
                    tokio::select! {
                        changed = newest.changed() => changed.ok()?,
                        () = stop.cancelled() => return None,
                    }
                }
            },
        )
    }

    fn first_after(&self, after: u64) -> Option<Event> {
        let events = self.events.lock();
        let first = events.front()?.sequence;
        let index = after.saturating_add(1).saturating_sub(first);
        events.get(usize::try_from(index).ok()?).cloned()
    }

    fn append(&self, changes: Vec<Change>, time_ms: u64) {
        let mut sequence = *self.newest.borrow();
        let mut events = self.events.lock();
        for change in changes {
            sequence += 1;
            let worker = change.worker.as_ref().map(tracing::field::display);
            let (kind, epoch) = (change.kind.name(), change.epoch.0);
            tracing::debug!(kind, worker, epoch, text = change.text, "cluster event");
            events.push_back(Event {
                sequence,
                time_ms,
                change,
            });
            if events.len() > EVENTS_MAX {
                events.pop_front();
            }
        }
        drop(events);
        self.newest
            .send_if_modified(|known| std::mem::replace(known, sequence) != sequence);
    }
}

/// Writes down what happens in the cluster until `stop`.
pub(crate) async fn record(log: Arc<EventLog>, mut cluster: ClusterView, stop: CancellationToken) {
    let mut before = Snapshot::default();
    loop {
        let after = Snapshot {
            members: cluster.members(),
            placements: cluster.placements(),
            intent: cluster.intent(),
            moved: std::mem::take(&mut *log.moved.lock()),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let time_ms = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        log.append(changes(&before, &after), time_ms);
        before = after;
        tokio::select! {
            () = cluster.changed() => {}
            () = log.has_moved.notified() => sleep(MOVES_TOGETHER).await,
            () = stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use tramontane_types::Epoch;

    use super::changes::Kind;
    use super::*;

    fn change(text: &str) -> Change {
        Change {
            kind: Kind::WorkerReady,
            worker: Some(WorkerId::new("a")),
            epoch: Epoch(1),
            text: text.to_owned(),
        }
    }

    #[test]
    fn only_the_last_events_are_kept_and_numbers_go_on() {
        let log = EventLog::default();
        let many = (0..EVENTS_MAX + 3).map(|i| change(&i.to_string()));
        log.append(many.collect(), 7);
        let kept = log.last(usize::MAX);
        assert_eq!((kept.len(), kept[0].sequence), (EVENTS_MAX, 4));
        let last = log.last(2);
        let last: Vec<u64> = last.iter().map(|event| event.sequence).collect();
        assert_eq!(last, [EVENTS_MAX as u64 + 2, EVENTS_MAX as u64 + 3]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_follower_gets_what_was_and_what_comes_until_the_end() {
        let log = Arc::new(EventLog::default());
        log.append(vec![change("a"), change("b")], 1);
        let stop = CancellationToken::new();
        let mut events = Box::pin(log.follow(1, stop.clone()));
        assert_eq!(events.next().await.unwrap().change.text, "b");
        let (next, ()) = tokio::join!(events.next(), async { log.append(vec![change("c")], 2) });
        assert_eq!(next.unwrap().sequence, 3);
        stop.cancel();
        assert_eq!(events.next().await, None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_fell_behind_goes_on_with_the_oldest_that_is_kept() {
        let log = Arc::new(EventLog::default());
        let many = (0..EVENTS_MAX + 5).map(|i| change(&i.to_string()));
        log.append(many.collect(), 7);
        let mut events = Box::pin(log.follow(2, CancellationToken::new()));
        assert_eq!(events.next().await.unwrap().sequence, 6);
    }
}
