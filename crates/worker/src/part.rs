//! Which part of its group a worker can be: where attention and experts are of two numeric classes, a GPU attends and CPUs
//! have experts, or the other way round. Says what may be done, never what is done.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tramontane_compute::{Backend, RowFormat};
use tramontane_coordination::Part;

use crate::config::RoleSet;
use crate::{ConfigError, WorkerConfig};

/// The numeric class of a group in two parts: `<attention>+<experts>`, or `<attention>+<experts>@<layers>`, where
/// the experts of the first layers are of the attention's class too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MixedClass {
    /// The class that attends.
    attention: String,
    /// The class of the experts of the other layers.
    experts: String,
    /// Layers whose experts are of the attention's class.
    layers: usize,
}

impl MixedClass {
    /// Whether those who attend have no experts.
    pub(crate) const fn parts_attention(&self) -> bool {
        self.layers == 0
    }
}

impl FromStr for MixedClass {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parse = || {
            let (attention, rest) = text.split_once('+')?;
            let (experts, layers) = match rest.split_once('@') {
                Some((experts, layers)) => (experts, layers.parse().ok().filter(|n| *n > 0)?),
                None => (rest, 0),
            };
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-';
            let is_class = |class: &str| !class.is_empty() && class.bytes().all(plain);
            // Whoever has experts only keeps no keys and values.
            let is_mixed = is_class(attention)
                && is_class(experts)
                && attention != experts
                && !experts.ends_with("-kv8");
            is_mixed.then(|| Self {
                attention: attention.to_owned(),
                experts: experts.to_owned(),
                layers,
            })
        };
        parse().ok_or_else(|| {
            format!(
                "numeric class must be two different classes, <attention>+<experts> or <attention>+<experts>@<layers above 0>, got {text:?}"
            )
        })
    }
}

impl fmt::Display for MixedClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}", self.attention, self.experts)?;
        match self.layers {
            0 => Ok(()),
            layers => write!(f, "@{layers}"),
        }
    }
}

impl Serialize for MixedClass {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MixedClass {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A worker's place in its group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// The group's numeric class.
    pub(crate) class: String,
    /// How rows travel in the group.
    pub(crate) row_format: RowFormat,
    /// What the worker can do there; `None` where everybody can do everything.
    pub(crate) part: Option<Part>,
}

impl Place {
    /// The place of a worker that computes with `backend`.
    ///
    /// # Errors
    /// When its class is none of the group's two, or it was given a role that its class does not have there.
    pub(crate) fn of(
        config: &WorkerConfig,
        backend: &dyn Backend,
        num_layers: usize,
    ) -> Result<Self, ConfigError> {
        let own = config.kv_format.class_of(backend.numeric_class());
        let Some(mixed) = &config.numeric_class else {
            return Ok(Self {
                class: own,
                row_format: backend.row_format(),
                part: None,
            });
        };
        let refuse = |rule: &str| Err(ConfigError::new("numeric_class", rule, mixed));
        if mixed.layers >= num_layers {
            return refuse(&format!("of fewer layers than the model's {num_layers}"));
        }
        let part = if own == mixed.attention {
            if backend.row_format() != RowFormat::Bf16 {
                return refuse("one whose attention has rows of bf16, as weights = \"bf16\" has");
            }
            part(true, 0..mixed.layers)
        } else if backend.numeric_class() == mixed.experts {
            part(false, mixed.layers..num_layers)
        } else {
            return refuse(&format!("one that names {own}, which this worker computes"));
        };
        check_roles(config.roles, part, mixed)?;
        Ok(Self {
            class: mixed.to_string(),
            row_format: RowFormat::Bf16,
            part: Some(part),
        })
    }
}

const fn part(attention: bool, layers: Range<usize>) -> Part {
    Part {
        attention,
        first_layer: layers.start,
        end_layer: layers.end,
    }
}

fn check_roles(asked: RoleSet, part: Part, mixed: &MixedClass) -> Result<(), ConfigError> {
    let can = part.roles();
    let is_less = |asked: bool, can: bool| !asked || can;
    if is_less(asked.0.attention, can.attention) && is_less(asked.0.experts, can.experts) {
        return Ok(());
    }
    let rule = format!("{} for this worker's class in {mixed}", RoleSet(can));
    Err(ConfigError::new("roles", &rule, &asked))
}

#[cfg(test)]
mod tests {
    use tramontane_compute::WeightFormat;
    use tramontane_compute::reference::ReferenceBackend;
    use tramontane_compute_cpu::{CpuBackend, CpuConfig};
    use tramontane_types::ModelGeometry;

    use super::*;

    fn geometry() -> ModelGeometry {
        ModelGeometry {
            hidden: 64,
            num_layers: 4,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 16,
            ff: 96,
            num_experts: 4,
            top_k: 2,
            vocab: 50,
            rope_theta: 1e6,
            rms_eps: 1e-5,
            sliding_window: None,
            max_positions: 256,
        }
    }

    fn cpu(weights: WeightFormat) -> CpuBackend {
        let threads = std::num::NonZeroUsize::MIN;
        let isa = Some(tramontane_compute_cpu::Isa::Scalar);
        CpuBackend::new(&geometry(), weights, CpuConfig { threads, isa }).unwrap()
    }

    fn place(class: &str, roles: &str, backend: &dyn Backend) -> Result<Place, String> {
        let config = WorkerConfig {
            numeric_class: Some(class.parse()?),
            roles: roles.parse().unwrap(),
            ..WorkerConfig::default()
        };
        Place::of(&config, backend, 4).map_err(|error| error.to_string())
    }

    #[test]
    fn a_class_of_two_parts_survives_its_text_form() {
        for text in ["cuda-sm90a-bf16+cpu-q8", "a-kv8+b@16"] {
            let class: MixedClass = text.parse().unwrap();
            assert_eq!(class.to_string(), text);
            let json = serde_json::to_string(&class).unwrap();
            assert_eq!(serde_json::from_str::<MixedClass>(&json).unwrap(), class);
        }
        for text in [
            "", "a", "a+", "+b", "a+a", "a+b@", "a+b@0", "a+b@x", "a+b+c", "a b+c", "a+a-kv8",
        ] {
            let error = text.parse::<MixedClass>().unwrap_err();
            assert!(error.ends_with(&format!("got {text:?}")), "{error}");
        }
    }

    #[test]
    fn whoever_attends_has_the_first_layers_and_the_others_the_rest() {
        let (bf16, q8) = (cpu(WeightFormat::Bf16), cpu(WeightFormat::Q8));
        let class = format!("{}+{}@1", bf16.numeric_class(), q8.numeric_class());
        let first = place(&class, "attention,experts", &bf16).unwrap();
        assert_eq!(first.part, Some(part(true, 0..1)));
        let second = place(&class, "experts", &q8).unwrap();
        assert_eq!(second.part, Some(part(false, 1..4)));
        assert_eq!((&first.class, first.row_format), (&class, RowFormat::Bf16));
        assert_eq!(
            (&second.class, second.row_format),
            (&class, RowFormat::Bf16)
        );
    }

    #[test]
    fn a_place_that_is_none_is_refused_with_the_reason() {
        let (bf16, q8) = (cpu(WeightFormat::Bf16), cpu(WeightFormat::Q8));
        let (a, b) = (bf16.numeric_class(), q8.numeric_class());
        let refused = |class: &str, roles: &str, backend: &dyn Backend| {
            place(class, roles, backend).unwrap_err()
        };
        let mixed = format!("{a}+{b}");
        assert_eq!(
            refused(&mixed, "attention,experts", &q8),
            format!(
                "roles must be experts for this worker's class in {mixed}, got attention,experts"
            )
        );
        assert_eq!(
            refused(&mixed, "attention,experts", &bf16),
            format!(
                "roles must be attention for this worker's class in {mixed}, got attention,experts"
            )
        );
        let reference = ReferenceBackend::new(&geometry());
        assert_eq!(
            refused(&mixed, "experts", &reference),
            format!(
                "numeric_class must be one that names reference-f32, which this worker computes, got {mixed}"
            )
        );
        let late = format!("{mixed}@4");
        assert_eq!(
            refused(&late, "experts", &q8),
            format!("numeric_class must be of fewer layers than the model's 4, got {late}")
        );
        let turned = format!("{b}+{a}");
        assert!(refused(&turned, "attention", &q8).contains("rows of bf16"));
    }
}
