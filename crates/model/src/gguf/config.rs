//! The configuration of a model in the metadata of its file. A key that would change the result and is not
//! known here is refused.
//!
//! Mixtral and Mistral files have the architecture `llama`. Keys and their defaults are those of the
//! public GGUF specification; numbers that decide a tensor's shape have no default but those derived there.

use tramontane_types::ModelGeometry;

use crate::config::{
    Architecture, DIMENSION_MAX, EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, ModelConfig,
};
use crate::{Error, gguf::Metadata};

/// The one architecture.
const ARCHITECTURE: &str = "llama";
/// Base of the rotary embedding of a file that does not say.
const ROPE_BASE_DEFAULT: f64 = 10_000.0;

/// Keys behind `llama.` that are read here, or say nothing that is computed.
const KEYS: [&str; 22] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "expert_count",
    "expert_feed_forward_length",
    "expert_used_count",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
];

/// What the tensors say that the metadata does not.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    /// Rows of the embedding.
    pub(crate) vocab: usize,
    /// There is no LM head.
    pub(crate) is_tied: bool,
}

/// Reads the configuration.
///
/// # Errors
/// Names the key, the rule and the value.
pub(crate) fn read(metadata: &Metadata<'_>, tables: Tables) -> Result<ModelConfig, Error> {
    let keys = Keys(metadata);
    let name = metadata.text("general.architecture")?;
    if name != Some(ARCHITECTURE) {
        let got = name.unwrap_or("nothing");
        let rule = "llama (the name of Mistral and Mixtral)";
        return Err(metadata.wrong("general.architecture", rule, &got));
    }
    refuse_unsupported(&keys)?;
    let architecture = match keys.num_experts()? {
        0 => Architecture::MistralForCausalLM,
        _ => Architecture::MixtralForCausalLM,
    };
    let geometry = geometry(&keys, tables)?;
    let id = |key: &str| {
        let id = metadata.whole(key)?;
        let id = id.map(|id| {
            let in_range = u32::try_from(id)
                .ok()
                .filter(|id| (*id as usize) < tables.vocab);
            let rule = format!("a token id below {}", tables.vocab);
            in_range.ok_or_else(|| metadata.wrong(key, &rule, &id))
        });
        id.transpose()
    };
    let mut eos_token_ids = Vec::new();
    eos_token_ids.extend(id("tokenizer.ggml.eos_token_id")?);
    let turn = id("tokenizer.ggml.eot_token_id")?;
    eos_token_ids.extend(turn.filter(|turn| !eos_token_ids.contains(turn)));
    Ok(ModelConfig {
        architecture,
        geometry,
        tie_word_embeddings: tables.is_tied,
        dtype: None,
        bos_token_id: id("tokenizer.ggml.bos_token_id")?,
        eos_token_ids,
    })
}

/// Everything that would change the result and is not computed here.
fn refuse_unsupported(keys: &Keys<'_>) -> Result<(), Error> {
    let own = keys.0.keys().filter_map(|key| {
        let own = key.strip_prefix(ARCHITECTURE)?.strip_prefix('.')?;
        Some((key, own))
    });
    for (key, own) in own {
        if !KEYS.contains(&own) {
            return Err(keys
                .0
                .wrong(key, "absent (it is not known here)", &"something"));
        }
    }
    let scaling = keys.0.text(&keys.name("rope.scaling.type"))?;
    if let Some(scaling) = scaling.filter(|kind| *kind != "none") {
        return Err(keys.wrong("rope.scaling.type", "none", &scaling));
    }
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        let factor = keys.0.number(&keys.name(key))?;
        if let Some(factor) = factor.filter(|factor| *factor != 1.0) {
            return Err(keys.wrong(key, "1", &factor));
        }
    }
    Ok(())
}

fn geometry(keys: &Keys<'_>, tables: Tables) -> Result<ModelGeometry, Error> {
    let hidden = keys.needed("embedding_length", DIMENSION_MAX)?;
    let num_heads = keys.needed("attention.head_count", HEADS_MAX)?;
    let num_kv_heads = keys
        .whole("attention.head_count_kv", HEADS_MAX)?
        .unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        let rule = format!("a divisor of the {num_heads} query heads");
        return Err(keys.wrong("attention.head_count_kv", &rule, &num_kv_heads));
    }
    let (num_experts, top_k) = experts(keys)?;
    let eps_key = keys.name("attention.layer_norm_rms_epsilon");
    let eps = keys.0.number(&eps_key)?.unwrap_or(0.0);
    if !(eps > 0.0 && eps < 1.0) {
        return Err(keys.0.wrong(&eps_key, "between 0 and 1", &eps));
    }
    let theta = keys
        .0
        .number(&keys.name("rope.freq_base"))?
        .unwrap_or(ROPE_BASE_DEFAULT);
    if !(theta.is_finite() && theta >= 1.0) {
        return Err(keys.wrong("rope.freq_base", "a number of at least 1", &theta));
    }
    let vocab = keys.whole("vocab_size", DIMENSION_MAX)?;
    if let Some(vocab) = vocab.filter(|vocab| *vocab != tables.vocab) {
        let rule = format!("{}, the rows of token_embd.weight", tables.vocab);
        return Err(keys.wrong("vocab_size", &rule, &vocab));
    }
    Ok(ModelGeometry {
        hidden,
        num_layers: keys.needed("block_count", LAYERS_MAX)?,
        num_heads,
        num_kv_heads,
        head_dim: head_dim(keys, hidden, num_heads)?,
        ff: feed_forward(keys)?,
        num_experts,
        top_k,
        vocab: tables.vocab,
        rope_theta: single_as_written(theta),
        rms_eps: single_as_written(eps),
        sliding_window: keys.window()?,
        max_positions: keys.needed("context_length", DIMENSION_MAX)?,
    })
}

/// Files have f32 where `config.json` has decimals: the shortest decimal that is that f32, such as 1e-5.
fn single_as_written(number: f64) -> f64 {
    let single = number as f32;
    if f64::from(single) != number {
        return number;
    }
    single.to_string().parse().unwrap_or(number)
}

fn head_dim(keys: &Keys<'_>, hidden: usize, num_heads: usize) -> Result<usize, Error> {
    let head_dim = match keys.whole("attention.key_length", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(num_heads) => hidden / num_heads,
        None => {
            let rule = format!("given, because {hidden} is no multiple of {num_heads} heads");
            return Err(keys.wrong("attention.key_length", &rule, &"nothing"));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.wrong("attention.key_length", "even (rotary pairs)", &head_dim));
    }
    for key in ["attention.value_length", "rope.dimension_count"] {
        let other = keys.whole(key, HEAD_DIM_MAX)?;
        if let Some(other) = other.filter(|other| *other != head_dim) {
            let rule = format!("{head_dim}, the width of a head");
            return Err(keys.wrong(key, &rule, &other));
        }
    }
    Ok(head_dim)
}

fn feed_forward(keys: &Keys<'_>) -> Result<usize, Error> {
    let ff = keys.needed("feed_forward_length", DIMENSION_MAX)?;
    let of_experts = keys.whole("expert_feed_forward_length", DIMENSION_MAX)?;
    if let Some(other) = of_experts.filter(|other| *other != ff) {
        let rule = format!("{ff}, the feed-forward length");
        return Err(keys.wrong("expert_feed_forward_length", &rule, &other));
    }
    Ok(ff)
}

/// Number of experts and how many are chosen; 0 or none of them is a dense model.
fn experts(keys: &Keys<'_>) -> Result<(usize, usize), Error> {
    if keys.num_experts()? == 0 {
        return Ok((1, 1));
    }
    let num_experts = keys.needed("expert_count", EXPERTS_MAX)?;
    let top_k = keys.needed("expert_used_count", EXPERTS_MAX)?;
    if top_k > num_experts {
        let rule = format!("at most the {num_experts} experts");
        return Err(keys.wrong("expert_used_count", &rule, &top_k));
    }
    Ok((num_experts, top_k))
}

/// The keys of the architecture.
struct Keys<'a>(&'a Metadata<'a>);

impl Keys<'_> {
    #[expect(clippy::unused_self, reason = "reads as what it is at every use")]
    fn name(&self, key: &str) -> String {
        format!("{ARCHITECTURE}.{key}")
    }

    /// A whole number from 1 to `max`.
    fn whole(&self, key: &str, max: u64) -> Result<Option<usize>, Error> {
        let number = self.0.whole(&self.name(key))?;
        let number = number.map(|n| {
            let in_range = (1..=max).contains(&n);
            let rule = format!("a whole number from 1 to {max}");
            // In range: at most `max`, far below 2^32.
            in_range
                .then_some(n as usize)
                .ok_or_else(|| self.wrong(key, &rule, &n))
        });
        number.transpose()
    }

    /// The same, and it must be there.
    fn needed(&self, key: &str, max: u64) -> Result<usize, Error> {
        let rule = format!("a whole number from 1 to {max}");
        self.whole(key, max)?
            .ok_or_else(|| self.wrong(key, &rule, &"nothing"))
    }

    /// 0 for a dense model.
    fn num_experts(&self) -> Result<u64, Error> {
        Ok(self.0.whole(&self.name("expert_count"))?.unwrap_or(0))
    }

    /// Keys a query sees; absent and 0 are all of them.
    fn window(&self) -> Result<Option<usize>, Error> {
        let key = "attention.sliding_window";
        match self.0.whole(&self.name(key))? {
            None | Some(0) => Ok(None),
            Some(_) => self.whole(key, DIMENSION_MAX),
        }
    }

    fn wrong(&self, key: &str, rule: &str, got: &dyn std::fmt::Display) -> Error {
        self.0.wrong(&self.name(key), rule, got)
    }
}
