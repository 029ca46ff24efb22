//! Keeps what depends on the cluster true to it: readiness, and the places at the door.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tramontane_runtime::ReadinessSetter;

use crate::cluster::ClusterView;
use crate::dispatch::Dispatcher;

/// Keeps readiness true to the cluster until `stop`; never ready once `stopping`.
pub(crate) async fn keep_ready(
    mut cluster: ClusterView,
    ready: ReadinessSetter,
    stopping: CancellationToken,
    stop: CancellationToken,
) {
    loop {
        if stopping.is_cancelled() {
            ready.set(Err("this router is stopping".to_owned()));
            // Health endpoints go on answering from this until the end.
            stop.cancelled().await;
            return;
        }
        let state = cluster.check();
        if let Err(reason) = &state {
            tracing::debug!(reason, "not ready");
        }
        ready.set(state);
        tokio::select! {
            () = cluster.changed() => {}
            () = stopping.cancelled() => {}
            () = stop.cancelled() => return,
        }
    }
}

/// Keeps the places at the door true to what the workers run at once, until `stop`: what a worker has to let wait it does not
/// sort by tenant.
pub(crate) async fn keep_places(dispatcher: Arc<Dispatcher>, stop: CancellationToken) {
    let mut cluster = dispatcher.pool.cluster().clone();
    loop {
        dispatcher.admission.set_capacity(cluster.capacity());
        tokio::select! {
            () = cluster.changed() => {}
            () = stop.cancelled() => return,
        }
    }
}
