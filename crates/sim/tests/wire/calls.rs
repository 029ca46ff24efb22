//! Expert calls over the real gRPC transport and service. Every call has exactly one outcome within a bound, and
//! it is that call's own; after the storm calls succeed and every credit is there; at the end no task is left.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tramontane_compute::RowFormat;
use tramontane_exchange::grpc::{CONNECT_TIMEOUT, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT};
use tramontane_exchange::{
    CallLimits, ExpertCall, ExpertServer, ExpertServerConfig, ExpertServerHandle, ExpertService,
    ExpertServiceConfig, GrpcTransport, GrpcTransportConfig, Job, LinkSettings, Refusal, Reply,
    ReplySender, Transport,
};
use tramontane_sim::experts::Held;
use tramontane_sim::model::{NUM_EXPERTS, geometry, segment};
use tramontane_sim::rng::Rng;
use tramontane_types::{
    Epoch, ExpertId, ExpertSlice, LayerId, SEGMENTS_PER_EXPERT, SegmentRange, WorkerId,
};

use super::sockets::{PORT, SimulatedTcp, listen};
use super::storm::{Counts, History, LOOK, Outcome, Plan, STORM, TASKS_END, sleep_until};

/// Calls that a stream may have open: few, so that one that leaks is missed.
const CREDITS: usize = 8;
/// Streams of a worker beyond one per caller: few, so that places that leak are missed.
const STREAMS_SPARE: usize = 4;
/// A connection that carries nothing is given up after this.
const SILENCE: Duration = KEEPALIVE_INTERVAL.saturating_add(KEEPALIVE_TIMEOUT);
/// Longest wait for credit and for the computation, in these runs.
const SERVED: Duration = Duration::from_secs(2);
/// Longest time from a call to its outcome: it waits behind a connection that has just broken and for the next
/// one, which may take as long as it is allowed to and break in its turn.
const OUTCOME_MAX: Duration = SILENCE
    .saturating_add(CONNECT_TIMEOUT)
    .saturating_add(SILENCE)
    .saturating_add(SERVED);
/// Longest pause of the transport after a connection that could not be made.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// This long after the storm calls succeed: what is broken is noticed, what is being dialled ends or fails, and
/// the pause behind it is over.
const HEALED: Duration = STORM
    .saturating_add(SILENCE)
    .saturating_add(CONNECT_TIMEOUT)
    .saturating_add(PAUSE_MAX);
/// Until then calls are made.
const QUIET: Duration = HEALED.saturating_add(Duration::from_secs(1));
/// From here to [`OPEN`] nothing is computed: calls hold their credit.
const SHUT: Duration = QUIET.saturating_add(Duration::from_secs(1));
const OPEN: Duration = SHUT.saturating_add(Duration::from_secs(1));
/// Here all hosts begin to stop, each after a little time of its own.
const STOP: Duration = OPEN.saturating_add(Duration::from_secs(2));
const STOP_SPREAD_MS: u64 = 300;
const END: Duration = STOP
    .saturating_add(Duration::from_millis(STOP_SPREAD_MS))
    .saturating_add(TASKS_END)
    .saturating_add(Duration::from_millis(100));

/// The layer whose experts are held, and one whose are not.
const HELD: LayerId = LayerId(1);
const NOT_HELD: LayerId = LayerId(0);
/// The epoch of every worker.
const EPOCH: u64 = 7;
/// Of the weights.
const VERSION: u8 = 0;
const CLASS: &str = "simulated";

/// What a call must get when nothing is wrong with the network.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Due {
    Outputs(Bytes),
    Stale,
    Invalid,
}

/// One call.
#[derive(Debug)]
struct Asked {
    caller: String,
    life: u64,
    to: WorkerId,
    at: Duration,
    due: Due,
    outcomes: Vec<Duration>,
}

/// All calls, and the servers that run.
#[derive(Clone, Debug, Default)]
struct Calls {
    history: History,
    asked: Arc<Mutex<Vec<Asked>>>,
    servers: Arc<Mutex<BTreeMap<String, ExpertServerHandle>>>,
    counts: Arc<Mutex<Counts>>,
}

/// Runs one seed.
pub(crate) fn run(seed: u64) -> Outcome {
    let plan = Arc::new(Plan::new(seed, (1, 3), (1, 2)));
    let calls = Calls::default();
    let history = calls.history.clone();
    history.note(format_args!("{plan:?}"));
    let mut sim = plan.network();
    for name in &plan.servers {
        let (plan, calls, name) = (Arc::clone(&plan), calls.clone(), name.clone());
        sim.host(name.clone(), move || {
            serve(Arc::clone(&plan), calls.clone(), name.clone())
        });
    }
    for name in &plan.callers {
        let (plan, calls, name) = (Arc::clone(&plan), calls.clone(), name.clone());
        sim.host(name.clone(), move || {
            call(Arc::clone(&plan), calls.clone(), name.clone())
        });
    }
    let mut looked = false;
    plan.run(&mut sim, &history, END, |now| {
        if now >= OPEN && !std::mem::replace(&mut looked, true) {
            calls.check_credit(&plan);
        }
    });
    drop(sim);
    calls.check_outcomes();
    history.check_ends(&[&plan.servers, &plan.callers]);
    let counts = *calls.counts.lock();
    history.take(STOP, counts)
}

/// The life of an expert worker.
async fn serve(plan: Arc<Plan>, calls: Calls, name: String) -> turmoil::Result {
    let life = calls.history.comes_up(&name);
    let mut chance = plan.chance(&name, life);
    let held = Held::of(VERSION);
    for expert in (0..NUM_EXPERTS as u16).map(ExpertId) {
        let (layer, range) = (HELD, SegmentRange::WHOLE);
        held.hold(ExpertSlice {
            layer,
            expert,
            range,
        });
    }
    let mut config = ExpertServerConfig::new(geometry(), RowFormat::F32, CLASS.to_owned());
    config.clock = || Instant::now().into_std();
    let server = ExpertServer::in_turns(config, Arc::new(held), Arc::new(AtomicU64::new(EPOCH)));
    calls.servers.lock().insert(name.clone(), server.handle());
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let config = ExpertServiceConfig {
        credits: CREDITS,
        streams_max: plan.callers.len() + STREAMS_SPARE,
        ..ExpertServiceConfig::new(WorkerId::new(&name), "sim".to_owned(), "demo".to_owned())
    };
    let service = ExpertService::new(config, server.handle(), shutdown.clone(), tasks.clone());
    let serving = ExpertService::tune(Server::builder(), LinkSettings::default())
        .add_service(service.into_service())
        .serve_with_incoming_shutdown(listen().await?, shutdown.clone().cancelled_owned());
    let stop_at = STOP + Duration::from_millis(chance.range(0, STOP_SPREAD_MS));
    let stopping = async {
        sleep_until(stop_at).await;
        shutdown.cancel();
        tasks.close();
        tasks.wait().await;
        std::future::pending::<()>().await;
    };
    tokio::select! {
        biased;
        served = serving => served?,
        () = compute(&server, &calls.history, &mut chance) => {}
        () = stopping => {}
    }
    tasks.wait().await;
    calls.history.ends_without_tasks(&name).await;
    Ok(())
}

/// Computes what waits, now and then.
async fn compute(server: &ExpertServer, history: &History, chance: &mut Rng) {
    loop {
        sleep(Duration::from_millis(chance.range(1, 8))).await;
        if !(SHUT..OPEN).contains(&history.now()) {
            while server.turn() {}
        }
    }
}

/// The life of a calling worker.
async fn call(plan: Arc<Plan>, calls: Calls, name: String) -> turmoil::Result {
    let life = calls.history.comes_up(&name);
    let mut chance = plan.chance(&name, life);
    let (shutdown, tasks) = (CancellationToken::new(), TaskTracker::new());
    let config = GrpcTransportConfig {
        me: WorkerId::new(&name),
        cluster: "sim".to_owned(),
        numeric_class: CLASS.to_owned(),
        model: "demo".to_owned(),
        limits: CallLimits::new(&geometry(), RowFormat::F32),
        link: LinkSettings::default(),
        dial: Arc::new(SimulatedTcp),
    };
    let (runtime, stop, tracker) = (Handle::current(), shutdown.clone(), tasks.clone());
    let transport = GrpcTransport::new(config, runtime, stop, tracker);
    let peers: Vec<WorkerId> = plan
        .servers
        .iter()
        .map(|name| WorkerId::new(name))
        .collect();
    let addresses = peers
        .iter()
        .map(|peer| (peer.clone(), format!("{peer}:{PORT}")));
    transport.set_peers(addresses.collect::<HashMap<_, _>>());
    let me = Me {
        calls,
        name,
        life,
        transport,
    };
    while me.calls.history.now() < QUIET {
        sleep(Duration::from_millis(chance.range(5, 100))).await;
        let to = chance.pick(&peers).clone();
        // Sometimes more than the credit.
        let burst = if chance.chance(4) { 2 * CREDITS } else { 1 };
        (0..burst).for_each(|_| me.send(&to, &mut chance, false));
    }
    sleep_until(SHUT + LOOK).await;
    for peer in &peers {
        // One more than the credit: it waits here.
        (0..=CREDITS).for_each(|_| me.send(peer, &mut chance, true));
    }
    sleep_until(STOP + Duration::from_millis(chance.range(0, STOP_SPREAD_MS))).await;
    for peer in &peers {
        me.send(peer, &mut chance, true);
    }
    shutdown.cancel();
    tasks.close();
    tasks.wait().await;
    let Me {
        calls,
        name,
        transport,
        ..
    } = me;
    drop(transport);
    calls.history.ends_without_tasks(&name).await;
    Ok(())
}

/// One life of a caller.
struct Me {
    calls: Calls,
    name: String,
    life: u64,
    transport: GrpcTransport,
}

impl Me {
    fn send(&self, to: &WorkerId, chance: &mut Rng, must_be_good: bool) {
        let (call, due) = by_chance(chance, must_be_good);
        let mut asked = self.calls.asked.lock();
        let number = asked.len();
        asked.push(Asked {
            caller: self.name.clone(),
            life: self.life,
            to: to.clone(),
            at: self.calls.history.now(),
            due,
            outcomes: Vec::new(),
        });
        drop(asked);
        let calls = self.calls.clone();
        let reply = ReplySender::new(move |answer| calls.on_outcome(number, &answer));
        self.transport.send(to, call, reply);
    }
}

/// A call, and what it must get.
fn by_chance(chance: &mut Rng, must_be_good: bool) -> (ExpertCall, Due) {
    let num_rows = chance.range(1, 6);
    let rows: Vec<u32> = (0..num_rows).map(|_| chance.next() as u32).collect();
    let first = chance.range(0, NUM_EXPERTS as u64) as u16;
    let (mut jobs, mut outputs) = (Vec::new(), Vec::new());
    for expert in first..NUM_EXPERTS as u16 {
        if expert == first || chance.chance(50) {
            let job = job_by_chance(chance, ExpertId(expert), rows.len());
            add_outputs(&job, &rows, &mut outputs);
            jobs.push(job);
        }
    }
    let bytes: Vec<u8> = rows.iter().flat_map(|row| row.to_le_bytes()).collect();
    let mut call = ExpertCall {
        epoch: Epoch(EPOCH),
        layer: HELD,
        num_rows: rows.len(),
        rows: bytes.into(),
        jobs,
    };
    let due = match chance.range(0, 10) {
        0 if !must_be_good => {
            call.layer = NOT_HELD;
            Due::Stale
        }
        1 if !must_be_good => {
            call.jobs[0].row_ids = vec![rows.len() as u32];
            Due::Invalid
        }
        _ => Due::Outputs(outputs.into()),
    };
    (call, due)
}

fn job_by_chance(chance: &mut Rng, expert: ExpertId, num_rows: usize) -> Job {
    let segments = u64::from(SEGMENTS_PER_EXPERT);
    let begin = chance.range(0, segments);
    let end = chance.range(begin + 1, segments + 1);
    let row_ids = (0..num_rows as u32).filter(|id| *id == 0 || chance.chance(60));
    Job {
        expert,
        row_ids: row_ids.collect(),
        range: SegmentRange::new(begin as u8, end as u8).unwrap(),
    }
}

/// What the experts of the model say to a job.
fn add_outputs(job: &Job, rows: &[u32], outputs: &mut Vec<u8>) {
    for &row in &job.row_ids {
        for node in job.range.nodes(SEGMENTS_PER_EXPERT) {
            let value = |s| segment(VERSION, (HELD, job.expert, s), rows[row as usize]);
            let sum: u64 = (node.begin..node.begin + node.len).map(value).sum();
            outputs.extend((sum as f32).to_le_bytes());
        }
    }
}

impl Calls {
    fn on_outcome(&self, number: usize, answer: &Result<Reply, Refusal>) {
        let now = self.history.now();
        let mut asked = self.asked.lock();
        let one = &mut asked[number];
        one.outcomes.push(now);
        let (at, took) = (one.at, now.saturating_sub(one.at));
        let (caller, to) = (one.caller.clone(), one.to.clone());
        let is_over = self.history.dead_for(&caller, one.life).is_some();
        // What is asked while hosts stop may be lost.
        let must_succeed = (HEALED..STOP).contains(&at);
        let is_due = match (answer, &one.due) {
            (Ok(reply), Due::Outputs(outputs)) => reply.outputs == outputs,
            (Err(Refusal::Stale { epoch }), Due::Stale) => *epoch == Epoch(EPOCH),
            (Err(Refusal::Invalid(_)), Due::Invalid) => true,
            _ => false,
        };
        drop(asked);
        let told = match answer {
            Ok(_) => "answered".to_owned(),
            Err(why) => why.to_string(),
        };
        let took_ms = took.as_millis();
        self.history.note(format_args!(
            "{caller} call {number} to {to}: {told}, {took_ms} ms"
        ));
        let is_lost = matches!(answer, Err(Refusal::Lost(_) | Refusal::Stopping));
        if !is_due && (!is_lost || (must_succeed && !is_over)) {
            self.history.violated(format_args!(
                "{caller} call {number} to {to}, sent at {at:?}: {answer:?} is not what it must get"
            ));
        }
        if !is_over && took > OUTCOME_MAX {
            self.history.violated(format_args!(
                "{caller} call {number} to {to}, sent at {at:?}, had an outcome after {took:?}"
            ));
        }
        let mut counts = self.counts.lock();
        counts.answered += u64::from(is_due);
        counts.lost += u64::from(is_lost);
        counts.slowest_ms = counts.slowest_ms.max(took_ms as u64);
        if is_lost && (STORM..STOP).contains(&at) {
            counts.last_loss_ms = counts.last_loss_ms.max((at - STORM).as_millis() as u64);
        }
    }

    /// Nothing is computed, and more was asked than the credit allows: as much as it allows waits.
    fn check_credit(&self, plan: &Plan) {
        let expected = (CREDITS * plan.callers.len()) as u64;
        for (name, server) in &*self.servers.lock() {
            let waiting = server.stats().waiting;
            if waiting != expected {
                self.history.violated(format_args!(
                    "{waiting} calls wait at {name}, expected the whole credit, {expected}"
                ));
            }
        }
    }

    fn check_outcomes(&self) {
        let asked = self.asked.lock();
        for (number, one) in asked.iter().enumerate() {
            let Asked { caller, to, at, .. } = one;
            let outcomes = one.outcomes.len();
            if outcomes != 1 {
                self.history.violated(format_args!(
                    "{caller} call {number} to {to}, sent at {at:?}, had {outcomes} outcomes"
                ));
            }
        }
        self.counts.lock().asked = asked.len() as u64;
    }
}
