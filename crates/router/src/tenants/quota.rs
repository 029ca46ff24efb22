//! What tenants have used lately of what they may use per minute. Each router counts for itself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::bucket::Bucket;
use super::{TenantName, Tenants};
use crate::error::{ApiError, ErrorKind};

/// Tenants whose use is remembered; those whose buckets are full are forgotten first, which changes nothing.
const TENANTS_MAX: usize = 16_384;

/// The quotas of all tenants.
#[derive(Debug)]
pub(crate) struct Quotas {
    tenants: Arc<Tenants>,
    used: Mutex<BTreeMap<TenantName, Used>>,
}

/// The buckets of one tenant; none where there is no limit.
#[derive(Debug)]
struct Used {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// The tokens of a prompt that were taken from a quota; they go back when it is dropped before it is served.
#[derive(Debug)]
pub(crate) struct Reserved {
    quotas: Arc<Quotas>,
    tenant: TenantName,
    num_tokens: u64,
}

impl Reserved {
    /// The prompt runs: its tokens are used.
    pub(crate) fn served(mut self) {
        self.num_tokens = 0;
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.num_tokens > 0 {
            self.quotas.give_back(&self.tenant, self.num_tokens);
        }
    }
}

/// What is left of one quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Left {
    pub(crate) limit: u64,
    pub(crate) remaining: u64,
    /// Until all of it is there again.
    pub(crate) reset: Duration,
}

impl Quotas {
    pub(crate) fn new(tenants: Arc<Tenants>) -> Self {
        Self {
            tenants,
            used: Mutex::default(),
        }
    }

    /// Counts a request, or says when the tenant may ask again.
    pub(crate) fn request(&self, tenant: &TenantName) -> Result<(), ApiError> {
        let now = Instant::now();
        self.with(tenant, now, |used| {
            if let Some(tokens) = &mut used.tokens {
                let wait = tokens.empty_for(now);
                if !wait.is_zero() {
                    return Err(exceeded("tokens_per_minute", wait));
                }
            }
            match &mut used.requests {
                Some(requests) => {
                    (requests.take(1, now)).map_err(|wait| exceeded("requests_per_minute", wait))
                }
                None => Ok(()),
            }
        })
    }

    /// Counts the tokens of a prompt that is to run, or says when there will be enough.
    pub(crate) fn prompt(
        self: &Arc<Self>,
        tenant: &TenantName,
        num_tokens: u64,
    ) -> Result<Reserved, ApiError> {
        let now = Instant::now();
        self.with(tenant, now, |used| match &mut used.tokens {
            Some(tokens) => {
                (tokens.take(num_tokens, now)).map_err(|wait| exceeded("tokens_per_minute", wait))
            }
            None => Ok(()),
        })?;
        Ok(Reserved {
            quotas: Arc::clone(self),
            tenant: tenant.clone(),
            num_tokens,
        })
    }

    fn give_back(&self, tenant: &TenantName, num_tokens: u64) {
        let now = Instant::now();
        self.with(tenant, now, |used| {
            if let Some(tokens) = &mut used.tokens {
                tokens.give_back(num_tokens, now);
            }
        });
    }

    /// Counts tokens that were generated.
    pub(crate) fn generated(&self, tenant: &TenantName, num_tokens: u64) {
        let now = Instant::now();
        self.with(tenant, now, |used| {
            if let Some(tokens) = &mut used.tokens {
                tokens.charge(num_tokens, now);
            }
        });
    }

    /// What is left of requests and of tokens, where there are limits.
    pub(crate) fn left(&self, tenant: &TenantName) -> [Option<Left>; 2] {
        let limits = self.tenants.limits(tenant);
        if limits.requests_per_minute.is_none() && limits.tokens_per_minute.is_none() {
            return [None, None];
        }
        let now = Instant::now();
        let left = |limit: Option<u64>, bucket: &mut Option<Bucket>| {
            let bucket = bucket.as_mut()?;
            Some(Left {
                limit: limit?,
                remaining: bucket.left(now),
                reset: bucket.full_in(now),
            })
        };
        self.with(tenant, now, |used| {
            [
                left(limits.requests_per_minute, &mut used.requests),
                left(limits.tokens_per_minute, &mut used.tokens),
            ]
        })
    }

    fn with<T>(&self, tenant: &TenantName, now: Instant, act: impl FnOnce(&mut Used) -> T) -> T {
        let mut all = self.used.lock();
        if let Some(used) = all.get_mut(tenant) {
            return act(used);
        }
        let limits = self.tenants.limits(tenant);
        let bucket = |limit: Option<u64>| limit.map(|per_minute| Bucket::new(per_minute, now));
        let mut used = Used {
            requests: bucket(limits.requests_per_minute),
            tokens: bucket(limits.tokens_per_minute),
        };
        if used.requests.is_none() && used.tokens.is_none() {
            return act(&mut used);
        }
        if all.len() >= TENANTS_MAX {
            all.retain(|_, used| !used.is_full(now));
        }
        let done = act(&mut used);
        // Who comes when all others are in use has a fresh bucket each time: a limit of memory goes before one
        // of use, and only an issuer of tokens can invent so many tenants.
        if all.len() < TENANTS_MAX {
            all.insert(tenant.clone(), used);
        }
        done
    }
}

impl Used {
    fn is_full(&mut self, now: Instant) -> bool {
        let is_full =
            |bucket: &mut Option<Bucket>| bucket.as_mut().is_none_or(|b| b.full_in(now).is_zero());
        is_full(&mut self.requests) && is_full(&mut self.tokens)
    }
}

/// The refusal of a request beyond a quota.
fn exceeded(quota: &str, wait: Duration) -> ApiError {
    // In whole milliseconds, so that who comes back then is not early.
    let wait = Duration::from_millis(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX)) + MILLI;
    let shown = humantime::format_duration(wait);
    let message = format!("this tenant has used up its {quota}; there is more in {shown}");
    ApiError {
        retry_after: Some(wait),
        ..ApiError::new(ErrorKind::RateLimited, message)
    }
}

const MILLI: Duration = Duration::from_millis(1);

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::tenants::config::TenantConfig;

    fn quotas(requests: Option<u64>, tokens: Option<u64>) -> Arc<Quotas> {
        let defaults = TenantConfig {
            requests_per_minute: requests,
            tokens_per_minute: tokens,
            ..TenantConfig::default()
        };
        let tenants = Tenants::new(&defaults, &BTreeMap::new(), Vec::new());
        Arc::new(Quotas::new(Arc::new(tenants)))
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_beyond_the_quota_is_told_when_to_come_back() {
        let (quotas, tenant) = (quotas(Some(2), None), TenantName::default());
        quotas.request(&tenant).unwrap();
        quotas.request(&tenant).unwrap();
        let refused = quotas.request(&tenant).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::RateLimited);
        let wait = refused.retry_after.unwrap();
        assert_eq!(wait, Duration::from_millis(30_001));
        let [requests, tokens] = quotas.left(&tenant);
        assert_eq!(
            (requests.unwrap().limit, requests.unwrap().remaining),
            (2, 0)
        );
        assert_eq!(tokens, None);
        // Others have their own.
        quotas.request(&TenantName::new("other").unwrap()).unwrap();
        advance(wait).await;
        quotas.request(&tenant).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn generated_tokens_count_and_leave_a_debt() {
        let (quotas, tenant) = (quotas(None, Some(600)), TenantName::default());
        quotas.request(&tenant).unwrap();
        quotas.prompt(&tenant, 500).unwrap().served();
        assert!(quotas.prompt(&tenant, 200).is_err());
        quotas.generated(&tenant, 400);
        let refused = quotas.request(&tenant).unwrap_err();
        assert!(refused.message.contains("tokens_per_minute"), "{refused}");
        advance(refused.retry_after.unwrap()).await;
        quotas.request(&tenant).unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn the_tokens_of_a_prompt_that_is_not_served_go_back() {
        let (quotas, tenant) = (quotas(None, Some(600)), TenantName::default());
        let reserved = quotas.prompt(&tenant, 500).unwrap();
        assert!(quotas.prompt(&tenant, 200).is_err());
        drop(reserved);
        let left = |quotas: &Quotas| quotas.left(&tenant)[1].unwrap().remaining;
        assert_eq!(left(&quotas), 600);
        quotas.prompt(&tenant, 600).unwrap().served();
        assert_eq!(left(&quotas), 0);
        // One that is larger than the quota left a debt, which goes too.
        advance(Duration::from_secs(60)).await;
        drop(quotas.prompt(&tenant, 6000).unwrap());
        assert_eq!(left(&quotas), 600);
    }

    #[tokio::test(start_paused = true)]
    async fn tenants_without_limits_take_no_memory_and_many_with_limits_a_bounded_one() {
        let free = quotas(None, None);
        free.request(&TenantName::default()).unwrap();
        assert!(free.used.lock().is_empty());
        let limited = quotas(Some(10), None);
        for i in 0..TENANTS_MAX + 10 {
            let tenant = TenantName::new(&format!("t{i}")).unwrap();
            limited.request(&tenant).unwrap();
        }
        assert_eq!(limited.used.lock().len(), TENANTS_MAX);
        advance(Duration::from_secs(60)).await;
        limited.request(&TenantName::default()).unwrap();
        assert_eq!(limited.used.lock().len(), 1);
    }
}
