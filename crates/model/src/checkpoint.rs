//! A checkpoint: configuration and the places of all tensors, checked against each other before use. Holds no
//! weights: they are read when they are to be packed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use tramontane_compute::{DType, WeightFormat};
use tramontane_types::{ExpertId, LayerId, ModelGeometry};

use crate::config::CONFIG_BYTES_MAX;
use crate::fingerprint::fingerprint;
use crate::names::{Global, InExpert, InLayer, Naming};
use crate::shard::{Form, Shard};
use crate::source::Source;
use crate::tensors::Entry;
use crate::{Error, ModelConfig, demo, gguf, manifest};

/// Largest `model.safetensors.index.json`.
const INDEX_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Most shards.
pub(crate) const SHARDS_MAX: usize = 4096;

/// Configuration and tensors of one model.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    config: ModelConfig,
    /// `config.json`; of a GGUF file what was read of its metadata.
    config_text: String,
    origin: Origin,
    shards: Arc<[Shard]>,
    /// Tensor name to shard.
    shard_of: BTreeMap<String, usize>,
    fingerprint: String,
    /// Who is asked for what cannot be read here.
    elsewhere: Option<Arc<dyn Source>>,
}

/// Where a checkpoint lies.
#[derive(Clone, Debug)]
pub(crate) enum Origin {
    /// With somebody else, at least in part.
    Elsewhere(Form),
    /// In this program.
    Embedded,
    /// Directory of `config.json` and safetensors.
    Directory(PathBuf),
    /// A GGUF file, the first of its parts.
    Gguf(PathBuf),
}

/// Things a user may say about a checkpoint that its files do not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Replaces the window of `config.json`: `Some(None)` sees all keys. Several fine-tunes of Mixtral
    /// carry a window that their base model no longer has.
    pub sliding_window: Option<Option<usize>>,
}

impl Checkpoint {
    /// Opens a directory with `config.json` and `model.safetensors` or an index and its shards, or a GGUF file.
    ///
    /// When the manifest lies there ([`Checkpoint::manifest_path`]), every file in it is read and compared.
    ///
    /// # Errors
    /// When a file is missing, damaged, or a tensor is not what the configuration asks for.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_with(path, Overrides::default())
    }

    /// [`Checkpoint::open`] with the user's overrides.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open_with(path: &Path, overrides: Overrides) -> Result<Self, Error> {
        if path.is_file() {
            return Self::open_gguf(path, overrides);
        }
        Self::open_directory(path, overrides)
    }

    fn open_gguf(path: &Path, overrides: Overrides) -> Result<Self, Error> {
        let shards = gguf::files::open(path)?;
        manifest::check(&manifest::path_of_file(path), &shards)?;
        let config = gguf::files::check(&shards)?;
        Self::assemble(Parts {
            config_text: format!("{config:?}"),
            config,
            origin: Origin::Gguf(path.to_owned()),
            shards,
            overrides,
            elsewhere: None,
        })
    }

    fn open_directory(directory: &Path, overrides: Overrides) -> Result<Self, Error> {
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
        manifest::check(&directory.join(manifest::FILE), &shards)?;
        Self::assemble(Parts {
            config,
            config_text,
            origin: Origin::Directory(directory.to_owned()),
            shards,
            overrides,
            elsewhere: None,
        })
    }

    /// The demo model that is built into the binary. Touches no disk.
    ///
    /// # Errors
    /// Never for the demo that was built in; its checks are those of any other checkpoint.
    pub fn from_embedded() -> Result<Self, Error> {
        let config = ModelConfig::parse(demo::CONFIG)?;
        Self::assemble(Parts {
            config,
            config_text: demo::CONFIG.to_owned(),
            origin: Origin::Embedded,
            shards: vec![Shard::embedded("model.safetensors", demo::WEIGHTS)?],
            overrides: Overrides::default(),
            elsewhere: None,
        })
    }

    /// Checks the parts against each other.
    pub(crate) fn assemble(parts: Parts) -> Result<Self, Error> {
        let Parts {
            mut config,
            config_text,
            origin,
            shards,
            overrides,
            elsewhere,
        } = parts;
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
        let fingerprint = fingerprint(&config_text, &config, &shards, elsewhere.as_deref())?;
        let checkpoint = Self {
            config,
            config_text,
            origin,
            shards: shards.into(),
            shard_of,
            fingerprint,
            elsewhere,
        };
        checkpoint.check_shapes()?;
        Ok(checkpoint)
    }

    /// The same checkpoint; what cannot be read here is asked of `elsewhere`.
    #[must_use]
    pub fn backed_by(&self, elsewhere: Arc<dyn Source>) -> Self {
        Self {
            elsewhere: Some(elsewhere),
            ..self.clone()
        }
    }

    /// Every tensor that the configuration asks for must be there with its shape.
    fn check_shapes(&self) -> Result<(), Error> {
        let (g, names) = (self.geometry(), self.naming());
        let (q_rows, kv_rows) = (g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        let mut wanted = vec![
            (InLayer::InputNorm, vec![g.hidden]),
            (InLayer::Q, vec![q_rows, g.hidden]),
            (InLayer::K, vec![kv_rows, g.hidden]),
            (InLayer::V, vec![kv_rows, g.hidden]),
            (InLayer::O, vec![g.hidden, q_rows]),
            (InLayer::PostNorm, vec![g.hidden]),
        ];
        // A Mixtral of one expert has a gate that decides nothing.
        if g.has_gate() {
            wanted.push((InLayer::Gate, vec![g.num_experts, g.hidden]));
        }
        for layer in 0..g.num_layers {
            for (tensor, shape) in &wanted {
                self.check_shape(&names.in_layer(layer, *tensor), shape)?;
            }
        }
        let table = [g.vocab, g.hidden];
        self.check_shape(names.global(Global::Embed), &table)?;
        if !self.config.tie_word_embeddings {
            self.check_shape(names.global(Global::LmHead), &table)?;
        }
        self.check_shape(names.global(Global::Norm), &[g.hidden])?;
        for (layer, expert) in self.expert_places() {
            let [w1, w2, w3] = self.expert_names(layer, expert)?;
            self.check_shape(&w1, &[g.ff, g.hidden])?;
            self.check_shape(&w2, &[g.hidden, g.ff])?;
            self.check_shape(&w3, &[g.ff, g.hidden])?;
        }
        Ok(())
    }

    fn check_shape(&self, name: &str, expected: &[usize]) -> Result<(), Error> {
        let (shard, entry) = self.find(name)?;
        if entry.shape == expected {
            return Ok(());
        }
        Err(Error::Shape {
            file: shard.name.clone(),
            tensor: name.to_owned(),
            expected: expected.to_vec(),
            got: entry.shape.clone(),
        })
    }

    /// Every expert of every layer.
    fn expert_places(&self) -> impl Iterator<Item = (LayerId, ExpertId)> {
        // In range: the configuration bounds both below 2^16.
        let (layers, experts) = (
            self.geometry().num_layers as u16,
            self.geometry().num_experts as u16,
        );
        let of_layer = move |layer| (0..experts).map(move |e| (LayerId(layer), ExpertId(e)));
        (0..layers).flat_map(of_layer)
    }

    pub(crate) fn naming(&self) -> Naming {
        match self.form() {
            Form::Safetensors => Naming::HuggingFace,
            Form::Gguf => Naming::Gguf,
        }
    }

    pub(crate) fn form(&self) -> Form {
        match &self.origin {
            Origin::Embedded | Origin::Directory(_) => Form::Safetensors,
            Origin::Gguf(_) => Form::Gguf,
            Origin::Elsewhere(form) => *form,
        }
    }

    pub(crate) fn config_text(&self) -> &str {
        &self.config_text
    }

    pub(crate) fn elsewhere(&self) -> Option<&dyn Source> {
        self.elsewhere.as_deref()
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

    /// Where the manifest of its files lies, if there is one: `tramontane.sha256` in a directory, `NAME.sha256`
    /// beside a GGUF file; `None` for the embedded demo, and for what others hold.
    #[must_use]
    pub fn manifest_path(&self) -> Option<PathBuf> {
        match &self.origin {
            Origin::Embedded | Origin::Elsewhere(_) => None,
            Origin::Directory(directory) => Some(directory.join(manifest::FILE)),
            Origin::Gguf(path) => Some(manifest::path_of_file(path)),
        }
    }

    /// What a GGUF file says beside its tensors, its tokenizer among it; `None` for safetensors.
    ///
    /// # Errors
    /// Never after the checkpoint was opened.
    pub fn metadata(&self) -> Result<Option<gguf::Metadata<'_>>, Error> {
        let (Naming::Gguf, Some(first)) = (self.naming(), self.shards.first()) else {
            return Ok(None);
        };
        let header = gguf::Header::read(&first.name, &first.header)?;
        Ok(Some(header.metadata))
    }

    /// The weight format that keeps what the files have: bf16 for safetensors. For GGUF files that of most of
    /// the experts' weights: q4 for `Q4_0`, `Q4_1` and `Q4_K`, q8 for `Q8_0`, `Q5_0`, `Q5_1`,
    /// `Q5_K` and `Q6_K`, else bf16.
    ///
    /// # Errors
    /// Never after the checkpoint was opened.
    pub fn weight_format(&self) -> Result<WeightFormat, Error> {
        let (mut q8, mut q4, mut all) = (0, 0, 0);
        for place in self.expert_places() {
            for name in self.expert_names(place.0, place.1)? {
                let (_, entry) = self.find(&name)?;
                let numbers = entry.shape.iter().fold(1, |n, d| n * *d as u64);
                all += numbers;
                match entry.dtype {
                    DType::Q4_0 | DType::Q4_1 | DType::Q4K => q4 += numbers,
                    DType::Q8_0 | DType::Q5_0 | DType::Q5_1 | DType::Q5K | DType::Q6K => {
                        q8 += numbers;
                    }
                    DType::F32 | DType::F16 | DType::Bf16 => {}
                }
            }
        }
        Ok(match all - q8 - q4 {
            bf16 if bf16 >= q8.max(q4) => WeightFormat::Bf16,
            _ if q8 >= q4 => WeightFormat::Q8,
            _ => WeightFormat::Q4,
        })
    }

    /// Short name of the content: configuration, headers, sizes, and a sample of each tensor. Two workers with
    /// different fingerprints do not read the same weights; equal fingerprints are no proof of every byte
    /// (that is what `tramontane.sha256` is for).
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// What w1, w2 and w3 of an expert are called.
    pub(crate) fn expert_names(
        &self,
        layer: LayerId,
        expert: ExpertId,
    ) -> Result<[String; 3], Error> {
        let g = self.geometry();
        for (what, limit, got) in [
            ("layer", g.num_layers, usize::from(layer.0)),
            ("expert", g.num_experts, usize::from(expert.0)),
        ] {
            if got >= limit {
                return Err(Error::OutOfRange { what, limit, got });
            }
        }
        let (names, architecture) = (self.naming(), self.config.architecture);
        let name = |tensor| names.in_expert(architecture, (layer, expert), tensor);
        Ok([InExpert::W1, InExpert::W2, InExpert::W3].map(name))
    }

    /// Where a tensor lies.
    pub(crate) fn find(&self, name: &str) -> Result<(&Shard, &Entry), Error> {
        let shard = self.shard_of.get(name).and_then(|&s| self.shards.get(s));
        let entry = shard.and_then(|shard| shard.tensors.get(name));
        shard.zip(entry).ok_or_else(|| Error::Missing {
            tensor: name.to_owned(),
            files: self
                .shards
                .iter()
                .map(|s| s.name.as_str())
                .collect::<Vec<_>>()
                .join(", "),
        })
    }
}

/// What a checkpoint is made of.
pub(crate) struct Parts {
    pub(crate) config: ModelConfig,
    pub(crate) config_text: String,
    pub(crate) origin: Origin,
    pub(crate) shards: Vec<Shard>,
    pub(crate) overrides: Overrides,
    pub(crate) elsewhere: Option<Arc<dyn Source>>,
}

fn open_shard(directory: &Path, name: &str) -> Result<Shard, Error> {
    Shard::open(Form::Safetensors, &directory.join(name), name)
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
pub(crate) fn is_plain_name(name: &str) -> bool {
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
