//! `config.json` as published, and what it means: the defaults differ by model type and by age of the file.
//!
//! Source of every default: transformers 5 (`MistralConfig`, `MixtralConfig`). A field that is absent
//! takes its default; a field that is `null` is none, where none is allowed. Numbers that decide a
//! tensor's shape have no default here: a checkpoint that leaves them out is refused.

use std::fmt::Display;

use serde_json::{Map, Value};
use tramontane_types::ModelGeometry;

use crate::Error;

/// Largest `config.json` that is read.
pub const CONFIG_BYTES_MAX: u64 = 1024 * 1024;
/// Largest value of any dimension: keeps every product of two within 64 bits.
pub(crate) const DIMENSION_MAX: u64 = 1 << 24;
/// Most layers; the placement counts them in 16 bits.
pub(crate) const LAYERS_MAX: u64 = 1024;
/// Most experts per layer.
pub(crate) const EXPERTS_MAX: u64 = 1024;
/// Most attention heads.
pub(crate) const HEADS_MAX: u64 = 4096;
/// Widest attention head.
pub(crate) const HEAD_DIM_MAX: u64 = 4096;
/// Key and value heads of a file that does not say.
const KV_HEADS_DEFAULT: u64 = 8;
/// Window of a `mistral` file that does not say.
const MISTRAL_WINDOW_DEFAULT: u64 = 4096;
/// Positions of a file that does not say.
const POSITIONS_DEFAULT: u64 = 131_072;

/// The two architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Architecture {
    /// Dense.
    MistralForCausalLM,
    /// Mixture of experts.
    MixtralForCausalLM,
}

/// A checked configuration.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ModelConfig {
    /// Which of the two architectures.
    pub architecture: Architecture,
    /// The shape.
    pub geometry: ModelGeometry,
    /// The LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Element type that the file announces, if it does.
    pub dtype: Option<String>,
    /// Beginning of sequence.
    pub bos_token_id: Option<u32>,
    /// Ends of sequence.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// When it is not JSON, a field breaks its rule, or the model needs something that is not offered.
    pub fn parse(text: &str) -> Result<Self, Error> {
        let json = serde_json::from_str(text).map_err(|e| Error::File {
            file: "config.json".to_owned(),
            what: e.to_string(),
        })?;
        let fields = Fields(json);
        let architecture = architecture(&fields)?;
        refuse_unsupported(&fields)?;
        let geometry = geometry(&fields, architecture)?;
        let tied = fields.flag("tie_word_embeddings")?;
        let dtype = fields.text("dtype")?.or(fields.text("torch_dtype")?);
        Ok(Self {
            architecture,
            geometry,
            // Both classes default to untied heads.
            tie_word_embeddings: tied.unwrap_or(false),
            dtype: dtype.map(str::to_owned),
            bos_token_id: fields.ids("bos_token_id", 1)?.first().copied(),
            eos_token_ids: fields.ids("eos_token_id", 2)?,
        })
    }
}

fn architecture(fields: &Fields) -> Result<Architecture, Error> {
    let (mixtral, mistral) = (
        Architecture::MixtralForCausalLM,
        Architecture::MistralForCausalLM,
    );
    let rule = "MixtralForCausalLM or MistralForCausalLM";
    if let Field::Given(names) = fields.get("architectures")
        && names != &Value::Array(Vec::new())
    {
        return match names[0].as_str() {
            Some("MixtralForCausalLM") => Ok(mixtral),
            Some("MistralForCausalLM") => Ok(mistral),
            _ => Err(invalid("architectures", rule, &names)),
        };
    }
    match fields.text("model_type")? {
        Some("mixtral") => Ok(mixtral),
        Some("mistral") => Ok(mistral),
        other => Err(invalid(
            "model_type",
            "mixtral or mistral",
            &other.unwrap_or("nothing"),
        )),
    }
}

/// Everything that would change the result and is not computed here.
fn refuse_unsupported(fields: &Fields) -> Result<(), Error> {
    if let Some(act) = fields.text("hidden_act")?.filter(|a| *a != "silu") {
        return Err(invalid("hidden_act", "silu", &act));
    }
    if fields.flag("attention_bias")? == Some(true) {
        return Err(invalid("attention_bias", "false", &"true"));
    }
    if let Field::Given(scheme) = fields.get("quantization_config") {
        let method = scheme["quant_method"].as_str();
        let rule = "absent (weights as bf16, f16 or f32)";
        return Err(invalid(
            "quantization_config",
            rule,
            &method.unwrap_or("an unnamed method"),
        ));
    }
    for field in ["rope_parameters", "rope_scaling"] {
        let Field::Given(rope) = fields.get(field) else {
            continue;
        };
        let kind = rope.get("rope_type").or_else(|| rope.get("type"));
        if let Some(kind) = kind.filter(|k| k.as_str() != Some("default")) {
            return Err(invalid(field, "of rope_type default", &kind));
        }
        // One set for each kind of layer: not these two architectures.
        if !rope.is_object()
            || rope
                .as_object()
                .is_some_and(|r| r.values().any(Value::is_object))
        {
            return Err(invalid(field, "one set of numbers", &rope));
        }
        let part = rope.get("partial_rotary_factor");
        if let Some(part) = part.filter(|p| p.as_f64() != Some(1.0)) {
            return Err(invalid("partial_rotary_factor", "1", &part));
        }
    }
    Ok(())
}

fn geometry(fields: &Fields, architecture: Architecture) -> Result<ModelGeometry, Error> {
    let mixtral = architecture == Architecture::MixtralForCausalLM;
    let hidden = fields.whole("hidden_size", DIMENSION_MAX)?;
    let num_heads = fields.whole("num_attention_heads", HEADS_MAX)?;
    let num_kv_heads = match fields.get("num_key_value_heads") {
        Field::Null => num_heads,
        _ => fields.whole_or("num_key_value_heads", HEADS_MAX, KV_HEADS_DEFAULT)?,
    };
    if !num_heads.is_multiple_of(num_kv_heads) {
        let rule = format!("a divisor of num_attention_heads ({num_heads})");
        return Err(invalid("num_key_value_heads", &rule, &num_kv_heads));
    }
    let (num_experts, top_k) = if mixtral { experts(fields)? } else { (1, 1) };
    let eps = fields.number_or("rms_norm_eps", if mixtral { 1e-5 } else { 1e-6 })?;
    if !(eps > 0.0 && eps < 1.0) {
        return Err(invalid("rms_norm_eps", "between 0 and 1", &eps));
    }
    Ok(ModelGeometry {
        hidden,
        num_layers: fields.whole("num_hidden_layers", LAYERS_MAX)?,
        num_heads,
        num_kv_heads,
        head_dim: head_dim(fields, hidden, num_heads)?,
        ff: fields.whole("intermediate_size", DIMENSION_MAX)?,
        num_experts,
        top_k,
        vocab: fields.whole("vocab_size", DIMENSION_MAX)?,
        rope_theta: rope_theta(fields, mixtral)?,
        rms_eps: eps,
        sliding_window: sliding_window(fields, mixtral)?,
        max_positions: fields.whole_or(
            "max_position_embeddings",
            DIMENSION_MAX,
            POSITIONS_DEFAULT,
        )?,
    })
}

/// Null or absent: `hidden_size / num_attention_heads`.
fn head_dim(fields: &Fields, hidden: usize, num_heads: usize) -> Result<usize, Error> {
    let head_dim = match fields.get("head_dim") {
        Field::Given(_) => fields.whole("head_dim", HEAD_DIM_MAX)?,
        _ if hidden.is_multiple_of(num_heads) => hidden / num_heads,
        _ => {
            let rule =
                format!("given, because hidden_size {hidden} is no multiple of {num_heads} heads");
            return Err(invalid("head_dim", &rule, &"nothing"));
        }
    };
    if !head_dim.is_multiple_of(2) {
        return Err(invalid("head_dim", "even (rotary pairs)", &head_dim));
    }
    Ok(head_dim)
}

fn experts(fields: &Fields) -> Result<(usize, usize), Error> {
    let num_experts = fields.whole_or("num_local_experts", EXPERTS_MAX, 8)?;
    let top_k = fields.whole_or("num_experts_per_tok", EXPERTS_MAX, 2)?;
    if top_k > num_experts {
        let rule = format!("at most num_local_experts ({num_experts})");
        return Err(invalid("num_experts_per_tok", &rule, &top_k));
    }
    Ok((num_experts, top_k))
}

/// New files nest it in `rope_parameters`, old ones have it at the top.
fn rope_theta(fields: &Fields, mixtral: bool) -> Result<f64, Error> {
    let nested = match fields.get("rope_parameters") {
        Field::Given(Value::Object(rope)) => Fields(rope.clone()),
        _ => Fields(Map::new()),
    };
    let default = fields.number_or("rope_theta", if mixtral { 1e6 } else { 1e4 })?;
    let theta = nested.number_or("rope_theta", default)?;
    if !(theta.is_finite() && theta >= 1.0) {
        return Err(invalid("rope_theta", "a number of at least 1", &theta));
    }
    Ok(theta)
}

/// Absent: 4096 for `mistral`, none for `mixtral`. Null: none.
fn sliding_window(fields: &Fields, mixtral: bool) -> Result<Option<usize>, Error> {
    match fields.get("sliding_window") {
        Field::Null => Ok(None),
        Field::Absent if mixtral => Ok(None),
        _ => fields
            .whole_or("sliding_window", DIMENSION_MAX, MISTRAL_WINDOW_DEFAULT)
            .map(Some),
    }
}

/// The file as it is: absent, null and a value are three different things.
struct Fields(Map<String, Value>);

enum Field<'a> {
    Absent,
    Null,
    Given(&'a Value),
}

impl Fields {
    fn get(&self, name: &str) -> Field<'_> {
        match self.0.get(name) {
            None => Field::Absent,
            Some(Value::Null) => Field::Null,
            Some(value) => Field::Given(value),
        }
    }

    /// A whole number from 1 to `max`.
    fn whole(&self, name: &'static str, max: u64) -> Result<usize, Error> {
        let rule = format!("a whole number from 1 to {max}");
        match self.get(name) {
            Field::Absent => Err(invalid(name, &rule, &"nothing")),
            Field::Null => Err(invalid(name, &rule, &"null")),
            Field::Given(value) => match value.as_u64() {
                // In range: at most `max`, far below 2^32.
                Some(n) if (1..=max).contains(&n) => Ok(n as usize),
                _ => Err(invalid(name, &rule, &value)),
            },
        }
    }

    /// As [`Fields::whole`], with the default of an absent field.
    fn whole_or(&self, name: &'static str, max: u64, default: u64) -> Result<usize, Error> {
        match self.get(name) {
            Field::Absent => Ok(default as usize),
            _ => self.whole(name, max),
        }
    }

    fn number_or(&self, name: &'static str, default: f64) -> Result<f64, Error> {
        match self.get(name) {
            Field::Absent => Ok(default),
            Field::Null => Err(invalid(name, "a number", &"null")),
            Field::Given(value) => value
                .as_f64()
                .ok_or_else(|| invalid(name, "a number", &value)),
        }
    }

    fn flag(&self, name: &'static str) -> Result<Option<bool>, Error> {
        match self.get(name) {
            Field::Absent | Field::Null => Ok(None),
            Field::Given(Value::Bool(flag)) => Ok(Some(*flag)),
            Field::Given(other) => Err(invalid(name, "true or false", &other)),
        }
    }

    fn text(&self, name: &'static str) -> Result<Option<&str>, Error> {
        match self.get(name) {
            Field::Absent | Field::Null => Ok(None),
            Field::Given(Value::String(text)) => Ok(Some(text)),
            Field::Given(other) => Err(invalid(name, "a string", &other)),
        }
    }

    /// One token id or a list of them; null is none.
    fn ids(&self, name: &'static str, default: u32) -> Result<Vec<u32>, Error> {
        let id = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| invalid(name, "a token id, a list of them, or null", &value))
        };
        match self.get(name) {
            Field::Absent => Ok(vec![default]),
            Field::Null => Ok(Vec::new()),
            Field::Given(Value::Array(list)) => list.iter().map(id).collect(),
            Field::Given(one) => Ok(vec![id(one)?]),
        }
    }
}

fn invalid(field: &'static str, rule: &str, got: &dyn Display) -> Error {
    Error::Config {
        field,
        rule: rule.to_owned(),
        got: got.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(kind: &str, change: impl FnOnce(&mut Value)) -> Result<ModelConfig, Error> {
        let class = match kind {
            "mixtral" => "MixtralForCausalLM",
            _ => "MistralForCausalLM",
        };
        let mut config = json!({
            "architectures": [class], "model_type": kind, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 100,
            "max_position_embeddings": 512,
        });
        change(&mut config);
        ModelConfig::parse(&config.to_string())
    }

    fn shape(kind: &str, change: impl FnOnce(&mut Value)) -> ModelGeometry {
        parse(kind, change).unwrap().geometry
    }

    fn remove(config: &mut Value, field: &str) {
        config.as_object_mut().unwrap().remove(field);
    }

    #[test]
    fn an_absent_sliding_window_is_4096_for_mistral_and_none_for_mixtral() {
        assert_eq!(shape("mistral", |_| {}).sliding_window, Some(4096));
        assert_eq!(shape("mixtral", |_| {}).sliding_window, None);
    }

    #[test]
    fn a_null_sliding_window_is_none_and_a_given_one_counts_in_mixtral_too() {
        let null = |c: &mut Value| c["sliding_window"] = Value::Null;
        assert_eq!(shape("mistral", null).sliding_window, None);
        assert_eq!(shape("mixtral", null).sliding_window, None);
        let eight = |c: &mut Value| c["sliding_window"] = json!(8);
        assert_eq!(shape("mixtral", eight).sliding_window, Some(8));
    }

    #[test]
    fn an_absent_epsilon_is_1e_6_for_mistral_and_1e_5_for_mixtral() {
        assert_eq!(shape("mistral", |_| {}).rms_eps, 1e-6);
        assert_eq!(shape("mixtral", |_| {}).rms_eps, 1e-5);
        let given = |c: &mut Value| c["rms_norm_eps"] = json!(1e-4);
        assert_eq!(shape("mistral", given).rms_eps, 1e-4);
        let null = parse("mistral", |c| c["rms_norm_eps"] = Value::Null).unwrap_err();
        assert_eq!(
            null.to_string(),
            "config.json: rms_norm_eps must be a number, got null"
        );
    }

    #[test]
    fn rope_theta_is_read_from_old_and_new_files() {
        let old = |c: &mut Value| c["rope_theta"] = json!(1e8);
        assert_eq!(shape("mistral", old).rope_theta, 1e8);
        let new = |c: &mut Value| {
            c["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e5});
        };
        assert_eq!(shape("mixtral", new).rope_theta, 5e5);
        let both = |c: &mut Value| {
            c["rope_theta"] = json!(1e4);
            c["rope_parameters"] = json!({"rope_theta": 5e5});
        };
        assert_eq!(shape("mixtral", both).rope_theta, 5e5);
        assert_eq!(shape("mixtral", |_| {}).rope_theta, 1e6);
        assert_eq!(shape("mistral", |_| {}).rope_theta, 1e4);
    }

    #[test]
    fn other_kinds_of_rope_are_refused_by_name() {
        let refused = |rope: &str, value: Value| {
            let error = parse("mistral", |c| c[rope] = value).unwrap_err();
            error.to_string()
        };
        for (text, part) in [
            (
                refused("rope_parameters", json!({"rope_type": "yarn"})),
                "rope_parameters must be of rope_type default, got \"yarn\"",
            ),
            (
                refused("rope_scaling", json!({"type": "linear", "factor": 2})),
                "rope_scaling must be of rope_type default, got \"linear\"",
            ),
            (
                refused(
                    "rope_parameters",
                    json!({"full_attention": {"rope_theta": 1e4}}),
                ),
                "rope_parameters",
            ),
            (
                refused("rope_parameters", json!({"partial_rotary_factor": 0.5})),
                "partial_rotary_factor must be 1, got 0.5",
            ),
        ] {
            assert!(text.contains(part), "{text:?} does not say {part:?}");
        }
        let plain = parse("mistral", |c| c["rope_scaling"] = Value::Null);
        assert!(plain.is_ok());
    }

    #[test]
    fn a_null_or_absent_head_dim_is_hidden_by_heads() {
        assert_eq!(shape("mistral", |_| {}).head_dim, 8);
        assert_eq!(
            shape("mistral", |c| c["head_dim"] = Value::Null).head_dim,
            8
        );
        assert_eq!(shape("mistral", |c| c["head_dim"] = json!(16)).head_dim, 16);
        let odd = parse("mistral", |c| c["head_dim"] = json!(7)).unwrap_err();
        assert_eq!(
            odd.to_string(),
            "config.json: head_dim must be even (rotary pairs), got 7"
        );
        let uneven = parse("mistral", |c| c["hidden_size"] = json!(60)).unwrap_err();
        assert!(
            uneven.to_string().contains("head_dim must be given"),
            "{uneven}"
        );
    }

    #[test]
    fn absent_kv_heads_are_eight_and_null_ones_are_all_heads() {
        let heads = |c: &mut Value| c["num_attention_heads"] = json!(16);
        let absent = shape("mistral", |c| {
            heads(c);
            remove(c, "num_key_value_heads");
        });
        assert_eq!(absent.num_kv_heads, 8);
        let null = shape("mixtral", |c| {
            heads(c);
            c["num_key_value_heads"] = Value::Null;
        });
        assert_eq!(null.num_kv_heads, 16);
    }

    #[test]
    fn both_names_of_the_element_type_are_read() {
        let dtype = |field: &str, name: &str| {
            let config = parse("mistral", |c| c[field] = json!(name)).unwrap();
            config.dtype.unwrap()
        };
        assert_eq!(dtype("dtype", "bfloat16"), "bfloat16");
        assert_eq!(dtype("torch_dtype", "float32"), "float32");
    }

    #[test]
    fn embeddings_are_untied_unless_the_file_says_so() {
        assert!(!parse("mixtral", |_| {}).unwrap().tie_word_embeddings);
        let tied = parse("mixtral", |c| c["tie_word_embeddings"] = json!(true));
        assert!(tied.unwrap().tie_word_embeddings);
    }

    #[test]
    fn absent_ends_are_two_null_ones_none_and_lists_are_read() {
        let ends = |change: &dyn Fn(&mut Value)| parse("mixtral", change).unwrap().eos_token_ids;
        assert_eq!(ends(&|_| {}), [2]);
        assert_eq!(ends(&|c| c["eos_token_id"] = Value::Null), [0; 0]);
        assert_eq!(ends(&|c| c["eos_token_id"] = json!([2, 7])), [2, 7]);
        assert_eq!(parse("mixtral", |_| {}).unwrap().bos_token_id, Some(1));
    }

    #[test]
    fn a_dense_model_is_one_expert_that_is_always_chosen() {
        let g = shape("mistral", |c| c["num_local_experts"] = json!(8));
        assert_eq!((g.num_experts, g.top_k, g.has_gate()), (1, 1, false));
        let g = shape("mixtral", |_| {});
        assert_eq!((g.num_experts, g.top_k), (8, 2));
    }

    #[test]
    fn a_file_without_architectures_goes_by_its_model_type() {
        let of = |kind: &str| {
            parse(kind, |c| remove(c, "architectures"))
                .unwrap()
                .architecture
        };
        assert_eq!(of("mixtral"), Architecture::MixtralForCausalLM);
        assert_eq!(of("mistral"), Architecture::MistralForCausalLM);
    }

    fn assert_refused(field: &str, value: Value, part: &str) {
        let error = parse("mixtral", |c| c[field] = value).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("config.json: "), "{text:?}");
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }

    #[test]
    fn nonsense_is_refused_by_field_rule_and_value() {
        for (field, value, part) in [
            (
                "num_local_experts",
                json!(0),
                "num_local_experts must be a whole number from 1 to 1024, got 0",
            ),
            ("num_local_experts", json!(100_000), "num_local_experts"),
            (
                "num_experts_per_tok",
                json!(9),
                "at most num_local_experts (8), got 9",
            ),
            (
                "num_key_value_heads",
                json!(3),
                "a divisor of num_attention_heads (8), got 3",
            ),
            (
                "num_attention_heads",
                json!(1_u64 << 33),
                "num_attention_heads must be",
            ),
            ("hidden_size", json!(1_u64 << 40), "hidden_size must be"),
            (
                "hidden_size",
                json!(-4),
                "hidden_size must be a whole number from 1 to 16777216, got -4",
            ),
            ("hidden_size", json!("64"), "got \"64\""),
            ("hidden_size", json!(64.5), "got 64.5"),
            (
                "vocab_size",
                Value::Null,
                "vocab_size must be a whole number from 1 to 16777216, got null",
            ),
            ("sliding_window", json!(0), "sliding_window must be"),
            (
                "max_position_embeddings",
                json!(0),
                "max_position_embeddings must be",
            ),
            (
                "rms_norm_eps",
                json!(0),
                "rms_norm_eps must be between 0 and 1, got 0",
            ),
            (
                "rope_theta",
                json!(-1),
                "rope_theta must be a number of at least 1, got -1",
            ),
            ("eos_token_id", json!(-1), "eos_token_id must be a token id"),
        ] {
            assert_refused(field, value, part);
        }
        assert!(ModelConfig::parse("[1, 2").is_err());
        assert!(ModelConfig::parse("[]").is_err());
    }

    #[test]
    fn what_is_not_offered_is_refused_by_name() {
        for (field, value, part) in [
            (
                "hidden_act",
                json!("gelu"),
                "hidden_act must be silu, got gelu",
            ),
            (
                "attention_bias",
                json!(true),
                "attention_bias must be false",
            ),
            (
                "quantization_config",
                json!({"quant_method": "awq"}),
                "got awq",
            ),
            (
                "architectures",
                json!(["LlamaForCausalLM"]),
                "LlamaForCausalLM",
            ),
            (
                "architectures",
                json!("MixtralForCausalLM"),
                "architectures must be",
            ),
        ] {
            assert_refused(field, value, part);
        }
    }
}
