//! Tells the transport where the other expert workers of its weights are. Never forgets one that the served
//! placement names.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tramontane_coordination::registry::HostSocket;
use tramontane_coordination::{Members, WorkerRecord};
use tramontane_exchange::{HostTransport, PeerAddress};
use tramontane_types::{Placement, WorkerId};

use crate::host_socket;
use crate::state::Node;

/// Keeps the peers of `transport` in step with the members until `stop`.
pub(crate) async fn follow(
    node: Arc<Node>,
    mut members: watch::Receiver<Arc<Members>>,
    serving: Arc<ArcSwapOption<Placement>>,
    transport: Arc<HostTransport>,
    stop: CancellationToken,
) {
    let host = host_socket::host().ok();
    let (me, mut known) = (&node.id, HashMap::new());
    loop {
        let seen = members.borrow_and_update().clone();
        let next = addresses(
            me,
            host.as_deref(),
            &seen.of(&node.version),
            serving.load().as_deref(),
            &known,
        );
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
    host: Option<&str>,
    members: &Members,
    serving: Option<&Placement>,
    known: &HashMap<WorkerId, PeerAddress>,
) -> HashMap<WorkerId, PeerAddress> {
    let holds = |worker: &WorkerId| serving.is_some_and(|p| p.workers.contains(worker));
    let mut next: HashMap<_, _> = known
        .iter()
        .filter(|(worker, _)| holds(worker))
        .map(|(worker, address)| (worker.clone(), address.clone()))
        .collect();
    for (worker, record) in &members.workers {
        if worker != me && record.roles.experts {
            next.insert(worker.clone(), address(record, host));
        }
    }
    next
}

/// Where a worker is reached; by its socket too when that is on this host.
fn address(record: &WorkerRecord, host: Option<&str>) -> PeerAddress {
    let socket = record.socket.as_ref();
    let is_here = |socket: &&HostSocket| host == Some(socket.host.as_str());
    PeerAddress {
        address: record.address.clone(),
        socket: socket.filter(is_here).map(|s| PathBuf::from(&s.path)),
    }
}
