//! What to do about a call that is refused, lost or late: ask another holder, and remember who failed.
//! Never gives a layer up; that is for its deadline.

use std::time::{Duration, Instant};

use tramontane_types::{LayerId, WorkerId};

use super::ExpertExchange;
use crate::flight::{Left, OpenCall, Ticket};
use crate::stats::add;
use crate::{Error, Job, Refusal};

/// How often an overdue call is checked again for another holder (a placement may have come).
const OVERDUE_PAUSE: Duration = Duration::from_millis(50);

impl ExpertExchange {
    pub(super) fn on_refusal(
        &mut self,
        ticket: &mut Ticket,
        call: OpenCall,
        why: Refusal,
    ) -> Result<(), Error> {
        let now = self.now();
        tracing::debug!(layer = ticket.layer.0, worker = %call.worker, %why, "expert call refused");
        add(&self.stats.retries, 1);
        self.health.refused(&call.worker, now);
        if let Refusal::Invalid(reason) = why {
            // Asking the same worker again would be refused again; others may be down only for now.
            self.health.silent(&call.worker, now);
            let others = |worker: &WorkerId| worker != &call.worker;
            if !self.has_home(ticket.layer, &call.jobs, &others) {
                return Err(Error::Invalid {
                    layer: ticket.layer,
                    worker: call.worker,
                    reason,
                });
            }
            ticket.last_refusal = Some((call.worker, Refusal::Invalid(reason)));
        } else {
            ticket.last_refusal = Some((call.worker, why));
        }
        ticket.homeless.extend(call.jobs);
        Ok(())
    }

    /// A worker has answered: it lives, and that is how long it takes.
    pub(crate) fn note_answer(&mut self, call: &OpenCall) {
        self.health.answered(&call.worker);
        self.patience
            .answered(&call.worker, call.outputs_len, call.trip);
    }

    /// Looks who of those that were too late has answered after all.
    pub(super) fn note_late_answers(&mut self) {
        if self.left.is_empty() {
            return;
        }
        let mut left = std::mem::take(&mut self.left);
        for call in left.iter_mut().flat_map(Left::answered) {
            self.note_answer(&call);
        }
        left.retain(|left| !left.is_empty());
        self.left = left;
    }

    /// Calls that take too long are sent to another holder, if there is one for all their jobs.
    pub(super) fn give_up_overdue(&mut self, ticket: &mut Ticket, now: Instant) {
        let layer = ticket.layer;
        let overdue = ticket.take_overdue(now, OVERDUE_PAUSE, |call| {
            let others =
                |worker: &WorkerId| worker != &call.worker && self.health.usable(worker, now);
            self.has_home(layer, &call.jobs, &others)
                && (call.is_silent(now) || self.patience.may_hedge())
        });
        for call in overdue {
            let waited = now.duration_since(call.sent_at);
            add(&self.stats.retries, 1);
            ticket.num_late += 1;
            if call.is_silent(now) {
                tracing::warn!(layer = layer.0, worker = %call.worker, ?waited, "no answer to an expert call, asking another holder");
                self.health.silent(&call.worker, now);
                ticket.note_silent(&call.worker);
            } else {
                tracing::debug!(layer = layer.0, worker = %call.worker, ?waited, "expert call is late, asking another holder");
                self.health.late(&call.worker, now);
            }
            let silence = Refusal::Lost("no answer in time".to_owned());
            ticket.last_refusal = Some((call.worker, silence));
            ticket.homeless.extend(call.jobs);
        }
        if ticket.is_stuck(now) {
            self.stats.set_stuck();
        }
    }

    /// Whether somebody among the `usable`, or we ourselves, can compute all of `jobs` now.
    pub(super) fn has_home(
        &self,
        layer: LayerId,
        jobs: &[Job],
        usable: &dyn Fn(&WorkerId) -> bool,
    ) -> bool {
        let placement = self.placement.load();
        self.plan(placement.as_deref(), layer, jobs, usable)
            .homeless
            .is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;

    use arc_swap::ArcSwapOption;
    use parking_lot::Mutex;
    use tramontane_compute::{RoutedRows, RowFormat};
    use tramontane_types::{Epoch, ExpertId, ModelGeometry, Placement, SegmentRange, SliceHolders};

    use super::*;
    use crate::exchange::CALL_TIMEOUT;
    use crate::{
        Exchange as _, ExchangeConfig, ExpertCall, Reply, ReplySender, Transport, TransportStats,
    };

    thread_local! {
        static NOW: Cell<Instant> = Cell::new(Instant::now());
    }

    /// Workers of a group; those that are cut off take calls and never answer.
    #[derive(Debug, Default)]
    struct Peers {
        cut_off: Vec<&'static str>,
        unanswered: Mutex<Vec<ReplySender>>,
        geometry: Option<ModelGeometry>,
    }

    impl Transport for Peers {
        fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
            if self.cut_off.contains(&to.as_str()) {
                self.unanswered.lock().push(reply);
                return;
            }
            let geometry = self.geometry.as_ref().unwrap();
            let len = crate::answers::outputs_len(geometry, &call.jobs);
            let outputs = vec![0; len].into();
            reply.send(Ok(Reply {
                outputs,
                service_us: 1,
            }));
        }

        fn stats(&self) -> TransportStats {
            TransportStats::default()
        }
    }

    fn geometry() -> ModelGeometry {
        ModelGeometry {
            hidden: 8,
            num_layers: 1,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 8,
            ff: 64,
            num_experts: 2,
            top_k: 2,
            vocab: 16,
            rope_theta: 1e4,
            rms_eps: 1e-5,
            sliding_window: None,
            max_positions: 64,
        }
    }

    /// Both experts on `a` and `b`, none on us.
    fn placement() -> Placement {
        let holders = |first, second| {
            vec![SliceHolders {
                range: SegmentRange::WHOLE,
                holders: vec![first, second],
            }]
        };
        Placement {
            epoch: Epoch(1),
            numeric_class: "c".to_owned(),
            model: "m".to_owned(),
            num_layers: 1,
            num_experts: 2,
            workers: ["a", "b"].map(WorkerId::new).to_vec(),
            experts: vec![holders(0, 1), holders(1, 0)],
        }
    }

    /// The exchange of a worker that knows well how fast its peers are.
    fn exchange(cut_off: &[&'static str]) -> ExpertExchange {
        let mut config = ExchangeConfig::new(WorkerId::new("me"), geometry(), RowFormat::F32);
        config.clock = || NOW.get();
        let peers = Peers {
            cut_off: cut_off.to_vec(),
            geometry: Some(geometry()),
            ..Peers::default()
        };
        let placement = ArcSwapOption::from_pointee(placement());
        let mut exchange = ExpertExchange::new(config, None, Arc::new(placement), Arc::new(peers));
        for worker in ["a", "b"].map(WorkerId::new) {
            for bytes in (0..16).map(|bits| 1 << bits) {
                for _ in 0..8 {
                    let took = Duration::from_millis(1);
                    exchange.patience.answered(&worker, bytes, took);
                }
            }
        }
        exchange
    }

    /// How long it takes until a layer is complete, or known to be stuck.
    fn step(exchange: &mut ExpertExchange) -> (Duration, bool) {
        let rows = RoutedRows {
            num_rows: 1,
            rows: vec![0; 32],
            topk_ids: vec![ExpertId(0), ExpertId(1)],
            topk_weights: vec![0.5; 2],
        };
        let begin = NOW.get();
        let ticket = exchange.dispatch(LayerId(0), &rows).unwrap();
        let mut awaited = exchange.await_in_turns(ticket).unwrap();
        loop {
            let wake = exchange.turn(&mut awaited).unwrap();
            if wake.is_none() || exchange.stats.is_stuck() {
                return (NOW.get() - begin, wake.is_some());
            }
            NOW.set(wake.unwrap());
        }
    }

    #[test]
    fn a_worker_that_nobody_answers_knows_it_within_seconds() {
        let (took, is_stuck) = step(&mut exchange(&["a", "b"]));
        assert!(is_stuck);
        assert!(took < 5 * CALL_TIMEOUT, "{took:?}");
    }

    #[test]
    fn one_silent_holder_of_two_is_no_reason_to_leave_the_others() {
        for silent in ["a", "b"] {
            let mut exchange = exchange(&[silent]);
            for _ in 0..100 {
                let (took, is_stuck) = step(&mut exchange);
                assert!(!is_stuck, "{silent} alone");
                assert!(took < 2 * CALL_TIMEOUT, "{took:?}");
            }
        }
    }
}
