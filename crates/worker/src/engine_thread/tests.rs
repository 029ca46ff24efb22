//! What readers of the engine's thread see when they do not read, leave, or are left.

use arc_swap::ArcSwapOption;
use tramontane_compute::{AttentionConfig, Backend, Experts, KvFormat, WeightFormat};
use tramontane_engine::EngineConfig;
use tramontane_exchange::{ExchangeConfig, ExpertExchange, LocalTransport};
use tramontane_model::{Checkpoint, load_slices};
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::{
    Epoch, ExpertId, ExpertSlice, LayerId, Placement, SamplingParams, SegmentRange, SliceHolders,
    WorkerId,
};

use super::*;
use crate::expert_keeper::KeptExperts;
use crate::{WorkerConfig, backend};

/// Pages of the cache: room for one long sequence.
const PAGES: usize = 128;

/// An engine whose experts are all its own.
fn engine(checkpoint: &Checkpoint) -> Engine {
    let geometry = checkpoint.geometry();
    let config = WorkerConfig {
        weights: WeightFormat::Q8,
        ..WorkerConfig::default()
    };
    let backend: Arc<dyn Backend> = backend::on_cpu(&config, geometry).unwrap();
    let bytes = checkpoint.attention_weights().unwrap();
    let sizes = AttentionConfig {
        num_pages: PAGES,
        max_rows: 64,
        kv_format: KvFormat::F16,
    };
    let attention = backend.attention(&bytes.weights(), sizes).unwrap();
    let experts = Arc::new(KeptExperts::new(
        backend.experts(),
        geometry.clone(),
        backend.row_format(),
        WeightFormat::Q8,
    ));
    let each = |index: usize| ExpertSlice {
        layer: LayerId((index / geometry.num_experts) as u16),
        expert: ExpertId((index % geometry.num_experts) as u16),
        range: SegmentRange::WHOLE,
    };
    let num_experts = geometry.num_layers * geometry.num_experts;
    let slices: Vec<_> = (0..num_experts).map(each).collect();
    load_slices(checkpoint, &*experts, &slices, &|_, _| {}).unwrap();
    let whole = SliceHolders {
        range: SegmentRange::WHOLE,
        holders: vec![0],
    };
    let placement = Placement {
        epoch: Epoch(1),
        numeric_class: backend.numeric_class().to_owned(),
        model: checkpoint.fingerprint().to_owned(),
        num_layers: geometry.num_layers,
        num_experts: geometry.num_experts,
        workers: vec![WorkerId::new("a")],
        experts: vec![vec![whole]; num_experts],
    };
    let exchange = ExpertExchange::new(
        ExchangeConfig::new(WorkerId::new("a"), geometry.clone(), backend.row_format()),
        Some(experts as Arc<dyn Experts>),
        Arc::new(ArcSwapOption::from_pointee(placement)),
        Arc::new(LocalTransport::new()),
    );
    let limits = EngineConfig {
        num_pages: PAGES,
        max_step_rows: 64,
        prefix_cache: false,
        ..EngineConfig::default()
    };
    Engine::new(limits, geometry.clone(), attention, Box::new(exchange)).unwrap()
}

fn start() -> EngineThread {
    let directory = tempfile::tempdir().unwrap();
    TinyModel::mixtral()
        .max_positions(8192)
        .write(directory.path())
        .unwrap();
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    EngineThread::start(engine(&checkpoint), Box::new(|_| {})).unwrap()
}

fn sequence(id: &str) -> NewSequence {
    let params = SamplingParams {
        max_tokens: 8000,
        ignore_eos: true,
        ..Default::default()
    };
    let (id, prompt) = (RequestId::new(id), vec![1, 5, 9]);
    NewSequence {
        id,
        prompt,
        num_resumed: 0,
        params,
        cache_salt: 0,
    }
}

async fn until(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(30), "not within 30 s");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

async fn read_all(mut generation: Generation) -> (usize, GenerationEvent) {
    let (mut num_tokens, mut last) = (0, None);
    while let Some(event) = generation.next().await {
        num_tokens += usize::from(matches!(event, GenerationEvent::Token(_)));
        last = Some(event);
    }
    (num_tokens, last.unwrap())
}

#[tokio::test]
async fn a_reader_that_does_not_read_loses_its_sequence_and_nothing_else() {
    let thread = start();
    let handle = thread.handle();
    let unread = handle.generate(sequence("unread")).await.unwrap();
    let idle = || handle.stats().running == 0 && handle.stats().pages_free == PAGES;
    until(|| handle.stats().tokens_sampled > 0 && idle()).await;
    let (num_tokens, last) = read_all(unread).await;
    assert_eq!(last, GenerationEvent::Failed(GenerationFailure::SlowReader));
    assert_eq!(
        num_tokens,
        EVENTS_MAX + EVENTS_EXTRA - 2,
        "beside the start and the failure"
    );
    let mut next = handle.generate(sequence("next")).await.unwrap();
    assert_eq!(
        next.next().await,
        Some(GenerationEvent::Started { cached_tokens: 0 })
    );
    drop(next);
    until(idle).await;
    assert_eq!(handle.check(), Ok(()));
}

#[tokio::test]
async fn a_stopped_engine_hands_its_sequences_back_and_takes_no_more() {
    let thread = start();
    let handle = thread.handle();
    let running = handle.generate(sequence("running")).await.unwrap();
    thread.stop();
    thread.ended().cancelled().await;
    let (_, last) = read_all(running).await;
    assert_eq!(last, GenerationEvent::Failed(GenerationFailure::Stopped));
    let refused = handle.generate(sequence("late")).await.unwrap_err();
    assert_eq!(refused, RefusedSequence::Stopped);
    assert!(handle.check().is_err());
}

#[tokio::test]
async fn a_draining_engine_refuses_and_waits_for_its_readers() {
    let thread = start();
    let handle = thread.handle();
    let running = handle.generate(sequence("running")).await.unwrap();
    handle.refuse_new();
    let refused = handle.generate(sequence("late")).await.unwrap_err();
    assert_eq!(refused, RefusedSequence::Draining);
    let idle = handle.idle();
    tokio::pin!(idle);
    assert!(futures::poll!(&mut idle).is_pending());
    drop(running);
    idle.await;
}
