//! The settings of one router, checked once before a port is used. Never read again later.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::num::NonZeroUsize;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tramontane_coordination::PlannerConfig;
use tramontane_runtime::duration_text;
use tramontane_types::SEGMENTS_PER_EXPERT;

use crate::Error;
use crate::admission::AdmissionLimits;
use crate::auth::config::AuthConfig;
use crate::kept::KeepLimits;
use crate::tenants::QueueMax;
use crate::tenants::config::{self as tenants, TenantConfig};

/// Sequences that run at once on all workers together, as seen by this router.
pub const SEQUENCES_MAX: usize = 1024;
/// Requests that wait for a place among them.
pub const QUEUE_MAX: usize = 1024;
/// Longest wait in the queue: most clients' own patience is longer, and trying elsewhere is cheap.
pub const QUEUE_WAIT: Duration = Duration::from_secs(60);
/// Memory of the requests that wait for a place or for a worker.
pub const QUEUE_BYTES_MAX: usize = 256 << 20;
/// A request that waits so long goes with those of the next higher class: the lowest is behind nobody after two
/// thirds of the longest wait.
pub const PRIORITY_AGE: Duration = Duration::from_secs(20);
/// Longest wait for the first worker: about what a client waits for an answer to begin.
pub const HOLD_WAIT: Duration = Duration::from_secs(60);
/// Largest request body and gRPC message.
pub const BODY_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Longest time for a request body to arrive.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for running requests to end after the stop signal.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(120);
/// Between "not ready" and refusing connections: time for load balancers to look.
pub const UNREADY_GRACE: Duration = Duration::from_millis(500);
/// How long the planner's leadership outlives its holder.
pub const ELECTION_TTL: Duration = Duration::from_secs(5);
/// How long a running request waits for a worker to go on with.
pub const FAILOVER_WAIT: Duration = Duration::from_secs(15);
/// A worker that says nothing about a sequence for this long has lost it.
pub const STREAM_SILENCE_MAX: Duration = Duration::from_secs(300);
/// Attempts per sequence without a new token.
pub const ATTEMPTS_MAX: u32 = 3;
/// A client that reads nothing of its waiting answer for this long is cut off: it holds places that others
/// wait for. A mobile client that loses its network for half a minute still gets the rest.
pub const CLIENT_STALL_MAX: Duration = Duration::from_secs(60);
/// How long an answer to a request with an idempotency key is made while nobody reads it: a client that lost
/// its network for half a minute, or moved to another process, still finds it.
pub const ORPHAN_GRACE: Duration = Duration::from_secs(30);
/// How long a whole answer is kept for retries of its request: official clients have given up by then.
pub const KEEP_ANSWERS: Duration = Duration::from_secs(300);
/// Answers that are kept.
pub const KEPT_ANSWERS_MAX: usize = 4096;
/// Memory that they may take together.
pub const KEPT_BYTES_MAX: usize = 256 << 20;
/// Pause between comments that keep an event stream open.
pub const SSE_KEEPALIVE: Duration = Duration::from_secs(15);
/// Longest of all configured times: a day is a typing error.
const TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Largest count: more is a typing error.
const COUNT_MAX: usize = 1 << 24;

/// How an attention worker is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PolicyKind {
    /// Longest cached prefix first, then least load.
    #[default]
    PrefixThenLoad,
    /// Fewest sequences.
    LeastLoad,
    /// One after the other.
    RoundRobin,
}

/// The settings of one router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RouterConfig {
    /// Name of this router among those that may hold the planner.
    pub id: String,
    /// How an attention worker is chosen.
    pub policy: PolicyKind,
    /// Whether this router may hold the planner.
    pub planner: bool,
    /// Workers that the first placement waits for.
    pub min_workers: NonZeroUsize,
    /// Workers that hold each expert, where the operator has not said otherwise.
    pub replicas: NonZeroUsize,
    /// Slices that each expert is cut into, where the operator has not said otherwise; chosen by the planner when
    /// absent.
    pub slices_per_expert: Option<u8>,
    /// How long membership must rest before a plan includes newcomers.
    #[serde(with = "duration_text")]
    pub settle_time: Duration,
    /// How long a worker may load before it is planned out.
    #[serde(with = "duration_text")]
    pub load_timeout: Duration,
    /// Sequences that run at once.
    pub sequences_max: usize,
    /// Requests that may wait; further ones are refused with 429.
    pub queue_max: usize,
    /// Longest wait in the queue.
    #[serde(with = "duration_text")]
    pub queue_wait: Duration,
    /// Memory of those that wait, in bytes.
    pub queue_bytes_max: usize,
    /// A request that waits so long goes with those of the next higher class.
    #[serde(with = "duration_text")]
    pub priority_age: Duration,
    /// Longest wait of a request that nobody can serve yet; zero refuses it at once.
    #[serde(with = "duration_text")]
    pub hold_wait: Duration,
    /// Largest request body and gRPC message in bytes.
    pub body_bytes_max: usize,
    /// Longest time for a request body to arrive.
    #[serde(with = "duration_text")]
    pub body_timeout: Duration,
    /// Open connections at the HTTP port, and as many at the gRPC port.
    pub connections_max: usize,
    /// Longest drain, from the signal to the end.
    #[serde(with = "duration_text")]
    pub drain_deadline: Duration,
    /// Between "not ready" and refusing connections.
    #[serde(with = "duration_text")]
    pub unready_grace: Duration,
    /// How long the planner's leadership outlives its holder.
    #[serde(with = "duration_text")]
    pub election_ttl: Duration,
    /// How long a running request waits for a worker to go on with.
    #[serde(with = "duration_text")]
    pub failover_wait: Duration,
    /// A worker that says nothing about a sequence for this long has lost it.
    #[serde(with = "duration_text")]
    pub stream_silence_max: Duration,
    /// Attempts per sequence without a new token.
    pub attempts_max: u32,
    /// A client that reads nothing of its waiting answer for this long is cut off.
    #[serde(with = "duration_text")]
    pub client_stall_max: Duration,
    /// How long an answer to a request with an idempotency key is made while nobody reads it.
    #[serde(with = "duration_text")]
    pub orphan_grace: Duration,
    /// How long a whole answer is kept for retries of its request.
    #[serde(with = "duration_text")]
    pub keep_answers: Duration,
    /// Answers to requests with an idempotency key that are made or kept.
    pub kept_answers_max: usize,
    /// Memory that they may take together, in bytes.
    pub kept_bytes_max: usize,
    /// Pause between comments that keep an event stream open.
    #[serde(with = "duration_text")]
    pub sse_keepalive: Duration,
    /// Who may ask: a section of its own.
    #[serde(skip)]
    pub auth: AuthConfig,
    /// What tenants may use, likewise.
    #[serde(skip)]
    pub tenant_defaults: TenantConfig,
    /// What each tenant may use, likewise.
    #[serde(skip)]
    pub tenants: BTreeMap<String, TenantConfig>,
}

impl Default for RouterConfig {
    fn default() -> Self {
        let planner = PlannerConfig::default();
        Self {
            id: "router".to_owned(),
            policy: PolicyKind::default(),
            planner: true,
            min_workers: planner.min_workers,
            replicas: planner.replicas,
            slices_per_expert: planner.slices_per_expert,
            settle_time: planner.settle_time,
            load_timeout: planner.load_timeout,
            sequences_max: SEQUENCES_MAX,
            queue_max: QUEUE_MAX,
            queue_wait: QUEUE_WAIT,
            queue_bytes_max: QUEUE_BYTES_MAX,
            priority_age: PRIORITY_AGE,
            hold_wait: HOLD_WAIT,
            body_bytes_max: BODY_BYTES_MAX,
            body_timeout: BODY_TIMEOUT,
            connections_max: tramontane_runtime::tls::CONNECTIONS_MAX,
            drain_deadline: DRAIN_DEADLINE,
            unready_grace: UNREADY_GRACE,
            election_ttl: ELECTION_TTL,
            failover_wait: FAILOVER_WAIT,
            stream_silence_max: STREAM_SILENCE_MAX,
            attempts_max: ATTEMPTS_MAX,
            client_stall_max: CLIENT_STALL_MAX,
            orphan_grace: ORPHAN_GRACE,
            keep_answers: KEEP_ANSWERS,
            kept_answers_max: KEPT_ANSWERS_MAX,
            kept_bytes_max: KEPT_BYTES_MAX,
            sse_keepalive: SSE_KEEPALIVE,
            auth: AuthConfig::default(),
            tenant_defaults: TenantConfig::default(),
            tenants: BTreeMap::new(),
        }
    }
}

impl RouterConfig {
    /// The planner's part.
    #[must_use]
    pub const fn planner(&self) -> PlannerConfig {
        PlannerConfig {
            min_workers: self.min_workers,
            replicas: self.replicas,
            slices_per_expert: self.slices_per_expert,
            settle_time: self.settle_time,
            load_timeout: self.load_timeout,
        }
    }

    /// What is kept for requests with an idempotency key.
    pub(crate) const fn keep_limits(&self) -> KeepLimits {
        KeepLimits {
            answers_max: self.kept_answers_max,
            bytes_max: self.kept_bytes_max,
            keep: self.keep_answers,
            grace: self.orphan_grace,
            stall: self.client_stall_max,
        }
    }

    /// How much may run and wait.
    pub(crate) const fn admission(&self) -> AdmissionLimits {
        AdmissionLimits {
            sequences_max: self.sequences_max,
            is_shared: self.auth.is_on(),
            queue: self.queue(),
            queue_wait: self.queue_wait,
            age: self.priority_age,
        }
    }

    /// How much may wait, for a place or for a worker.
    pub(crate) const fn queue(&self) -> QueueMax {
        QueueMax {
            requests: self.queue_max,
            bytes: self.queue_bytes_max,
        }
    }

    /// Checks every value that has a rule.
    ///
    /// # Errors
    /// [`Error::Config`] with the first key that breaks its rule, the rule, and the value.
    pub fn validate(&self) -> Result<(), Error> {
        if self.id.is_empty() || self.id.len() > 128 {
            return Err(refuse("id", "1 to 128 bytes", &self.id));
        }
        let slices = self.slices_per_expert;
        if let Some(slices) = slices.filter(|s| !(1..=SEGMENTS_PER_EXPERT).contains(s)) {
            return Err(refuse("slices_per_expert", "1 to 8", slices));
        }
        let counts = [
            ("sequences_max", self.sequences_max, 1),
            ("queue_max", self.queue_max, 0),
            ("body_bytes_max", self.body_bytes_max, 1024),
            ("connections_max", self.connections_max, 1),
            ("min_workers", self.min_workers.get(), 1),
            ("replicas", self.replicas.get(), 1),
            ("attempts_max", self.attempts_max as usize, 1),
            ("kept_answers_max", self.kept_answers_max, 1),
            ("kept_bytes_max", self.kept_bytes_max, 1 << 20),
            ("queue_bytes_max", self.queue_bytes_max, 1 << 20),
        ];
        for (key, got, min) in counts {
            // Bytes may be more than any other count.
            let max = match key {
                "body_bytes_max" => 1 << 30,
                "kept_bytes_max" | "queue_bytes_max" => 1 << 40,
                _ => COUNT_MAX,
            };
            if got < min || got > max {
                return Err(refuse(key, &format!("between {min} and {max}"), got));
            }
        }
        self.auth.validate()?;
        tenants::validate(&self.tenant_defaults, &self.tenants)?;
        self.validate_times()
    }

    fn validate_times(&self) -> Result<(), Error> {
        let second = Duration::from_secs(1);
        let milli = Duration::from_millis(1);
        let times = [
            ("queue_wait", self.queue_wait, Duration::ZERO),
            ("priority_age", self.priority_age, milli),
            ("hold_wait", self.hold_wait, Duration::ZERO),
            ("body_timeout", self.body_timeout, milli),
            ("drain_deadline", self.drain_deadline, Duration::ZERO),
            ("unready_grace", self.unready_grace, Duration::ZERO),
            ("settle_time", self.settle_time, Duration::ZERO),
            ("load_timeout", self.load_timeout, milli),
            ("election_ttl", self.election_ttl, second),
            ("failover_wait", self.failover_wait, Duration::ZERO),
            ("stream_silence_max", self.stream_silence_max, milli),
            ("client_stall_max", self.client_stall_max, milli),
            ("orphan_grace", self.orphan_grace, Duration::ZERO),
            ("keep_answers", self.keep_answers, Duration::ZERO),
            ("sse_keepalive", self.sse_keepalive, milli),
        ];
        for (key, got, min) in times {
            if got < min || got > TIME_MAX {
                let (min, max) = (
                    humantime::format_duration(min),
                    humantime::format_duration(TIME_MAX),
                );
                let rule = format!("between {min} and {max}");
                return Err(refuse(key, &rule, humantime::format_duration(got)));
            }
        }
        Ok(())
    }
}

fn refuse(key: &'static str, rule: &str, got: impl Display) -> Error {
    Error::Config {
        key,
        rule: rule.to_owned(),
        got: got.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut RouterConfig)) -> String {
        let mut config = RouterConfig::default();
        config.validate().unwrap();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    }

    #[test]
    fn a_broken_rule_is_named_with_key_and_value() {
        assert_eq!(
            refused(|c| c.sequences_max = 0),
            "router.sequences_max must be between 1 and 16777216, got 0"
        );
        assert_eq!(
            refused(|c| c.election_ttl = Duration::from_millis(5)),
            "router.election_ttl must be between 1s and 1day, got 5ms"
        );
        assert_eq!(
            refused(|c| c.slices_per_expert = Some(9)),
            "router.slices_per_expert must be 1 to 8, got 9"
        );
        assert_eq!(
            refused(|c| c.id.clear()),
            "router.id must be 1 to 128 bytes, got "
        );
    }

    #[test]
    fn settings_survive_their_text_form_and_unknown_keys_are_refused() {
        let text = serde_json::to_string(&RouterConfig::default()).unwrap();
        assert!(text.contains("\"policy\":\"prefix_then_load\""), "{text}");
        assert!(text.contains("\"drain_deadline\":\"2m\""), "{text}");
        let back: RouterConfig = serde_json::from_str(&text).unwrap();
        assert_eq!(back, RouterConfig::default());
        let unknown = serde_json::from_str::<RouterConfig>(r#"{"polici": "round_robin"}"#);
        assert!(unknown.unwrap_err().to_string().contains("`polici`"));
    }
}
