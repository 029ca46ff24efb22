//! Tells the transport where the other expert workers are. Never forgets one that the served placement names.

use std::collections::HashMap;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tramontane_coordination::Members;
use tramontane_exchange::GrpcTransport;
use tramontane_types::{Placement, WorkerId};

/// Keeps the peers of `transport` in step with the members until `stop`.
pub(crate) async fn follow(
    me: WorkerId,
    mut members: watch::Receiver<Arc<Members>>,
    serving: Arc<ArcSwapOption<Placement>>,
    transport: Arc<GrpcTransport>,
    stop: CancellationToken,
) {
    let mut known = HashMap::new();
    loop {
        let seen = members.borrow_and_update().clone();
        let next = addresses(&me, &seen, serving.load().as_deref(), &known);
        if next != known {
            tracing::debug!(worker = %me, num_peers = next.len(), "peers changed");
            transport.set_peers(next.clone());
            known = next;
        }
        tokio::select! {
            changed = members.changed() => if changed.is_err() {
                return;
            },
            () = stop.cancelled() => return,
        }
    }
}

/// Expert workers that are listed, and those that are not but still hold slices as far as we know: a
/// lost lease is no proof of a lost worker.
fn addresses(
    me: &WorkerId,
    members: &Members,
    serving: Option<&Placement>,
    known: &HashMap<WorkerId, String>,
) -> HashMap<WorkerId, String> {
    let holds = |worker: &WorkerId| serving.is_some_and(|p| p.workers.contains(worker));
    let mut next: HashMap<_, _> = known
        .iter()
        .filter(|(worker, _)| holds(worker))
        .map(|(worker, address)| (worker.clone(), address.clone()))
        .collect();
    for (worker, record) in &members.workers {
        if worker != me && record.roles.experts {
            next.insert(worker.clone(), record.address.clone());
        }
    }
    next
}
