//! Whether the cluster can serve, and why not. Decides from what the watches last showed; never asks the
//! store, so that serving goes on when the store is away.

use std::sync::Arc;

use tokio::sync::watch;
use tramontane_coordination::{Intent, Members, Placements, SeenIntent, WorkerRecord, WorkerState};
use tramontane_types::WorkerId;

/// Everybody's last known view of the cluster.
#[derive(Clone, Debug)]
pub(crate) struct ClusterView {
    pub(crate) members: watch::Receiver<Arc<Members>>,
    pub(crate) placements: watch::Receiver<Arc<Placements>>,
    pub(crate) intent: watch::Receiver<Arc<SeenIntent>>,
}

impl ClusterView {
    pub(crate) fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members.borrow())
    }

    pub(crate) fn placements(&self) -> Arc<Placements> {
        Arc::clone(&self.placements.borrow())
    }

    pub(crate) fn intent(&self) -> Arc<SeenIntent> {
        Arc::clone(&self.intent.borrow())
    }

    /// Waits until any view changes; for ever when all watches have ended.
    pub(crate) async fn changed(&mut self) {
        let (members, placements) = (&mut self.members, &mut self.placements);
        tokio::select! {
            biased;
            Ok(()) = members.changed() => {}
            Ok(()) = placements.changed() => {}
            Ok(()) = self.intent.changed() => {}
            else => std::future::pending().await,
        }
    }

    /// `Ok` when requests can be served, else why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        check(&self.members(), &self.placements(), &self.intent())
    }
}

/// `Ok` when requests can be served, else why not.
fn check(members: &Members, placements: &Placements, seen: &SeenIntent) -> Result<(), String> {
    if !members.synced || !placements.synced || !seen.synced {
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
    if attention_workers(members, placements, &seen.intent)
        .next()
        .is_some()
    {
        return Ok(());
    }
    let nobody = Intent::default();
    let mut cordoned = attention_workers(members, placements, &nobody);
    Err(match cordoned.next() {
        Some((id, _)) => format!(
            "every attention worker that is ready is cordoned or to give up attention, such as {id}"
        ),
        None => "no attention worker is ready".to_owned(),
    })
}

/// Workers that may be given new sequences: ready, not cordoned, and of the model and numeric class that
/// the published placement is for.
pub(crate) fn attention_workers<'a>(
    members: &'a Members,
    placements: &'a Placements,
    intent: &'a Intent,
) -> impl Iterator<Item = (&'a WorkerId, &'a Arc<WorkerRecord>)> {
    members.workers.iter().filter(move |(id, record)| {
        record.roles.attention
            && record.state == WorkerState::Ready
            && intent.may_attend(id)
            && is_of_the_group(record, placements)
    })
}

/// Whether a worker is of the model and numeric class that the published placement is for.
pub(crate) fn is_of_the_group(record: &WorkerRecord, placements: &Placements) -> bool {
    placements.published.as_ref().is_some_and(|placement| {
        placement.numeric_class == record.numeric_class
            && placement.model == record.model.fingerprint
    })
}
