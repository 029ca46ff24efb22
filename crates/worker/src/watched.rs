//! What a worker sees of the cluster, from before it registers to after it has left.

use std::sync::Arc;

use tokio::sync::watch;
use tramontane_coordination::{Members, SeenIntent, Store, watch_intent, watch_members};
use tramontane_model::Checkpoint;
use tramontane_proto::v1;
use tramontane_runtime::tls::Role;

use crate::WorkerConfig;
use crate::assemble::Life;
use crate::run::WorkerParts;
use crate::weights::{PeerWeights, WeightStats};

/// What this worker sees of the cluster.
#[derive(Debug)]
pub(crate) struct Watched {
    pub(crate) members: watch::Receiver<Arc<Members>>,
    pub(crate) intent: watch::Receiver<Arc<SeenIntent>>,
}

impl Watched {
    pub(crate) fn start(store: &Arc<dyn Store>, life: &Life) -> Self {
        let (store, ended) = (|| Arc::clone(store), || life.ended.clone());
        Self {
            members: watch_members(store(), &life.tasks, ended()),
            intent: watch_intent(store(), &life.tasks, ended()),
        }
    }

    /// The checkpoint, with the other members to be asked for what cannot be read here.
    pub(crate) fn back(
        &self,
        parts: &WorkerParts,
        config: &WorkerConfig,
        stats: &Arc<WeightStats>,
        life: &Life,
    ) -> Arc<Checkpoint> {
        let checkpoint = &parts.checkpoint;
        let asker = v1::WeightsAsker {
            worker_id: config.id.clone(),
            cluster: config.cluster.clone(),
            model: checkpoint.fingerprint().to_owned(),
        };
        let (members, stats) = (self.members.clone(), Arc::clone(stats));
        let link = parts.tls.link(Role::Worker);
        let peers = PeerWeights::new(asker, link, members, stats, life.ended.clone());
        Arc::new(checkpoint.backed_by(Arc::new(peers)))
    }
}
