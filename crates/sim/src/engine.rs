//! The attention half of a simulated worker: steps its sequences through the layers with the real exchange,
//! over a transport that is late, loses and repeats. Never emits a token that its experts did not give.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep, sleep_until};
use tonic::Status;
use tramontane_compute::combine::add_expert_sums;
use tramontane_compute::{ExpertJob, Experts, RoutedRows, RowFormat};
use tramontane_coordination::WorkerState;
use tramontane_exchange::{
    Exchange as _, ExchangeConfig, ExpertCall, ExpertExchange, Refusal, Reply, ReplySender,
    Transport, TransportStats,
};
use tramontane_proto::v1::{self, sequence_event::Kind};
use tramontane_types::{Epoch, LayerId, TokenId, WorkerId};

use crate::model::{NUM_LAYERS, Prefix, TOP_K, chosen, fold, geometry};
use crate::net::{Life, Node};
use crate::worker::{Shared, SimWorker};

/// Events of a sequence that wait for the network; a sequence has fewer.
const EVENTS_MAX: usize = 512;
/// A connection between workers that carries nothing for this long is given up.
const LINK_PATIENCE: Duration = Duration::from_secs(4);
/// Time that an expert call takes.
const COMPUTE: Duration = Duration::from_millis(1);

/// One sequence on a worker.
#[derive(Debug)]
pub struct Running {
    prefix: Prefix,
    next_index: u32,
    max_tokens: u32,
    stop_ids: Vec<TokenId>,
    is_started: bool,
    events: mpsc::Sender<Result<v1::SequenceEvent, Status>>,
    cancelled: Arc<AtomicBool>,
}

/// What a sequence says, and how to abort it.
#[derive(Debug)]
pub struct Opened {
    /// In order.
    pub events: mpsc::Receiver<Result<v1::SequenceEvent, Status>>,
    /// Set it to abort.
    pub cancelled: Arc<AtomicBool>,
}

impl Running {
    /// Whether somebody waits for more.
    fn is_wanted(&self) -> bool {
        !self.cancelled.load(Ordering::Relaxed) && !self.events.is_closed()
    }

    fn say(&self, kind: Kind) {
        // The channel has room for every event of a sequence; a reader that is gone is noticed at the next step.
        let _ = self
            .events
            .try_send(Ok(v1::SequenceEvent { kind: Some(kind) }));
    }

    /// Takes the next token; whether the sequence ends with it.
    fn sample(&mut self, outputs: u64) -> bool {
        let id = self.prefix.token(outputs);
        let token = v1::SampledToken {
            index: self.next_index,
            id,
            logprob: None,
            top_logprobs: Vec::new(),
        };
        self.say(Kind::Tokens(v1::SampledTokens {
            tokens: vec![token],
        }));
        self.prefix = self.prefix.with(id);
        self.next_index += 1;
        let reason = if self.stop_ids.contains(&id) {
            v1::FinishReason::Stop
        } else if self.next_index >= self.max_tokens {
            v1::FinishReason::Length
        } else {
            return false;
        };
        self.say(Kind::Finished(v1::SequenceFinished {
            reason: reason.into(),
            usage: Some(v1::Usage::default()),
        }));
        true
    }
}

impl SimWorker {
    /// The service `Generate`: as the worker's, it refuses when joining, and when leaving.
    ///
    /// # Errors
    /// What the worker would answer.
    pub fn open(&self, request: &v1::GenerateSequenceRequest) -> Result<Opened, Status> {
        match *self.state.borrow() {
            WorkerState::Ready => {}
            WorkerState::Joining => return Err(Status::failed_precondition("joining")),
            _ => return Err(Status::unavailable("leaving")),
        }
        let asked = (&*request.model, &*request.numeric_class);
        if asked != (&*self.version.model, &*self.version.numeric_class) {
            return Err(Status::failed_precondition("other weights"));
        }
        let sampling = request.sampling.clone().unwrap_or_default();
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        let cancelled = Arc::new(AtomicBool::new(false));
        let begin = Prefix::new(sampling.seed, self.build.version);
        self.sequences.lock().push(Running {
            prefix: request
                .prompt_ids
                .iter()
                .fold(begin, |prefix, &id| prefix.with(id)),
            next_index: request.num_resumed,
            max_tokens: sampling.max_tokens,
            stop_ids: sampling.stop_ids,
            is_started: false,
            events,
            cancelled: Arc::clone(&cancelled),
        });
        self.woken.notify_one();
        Ok(Opened {
            events: receiver,
            cancelled,
        })
    }

    /// Computes an expert call, or refuses it: nothing is answered for a slice that is not held.
    pub fn serve(&self, call: &ExpertCall) -> Result<Reply, Refusal> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let borrowed = call.jobs.iter().map(|job| ExpertJob {
            expert: job.expert,
            range: job.range,
            row_ids: &job.row_ids,
        });
        let jobs: Vec<ExpertJob<'_>> = borrowed.collect();
        let mut out = Vec::new();
        let computed = self
            .held
            .compute(call.layer, &call.rows, call.num_rows, &jobs, &mut out);
        let epoch = self.serving.load().as_ref().map_or(Epoch(0), |p| p.epoch);
        let check = &self.shared.check;
        if computed.is_err() {
            check.count(|counts| counts.stale += 1);
            return Err(Refusal::Stale { epoch });
        }
        check.count(|counts| counts.calls += 1);
        let outputs: Vec<u8> = out.iter().flat_map(|x| x.to_le_bytes()).collect();
        Ok(Reply {
            outputs: Bytes::from(outputs),
            service_us: 0,
        })
    }

    fn exchange(&self) -> ExpertExchange {
        let transport = SimTransport {
            shared: self.shared.clone(),
            me: self.life,
            woken: Arc::clone(&self.woken),
        };
        let mut config = ExchangeConfig::new(self.id.clone(), geometry(), RowFormat::F32);
        config.clock = || Instant::now().into_std();
        let held: Arc<dyn Experts> = Arc::clone(&self.held) as _;
        ExpertExchange::new(
            config,
            Some(held),
            Arc::clone(&self.serving),
            Arc::new(transport),
        )
    }

    /// Steps whatever runs, for ever.
    pub(crate) async fn run_engine(self: Arc<Self>) {
        let mut exchange = self.exchange();
        loop {
            let node = self.life.node;
            self.shared.net.until(|net| !net.is_paused(node)).await;
            self.sequences.lock().retain(Running::is_wanted);
            let rows: Vec<Prefix> = self.begin_step();
            if rows.is_empty() {
                self.woken.notified().await;
                continue;
            }
            match self.step(&mut exchange, &rows).await {
                Ok(outputs) => self.end_step(&outputs),
                Err(error) => self.fail_step(rows.len(), &error),
            }
        }
    }

    fn begin_step(&self) -> Vec<Prefix> {
        let mut sequences = self.sequences.lock();
        for sequence in &mut *sequences {
            if !std::mem::replace(&mut sequence.is_started, true) {
                sequence.say(Kind::Started(v1::SequenceStarted { cached_tokens: 0 }));
            }
        }
        sequences.iter().map(|sequence| sequence.prefix).collect()
    }

    /// The rows that stepped are the first sequences: new ones are added behind them.
    fn end_step(&self, outputs: &[u64]) {
        let mut step = outputs.iter();
        self.sequences
            .lock()
            .retain_mut(|sequence| match step.next() {
                Some(&outputs) => !sequence.sample(outputs),
                None => true,
            });
    }

    fn fail_step(&self, num_rows: usize, error: &tramontane_exchange::Error) {
        self.shared
            .check
            .note(format_args!("{} could not step: {error}", self.id));
        let mut sequences = self.sequences.lock();
        let num_rows = num_rows.min(sequences.len());
        for sequence in sequences.drain(..num_rows) {
            let _ = sequence
                .events
                .try_send(Err(Status::unavailable("step did not work")));
        }
    }

    async fn step(
        &self,
        exchange: &mut ExpertExchange,
        prefixes: &[Prefix],
    ) -> Result<Vec<u64>, tramontane_exchange::Error> {
        sleep(Duration::from_millis(self.build.step_ms)).await;
        let mut outputs = vec![0; prefixes.len()];
        for layer in (0..NUM_LAYERS as u16).map(LayerId) {
            let mut residual = vec![0.0_f32; prefixes.len()];
            let ticket = exchange.dispatch(layer, &routed(layer, prefixes))?;
            let mut awaited = exchange.await_in_turns(ticket)?;
            while let Some(wake) = exchange.turn(&mut awaited)? {
                tokio::select! {
                    biased;
                    () = self.woken.notified() => {}
                    () = sleep_until(Instant::from_std(wake)) => {}
                }
            }
            let added = exchange.contribute(&awaited, |all| add_expert_sums(&mut residual, 1, all));
            if let Err(error) = added {
                let me = &self.id;
                self.shared
                    .check
                    .violated(format_args!("{me} cannot combine layer {layer}: {error}"));
            }
            for (outputs, sum) in outputs.iter_mut().zip(residual) {
                *outputs = fold(*outputs, sum as u64);
            }
        }
        Ok(outputs)
    }
}

fn routed(layer: LayerId, prefixes: &[Prefix]) -> RoutedRows {
    let mut routed = RoutedRows {
        num_rows: prefixes.len(),
        ..RoutedRows::default()
    };
    for prefix in prefixes {
        let row = prefix.row(layer);
        routed.rows.extend_from_slice(&row.to_le_bytes());
        routed.topk_ids.extend_from_slice(&chosen(row));
        routed.topk_weights.extend_from_slice(&[1.0; TOP_K]);
    }
    routed
}

/// Carries expert calls over the simulated network.
#[derive(Debug)]
struct SimTransport {
    shared: Shared,
    me: Life,
    woken: Arc<Notify>,
}

impl Transport for SimTransport {
    fn send(&self, to: &WorkerId, call: ExpertCall, reply: ReplySender) {
        let Some(to) = node_of(to) else {
            reply.send(Err(Refusal::Lost(format!("no worker {to}"))));
            return;
        };
        let (shared, me, woken) = (self.shared.clone(), self.me, Arc::clone(&self.woken));
        let again = shared.net.comes_twice().then(|| call.clone());
        self.shared.sent.spawn(async move {
            let answer = carry(&shared, me, to, &call).await;
            reply.send(answer);
            woken.notify_one();
            if let Some(call) = again {
                // The answer to the second copy goes nowhere: its call is closed.
                let _ = carry(&shared, me, to, &call).await;
            }
        });
    }

    fn stats(&self) -> TransportStats {
        TransportStats::default()
    }
}

/// The worker of that name.
#[must_use]
pub fn node_of(worker: &WorkerId) -> Option<Node> {
    let index = worker.as_str().strip_prefix('w')?.parse().ok()?;
    Some(Node::worker(index))
}

/// One call there and its answer back.
async fn carry(shared: &Shared, me: Life, to: Node, call: &ExpertCall) -> Result<Reply, Refusal> {
    let (net, lost) = (&shared.net, |why: &str| Refusal::Lost(why.to_owned()));
    let there = async {
        net.carry(me.node, to).await;
        let peer = shared.peers.lock().get(&to).cloned();
        let peer = peer.ok_or_else(|| lost("connection refused"))?;
        let caller = shared.peers.lock().get(&me.node).cloned();
        if caller.is_some_and(|caller| caller.version != peer.version) {
            // As the hello of a connection says.
            shared
                .check
                .violated(format_args!("{} called {to} of other weights", me.node));
            return Err(lost("other weights"));
        }
        sleep(COMPUTE).await;
        // It may have died meanwhile.
        if !net.is_alive(peer.life) {
            return Err(lost("connection reset"));
        }
        Ok(peer.serve(call))
    };
    let there = tokio::time::timeout(LINK_PATIENCE, there).await;
    let answer = there.unwrap_or_else(|_| Err(lost("no sign of life")));
    let back = tokio::time::timeout(LINK_PATIENCE, net.carry(to, me.node)).await;
    if back.is_err() {
        return Err(lost("no sign of life"));
    }
    answer?
}
