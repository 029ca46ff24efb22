//! The settings of one worker, checked once before a port is used. Never read again later.

use std::fmt;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tramontane_compute::{KV_PAGE_TOKENS, KvFormat, WeightFormat};
use tramontane_compute_cuda::DeviceChoice;
use tramontane_coordination::Roles;
use tramontane_engine::EngineConfig;
use tramontane_engine::config::LOOKUP_TOKENS_MAX;
use tramontane_runtime::duration_text;
use tramontane_types::{ModelGeometry, SEGMENTS_PER_EXPERT, TokenId};

use crate::ConfigError;
use crate::part::MixedClass;

/// Name of a cluster that nobody named.
pub const CLUSTER: &str = "default";
/// Time after which a worker that stopped answering leaves the cluster: long enough for a lost packet and
/// a paused machine, short enough that its experts are replaced within a layer's deadline.
pub const LEASE_TTL: Duration = Duration::from_secs(5);
/// How long a draining worker takes at most: a long answer ends within it.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// A slice that no placement gives to this worker is dropped when nobody asked for it for this long: the
/// time in which every caller has seen the newer placement.
pub const DROP_GRACE: Duration = Duration::from_secs(5);
/// How long a step waits for the experts of one layer: time for the lease of a lost worker to end, for
/// the planner to publish without it, and for a survivor to load a slice.
pub const LAYER_DEADLINE: Duration = Duration::from_secs(20);
/// How fast weights are given to other workers, all of them together, in bytes per second: half of a link of
/// one gigabit, so that expert calls find room beside them.
pub const WEIGHTS_RATE: u64 = 64 << 20;
/// Slowest such rate: a chunk of 256 KiB must come through before its asker thinks that it is not coming.
pub const WEIGHTS_RATE_MIN: u64 = 1 << 20;
/// How long the first formation of an island waits: the time in which ranks that start together have read their weights.
pub const ISLAND_FORM_WAIT: Duration = Duration::from_secs(300);
/// How long a step of an island may take: the longest prompt chunk takes tenths of a second, pages that are copied to a
/// newcomer some seconds.
pub const ISLAND_STEP_DEADLINE: Duration = Duration::from_secs(20);
/// Tokens of a sequence that are guessed at once on a CPU, where nobody says otherwise: more bring little (docs/perf/lookup.md).
pub const LOOKUP_TOKENS: usize = 4;
/// Longest id of a worker or name of a cluster.
pub const NAME_BYTES_MAX: usize = 128;
/// What is assumed of a machine that does not say how much memory it has.
const MEMORY_BYTES_UNKNOWN: u64 = 8 << 30;

/// The settings of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct WorkerConfig {
    /// Name of this worker, unique in the cluster.
    pub id: String,
    /// Name of the cluster.
    pub cluster: String,
    /// `host:port` that others reach this worker at; the address that it listens on when absent.
    pub advertise: Option<String>,
    /// What it does: `attention`, `experts`, or both with a comma.
    pub roles: RoleSet,
    /// What it computes on: `auto`, `cpu` or `cuda:N`.
    pub device: DeviceChoice,
    /// Directory of CUDA's libraries (NVRTC, NCCL), where they are not where the system looks.
    pub cuda_libraries: Option<PathBuf>,
    /// Directory of compiled kernels; the user's cache when absent.
    pub kernel_cache: Option<PathBuf>,
    /// Ranks of the island that this worker is: processes with a GPU each; 1 is no island.
    pub island_ranks: u32,
    /// Which of them this process is; 0 leads.
    pub island_rank: u32,
    /// `host:port` of the leader's gRPC API, for a rank that follows.
    pub island_leader: Option<String>,
    /// Whether an island may span machines: what NCCL carries between them is not encrypted.
    pub island_network_trusted: bool,
    /// How long the leader waits for all ranks before it begins with those that are there.
    #[serde(with = "duration_text")]
    pub island_form_wait: Duration,
    /// How long a step of the ranks may take before one of them counts as hanging.
    #[serde(with = "duration_text")]
    pub island_step_deadline: Duration,
    /// How weights are kept in memory; `f32` takes the reference backend.
    pub weights: WeightFormat,
    /// How keys and values are kept in memory; part of the numeric class, like `weights`.
    pub kv_format: KvFormat,
    /// The numeric class of the group, where its attention and its experts are of different ones.
    pub numeric_class: Option<MixedClass>,
    /// Compute threads; all cores when absent.
    pub threads: Option<NonZeroUsize>,
    /// Bytes for expert weights; half of the machine's memory when absent.
    pub expert_memory: Option<u64>,
    /// Bytes for the KV cache; a quarter of the machine's memory when absent.
    pub kv_memory: Option<u64>,
    /// Pages of the KV cache, instead of what `kv_memory` has room for.
    pub num_pages: Option<NonZeroUsize>,
    /// Sequences in the running batch.
    pub max_running: usize,
    /// Sequences that may wait; further ones are refused.
    pub max_waiting: usize,
    /// Rows of one step.
    pub max_step_rows: usize,
    /// Rows of one prompt in one step.
    pub max_prefill_chunk: usize,
    /// Whether equal beginnings of prompts share their pages.
    pub prefix_cache: bool,
    /// Most tokens of a sequence that are guessed from what it already says, and checked in one step; 0 guesses none.
    /// When absent, [`LOOKUP_TOKENS`] on a CPU and none on a GPU, where nobody has measured it yet.
    pub lookup_tokens: Option<usize>,
    /// How long the store keeps this worker listed without hearing from it.
    #[serde(with = "duration_text")]
    pub lease_ttl: Duration,
    /// Longest drain, from the signal to the end.
    #[serde(with = "duration_text")]
    pub drain_deadline: Duration,
    /// Longest time that a step waits for the experts of one layer.
    #[serde(with = "duration_text")]
    pub layer_deadline: Duration,
    /// How long nobody may have asked for a slice before it is dropped.
    #[serde(with = "duration_text")]
    pub drop_grace: Duration,
    /// Bytes per second at which weights are given to workers that lack them.
    pub weights_rate: u64,
    /// Whether an operator may bring faults upon this worker, to see that the cluster survives them.
    pub drills: bool,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        let engine = EngineConfig::default();
        Self {
            id: String::new(),
            cluster: CLUSTER.to_owned(),
            advertise: None,
            roles: RoleSet::default(),
            device: DeviceChoice::default(),
            cuda_libraries: None,
            kernel_cache: None,
            island_ranks: 1,
            island_rank: 0,
            island_leader: None,
            island_network_trusted: false,
            island_form_wait: ISLAND_FORM_WAIT,
            island_step_deadline: ISLAND_STEP_DEADLINE,
            weights: WeightFormat::Bf16,
            kv_format: KvFormat::default(),
            numeric_class: None,
            threads: None,
            expert_memory: None,
            kv_memory: None,
            num_pages: None,
            max_running: engine.max_running,
            max_waiting: engine.max_waiting,
            max_step_rows: engine.max_step_rows,
            max_prefill_chunk: engine.max_prefill_chunk,
            prefix_cache: engine.prefix_cache,
            lookup_tokens: None,
            lease_ttl: LEASE_TTL,
            drain_deadline: DRAIN_DEADLINE,
            layer_deadline: LAYER_DEADLINE,
            drop_grace: DROP_GRACE,
            weights_rate: WEIGHTS_RATE,
            drills: false,
        }
    }
}

impl WorkerConfig {
    /// Checks every value that has a rule.
    ///
    /// # Errors
    /// Names the first key that breaks its rule, the rule, and the value.
    pub fn validate(&self) -> Result<(), ConfigError> {
        check_name("id", &self.id)?;
        check_name("cluster", &self.cluster)?;
        if let Some(address) = &self.advertise {
            check_address("advertise", address)?;
        }
        self.check_island()?;
        let counts = [
            ("max_running", self.max_running),
            ("max_waiting", self.max_waiting),
            ("max_step_rows", self.max_step_rows),
            ("max_prefill_chunk", self.max_prefill_chunk),
        ];
        if let Some((key, got)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(ConfigError::new(key, "at least 1", got));
        }
        if let Some(got) = self.lookup_tokens.filter(|got| *got > LOOKUP_TOKENS_MAX) {
            let rule = format!("at most {LOOKUP_TOKENS_MAX}");
            return Err(ConfigError::new("lookup_tokens", &rule, &got));
        }
        if self.roles.0.experts && self.expert_memory == Some(0) {
            return Err(ConfigError::new(
                "expert_memory",
                "above 0 for a worker with experts",
                &0,
            ));
        }
        if self.weights_rate < WEIGHTS_RATE_MIN {
            let rule = format!("at least {WEIGHTS_RATE_MIN}");
            return Err(ConfigError::new("weights_rate", &rule, &self.weights_rate));
        }
        let times = [
            (
                "lease_ttl",
                self.lease_ttl,
                tramontane_coordination::store::LEASE_TTL_MIN,
            ),
            ("drain_deadline", self.drain_deadline, Duration::ZERO),
            (
                "layer_deadline",
                self.layer_deadline,
                Duration::from_millis(1),
            ),
            ("drop_grace", self.drop_grace, Duration::ZERO),
            ("island_form_wait", self.island_form_wait, Duration::ZERO),
            (
                "island_step_deadline",
                self.island_step_deadline,
                Duration::from_millis(1),
            ),
        ];
        for (key, got, min) in times {
            if got < min || got > TIME_MAX {
                let (min, max) = (humantime::format_duration(min), TIME_MAX);
                let rule = format!("between {min} and {}", humantime::format_duration(max));
                return Err(ConfigError::new(
                    key,
                    &rule,
                    &humantime::format_duration(got),
                ));
            }
        }
        Ok(())
    }

    /// Checks as [`validate`](Self::validate) does, for a process that the cluster sees.
    ///
    /// # Errors
    /// As there; and for a rank of an island that follows another one.
    pub(crate) fn validate_worker(&self) -> Result<(), ConfigError> {
        self.validate()?;
        if self.island_rank > 0 {
            let rule = "0 for a worker: the other ranks of an island follow one";
            return Err(ConfigError::new("island_rank", rule, &self.island_rank));
        }
        Ok(())
    }

    /// Whether this process leads an island.
    pub(crate) const fn leads(&self) -> bool {
        self.island_ranks > 1 && self.island_rank == 0
    }

    fn check_island(&self) -> Result<(), ConfigError> {
        let most = u32::from(SEGMENTS_PER_EXPERT);
        if !(1..=most).contains(&self.island_ranks) {
            let rule = format!("between 1 and {most}");
            return Err(ConfigError::new("island_ranks", &rule, &self.island_ranks));
        }
        if self.island_rank >= self.island_ranks {
            let rule = format!("below island_ranks, {}", self.island_ranks);
            return Err(ConfigError::new("island_rank", &rule, &self.island_rank));
        }
        match &self.island_leader {
            Some(leader) => check_address("island_leader", leader)?,
            None if self.island_rank > 0 => {
                let rule = "host:port for a rank that follows";
                return Err(ConfigError::new("island_leader", rule, &"nothing"));
            }
            None => {}
        }
        if let Some(class) = self
            .numeric_class
            .as_ref()
            .filter(|_| self.island_ranks > 1)
        {
            let rule = "absent for an island, which attends and has experts itself";
            return Err(ConfigError::new("numeric_class", rule, class));
        }
        let has_both = self.roles.0.attention && self.roles.0.experts;
        if self.island_ranks > 1 && !has_both {
            let rule = "attention,experts for an island";
            return Err(ConfigError::new("roles", rule, &self.roles));
        }
        Ok(())
    }

    /// Bytes offered for expert weights.
    #[must_use]
    pub fn expert_bytes(&self) -> u64 {
        self.expert_memory.unwrap_or_else(|| machine_memory() / 2)
    }

    /// Bytes offered for the KV cache.
    #[must_use]
    pub fn kv_bytes(&self) -> u64 {
        self.kv_memory.unwrap_or_else(|| machine_memory() / 4)
    }

    /// Bytes offered for expert weights by a worker of these roles, which may be others than it was
    /// configured with: one that was to attend and does not has the memory of its KV cache left.
    #[must_use]
    pub fn capacity(&self, roles: Roles, geometry: &ModelGeometry) -> u64 {
        let experts = self.expert_bytes();
        match (roles.experts, roles.attention) {
            (false, _) => 0,
            (true, false) if self.roles.0.attention => {
                let pages = self.num_pages(geometry) as u64;
                experts.saturating_add(pages.saturating_mul(self.page_bytes(geometry)))
            }
            (true, _) => experts,
        }
    }

    /// Compute threads.
    #[must_use]
    pub fn num_threads(&self) -> NonZeroUsize {
        let all = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        self.threads.unwrap_or(all)
    }

    /// The engine's limits for a model whose end-of-sequence ids are `eos_ids`.
    #[must_use]
    pub fn engine(&self, geometry: &ModelGeometry, eos_ids: Vec<TokenId>) -> EngineConfig {
        EngineConfig {
            max_running: self.max_running,
            max_waiting: self.max_waiting,
            max_step_rows: self.max_step_rows,
            max_prefill_chunk: self.max_prefill_chunk,
            num_pages: self.num_pages(geometry),
            prefix_cache: self.prefix_cache,
            lookup_tokens: self.lookup_tokens.unwrap_or(LOOKUP_TOKENS),
            eos_ids,
            ..EngineConfig::default()
        }
    }

    /// Pages of the KV cache: what the memory has room for, but no more than `max_running` sequences of
    /// full length can use, and at least one sequence.
    fn num_pages(&self, geometry: &ModelGeometry) -> usize {
        if let Some(pages) = self.num_pages {
            return pages.get();
        }
        let bytes = self.kv_bytes();
        let fits = usize::try_from(bytes / self.page_bytes(geometry).max(1)).unwrap_or(usize::MAX);
        let pages_of_one = geometry.max_positions.div_ceil(KV_PAGE_TOKENS);
        let usable = pages_of_one.saturating_mul(self.max_running);
        fits.min(usable).clamp(1, PAGES_MAX)
    }

    /// Bytes of one page: keys and values of all layers, heads laid out as the CPU backend does.
    fn page_bytes(&self, geometry: &ModelGeometry) -> u64 {
        let per_head = if self.weights == WeightFormat::F32 {
            KV_PAGE_TOKENS * geometry.head_dim * 2 * size_of::<f32>()
        } else {
            let dim = geometry.head_dim;
            self.kv_format.key_bytes(dim) + self.kv_format.value_bytes(dim)
        };
        (geometry.num_layers * geometry.num_kv_heads * per_head) as u64
    }
}

/// Longest of all configured times: a day is a typing error.
const TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Page numbers travel as u32 and the last one is taken.
const PAGES_MAX: usize = u32::MAX as usize - 1;

/// What a worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoleSet(pub Roles);

impl Default for RoleSet {
    fn default() -> Self {
        Self(Roles {
            attention: true,
            experts: true,
        })
    }
}

impl FromStr for RoleSet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut roles = Roles::default();
        for role in text.split(',') {
            match role.trim() {
                "attention" => roles.attention = true,
                "experts" => roles.experts = true,
                _ => {
                    return Err(format!(
                        "roles must be attention, experts or both, got {text:?}"
                    ));
                }
            }
        }
        Ok(Self(roles))
    }
}

impl fmt::Display for RoleSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.0.attention, self.0.experts) {
            (true, true) => "attention,experts",
            (true, false) => "attention",
            (false, true) => "experts",
            (false, false) => "",
        })
    }
}

impl Serialize for RoleSet {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for RoleSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

fn check_name(key: &'static str, name: &str) -> Result<(), ConfigError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.bytes().all(plain) {
        return Ok(());
    }
    let rule = format!("1 to {NAME_BYTES_MAX} letters, digits or any of . _ -");
    Err(ConfigError::new(key, &rule, &format!("{name:?}")))
}

fn check_address(key: &'static str, address: &str) -> Result<(), ConfigError> {
    let (host, port) = address.rsplit_once(':').unwrap_or_default();
    let port = port.parse::<u16>().unwrap_or_default();
    if host.is_empty() || port == 0 {
        return Err(ConfigError::new(key, "host:port", &format!("{address:?}")));
    }
    Ok(())
}

/// Memory of this machine or of its container, whichever is less.
#[must_use]
pub fn machine_memory() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = total_of(&meminfo).unwrap_or(MEMORY_BYTES_UNKNOWN);
    let cgroup = std::fs::read_to_string("/sys/fs/cgroup/memory.max").unwrap_or_default();
    // "max" where there is no limit.
    cgroup
        .trim()
        .parse()
        .map_or(total, |limit: u64| limit.min(total))
}

fn total_of(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> WorkerConfig {
        WorkerConfig {
            id: "w-0".to_owned(),
            ..WorkerConfig::default()
        }
    }

    fn refused(change: impl FnOnce(&mut WorkerConfig)) -> String {
        let mut config = good();
        config.validate().unwrap();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn a_broken_rule_is_named_with_key_and_value() {
        assert_eq!(
            refused(|c| c.id = "a/b".to_owned()),
            "id must be 1 to 128 letters, digits or any of . _ -, got \"a/b\""
        );
        assert_eq!(
            refused(|c| c.max_waiting = 0),
            "max_waiting must be at least 1, got 0"
        );
        assert_eq!(
            refused(|c| c.lease_ttl = Duration::from_millis(1)),
            "lease_ttl must be between 2s and 1day, got 1ms"
        );
        assert_eq!(
            refused(|c| c.advertise = Some("here".to_owned())),
            "advertise must be host:port, got \"here\""
        );
        assert_eq!(
            refused(|c| c.island_ranks = 9),
            "island_ranks must be between 1 and 8, got 9"
        );
        assert_eq!(
            refused(|c| c.island_rank = 1),
            "island_rank must be below island_ranks, 1, got 1"
        );
        let leaderless = |c: &mut WorkerConfig| (c.island_ranks, c.island_rank) = (2, 1);
        assert_eq!(
            refused(leaderless),
            "island_leader must be host:port for a rank that follows, got nothing"
        );
        assert_eq!(
            refused(|c| c.expert_memory = Some(0)),
            "expert_memory must be above 0 for a worker with experts, got 0"
        );
    }

    #[test]
    fn settings_survive_their_text_form_and_unknown_keys_are_refused() {
        let text = serde_json::to_string(&good()).unwrap();
        assert!(text.contains("\"roles\":\"attention,experts\""), "{text}");
        assert!(text.contains("\"drain_deadline\":\"2m\""), "{text}");
        assert_eq!(serde_json::from_str::<WorkerConfig>(&text).unwrap(), good());
        let parse = |text: &str| serde_json::from_str::<WorkerConfig>(text);
        let partial = parse(r#"{"roles": "experts", "lease_ttl": "1m 30s", "weights": "q4"}"#);
        let partial = partial.unwrap();
        assert_eq!(
            partial.roles.0,
            Roles {
                attention: false,
                experts: true
            }
        );
        assert_eq!(partial.lease_ttl, Duration::from_secs(90));
        assert!(
            parse(r#"{"thread": 3}"#)
                .unwrap_err()
                .to_string()
                .contains("`thread`")
        );
        let roles = parse(r#"{"roles": "cooking"}"#).unwrap_err().to_string();
        assert!(roles.contains("got \"cooking\""), "{roles}");
    }

    #[test]
    fn the_cache_takes_its_memory_but_no_more_than_can_be_used() {
        let geometry = ModelGeometry {
            hidden: 64,
            num_layers: 2,
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
        };
        // Two layers of two heads of 16 keys and 16 values, 64 tokens, 2 bytes.
        let page_bytes = 2 * 2 * 32 * 64 * 2;
        let pages_as = |kv_format: KvFormat, memory: u64| {
            let config = WorkerConfig {
                kv_format,
                kv_memory: Some(memory),
                max_running: 3,
                ..good()
            };
            config.engine(&geometry, vec![]).num_pages
        };
        let pages = |memory: u64| pages_as(KvFormat::F16, memory);
        assert_eq!(pages(10 * page_bytes + 1), 10);
        // One byte each, and a scale for every sixteen.
        assert_eq!(pages_as(KvFormat::Q8, 5 * page_bytes), 8);
        assert_eq!(pages(1 << 40), 3 * 4);
        assert_eq!(pages(0), 1);

        let mut config = WorkerConfig {
            expert_memory: Some(1000),
            num_pages: NonZeroUsize::new(3),
            ..good()
        };
        let capacity = |config: &WorkerConfig, roles: &str| {
            config.capacity(roles.parse::<RoleSet>().unwrap().0, &geometry)
        };
        assert_eq!(capacity(&config, "attention,experts"), 1000);
        assert_eq!(capacity(&config, "attention"), 0);
        assert_eq!(capacity(&config, "experts"), 1000 + 3 * page_bytes);
        config.roles = "experts".parse().unwrap();
        assert_eq!(capacity(&config, "experts"), 1000);
        assert_eq!(capacity(&config, "attention,experts"), 1000);
    }

    #[test]
    fn the_machine_says_how_much_memory_it_has() {
        assert_eq!(
            total_of("MemFree: 1 kB\nMemTotal:       2048 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(total_of(""), None);
        assert!(machine_memory() > 0);
    }
}
