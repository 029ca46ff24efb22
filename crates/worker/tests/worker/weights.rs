//! Workers that have no files, or lose them: the weights come from others and are the same, bit for bit.

use std::fs::File;
use std::sync::Arc;

use tokio::net::TcpListener;
use tramontane_compute::WeightFormat;
use tramontane_model::Checkpoint;
use tramontane_proto::v1;
use tramontane_types::SamplingParams;
use tramontane_worker::WorkerConfig;

use crate::behaviour::http_get;
use crate::cluster::{Carrier, Cluster, Said, config, new_files, prompt, request, split};

fn requests() -> Vec<v1::GenerateSequenceRequest> {
    let one = |index: u32| {
        let params = SamplingParams {
            temperature: if index.is_multiple_of(2) { 0.0 } else { 0.9 },
            seed: index.into(),
            max_tokens: 12,
            ignore_eos: true,
            logprobs: Some(3),
            ..SamplingParams::default()
        };
        let ids = prompt(index, 5 + 20 * index as usize);
        request(&format!("r{index}"), ids, &params)
    };
    (0..6).map(one).collect()
}

/// What a worker says that has all files and all experts.
async fn expected(weights: WeightFormat) -> Vec<Said> {
    let mut cluster = Cluster::new(Carrier::Local);
    cluster.start(config("alone", weights)).await;
    cluster.publish(&["alone"], split(1)).await;
    let said = cluster.generate_all("alone", &requests()).await;
    cluster.stop().await;
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_without_files_say_the_same_in_every_format() {
    for weights in [WeightFormat::Bf16, WeightFormat::Q8, WeightFormat::Q4] {
        let expected = expected(weights).await;
        let mut cluster = Cluster::new(Carrier::Grpc);
        cluster.start(config("a", weights)).await;
        for id in ["b", "c"] {
            cluster.start_from_peers(config(id, weights)).await;
        }
        // Slices whose borders are no borders of anything.
        let sliced = |index: usize| {
            let holder = |at: usize| vec![((index + at) % 3) as u16];
            vec![(0, 3, holder(0)), (3, 4, holder(1)), (4, 8, holder(2))]
        };
        cluster.publish(&["a", "b", "c"], sliced).await;
        for id in ["b", "a"] {
            assert_eq!(
                cluster.generate_all(id, &requests()).await,
                expected,
                "{weights} {id}"
            );
        }
        cluster.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_whose_file_is_cut_off_while_it_serves_goes_on_with_those_of_others() {
    let expected = expected(WeightFormat::Q8).await;
    let (ours, ops) = (new_files(), TcpListener::bind("127.0.0.1:0").await.unwrap());
    let ops_address = ops.local_addr().unwrap();
    let mut cluster = Cluster::new(Carrier::Grpc);
    let q8 = |id: &str| -> WorkerConfig { config(id, WeightFormat::Q8) };
    cluster.start(q8("a")).await;
    let checkpoint = Arc::new(Checkpoint::open(ours.path()).unwrap());
    cluster.start_with(q8("b"), Some(ops), checkpoint).await;
    let file = ours.path().join("model.safetensors");
    let file = File::options().write(true).open(file).unwrap();
    file.set_len(4096).unwrap();
    // It loads all of its slices now.
    cluster.publish(&["a", "b"], split(2)).await;
    assert_eq!(cluster.generate_all("b", &requests()).await, expected);
    let (_, page) = http_get(ops_address, "/metrics").await;
    for name in ["weights_reads_failed", "weights_bytes_received"] {
        let line = format!("tramontane_{name}_total ");
        let line = page.lines().find_map(|l| l.strip_prefix(&line)).unwrap();
        assert!(line.parse::<u64>().unwrap() > 0, "{name} {line}");
    }
    cluster.stop().await;
}
