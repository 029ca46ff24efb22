//! Does what the leader orders: steps one after the other on a thread of their own, loads and calls beside them. What could
//! not be done is said, never hidden.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_util::task::TaskTracker;
use tramontane_compute::{Backend as _, ExpertJob, Experts};
use tramontane_compute_cuda::device::Device;
use tramontane_compute_cuda::{CudaBackend, Island, RankAttention, RankStep, rank_segments};
use tramontane_model::Checkpoint;
use tramontane_proto::v1::{self, rank_message::Kind as Said};
use tramontane_types::{ExpertSlice, ModelGeometry};

use super::super::{CALLS_MAX, all_experts, keep_only, meet, wire};
use super::Loaded;
use crate::Error;

type Answers = mpsc::Sender<v1::RankMessage>;

/// The rank's halves, and what they are busy with.
#[derive(Debug)]
pub(super) struct Orders {
    shared: Arc<Shared>,
    steps: SyncSender<Order>,
    tasks: TaskTracker,
    /// Loads that were ordered.
    loads: AtomicU64,
    /// Unloads that were ordered.
    unloads: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    backend: Arc<CudaBackend>,
    device: Arc<dyn Device>,
    experts: Arc<dyn Experts>,
    checkpoint: Arc<Checkpoint>,
    now: Mutex<Now>,
    /// Loads under way, by number: unloads that were ordered later wait for them.
    loading: watch::Sender<BTreeSet<u64>>,
    /// Unloads that are done: loads that were ordered later wait for them.
    unloaded: watch::Sender<u64>,
}

/// A load under way.
struct Loading {
    shared: Arc<Shared>,
    number: u64,
}

impl Loading {
    fn begin(shared: &Arc<Shared>, number: u64) -> Self {
        let shared = Arc::clone(shared);
        let begun = |open: &mut BTreeSet<u64>| open.insert(number);
        shared.loading.send_if_modified(begun);
        Self { shared, number }
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        let done = |open: &mut BTreeSet<u64>| open.remove(&self.number);
        self.shared.loading.send_if_modified(done);
    }
}

/// The island that the rank is in.
#[derive(Debug, Default)]
struct Now {
    /// The last that was ordered.
    epoch: u64,
    island: Option<Arc<Island>>,
}

/// A step and where to say that it failed.
struct Order {
    step: v1::IslandStep,
    answers: Answers,
}

impl Orders {
    pub(super) fn start(loaded: Loaded, checkpoint: Arc<Checkpoint>) -> Result<Self, Error> {
        let Loaded {
            backend,
            device,
            attention,
        } = loaded;
        let shared = Arc::new(Shared {
            experts: backend.experts(),
            backend,
            device,
            checkpoint,
            now: Mutex::default(),
            loading: watch::Sender::default(),
            unloaded: watch::Sender::default(),
        });
        // The leader begins one step at a time.
        let (steps, orders) = sync_channel(1);
        let of_thread = Arc::clone(&shared);
        let started = std::thread::Builder::new()
            .name("rank".to_owned())
            .spawn(move || of_thread.compute(attention, &orders));
        let what = "the steps of a rank";
        started.map_err(|source| Error::Thread { what, source })?;
        Ok(Self {
            shared,
            steps,
            tasks: TaskTracker::new(),
            loads: AtomicU64::new(0),
            unloads: AtomicU64::new(0),
        })
    }

    pub(super) fn is_formed(&self) -> Result<(), String> {
        match self.shared.now.lock().island {
            Some(_) => Ok(()),
            None => Err("the ranks have not come together".to_owned()),
        }
    }

    /// Leaves the island that it is in.
    pub(super) fn part(&self) {
        self.shared.part(None);
    }

    pub(super) fn part_from(&self, epoch: u64) {
        self.shared.part(Some(epoch));
    }

    /// Waits for what runs beside the steps.
    pub(super) async fn end(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Connects to the other ranks and says what is loaded here, or why it has not come.
    pub(super) fn form(&self, form: v1::IslandForm, answers: Answers) {
        let shared = Arc::clone(&self.shared);
        shared.part(None);
        shared.now.lock().epoch = form.epoch;
        self.tasks.spawn_blocking(move || {
            let epoch = form.epoch;
            let formed = shared.join(&form);
            let (held, error) = match formed {
                Ok(()) => (shared.held(), String::new()),
                Err(why) => (Vec::new(), why),
            };
            let formed = v1::RankFormed { epoch, held, error };
            say(&answers, Said::Formed(formed));
        });
    }

    pub(super) fn step(&self, step: v1::IslandStep, answers: Answers) -> Result<(), String> {
        match self.steps.try_send(Order { step, answers }) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err("a step was ordered before the last one".to_owned()),
            Err(TrySendError::Disconnected(_)) => Err("the thread of steps has ended".to_owned()),
        }
    }

    pub(super) fn load(&self, load: v1::IslandLoad, answers: Answers) -> Result<(), String> {
        let slice = wire::slice(
            load.layer,
            load.expert,
            (load.segment_begin, load.segment_end),
        )?;
        self.check_open()?;
        let (shared, before) = (
            Arc::clone(&self.shared),
            self.unloads.load(Ordering::Acquire),
        );
        let number = self.loads.fetch_add(1, Ordering::AcqRel);
        let loading = Loading::begin(&shared, number);
        self.tasks.spawn(async move {
            let mut unloaded = shared.unloaded.subscribe();
            // An error would say that the sender is gone, which lives in `shared`.
            drop(unloaded.wait_for(|done| *done >= before).await);
            let loaded = tokio::task::spawn_blocking(move || {
                let _until_done = loading;
                let ExpertSlice {
                    layer,
                    expert,
                    range,
                } = slice;
                let bytes = shared.checkpoint.expert_weights(layer, expert, range);
                let bytes = bytes.map_err(|error| with_cause(&error))?;
                let loaded = shared.experts.load(slice, &bytes.weights());
                loaded.map_err(|error| with_cause(&error))
            });
            let loaded = loaded.await.map_err(|error| error.to_string());
            let done = loaded.and_then(|loaded| loaded).map(|()| Bytes::new());
            answer(&answers, load.call_id, done);
        });
        Ok(())
    }

    pub(super) fn unload(&self, unload: v1::IslandUnload) -> Result<(), String> {
        let segments = (unload.segment_begin, unload.segment_end);
        let slice = wire::slice(unload.layer, unload.expert, segments)?;
        self.check_open()?;
        let (shared, before) = (
            Arc::clone(&self.shared),
            self.unloads.fetch_add(1, Ordering::AcqRel),
        );
        let num_loads = self.loads.load(Ordering::Acquire);
        self.tasks.spawn(async move {
            let (mut loading, mut unloaded) =
                (shared.loading.subscribe(), shared.unloaded.subscribe());
            // Errors would say that the senders are gone, which live in `shared`.
            let are_done = |open: &BTreeSet<u64>| open.range(..num_loads).next().is_none();
            drop(loading.wait_for(are_done).await);
            drop(unloaded.wait_for(|done| *done >= before).await);
            let of_task = Arc::clone(&shared);
            let ended = tokio::task::spawn_blocking(move || of_task.experts.unload(slice)).await;
            if let Err(error) = ended {
                tracing::error!(%error, %slice, "a slice was not unloaded");
            }
            shared.unloaded.send_replace(before + 1);
        });
        Ok(())
    }

    pub(super) fn call(&self, call: v1::ExpertCall, answers: Answers) -> Result<(), String> {
        self.check_open()?;
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn_blocking(move || {
            let (id, outputs) = (call.call_id, shared.call(&call));
            answer(&answers, id, outputs);
        });
        Ok(())
    }

    fn check_open(&self) -> Result<(), String> {
        match self.tasks.len() < CALLS_MAX {
            true => Ok(()),
            false => Err(format!("more than {CALLS_MAX} calls under way")),
        }
    }
}

fn say(answers: &Answers, kind: Said) {
    // One that is gone, or reads nothing, is found silent by the next beat.
    let _lost = answers.try_send(wire::rank(kind));
}

fn answer(answers: &Answers, call_id: u64, done: Result<Bytes, String>) {
    let (outputs, error) = match done {
        Ok(outputs) => (outputs, String::new()),
        Err(error) => (Bytes::new(), error),
    };
    let answer = v1::RankAnswer {
        call_id,
        outputs,
        error,
    };
    say(answers, Said::Answer(answer));
}

fn with_cause(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {cause}"));
    format!("{error}{}", cause.unwrap_or_default())
}

impl Shared {
    fn geometry(&self) -> &ModelGeometry {
        self.checkpoint.geometry()
    }

    /// For each layer and expert the segments that are loaded.
    fn held(&self) -> Vec<u8> {
        all_experts(self.geometry())
            .map(|(layer, expert)| self.experts.held(layer, expert))
            .collect()
    }

    /// Leaves its island, if it is that of the epoch.
    fn part(&self, epoch: Option<u64>) {
        let mut now = self.now.lock();
        let is_meant = |island: &Arc<Island>| epoch.is_none_or(|epoch| island.epoch() == epoch);
        if now.island.as_ref().is_some_and(is_meant)
            && let Some(island) = now.island.take()
        {
            self.backend.join(None);
            island.part();
        }
    }

    fn join(&self, form: &v1::IslandForm) -> Result<(), String> {
        let segments = rank_segments(form.rank, form.num_ranks).filter(|_| form.rank > 0);
        let segments =
            segments.ok_or_else(|| format!("rank {} of {}", form.rank, form.num_ranks))?;
        keep_only(&*self.experts, self.geometry(), segments);
        let place = (form.rank, form.num_ranks);
        let collective = meet(&self.device, form.meeting.clone(), place)?;
        let island = Island::new(form.epoch, collective, None);
        let island = Arc::new(island.map_err(|error| error.to_string())?);
        let mut now = self.now.lock();
        if now.epoch != form.epoch {
            island.part();
            return Err(format!("epoch {} is over", form.epoch));
        }
        self.backend.join(Some(Arc::clone(&island)));
        now.island = Some(island);
        drop(now);
        tracing::info!(epoch = form.epoch, rank = form.rank, %segments, "computing with the leader");
        Ok(())
    }

    /// Computes steps until nobody orders any more.
    fn compute(&self, mut attention: RankAttention, orders: &Receiver<Order>) {
        for Order { step, answers } in orders {
            let epoch = step.epoch;
            let is_now = {
                let now = self.now.lock();
                now.island
                    .as_ref()
                    .is_some_and(|island| island.epoch() == epoch)
            };
            let computed = if is_now {
                let (batch, pages) = wire::step_from_wire(step);
                let step = RankStep {
                    batch: &batch,
                    pages: &pages,
                };
                let followed = attention.follow(step, &*self.experts);
                followed.map_err(|error| with_cause(&error))
            } else {
                Err("this rank is not in the island of the step".to_owned())
            };
            if let Err(error) = computed {
                tracing::warn!(epoch, error, "a step was not computed");
                self.part(Some(epoch));
                say(&answers, Said::Parted(v1::RankParted { epoch, error }));
            }
        }
    }

    /// The part of a call that is this rank's.
    fn call(&self, call: &v1::ExpertCall) -> Result<Bytes, String> {
        let (layer, slices) = wire::slices(call)?;
        let jobs: Vec<ExpertJob<'_>> = slices
            .iter()
            .zip(&call.jobs)
            .map(|(slice, job)| ExpertJob {
                expert: slice.expert,
                range: slice.range,
                row_ids: &job.row_ids,
            })
            .collect();
        let (mut outputs, num_rows) = (Vec::new(), call.num_rows as usize);
        let computed = self
            .experts
            .compute(layer, &call.rows, num_rows, &jobs, &mut outputs);
        computed.map_err(|error| with_cause(&error))?;
        Ok(outputs.iter().flat_map(|x| x.to_le_bytes()).collect())
    }
}
