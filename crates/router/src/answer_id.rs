//! The name of one answer. Everything random about the answer comes from it, so that any router can make
//! the same answer again from the same body and this name. No secret: clients see it and send it back.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};
use tramontane_tokenizer::CALL_ID_LEN;

use crate::random::random;

/// Low bits that an answer's randomness comes from; the time of the request is above them.
const ORIGIN_BITS: u32 = 88;
/// Hexadecimal digits of the written form.
const DIGITS: usize = 32;

/// The second in which the answer was first asked for, and 88 bits that are random or made from the client's
/// idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AnswerId(u128);

impl AnswerId {
    /// A name that no other answer has.
    pub(crate) fn unique(unix_seconds: u64) -> Self {
        Self::new(
            unix_seconds,
            (u128::from(random()) << 64) | u128::from(random()),
        )
    }

    /// The name of the answer to a request with this idempotency key. On every router and at every time
    /// the randomness is the same; only the time differs.
    pub(crate) fn of_key(key: &str, unix_seconds: u64) -> Self {
        let digest: [u8; 32] = Sha256::digest(key.as_bytes()).into();
        let (head, _) = digest.split_first_chunk::<16>().unwrap_or((&[0; 16], &[]));
        Self::new(unix_seconds, u128::from_be_bytes(*head))
    }

    const fn new(unix_seconds: u64, origin: u128) -> Self {
        let origin = origin & ((1 << ORIGIN_BITS) - 1);
        Self(((unix_seconds as u128) << ORIGIN_BITS) | origin)
    }

    /// Unix time in seconds at which the answer was first asked for.
    pub(crate) const fn created(self) -> u64 {
        (self.0 >> ORIGIN_BITS) as u64
    }

    /// Seed of a request that names none.
    pub(crate) const fn seed(self) -> u64 {
        self.0 as u64
    }

    /// The id of a call of a tool in a choice of this answer: letters and digits that depend on nothing else, so
    /// that every router gives it the same one.
    pub(crate) fn call_id(self, choice: usize, index: usize) -> String {
        const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
        let origin = self.0 & ((1 << ORIGIN_BITS) - 1);
        let digest: [u8; 32] = Sha256::digest(format!("{origin:x}/{choice}/{index}")).into();
        let digits = digest.iter().take(CALL_ID_LEN);
        digits
            .filter_map(|byte| DIGITS.get(usize::from(*byte) % DIGITS.len()))
            .map(|digit| char::from(*digit))
            .collect()
    }

    /// Whether both come from one idempotency key, or are one.
    pub(crate) const fn has_origin_of(self, other: Self) -> bool {
        (self.0 ^ other.0) << (u128::BITS - ORIGIN_BITS) == 0
    }
}

impl fmt::Display for AnswerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:0DIGITS$x}", self.0)
    }
}

/// The text is no name of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NoAnswerId;

impl FromStr for AnswerId {
    type Err = NoAnswerId;

    fn from_str(text: &str) -> Result<Self, NoAnswerId> {
        let is_hex = text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if text.len() != DIGITS || !is_hex {
            return Err(NoAnswerId);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_no_number| NoAnswerId)?;
        Ok(Self(number))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_survives_its_text_form_and_tells_time_and_seed() {
        let id = AnswerId::unique(1_767_225_600);
        assert_eq!(id.created(), 1_767_225_600);
        assert_eq!(id.to_string().len(), DIGITS);
        let back: AnswerId = id.to_string().parse().unwrap();
        assert_eq!((back, back.seed()), (id, id.seed()));
        assert_ne!(AnswerId::unique(1_767_225_600), id);
        for wrong in ["", "12", &"g".repeat(32), &"A".repeat(32), &"1".repeat(33)] {
            assert_eq!(wrong.parse::<AnswerId>(), Err(NoAnswerId), "{wrong}");
        }
    }

    #[test]
    fn calls_have_ids_that_any_router_gives_them() {
        let (early, late) = (AnswerId::of_key("k", 5), AnswerId::of_key("k", 6));
        assert_eq!(early.call_id(1, 2), late.call_id(1, 2));
        assert!(tramontane_tokenizer::is_call_id(&early.call_id(0, 0)));
        let others = [
            (early, 0, 1),
            (early, 1, 0),
            (AnswerId::of_key("l", 5), 0, 0),
        ];
        for (answer, choice, index) in others {
            assert_ne!(answer.call_id(choice, index), early.call_id(0, 0));
        }
    }

    #[test]
    fn a_key_has_one_origin_at_all_times() {
        let (early, late) = (AnswerId::of_key("k", 5), AnswerId::of_key("k", 6));
        assert_ne!(early, late);
        assert_eq!(early.seed(), late.seed());
        assert!(early.has_origin_of(late));
        assert!(!early.has_origin_of(AnswerId::of_key("l", 5)));
        // The seed is not all of the origin.
        assert!(!AnswerId::new(5, 1 << 80).has_origin_of(AnswerId::new(5, 0)));
    }
}
