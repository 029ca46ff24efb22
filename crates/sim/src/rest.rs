//! Whether a cluster is at rest: nothing is on its way any more, and everybody agrees. Changes nothing.

use std::sync::Arc;

use tramontane_coordination::planner::intent;
use tramontane_coordination::store::keys;
use tramontane_coordination::{PlacementStore, Store as _, Version, WorkerState};
use tramontane_types::Placement;

use crate::model::version;
use crate::worker::SimWorker;
use crate::world::World;

impl World {
    /// Whether every slice of the published placement is held by live workers that all serve on it, and
    /// nothing is pending, loading, leaving or open.
    pub(crate) async fn settled(&self) -> Result<(), String> {
        let workers: Vec<Arc<SimWorker>> = self.shared.peers.lock().values().cloned().collect();
        let versions = 0..=u8::from(self.plan.others > 0);
        for number in versions {
            let of_version = |w: &&Arc<SimWorker>| w.build.version == number;
            let workers: Vec<_> = workers.iter().filter(of_version).cloned().collect();
            self.settled_version(&version(number), &workers).await?;
        }
        let listed = self.server.memory().list(keys::WORKERS).await;
        let listed = listed.map_err(|e| e.to_string())?.entries.len();
        if listed != workers.len() {
            return Err(format!("{listed} workers are listed of {}", workers.len()));
        }
        self.settled_serving().await?;
        self.clients.close();
        let open = self.clients.len();
        self.clients.reopen();
        if open > 0 {
            return Err(format!("{open} requests are open"));
        }
        Ok(())
    }

    /// Whether all routers let the same version serve: the wished one, if there is one.
    async fn settled_serving(&self) -> Result<(), String> {
        let memory = self.server.memory();
        let stored = memory.get(keys::SERVING).await;
        let stored = stored.map_err(|e| e.to_string())?;
        let stored = stored.ok_or("no version serves")?;
        let serving: Version = serde_json::from_slice(&stored.value).map_err(|e| e.to_string())?;
        for router in self.routers.lock().values() {
            let known = router.placements.borrow().serving.clone();
            if known.as_deref() != Some(&serving) {
                return Err(format!("{} lets {known:?} serve", router.life.node));
            }
        }
        let (intent, _) = intent(&memory).await.map_err(|e| e.to_string())?;
        match intent.weights {
            Some(wished) if wished != serving => Err(format!("{serving} serves, not {wished}")),
            _ => Ok(()),
        }
    }

    async fn settled_version(
        &self,
        version: &Version,
        workers: &[Arc<SimWorker>],
    ) -> Result<(), String> {
        let placements = PlacementStore::new(Arc::new(self.server.memory()), version.key());
        let stored = placements.published().await.map_err(|e| e.to_string())?;
        let published = stored.ok_or("no placement is published")?.placement;
        if placements
            .pending()
            .await
            .map_err(|e| e.to_string())?
            .is_some()
        {
            return Err("a placement is pending".to_owned());
        }
        for worker in workers {
            let id = &worker.id;
            let state = *worker.state.borrow();
            if state != WorkerState::Ready {
                return Err(format!("{id} is {state:?}"));
            }
            let serving = worker.serving.load().as_ref().map(|p| p.epoch);
            if serving != Some(published.epoch) {
                return Err(format!(
                    "{id} serves on {serving:?}, expected {}",
                    published.epoch
                ));
            }
        }
        check_cover(&published, workers)?;
        for router in self.routers.lock().values() {
            let known = router.placements.borrow().of(version).cloned();
            let known = known.unwrap_or_default().published_epoch();
            // One that alone remembers a placement from before a wipe keeps it: it serves nothing on it.
            if known < published.epoch {
                return Err(format!("{} knows epoch {known}", router.life.node));
            }
        }
        Ok(())
    }
}

fn check_cover(published: &Placement, workers: &[Arc<SimWorker>]) -> Result<(), String> {
    for (slice, holders) in published.iter() {
        for &holder in holders {
            let id = published.worker(holder);
            let holds = |worker: &&Arc<SimWorker>| Some(&worker.id) == id && worker.held.has(slice);
            if workers.iter().find(holds).is_none() {
                return Err(format!("{slice} is not held by {id:?}"));
            }
        }
    }
    Ok(())
}
