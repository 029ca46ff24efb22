//! Whether the cluster can serve, and why not. Decides from what the watches last showed; never asks the
//! store, so that serving goes on when the store is away.

use std::sync::Arc;

use tokio::sync::watch;
use tramontane_coordination::{Members, Placements, WorkerRecord, WorkerState};
use tramontane_types::WorkerId;

/// Everybody's last known view of the cluster.
#[derive(Clone, Debug)]
pub(crate) struct ClusterView {
    pub(crate) members: watch::Receiver<Arc<Members>>,
    pub(crate) placements: watch::Receiver<Arc<Placements>>,
}

impl ClusterView {
    pub(crate) fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members.borrow())
    }

    pub(crate) fn placements(&self) -> Arc<Placements> {
        Arc::clone(&self.placements.borrow())
    }

    /// Waits until either view changes; for ever when both watches have ended.
    pub(crate) async fn changed(&mut self) {
        let (members, placements) = (&mut self.members, &mut self.placements);
        tokio::select! {
            biased;
            Ok(()) = members.changed() => {}
            Ok(()) = placements.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// `Ok` when requests can be served, else why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        check(&self.members(), &self.placements())
    }
}

/// `Ok` when requests can be served, else why not.
fn check(members: &Members, placements: &Placements) -> Result<(), String> {
    if !members.synced || !placements.synced {
        return Err("the coordination store has not been read yet".to_owned());
    }
    if placements.published.is_none() {
        let reason = match &placements.pending {
            Some(pending) => format!("workers are loading placement {}", pending.epoch),
            None if members.workers.is_empty() => "no worker has registered".to_owned(),
            None => "no placement of experts is published".to_owned(),
        };
        return Err(reason);
    }
    if attention_workers(members, placements).next().is_none() {
        return Err("no attention worker is ready".to_owned());
    }
    Ok(())
}

/// Workers that may be given new sequences: ready, and of the model and numeric class that the published
/// placement is for.
pub(crate) fn attention_workers<'a>(
    members: &'a Members,
    placements: &'a Placements,
) -> impl Iterator<Item = (&'a WorkerId, &'a Arc<WorkerRecord>)> {
    let published = placements.published.as_ref();
    members.workers.iter().filter(move |(_, record)| {
        record.roles.attention
            && record.state == WorkerState::Ready
            && published.is_some_and(|placement| {
                placement.numeric_class == record.numeric_class
                    && placement.model == record.model.fingerprint
            })
    })
}
