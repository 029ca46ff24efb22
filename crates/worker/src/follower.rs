//! Follows the placements: serves on the published one, loads what the pending one asks for, drops what
//! nobody asks for any more. Never loads on a runtime thread and never goes back to an older epoch.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use futures::future::OptionFuture;
use indicatif::ProgressBar;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{Placements, Registration, WorkerState};
use tramontane_model::{Checkpoint, load_slices};
use tramontane_types::{Epoch, ExpertSlice, Placement};

use crate::following::{next_load, supersedes, unwanted};
use crate::island::Formation;
use crate::state::Node;

/// Slices that are loaded before the placements are looked at again.
const LOAD_BATCH: usize = 32;
/// How long to wait before trying to load again what could not be loaded.
const LOAD_RETRY: Duration = Duration::from_secs(5);

/// Follows the placements for one worker.
#[derive(Debug)]
pub(crate) struct Follower {
    pub(crate) node: Arc<Node>,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) registration: Registration,
    pub(crate) placements: watch::Receiver<Arc<Placements>>,
    /// What the engine's exchange plans with.
    pub(crate) serving: Arc<ArcSwapOption<Placement>>,
    pub(crate) drop_grace: Duration,
    pub(crate) progress: Option<ProgressBar>,
    pub(crate) tasks: TaskTracker,
    /// On an island: who computes together, which decides what is held.
    pub(crate) formations: Option<watch::Receiver<Formation>>,
}

type Loading = JoinHandle<Result<(), tramontane_model::Error>>;

impl Follower {
    /// Runs until `stop`.
    pub(crate) async fn run(mut self, stop: CancellationToken) {
        let mut loading: Option<Loading> = None;
        let mut load_after: Option<Instant> = None;
        loop {
            let seen = self.placements.borrow_and_update().clone();
            let group = seen.of(&self.node.version).cloned().unwrap_or_default();
            let published = group.published.filter(|p| self.fits(p));
            let pending = group.pending.filter(|p| self.fits(p));
            self.serve_on(published.as_ref());
            let drop_at = self.retire(published.as_deref(), pending.as_deref());
            if loading.is_none() && load_after.is_none() {
                loading = self.load(published.as_deref(), pending.as_deref(), &stop);
            }
            let timer = [load_after, drop_at].into_iter().flatten().min();
            let wait = OptionFuture::from(timer.map(sleep_until));
            let loaded = OptionFuture::from(loading.as_mut());
            let formed = OptionFuture::from(self.formations.as_mut().map(watch::Receiver::changed));
            tokio::select! {
                changed = self.placements.changed() => if changed.is_err() {
                    return;
                },
                Some(result) = loaded => {
                    loading = None;
                    let is_loaded = self.report(result.map_err(|e| e.to_string()));
                    load_after = (!is_loaded).then(|| Instant::now() + LOAD_RETRY);
                }
                Some(()) = wait => {
                    load_after = load_after.filter(|at| *at > Instant::now());
                    self.drop_unused(published.as_deref(), pending.as_deref()).await;
                }
                Some(_) = formed => {
                    load_after = None;
                    self.tell_capacity();
                }
                () = stop.cancelled() => return,
            }
        }
    }

    /// An island has memory for as many experts as the ranks that are there.
    fn tell_capacity(&self) {
        if let Some(hub) = &self.node.hub {
            self.registration
                .update(|record| record.capacity_bytes = hub.offered(record.roles));
        }
    }

    /// Whether a placement of our group has the shape of our model.
    fn fits(&self, placement: &Placement) -> bool {
        let geometry = &self.node.geometry;
        let is_ours = placement.num_layers == geometry.num_layers
            && placement.num_experts == geometry.num_experts;
        let problem = placement.validate().err();
        if !is_ours || problem.is_some() {
            let (layers, experts) = (placement.num_layers, placement.num_experts);
            tracing::warn!(
                epoch = placement.epoch.0,
                layers,
                experts,
                ?problem,
                "placement ignored"
            );
        }
        is_ours && problem.is_none()
    }

    /// Serves on a newer placement from now on. A slice of ours that is not loaded yet is refused as
    /// stale, and asked of another holder.
    fn serve_on(&self, published: Option<&Arc<Placement>>) {
        let known = self.serving.load().as_ref().map(|p| p.epoch);
        let newer = published.filter(|published| supersedes(known, published.epoch));
        let Some(placement) = newer else { return };
        tracing::info!(worker = %self.node.id, epoch = placement.epoch.0, "serving on a new placement");
        self.serving.store(Some(Arc::clone(placement)));
        self.node.epoch.store(placement.epoch.0, Ordering::Release);
    }

    /// Starts loading what is missing, the published placement first; says what is complete.
    fn load(
        &self,
        published: Option<&Placement>,
        pending: Option<&Placement>,
        stop: &CancellationToken,
    ) -> Option<Loading> {
        let holds = self.node.roles().experts;
        let held = holds.then(|| self.node.experts.store.held_slices());
        // Of another numeric class than the group's, results would be others: never loaded, and never said to be.
        let in_part = |placement: &&Placement| self.can_hold(placement);
        let (published, pending) = (published.filter(in_part), pending.filter(in_part));
        let next = next_load(&self.node.id, published, pending, held.as_deref());
        for (epoch, is_published) in next.complete {
            self.acknowledge(epoch, is_published);
        }
        if next.missing.is_empty() {
            return None;
        }
        self.start_loading(next.missing, stop.clone())
    }

    fn can_hold(&self, placement: &Placement) -> bool {
        let can = self.registration.record().can_hold(placement);
        if !can {
            let (worker, epoch) = (&self.node.id, placement.epoch.0);
            tracing::error!(%worker, epoch, "placement gives this worker experts of layers that its numeric class has no part in: not loaded");
        }
        can
    }

    fn acknowledge(&self, epoch: Epoch, is_published: bool) {
        self.registration
            .update(|record| record.loaded = record.loaded.max(epoch));
        if is_published {
            self.node
                .advance(&[WorkerState::Joining], WorkerState::Ready);
            if let Some(progress) = &self.progress {
                progress.finish_and_clear();
            }
        }
    }

    fn start_loading(
        &self,
        mut slices: Vec<ExpertSlice>,
        stop: CancellationToken,
    ) -> Option<Loading> {
        let half = &self.node.experts;
        let segment_bytes = half.segment_bytes;
        let bytes_of = move |slices: &[ExpertSlice]| -> u64 {
            let segments = slices.iter().map(|slice| u64::from(slice.range.len()));
            segments.sum::<u64>() * segment_bytes
        };
        let (worker, progress) = (self.node.id.clone(), self.progress.clone());
        let bytes = bytes_of(&slices);
        if let Some(bar) = &progress {
            bar.set_length(bar.position() + bytes);
        }
        tracing::info!(%worker, num_slices = slices.len(), bytes, "loading expert slices");
        slices.truncate(LOAD_BATCH);
        let (store, checkpoint) = (Arc::clone(&half.store), Arc::clone(&self.checkpoint));
        // As many as are read at once: then a worker that leaves is noticed.
        let chunk = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let load = move || {
            let begin = Instant::now();
            let mut bytes_done = 0;
            for chunk in slices.chunks(chunk) {
                if stop.is_cancelled() {
                    return Ok(());
                }
                load_slices(&checkpoint, &*store, chunk, &|_, _| {})?;
                bytes_done += bytes_of(chunk);
                if let Some(bar) = &progress {
                    bar.inc(bytes_of(chunk));
                }
            }
            let (took, bytes_left) = (begin.elapsed(), bytes - bytes_done);
            let left = took.mul_f64(bytes_left as f64 / bytes_done.max(1) as f64);
            tracing::info!(%worker, bytes_done, bytes_left, ?took, ?left, "expert slices loaded");
            Ok(())
        };
        Some(self.tasks.spawn_blocking(load))
    }

    /// Whether loading worked.
    fn report(&self, result: Result<Result<(), tramontane_model::Error>, String>) -> bool {
        let worker = &self.node.id;
        match result {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(%worker, error, retry_in = ?LOAD_RETRY, "expert slices cannot be loaded");
            }
            Err(error) => tracing::error!(%worker, error, "loading expert slices panicked"),
        }
        false
    }

    /// What no placement asks of us any more; nothing before there is a placement at all.
    fn unwanted(
        &self,
        published: Option<&Placement>,
        pending: Option<&Placement>,
    ) -> Vec<ExpertSlice> {
        let half = &self.node.experts;
        unwanted(
            &self.node.id,
            published,
            pending,
            &half.store.packed_slices(),
        )
    }

    /// Begins to watch whether unwanted slices are used; says when to drop them.
    fn retire(
        &self,
        published: Option<&Placement>,
        pending: Option<&Placement>,
    ) -> Option<Instant> {
        let unwanted = self.unwanted(published, pending);
        let half = &self.node.experts;
        let drop_at = half.store.retire(&unwanted, self.drop_grace)?;
        Some(Instant::from_std(drop_at))
    }

    /// Drops the unwanted slices if nobody has asked for one of them during the grace.
    async fn drop_unused(&self, published: Option<&Placement>, pending: Option<&Placement>) {
        let due = self
            .retire(published, pending)
            .is_some_and(|at| at <= Instant::now());
        if !due {
            return;
        }
        let store = Arc::clone(&self.node.experts.store);
        let unwanted = self.unwanted(published, pending);
        let num_slices = unwanted.len();
        // Experts of an island are dropped after the step that may need them.
        let dropped = tokio::task::spawn_blocking(move || {
            for slice in unwanted {
                tramontane_compute::Experts::unload(&*store, slice);
            }
        });
        match dropped.await {
            Ok(()) => {
                tracing::info!(worker = %self.node.id, num_slices, "dropped expert slices");
            }
            Err(error) => {
                tracing::warn!(worker = %self.node.id, num_slices, %error, "expert slices were not dropped");
            }
        }
    }
}
