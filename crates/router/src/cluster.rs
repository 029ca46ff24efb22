//! Whether the cluster can serve, and why not. Decides from what the watches last showed; never asks the
//! store, so that serving goes on when the store is away.

use std::sync::Arc;

use tokio::sync::watch;
use tramontane_coordination::{
    Intent, Members, Placements, SeenIntent, Version, WorkerRecord, WorkerState,
};
use tramontane_types::{Placement, WorkerId};

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

    /// The version that new requests begin with.
    pub(crate) fn serving(&self) -> Option<Arc<Version>> {
        self.placements.borrow().serving.clone()
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

    /// `Ok` when new requests can be served, else why not.
    pub(crate) fn check(&self) -> Result<(), String> {
        check(&self.members(), &self.placements(), &self.intent())
    }

    /// Sequences that those workers run at once which new requests go to; `None` where there are none, or one does not say.
    pub(crate) fn capacity(&self) -> Option<usize> {
        let (members, seen, version) = (self.members(), self.intent(), self.serving()?);
        let workers = attention_workers(&members, &version, &seen.intent);
        let sizes = workers.map(|(_, record)| match record.sequences_max {
            0 => None,
            sequences => Some(sequences as usize),
        });
        sizes.sum::<Option<usize>>().filter(|sum| *sum > 0)
    }

    /// How far the cluster is on its way to serving.
    pub(crate) fn progress(&self) -> String {
        match self.check() {
            Ok(()) => "workers are ready".to_owned(),
            Err(reason) => reason,
        }
    }

    /// `Ok` when requests that began with `version` can be served, else why not.
    pub(crate) fn check_version(&self, version: &Version) -> Result<(), String> {
        let (members, seen) = (self.members(), self.intent());
        if !members.workers.values().any(|worker| version.has(worker)) {
            return Err(format!(
                "no worker has the weights any more that this answer began with: {version}"
            ));
        }
        check_workers(&members, version, &seen.intent)
    }
}

/// `Ok` when new requests can be served, else why not.
fn check(members: &Members, placements: &Placements, seen: &SeenIntent) -> Result<(), String> {
    if !members.synced || !placements.synced || !seen.synced {
        return Err("the coordination store has not been read yet".to_owned());
    }
    let Some(version) = placements.serving.as_deref() else {
        let mut pending = placements
            .groups
            .values()
            .filter_map(|g| g.pending.as_ref());
        let reason = match pending.next() {
            Some(pending) => loading(members, pending),
            None if members.workers.is_empty() => "no worker has registered".to_owned(),
            None => "no placement of experts is published".to_owned(),
        };
        return Err(reason);
    };
    if placements.published().is_none() {
        return Err(format!(
            "no placement of experts is published for {version}"
        ));
    }
    check_workers(members, version, &seen.intent)
}

/// How many of the workers of a placement have loaded it.
fn loading(members: &Members, pending: &Placement) -> String {
    let (epoch, all) = (pending.epoch, pending.workers.len());
    let has_loaded = |id: &&WorkerId| {
        let record = members.workers.get(*id);
        record.is_some_and(|record| record.loaded >= epoch)
    };
    let loaded = pending.workers.iter().filter(has_loaded).count();
    format!("workers are loading placement {epoch}, {loaded} of {all} have it")
}

fn check_workers(members: &Members, version: &Version, intent: &Intent) -> Result<(), String> {
    if attention_workers(members, version, intent).next().is_some() {
        return Ok(());
    }
    let nobody = Intent::default();
    let mut cordoned = attention_workers(members, version, &nobody);
    Err(match cordoned.next() {
        Some((id, _)) => format!(
            "every attention worker that is ready is cordoned or to give up attention, such as {id}"
        ),
        None => "no attention worker is ready".to_owned(),
    })
}

/// Workers that may be given sequences of a version: ready, not cordoned, and of its weights and class.
pub(crate) fn attention_workers<'a>(
    members: &'a Members,
    version: &'a Version,
    intent: &'a Intent,
) -> impl Iterator<Item = (&'a WorkerId, &'a Arc<WorkerRecord>)> {
    members.workers.iter().filter(move |(_, record)| {
        record.roles.attention
            && record.state == WorkerState::Ready
            && intent.may_attend(record)
            && version.has(record)
    })
}
