//! Brings ranks together, looks after them, and parts them when one is lost. Every wait has a limit.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::OptionFuture;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tramontane_compute_cuda::collective::Collective;
use tramontane_compute_cuda::{Island, Lead, rank_segments};
use tramontane_proto::v1::{self, lead_message::Kind};
use tramontane_runtime::Shutdown;
use tramontane_types::SegmentRange;

use super::hub::{Formation, Hub, State};
use super::{BEAT_EVERY, FORM_MAX, LOOK_EVERY, SILENCE_MAX, keep_only, wire};

/// Ranks that come or go together are waited for this long.
const SETTLE: Duration = Duration::from_secs(1);
/// After a formation that failed.
const FORM_PAUSE: Duration = Duration::from_secs(5);

impl Hub {
    /// Waits until the ranks have come together for the first time, or nobody wants them any more.
    pub(crate) async fn first_formation(&self, shutdown: &Shutdown) {
        let mut formations = self.formations();
        let formed = formations.wait_for(|formation| formation.epoch > 0);
        // The sender lives in the hub: nothing but a formation ends the wait.
        let _formed = shutdown.token.run_until_cancelled(formed).await;
    }

    /// Looks after the ranks until `stop`, then parts them.
    pub(crate) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let (begin, mut beaten) = (Instant::now(), Instant::now());
        let (mut not_before, mut forming) = (begin, None);
        let mut ticks = interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let formed = OptionFuture::from(forming.as_mut());
            tokio::select! {
                _at = ticks.tick() => {}
                () = self.look.notified() => {}
                Some(formed) = formed => {
                    forming = None;
                    if let Err(why) = formed {
                        tracing::warn!(why, retry_in = ?FORM_PAUSE, "the ranks have not come together");
                        not_before = Instant::now() + FORM_PAUSE;
                    }
                }
                () = stop.cancelled() => break,
            }
            let now = Instant::now();
            if now >= beaten + BEAT_EVERY {
                beaten = now;
                self.beat();
            }
            self.watch(now);
            if forming.is_none() && now >= not_before && self.is_time_to_form(begin, now) {
                forming = Some(Box::pin(Arc::clone(&self).form()));
            }
        }
        self.lock().broken = Some("the worker ends".to_owned());
        self.watch(Instant::now());
    }

    fn beat(&self) {
        let state = self.lock();
        for rank in state.ranks.iter().chain(&state.newcomers) {
            // One that takes nothing is found silent.
            let _full = rank.queue.try_send(wire::lead(Kind::Beat(v1::RankBeat {})));
        }
    }

    /// Parts the ranks when one of them is silent, hangs or has failed.
    fn watch(&self, now: Instant) {
        let silent: Vec<u64> = {
            let state = self.lock();
            let ranks = state.ranks.iter().chain(&state.newcomers);
            let is_silent = |heard: Instant| now.saturating_duration_since(heard) > SILENCE_MAX;
            ranks
                .filter(|rank| is_silent(rank.heard) || rank.queue.is_closed())
                .map(|rank| rank.id)
                .collect()
        };
        for id in silent {
            self.depart(id, "it says nothing");
        }
        let mut state = self.lock();
        let step_age = state.running.map(|at| now.saturating_duration_since(at));
        if let Some(age) = step_age.filter(|age| *age > self.config.step_max) {
            let why = format!("a step takes {age:?} already");
            state.broken.get_or_insert(why);
        }
        let checked = state.island.as_ref().map(|i| i.collective().check());
        if let Some(Err(error)) = checked {
            state.broken.get_or_insert(error.to_string());
        }
        if state.island.is_some()
            && let Some(why) = state.broken.take()
        {
            self.part(&mut state, &why);
        }
    }

    /// The ranks do not compute together any more; who is left waits for the next epoch.
    fn part(&self, state: &mut State, why: &str) {
        let Some(island) = state.island.take() else {
            return;
        };
        let (epoch, left) = (state.epoch, state.ranks.len());
        tracing::warn!(epoch, why, left, "the ranks of the island part");
        self.backend.join(None);
        island.part();
        for rank in &state.ranks {
            let part = v1::IslandPart { epoch };
            let _full = rank.queue.try_send(wire::lead(Kind::Part(part)));
        }
        let State {
            ranks, newcomers, ..
        } = state;
        newcomers.append(ranks);
        state.num_ranks = 0;
        state.changed = Instant::now();
    }

    /// Whether it is time for the next epoch. No step of the ranks begins from then on.
    fn is_time_to_form(&self, begin: Instant, now: Instant) -> bool {
        let mut state = self.lock();
        let there = (state.ranks.len() + state.newcomers.len() + 1) as u32;
        let is_complete = there == self.config.num_ranks;
        let is_time = if state.epoch == 0 {
            is_complete || now >= begin + self.config.form_wait
        } else {
            let is_due = state.num_ranks == 0 || !state.newcomers.is_empty();
            is_due && (is_complete || now >= state.changed + SETTLE)
        };
        state.is_held_back = is_time;
        is_time && state.running.is_none()
    }

    /// Brings everybody who is there together at the next epoch; all are newcomers again when that fails.
    async fn form(self: Arc<Self>) -> Result<(), String> {
        let formed = Arc::clone(&self).try_form().await;
        if formed.is_err() {
            let mut state = self.lock();
            let State {
                ranks, newcomers, ..
            } = &mut *state;
            newcomers.append(ranks);
            state.num_ranks = 0;
            state.changed = Instant::now();
        }
        formed
    }

    async fn try_form(self: Arc<Self>) -> Result<(), String> {
        let (epoch, num_ranks) = self.gather();
        let own = rank_segments(0, num_ranks).unwrap_or(SegmentRange::WHOLE);
        let meeting = match num_ranks {
            1 => Vec::new(),
            _ => self.device.meeting().map_err(|error| error.to_string())?,
        };
        self.call_together(epoch, num_ranks, &meeting);
        let hub = Arc::clone(&self);
        let met = tokio::task::spawn_blocking(move || hub.meet(own, meeting, num_ranks));
        let met = met
            .await
            .map_err(|error| error.to_string())
            .and_then(|met| met);
        let answered = match &met {
            Ok(_) => self.all_formed(epoch).await,
            Err(why) => Err(why.clone()),
        };
        let mut state = self.lock();
        let collective = match (met, answered) {
            (Ok(collective), Ok(())) if state.broken.is_none() => collective,
            (met, answered) => {
                if let Ok(Some(collective)) = met {
                    let _aborting = tokio::task::spawn_blocking(move || collective.abort());
                }
                let broken = state.broken.take();
                let why = answered.err().or(broken);
                return Err(why.unwrap_or_else(|| "a rank is lost".to_owned()));
            }
        };
        if let Some(collective) = collective {
            let lead = Arc::clone(&self) as Arc<dyn Lead>;
            let island = Island::new(epoch, collective, Some(lead));
            let island = Arc::new(island.map_err(|error| error.to_string())?);
            self.backend.join(Some(Arc::clone(&island)));
            state.island = Some(island);
        }
        state.is_held_back = false;
        let of_ranks = state.ranks.iter().map(|rank| rank.expert_bytes);
        let expert_bytes = of_ranks.fold(self.config.hello.expert_bytes, u64::min);
        drop(state);
        tracing::info!(epoch, num_ranks, segments = %own, "the ranks of the island compute together");
        self.formation.send_replace(Formation {
            epoch,
            num_ranks,
            expert_bytes,
        });
        Ok(())
    }

    /// Parts whoever is together and numbers everybody anew.
    fn gather(&self) -> (u64, u32) {
        let mut state = self.lock();
        self.part(&mut state, "a rank has come");
        let State {
            ranks, newcomers, ..
        } = &mut *state;
        ranks.append(newcomers);
        for rank in ranks.iter_mut() {
            rank.formed = None;
        }
        state.broken = None;
        state.epoch += 1;
        state.num_ranks = state.ranks.len() as u32 + 1;
        (state.epoch, state.num_ranks)
    }

    fn call_together(&self, epoch: u64, num_ranks: u32, meeting: &[u8]) {
        let state = self.lock();
        for (rank, number) in state.ranks.iter().zip(1..) {
            let form = v1::IslandForm {
                epoch,
                rank: number,
                num_ranks,
                meeting: meeting.to_vec(),
            };
            let _full = rank.queue.try_send(wire::lead(Kind::Form(form)));
        }
    }

    /// Drops what is not the leader's any more, and connects.
    fn meet(
        &self,
        own: SegmentRange,
        meeting: Vec<u8>,
        num_ranks: u32,
    ) -> Result<Option<Arc<dyn Collective>>, String> {
        keep_only(&*self.experts, &self.config.geometry, own);
        match num_ranks {
            1 => Ok(None),
            _ => super::meet(&self.device, meeting, (0, num_ranks)).map(Some),
        }
    }

    /// Waits for the answers of all ranks of the epoch.
    async fn all_formed(&self, epoch: u64) -> Result<(), String> {
        let end = Instant::now() + FORM_MAX;
        loop {
            {
                let state = self.lock();
                if let Some(why) = &state.broken {
                    return Err(why.clone());
                }
                let mut open = 0;
                for rank in &state.ranks {
                    match &rank.formed {
                        Some((of, Err(why))) if *of == epoch => return Err(why.clone()),
                        Some((of, Ok(()))) if *of == epoch => {}
                        _ => open += 1,
                    }
                }
                if open == 0 {
                    return Ok(());
                }
                if Instant::now() >= end {
                    return Err(format!("{open} ranks did not answer within {FORM_MAX:?}"));
                }
            }
            tokio::select! {
                () = self.look.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
    }
}
