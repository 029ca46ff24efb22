//! Tiny checkpoints with random weights, written as Hugging Face directories. Reads nothing back.
//!
//! The same description and seed give the same bytes on every machine.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use half::{bf16, f16};
use serde_json::{Map, Value, json};

/// Element types that checkpoints come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TinyDtype {
    /// binary32.
    F32,
    /// binary16.
    F16,
    /// bfloat16.
    Bf16,
}

impl TinyDtype {
    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::F32 => ("F32", "float32"),
            Self::F16 => ("F16", "float16"),
            Self::Bf16 => ("BF16", "bfloat16"),
        }
    }

    fn push(self, x: f32, bytes: &mut Vec<u8>) {
        match self {
            Self::F32 => bytes.extend_from_slice(&x.to_le_bytes()),
            Self::F16 => bytes.extend_from_slice(&f16::from_f32(x).to_le_bytes()),
            Self::Bf16 => bytes.extend_from_slice(&bf16::from_f32(x).to_le_bytes()),
        }
    }
}

/// What to write; every number may be changed.
///
/// ```
/// use tramontane_testkit::tiny::TinyModel;
/// let model = TinyModel::mixtral().experts(6).top_k(3).hidden(72).ff(100);
/// assert_eq!(model.head_dim_or_default(), 18);
/// ```
#[derive(Clone, Debug)]
pub struct TinyModel {
    /// `None`: a dense Mistral. `Some((experts, top_k))`: a Mixtral.
    moe: Option<(usize, usize)>,
    layers: usize,
    hidden: usize,
    ff: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: Option<usize>,
    vocab: usize,
    sliding_window: Option<usize>,
    max_positions: usize,
    tied: bool,
    dtype: TinyDtype,
    shards: usize,
    seed: u64,
}

impl TinyModel {
    /// A Mixtral of 8 experts, top-2: 2 layers, hidden 32, ff 64, 4 heads of 8, 2 key heads, 97 tokens.
    #[must_use]
    pub const fn mixtral() -> Self {
        Self {
            moe: Some((8, 2)),
            layers: 2,
            hidden: 32,
            ff: 64,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            vocab: 97,
            sliding_window: None,
            max_positions: 512,
            tied: false,
            dtype: TinyDtype::Bf16,
            shards: 1,
            seed: 1,
        }
    }

    /// The same shape without experts.
    #[must_use]
    pub const fn mistral() -> Self {
        Self {
            moe: None,
            ..Self::mixtral()
        }
    }

    /// Experts of each layer; makes it a Mixtral.
    #[must_use]
    pub fn experts(mut self, experts: usize) -> Self {
        let top_k = self.moe.map_or(2, |(_, top_k)| top_k);
        self.moe = Some((experts, top_k));
        self
    }

    /// Experts of each token; makes it a Mixtral.
    #[must_use]
    pub fn top_k(mut self, top_k: usize) -> Self {
        let experts = self.moe.map_or(8, |(experts, _)| experts);
        self.moe = Some((experts, top_k));
        self
    }

    /// Transformer layers.
    #[must_use]
    pub const fn layers(mut self, layers: usize) -> Self {
        self.layers = layers;
        self
    }

    /// Width of the residual stream.
    #[must_use]
    pub const fn hidden(mut self, hidden: usize) -> Self {
        self.hidden = hidden;
        self
    }

    /// Intermediate dimension.
    #[must_use]
    pub const fn ff(mut self, ff: usize) -> Self {
        self.ff = ff;
        self
    }

    /// Query heads and key heads.
    #[must_use]
    pub const fn heads(mut self, heads: usize, kv_heads: usize) -> Self {
        self.heads = heads;
        self.kv_heads = kv_heads;
        self
    }

    /// Width of a head; otherwise `hidden / heads`, and null in `config.json`.
    #[must_use]
    pub const fn head_dim(mut self, head_dim: usize) -> Self {
        self.head_dim = Some(head_dim);
        self
    }

    /// Tokens.
    #[must_use]
    pub const fn vocab(mut self, vocab: usize) -> Self {
        self.vocab = vocab;
        self
    }

    /// Keys that a query sees; otherwise all, and null in `config.json`.
    #[must_use]
    pub const fn sliding_window(mut self, window: usize) -> Self {
        self.sliding_window = Some(window);
        self
    }

    /// Longest sequence.
    #[must_use]
    pub const fn max_positions(mut self, positions: usize) -> Self {
        self.max_positions = positions;
        self
    }

    /// The LM head is the embedding.
    #[must_use]
    pub const fn tied(mut self) -> Self {
        self.tied = true;
        self
    }

    /// Element type of every tensor.
    #[must_use]
    pub const fn dtype(mut self, dtype: TinyDtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Number of files; more than one come with an index.
    #[must_use]
    pub const fn shards(mut self, shards: usize) -> Self {
        self.shards = shards;
        self
    }

    /// Other weights.
    #[must_use]
    pub const fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Width of a head.
    #[must_use]
    pub const fn head_dim_or_default(&self) -> usize {
        match self.head_dim {
            Some(head_dim) => head_dim,
            None => self.hidden / self.heads,
        }
    }

    /// Content of `config.json`.
    #[must_use]
    pub fn config(&self) -> Value {
        let (class, kind) = match self.moe {
            Some(_) => ("MixtralForCausalLM", "mixtral"),
            None => ("MistralForCausalLM", "mistral"),
        };
        let mut config = json!({
            "architectures": [class],
            "model_type": kind,
            "dtype": self.dtype.names().1,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.ff,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": self.tied,
            "bos_token_id": 1,
            "eos_token_id": 2,
        });
        if let Some((experts, top_k)) = self.moe {
            config["num_local_experts"] = json!(experts);
            config["num_experts_per_tok"] = json!(top_k);
        }
        config
    }

    /// Writes `config.json` and the tensors into a directory that exists.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn write(&self, directory: &Path) -> anyhow::Result<()> {
        let config = serde_json::to_vec_pretty(&self.config())?;
        write(&directory.join("config.json"), &config)?;
        let tensors = self.tensors();
        if self.shards <= 1 {
            let file = self.safetensors(&tensors);
            return write(&directory.join("model.safetensors"), &file);
        }
        let mut weight_map = Map::new();
        let per_shard = tensors.len().div_ceil(self.shards);
        for (shard, tensors) in tensors.chunks(per_shard).enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards);
            write(&directory.join(&name), &self.safetensors(tensors))?;
            let names = tensors.iter();
            weight_map.extend(names.map(|(tensor, _)| (tensor.clone(), json!(name))));
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        let path = directory.join("model.safetensors.index.json");
        write(&path, &serde_json::to_vec_pretty(&index)?)
    }

    /// Name and shape of every tensor.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (h, ff) = (self.hidden, self.ff);
        let head_dim = self.head_dim_or_default();
        let (q, kv) = (self.heads * head_dim, self.kv_heads * head_dim);
        let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab, h])];
        for layer in 0..self.layers {
            let mut add = |name: &str, shape: &[usize]| {
                tensors.push((
                    format!("model.layers.{layer}.{name}.weight"),
                    shape.to_vec(),
                ));
            };
            add("input_layernorm", &[h]);
            add("self_attn.q_proj", &[q, h]);
            add("self_attn.k_proj", &[kv, h]);
            add("self_attn.v_proj", &[kv, h]);
            add("self_attn.o_proj", &[h, q]);
            add("post_attention_layernorm", &[h]);
            let Some((experts, _)) = self.moe else {
                add("mlp.gate_proj", &[ff, h]);
                add("mlp.up_proj", &[ff, h]);
                add("mlp.down_proj", &[h, ff]);
                continue;
            };
            add("block_sparse_moe.gate", &[experts, h]);
            for expert in 0..experts {
                let prefix = format!("block_sparse_moe.experts.{expert}");
                add(&format!("{prefix}.w1"), &[ff, h]);
                add(&format!("{prefix}.w2"), &[h, ff]);
                add(&format!("{prefix}.w3"), &[ff, h]);
            }
        }
        tensors.push(("model.norm.weight".to_owned(), vec![h]));
        if !self.tied {
            tensors.push(("lm_head.weight".to_owned(), vec![self.vocab, h]));
        }
        tensors
    }

    /// One file with the given tensors.
    fn safetensors(&self, tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
        let mut header = Map::new();
        let mut data = Vec::new();
        for (name, shape) in tensors {
            let begin = data.len();
            self.fill(name, shape, &mut data);
            let entry = json!({
                "dtype": self.dtype.names().0,
                "shape": shape,
                "data_offsets": [begin, data.len()],
            });
            header.insert(name.clone(), entry);
        }
        let header = Value::Object(header).to_string();
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        file.extend_from_slice(&data);
        file
    }

    /// Norms around 1, an embedding around 1, matrices that keep the size of what they multiply.
    fn fill(&self, name: &str, shape: &[usize], data: &mut Vec<u8>) {
        let (center, spread) = match shape {
            [_] => (1.0, 0.2),
            [_, _] if name.contains("embed") => (0.0, 1.7),
            [.., cols] => (0.0, 2.5 / (*cols as f32).sqrt()),
            [] => (0.0, 1.0),
        };
        let mut state = name.bytes().fold(self.seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        });
        for _ in 0..shape.iter().product() {
            let uniform = (splitmix(&mut state) >> 40) as f32 / (1_u64 << 23) as f32 - 1.0;
            self.dtype.push(center + spread * uniform, data);
        }
    }
}

/// Next of a sequence of random numbers (Steele, Lea and Flood 2014).
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    fs::write(path, bytes).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn what_is_written_is_a_checkpoint() {
        let folder = tempfile::tempdir().unwrap();
        let model = TinyModel::mixtral().experts(3).top_k(2).shards(2);
        model.write(folder.path()).unwrap();
        let mut found = 0;
        for shard in ["model-00001-of-00002", "model-00002-of-00002"] {
            let bytes = fs::read(folder.path().join(format!("{shard}.safetensors"))).unwrap();
            found += SafeTensors::deserialize(&bytes).unwrap().len();
        }
        assert_eq!(found, model.tensors().len());
        assert_eq!(model.config()["num_experts_per_tok"], 2);
        let index = fs::read_to_string(folder.path().join("model.safetensors.index.json")).unwrap();
        assert!(index.contains("experts.2.w3"));
    }

    #[test]
    fn the_seed_decides_the_bytes() {
        let bytes = |seed| {
            let model = TinyModel::mistral().seed(seed);
            model.safetensors(&model.tensors())
        };
        assert_eq!(bytes(1), bytes(1));
        assert_ne!(bytes(1), bytes(2));
    }
}
