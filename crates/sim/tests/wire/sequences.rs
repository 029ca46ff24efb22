//! Requests from a router's real core over its real gRPC link to workers that are only a token stream. Every
//! request ends once, with its own tokens or a typed error, within a bound; after the storm none fails; workers
//! abort what nobody waits for; at the end no gauge and no task is left.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, stream};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use tramontane_coordination::registry::RECORD_SCHEMA;
use tramontane_coordination::{
    GroupPlacements, Members, ModelFacts, Placements, Roles, SeenIntent, Version, WorkerLoad,
    WorkerRecord, WorkerState,
};
use tramontane_exchange::{ExpertService, LinkSettings};
use tramontane_proto::v1::{
    self, sequence_event::Kind, worker_server::Worker, worker_server::WorkerServer,
};
use tramontane_router::simulation::{
    Failure, Gauges, News, PING_INTERVAL, PING_TIMEOUT, RouterCore,
};
use tramontane_router::{PolicyKind, RouterConfig};
use tramontane_sim::model::{NUM_EXPERTS, NUM_LAYERS, Prefix};
use tramontane_sim::rng::Rng;
use tramontane_tokenizer::Tokenizer;
use tramontane_types::{
    Epoch, FinishReason, Placement, SEGMENTS_PER_EXPERT, SamplingParams, SegmentRange,
    SliceHolders, TokenId, WorkerId,
};

use super::sockets::{PORT, SimulatedTcp, listen};
use super::storm::{Counts, History, Outcome, Plan, STORM, TASKS_END, sleep_until};

/// How long a caller of a worker may be silent after a ping, as a worker has it.
const CALLER_SILENCE_MAX: Duration = Duration::from_millis(1500);
/// A worker ends the sequences of a router that is gone within this.
const ORPHAN_MAX: Duration = PING_INTERVAL
    .saturating_add(CALLER_SILENCE_MAX)
    .saturating_add(Duration::from_millis(200));
/// Connecting, and the longest pause before a router asks again.
const ASK_AGAIN: Duration = Duration::from_secs(4);
/// This long after the storm every request succeeds: dead connections are noticed, and asked again.
const HEALED: Duration = STORM
    .saturating_add(PING_INTERVAL)
    .saturating_add(PING_TIMEOUT)
    .saturating_add(ASK_AGAIN);
/// Longest time that an answer takes where nothing is wrong.
const ANSWER: Duration = Duration::from_secs(4);
/// Until then requests are made.
const QUIET: Duration = HEALED.saturating_add(Duration::from_secs(1));
/// Here nothing may be left of any request, and all hosts begin to stop.
const STOP: Duration = QUIET.saturating_add(ANSWER);
const END: Duration = STOP
    .saturating_add(TASKS_END)
    .saturating_add(Duration::from_millis(100));
const TOKENS_MAX: u64 = 60;
const CLASS: &str = "simulated";
const MODEL: &str = "sim";

/// All that runs, and what it must be.
#[derive(Clone, Debug)]
struct World {
    plan: Arc<Plan>,
    history: History,
    tokenizer: Arc<Tokenizer>,
    /// Sequences on workers, by their ids.
    running: Arc<Mutex<BTreeMap<(String, String), Life>>>,
    counts: Arc<Mutex<Counts>>,
}

/// One life of a host.
#[derive(Clone, Debug)]
struct Life {
    host: String,
    number: u64,
}

/// Runs one seed.
pub(crate) fn run(seed: u64) -> Outcome {
    let world = World {
        plan: Arc::new(Plan::new(seed, (1, 3), (1, 2))),
        history: History::default(),
        tokenizer: tramontane_sim::tokenizer().unwrap(),
        running: Arc::default(),
        counts: Arc::default(),
    };
    let (plan, history) = (Arc::clone(&world.plan), world.history.clone());
    history.note(format_args!("{plan:?}"));
    let mut sim = plan.network();
    for name in &plan.servers {
        let (world, name) = (world.clone(), name.clone());
        sim.host(name.clone(), move || world.clone().work(name.clone()));
    }
    for name in &plan.callers {
        let (world, name) = (world.clone(), name.clone());
        sim.host(name.clone(), move || world.clone().route(name.clone()));
    }
    let mut looked = false;
    plan.run(&mut sim, &history, END, |now| {
        world.check_orphans();
        if now >= STOP && !std::mem::replace(&mut looked, true) {
            for (worker, sequence) in world.running.lock().keys() {
                history.violated(format_args!("{sequence} still runs on {worker}"));
            }
        }
    });
    drop(sim);
    history.check_ends(&[&plan.servers, &plan.callers]);
    let counts = *world.counts.lock();
    history.take(STOP, counts)
}

impl World {
    /// The life of a worker.
    async fn work(self, name: String) -> turmoil::Result {
        let number = self.history.comes_up(&name);
        let mut chance = self.plan.chance(&name, number);
        let stop = CancellationToken::new();
        let service = TokenWorker {
            world: self.clone(),
            name: name.clone(),
            token_time: Duration::from_millis(chance.range(5, 25)),
        };
        let link = LinkSettings {
            keepalive_timeout: CALLER_SILENCE_MAX,
            ..LinkSettings::default()
        };
        let serving = ExpertService::tune(Server::builder(), link)
            .add_service(WorkerServer::new(service))
            .serve_with_incoming_shutdown(listen().await?, stop.clone().cancelled_owned());
        let stopping = async {
            sleep_until(STOP).await;
            stop.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            served = serving => served?,
            () = stopping => {}
        }
        self.history.ends_without_tasks(&name).await;
        Ok(())
    }

    /// The life of a router.
    async fn route(self, name: String) -> turmoil::Result {
        let number = self.history.comes_up(&name);
        let mut chance = self.plan.chance(&name, number);
        let me = Life {
            host: name.clone(),
            number,
        };
        let config = RouterConfig {
            id: name.clone(),
            policy: PolicyKind::RoundRobin,
            ..RouterConfig::default()
        };
        let (_members, members) = watch::channel(Arc::new(self.members()));
        let (_placements, placements) = watch::channel(Arc::new(self.placements()));
        let intent = SeenIntent {
            synced: true,
            ..SeenIntent::default()
        };
        let (_intent, intent) = watch::channel(Arc::new(intent));
        let tokenizer = Arc::clone(&self.tokenizer);
        let connect = Arc::new(SimulatedTcp);
        let core = RouterCore::new(&config, tokenizer, members, placements, intent, connect);
        let (core, clients) = (Arc::new(core), TaskTracker::new());
        let mut asked = 0;
        while self.history.now() < QUIET {
            sleep(Duration::from_millis(chance.range(20, 500))).await;
            let ask = Ask::by_chance(&self, &me, asked, &mut chance);
            clients.spawn(ask.run(Arc::clone(&core)));
            asked += 1;
        }
        clients.close();
        sleep_until(STOP).await;
        if !clients.is_empty() {
            let left = clients.len();
            self.history
                .violated(format_args!("{left} requests to {name} have not ended"));
        }
        if core.gauges() != Gauges::default() {
            let gauges = core.gauges();
            self.history
                .violated(format_args!("{name} is at rest with {gauges:?}"));
        }
        core.abort();
        drop((core, _members, _placements, _intent));
        self.history.ends_without_tasks(&name).await;
        Ok(())
    }

    fn members(&self) -> Members {
        let record = |name: &String| WorkerRecord {
            schema: RECORD_SCHEMA,
            id: WorkerId::new(name),
            address: format!("{name}:{PORT}"),
            socket: None,
            roles: Roles {
                attention: true,
                experts: true,
            },
            capacity_bytes: 1 << 20,
            segment_bytes: 1 << 10,
            numeric_class: CLASS.to_owned(),
            model: ModelFacts {
                fingerprint: MODEL.to_owned(),
                name: MODEL.to_owned(),
                num_layers: NUM_LAYERS,
                num_experts: NUM_EXPERTS,
                num_segments: SEGMENTS_PER_EXPERT,
            },
            state: WorkerState::Ready,
            loaded: Epoch(1),
            incarnation: 1,
            started_ms: 1,
            version: "sim".to_owned(),
            measured: tramontane_coordination::Measured::default(),
            sequences_max: 0,
            part: None,
            load: WorkerLoad::default(),
        };
        let records = self.plan.servers.iter().map(record);
        Members {
            workers: records.map(|r| (r.id.clone(), Arc::new(r))).collect(),
            synced: true,
            ..Members::default()
        }
    }

    fn placements(&self) -> Placements {
        let workers: Vec<WorkerId> = self
            .plan
            .servers
            .iter()
            .map(|name| WorkerId::new(name))
            .collect();
        let everywhere = SliceHolders {
            range: SegmentRange::WHOLE,
            holders: (0..workers.len() as u16).collect(),
        };
        let published = Placement {
            epoch: Epoch(1),
            numeric_class: CLASS.to_owned(),
            model: MODEL.to_owned(),
            num_layers: NUM_LAYERS,
            num_experts: NUM_EXPERTS,
            workers,
            experts: vec![vec![everywhere]; NUM_LAYERS * NUM_EXPERTS],
        };
        let version = Version::of_placement(&published);
        let group = GroupPlacements {
            published: Some(Arc::new(published)),
            pending: None,
        };
        Placements {
            groups: [(version.key(), group)].into(),
            serving: Some(Arc::new(version)),
            synced: true,
            ..Placements::default()
        }
    }

    /// What a router has asked for that is gone runs on no worker for long.
    fn check_orphans(&self) {
        let mut running = self.running.lock();
        running.retain(|(worker, sequence), life| {
            let dead_for = self.history.dead_for(&life.host, life.number);
            let is_orphan = dead_for.is_some_and(|time| time > ORPHAN_MAX);
            if is_orphan {
                self.history.violated(format_args!(
                    "{sequence} runs on {worker} {dead_for:?} after its router has crashed"
                ));
            }
            !is_orphan
        });
    }
}

/// A worker that gives the tokens of the model, one by one.
#[derive(Debug)]
struct TokenWorker {
    world: World,
    name: String,
    token_time: Duration,
}

/// A sequence on a worker; dropped, it does not run any more.
struct Sequence {
    world: World,
    key: (String, String),
    token_time: Duration,
    prefix: Prefix,
    index: u32,
    max_tokens: u32,
    said: Said,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Started,
    Finished,
}

impl Drop for Sequence {
    fn drop(&mut self) {
        self.world.running.lock().remove(&self.key);
    }
}

impl Sequence {
    async fn next(mut self) -> Option<(Result<v1::SequenceEvent, Status>, Self)> {
        let kind = match self.said {
            Said::Nothing => {
                self.said = Said::Started;
                Kind::Started(v1::SequenceStarted { cached_tokens: 0 })
            }
            Said::Started if self.index < self.max_tokens => {
                sleep(self.token_time).await;
                let id = self.prefix.next_token();
                self.prefix = self.prefix.with(id);
                let token = v1::SampledToken {
                    index: self.index,
                    id,
                    logprob: None,
                    top_logprobs: Vec::new(),
                };
                self.index += 1;
                Kind::Tokens(v1::SampledTokens {
                    tokens: vec![token],
                })
            }
            Said::Started => {
                self.said = Said::Finished;
                Kind::Finished(v1::SequenceFinished {
                    reason: v1::FinishReason::Length.into(),
                    usage: Some(v1::Usage::default()),
                })
            }
            Said::Finished => return None,
        };
        Some((Ok(v1::SequenceEvent { kind: Some(kind) }), self))
    }
}

#[tonic::async_trait]
impl Worker for TokenWorker {
    type GenerateStream = Pin<Box<dyn Stream<Item = Result<v1::SequenceEvent, Status>> + Send>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateSequenceRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        let sampling = request.sampling.unwrap_or_default();
        let begin = Prefix::new(sampling.seed, 0);
        let prompt = request.prompt_ids.iter();
        let mut parts = request.request_id.split('.');
        let life = Life {
            host: parts.next().unwrap_or_default().to_owned(),
            number: parts
                .next()
                .and_then(|n| n.parse().ok())
                .unwrap_or_default(),
        };
        let sequence = Sequence {
            world: self.world.clone(),
            key: (self.name.clone(), request.request_id.clone()),
            token_time: self.token_time,
            prefix: prompt.fold(begin, |prefix, &id| prefix.with(id)),
            index: request.num_resumed,
            max_tokens: sampling.max_tokens,
            said: Said::Nothing,
        };
        self.world.counts.lock().replays += u64::from(request.num_resumed > 0);
        let known = self.world.running.lock().insert(sequence.key.clone(), life);
        if known.is_some() {
            let (name, id) = &sequence.key;
            self.world
                .history
                .violated(format_args!("{name} was asked for {id} twice"));
        }
        Ok(Response::new(Box::pin(stream::unfold(
            sequence,
            Sequence::next,
        ))))
    }

    async fn status(
        &self,
        _request: Request<v1::WorkerStatusRequest>,
    ) -> Result<Response<v1::WorkerStatus>, Status> {
        Ok(Response::new(v1::WorkerStatus::default()))
    }

    async fn drain(
        &self,
        _request: Request<v1::DrainRequest>,
    ) -> Result<Response<v1::DrainResponse>, Status> {
        Err(Status::unimplemented("a worker that gives tokens only"))
    }

    async fn drill(
        &self,
        _request: Request<v1::DrillRequest>,
    ) -> Result<Response<v1::DrillReport>, Status> {
        Err(Status::unimplemented("a worker that gives tokens only"))
    }
}

/// One request of a client.
struct Ask {
    world: World,
    router: Life,
    id: String,
    at: Duration,
    prompt: Vec<TokenId>,
    sampling: SamplingParams,
    /// Tokens after which the client goes away.
    abandons_after: Option<usize>,
}

impl Ask {
    fn by_chance(world: &World, router: &Life, number: u64, chance: &mut Rng) -> Self {
        let prompt = (0..chance.range(1, 40)).map(|_| chance.range(20, 220) as TokenId);
        let prompt = prompt.collect();
        let sampling = SamplingParams {
            seed: chance.next(),
            max_tokens: chance.range(1, TOKENS_MAX) as u32,
            stop_ids: Vec::new(),
            ignore_eos: true,
            ..SamplingParams::default()
        };
        let Life { host, number: life } = router;
        Self {
            world: world.clone(),
            router: router.clone(),
            id: format!("{host}.{life}.{number}"),
            at: world.history.now(),
            prompt,
            sampling,
            abandons_after: chance.chance(8).then(|| chance.range(0, 20) as usize),
        }
    }

    async fn run(self, core: Arc<RouterCore>) {
        let history = self.world.history.clone();
        // The bound is checked beside the end of the run too: see `route`.
        let longest = STORM.saturating_sub(self.at) + (HEALED - STORM) + ANSWER;
        let end = timeout(longest, self.read(&core)).await;
        let now = history.now();
        let (id, at, took) = (&self.id, self.at, now.saturating_sub(self.at));
        let is_over = history
            .dead_for(&self.router.host, self.router.number)
            .is_some();
        match &end {
            Err(_elapsed) => history.violated(format_args!(
                "{id}, asked at {at:?}, has no end after {took:?}"
            )),
            Ok(Err(Failure {
                kind,
                message,
                is_internal,
            })) => {
                history.note(format_args!(
                    "{id} is told {kind} after {took:?}: {message}"
                ));
                if *is_internal || (at >= HEALED && !is_over) {
                    history.violated(format_args!(
                        "{id}, asked at {at:?}, failed: {kind}: {message}"
                    ));
                }
            }
            Ok(Ok(num_tokens)) => {
                history.note(format_args!(
                    "{id} ends after {took:?} with {num_tokens} tokens"
                ));
                if at >= HEALED && took > ANSWER {
                    history.violated(format_args!("{id}, asked at {at:?}, took {took:?}"));
                }
            }
        }
        let mut counts = self.world.counts.lock();
        counts.asked += 1;
        counts.answered += u64::from(matches!(end, Ok(Ok(_))));
        counts.lost += u64::from(matches!(end, Ok(Err(_))));
        counts.slowest_ms = counts.slowest_ms.max(took.as_millis() as u64);
        if matches!(end, Ok(Err(_))) && at >= STORM {
            counts.last_loss_ms = counts.last_loss_ms.max((at - STORM).as_millis() as u64);
        }
    }

    /// Reads the answer and checks all of it; how many tokens it had.
    async fn read(&self, core: &RouterCore) -> Result<usize, Failure> {
        let history = &self.world.history;
        let mut answer = core
            .generate(&self.id, &self.prompt, self.sampling.clone())
            .await?;
        let begin = Prefix::new(self.sampling.seed, 0);
        let mut prefix = self
            .prompt
            .iter()
            .fold(begin, |prefix, &id| prefix.with(id));
        let (mut got, mut finish) = (0, None);
        while let Some(News {
            tokens,
            finish: end,
        }) = answer.next().await?
        {
            for token in tokens {
                let expected = prefix.next_token();
                if token.id != expected || finish.is_some() {
                    history.violated(format_args!(
                        "{} token {got} is {}, expected {expected}; ended before: {finish:?}",
                        self.id, token.id
                    ));
                }
                prefix = prefix.with(token.id);
                got += 1;
            }
            finish = end.or(finish);
            if self.abandons_after.is_some_and(|after| got >= after) {
                return Ok(got);
            }
        }
        if finish != Some(FinishReason::Length) || got != self.sampling.max_tokens as usize {
            history.violated(format_args!(
                "{} ended as {finish:?} after {got} tokens",
                self.id
            ));
        }
        Ok(got)
    }
}
