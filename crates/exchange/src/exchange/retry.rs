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
            if call.is_silent(now) {
                tracing::warn!(layer = layer.0, worker = %call.worker, ?waited, "no answer to an expert call, asking another holder");
                self.health.silent(&call.worker, now);
            } else {
                tracing::debug!(layer = layer.0, worker = %call.worker, ?waited, "expert call is late, asking another holder");
                self.health.late(&call.worker, now);
            }
            ticket.num_silent += 1;
            let silence = Refusal::Lost("no answer in time".to_owned());
            ticket.last_refusal = Some((call.worker, silence));
            ticket.homeless.extend(call.jobs);
        }
        if ticket.open.values().any(|call| call.is_silent(now)) {
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
