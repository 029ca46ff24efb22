//! Dispatch and combine: sends rows, computes its own share, waits, and asks elsewhere when it must.
//! Never holds the compute pool while it waits.

mod retry;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use tramontane_compute::{Contributions, ExpertJob, Experts, RoutedRows, RowFormat};
use tramontane_types::{Epoch, ExpertId, LayerId, ModelGeometry, Placement, WorkerId};

use crate::answers::{self, Answer, Routing};
use crate::flight::{Left, OpenCall, Ticket};
use crate::health::Health;
use crate::meters::Links;
use crate::patience::Patience;
use crate::plan::{self, Frame, Plan, View};
use crate::stats::{self, add};
use crate::{
    CallLimits, Desk, Error, Exchange, ExchangeStats, ExpertCall, ExpertServerHandle, Job, Refusal,
    Reply, Transport,
};

/// How long a step waits for one layer: time for the planner to publish a new placement and for a
/// survivor to load a slice.
pub const LAYER_DEADLINE: Duration = Duration::from_secs(20);
/// How long a call may take at most before another holder is asked, if there is one; what is usual for the
/// worker and the size of the call is less. Doubles with each such call of a layer.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(500);
/// Layers whose late answers are still listened for.
const LEFT_MAX: usize = 64;
/// How often jobs without a home are planned again.
const HOMELESS_PAUSE: Duration = Duration::from_millis(5);
/// Steps of more rows take long enough in attention for the server's thread to serve meanwhile.
const SHORT_STEP_ROWS: usize = 64;

/// What an exchange needs to know; made with [`ExchangeConfig::new`].
#[derive(Clone, Debug)]
pub struct ExchangeConfig {
    /// The worker that dispatches.
    pub me: WorkerId,
    /// Shape of the model.
    pub geometry: ModelGeometry,
    /// Format of dispatched rows.
    pub row_format: RowFormat,
    /// How long a step waits for one layer, see [`LAYER_DEADLINE`].
    pub layer_deadline: Duration,
    /// How long a call of few rows to a stranger may take before another holder is asked, see [`CALL_TIMEOUT`].
    pub call_timeout: Duration,
    /// Tells the time; a simulation has its own.
    pub clock: fn() -> Instant,
}

impl ExchangeConfig {
    /// The configuration with default times.
    #[must_use]
    pub fn new(me: WorkerId, geometry: ModelGeometry, row_format: RowFormat) -> Self {
        let (layer_deadline, call_timeout) = (LAYER_DEADLINE, CALL_TIMEOUT);
        Self {
            me,
            geometry,
            row_format,
            layer_deadline,
            call_timeout,
            clock: Instant::now,
        }
    }
}

/// The exchange over a [`Transport`].
#[derive(Debug)]
pub struct ExpertExchange {
    pub(crate) config: ExchangeConfig,
    limits: CallLimits,
    local: Option<Arc<dyn Experts>>,
    placement: Arc<ArcSwapOption<Placement>>,
    transport: Arc<dyn Transport>,
    desk: Arc<Desk>,
    /// The server in front of `local`, which joins our calls with those of others.
    server: Option<ExpertServerHandle>,
    pub(crate) health: Health,
    patience: Patience,
    /// Of layers that are complete, the oldest first.
    left: VecDeque<Left>,
    links: Links,
    stats: Arc<ExchangeStats>,
    turn: usize,
    /// Of the placement of an epoch: whether it gives this worker every slice.
    has_all: (Epoch, bool),
}

impl ExpertExchange {
    /// An exchange that computes in `local` what `placement` gives to this worker, and asks the other
    /// holders for the rest. The placement may be exchanged at any time.
    #[must_use]
    pub fn new(
        config: ExchangeConfig,
        local: Option<Arc<dyn Experts>>,
        placement: Arc<ArcSwapOption<Placement>>,
        transport: Arc<dyn Transport>,
    ) -> Self {
        let limits = CallLimits::new(&config.geometry, config.row_format);
        // Workers begin at different turns, so that equal ones do not all ask the same holder.
        let turn = config.me.as_str().bytes().map(usize::from).sum();
        let stats = Arc::new(ExchangeStats::new(&config.geometry));
        let (desk, health, links) = (Arc::default(), Health::default(), Links::default());
        Self {
            patience: Patience::new(config.call_timeout),
            left: VecDeque::new(),
            config,
            limits,
            local,
            placement,
            transport,
            desk,
            server: None,
            health,
            links,
            stats,
            turn,
            has_all: (Epoch(0), false),
        }
    }

    /// Waits at `desk`, where the answers of this host's workers are read; computes through `server`,
    /// whose thread sits there too.
    #[must_use]
    pub fn at(mut self, desk: Arc<Desk>, server: Option<ExpertServerHandle>) -> Self {
        debug_assert!(server.as_ref().is_none_or(|s| Arc::ptr_eq(s.desk(), &desk)));
        (self.desk, self.server) = (desk, server);
        self
    }

    /// Counters, readable from any thread.
    #[must_use]
    pub fn stats(&self) -> Arc<ExchangeStats> {
        Arc::clone(&self.stats)
    }

    /// Plans `wants` on the newest placement and sends what is for others.
    fn plan_and_send(&mut self, ticket: &mut Ticket, wants: &[Job], now: Instant) -> Epoch {
        let placement = self.placement.load_full();
        let epoch = placement.as_ref().map_or(Epoch(0), |p| p.epoch);
        let usable = |worker: &WorkerId| self.health.usable(worker, now);
        let plan = self.plan(placement.as_deref(), ticket.layer, wants, &usable);
        ticket.local.extend(plan.local);
        ticket.homeless.extend(plan.homeless);
        let num_segments = self.config.geometry.num_segments();
        for (worker, jobs) in plan.remote {
            for frame in plan::frames(jobs, ticket.num_rows, num_segments, &self.limits) {
                self.send(ticket, &worker, frame, epoch, now);
            }
        }
        epoch
    }

    fn plan(
        &self,
        placement: Option<&Placement>,
        layer: LayerId,
        wants: &[Job],
        usable: &dyn Fn(&WorkerId) -> bool,
    ) -> Plan {
        let view = View {
            placement,
            me: &self.config.me,
            held: &|expert: ExpertId| self.local.as_ref().map_or(0, |e| e.held(layer, expert)),
            usable,
            turn: self.turn,
            num_segments: self.config.geometry.num_segments(),
        };
        plan::plan(&view, layer, wants)
    }

    fn send(
        &self,
        ticket: &mut Ticket,
        worker: &WorkerId,
        frame: Frame,
        epoch: Epoch,
        now: Instant,
    ) {
        let (rows, jobs) = frame.pack(&ticket.rows, self.limits.row_bytes);
        let (layer, num_rows) = (ticket.layer, frame.rows.len());
        add(&self.stats.frames, 1);
        add(&self.stats.bytes_sent, rows.len());
        let outputs_len = answers::outputs_len(&self.config.geometry, &frame.jobs);
        let bounds = self.patience.bounds(worker, num_rows, outputs_len);
        let bounds = bounds.doubled(ticket.num_late, ticket.num_silent);
        let open = OpenCall {
            worker: worker.clone(),
            outputs_len,
            jobs: frame.jobs,
            sent_at: now,
            trip: Duration::ZERO,
            check_at: now + bounds.late,
            silent_at: now + bounds.silent,
        };
        let reply = ticket.open_call(open);
        let call = ExpertCall {
            epoch,
            layer,
            num_rows,
            rows,
            jobs,
        };
        self.transport.send(worker, call, reply);
    }

    /// Computes what is ours, or queues it beside the calls of others.
    pub(crate) fn compute_local(&self, ticket: &mut Ticket, epoch: Epoch) -> Result<(), Error> {
        let Some(server) = self.server.as_ref().filter(|_| !ticket.local.is_empty()) else {
            return self.compute_here(ticket);
        };
        let jobs = std::mem::take(&mut ticket.local);
        let call = ExpertCall {
            epoch,
            layer: ticket.layer,
            num_rows: ticket.num_rows,
            rows: ticket.rows.clone(),
            jobs: jobs.clone(),
        };
        let now = self.now();
        let reply = ticket.open_call(OpenCall {
            worker: self.config.me.clone(),
            outputs_len: answers::outputs_len(&self.config.geometry, &jobs),
            jobs,
            sent_at: now,
            // Nobody is asked in our place before we have refused.
            check_at: now + self.config.layer_deadline,
            silent_at: now + self.config.layer_deadline,
            trip: Duration::ZERO,
        });
        server.submit_own(call, reply);
        Ok(())
    }

    /// Computes what is ours. A slice that was unloaded meanwhile has no home any more.
    fn compute_here(&self, ticket: &mut Ticket) -> Result<(), Error> {
        let jobs = std::mem::take(&mut ticket.local);
        let Some(experts) = self.local.as_ref().filter(|_| !jobs.is_empty()) else {
            return Ok(());
        };
        let borrowed: Vec<ExpertJob<'_>> = jobs.iter().map(borrow).collect();
        let mut out = Vec::new();
        let rows: &[u8] = &ticket.rows;
        match experts.compute(ticket.layer, rows, ticket.num_rows, &borrowed, &mut out) {
            Ok(()) => {
                add(&self.stats.rows_local, num_pairs(&jobs));
                ticket.answers.push(Answer::local(jobs, out));
            }
            Err(tramontane_compute::Error::NotHeld { .. }) => ticket.homeless.extend(jobs),
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Waits until every job is answered, asking elsewhere when a call is refused, lost or late.
    fn wait(&mut self, ticket: &mut Ticket) -> Result<(), Error> {
        let begin = self.now();
        let (desk, server) = (Arc::clone(&self.desk), self.server.clone());
        let mut seat = desk.sit(server.as_ref().map(ExpertServerHandle::shared));
        let mut now = begin;
        while let Some(mut wake) = self.wake(ticket, begin, now)? {
            // One wait, then everything else that is there already.
            while let Some(arrival) = ticket.next_arrival(wake, &mut seat) {
                wake = now;
                self.on_arrival(ticket, arrival)?;
            }
            now = self.now();
            self.ask_elsewhere(ticket, now)?;
        }
        Ok(())
    }

    /// When to look again at a layer that is waited for since `begin`; `None` when all is answered.
    pub(crate) fn wake(
        &self,
        ticket: &Ticket,
        begin: Instant,
        now: Instant,
    ) -> Result<Option<Instant>, Error> {
        if ticket.is_complete() {
            return Ok(None);
        }
        let deadline = begin + self.config.layer_deadline;
        if now >= deadline {
            return Err(ticket.deadline(now - begin));
        }
        let mut wake = ticket
            .next_check()
            .map_or(deadline, |check| check.min(deadline));
        if !ticket.homeless.is_empty() {
            wake = wake.min(now + HOMELESS_PAUSE);
        }
        Ok(Some(wake))
    }

    /// Gives up what is late, and plans again what has no home.
    pub(crate) fn ask_elsewhere(&mut self, ticket: &mut Ticket, now: Instant) -> Result<(), Error> {
        self.give_up_overdue(ticket, now);
        let homeless = std::mem::take(&mut ticket.homeless);
        if homeless.is_empty() {
            return Ok(());
        }
        let epoch = self.plan_and_send(ticket, &homeless, now);
        self.compute_local(ticket, epoch)?;
        if !ticket.homeless.is_empty() {
            self.stats.set_stuck();
        }
        Ok(())
    }

    pub(crate) fn on_answer(
        &mut self,
        ticket: &mut Ticket,
        call: OpenCall,
        answer: Result<Reply, Refusal>,
    ) -> Result<(), Error> {
        let expected = call.outputs_len;
        if call.worker == self.config.me {
            return self.on_own_answer(ticket, call, answer);
        }
        let refusal = match answer {
            Ok(reply) if reply.outputs.len() == expected => {
                self.note_answer(&call);
                add(&self.stats.bytes_received, expected);
                add(&self.stats.rows_remote, num_pairs(&call.jobs));
                self.note_link(&call, &reply);
                ticket.answers.push(Answer::remote(call.jobs, reply));
                return Ok(());
            }
            Ok(reply) => {
                let got = reply.outputs.len();
                Refusal::Invalid(format!("reply of {got} bytes, expected {expected}"))
            }
            Err(refusal) => refusal,
        };
        self.on_refusal(ticket, call, refusal)
    }

    fn note_link(&mut self, call: &OpenCall, reply: &Reply) {
        let served = Duration::from_micros(reply.service_us);
        let under_way = call.trip.saturating_sub(served);
        if let Some(usual) = self.links.note(&call.worker, under_way) {
            self.stats.link_us.store(usual, Ordering::Relaxed);
        }
    }

    /// What our own server says is no news about another worker.
    fn on_own_answer(
        &self,
        ticket: &mut Ticket,
        call: OpenCall,
        answer: Result<Reply, Refusal>,
    ) -> Result<(), Error> {
        match answer {
            Ok(reply) => {
                add(&self.stats.rows_local, num_pairs(&call.jobs));
                ticket.answers.push(Answer::remote(call.jobs, reply));
                Ok(())
            }
            Err(Refusal::Stale { .. }) => {
                ticket.homeless.extend(call.jobs);
                Ok(())
            }
            Err(Refusal::Invalid(reason)) => Err(Error::Invalid {
                layer: ticket.layer,
                worker: call.worker,
                reason,
            }),
            // The server stops or is full of others' calls: that is no reason not to compute ours.
            Err(_) => {
                ticket.local.extend(call.jobs);
                self.compute_here(ticket)
            }
        }
    }
}

impl Exchange for ExpertExchange {
    fn dispatch(&mut self, layer: LayerId, routed: &RoutedRows) -> Result<Ticket, Error> {
        let wants = plan::wants(layer, routed, &self.config.geometry, &self.limits)?;
        self.stats.count_chosen(layer, &wants);
        // Whoever sits there leaves while we plan.
        self.desk.engine_comes();
        let now = self.now();
        self.note_late_answers();
        let routing = Routing::new(routed, self.config.geometry.top_k);
        let rows = Bytes::copy_from_slice(&routed.rows);
        let desk = Arc::clone(&self.desk);
        let mut ticket = Ticket::new(
            layer,
            routed.num_rows,
            rows,
            routing,
            (desk, self.config.clock),
        );
        self.turn = self.turn.wrapping_add(1);
        ticket.epoch = self.plan_and_send(&mut ticket, &wants, now);
        Ok(ticket)
    }

    fn combine(
        &mut self,
        mut ticket: Ticket,
        add: &mut dyn FnMut(&Contributions<'_>) -> Result<(), tramontane_compute::Error>,
    ) -> Result<(), Error> {
        self.desk.engine_comes();
        let epoch = ticket.epoch;
        let computed = self.compute_local(&mut ticket, epoch);
        let begin = Instant::now();
        let waited = computed.and_then(|()| self.wait(&mut ticket));
        self.stats.set_unstuck();
        if ticket.num_rows > SHORT_STEP_ROWS {
            self.desk.engine_goes();
        }
        stats::add(
            &self.stats.wait_us_total,
            begin.elapsed().as_micros() as usize,
        );
        waited?;
        answers::contribute(&self.config.geometry, &ticket.routing, &ticket.answers, add)?;
        if let Some(left) = ticket.leave() {
            if self.left.len() >= LEFT_MAX {
                self.left.pop_front();
            }
            self.left.push_back(left);
        }
        Ok(())
    }

    fn whole_model(&mut self) -> Option<Arc<dyn Experts>> {
        let placement = self.placement.load();
        let placement = placement.as_deref()?;
        if self.has_all.0 != placement.epoch {
            self.has_all = (placement.epoch, plan::gives_all(placement, &self.config.me));
        }
        self.local.clone().filter(|_| self.has_all.1)
    }

    fn count_chosen(&mut self, chosen: &[u64]) {
        self.stats.count_whole_steps(chosen);
    }

    fn rest(&mut self) {
        self.desk.engine_rests();
    }
}

impl Drop for ExpertExchange {
    fn drop(&mut self) {
        self.desk.engine_rests();
    }
}

/// The borrowed form of a job that a backend takes.
pub(crate) fn borrow(job: &Job) -> ExpertJob<'_> {
    ExpertJob {
        expert: job.expert,
        range: job.range,
        row_ids: &job.row_ids,
    }
}

fn num_pairs(jobs: &[Job]) -> usize {
    jobs.iter().map(|job| job.row_ids.len()).sum()
}
