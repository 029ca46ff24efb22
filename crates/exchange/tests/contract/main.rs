//! One contract for every transport: the same bits whoever computes, and an answer or an error in time.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod cluster;
mod fake_experts;
mod host;
mod wire;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use cluster::{Cluster, Kind, Random, SHORT, bits, geometry, run, server_config};
use tramontane_exchange::{
    Error, Exchange, ExpertCall, ExpertExchange, Job, Refusal, Reply, ReplySender,
};
use tramontane_types::{Epoch, ExpertId, LayerId, SegmentRange, WorkerId};

/// How long a test waits for what must happen.
const PATIENCE: Duration = Duration::from_secs(20);
const LAYER: LayerId = LayerId(1);
const BOTH: [Kind; 2] = [Kind::Local, Kind::Grpc];

/// Polls until `done`.
fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < PATIENCE, "{what} did not happen");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

fn same_as_direct(cluster: &Cluster, me: &str, num_rows: usize) {
    let routed = Random(num_rows as u64).routed(num_rows, &cluster.geometry);
    let mut exchange = cluster.exchange(me);
    let got = run(&mut exchange, LAYER, &routed, cluster.geometry.hidden).unwrap();
    let expected = cluster.workers[0].experts.direct(LAYER, &routed);
    assert_eq!(bits(&got), bits(&expected));
}

#[test]
fn bits_do_not_depend_on_who_holds_what() {
    for (kind, num_workers) in BOTH
        .into_iter()
        .flat_map(|kind| (1..=5).map(move |n| (kind, n)))
    {
        // Eight segments, and three of which the last is short.
        for ff in [8 * 32, 90] {
            let cluster = Cluster::start(kind, num_workers, &geometry(ff));
            let mut random = Random(ff as u64 + num_workers as u64);
            for num_slices in [1, 2, 3, 8] {
                for num_holders in 1..=num_workers.min(2) {
                    let seed = random.below(1000);
                    cluster.place(num_slices, |expert, slice| {
                        let first = Random((seed + expert * 8 + slice) as u64).below(num_workers);
                        (0..num_holders)
                            .map(|i| ((first + i) % num_workers) as u16)
                            .collect()
                    });
                    for num_rows in [0, 1, 7, 300] {
                        same_as_direct(&cluster, "w0", num_rows);
                    }
                    same_as_direct(&cluster, "an attention worker without experts", 7);
                }
            }
        }
    }
}

#[test]
fn rows_of_two_layers_may_be_under_way_at_once() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(2, |expert, slice| vec![((expert + slice) % 3) as u16]);
        let mut exchange = cluster.exchange("w0");
        let hidden = cluster.geometry.hidden;
        let routed: Vec<_> = (1..4)
            .map(|n| Random(n).routed(9, &cluster.geometry))
            .collect();
        let layers = [LayerId(0), LayerId(1), LayerId(0)];
        let dispatch = |(layer, routed)| exchange.dispatch(layer, routed).unwrap();
        let tickets: Vec<_> = layers.into_iter().zip(&routed).map(dispatch).collect();
        for ((ticket, layer), routed) in tickets.into_iter().zip(layers).zip(&routed).rev() {
            let mut got = vec![0.0; 9 * hidden];
            let mut add = |c: &tramontane_compute::Contributions<'_>| {
                tramontane_compute::combine::add_expert_sums(&mut got, hidden, c)
            };
            exchange.combine(ticket, &mut add).unwrap();
            assert_eq!(
                bits(&got),
                bits(&cluster.workers[0].experts.direct(layer, routed))
            );
        }
        let stats = exchange.stats();
        assert!(stats.rows_local.load(Ordering::Relaxed) > 0);
        assert!(stats.rows_remote.load(Ordering::Relaxed) > 0);
        let (sent, received) = (&stats.bytes_sent, &stats.bytes_received);
        let carried = cluster.transport().stats();
        assert_eq!(carried.bytes_sent, sent.load(Ordering::Relaxed));
        assert_eq!(carried.bytes_received, received.load(Ordering::Relaxed));
        assert_eq!(carried.calls, stats.frames.load(Ordering::Relaxed));
        assert_eq!(stats.retries.load(Ordering::Relaxed), 0);
    }
}

#[test]
fn calls_that_wait_for_one_layer_are_merged() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 1, &geometry(256));
        cluster.place(1, |_, _| vec![0]);
        let worker = &cluster.workers[0];
        let handle = worker.server.as_ref().unwrap().handle();
        worker.experts.close();
        std::thread::scope(|scope| {
            let call = |name: &'static str, rows: usize| same_as_direct(&cluster, name, rows);
            scope.spawn(move || call("a", 3));
            worker.experts.wait_entered(1);
            scope.spawn(move || call("b", 7));
            scope.spawn(move || call("c", 11));
            until("two calls wait", || handle.stats().waiting == 2);
            worker.experts.open();
        });
        let stats = handle.stats();
        assert_eq!((stats.calls, stats.batches, stats.rows), (3, 2, 21));
    }
}

#[test]
fn a_stale_placement_is_replaced_while_the_step_waits() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(2, |expert, _| vec![(expert % 2) as u16 + 1]);
        // Worker 1 dropped its experts, the caller does not know yet.
        cluster.workers[1].experts.hold_nothing();
        let next = cluster.make_placement(8, |_, slice| vec![(slice % 2 * 2) as u16]);
        cluster.load(&next);
        cluster.workers[1].experts.hold_nothing();
        let stats = std::thread::scope(|scope| {
            let mut exchange = cluster.exchange("w0");
            let (stats, cluster) = (exchange.stats(), &cluster);
            let step = scope.spawn(move || {
                let routed = Random(5).routed(40, &cluster.geometry);
                let got = run(&mut exchange, LAYER, &routed, cluster.geometry.hidden).unwrap();
                assert_eq!(
                    bits(&got),
                    bits(&cluster.workers[0].experts.direct(LAYER, &routed))
                );
            });
            until("a refusal", || stats.retries.load(Ordering::Relaxed) > 0);
            cluster.placement.store(Some(Arc::new(next)));
            step.join().unwrap();
            stats
        });
        assert!(
            stats.rows_local.load(Ordering::Relaxed) > 0,
            "the new placement was used"
        );
    }
}

#[test]
fn a_killed_worker_is_replaced_by_its_replica() {
    for kind in BOTH {
        let mut cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(
            2,
            |_, slice| if slice == 0 { vec![1, 2] } else { vec![2, 1] },
        );
        let mut exchange = cluster.exchange("w0");
        let routed = Random(9).routed(20, &cluster.geometry);
        let expected = cluster.workers[0].experts.direct(LAYER, &routed);
        let hidden = cluster.geometry.hidden;
        for _ in 0..3 {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), bits(&expected));
        }
        // Killed while it computes: the open call is lost, not only the next one.
        cluster.workers[1].experts.close();
        let ticket = exchange.dispatch(LAYER, &routed).unwrap();
        let mut tickets = vec![ticket];
        if cluster.workers[1]
            .server
            .as_ref()
            .unwrap()
            .handle()
            .stats()
            .batches
            == 0
        {
            tickets.push(exchange.dispatch(LAYER, &routed).unwrap());
        }
        cluster.workers[1].experts.open();
        cluster.kill(1);
        for ticket in tickets {
            let mut got = vec![0.0; 20 * hidden];
            let mut add = |c: &tramontane_compute::Contributions<'_>| {
                tramontane_compute::combine::add_expert_sums(&mut got, hidden, c)
            };
            exchange.combine(ticket, &mut add).unwrap();
            assert_eq!(bits(&got), bits(&expected));
        }
        for _ in 0..5 {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), bits(&expected));
        }
    }
}

#[test]
fn without_a_replica_the_deadline_names_the_slice_and_a_revived_worker_serves_again() {
    for kind in BOTH {
        let mut cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(2, |_, slice| vec![slice as u16 + 1]);
        let deadline = Duration::from_millis(200);
        let mut exchange = cluster.exchange_with("w0", |config| config.layer_deadline = deadline);
        let routed = Random(9).routed(20, &cluster.geometry);
        let hidden = cluster.geometry.hidden;
        run(&mut exchange, LAYER, &routed, hidden).unwrap();
        cluster.kill(2);
        let error = run(&mut exchange, LAYER, &routed, hidden).unwrap_err();
        assert!(error.is_retryable());
        let text = error.to_string();
        let Error::Deadline {
            layer,
            waited,
            slices,
            workers,
            ..
        } = error
        else {
            panic!("{text}");
        };
        assert_eq!((layer, workers), (LAYER, vec![WorkerId::new("w2")]));
        assert!(waited >= deadline && waited < deadline * 10, "{waited:?}");
        assert!(
            slices
                .iter()
                .all(|slice| slice.range == SegmentRange::new(4, 8).unwrap())
        );
        assert!(text.contains("layer 1 expert 0 segments 4..8"), "{text}");
        assert!(text.contains("asked w2; last refusal: w2: "), "{text}");
        cluster.revive(2);
        let mut exchange = cluster.exchange("w0");
        let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
        assert_eq!(
            bits(&got),
            bits(&cluster.workers[0].experts.direct(LAYER, &routed))
        );
    }
}

#[test]
fn without_any_placement_the_deadline_passes() {
    let cluster = Cluster::start(Kind::Local, 1, &geometry(256));
    let mut exchange = cluster.exchange_with("w0", |config| config.layer_deadline = SHORT);
    let routed = Random(1).routed(2, &cluster.geometry);
    let text = run(&mut exchange, LAYER, &routed, 8)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("segments 0..8; asked nobody; last refusal: none"),
        "{text}"
    );
}

#[test]
fn a_silent_worker_is_given_up_when_there_is_another() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(1, |_, _| vec![1, 2]);
        let mut exchange = cluster.exchange_with("w0", |config| config.call_timeout = SHORT);
        let routed = Random(3).routed(30, &cluster.geometry);
        let expected = cluster.workers[0].experts.direct(LAYER, &routed);
        let hidden = cluster.geometry.hidden;
        cluster.workers[1].experts.close();
        let first = Instant::now();
        for _ in 0..4 {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), bits(&expected));
        }
        assert!(first.elapsed() >= SHORT);
        assert!(exchange.stats().retries.load(Ordering::Relaxed) > 0);
        // The late answer concerns nobody any more.
        cluster.workers[1].experts.open();
        let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
        assert_eq!(bits(&got), bits(&expected));
    }
}

#[test]
fn a_worker_that_takes_longer_than_usual_is_hedged_and_believed_again_when_it_answers() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(1, |_, _| vec![1, 2]);
        // Only what is usual makes a call late here: the timeout is as good as never.
        let mut exchange = cluster.exchange("w0");
        let routed = Random(3).routed(30, &cluster.geometry);
        let expected = bits(&cluster.workers[0].experts.direct(LAYER, &routed));
        let hidden = cluster.geometry.hidden;
        let retries = |exchange: &ExpertExchange| exchange.stats().retries.load(Ordering::Relaxed);
        for _ in 0..40 {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), expected);
        }
        let before = retries(&exchange);
        cluster.workers[1].experts.close();
        until("a hedge", || {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), expected);
            retries(&exchange) > before
        });
        cluster.workers[1].experts.open();
        // More than what still waited there when it opened.
        let entered = cluster.workers[1].experts.num_entered() + retries(&exchange) as usize;
        until("it is asked again", || {
            let got = run(&mut exchange, LAYER, &routed, hidden).unwrap();
            assert_eq!(bits(&got), expected);
            cluster.workers[1].experts.num_entered() > entered
        });
    }
}

#[test]
fn a_slow_worker_without_replica_is_awaited() {
    let cluster = Cluster::start(Kind::Grpc, 2, &geometry(256));
    cluster.place(1, |_, _| vec![1]);
    cluster.workers[1].experts.close();
    std::thread::scope(|scope| {
        let cluster = &cluster;
        let mut exchange = cluster.exchange_with("w0", |config| config.call_timeout = SHORT);
        let stats = exchange.stats();
        let step = scope.spawn(move || {
            let routed = Random(3).routed(30, &cluster.geometry);
            let got = run(&mut exchange, LAYER, &routed, 8).unwrap();
            assert_eq!(
                bits(&got),
                bits(&cluster.workers[0].experts.direct(LAYER, &routed))
            );
        });
        cluster.workers[1].experts.wait_entered(1);
        let begin = Instant::now();
        until("some timeouts", || begin.elapsed() > SHORT * 4);
        cluster.workers[1].experts.open();
        step.join().unwrap();
        assert_eq!(
            stats.frames.load(Ordering::Relaxed),
            1,
            "nothing was sent again"
        );
    });
}

#[test]
fn a_reply_of_the_wrong_length_is_an_error_unless_somebody_else_answers() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.workers[1].experts.return_too_little();
        cluster.place(1, |_, _| vec![1]);
        let mut exchange = cluster.exchange("w0");
        let routed = Random(3).routed(5, &cluster.geometry);
        let error = run(&mut exchange, LAYER, &routed, 8).unwrap_err();
        assert!(matches!(&error, Error::Invalid { worker, .. } if worker.as_str() == "w1"));
        assert!(error.to_string().contains("bytes, expected"), "{error}");
        cluster.place(1, |_, _| vec![1, 2]);
        for _ in 0..3 {
            let mut exchange = cluster.exchange("w0");
            let got = run(&mut exchange, LAYER, &routed, 8).unwrap();
            assert_eq!(
                bits(&got),
                bits(&cluster.workers[0].experts.direct(LAYER, &routed))
            );
            let got = run(&mut exchange, LAYER, &routed, 8).unwrap();
            assert_eq!(
                bits(&got),
                bits(&cluster.workers[0].experts.direct(LAYER, &routed))
            );
        }
    }
}

fn small_call() -> ExpertCall {
    ExpertCall {
        epoch: Epoch(1),
        layer: LAYER,
        num_rows: 1,
        rows: vec![0; 32].into(),
        jobs: vec![Job {
            expert: ExpertId(0),
            range: SegmentRange::WHOLE,
            row_ids: vec![0],
        }],
    }
}

type Answer = Result<Reply, Refusal>;

fn sender(answers: &mpsc::SyncSender<Answer>) -> ReplySender {
    let answers = answers.clone();
    ReplySender::new(move |answer| {
        let sent = answers.try_send(answer);
        // A test that is over does not listen any more.
        assert!(
            !matches!(sent, Err(mpsc::TrySendError::Full(_))),
            "more answers than calls"
        );
    })
}

#[test]
fn a_full_queue_is_busy_and_the_caller_tries_again() {
    for kind in BOTH {
        let mut config = server_config(&geometry(256));
        config.queue_max = 1;
        let cluster = Cluster::start_with(kind, 2, &config);
        cluster.place(1, |_, _| vec![1]);
        let experts = &cluster.workers[1].experts;
        let handle = cluster.workers[1].server.as_ref().unwrap().handle();
        experts.close();
        let (answers, got) = mpsc::sync_channel(2);
        handle.submit(small_call(), sender(&answers));
        experts.wait_entered(1);
        handle.submit(small_call(), sender(&answers));
        std::thread::scope(|scope| {
            scope.spawn(|| same_as_direct(&cluster, "w0", 12));
            until("a busy refusal", || handle.stats().busy > 0);
            assert_eq!(handle.stats().waiting, 1, "the queue keeps its limit");
            experts.open();
        });
        assert!(got.iter().take(2).all(|answer| answer.is_ok()));
    }
}

#[test]
fn a_panic_of_the_experts_costs_its_call_and_no_later_one() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        cluster.place(1, |_, _| vec![1]);
        let handle = cluster.workers[1].server.as_ref().unwrap().handle();
        let experts = &cluster.workers[1].experts;
        let routed = Random(3).routed(5, &cluster.geometry);
        experts.panic_next(1);
        let error = run(&mut cluster.exchange("w0"), LAYER, &routed, 8).unwrap_err();
        assert!(matches!(&error, Error::Invalid { worker, .. } if worker.as_str() == "w1"));
        let text = error.to_string();
        assert!(text.contains("failed unexpectedly"), "{text}");
        assert!(!text.contains("secret"), "{text}");
        assert!(handle.is_serving());
        assert_eq!((handle.stats().refused, handle.stats().calls), (1, 0));
        same_as_direct(&cluster, "w0", 12);
        // With a replica nobody sees it.
        cluster.place(1, |_, _| vec![1, 2]);
        experts.panic_next(1);
        for _ in 0..3 {
            same_as_direct(&cluster, "w0", 12);
        }
    }
}

#[test]
fn a_panic_of_a_merged_batch_costs_only_the_calls_that_panic_alone() {
    let cluster = Cluster::start(Kind::Local, 1, &geometry(256));
    cluster.place(1, |_, _| vec![0]);
    let handle = cluster.workers[0].server.as_ref().unwrap().handle();
    let experts = &cluster.workers[0].experts;
    experts.close();
    let (answers, got) = mpsc::sync_channel(4);
    handle.submit(small_call(), sender(&answers));
    experts.wait_entered(1);
    for _ in 0..3 {
        handle.submit(small_call(), sender(&answers));
    }
    // The one under way, then the batch of three, then the first of them alone.
    experts.panic_next(3);
    experts.open();
    let got: Vec<bool> = got.iter().take(4).map(|answer| answer.is_ok()).collect();
    assert_eq!(got, [false, false, true, true]);
    assert!(handle.is_serving());
}

#[test]
fn a_late_answer_takes_the_place_of_its_replacement() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(256));
        let routed = Random(3).routed(30, &cluster.geometry);
        let expected = cluster.workers[0].experts.direct(LAYER, &routed);
        let (late, replacement) = (&cluster.workers[1].experts, &cluster.workers[2].experts);
        late.close();
        replacement.close();
        cluster.place(1, |_, _| vec![1]);
        let mut exchange = cluster.exchange_with("w0", |config| config.call_timeout = SHORT);
        let stats = exchange.stats();
        let ticket = exchange.dispatch(LAYER, &routed).unwrap();
        late.wait_entered(1);
        cluster.place(1, |_, _| vec![1, 2]);
        let mut got = vec![0.0; 30 * 8];
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut add = |c: &tramontane_compute::Contributions<'_>| {
                    tramontane_compute::combine::add_expert_sums(&mut got, 8, c)
                };
                exchange.combine(ticket, &mut add).unwrap();
            });
            replacement.wait_entered(1);
            late.open();
        });
        assert_eq!(bits(&got), bits(&expected));
        let frames = stats.frames.load(Ordering::Relaxed);
        assert_eq!(
            frames, 2,
            "a call, its replacement, which never answered, and no third"
        );
    }
}

#[test]
fn shutdown_computes_what_waits_and_drop_refuses_it() {
    for drain in [true, false] {
        let mut config = server_config(&geometry(256));
        config.queue_max = 1;
        let mut cluster = Cluster::start_with(Kind::Local, 1, &config);
        cluster.place(1, |_, _| vec![0]);
        let server = cluster.workers[0].server.take().unwrap();
        let (handle, experts) = (server.handle(), &cluster.workers[0].experts);
        experts.close();
        let (answers, got) = mpsc::sync_channel(2);
        handle.submit(small_call(), sender(&answers));
        experts.wait_entered(1);
        handle.submit(small_call(), sender(&answers));
        let (probes, refused) = mpsc::sync_channel(1);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                if drain {
                    server.shutdown();
                } else {
                    drop(server);
                }
            });
            // The queue is full: busy until it stops. Then the call under way may end.
            until("a stop", || {
                handle.submit(small_call(), sender(&probes));
                refused.recv().unwrap() == Err(Refusal::Stopping)
            });
            experts.open();
        });
        assert!(got.recv().unwrap().is_ok());
        let second = got.recv().unwrap();
        assert_eq!(second.is_ok(), drain, "{second:?}");
    }
}

#[test]
fn choices_speed_and_links_are_measured() {
    for kind in BOTH {
        let cluster = Cluster::start(kind, 3, &geometry(8 * 32));
        cluster.place(1, |expert, _| vec![(expert % 3) as u16]);
        let mut exchange = cluster.exchange("w0");
        let stats = exchange.stats();
        let mut chosen = vec![0; cluster.geometry.num_experts];
        for seed in 0..70 {
            let routed = Random(seed).routed(2, &cluster.geometry);
            for expert in &routed.topk_ids {
                chosen[usize::from(expert.0)] += 1;
            }
            run(&mut exchange, LAYER, &routed, cluster.geometry.hidden).unwrap();
        }
        let counted: Vec<u64> = stats
            .chosen
            .iter()
            .map(|n| n.load(Ordering::Relaxed))
            .collect();
        let of_layer = usize::from(LAYER.0) * chosen.len();
        assert_eq!(counted[of_layer..of_layer + chosen.len()], chosen);
        assert_eq!(counted.iter().sum::<u64>(), chosen.iter().sum::<u64>());
        let link_us = stats.link_us.load(Ordering::Relaxed);
        assert!((1..5_000_000).contains(&link_us), "{kind:?}: {link_us}");
        let server = cluster.workers[1].server.as_ref().unwrap().handle();
        let segment_ns = server.segment_ns().unwrap();
        assert!((1..1_000_000_000).contains(&segment_ns), "{segment_ns}");
        // The first worker has no calls of others and computes its own without the server.
        let server = cluster.workers[0].server.as_ref().unwrap().handle();
        assert_eq!(server.segment_ns(), None);
    }
}
