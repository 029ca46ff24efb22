//! A checkpoint: configuration and tensors, memory-mapped, checked against each other before use.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use tramontane_compute::{AttentionLayerWeights, AttentionWeights, ExpertWeights, HostTensor};
use tramontane_types::{ExpertId, LayerId, ModelGeometry};

use crate::config::{Architecture, CONFIG_BYTES_MAX};
use crate::tensors::{Entry, read_header};
use crate::{Error, ModelConfig, demo, manifest};

/// Largest `model.safetensors.index.json`.
const INDEX_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most shards.
const SHARDS_MAX: usize = 4096;
/// Places of each file that the fingerprint samples.
const SAMPLES: usize = 4;
/// Bytes of each sample.
const SAMPLE_BYTES: usize = 4096;

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct Shard {
    /// File name without its directory.
    pub(crate) name: String,
    pub(crate) bytes: Bytes,
    pub(crate) tensors: BTreeMap<String, Entry>,
}

impl Shard {
    /// Bytes of the file.
    pub(crate) fn len(&self) -> u64 {
        self.bytes.get().len() as u64
    }
}

/// Content of a file: mapped, or built in.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    pub(crate) fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

/// Configuration and tensors of one model.
#[derive(Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    /// `None` for the embedded demo.
    directory: Option<PathBuf>,
    shards: Vec<Shard>,
    /// Tensor name to shard.
    shard_of: BTreeMap<String, usize>,
    fingerprint: String,
}

/// Things a user may say about a checkpoint that its files do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Replaces the window of `config.json`: `Some(None)` sees all keys. Several fine-tunes of Mixtral
    /// carry a window that their base model no longer has.
    pub sliding_window: Option<Option<usize>>,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and `model.safetensors` or an index and its shards.
    ///
    /// When `tramontane.sha256` lies there, every file in it is read and compared.
    ///
    /// # Errors
    /// When a file is missing, damaged, or a tensor is not what `config.json` asks for.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        Self::open_with(directory, Overrides::default())
    }

    /// [`Checkpoint::open`] with the user's overrides.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(directory: &Path, overrides: Overrides) -> Result<Self, Error> {
        let config_text = read_text(&directory.join("config.json"), CONFIG_BYTES_MAX)?;
        let config = ModelConfig::parse(&config_text)?;
        let mut shards = Vec::new();
        let index = directory.join("model.safetensors.index.json");
        // As transformers does: a single file goes before an index.
        let single = directory.join("model.safetensors").is_file();
        if index.is_file() && !single {
            let files = shards_of_index(&read_text(&index, INDEX_BYTES_MAX)?)?;
            for (file, listed) in files {
                let shard = open_shard(directory, &file)?;
                if let Some(tensor) = listed.iter().find(|t| !shard.tensors.contains_key(*t)) {
                    let what =
                        "is not here, though model.safetensors.index.json says so".to_owned();
                    return Err(Error::Tensor {
                        file,
                        tensor: tensor.clone(),
                        what,
                    });
                }
                shards.push(shard);
            }
        } else {
            shards.push(open_shard(directory, "model.safetensors")?);
        }
        manifest::check(directory, &shards)?;
        Self::assemble(
            config,
            &config_text,
            Some(directory.to_owned()),
            shards,
            overrides,
        )
    }

    /// The demo model that is built into the binary. Touches no disk.
    ///
    /// # Errors
    /// Never for the demo that was built in; its checks are those of any other checkpoint.
    pub fn from_embedded() -> Result<Self, Error> {
        let config = ModelConfig::parse(demo::CONFIG)?;
        let name = "model.safetensors".to_owned();
        let tensors = read_header(&name, demo::WEIGHTS)?;
        let shards = vec![Shard {
            name,
            bytes: Bytes::Embedded(demo::WEIGHTS),
            tensors,
        }];
        Self::assemble(config, demo::CONFIG, None, shards, Overrides::default())
    }

    fn assemble(
        mut config: ModelConfig,
        config_text: &str,
        directory: Option<PathBuf>,
        shards: Vec<Shard>,
        overrides: Overrides,
    ) -> Result<Self, Error> {
        if let Some(window) = overrides.sliding_window {
            config.geometry.sliding_window = window;
        }
        let mut shard_of = BTreeMap::new();
        for (index, shard) in shards.iter().enumerate() {
            for name in shard.tensors.keys() {
                if let Some(first) = shard_of.insert(name.clone(), index) {
                    let what = format!("is also in {}", shards[first].name);
                    return Err(Error::Tensor {
                        file: shard.name.clone(),
                        tensor: name.clone(),
                        what,
                    });
                }
            }
        }
        let fingerprint = fingerprint(config_text, &config, &shards);
        let checkpoint = Self {
            config,
            directory,
            shards,
            shard_of,
            fingerprint,
        };
        checkpoint.check_shapes()?;
        Ok(checkpoint)
    }

    /// Every tensor that the configuration asks for must be there with its shape.
    fn check_shapes(&self) -> Result<(), Error> {
        self.attention_weights()?;
        let geometry = self.geometry();
        for layer in 0..geometry.num_layers {
            for expert in 0..geometry.num_experts {
                // In range: the configuration bounds both below 2^16.
                self.expert_weights(LayerId(layer as u16), ExpertId(expert as u16))?;
            }
        }
        Ok(())
    }

    /// The model's shape.
    #[must_use]
    pub fn geometry(&self) -> &ModelGeometry {
        &self.config.geometry
    }

    /// The checked configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it lies; `None` for the embedded demo.
    #[must_use]
    pub fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Short name of the content: configuration, headers, sizes and samples of each file. Two workers with
    /// different fingerprints do not read the same weights; equal fingerprints are no proof of every byte
    /// (that is what `tramontane.sha256` is for).
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// Everything but the experts.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn attention_weights(&self) -> Result<AttentionWeights<'_>, Error> {
        let g = self.geometry();
        let (q_rows, kv_rows) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        let mut layers = Vec::with_capacity(g.num_layers);
        for layer in 0..g.num_layers {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}.weight");
            layers.push(AttentionLayerWeights {
                input_norm: self.vector(&name("input_layernorm"), g.hidden)?,
                q: self.matrix(&name("self_attn.q_proj"), q_rows, g.hidden)?,
                k: self.matrix(&name("self_attn.k_proj"), kv_rows, g.hidden)?,
                v: self.matrix(&name("self_attn.v_proj"), kv_rows, g.hidden)?,
                o: self.matrix(&name("self_attn.o_proj"), g.hidden, q_rows)?,
                post_norm: self.vector(&name("post_attention_layernorm"), g.hidden)?,
                // A Mixtral of one expert has a gate that decides nothing.
                gate: match g.has_gate() {
                    true => Some(self.matrix(
                        &name("block_sparse_moe.gate"),
                        g.num_experts,
                        g.hidden,
                    )?),
                    false => None,
                },
            });
        }
        let embed = self.matrix("model.embed_tokens.weight", g.vocab, g.hidden)?;
        let lm_head = match self.config.tie_word_embeddings {
            true => embed,
            false => self.matrix("lm_head.weight", g.vocab, g.hidden)?,
        };
        let norm = self.vector("model.norm.weight", g.hidden)?;
        Ok(AttentionWeights {
            embed,
            layers,
            norm,
            lm_head,
        })
    }

    /// The matrices of one expert; of the feed-forward block for expert 0 of a dense model.
    ///
    /// # Errors
    /// When the expert does not exist, or a tensor is missing or has another shape.
    pub fn expert_weights(
        &self,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<ExpertWeights<'_>, Error> {
        let g = self.geometry();
        for (what, limit, got) in [
            ("layer", g.num_layers, usize::from(layer.0)),
            ("expert", g.num_experts, usize::from(expert.0)),
        ] {
            if got >= limit {
                return Err(Error::OutOfRange { what, limit, got });
            }
        }
        let (prefix, [w1, w2, w3]) = match self.config.architecture {
            Architecture::MixtralForCausalLM => (
                format!("model.layers.{layer}.block_sparse_moe.experts.{expert}"),
                ["w1", "w2", "w3"],
            ),
            Architecture::MistralForCausalLM => (
                format!("model.layers.{layer}.mlp"),
                ["gate_proj", "down_proj", "up_proj"],
            ),
        };
        Ok(ExpertWeights {
            w1: self.matrix(&format!("{prefix}.{w1}.weight"), g.ff, g.hidden)?,
            w2: self.matrix(&format!("{prefix}.{w2}.weight"), g.hidden, g.ff)?,
            w3: self.matrix(&format!("{prefix}.{w3}.weight"), g.ff, g.hidden)?,
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<HostTensor<'_>, Error> {
        self.tensor(name, &[len]).map(|(entry, data)| HostTensor {
            dtype: entry.dtype,
            rows: 1,
            cols: len,
            data,
        })
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<HostTensor<'_>, Error> {
        self.tensor(name, &[rows, cols])
            .map(|(entry, data)| HostTensor {
                dtype: entry.dtype,
                rows,
                cols,
                data,
            })
    }

    fn tensor(&self, name: &str, expected: &[usize]) -> Result<(&Entry, &[u8]), Error> {
        let missing = || Error::Missing {
            tensor: name.to_owned(),
            files: self
                .shards
                .iter()
                .map(|s| s.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        };
        let shard = self
            .shard_of
            .get(name)
            .and_then(|&s| self.shards.get(s))
            .ok_or_else(missing)?;
        let entry = shard.tensors.get(name).ok_or_else(missing)?;
        if entry.shape != expected {
            return Err(Error::Shape {
                file: shard.name.clone(),
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                got: entry.shape.clone(),
            });
        }
        // In range: `read_header` compared every offset with the file's length.
        let data = shard
            .bytes
            .get()
            .get(entry.begin..entry.end)
            .ok_or_else(missing)?;
        Ok((entry, data))
    }
}

fn open_shard(directory: &Path, name: &str) -> Result<Shard, Error> {
    let path = directory.join(name);
    let read = |source| Error::Read {
        file: path.display().to_string(),
        source,
    };
    let file = File::open(&path).map_err(read)?;
    #[expect(
        unsafe_code,
        reason = "the one memory map: weights are larger than memory may be"
    )]
    // SAFETY: the map is only read. A process that truncates a checkpoint while it is served ends this one
    // with SIGBUS, as it would any program that maps its input; README and docs say not to.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read)?;
    let tensors = read_header(name, &map)?;
    Ok(Shard {
        name: name.to_owned(),
        bytes: Bytes::Mapped(map),
        tensors,
    })
}

/// Shard file to the tensors that the index places there.
fn shards_of_index(text: &str) -> Result<BTreeMap<String, Vec<String>>, Error> {
    let file = "model.safetensors.index.json";
    let wrong = |what: String| Error::File {
        file: file.to_owned(),
        what,
    };
    let index: Value = serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?;
    let map = index["weight_map"]
        .as_object()
        .ok_or_else(|| wrong("has no weight_map".to_owned()))?;
    let mut files: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (tensor, shard) in map {
        let Some(shard) = shard.as_str().filter(|s| is_plain_name(s)) else {
            return Err(wrong(format!(
                "tensor {tensor} is in {shard}, expected a file name in this directory"
            )));
        };
        files
            .entry(shard.to_owned())
            .or_default()
            .push(tensor.clone());
    }
    if files.is_empty() || files.len() > SHARDS_MAX {
        return Err(wrong(format!(
            "lists {} files, expected 1 to {SHARDS_MAX}",
            files.len()
        )));
    }
    Ok(files)
}

/// A name without directories: an index cannot point elsewhere.
fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!(
        (parts.next(), parts.next()),
        (Some(Component::Normal(_)), None)
    ) && !name.contains('\\')
}

pub(crate) fn read_text(path: &Path, bytes_max: u64) -> Result<String, Error> {
    let file = || path.display().to_string();
    let read = |source| Error::Read {
        file: file(),
        source,
    };
    let wrong = |what: String| Error::File { file: file(), what };
    // A pipe or a device has no length and no end.
    if !std::fs::metadata(path).map_err(read)?.is_file() {
        return Err(wrong("is no regular file".to_owned()));
    }
    let mut text = String::new();
    let opened = File::open(path).map_err(read)?;
    let got = opened
        .take(bytes_max + 1)
        .read_to_string(&mut text)
        .map_err(read)?;
    if got as u64 > bytes_max {
        return Err(wrong(format!("has more than {bytes_max} bytes")));
    }
    Ok(text)
}

fn fingerprint(config_text: &str, config: &ModelConfig, shards: &[Shard]) -> String {
    let mut hash = Sha256::new();
    hash.update(config_text);
    // The window is part of what is computed and may be overridden.
    hash.update(format!("{:?}", config.geometry.sliding_window));
    for shard in shards {
        let bytes = shard.bytes.get();
        hash.update(format!(
            "{} {} {:?}",
            shard.name,
            bytes.len(),
            shard.tensors
        ));
        for sample in 0..SAMPLES {
            let begin = bytes.len() / SAMPLES * sample + bytes.len() / (2 * SAMPLES);
            hash.update(&bytes[begin.min(bytes.len())..(begin + SAMPLE_BYTES).min(bytes.len())]);
        }
    }
    hash.finalize()[..8]
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect()
}
