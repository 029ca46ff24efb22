//! What happened in the cluster, as messages.

use futures::StreamExt as _;
use tramontane_proto::v1;

use super::EventStream;
use crate::events::{EVENTS_MAX, Event};
use crate::run::App;

pub(super) fn list(app: &App, limit: u32) -> v1::ListEventsResponse {
    let limit = match limit {
        0 => EVENTS_MAX,
        limit => limit as usize,
    };
    let events = app.events.last(limit).into_iter().map(message).collect();
    v1::ListEventsResponse { events }
}

/// Ends when the router does.
pub(super) fn watch(app: &App, after: u64) -> EventStream {
    let stop = app.dispatcher.abort.clone();
    Box::pin(
        app.events
            .follow(after, stop)
            .map(|event| Ok(message(event))),
    )
}

fn message(event: Event) -> v1::ClusterEvent {
    let change = event.change;
    v1::ClusterEvent {
        sequence: event.sequence,
        time_ms: event.time_ms,
        kind: change.kind.name().to_owned(),
        worker: change.worker.map(|id| id.to_string()).unwrap_or_default(),
        epoch: change.epoch.0,
        text: change.text,
    }
}
