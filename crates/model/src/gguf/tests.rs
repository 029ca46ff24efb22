//! Hostile files: every one is refused by name or read, none ends the program.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;
use tempfile::TempDir;
use tramontane_testkit::gguf::GgufFile;

use crate::Checkpoint;

const F32: u32 = 0;

/// A Mixtral of one layer and two experts, small enough to be opened thousands of times.
fn tiny() -> GgufFile {
    let zeros = |shape: &[usize]| vec![0; 4 * shape.iter().product::<usize>()];
    let mut file = GgufFile::default()
        .text("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .u32("llama.context_length", 64)
        .u32("llama.embedding_length", 8)
        .u32("llama.feed_forward_length", 8)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .f32("llama.rope.freq_base", 1e6)
        .u32("llama.expert_count", 2)
        .u32("llama.expert_used_count", 1)
        .texts("tokenizer.ggml.tokens", &["a", "b", "c", "d"])
        .i32s("tokenizer.ggml.token_type", &[1, 1, 1, 1]);
    for (name, shape) in [
        ("token_embd", &[4, 8][..]),
        ("blk.0.attn_norm", &[8]),
        ("blk.0.attn_q", &[8, 8]),
        ("blk.0.attn_k", &[4, 8]),
        ("blk.0.attn_v", &[4, 8]),
        ("blk.0.attn_output", &[8, 8]),
        ("blk.0.ffn_norm", &[8]),
        ("blk.0.ffn_gate_inp", &[2, 8]),
        ("blk.0.ffn_gate_exps", &[2, 8, 8]),
        ("blk.0.ffn_down_exps", &[2, 8, 8]),
        ("blk.0.ffn_up_exps", &[2, 8, 8]),
        ("output_norm", &[8]),
    ] {
        file = file.tensor(&format!("{name}.weight"), shape, F32, zeros(shape));
    }
    file
}

/// A folder with one file in it.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("x.gguf")
    }

    fn open(&self, bytes: &[u8]) -> Result<Checkpoint, crate::Error> {
        fs::write(self.path(), bytes).unwrap();
        let checkpoint = Checkpoint::open(&self.path())?;
        // What is opened can be read to the end.
        checkpoint.metadata()?;
        checkpoint.verify(&|_, _| {})?;
        Ok(checkpoint)
    }

    fn refused(&self, bytes: &[u8]) -> String {
        self.open(bytes).unwrap_err().to_string()
    }
}

#[test]
fn a_good_file_is_read() {
    let checkpoint = Place::new().open(&tiny().bytes()).unwrap();
    let g = checkpoint.geometry();
    assert_eq!((g.hidden, g.ff, g.head_dim, g.vocab), (8, 8, 4, 4));
    assert_eq!((g.num_experts, g.top_k, g.num_kv_heads), (2, 1, 1));
    assert_eq!((g.rms_eps, g.rope_theta), (1e-5, 1e6));
    assert!(checkpoint.config().tie_word_embeddings);
    let metadata = checkpoint.metadata().unwrap().unwrap();
    let tokens = metadata.texts("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.unwrap(), ["a", "b", "c", "d"]);
}

/// All that is read of a file that is not split, without a file.
fn parse(bytes: &[u8]) -> Result<(), crate::Error> {
    let header = super::Header::read("x.gguf", bytes)?;
    super::tensors::entries("x.gguf", &header, bytes.len())?;
    let tables = super::config::Tables {
        vocab: 4,
        is_tied: true,
    };
    super::config::read(&header.metadata, tables)?;
    for key in header.metadata.keys() {
        let _ = header.metadata.texts(key);
    }
    Ok(())
}

/// The class "files of models" of docs/security.md, CVE-2024-23605, CVE-2026-7482: counts and lengths that the file does not have.
#[test]
fn every_truncation_is_refused() {
    let (place, bytes) = (Place::new(), tiny().bytes());
    parse(&bytes).unwrap();
    for len in 0..bytes.len() {
        let error = parse(&bytes[..len]).unwrap_err().to_string();
        assert!(error.contains("x.gguf"), "{len}: {error}");
    }
    for len in (0..bytes.len()).step_by(211) {
        let error = place.refused(&bytes[..len]);
        assert!(error.contains("x.gguf"), "{len}: {error}");
    }
}

#[test]
fn no_flipped_bit_of_the_header_ends_the_program() {
    let file = tiny();
    let (header, mut bytes) = (file.header().len(), file.bytes());
    for at in 0..header {
        let before = bytes[at];
        for flip in [1, 2, 16, 128, 255] {
            bytes[at] ^= flip;
            let _ = parse(&bytes);
            bytes[at] = before;
        }
    }
}

/// Opens files that must be refused with these words.
fn check_refused(cases: &[(GgufFile, &str)]) {
    let place = Place::new();
    for (file, part) in cases {
        let error = place.refused(&file.bytes());
        assert!(
            error.contains(part) && error.contains("x.gguf"),
            "{error:?} does not say {part:?}"
        );
    }
}

#[test]
fn values_that_are_none_are_refused_by_name() {
    let huge = u64::MAX.to_le_bytes();
    let array = |kind: u32, len: u64| [&kind.to_le_bytes()[..], &len.to_le_bytes()].concat();
    let nested = |depth: usize| [array(9, 1).repeat(depth), array(4, 0)].concat();
    let x = |kind, bytes: &[u8]| tiny().raw("x", kind, bytes);
    check_refused(&[
        (x(8, &huge), "x has 18446744073709551615 bytes"),
        (x(9, &array(4, u64::MAX)), "number of elements of x"),
        (x(9, &array(8, 1 << 24)), "expected at most"),
        (x(9, &array(13, 1)), "type 13"),
        (x(9, &nested(4)), "arrays inside arrays"),
        (x(99, &[]), "type 99"),
        (x(7, &[2]), "boolean"),
        (tiny().u32("x", 1).u32("x", 1), "x is listed twice"),
    ]);
}

#[test]
fn models_that_are_not_computed_here_are_refused_by_key() {
    let with = |key: &str, value| tiny().u32(key, value);
    let llama = |key: &str, value| with(&format!("llama.{key}"), value);
    let scaled = tiny().text("llama.rope.scaling.type", "yarn");
    let window = tiny().text("llama.attention.sliding_window", "x");
    check_refused(&[
        (with("general.alignment", 12), "general.alignment must be"),
        (with("general.alignment", 0), "general.alignment must be"),
        (
            tiny().without("general.architecture"),
            "general.architecture",
        ),
        (
            tiny().without("llama.block_count"),
            "llama.block_count must be",
        ),
        (
            tiny().without("llama.expert_used_count"),
            "llama.expert_used_count",
        ),
        (llama("vocab_size", 5), "llama.vocab_size must be 4"),
        (llama("attention.key_length", 6), "attn_q"),
        (llama("attention.value_length", 2), "attention.value_length"),
        (llama("rope.dimension_count", 2), "rope.dimension_count"),
        (scaled, "llama.rope.scaling.type must be none"),
        (tiny().f32("llama.logit_scale", 2.0), "llama.logit_scale"),
        (window, "sliding_window must be a whole"),
        (with("tokenizer.ggml.eos_token_id", 4), "below 4"),
        (with("split.count", 0), "split.count"),
        (with("split.count", 2), "expected a name"),
    ]);
}

/// CVE-2025-53630, CVE-2026-27940, CVE-2026-33298: products and sums of sizes that overflow.
#[test]
fn tensors_that_do_not_fit_are_refused_by_name() {
    let tensor = |name: &str, shape: &[usize], kind| {
        let name = format!("{name}.weight");
        let file = tiny().without_tensor(&name);
        file.tensor(&name, shape, kind, vec![0; 4096])
    };
    let empty = |file: GgufFile, shape: &[usize]| file.tensor("output.weight", shape, F32, vec![]);
    let twice = empty(empty(tiny(), &[1]), &[1]);
    let alone = tiny().tensor("blk.0.ffn_up.1.weight", &[8, 8], F32, vec![0; 256]);
    // The first of these two has no data of its own.
    let overlapping = empty(tiny(), &[4, 8]).tensor("x.weight", &[8], F32, vec![0; 128]);
    check_refused(&[
        (
            tiny().without_tensor("output_norm.weight"),
            "output_norm.weight",
        ),
        (
            tiny().without_tensor("blk.0.ffn_up_exps.weight"),
            "blk.0.ffn_up.0.weight",
        ),
        (tensor("rope_freqs", &[8], F32), "rope_freqs.weight"),
        (tensor("blk.0.attn_norm", &[9], F32), "expected [8]"),
        (tensor("blk.0.attn_norm", &[0], F32), "expected no 0"),
        (tensor("blk.0.attn_q", &[8, 8], 10), "Q2_K"),
        (tensor("blk.0.attn_q", &[8, 8], 12), "multiple of 256"),
        (tensor("blk.0.attn_q", &[usize::MAX, 8], F32), "overflows"),
        (tensor("blk.0.attn_q", &[1 << 40, 8], F32), "truncated"),
        (
            tensor("blk.0.attn_q", &[1, 1, 1, 8, 8], F32),
            "5 dimensions",
        ),
        (
            tensor("blk.0.ffn_up_exps", &[2000, 1, 1], 1),
            "2000 experts",
        ),
        (twice, "listed twice"),
        (alone, "all experts"),
        (overlapping, "expected at least"),
    ]);
}

#[test]
fn files_of_another_kind_are_refused() {
    for (at, value, part) in [
        (0, *b"GGML", "expected \"GGUF\""),
        (4, 1_u32.to_le_bytes(), "version 1"),
        (4, 3_u32.to_be_bytes(), "big-endian"),
        (11, [255; 4], "number of tensors"),
        (19, [255; 4], "number of metadata entries"),
    ] {
        let mut bytes = tiny().bytes();
        bytes[at..at + 4].copy_from_slice(&value);
        let error = Place::new().refused(&bytes);
        assert!(error.contains(part), "{error:?} does not say {part:?}");
    }
}

#[test]
fn a_model_may_lie_in_several_files() {
    let folder = tempfile::tempdir().unwrap();
    let name = |part: u32| folder.path().join(format!("m-{part:05}-of-00002.gguf"));
    let split = |file: GgufFile, no: u32| file.u32("split.no", no).u32("split.count", 2);
    let first = split(tiny().without_tensor("output_norm.weight"), 0);
    let first = first.u32("split.tensors.count", 12);
    let second = GgufFile::default().tensor("output_norm.weight", &[8], F32, vec![0; 32]);
    fs::write(name(1), first.bytes()).unwrap();
    fs::write(name(2), split(second.clone(), 1).bytes()).unwrap();
    let checkpoint = Checkpoint::open(&name(1)).unwrap();
    assert_eq!(checkpoint.inspect().files.len(), 2);
    let error = Checkpoint::open(&name(2)).unwrap_err().to_string();
    assert!(error.contains("split.no must be 0, got 1"), "{error}");
    fs::write(name(2), split(second, 0).bytes()).unwrap();
    let error = Checkpoint::open(&name(1)).unwrap_err().to_string();
    assert!(error.contains("split.no must be 1, got 0"), "{error}");
    fs::write(name(1), first.u32("llama.vocab_size", 4).bytes()).unwrap();
    let empty = split(GgufFile::default(), 1);
    fs::write(name(2), empty.bytes()).unwrap();
    let error = Checkpoint::open(&name(1)).unwrap_err().to_string();
    assert!(error.contains("split.tensors.count is 12"), "{error}");
}

#[test]
fn a_manifest_lies_beside_the_file() {
    let place = Place::new();
    let bytes = tiny().bytes();
    let checkpoint = place.open(&bytes).unwrap();
    let report = checkpoint.verify(&|_, _| {}).unwrap();
    let manifest = checkpoint.manifest_path().unwrap();
    assert_eq!(manifest, place.0.path().join("x.gguf.sha256"));
    crate::manifest::write(&manifest, &report.digests).unwrap();
    place.open(&bytes).unwrap();
    let mut changed = bytes;
    if let Some(last) = changed.last_mut() {
        *last = 1;
    }
    let error = place.refused(&changed);
    assert!(error.contains("by x.gguf.sha256"), "{error}");
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = super::Header::read("x", &bytes);
        let mut framed = tiny().header();
        framed.truncate(24);
        framed.extend_from_slice(&bytes);
        let _ = super::Header::read("x", &framed);
    }

    #[test]
    fn no_patch_makes_it_panic(at in 0_usize..1200, patch in any::<u64>(), shift in 0_u32..64) {
        let mut bytes = tiny().bytes();
        let at = at.min(bytes.len() - 8);
        bytes[at..at + 8].copy_from_slice(&(patch >> shift).to_le_bytes());
        let _ = parse(&bytes);
    }
}
