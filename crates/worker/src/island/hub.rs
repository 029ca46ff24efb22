//! What the leader knows of its ranks: who is there, what they hold, what they were asked. Decides no formation: see
//! [`form`](super::form).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex, MutexGuard};
use tokio::sync::{Notify, mpsc, watch};
use tramontane_compute::Experts;
use tramontane_compute_cuda::device::{Device, DeviceError};
use tramontane_compute_cuda::{CudaBackend, Island, Lead, RankStep, rank_segments};
use tramontane_coordination::Roles;
use tramontane_proto::v1::{self, lead_message::Kind};
use tramontane_types::{ExpertSlice, ModelGeometry, SegmentRange};

use super::{index_of, real_segments, wire};

/// What a leader is made with.
#[derive(Debug)]
pub(crate) struct HubConfig {
    /// Ranks of the complete island, the leader included.
    pub(crate) num_ranks: u32,
    /// How long the first formation waits for all of them.
    pub(crate) form_wait: Duration,
    /// How long a step may take before a rank counts as hanging.
    pub(crate) step_max: Duration,
    /// What every rank must say, but for its memory.
    pub(crate) hello: v1::RankHello,
    pub(crate) geometry: ModelGeometry,
}

/// Who computes together now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Formation {
    /// Counts formations; 0 before the first.
    pub(crate) epoch: u64,
    /// Ranks of it; 1 is the leader alone.
    pub(crate) num_ranks: u32,
    /// Bytes for experts of the rank that has least; 0 before the first.
    pub(crate) expert_bytes: u64,
}

/// The leader's side of an island.
pub(crate) struct Hub {
    pub(super) config: HubConfig,
    pub(super) backend: Arc<CudaBackend>,
    pub(super) device: Arc<dyn Device>,
    /// The leader's own.
    pub(super) experts: Arc<dyn Experts>,
    pub(super) state: Mutex<State>,
    /// A step has ended.
    step_ended: Condvar,
    /// There is something to look at.
    pub(super) look: Notify,
    pub(super) formation: watch::Sender<Formation>,
    calls: Mutex<Calls>,
    /// Steps that all ranks have computed together.
    steps: AtomicU64,
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub")
            .field("formation", &*self.formation.borrow())
            .finish_non_exhaustive()
    }
}

/// Answer of a rank: outputs, or why not.
type Said = Result<Bytes, String>;

#[derive(Debug, Default)]
struct Calls {
    next: u64,
    /// By id: the rank's connection, and who waits.
    open: HashMap<u64, (u64, SyncSender<Said>)>,
}

/// A rank that follows.
#[derive(Debug)]
pub(super) struct Rank {
    /// Of its connection.
    pub(super) id: u64,
    pub(super) queue: mpsc::Sender<v1::LeadMessage>,
    pub(super) heard: Instant,
    /// Its answer to the formation of an epoch.
    pub(super) formed: Option<(u64, Result<(), String>)>,
    /// Segments that it has of every expert.
    pub(super) held: Vec<u8>,
    /// Memory that it has for experts.
    pub(super) expert_bytes: u64,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) epoch: u64,
    /// Ranks of the epoch with the leader; 0 between two of them.
    pub(super) num_ranks: u32,
    /// The next epoch waits for the running step: no other one begins.
    pub(super) is_held_back: bool,
    /// Ranks 1, 2, ... of the epoch, whether it is formed or forming.
    pub(super) ranks: Vec<Rank>,
    /// Ranks that wait for the next epoch.
    pub(super) newcomers: Vec<Rank>,
    /// Formed.
    pub(super) island: Option<Arc<Island>>,
    /// Since when a step is computed.
    pub(super) running: Option<Instant>,
    /// Why the ranks of the epoch do not compute together any more.
    pub(super) broken: Option<String>,
    /// The last time that somebody came or went.
    pub(super) changed: Instant,
    next_id: u64,
}

/// A rank as callers see it.
#[derive(Clone, Debug)]
pub(super) struct Part {
    id: u64,
    epoch: u64,
    queue: mpsc::Sender<v1::LeadMessage>,
    pub(super) segments: SegmentRange,
}

/// An answer that is waited for.
#[derive(Debug)]
pub(super) struct Pending {
    answer: Receiver<Said>,
    id: u64,
}

impl Hub {
    pub(crate) fn new(
        config: HubConfig,
        backend: Arc<CudaBackend>,
        device: Arc<dyn Device>,
        experts: Arc<dyn Experts>,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            backend,
            device,
            experts,
            state: Mutex::new(State {
                epoch: 0,
                num_ranks: 0,
                is_held_back: false,
                ranks: Vec::new(),
                newcomers: Vec::new(),
                island: None,
                running: None,
                broken: None,
                changed: Instant::now(),
                next_id: 0,
            }),
            step_ended: Condvar::new(),
            look: Notify::new(),
            formation: watch::Sender::default(),
            calls: Mutex::default(),
            steps: AtomicU64::new(0),
        })
    }

    pub(super) const fn geometry(&self) -> &ModelGeometry {
        &self.config.geometry
    }

    /// Who computes together, now and from then on.
    pub(crate) fn formations(&self) -> watch::Receiver<Formation> {
        self.formation.subscribe()
    }

    /// Steps that all ranks have computed together.
    pub(crate) fn num_steps(&self) -> u64 {
        self.steps.load(Ordering::Relaxed)
    }

    /// Bytes that the ranks which are together now offer for experts, in these roles.
    pub(crate) fn offered(&self, roles: Roles) -> u64 {
        match roles.experts {
            true => self.capacity_bytes(*self.formation.borrow()),
            false => 0,
        }
    }

    /// The engine of rank 0 is a new one: the ranks come together again before its first step. Their graphs of the old one's
    /// steps were captured together, and a new one is as well.
    pub(crate) fn renew(&self) {
        let mut state = self.state.lock();
        if state.island.is_some() {
            state
                .broken
                .get_or_insert_with(|| "rank 0 has a new engine".to_owned());
        }
        drop(state);
        self.look.notify_one();
    }

    /// Bytes for experts that all ranks have together, shared as they share segments.
    fn capacity_bytes(&self, formation: Formation) -> u64 {
        let num_ranks = formation.num_ranks.max(1);
        let most = (0..num_ranks)
            .filter_map(|rank| rank_segments(rank, num_ranks))
            .map(SegmentRange::len)
            .max();
        let least = match formation.num_ranks {
            0 => self.config.hello.expert_bytes,
            _ => formation.expert_bytes,
        };
        least / u64::from(most.unwrap_or(8)) * 8
    }

    /// Takes a rank in that has greeted; its number, or why not.
    pub(super) fn arrive(
        &self,
        hello: &v1::RankHello,
        queue: mpsc::Sender<v1::LeadMessage>,
    ) -> Result<u64, String> {
        let ours = v1::RankHello {
            expert_bytes: hello.expert_bytes,
            ..self.config.hello.clone()
        };
        if *hello != ours {
            return Err(format!("the rank is {hello:?}, expected {ours:?}"));
        }
        let mut state = self.state.lock();
        let most = self.config.num_ranks.saturating_sub(1) as usize;
        let there = state.ranks.len() + state.newcomers.len();
        if there >= most {
            return Err(format!(
                "{there} ranks follow already, expected at most {most}"
            ));
        }
        let id = state.next_id;
        state.next_id += 1;
        state.changed = Instant::now();
        state.newcomers.push(Rank {
            id,
            queue,
            heard: Instant::now(),
            formed: None,
            held: vec![0; self.config.geometry.num_layers * self.config.geometry.num_experts],
            expert_bytes: hello.expert_bytes,
        });
        drop(state);
        tracing::info!(connection = id, "a rank has come");
        self.look.notify_one();
        Ok(id)
    }

    /// Its stream has ended.
    pub(super) fn depart(&self, id: u64, why: &str) {
        let mut state = self.state.lock();
        let State {
            ranks, newcomers, ..
        } = &mut *state;
        let was_in = ranks.iter().any(|rank| rank.id == id);
        let was_there = was_in || newcomers.iter().any(|rank| rank.id == id);
        newcomers.retain(|rank| rank.id != id);
        ranks.retain(|rank| rank.id != id);
        if was_in {
            state
                .broken
                .get_or_insert_with(|| format!("a rank is lost: {why}"));
        }
        if was_there {
            state.changed = Instant::now();
            tracing::warn!(connection = id, why, "a rank has gone");
        }
        drop(state);
        // Whoever waits for it hears that at once.
        self.calls.lock().open.retain(|_, (rank, _)| *rank != id);
        self.look.notify_one();
    }

    /// What a rank says.
    pub(super) fn hear(&self, id: u64, kind: v1::rank_message::Kind) {
        use v1::rank_message::Kind as Said;
        if let Said::Answer(answer) = &kind {
            return self.answer(id, answer);
        }
        let num_experts = self.config.geometry.num_layers * self.config.geometry.num_experts;
        let mut state = self.state.lock();
        let epoch = state.epoch;
        let State {
            ranks,
            newcomers,
            broken,
            ..
        } = &mut *state;
        let Some(rank) = ranks.iter_mut().chain(newcomers).find(|rank| rank.id == id) else {
            return;
        };
        rank.heard = Instant::now();
        match kind {
            Said::Formed(formed) if formed.epoch != epoch => return,
            Said::Formed(formed) => {
                let held = wire::held(formed, num_experts);
                rank.formed = Some((epoch, held.map(|held| rank.held = held)));
            }
            Said::Parted(parted) if parted.epoch == epoch => {
                broken.get_or_insert_with(|| format!("a rank has parted: {}", parted.error));
            }
            Said::Parted(_) | Said::Hello(_) | Said::Answer(_) => {}
            // No news.
            Said::Beat(_) => return,
        }
        drop(state);
        self.look.notify_one();
    }

    fn answer(&self, id: u64, answer: &v1::RankAnswer) {
        let open = {
            let mut calls = self.calls.lock();
            match calls.open.get(&answer.call_id) {
                Some((rank, _)) if *rank == id => calls.open.remove(&answer.call_id),
                _ => None,
            }
        };
        if let Some((_, waits)) = open {
            let said = match answer.error.is_empty() {
                true => Ok(answer.outputs.clone()),
                false => Err(answer.error.clone()),
            };
            // Who does not wait any more needs none.
            let _late = waits.try_send(said);
        }
    }

    /// The leader's own segments, and the other ranks with theirs; `None` while nobody knows who has which.
    pub(super) fn parts(&self) -> Option<(SegmentRange, Vec<Part>)> {
        let state = self.state.lock();
        if state.num_ranks != 1 && state.island.is_none() {
            return None;
        }
        let segments = |rank: u32| rank_segments(rank, state.num_ranks);
        let parts = (1..).zip(&state.ranks).filter_map(|(number, rank)| {
            Some(Part {
                id: rank.id,
                epoch: state.epoch,
                queue: rank.queue.clone(),
                segments: segments(number)?,
            })
        });
        Some((segments(0)?, parts.collect()))
    }

    /// Segments of an expert that ranks other than the leader have.
    pub(super) fn held_elsewhere(&self, index: usize) -> u8 {
        let state = self.state.lock();
        if state.island.is_none() {
            return 0;
        }
        let masks = state.ranks.iter().filter_map(|rank| rank.held.get(index));
        masks.fold(0, |all, mask| all | mask)
    }

    /// A rank has loaded a slice.
    pub(super) fn note_loaded(&self, part: &Part, slice: ExpertSlice) {
        let index = index_of(&self.config.geometry, slice.layer, slice.expert);
        let mut state = self.state.lock();
        if state.epoch != part.epoch {
            return; // At the next epoch a rank has other segments, and has said anew what it holds.
        }
        let rank = state.ranks.iter_mut().find(|rank| rank.id == part.id);
        if let Some(mask) = rank.and_then(|rank| rank.held.get_mut(index)) {
            *mask |= slice.range.mask();
        }
    }

    /// Has all ranks drop a slice, after the step that may need it.
    pub(super) fn unload(&self, slice: ExpertSlice) {
        let index = index_of(&self.config.geometry, slice.layer, slice.expert);
        let mut state = self.state.lock();
        // From here on no step begins that needs it.
        for rank in &mut state.ranks {
            if let Some(mask) = rank.held.get_mut(index) {
                *mask &= !slice.range.mask();
            }
        }
        let end = Instant::now() + self.config.step_max;
        while state.running.is_some() {
            if self.step_ended.wait_until(&mut state, end).timed_out() {
                break;
            }
        }
        let unload = v1::IslandUnload {
            layer: slice.layer.0.into(),
            expert: slice.expert.0.into(),
            segment_begin: slice.range.begin().into(),
            segment_end: slice.range.end().into(),
        };
        for rank in &state.ranks {
            // One that takes nothing is found silent.
            let _full = rank.queue.try_send(wire::lead(Kind::Unload(unload)));
        }
    }

    /// Sends a call with an id of its own to a rank.
    pub(super) fn call(&self, part: &Part, kind: impl FnOnce(u64) -> Kind) -> Pending {
        let (waits, answer) = sync_channel(1);
        let id = {
            let mut calls = self.calls.lock();
            calls.next += 1;
            let id = calls.next;
            calls.open.insert(id, (part.id, waits));
            id
        };
        if part.queue.try_send(wire::lead(kind(id))).is_err() {
            self.calls.lock().open.remove(&id);
        }
        Pending { answer, id }
    }

    /// Waits for an answer.
    pub(super) fn wait(&self, pending: &Pending, most: Duration) -> Said {
        match pending.answer.recv_timeout(most) {
            Ok(said) => said,
            Err(RecvTimeoutError::Disconnected) => Err("the rank is lost".to_owned()),
            Err(RecvTimeoutError::Timeout) => {
                self.calls.lock().open.remove(&pending.id);
                Err(format!("the rank did not answer within {most:?}"))
            }
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    /// Whether every rank that follows has its segments of every expert.
    fn is_whole(&self, real: u8) -> bool {
        let num_ranks = self.ranks.len() as u32 + 1;
        (1..).zip(&self.ranks).all(|(number, rank)| {
            let own = rank_segments(number, num_ranks).map_or(0, SegmentRange::mask) & real;
            rank.held.iter().all(|mask| mask & own == own)
        })
    }
}

impl Lead for Hub {
    fn begin(&self, epoch: u64, step: RankStep<'_>) -> Result<bool, DeviceError> {
        let mut state = self.state.lock();
        let is_formed = state.island.is_some() && state.epoch == epoch && state.broken.is_none();
        // The step of an engine that was given up may hang: it is waited for, and none begins beside it.
        let is_free = state.running.is_none() && !state.is_held_back;
        if !is_formed || !is_free || !state.is_whole(real_segments(&self.config.geometry)) {
            return Ok(false);
        }
        let wire = wire::step_to_wire(epoch, step);
        for rank in &state.ranks {
            let step = wire::lead(Kind::Step(wire.clone()));
            if rank.queue.try_send(step).is_err() {
                let message = "a rank takes no more messages".to_owned();
                let num_ranks = state.ranks.len() as u32 + 1;
                state.broken.get_or_insert(message.clone());
                self.look.notify_one();
                return Err(DeviceError::Ranks {
                    rank: 0,
                    num_ranks,
                    message,
                });
            }
        }
        state.running = Some(Instant::now());
        Ok(true)
    }

    fn end(&self, epoch: u64, result: Result<(), String>) {
        let mut state = self.state.lock();
        state.running = None;
        if result.is_ok() {
            self.steps.fetch_add(1, Ordering::Relaxed);
        }
        if let Err(why) = result
            && state.epoch == epoch
        {
            state.broken.get_or_insert(why);
            self.look.notify_one();
        }
        self.step_ended.notify_all();
    }
}
