//! Keeps a view of everything below a prefix in step with the store, for ever. Never empties the view
//! because the store is away: the view is told that it is stale and keeps what it has.

use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::Error;
use crate::backoff::Backoff;
use crate::store::{Entry, Revision, Store, Watch, WatchEvent};

/// First pause before listing again.
const RELIST_PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause before listing again.
const RELIST_PAUSE_MAX: Duration = Duration::from_secs(5);
/// Most changes that are taken together before the view is published.
const EVENTS_PER_PUBLISH: usize = 256;

/// What a prefix of the store means to somebody.
pub(crate) trait View: Send {
    /// Everything below the prefix was read anew.
    fn replace(&mut self, entries: Vec<Entry>);
    /// One key changed.
    fn apply(&mut self, event: WatchEvent);
    /// Whether the store is out of sight.
    fn set_stale(&mut self, stale: bool);
    /// When [`View::publish`] should be called even if nothing changes.
    fn deadline(&self) -> Option<Instant> {
        None
    }
    /// Shows the view to its readers.
    fn publish(&mut self);
}

/// Runs until `stop`.
pub(crate) async fn mirror(
    store: Arc<dyn Store>,
    prefix: String,
    mut view: impl View,
    stop: CancellationToken,
) {
    let mut backoff = Backoff::new(RELIST_PAUSE_MIN, RELIST_PAUSE_MAX);
    let prefix = prefix.as_str();
    let mut remembered = store.remembered(prefix);
    let work = async {
        loop {
            let error = match store.list(prefix).await {
                Ok(listing) => {
                    remembered = None;
                    view.replace(listing.entries);
                    view.set_stale(false);
                    view.publish();
                    backoff.reset();
                    follow(&*store, prefix, listing.revision.next(), &mut view).await
                }
                Err(error) => error,
            };
            // Not so a replaced store: who is missing from it did not leave, but is gone with its data.
            if matches!(error, Error::Compacted { .. }) {
                tracing::info!(prefix, %error, "watch fell behind, listing again");
            } else {
                tracing::warn!(prefix, %error, "store out of sight, keeping the last view");
                if let Some(entries) = remembered.take() {
                    tracing::warn!(
                        prefix,
                        "going by what was known before this process started"
                    );
                    view.replace(entries);
                }
                view.set_stale(true);
                view.publish();
            }
            sleep(backoff.pause()).await;
        }
    };
    tokio::select! {
        biased;
        () = work => {}
        () = stop.cancelled() => {}
    }
}

/// Applies changes until the watch ends, and says why it did.
async fn follow(store: &dyn Store, prefix: &str, from: Revision, view: &mut impl View) -> Error {
    let mut watch = store.watch(prefix, from);
    loop {
        let deadline = view.deadline();
        let wait = async {
            match deadline {
                Some(deadline) => sleep_until(deadline).await,
                None => std::future::pending().await,
            }
        };
        let event = tokio::select! {
            biased;
            event = watch.next() => event,
            () = wait => {
                view.publish();
                continue;
            }
        };
        let taken = take(event, &mut watch, view);
        view.publish();
        if let Err(error) = taken {
            return error;
        }
    }
}

/// Applies `event` and what else is there already.
fn take(
    event: Option<Result<WatchEvent, Error>>,
    watch: &mut Watch,
    view: &mut impl View,
) -> Result<(), Error> {
    let ended = || Error::Unavailable {
        operation: "watch",
        detail: "stream ended".to_owned(),
    };
    view.apply(event.ok_or_else(ended)??);
    for _ in 1..EVENTS_PER_PUBLISH {
        let Some(event) = watch.next().now_or_never() else {
            break;
        };
        view.apply(event.ok_or_else(ended)??);
    }
    Ok(())
}
