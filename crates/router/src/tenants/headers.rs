//! What a tenant has left of its quotas, as headers of an answer in the form of the OpenAI API.

use std::time::Duration;

use http::header::{HeaderName, HeaderValue};

use super::Left;

/// At most three headers per quota.
pub(crate) type RateHeaders = Vec<(HeaderName, HeaderValue)>;

const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// The headers of what is left of requests and tokens; none for what has no limit.
pub(crate) fn rate_headers(left: [Option<Left>; 2]) -> RateHeaders {
    let mut headers = Vec::new();
    for (left, names) in left.into_iter().zip([REQUESTS, TOKENS]) {
        let Some(left) = left else { continue };
        let values = [
            HeaderValue::from(left.limit),
            HeaderValue::from(left.remaining),
            reset(left.reset),
        ];
        headers.extend(names.into_iter().zip(values));
    }
    headers
}

/// As in the OpenAI API: `250ms`, `1.5s`, `6m0s`.
fn reset(after: Duration) -> HeaderValue {
    let millis = after.as_millis();
    let text = match millis {
        0..1000 => format!("{millis}ms"),
        1000..60_000 => format!("{}s", millis as f64 / 1000.0),
        _ => format!("{}m{}s", after.as_secs() / 60, after.as_secs() % 60),
    };
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("0ms"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_has_a_limit_has_headers_and_times_are_written_as_clients_know_them() {
        let left = |millis| Left {
            limit: 60,
            remaining: 59,
            reset: Duration::from_millis(millis),
        };
        let text = |headers: RateHeaders| {
            let line = |(name, value): (HeaderName, HeaderValue)| {
                format!("{name}: {}", value.to_str().unwrap())
            };
            headers.into_iter().map(line).collect::<Vec<_>>()
        };
        assert!(rate_headers([None, None]).is_empty());
        let expected = [
            "x-ratelimit-limit-requests: 60",
            "x-ratelimit-remaining-requests: 59",
            "x-ratelimit-reset-requests: 1.5s",
        ];
        assert_eq!(text(rate_headers([Some(left(1500)), None])), expected);
        let both = text(rate_headers([Some(left(0)), Some(left(361_000))]));
        assert_eq!(both[2], "x-ratelimit-reset-requests: 0ms");
        assert_eq!(both[5], "x-ratelimit-reset-tokens: 6m1s");
    }
}
