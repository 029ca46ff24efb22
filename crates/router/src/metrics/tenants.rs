//! Metrics by tenant, and of those who were not let in. The tenants that are named are those of the configuration.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::error::ErrorKind;
use crate::tenants::{TenantName, Tenants};

/// Metrics by tenant.
#[derive(Debug)]
pub(crate) struct TenantMetrics {
    tenants: Arc<Tenants>,
    prompt_tokens: Family<TenantLabels, Counter>,
    generated_tokens: Family<TenantLabels, Counter>,
    admitted: Family<TenantLabels, Counter>,
    refusals: Family<TenantRefusalLabels, Counter>,
    not_let_in: Family<ReasonLabels, Counter>,
    held: Gauge,
    waiting_bytes: Gauge,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantLabels {
    tenant: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TenantRefusalLabels {
    tenant: String,
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabels {
    reason: &'static str,
}

impl TenantMetrics {
    pub(super) fn new(tenants: Arc<Tenants>) -> Self {
        Self {
            tenants,
            prompt_tokens: Family::default(),
            generated_tokens: Family::default(),
            admitted: Family::default(),
            refusals: Family::default(),
            not_let_in: Family::default(),
            held: Gauge::default(),
            waiting_bytes: Gauge::default(),
        }
    }

    pub(super) fn register(&self, own: &mut Registry) {
        own.register(
            "tenant_prompt_tokens",
            "Prompt tokens of admitted requests",
            self.prompt_tokens.clone(),
        );
        own.register(
            "tenant_generated_tokens",
            "Tokens generated so far",
            self.generated_tokens.clone(),
        );
        own.register(
            "tenant_admitted",
            "Requests that began to run",
            self.admitted.clone(),
        );
        own.register(
            "tenant_refusals",
            "Requests refused before they ran",
            self.refusals.clone(),
        );
        own.register(
            "not_let_in",
            "Requests of nobody who is known",
            self.not_let_in.clone(),
        );
        own.register(
            "held_requests",
            "Requests that wait for any worker",
            self.held.clone(),
        );
        own.register(
            "queue_bytes",
            "Memory of requests that wait for a place",
            self.waiting_bytes.clone(),
        );
    }

    /// Sets the gauges.
    pub(super) fn set(&self, held: usize, waiting_bytes: usize) {
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.held.set(count(held));
        self.waiting_bytes.set(count(waiting_bytes));
    }

    fn labels(&self, tenant: &TenantName) -> TenantLabels {
        TenantLabels {
            tenant: self.tenants.label(tenant).to_owned(),
        }
    }

    /// A request begins to run.
    pub(crate) fn admitted(&self, tenant: &TenantName, prompt_tokens: u64) {
        let labels = self.labels(tenant);
        self.admitted.get_or_create(&labels).inc();
        self.prompt_tokens
            .get_or_create(&labels)
            .inc_by(prompt_tokens);
    }

    /// Tokens came.
    pub(crate) fn generated(&self, tenant: &TenantName, num_tokens: u32) {
        let counter = self.generated_tokens.get_or_create(&self.labels(tenant));
        counter.inc_by(num_tokens.into());
    }

    /// A request is refused before it ran.
    pub(crate) fn refused(&self, tenant: &TenantName, kind: ErrorKind) {
        let labels = TenantRefusalLabels {
            tenant: self.tenants.label(tenant).to_owned(),
            reason: kind.reason(),
        };
        self.refusals.get_or_create(&labels).inc();
    }

    /// Nobody who is known asked.
    pub(crate) fn not_let_in(&self, reason: &'static str) {
        self.not_let_in
            .get_or_create(&ReasonLabels { reason })
            .inc();
    }
}
