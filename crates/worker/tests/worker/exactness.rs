//! The exactness contract: the same requests give the same ids and log probabilities, bit for bit, for
//! any number of workers, placement, batch, prompt chunk, cache and carrier.

use tramontane_compute::WeightFormat;
use tramontane_coordination::Roles;
use tramontane_proto::v1::{self, sequence_event::Kind};
use tramontane_types::SamplingParams;
use tramontane_worker::{RoleSet, WorkerConfig};

use crate::cluster::{Carrier, Cluster, Cuts, Said, config, prompt, request, split};

/// Requests of a full batch.
const BATCH: usize = 16;

/// Prompts of 1 to 116 tokens; half of them begin alike, over a page's length. Greedy and sampled.
fn requests() -> Vec<v1::GenerateSequenceRequest> {
    let common = prompt(99, 70);
    let one = |index: usize| {
        let own = prompt(index as u32, 1 + index * 3);
        let ids = if index.is_multiple_of(2) {
            own
        } else {
            [common.clone(), own].concat()
        };
        let params = SamplingParams {
            temperature: if index.is_multiple_of(3) { 0.0 } else { 0.9 },
            top_p: if index % 4 == 1 { 0.8 } else { 1.0 },
            repetition_penalty: if index % 5 == 2 { 1.2 } else { 1.0 },
            seed: index as u64,
            max_tokens: 8,
            ignore_eos: true,
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        request(&format!("r{index}"), ids, &params)
    };
    (0..BATCH).map(one).collect()
}

/// The variants of one engine: prompts in chunks of 7 or 512 rows, with and without prefix cache.
fn engine(id: &str, variant: usize, weights: WeightFormat) -> WorkerConfig {
    WorkerConfig {
        max_prefill_chunk: if variant.is_multiple_of(2) { 512 } else { 7 },
        prefix_cache: variant & 2 != 0,
        ..config(id, weights)
    }
}

/// Says how an expert is held.
type Cutter = Box<dyn Fn(usize) -> Cuts>;

/// Slices of different lengths: most are not whole subtrees, and neighbours sit on other workers.
fn sliced(num_workers: usize) -> impl Fn(usize) -> Cuts {
    let cuts: [&[u8]; 4] = [&[0, 3, 8], &[0, 1, 4, 7, 8], &[0, 4, 8], &[0, 2, 5, 8]];
    move |index| {
        let bounds = cuts[index % cuts.len()];
        let holder = |at: usize| ((index + at) % num_workers) as u16;
        let slice = |(at, pair): (usize, &[u8])| (pair[0], pair[1], vec![holder(at)]);
        bounds.windows(2).enumerate().map(slice).collect()
    }
}

/// Everybody holds everything, in slices.
fn replicated(num_workers: usize) -> impl Fn(usize) -> Cuts {
    let all: Vec<u16> = (0..num_workers as u16).collect();
    move |_| vec![(0, 5, all.clone()), (5, 8, all.clone())]
}

/// One worker, one request after the other, whole prompts, no cache: what all others must say.
async fn expected(weights: WeightFormat, requests: &[v1::GenerateSequenceRequest]) -> Vec<Said> {
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start(engine("alone", 0, weights)).await;
    cluster.publish(&["alone"], split(1)).await;
    let mut expected = Vec::new();
    for request in requests {
        expected.extend(
            cluster
                .generate_all("alone", std::slice::from_ref(request))
                .await,
        );
    }
    cluster.stop().await;
    expected
}

/// One worker in one variant: a full batch, then one of its requests alone.
async fn one_worker(weights: WeightFormat, variant: usize, expected: &[Said]) {
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start(engine("alone", variant, weights)).await;
    cluster.publish(&["alone"], split(1)).await;
    check(
        &cluster,
        "alone",
        expected,
        &format!("{weights}, one worker, variant {variant}"),
    )
    .await;
    // The variants are what they are called: a prompt of 70 tokens has one whole page to find.
    let again = cluster.generate("alone", requests()[1].clone()).await;
    let first = again.unwrap().message().await.unwrap().unwrap();
    let cached_tokens = if variant & 2 == 0 { 0 } else { 64 };
    assert_eq!(
        first.kind,
        Some(Kind::Started(v1::SequenceStarted { cached_tokens }))
    );
    cluster.stop().await;
}

/// `num_workers` engines in different variants, one placement after the other. Of three workers one has
/// no experts and one no engine.
async fn many_workers(
    weights: WeightFormat,
    carrier: Carrier,
    num_workers: usize,
    expected: &[Said],
) {
    let mut cluster = Cluster::new(carrier);
    let ids: Vec<String> = (0..num_workers).map(|n| format!("w{n}")).collect();
    let mut engines = Vec::new();
    let mut holders = Vec::new();
    for (n, id) in ids.iter().enumerate() {
        let mut config = engine(id, n + 1, weights);
        let attention = num_workers != 3 || n != 1;
        let experts = num_workers != 3 || n != 0;
        config.roles = RoleSet(Roles { attention, experts });
        cluster.start(config).await;
        engines.extend(attention.then_some(id.as_str()));
        holders.extend(experts.then_some(id.as_str()));
    }
    let placements: [(&str, Cutter); 3] = [
        ("split", Box::new(split(holders.len()))),
        ("sliced", Box::new(sliced(holders.len()))),
        ("replicated", Box::new(replicated(holders.len()))),
    ];
    for (name, cut) in placements {
        cluster.publish(&holders, cut).await;
        let what = format!("{weights}, {num_workers} workers, {carrier:?}, {name}");
        // All engines at once: expert servers merge the calls of different workers.
        let checks = engines
            .iter()
            .map(|id| check(&cluster, id, expected, &what));
        futures::future::join_all(checks).await;
    }
    let mut carried = 0;
    for id in &engines {
        carried += cluster.status(id).await.bytes_received;
    }
    assert!(
        carried > 0,
        "{weights}, {num_workers} workers, {carrier:?}: no rows travelled"
    );
    cluster.stop().await;
}

async fn check(cluster: &Cluster, id: &str, expected: &[Said], what: &str) {
    let requests = requests();
    let batch = cluster.generate_all(id, &requests).await;
    for (index, (said, expected)) in batch.iter().zip(expected).enumerate() {
        assert_eq!(said, expected, "{what}: request {index} in a batch on {id}");
    }
    for index in [1, 14] {
        let alone = cluster.generate_all(id, &requests[index..=index]).await;
        assert_eq!(
            alone[0], expected[index],
            "{what}: request {index} alone on {id}"
        );
    }
}

async fn matrix(weights: WeightFormat) {
    let expected = expected(weights, &requests()).await;
    let lens: Vec<usize> = expected.iter().map(|said| said.ids.len()).collect();
    assert_eq!(lens, [8; BATCH]);
    assert!(
        expected.windows(2).any(|pair| pair[0].ids != pair[1].ids),
        "answers differ"
    );
    for variant in 0..4 {
        one_worker(weights, variant, &expected).await;
    }
    for carrier in [Carrier::Local, Carrier::Grpc] {
        for num_workers in [2, 3, 5] {
            many_workers(weights, carrier, num_workers, &expected).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn f32_answers_have_the_same_bits_everywhere() {
    matrix(WeightFormat::F32).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bf16_answers_have_the_same_bits_everywhere() {
    matrix(WeightFormat::Bf16).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q8_answers_have_the_same_bits_everywhere() {
    matrix(WeightFormat::Q8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn q4_answers_have_the_same_bits_everywhere() {
    matrix(WeightFormat::Q4).await;
}
