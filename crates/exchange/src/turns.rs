//! A layer waited for, and calls computed, in turns, by a caller that owns the clock and must not block: a
//! simulation. The decisions are those of [`Exchange::combine`](crate::Exchange::combine) and of the expert
//! server's thread. Never waits.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;

use tramontane_compute::{Contributions, Experts};

use crate::flight::Arrival;
use crate::server::Served;
use crate::{Error, ExpertExchange, ExpertServer, ExpertServerConfig, Ticket, answers};

impl ExpertServer {
    /// A server that computes in turns. `config` has the clock.
    #[must_use]
    pub fn in_turns(
        config: ExpertServerConfig,
        experts: Arc<dyn Experts>,
        epoch: Arc<AtomicU64>,
    ) -> Self {
        Self::without_thread(Arc::default(), config, experts, epoch)
    }

    /// Computes one batch, if one is ready; whether there was one.
    #[must_use]
    pub fn turn(&self) -> bool {
        self.handle().shared().serve_one() == Served::Batch
    }
}

/// A dispatched layer whose answers are awaited.
#[derive(Debug)]
pub struct Awaited {
    ticket: Ticket,
    begin: Instant,
}

impl ExpertExchange {
    /// Computes the local jobs of a dispatched layer and begins to wait for the others.
    ///
    /// # Errors
    /// What the backend refuses.
    pub fn await_in_turns(&self, mut ticket: Ticket) -> Result<Awaited, Error> {
        let epoch = ticket.epoch;
        self.compute_local(&mut ticket, epoch)?;
        let begin = self.now();
        Ok(Awaited { ticket, begin })
    }

    /// Takes the answers that are there and asks elsewhere where it must. Says when to look again if no
    /// answer comes before; `None` when all is answered.
    ///
    /// # Errors
    /// As [`Exchange::combine`](crate::Exchange::combine).
    pub fn turn(&mut self, awaited: &mut Awaited) -> Result<Option<Instant>, Error> {
        let Awaited { ticket, begin } = awaited;
        while let Some(arrival) = ticket.next_arrived() {
            self.on_arrival(ticket, arrival)?;
        }
        let now = self.now();
        self.ask_elsewhere(ticket, now)?;
        self.wake(ticket, *begin, now)
    }

    /// Calls `add` once with everything that was answered.
    pub fn contribute<T>(&self, awaited: &Awaited, add: impl FnOnce(&Contributions<'_>) -> T) -> T {
        let Ticket {
            routing, answers, ..
        } = &awaited.ticket;
        answers::contribute(&self.config.geometry, routing, answers, add)
    }

    pub(crate) fn on_arrival(
        &mut self,
        ticket: &mut Ticket,
        arrival: Arrival,
    ) -> Result<(), Error> {
        match arrival {
            Arrival::Answer(call, answer) => self.on_answer(ticket, call, answer)?,
            Arrival::Needless(call) => self.note_answer(&call),
        }
        Ok(())
    }

    pub(crate) fn now(&self) -> Instant {
        (self.config.clock)()
    }
}
