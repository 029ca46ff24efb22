//! Configuration in layers: defaults < file < environment < flags. Only this module reads the environment.
//!
//! A process has one struct of settings. Each layer is a TOML table; later layers win key by key; the
//! result is decoded once, unknown keys are refused, and every value remembers which layer set it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Prefix of environment variables: `TRAMONTANE_WORKER__LEASE_TTL` sets `lease_ttl` of section `worker`.
pub const ENV_PREFIX: &str = "TRAMONTANE_";
/// Largest configuration file.
pub const CONFIG_FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Built in.
    Default,
    /// The configuration file.
    File(String),
    /// An environment variable.
    Environment(String),
    /// A command-line flag.
    Flag,
}

/// A configuration that cannot be used: the key, the value and the rule.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {path}")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is too large to be a configuration.
    #[error("configuration file {path} has {got} bytes, expected at most {CONFIG_FILE_BYTES_MAX}")]
    TooLarge {
        /// The file.
        path: String,
        /// Its size.
        got: u64,
    },
    /// The file is not TOML.
    #[error("configuration file {path}: {message}")]
    Syntax {
        /// The file.
        path: String,
        /// What the parser says, with line and column.
        message: String,
    },
    /// The merged settings do not fit the struct.
    #[error("configuration: {message}")]
    Value {
        /// Which key, and why.
        message: String,
    },
}

/// Settings with the origin of every leaf.
#[derive(Clone, Debug)]
pub struct Loaded<T> {
    /// The settings.
    pub value: T,
    /// `section.key` to its source, for every leaf.
    pub sources: BTreeMap<String, Source>,
}

/// The layers above the defaults.
#[derive(Clone, Debug, Default)]
pub struct Layers<'a> {
    /// A TOML file.
    pub file: Option<&'a Path>,
    /// Environment as `(name, value)`; [`environment`] collects the real one.
    pub environment: Vec<(String, String)>,
    /// Flags as a table; absent flags are absent keys.
    pub flags: Table,
}

/// The variables of this process that start with [`ENV_PREFIX`] and contain `__`.
#[must_use]
pub fn environment() -> Vec<(String, String)> {
    std::env::vars()
        .filter(|(name, _)| name.starts_with(ENV_PREFIX) && name.contains("__"))
        .collect()
}

/// Where compiled kernels are kept when nobody says where: below the user's cache directory.
#[must_use]
#[expect(
    clippy::disallowed_methods,
    reason = "the environment is read here and nowhere else"
)]
pub fn cache_dir() -> Option<PathBuf> {
    let named = |name: &str| {
        let path = std::env::var(name).ok().map(PathBuf::from);
        path.filter(|path| path.is_absolute())
    };
    let caches = named("XDG_CACHE_HOME").or_else(|| named("HOME").map(|home| home.join(".cache")));
    Some(caches?.join("tramontane").join("kernels"))
}

/// Merges the layers over `T::default()` and decodes the result.
///
/// # Errors
/// When a file cannot be read or parsed, a key is unknown or a value has the wrong type.
pub fn load<T>(layers: &Layers<'_>) -> Result<Loaded<T>, ConfigError>
where
    T: Default + Serialize + DeserializeOwned,
{
    let defaults = Table::try_from(T::default()).map_err(|e| value_error(&e.to_string()))?;
    let mut merged = defaults.clone();
    let mut sources = BTreeMap::new();
    mark(&defaults, "", &Source::Default, &mut sources);
    if let Some(path) = layers.file {
        let table = read_file(path)?;
        mark(
            &table,
            "",
            &Source::File(path.display().to_string()),
            &mut sources,
        );
        merge(&mut merged, table);
    }
    for (name, value) in &layers.environment {
        let table = from_variable(name, value, &defaults);
        mark(&table, "", &Source::Environment(name.clone()), &mut sources);
        merge(&mut merged, table);
    }
    mark(&layers.flags, "", &Source::Flag, &mut sources);
    merge(&mut merged, layers.flags.clone());
    let value = serde_path_to_error::deserialize(Value::Table(merged)).map_err(|error| {
        let key = error.path().to_string();
        value_error(&format!("{key}: {}", error.inner().message()))
    })?;
    Ok(Loaded { value, sources })
}

fn value_error(message: &str) -> ConfigError {
    ConfigError::Value {
        message: message.trim().to_owned(),
    }
}

fn read_file(path: &Path) -> Result<Table, ConfigError> {
    let shown = || path.display().to_string();
    let read = |source| ConfigError::Read {
        path: shown(),
        source,
    };
    let got = std::fs::metadata(path).map_err(read)?.len();
    if got > CONFIG_FILE_BYTES_MAX {
        return Err(ConfigError::TooLarge { path: shown(), got });
    }
    let text = std::fs::read_to_string(path).map_err(read)?;
    text.parse()
        .map_err(|e: toml::de::Error| ConfigError::Syntax {
            path: shown(),
            message: e.to_string(),
        })
}

/// `TRAMONTANE_WORKER__LEASE_TTL=5s` becomes `[worker] lease_ttl = "5s"`.
///
/// The text is read as TOML where the default is not a string, so that numbers and lists keep their type.
fn from_variable(name: &str, value: &str, defaults: &Table) -> Table {
    let path: Vec<String> = name
        .trim_start_matches(ENV_PREFIX)
        .split("__")
        .map(str::to_ascii_lowercase)
        .collect();
    let default = lookup(defaults, &path);
    let text = Value::String(value.to_owned());
    let leaf = match default {
        Some(Value::String(_)) => text,
        _ => toml::from_str::<Table>(&format!("v = {value}"))
            .ok()
            .and_then(|mut t| t.remove("v"))
            .unwrap_or(text),
    };
    let mut table = Table::new();
    let mut leaf = Some(leaf);
    for key in path.iter().rev() {
        let inner = leaf
            .take()
            .unwrap_or_else(|| Value::Table(std::mem::take(&mut table)));
        table = Table::from_iter([(key.clone(), inner)]);
    }
    table
}

fn lookup<'a>(table: &'a Table, path: &[String]) -> Option<&'a Value> {
    let (first, rest) = path.split_first()?;
    let value = table.get(first)?;
    match (rest.is_empty(), value) {
        (true, value) => Some(value),
        (false, Value::Table(inner)) => lookup(inner, rest),
        (false, _) => None,
    }
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => merge(inner, value),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

fn mark(table: &Table, prefix: &str, source: &Source, sources: &mut BTreeMap<String, Source>) {
    for (key, value) in table {
        let path = if prefix.is_empty() {
            key.clone()
        } else {
            format!("{prefix}.{key}")
        };
        match value {
            Value::Table(inner) => mark(inner, &path, source, sources),
            _ => {
                sources.insert(path, source.clone());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        name: String,
        worker: Worker,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Worker {
        threads: u32,
        lease_ttl: String,
        seen: Option<u32>,
    }

    impl Default for Settings {
        fn default() -> Self {
            Self {
                name: "1".to_owned(),
                worker: Worker::default(),
            }
        }
    }

    impl Default for Worker {
        fn default() -> Self {
            Self {
                threads: 1,
                lease_ttl: "10s".to_owned(),
                seen: None,
            }
        }
    }

    fn variable(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn later_layers_win_and_every_value_knows_its_source() {
        let mut file = tempfile();
        file.1
            .write_all(b"name = 'file'\n[worker]\nthreads = 2\nlease_ttl = '3s'\n")
            .unwrap();
        let layers = Layers {
            file: Some(&file.0),
            environment: vec![
                variable("TRAMONTANE_WORKER__LEASE_TTL", "5s"),
                variable("TRAMONTANE_WORKER__SEEN", "7"),
            ],
            flags: toml::from_str("[worker]\nthreads = 3").unwrap(),
        };
        let loaded: Loaded<Settings> = load(&layers).unwrap();
        let worker = Worker {
            threads: 3,
            lease_ttl: "5s".to_owned(),
            seen: Some(7),
        };
        assert_eq!(
            loaded.value,
            Settings {
                name: "file".to_owned(),
                worker
            }
        );
        assert_eq!(loaded.sources["worker.threads"], Source::Flag);
        let variable = Source::Environment("TRAMONTANE_WORKER__LEASE_TTL".to_owned());
        assert_eq!(loaded.sources["worker.lease_ttl"], variable);
        assert!(matches!(loaded.sources["name"], Source::File(_)));
        std::fs::remove_file(&file.0).unwrap();
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named() {
        let flags = |text: &str| Layers {
            flags: toml::from_str(text).unwrap(),
            ..Layers::default()
        };
        let unknown = load::<Settings>(&flags("[worker]\nthread = 3"))
            .unwrap_err()
            .to_string();
        assert!(unknown.contains("unknown field `thread`"), "{unknown}");
        let wrong = load::<Settings>(&flags("[worker]\nthreads = 'many'"))
            .unwrap_err()
            .to_string();
        assert!(wrong.contains("many"), "{wrong}");
    }

    fn tempfile() -> (PathBuf, std::fs::File) {
        let path =
            std::env::temp_dir().join(format!("tramontane-config-{}.toml", std::process::id()));
        (path.clone(), std::fs::File::create(path).unwrap())
    }
}
