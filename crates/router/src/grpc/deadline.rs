//! A caller's deadline: until when it wants an answer, as the header `grpc-timeout` says it.
//!
//! Format: github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, "Timeout".

use std::future::Future;
use std::time::Duration;

use http::HeaderMap;
use tokio::time::{Instant, timeout_at};
use tonic::metadata::MetadataMap;

use crate::error::{ApiError, ErrorKind};

const HEADER: &str = "grpc-timeout";
/// Digits of a timeout, as in the specification.
const DIGITS_MAX: usize = 8;
/// A method's own refusal, which is counted, must be out before the layer around all methods gives up.
const MARGIN: Duration = Duration::from_millis(5);
/// Longest deadline: more is none.
const MAX: Duration = Duration::from_secs(24 * 3600);

/// Until when an answer is wanted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    pub(super) fn of(metadata: &MetadataMap) -> Result<Self, ApiError> {
        let Some(value) = metadata.get(HEADER) else {
            return Ok(Self(None));
        };
        let parsed = value.to_str().ok().and_then(parse);
        let Some(wait) = parsed else {
            let message =
                format!("{HEADER} must be 1 to {DIGITS_MAX} digits and one of H, M, S, m, u, n");
            return Err(ApiError::invalid(HEADER, message));
        };
        let at = Instant::now() + wait.min(MAX).saturating_sub(MARGIN);
        Ok(Self((wait < MAX).then_some(at)))
    }

    /// The deadline of a call whose method may not look at it. One that nobody can read is the method's to refuse.
    pub(super) fn of_call(headers: &HeaderMap) -> Self {
        let wait = headers.get(HEADER).and_then(|v| v.to_str().ok());
        let wait = wait.and_then(parse).filter(|wait| *wait < MAX);
        Self(wait.map(|wait| Instant::now() + wait))
    }

    /// What `work` says, if it says it in time.
    pub(super) async fn meet<T>(
        self,
        work: impl Future<Output = Result<T, ApiError>>,
    ) -> Result<T, ApiError> {
        let Some(at) = self.0 else {
            return work.await;
        };
        timeout_at(at, work).await.unwrap_or_else(|_elapsed| {
            Err(ApiError::new(
                ErrorKind::Deadline,
                "the caller's deadline has passed",
            ))
        })
    }
}

fn parse(text: &str) -> Option<Duration> {
    let (unit_at, unit) = text.char_indices().next_back()?;
    let digits = &text[..unit_at];
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_number || digits.len() > DIGITS_MAX {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(n * 3600),
        'M' => Duration::from_secs(n * 60),
        'S' => Duration::from_secs(n),
        'm' => Duration::from_millis(n),
        'u' => Duration::from_micros(n),
        'n' => Duration::from_nanos(n),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_digits_and_a_unit() {
        let cases = [
            ("1H", Some(Duration::from_secs(3600))),
            ("2M", Some(Duration::from_secs(120))),
            ("99999999S", Some(Duration::from_secs(99_999_999))),
            ("250m", Some(Duration::from_millis(250))),
            ("7u", Some(Duration::from_micros(7))),
            ("0n", Some(Duration::ZERO)),
            ("", None),
            ("S", None),
            ("1", None),
            ("1s", None),
            ("-1S", None),
            ("1.5S", None),
            ("100000000S", None),
            ("1é", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_comes_too_late_is_refused() {
        let metadata = |value: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert(HEADER, value.parse().unwrap());
            metadata
        };
        let late = || async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            Ok(7)
        };
        let of = |value: &str| Deadline::of(&metadata(value));
        assert_eq!(of("3S").unwrap().meet(late()).await, Ok(7));
        let error = of("1S").unwrap().meet(late()).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Deadline);
        let error = of("0n").unwrap().meet(late()).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Deadline);
        assert_eq!(of("99999999H").unwrap().meet(late()).await, Ok(7));
        assert_eq!(of("soon").unwrap_err().param.as_deref(), Some(HEADER));
        let none = Deadline::of(&MetadataMap::new()).unwrap();
        assert_eq!(none.meet(late()).await, Ok(7));
    }
}
