//! What the headers of a completion request ask for beside its body: to go on after an event of an answer
//! that broke off, or to be the same request as an earlier one. Decides nothing about the answer itself.

use std::fmt;
use std::str::FromStr;

use http::header::{HeaderMap, HeaderName};
use sha2::{Digest as _, Sha256};
use tramontane_coordination::Version;

use crate::answer_id::AnswerId;
use crate::error::{ApiError, ErrorKind};
use crate::kept::{BodyDigest, KeyDigest};
use crate::request::CHOICES_MAX;
use crate::tenants::TenantName;

/// The id of the last event that a client has seen, as in the HTML standard.
const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Draft-ietf-httpapi-idempotency-key-header, and what official clients send.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Longest idempotency key: official clients send about 60 bytes.
const KEY_BYTES_MAX: usize = 256;
/// Longest event id: the positions of all answers that a request may have, of ten digits each.
const EVENT_ID_BYTES_MAX: usize = 64 + CHOICES_MAX * 11;
/// What a position says after the last event with content.
const END: &str = "end";

/// What the headers ask for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) resume: Option<EventId>,
    pub(crate) key: Option<AskedKey>,
}

/// An idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AskedKey {
    pub(crate) digest: KeyDigest,
    pub(crate) answer: AnswerId,
}

impl Asked {
    /// Reads and checks the headers.
    pub(crate) fn read(
        headers: &HeaderMap,
        tenant: &TenantName,
        unix_seconds: u64,
    ) -> Result<Self, ApiError> {
        let resume = match one(headers, &LAST_EVENT_ID, EVENT_ID_BYTES_MAX)? {
            Some(text) => Some(text.parse::<EventId>()?),
            None => None,
        };
        let key = one(headers, &IDEMPOTENCY_KEY, KEY_BYTES_MAX)?.map(|key| AskedKey {
            digest: key_digest(tenant, key),
            answer: AnswerId::of_key(key, unix_seconds),
        });
        if let (Some(resume), Some(key)) = (&resume, &key)
            && !resume.answer.has_origin_of(key.answer)
        {
            let message =
                "last-event-id must be of an answer to a request with this idempotency-key";
            return Err(ApiError::invalid(LAST_EVENT_ID.as_str(), message));
        }
        Ok(Self { resume, key })
    }

    /// The name of the answer that is asked for, if it has one already.
    pub(crate) fn answer(&self) -> Option<AnswerId> {
        let resumed = self.resume.as_ref().map(|event| event.answer);
        resumed.or(self.key.map(|key| key.answer))
    }
}

/// The value of a header that may be there once, of visible characters.
fn one<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
    bytes_max: usize,
) -> Result<Option<&'a str>, ApiError> {
    let refuse = |got: String| {
        let message =
            format!("{name} must be once there, of 1 to {bytes_max} visible characters, got {got}");
        Err(ApiError::invalid(name.as_str(), message))
    };
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return refuse("several".to_owned());
    }
    let Some(text) = value.to_str().ok().map(str::trim) else {
        return refuse("others".to_owned());
    };
    if text.is_empty() || text.len() > bytes_max {
        return refuse(text.len().to_string());
    }
    Ok(Some(text))
}

/// Other tenants have other answers under the same key.
fn key_digest(tenant: &TenantName, key: &str) -> KeyDigest {
    let mut digest = Sha256::new();
    digest.update(Sha256::digest(tenant.as_str().as_bytes()));
    digest.update(key.as_bytes());
    KeyDigest(digest.finalize().into())
}

impl BodyDigest {
    /// Of a request for `route`.
    pub(crate) fn of(route: &str, body: &[u8]) -> Self {
        let mut digest = Sha256::new();
        digest.update(Sha256::digest(route.as_bytes()));
        digest.update(body);
        Self(digest.finalize().into())
    }
}

/// A few bits of everything that decides an answer beside its name: route, body, weights, numeric class.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tag(u32);

impl Tag {
    pub(crate) fn of(body: BodyDigest, version: &Version) -> Self {
        let mut digest = Sha256::new();
        digest.update(body.0);
        digest.update(Sha256::digest(version.model.as_bytes()));
        digest.update(version.numeric_class.as_bytes());
        let digest: [u8; 32] = digest.finalize().into();
        let [a, b, c, d, ..] = digest;
        Self(u32::from_be_bytes([a, b, c, d]))
    }
}

/// How much of an answer a client has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// Of each choice so many units. The first is its opening, then comes one per token, then the text that
    /// was held back when it ended, then its finish reason.
    Units(Vec<u32>),
    /// Everything but the mark at the end.
    End,
}

/// The id of one event: whose it is, and what a client that has seen it has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EventId {
    pub(crate) answer: AnswerId,
    pub(crate) tag: Tag,
    pub(crate) position: Position,
}

impl EventId {
    /// The one of `versions` that the answer to a request with `body` began with. Refuses to go on with
    /// another request's answer, or with other weights.
    pub(crate) fn version(
        &self,
        body: BodyDigest,
        versions: impl IntoIterator<Item = Version>,
    ) -> Result<Version, ApiError> {
        let mut versions = versions.into_iter();
        let found = versions.find(|version| Tag::of(body, version) == self.tag);
        found.ok_or_else(|| {
            mismatch(
                "last-event-id is of another request, expected the same route and the same body byte for \
                 byte, or no worker has the weights any more that the answer began with",
            )
        })
    }

    /// Refuses the positions of another number of choices.
    pub(crate) fn check_choices(&self, num_choices: usize) -> Result<(), ApiError> {
        match &self.position {
            Position::Units(units) if units.len() != num_choices => {
                let got = units.len();
                let message = format!(
                    "last-event-id must have the positions of {num_choices} choices, got {got}"
                );
                Err(ApiError::invalid(LAST_EVENT_ID.as_str(), message))
            }
            _ => Ok(()),
        }
    }
}

/// Why an answer cannot go on here.
pub(crate) fn mismatch(message: &str) -> ApiError {
    ApiError::new(ErrorKind::ResumeMismatch, message).at(LAST_EVENT_ID.as_str())
}

/// The last unit of a choice of so many tokens, after its opening, its tokens and the text that was held back.
pub(crate) const fn unit_of_finish(num_tokens: u32) -> u32 {
    num_tokens.saturating_add(3)
}

/// Why an answer that was asked for from a position cannot go on there.
pub(crate) fn beyond_the_end(choice: usize, num_units: u32, got: u32) -> ApiError {
    let message = format!(
        "last-event-id must have at most {num_units} as the position of choice {choice}, got {got}"
    );
    ApiError::invalid(LAST_EVENT_ID.as_str(), message)
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:08x}/", self.answer, self.tag.0)?;
        let units = match &self.position {
            Position::Units(units) => units,
            Position::End => return f.write_str(END),
        };
        for (i, unit) in units.iter().enumerate() {
            write!(f, "{}{unit}", if i == 0 { "" } else { "." })?;
        }
        Ok(())
    }
}

impl FromStr for EventId {
    type Err = ApiError;

    fn from_str(text: &str) -> Result<Self, ApiError> {
        parse(text).ok_or_else(|| {
            let message = "last-event-id must be the id of an event, ANSWER/TAG/POSITION with 32 hexadecimal \
                           digits, 8, and numbers with dots or \"end\", got something else";
            ApiError::invalid(LAST_EVENT_ID.as_str(), message)
        })
    }
}

fn parse(text: &str) -> Option<EventId> {
    let mut parts = text.split('/');
    let (answer, tag, position) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() || tag.len() != 8 {
        return None;
    }
    let position = if position == END {
        Position::End
    } else {
        let mut units = Vec::new();
        for unit in position.split('.') {
            units.push(unit.parse().ok()?);
        }
        Position::Units(units)
    };
    Some(EventId {
        answer: answer.parse().ok()?,
        tag: Tag(u32::from_str_radix(tag, 16).ok()?),
        position,
    })
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(pairs: &[(&HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    fn read(pairs: &[(&HeaderName, &str)]) -> Result<Asked, ApiError> {
        Asked::read(&headers(pairs), &TenantName::default(), 7)
    }

    #[test]
    fn an_event_id_survives_its_text_form() {
        let answer = AnswerId::unique(7);
        for position in [Position::End, Position::Units(vec![0, 12, 4_000_000_000])] {
            let id = EventId {
                answer,
                tag: Tag(0xbeef),
                position,
            };
            let text = id.to_string();
            assert!(text.starts_with(&format!("{answer}/0000beef/")), "{text}");
            assert_eq!(text.parse::<EventId>().unwrap(), id);
        }
    }

    #[test]
    fn what_is_no_event_id_is_refused() {
        let good = format!("{}/0000beef/1", AnswerId::unique(7));
        let wrong = [
            "7".to_owned(),
            good.replace("/1", ""),
            good.replace("/1", "/"),
            good.replace("/1", "/1.x"),
            good.replace("/1", "/1/2"),
            good.replace("/1", "/-1"),
            good.replace("/1", "/4294967296"),
            good.replace("/0000beef", "/beef"),
            good.replace("/0000beef", "/0000beeg"),
            good[1..].to_owned(),
            "1.".repeat(EVENT_ID_BYTES_MAX),
        ];
        for text in wrong {
            let asked = read(&[(&LAST_EVENT_ID, &text)]);
            let error = asked.unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid, "{text}");
            assert_eq!(error.param.as_deref(), Some("last-event-id"));
        }
        read(&[(&LAST_EVENT_ID, &good)]).unwrap();
    }

    #[test]
    fn a_resumed_answer_is_of_the_same_request_and_has_its_choices() {
        let (body, other) = (BodyDigest::of("r", b"b"), BodyDigest::of("r", b"c"));
        assert_ne!(body, BodyDigest::of("rb", b""));
        let version = |model: &str, class: &str| Version {
            model: model.into(),
            numeric_class: class.into(),
        };
        let began = version("f", "c");
        let id = EventId {
            answer: AnswerId::unique(7),
            tag: Tag::of(body, &began),
            position: Position::Units(vec![3, 4]),
        };
        let all = || [version("g", "c"), version("f", "d"), version("f", "c")];
        assert_eq!(id.version(body, all()).unwrap(), began);
        for (body, versions) in [(other, &all()[..]), (body, &all()[..2]), (body, &[])] {
            let error = id.version(body, versions.to_vec()).unwrap_err();
            assert_eq!(error.kind, ErrorKind::ResumeMismatch);
        }
        id.check_choices(2).unwrap();
        let error = id.check_choices(3).unwrap_err();
        assert_eq!(
            error.message,
            "last-event-id must have the positions of 3 choices, got 2"
        );
    }

    #[test]
    fn a_key_is_told_apart_by_tenant_but_names_one_answer() {
        let asked = |tenant: &str, key: &str| {
            let (tenant, headers) = (
                TenantName::new(tenant).unwrap(),
                headers(&[(&IDEMPOTENCY_KEY, key)]),
            );
            Asked::read(&headers, &tenant, 7).unwrap().key.unwrap()
        };
        assert_eq!(asked("a", "k"), asked("a", "k"));
        assert_ne!(asked("a", "k").digest, asked("b", "k").digest);
        assert_eq!(asked("a", "k").answer, asked("b", "k").answer);
        assert_ne!(asked("ab", "k").digest, asked("a", "bk").digest);
        for pairs in [
            vec![(&IDEMPOTENCY_KEY, "")],
            vec![(&IDEMPOTENCY_KEY, "a"), (&IDEMPOTENCY_KEY, "b")],
            vec![(&IDEMPOTENCY_KEY, "k".repeat(257).leak() as &str)],
        ] {
            let error = read(&pairs).unwrap_err();
            assert_eq!(error.param.as_deref(), Some("idempotency-key"));
        }
    }

    #[test]
    fn an_event_of_another_answer_does_not_go_with_a_key() {
        let of = |answer: AnswerId| format!("{answer}/00000000/1");
        let (own, other) = (of(AnswerId::of_key("k", 3)), of(AnswerId::unique(3)));
        let asked = |event: &str| read(&[(&IDEMPOTENCY_KEY, "k"), (&LAST_EVENT_ID, event)]);
        assert_eq!(
            asked(&own).unwrap().answer(),
            Some(AnswerId::of_key("k", 3))
        );
        assert_eq!(asked(&other).unwrap_err().kind, ErrorKind::Invalid);
    }
}
