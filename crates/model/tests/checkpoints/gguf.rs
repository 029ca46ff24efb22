//! GGUF files compute what the safetensors they are made from compute, to the last bit.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;

use tempfile::TempDir;
use tramontane_compute::quant::{BLOCK, Q8Block, q8_weights};
use tramontane_compute::reference::ReferenceBackend;
use tramontane_compute::{Backend, ExpertWeights, HostTensor, WeightFormat};
use tramontane_compute_cpu::{CpuBackend, CpuConfig};
use tramontane_model::Checkpoint;
use tramontane_model::config::Architecture;
use tramontane_testkit::gguf::GgufFile;
use tramontane_testkit::tiny::TinyModel;
use tramontane_types::{ExpertId, LayerId, SegmentRange, TokenId};

use super::described::Other;
use super::driver::{Driver, Part, pages};

/// Types as GGUF numbers them.
const F32: u32 = 0;
const Q8_0: u32 = 8;
const BF16: u32 = 30;

/// How a checkpoint is written.
#[derive(Clone, Copy)]
struct Style {
    /// Type of the matrices that are multiplied.
    kind: u32,
    /// One tensor for all experts of a layer, as newer files have.
    merged: bool,
}

impl Style {
    fn bytes(self, tensor: &HostTensor<'_>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for row in 0..tensor.rows {
            match self.kind {
                Q8_0 => {
                    let mut values = vec![0.0; tensor.cols];
                    tensor.read_row(row, 0, &mut values);
                    for block in values.as_chunks::<BLOCK>().0 {
                        let Q8Block { q, scale } = q8_weights(block);
                        bytes.extend(scale.to_le_bytes());
                        bytes.extend(q.map(|q| q as u8));
                    }
                }
                _ => bytes.extend(tensor.row_bytes(row).unwrap()),
            }
        }
        bytes
    }
}

/// Queries or keys with the rows of each rotary pair beside each other.
fn interleaved(tensor: &HostTensor<'_>, bytes: &[u8], head_dim: usize) -> Vec<u8> {
    let len = bytes.len() / tensor.rows;
    let rows = (0..tensor.rows).map(|place| {
        let (head, i) = (place / head_dim, place % head_dim);
        head * head_dim + i / 2 + i % 2 * (head_dim / 2)
    });
    rows.flat_map(|row| bytes[row * len..][..len].to_vec())
        .collect()
}

fn metadata(checkpoint: &Checkpoint) -> GgufFile {
    let (g, config) = (checkpoint.geometry(), checkpoint.config());
    let file = GgufFile::default()
        .text("general.architecture", "llama")
        .u32("llama.block_count", g.num_layers as u32)
        .u32("llama.context_length", g.max_positions as u32)
        .u32("llama.embedding_length", g.hidden as u32)
        .u32("llama.feed_forward_length", g.ff as u32)
        .u32("llama.attention.head_count", g.num_heads as u32)
        .u32("llama.attention.head_count_kv", g.num_kv_heads as u32)
        .u32("llama.attention.key_length", g.head_dim as u32)
        .f32("llama.attention.layer_norm_rms_epsilon", g.rms_eps as f32)
        .f32("llama.rope.freq_base", g.rope_theta as f32)
        .u32("tokenizer.ggml.bos_token_id", config.bos_token_id.unwrap())
        .u32("tokenizer.ggml.eos_token_id", config.eos_token_ids[0]);
    match config.architecture {
        Architecture::MistralForCausalLM => file,
        Architecture::MixtralForCausalLM => file
            .u32("llama.expert_count", g.num_experts as u32)
            .u32("llama.expert_used_count", g.top_k as u32),
    }
}

fn converted(checkpoint: &Checkpoint, style: Style) -> GgufFile {
    let g = checkpoint.geometry();
    let attention = checkpoint.attention_weights().unwrap();
    let weights = attention.weights();
    let mut file = metadata(checkpoint);
    let mut add = |name: &str, tensor: &HostTensor<'_>, kind: u32, bytes: Vec<u8>| {
        let shape = [tensor.rows, tensor.cols];
        let shape = if tensor.rows == 1 {
            &shape[1..]
        } else {
            &shape
        };
        file = std::mem::take(&mut file).tensor(&format!("{name}.weight"), shape, kind, bytes);
    };
    let small = |tensor: &HostTensor<'_>| -> Vec<u8> {
        tensor
            .to_f32()
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect()
    };
    add("token_embd", &weights.embed, F32, small(&weights.embed));
    add("output_norm", &weights.norm, F32, small(&weights.norm));
    if !checkpoint.config().tie_word_embeddings {
        add(
            "output",
            &weights.lm_head,
            style.kind,
            style.bytes(&weights.lm_head),
        );
    }
    for (i, layer) in weights.layers.iter().enumerate() {
        let name = |part: &str| format!("blk.{i}.{part}");
        add(
            &name("attn_norm"),
            &layer.input_norm,
            F32,
            small(&layer.input_norm),
        );
        add(
            &name("ffn_norm"),
            &layer.post_norm,
            F32,
            small(&layer.post_norm),
        );
        for (part, tensor) in [("attn_q", &layer.q), ("attn_k", &layer.k)] {
            let bytes = interleaved(tensor, &style.bytes(tensor), g.head_dim);
            add(&name(part), tensor, style.kind, bytes);
        }
        for (part, tensor) in [("attn_v", &layer.v), ("attn_output", &layer.o)] {
            add(&name(part), tensor, style.kind, style.bytes(tensor));
        }
        if let Some(gate) = &layer.gate {
            add(&name("ffn_gate_inp"), gate, F32, small(gate));
        }
    }
    with_experts(checkpoint, style, file)
}

fn with_experts(checkpoint: &Checkpoint, style: Style, mut file: GgufFile) -> GgufFile {
    let g = checkpoint.geometry();
    for layer in 0..g.num_layers as u16 {
        let read = (0..g.num_experts as u16).map(|expert| {
            let (place, whole) = ((LayerId(layer), ExpertId(expert)), SegmentRange::WHOLE);
            checkpoint.expert_weights(place.0, place.1, whole).unwrap()
        });
        let read: Vec<_> = read.collect();
        let experts = read.iter().map(|expert| {
            let ExpertWeights { w1, w2, w3 } = expert.weights();
            [("gate", w1), ("down", w2), ("up", w3)]
        });
        let experts: Vec<_> = experts.collect();
        for part in 0..3 {
            let (name, first) = experts[0][part];
            let stem = format!("blk.{layer}.ffn_{name}");
            let bytes = |e: &[(&str, HostTensor<'_>); 3]| style.bytes(&e[part].1);
            let shape = [experts.len(), first.rows, first.cols];
            if !g.has_gate() {
                file = file.tensor(
                    &format!("{stem}.weight"),
                    &shape[1..],
                    style.kind,
                    bytes(&experts[0]),
                );
            } else if style.merged {
                let all = experts.iter().flat_map(bytes).collect();
                file = file.tensor(&format!("{stem}_exps.weight"), &shape, style.kind, all);
            } else {
                for (i, expert) in experts.iter().enumerate() {
                    let name = format!("{stem}.{i}.weight");
                    file = file.tensor(&name, &shape[1..], style.kind, bytes(expert));
                }
            }
        }
    }
    file
}

/// The safetensors checkpoint and the GGUF file made of it.
fn pair(model: &TinyModel, style: Style) -> (TempDir, Checkpoint, Checkpoint) {
    let folder = tempfile::tempdir().unwrap();
    model.write(folder.path()).unwrap();
    let safetensors = Checkpoint::open(folder.path()).unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, converted(&safetensors, style).bytes()).unwrap();
    let gguf = Checkpoint::open(Path::new(&path)).unwrap();
    (folder, safetensors, gguf)
}

fn logits(checkpoint: &Checkpoint, backend: &dyn Backend) -> Vec<u32> {
    let tokens: Vec<TokenId> = (0..20).map(|i| i * 7 % 97).collect();
    let part = Part {
        tokens: &tokens,
        begin: 0,
        pages: pages(0, tokens.len()),
    };
    let logits = Driver::new(checkpoint, backend, &[0, 3, 8]).step(&[part]);
    assert!(logits.iter().all(|x| x.is_finite()));
    logits.iter().map(|x| x.to_bits()).collect()
}

fn mixtral() -> TinyModel {
    let model = TinyModel::mixtral().experts(5).top_k(2).hidden(64).ff(288);
    model.heads(4, 2).head_dim(16)
}

#[test]
fn the_same_numbers_give_the_same_logits() {
    for (model, merged) in [
        (mixtral(), true),
        (mixtral(), false),
        (TinyModel::mistral().sliding_window(70), true),
    ] {
        let style = Style { kind: BF16, merged };
        let (_folder, safetensors, gguf) = pair(&model, style);
        let expected = safetensors.geometry();
        let mut geometry = gguf.geometry().clone();
        // Converters leave the window of a dense model out.
        geometry.sliding_window = expected.sliding_window;
        assert_eq!(geometry, *expected);
        let backend = ReferenceBackend::new(expected);
        assert_eq!(logits(&gguf, &backend), logits(&safetensors, &backend));
        assert_eq!(gguf.weight_format().unwrap(), WeightFormat::Bf16);
    }
}

#[test]
fn a_gguf_file_of_somebody_else_gives_the_same_logits() {
    for kind in [BF16, Q8_0] {
        let style = Style { kind, merged: true };
        let (_folder, _, gguf) = pair(&mixtral(), style);
        let other = Other::new(gguf.clone());
        let here = Checkpoint::open_described(&gguf.describe(), None, other).unwrap();
        assert_eq!(here.fingerprint(), gguf.fingerprint());
        assert!(here.metadata().unwrap().is_some());
        let backend = ReferenceBackend::new(gguf.geometry());
        assert_eq!(logits(&here, &backend), logits(&gguf, &backend));
    }
}

#[test]
fn blocks_of_the_file_are_the_blocks_that_are_made_at_load() {
    let style = Style {
        kind: Q8_0,
        merged: true,
    };
    let (_folder, safetensors, gguf) = pair(&mixtral(), style);
    assert_eq!(gguf.weight_format().unwrap(), WeightFormat::Q8);
    assert_eq!(safetensors.weight_format().unwrap(), WeightFormat::Bf16);
    let config = CpuConfig {
        threads: NonZeroUsize::MIN,
        isa: None,
    };
    let backend = CpuBackend::new(gguf.geometry(), WeightFormat::Q8, config).unwrap();
    assert_eq!(logits(&gguf, &backend), logits(&safetensors, &backend));
}
