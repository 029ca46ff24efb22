//! Groups whose attention is of another numeric class than its experts: the same bits for any number of workers, any
//! placement and any carrier; experts in four bits beside attention in bf16, on a CPU or on an (emulated) GPU.

use tramontane_compute::{Backend, WeightFormat};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_coordination::{Part, Roles};
use tramontane_proto::v1;
use tramontane_types::SamplingParams;
use tramontane_worker::{MixedClass, RoleSet, WorkerConfig};

use crate::cluster::{
    Carrier, Cluster, Cuts, EXPERTS, Said, checkpoint, config, eventually, prompt, request, split,
};
use crate::island::{emulator, on_device};
use crate::roles::{ATTENTION, BOTH, EXPERTS as ONLY_EXPERTS};

/// The class of a CPU of this machine.
fn class_of(weights: WeightFormat) -> String {
    let cpu = CpuConfig {
        threads: std::num::NonZeroUsize::MIN,
        isa: None,
    };
    let backend = CpuBackend::new(checkpoint().geometry(), weights, cpu).unwrap();
    backend.numeric_class().to_owned()
}

fn part_of(class: &str, config: WorkerConfig, roles: Roles) -> WorkerConfig {
    WorkerConfig {
        numeric_class: Some(class.parse::<MixedClass>().unwrap()),
        roles: RoleSet(roles),
        ..config
    }
}

/// Short and long prompts, greedy and sampled, with the log probabilities of what is said.
fn requests() -> Vec<v1::GenerateSequenceRequest> {
    let one = |index: u32| {
        let params = SamplingParams {
            temperature: if index.is_multiple_of(2) { 0.0 } else { 0.8 },
            seed: u64::from(index),
            max_tokens: 6,
            ignore_eos: true,
            logprobs: Some(2),
            ..SamplingParams::default()
        };
        let ids = prompt(index, 1 + index as usize * 23);
        request(&format!("r{index}"), ids, &params)
    };
    (0..4).map(one).collect()
}

/// Slices of experts over some workers, those of the layers from `first_layer` on; the others are whole on worker 0.
fn cut(num_workers: usize, first_layer: usize, first_worker: usize) -> impl Fn(usize) -> Cuts {
    move |index| {
        if index < first_layer * EXPERTS {
            return vec![(0, 8, vec![0])];
        }
        let holder = |at: usize| (first_worker + (index + at) % num_workers) as u16;
        vec![(0, 3, vec![holder(0)]), (3, 8, vec![holder(1)])]
    }
}

/// What a group says whose attention is that of `attends`, with `num_experts` workers for the experts.
async fn said(
    class: &str,
    attends: &WorkerConfig,
    (carrier, num_experts): (Carrier, usize),
    layers: usize,
) -> Vec<Said> {
    let mut cluster = Cluster::new(carrier);
    let roles = if layers == 0 { ATTENTION } else { BOTH };
    cluster.start(part_of(class, attends.clone(), roles)).await;
    let mut holders = Vec::new();
    if layers > 0 {
        holders.push(attends.id.clone());
    }
    for n in 0..num_experts {
        let expert = config(&format!("e{n}"), WeightFormat::Q4);
        cluster.start(part_of(class, expert, ONLY_EXPERTS)).await;
        holders.push(format!("e{n}"));
    }
    let holders: Vec<&str> = holders.iter().map(String::as_str).collect();
    let first = holders.len() - num_experts;
    cluster
        .publish(&holders, cut(num_experts, layers, first))
        .await;
    let batch = cluster.generate_all(&attends.id, &requests()).await;
    for (index, expected) in batch.iter().enumerate() {
        let alone = &requests()[index..=index];
        let alone = cluster.generate_all(&attends.id, alone).await;
        assert_eq!(alone[0], *expected, "request {index} alone, {class}");
    }
    let asked = cluster.status("e0").await;
    assert!(asked.expert_segments_held > 0, "{class}");
    cluster.stop().await;
    batch
}

/// The same answers whatever the workers; returns them.
async fn same_everywhere(class: &str, attends: &WorkerConfig, layers: usize) -> Vec<Said> {
    let expected = said(class, attends, (Carrier::Local, 1), layers).await;
    assert!(expected.iter().all(|said| said.ids.len() == 6), "{class}");
    for clusters in [(Carrier::Local, 3), (Carrier::Grpc, 2)] {
        let got = said(class, attends, clusters, layers).await;
        assert_eq!(got, expected, "{class}, {clusters:?}");
    }
    expected
}

/// What an ordinary worker says.
async fn of_one_class(config: WorkerConfig) -> Vec<Said> {
    let (mut cluster, id) = (Cluster::new(Carrier::Local), config.id.clone());
    cluster.start(config).await;
    cluster.publish(&[&id], split(1)).await;
    let said = cluster.generate_all(&id, &requests()).await;
    cluster.stop().await;
    said
}

/// How far the log probabilities of the first greedy tokens are apart, at most.
fn apart(one: &[Said], other: &[Said]) -> f32 {
    let first = |said: &Said| {
        let (_, top) = &said.logprobs[0];
        top[0].1
    };
    let pairs = one.iter().zip(other);
    let apart = pairs.map(|(a, b)| (f32::from_bits(first(a)) - f32::from_bits(first(b))).abs());
    apart.fold(0.0, f32::max)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn experts_in_four_bits_beside_attention_in_bf16_have_the_same_bits_everywhere() {
    let (bf16, q4) = (class_of(WeightFormat::Bf16), class_of(WeightFormat::Q4));
    let attends = config("a", WeightFormat::Bf16);
    let all = same_everywhere(&format!("{bf16}+{q4}"), &attends, 0).await;
    let some = same_everywhere(&format!("{bf16}+{q4}@1"), &attends, 1).await;
    assert_ne!(all, some, "the first layer's experts are of another class");
    let bf16_only = of_one_class(attends).await;
    let q4_only = of_one_class(config("a", WeightFormat::Q4)).await;
    // What four bits cost, and no more: attention keeps its own.
    let usual = apart(&q4_only, &bf16_only);
    for (what, got) in [("all", &all), ("some", &some)] {
        let apart = apart(got, &bf16_only);
        assert!(
            apart > 0.0 && apart < 1.5 * usual,
            "{what}: {apart}, {usual}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gpu_attends_and_cpus_have_the_experts() {
    let device = emulator();
    tramontane_worker::device::provide(8, &device);
    let attends = on_device("gpu", 8);
    let q4 = class_of(WeightFormat::Q4);
    let all = same_everywhere(&format!("cuda-sm80-bf16+{q4}"), &attends, 0).await;
    let some = same_everywhere(&format!("cuda-sm80-bf16+{q4}@1"), &attends, 1).await;
    let on_cpus = format!("{}+{q4}", class_of(WeightFormat::Bf16));
    let attends = config("a", WeightFormat::Bf16);
    let near = said(&on_cpus, &attends, (Carrier::Local, 1), 0).await;
    let near_some = said(&format!("{on_cpus}@1"), &attends, (Carrier::Local, 1), 1).await;
    for (what, apart) in [
        ("all", apart(&all, &near)),
        ("some", apart(&some, &near_some)),
    ] {
        assert!(apart < 0.05, "{what}: {apart}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_says_what_it_can_do_in_its_group() {
    let (bf16, q4) = (class_of(WeightFormat::Bf16), class_of(WeightFormat::Q4));
    let class = format!("{bf16}+{q4}@1");
    let mut cluster = Cluster::new(Carrier::Local);
    let attends = config("a", WeightFormat::Bf16);
    cluster.start(part_of(&class, attends, BOTH)).await;
    let expert = config("e", WeightFormat::Q4);
    cluster.start(part_of(&class, expert, ONLY_EXPERTS)).await;
    for (id, attention, layers) in [("a", true, (0, 1)), ("e", false, (1, 2))] {
        let record = cluster.record(id).await.unwrap();
        let part = Part {
            attention,
            first_layer: layers.0,
            end_layer: layers.1,
        };
        assert_eq!((&record.numeric_class, record.part), (&class, Some(part)));
    }
    cluster.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slices_of_the_other_class_are_never_loaded() {
    let (bf16, q4) = (class_of(WeightFormat::Bf16), class_of(WeightFormat::Q4));
    let class = format!("{bf16}+{q4}@1");
    let mut cluster = Cluster::new(Carrier::Local);
    let attends = config("a", WeightFormat::Bf16);
    cluster.start(part_of(&class, attends, BOTH)).await;
    let expert = config("e", WeightFormat::Q4);
    cluster.start(part_of(&class, expert, ONLY_EXPERTS)).await;
    // Somebody who knows no parts: all layers on both. Then one who does.
    let wrong = cluster.placement(&["a", "e"], split(2)).await;
    cluster.put(&wrong).await;
    for id in ["a", "e"] {
        eventually("the first placement is seen", async || {
            cluster.status(id).await.epoch == wrong.epoch.0
        })
        .await;
    }
    cluster.publish(&["a", "e"], cut(1, 1, 1)).await;
    let held = [cluster.status("a").await, cluster.status("e").await];
    let held = held.map(|status| status.expert_segments_held);
    assert_eq!(
        held,
        [EXPERTS as u64 * 8; 2],
        "a layer each, and nothing of the first placement"
    );
    let answers = cluster.generate_all("a", &requests()).await;
    cluster.stop().await;
    let alone = config("a", WeightFormat::Bf16);
    assert_eq!(answers, said(&class, &alone, (Carrier::Local, 1), 1).await);
}
