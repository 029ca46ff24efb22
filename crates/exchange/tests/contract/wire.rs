//! What only the wire can get wrong: greetings, credits, frames of every bad kind.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use bytes::Bytes;
use proptest::prelude::*;
use tokio::sync::mpsc as async_mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Code, Status, Streaming};
use tramontane_exchange::grpc::CONNECTION_STREAMS_MAX;
use tramontane_exchange::{
    ExpertCall, GrpcTransport, GrpcTransportConfig, Job, Refusal, Transport,
};
use tramontane_proto::v1::{
    self, expert_exchange_client::ExpertExchangeClient, expert_frame::Kind, expert_refusal::Reason,
};
use tramontane_types::{Epoch, ExpertId, LayerId, SegmentRange, WorkerId};

use super::cluster::{
    SHORT, STREAMS_MAX, Worker, geometry, runtime, server_config, transport_config,
};
use super::{Answer, PATIENCE, sender, small_call, until};

/// A worker that holds every expert of layer 1 and nothing of layer 0.
fn worker(credits: usize) -> Worker {
    let worker = Worker::start("w1", server_config(&geometry(256)), credits);
    for expert in 0..4 {
        worker
            .experts
            .hold(LayerId(1), ExpertId(expert), SegmentRange::WHOLE);
    }
    worker
}

fn hello() -> v1::Hello {
    v1::Hello {
        worker_id: "w0".to_owned(),
        cluster: "test".to_owned(),
        numeric_class: "fake-f32".to_owned(),
        model: "demo".to_owned(),
        credits: 0,
    }
}

fn wire_call(call_id: u64) -> v1::ExpertCall {
    let (segment_begin, segment_end) = (0, 8);
    v1::ExpertCall {
        call_id,
        epoch: 1,
        layer: 1,
        num_rows: 1,
        rows: vec![0; 32].into(),
        jobs: vec![v1::ExpertJob {
            expert: 2,
            segment_begin,
            segment_end,
            row_ids: vec![0],
        }],
    }
}

/// A caller that speaks frames.
struct Raw {
    outgoing: async_mpsc::Sender<v1::ExpertFrame>,
    incoming: Streaming<v1::ExpertFrame>,
}

impl Raw {
    async fn open(worker: &Worker, first: Kind) -> Result<Self, Status> {
        let address = format!("http://{}", worker.address.unwrap());
        let mut client = ExpertExchangeClient::connect(address).await.unwrap();
        let (outgoing, frames) = async_mpsc::channel(64);
        outgoing
            .send(v1::ExpertFrame { kind: Some(first) })
            .await
            .unwrap();
        let incoming = client
            .exchange(ReceiverStream::new(frames))
            .await?
            .into_inner();
        Ok(Self { outgoing, incoming })
    }

    async fn greeted(worker: &Worker) -> (Self, v1::Hello) {
        let mut raw = Self::open(worker, Kind::Hello(hello())).await.unwrap();
        let Kind::Hello(theirs) = raw.receive().await else {
            panic!("expected a hello")
        };
        (raw, theirs)
    }

    async fn send(&self, kind: Option<Kind>) {
        self.outgoing.send(v1::ExpertFrame { kind }).await.unwrap();
    }

    async fn receive(&mut self) -> Kind {
        let frame = tokio::time::timeout(PATIENCE, self.incoming.message())
            .await
            .unwrap();
        frame.unwrap().unwrap().kind.unwrap()
    }

    async fn ask(&mut self, call: v1::ExpertCall) -> Result<v1::ExpertReply, v1::ExpertRefusal> {
        self.send(Some(Kind::Call(call))).await;
        match self.receive().await {
            Kind::Reply(reply) => Ok(reply),
            Kind::Refusal(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_caller_of_another_group_is_refused_with_both_values() {
    let worker = worker(8);
    type Change = fn(&mut v1::Hello);
    let changes: [(Change, &str); 3] = [
        (
            |hello| hello.cluster = "prod".to_owned(),
            r#"cluster is "prod", expected "test""#,
        ),
        (
            |hello| hello.numeric_class = "cpu-q8".to_owned(),
            r#"numeric class is "cpu-q8", expected "fake-f32""#,
        ),
        (
            |hello| hello.model = "other".to_owned(),
            r#"model is "other", expected "demo""#,
        ),
    ];
    runtime().block_on(async {
        for (change, text) in changes {
            let mut hello = hello();
            change(&mut hello);
            let status = Raw::open(&worker, Kind::Hello(hello)).await.err().unwrap();
            assert_eq!(
                (status.code(), status.message()),
                (Code::FailedPrecondition, text)
            );
        }
        let status = Raw::open(&worker, Kind::Call(wire_call(1)))
            .await
            .err()
            .unwrap();
        assert_eq!(status.code(), Code::InvalidArgument);
        let (_raw, theirs) = Raw::greeted(&worker).await;
        assert_eq!((theirs.worker_id.as_str(), theirs.credits), ("w1", 8));
    });
}

struct Caller {
    transport: GrpcTransport,
    shutdown: CancellationToken,
    tasks: TaskTracker,
    runtime: tokio::runtime::Runtime,
}

impl Caller {
    fn new(change: impl FnOnce(&mut GrpcTransportConfig)) -> Self {
        let (shutdown, tasks, runtime) = (CancellationToken::new(), TaskTracker::new(), runtime());
        let mut config = transport_config(&geometry(256));
        change(&mut config);
        let handle = runtime.handle().clone();
        let transport = GrpcTransport::new(config, handle, shutdown.clone(), tasks.clone());
        Self {
            transport,
            shutdown,
            tasks,
            runtime,
        }
    }

    fn set_peer(&self, name: &str, worker: &Worker) {
        let address = worker.address.unwrap().to_string();
        self.transport
            .set_peers(HashMap::from([(WorkerId::new(name), address)]));
    }

    fn ask(&self, name: &str) -> Answer {
        let (answers, got) = mpsc::sync_channel(1);
        self.transport
            .send(&WorkerId::new(name), small_call(), sender(&answers));
        got.recv_timeout(PATIENCE).unwrap()
    }
}

#[test]
fn a_transport_of_another_group_says_so() {
    let worker = worker(8);
    let caller = Caller::new(|config| config.model = "other".to_owned());
    caller.set_peer("w1", &worker);
    let text = r#"model is "other", expected "demo""#;
    assert_eq!(caller.ask("w1"), Err(Refusal::Mismatch(text.to_owned())));
    // An address that now belongs to somebody else.
    let caller = Caller::new(|_| {});
    caller.set_peer("w2", &worker);
    let Err(Refusal::Mismatch(text)) = caller.ask("w2") else {
        panic!("expected a mismatch")
    };
    assert!(text.ends_with(r#"is worker "w1", expected "w2""#), "{text}");
}

#[test]
fn calls_end_with_the_transport_and_with_an_unknown_peer() {
    let worker = worker(8);
    let caller = Caller::new(|_| {});
    assert!(matches!(caller.ask("w1"), Err(Refusal::Lost(_))));
    caller.set_peer("w1", &worker);
    assert!(caller.ask("w1").is_ok());
    worker.experts.close();
    let (answers, got) = mpsc::sync_channel(1);
    caller
        .transport
        .send(&WorkerId::new("w1"), small_call(), sender(&answers));
    worker.experts.wait_entered(2);
    caller.shutdown.cancel();
    assert!(matches!(
        got.recv_timeout(PATIENCE).unwrap(),
        Err(Refusal::Lost(_))
    ));
    caller.tasks.close();
    caller.runtime.block_on(caller.tasks.wait());
    assert!(matches!(caller.ask("w1"), Err(Refusal::Lost(_))));
    worker.experts.open();
}

#[test]
fn a_removed_peer_still_answers_what_is_open() {
    let worker = worker(8);
    let caller = Caller::new(|_| {});
    caller.set_peer("w1", &worker);
    worker.experts.close();
    let (answers, got) = mpsc::sync_channel(1);
    caller
        .transport
        .send(&WorkerId::new("w1"), small_call(), sender(&answers));
    worker.experts.wait_entered(1);
    caller.transport.set_peers(HashMap::new());
    worker.experts.open();
    assert!(got.recv_timeout(PATIENCE).unwrap().is_ok());
    caller.tasks.close();
    caller.runtime.block_on(caller.tasks.wait());
}

#[test]
fn a_frozen_peer_is_noticed_while_calls_are_open_and_when_connecting() {
    let worker = worker(8);
    let caller = Caller::new(|config| {
        config.link.keepalive_interval = SHORT;
        config.link.keepalive_timeout = SHORT;
        config.link.connect_timeout = SHORT * 2;
    });
    caller.set_peer("w1", &worker);
    until("a connection", || caller.ask("w1").is_ok());
    let (resume, resumed) = mpsc::channel();
    worker.freeze(resumed);
    for _ in 0..2 {
        let begin = Instant::now();
        let answer = caller.ask("w1");
        assert!(matches!(answer, Err(Refusal::Lost(_))), "{answer:?}");
        assert!(begin.elapsed() < PATIENCE / 4, "{:?}", begin.elapsed());
    }
    drop(resume);
    until("an answer", || caller.ask("w1").is_ok());
}

#[test]
fn a_draining_service_answers_what_it_has_and_ends_its_streams() {
    let worker = worker(8);
    worker.experts.close();
    runtime().block_on(async {
        let (mut raw, _) = Raw::greeted(&worker).await;
        raw.send(Some(Kind::Call(wire_call(1)))).await;
        worker.experts.wait_entered(1);
        worker.drain.cancel();
        worker.experts.open();
        assert!(matches!(raw.receive().await, Kind::Reply(_)));
        let end = tokio::time::timeout(PATIENCE, raw.incoming.message())
            .await
            .unwrap();
        assert!(matches!(end, Ok(None)), "{end:?}");
    });
}

#[test]
fn the_transport_never_has_more_calls_open_than_credits() {
    let worker = worker(2);
    let handle = worker.server.as_ref().unwrap().handle();
    let caller = Caller::new(|_| {});
    caller.set_peer("w1", &worker);
    worker.experts.close();
    let (answers, got) = mpsc::sync_channel(7);
    let to = WorkerId::new("w1");
    caller.transport.send(&to, small_call(), sender(&answers));
    worker.experts.wait_entered(1);
    for _ in 1..7 {
        caller.transport.send(&to, small_call(), sender(&answers));
    }
    until("the second call", || handle.stats().waiting == 1);
    worker.experts.open();
    // A call beyond the credits would come back as busy.
    for _ in 0..7 {
        assert!(got.recv_timeout(PATIENCE).unwrap().is_ok());
    }
    assert_eq!(caller.transport.stats().connects, 1);
}

#[test]
fn a_caller_that_ignores_its_credits_is_refused_as_busy() {
    let worker = worker(2);
    worker.experts.close();
    runtime().block_on(async {
        let (mut raw, _) = Raw::greeted(&worker).await;
        for call_id in 1..=9 {
            raw.send(Some(Kind::Call(wire_call(call_id)))).await;
        }
        for call_id in 3..=9 {
            let Kind::Refusal(refusal) = raw.receive().await else {
                panic!("expected a refusal")
            };
            assert_eq!((refusal.call_id, refusal.reason()), (call_id, Reason::Busy));
        }
        worker.experts.open();
        for call_id in [1, 2] {
            let Kind::Reply(reply) = raw.receive().await else {
                panic!("expected a reply")
            };
            assert_eq!((reply.call_id, reply.outputs.len()), (call_id, 32));
        }
        assert!(raw.ask(wire_call(10)).await.is_ok());
    });
}

#[test]
fn streams_beyond_the_limit_are_refused_until_one_ends() {
    let worker = worker(2);
    runtime().block_on(async {
        let mut streams = Vec::new();
        for _ in 0..STREAMS_MAX {
            streams.push(Raw::greeted(&worker).await.0);
        }
        let refused = Raw::open(&worker, Kind::Hello(hello())).await;
        let status = refused.err().unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("8 streams"), "{status}");
        for stream in &mut streams {
            assert!(stream.ask(wire_call(1)).await.is_ok());
        }
        streams.pop();
        let begin = Instant::now();
        while Raw::open(&worker, Kind::Hello(hello())).await.is_err() {
            assert!(begin.elapsed() < PATIENCE, "no place became free");
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_connection_is_told_how_many_streams_it_may_open() {
    const SETTINGS: u8 = 4;
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    let worker = worker(2);
    let mut socket = TcpStream::connect(worker.address.unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    socket
        .write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
        .unwrap();
    let mut head = [0; 9];
    socket.read_exact(&mut head).unwrap();
    assert_eq!(head[3], SETTINGS);
    let mut settings = vec![0; usize::from(u16::from_be_bytes([head[1], head[2]]))];
    socket.read_exact(&mut settings).unwrap();
    let told = settings.chunks_exact(6).find_map(|s| {
        let is_it = u16::from_be_bytes([s[0], s[1]]) == MAX_CONCURRENT_STREAMS;
        is_it.then(|| u32::from_be_bytes([s[2], s[3], s[4], s[5]]))
    });
    assert_eq!(told, Some(CONNECTION_STREAMS_MAX));
}

/// The class "memory of tensors over the wire" of docs/security.md, CVE-2024-42479, CVE-2026-34159: sizes, places and operations
/// that the caller names.
#[test]
fn every_kind_of_bad_frame_is_refused_and_the_stream_serves_on() {
    type Change = fn(&mut v1::ExpertCall);
    let changes: [(Change, &str); 17] = [
        (|c| c.layer = 2, "layer 2, expected less than 2"),
        (|c| c.layer = 1 << 16, "layer 65536"),
        (|c| c.num_rows = 0, "0 rows, expected 1 to 512"),
        (|c| c.num_rows = 513, "513 rows, expected 1 to 512"),
        (
            |c| c.num_rows = u32::MAX,
            "4294967295 rows, expected 1 to 512",
        ),
        (|c| c.num_rows = 2, "2 rows of 32 bytes, expected 64"),
        (|c| c.rows = Bytes::new(), "1 rows of 0 bytes, expected 32"),
        (
            |c| c.rows = vec![0; 33].into(),
            "1 rows of 33 bytes, expected 32",
        ),
        (|c| c.jobs.clear(), "no jobs"),
        (|c| c.jobs[0].expert = 4, "expert 4, expected less than 4"),
        (|c| c.jobs[0].expert = u32::MAX, "expert 4294967295"),
        (|c| c.jobs[0].segment_end = 0, "segments 0..0 of expert 2"),
        (|c| c.jobs[0].segment_end = 9, "segments 0..9 of expert 2"),
        (
            |c| c.jobs[0].segment_begin = 300,
            "segments 300..8 of expert 2",
        ),
        (
            |c| c.jobs[0].row_ids.clear(),
            "job of expert 2 segments 0..8 is empty",
        ),
        (
            |c| c.jobs[0].row_ids = vec![0, 1],
            "row 1, expected less than 1",
        ),
        (
            |c| c.jobs[0].row_ids = vec![0; 2049],
            "more than 2048 output vectors",
        ),
    ];
    let worker = worker(4);
    runtime().block_on(async {
        let (mut raw, _) = Raw::greeted(&worker).await;
        for (id, (change, text)) in (1..).zip(changes) {
            let mut call = wire_call(id);
            change(&mut call);
            let refusal = raw.ask(call).await.unwrap_err();
            assert_eq!((refusal.call_id, refusal.reason()), (id, Reason::Invalid));
            assert_eq!(refusal.message, text);
            for kind in [
                Some(Kind::Hello(hello())),
                Some(Kind::Credit(v1::Credit { calls: 1 })),
                None,
            ] {
                raw.send(kind).await;
            }
            let reply = raw.ask(wire_call(1000 + id)).await.unwrap();
            assert_eq!((reply.call_id, reply.outputs.len()), (1000 + id, 32));
        }
        let mut stale = wire_call(99);
        stale.layer = 0;
        let refusal = raw.ask(stale).await.unwrap_err();
        assert_eq!((refusal.reason(), refusal.epoch), (Reason::Stale, 7));
    });
}

#[test]
fn a_frame_beyond_the_message_limit_ends_its_stream_and_no_other() {
    let worker = worker(4);
    runtime().block_on(async {
        let (mut raw, _) = Raw::greeted(&worker).await;
        let (mut other, _) = Raw::greeted(&worker).await;
        let mut huge = wire_call(1);
        huge.rows = vec![0; 4 << 20].into();
        other.send(Some(Kind::Call(huge))).await;
        let end = tokio::time::timeout(PATIENCE, other.incoming.message())
            .await
            .unwrap();
        assert!(!matches!(end, Ok(Some(_))), "{end:?}");
        assert!(raw.ask(wire_call(100)).await.is_ok());
    });
}

fn any_job() -> impl Strategy<Value = v1::ExpertJob> {
    let number = || prop_oneof![0_u32..10, any::<u32>()];
    (
        number(),
        number(),
        number(),
        proptest::collection::vec(number(), 0..6),
    )
        .prop_map(
            |(expert, segment_begin, segment_end, row_ids)| v1::ExpertJob {
                expert,
                segment_begin,
                segment_end,
                row_ids,
            },
        )
}

fn any_call() -> impl Strategy<Value = v1::ExpertCall> {
    let jobs = proptest::collection::vec(any_job(), 0..4);
    let rows = prop_oneof![(0_usize..5).prop_map(|n| n * 32), 0_usize..200];
    let layer = prop_oneof![0_u32..3, any::<u32>()];
    let num_rows = prop_oneof![0_u32..5, any::<u32>()];
    (any::<u64>(), layer, num_rows, rows, jobs).prop_map(
        |(call_id, layer, num_rows, rows, jobs)| v1::ExpertCall {
            call_id,
            epoch: 0,
            layer,
            num_rows,
            rows: vec![0x3e; rows].into(),
            jobs,
        },
    )
}

#[test]
fn calls_made_of_noise_are_answered_one_by_one() {
    let worker = worker(4);
    let runtime = runtime();
    let (raw, _) = runtime.block_on(Raw::greeted(&worker));
    let raw = std::cell::RefCell::new(raw);
    proptest!(ProptestConfig::with_cases(300), |(call in any_call())| {
        let id = call.call_id;
        let answer = runtime.block_on(raw.borrow_mut().ask(call.clone()));
        match answer {
            Ok(reply) => {
                prop_assert_eq!(reply.call_id, id);
                prop_assert_eq!(call.rows.len(), call.num_rows as usize * 32);
            }
            Err(refusal) => {
                prop_assert_eq!(refusal.call_id, id);
                prop_assert!(matches!(refusal.reason(), Reason::Invalid | Reason::Stale));
            }
        }
    });
    runtime
        .block_on(raw.into_inner().ask(wire_call(1)))
        .unwrap();
}

#[test]
fn a_merged_batch_survives_noise_among_its_calls() {
    let worker = Arc::new(worker(4));
    let handle = worker.server.as_ref().unwrap().handle();
    let (answers, got) = mpsc::sync_channel(64);
    worker.experts.close();
    handle.submit(small_call(), sender(&answers));
    worker.experts.wait_entered(1);
    for expert in 0..20 {
        let range = SegmentRange::new(expert % 4, 4 + expert % 4).unwrap();
        let job = Job {
            expert: ExpertId(u16::from(expert) % 6),
            range,
            row_ids: vec![0],
        };
        let rows = vec![expert; 32].into();
        let (epoch, layer) = (Epoch(9), LayerId(1));
        let call = ExpertCall {
            epoch,
            layer,
            num_rows: 1,
            rows,
            jobs: vec![job],
        };
        handle.submit(call, sender(&answers));
    }
    // What was held when the calls came is gone when they are computed.
    worker.experts.hold_nothing();
    worker
        .experts
        .hold(LayerId(1), ExpertId(0), SegmentRange::WHOLE);
    worker.experts.open();
    let got: Vec<Answer> = (0..21)
        .map(|_| got.recv_timeout(PATIENCE).unwrap())
        .collect();
    let count = |want: fn(&Answer) -> bool| got.iter().filter(|answer| want(answer)).count();
    // Experts 4 and 5 do not exist; 1, 2 and 3 are no longer held; 0 is.
    assert_eq!(count(|a| matches!(a, Err(Refusal::Invalid(_)))), 6);
    assert_eq!(count(|a| matches!(a, Err(Refusal::Stale { .. }))), 10);
    assert_eq!(count(Result::is_ok), 5);
}
