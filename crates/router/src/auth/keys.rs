//! API keys: 256 random bits that a client sends, of which this server has the SHA-256 only. One line per key; see
//! [`KeyEntry`]. The digest of so long a random key needs no salt and no slow hash: nobody can guess it.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use ring::rand::{SecureRandom as _, SystemRandom};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

use crate::tenants::TenantName;

/// Every key begins so: people and secret scanners recognise it.
pub const KEY_PREFIX: &str = "trm_";
/// Largest file of keys.
pub const KEYS_FILE_BYTES_MAX: usize = 16 << 20;
/// Most keys of a file.
pub const KEYS_MAX: usize = 65_536;
/// The word behind a key that may also operate the cluster.
const OPERATOR: &str = "operator";
/// The word for a key that does not expire.
const NEVER: &str = "never";

/// SHA-256 of a key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; 32]);

impl KeyHash {
    /// Of the whole key, its prefix included.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }

    fn head(&self) -> u64 {
        let (head, _) = self.0.split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        u64::from_be_bytes(*head)
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHash(..)")
    }
}

/// What is known of one key. Written as a line: name, tenant, digest, when it expires (or `never`), and `operator`
/// when it may also operate the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    /// What people call it; of the form of a tenant's name, and unique in its file.
    pub name: TenantName,
    /// Whom it speaks for.
    pub tenant: TenantName,
    /// Of the key.
    pub hash: KeyHash,
    /// From when on it is refused.
    pub expires: Option<SystemTime>,
    /// Whether it may also operate the cluster.
    pub is_operator: bool,
}

impl fmt::Display for KeyEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name, tenant, hash, ..
        } = self;
        write!(f, "{name} {tenant} {hash} ")?;
        match self.expires {
            Some(at) => write!(f, "{}", humantime::format_rfc3339_seconds(at))?,
            None => f.write_str(NEVER)?,
        }
        if self.is_operator {
            write!(f, " {OPERATOR}")?;
        }
        Ok(())
    }
}

/// A line that is none: which rule it breaks, never what it says.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BadLine(&'static str);

impl FromStr for KeyEntry {
    type Err = BadLine;

    fn from_str(line: &str) -> Result<Self, BadLine> {
        let mut words = line.split_ascii_whitespace();
        let mut next = || words.next().unwrap_or_default();
        let bad_name = BadLine("the name must be 1 to 64 letters, digits or any of . _ -");
        let name = TenantName::new(next()).ok_or(bad_name)?;
        let bad_tenant = BadLine("the tenant must be 1 to 64 letters, digits or any of . _ -");
        let tenant = TenantName::new(next()).ok_or(bad_tenant)?;
        let bad_hash = BadLine("the digest must be 64 hexadecimal digits");
        let hash = parse_hash(next()).ok_or(bad_hash)?;
        let expires = match next() {
            "" | NEVER => None,
            time => Some(humantime::parse_rfc3339(time).map_err(|_| {
                BadLine("the expiry must be never or a time such as 2027-01-31T00:00:00Z")
            })?),
        };
        let is_operator = match next() {
            "" => false,
            OPERATOR => true,
            _ => return Err(BadLine("the fifth word may only be operator")),
        };
        if !next().is_empty() {
            return Err(BadLine("a line has at most five words"));
        }
        Ok(Self {
            name,
            tenant,
            hash,
            expires,
            is_operator,
        })
    }
}

fn parse_hash(text: &str) -> Option<KeyHash> {
    let mut hash = [0; 32];
    if text.len() != 2 * hash.len() || !text.is_ascii() {
        return None;
    }
    for (i, byte) in hash.iter_mut().enumerate() {
        let digits = text.get(2 * i..2 * i + 2)?;
        // The parser alone takes a sign too.
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(KeyHash(hash))
}

/// Why a file of keys is not used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// It is too large.
    #[error("the file of keys has {got} bytes, expected at most {KEYS_FILE_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        got: usize,
    },
    /// It is no text.
    #[error("the file of keys is not UTF-8 text")]
    NotText,
    /// It has too many keys.
    #[error("the file of keys has more than {KEYS_MAX} keys")]
    TooMany,
    /// One line is wrong.
    #[error("line {line} of the file of keys: {error}")]
    Line {
        /// Its number, from 1.
        line: usize,
        /// The rule.
        error: BadLine,
    },
}

/// Reads the keys of a file: empty lines and lines that begin with `#` say nothing.
///
/// # Errors
/// [`KeysError`] that names the line; a file is used whole or not at all.
pub fn parse_keys(bytes: &[u8]) -> Result<Vec<KeyEntry>, KeysError> {
    if bytes.len() > KEYS_FILE_BYTES_MAX {
        return Err(KeysError::TooLarge { got: bytes.len() });
    }
    let text = std::str::from_utf8(bytes).map_err(|_| KeysError::NotText)?;
    let mut entries: Vec<KeyEntry> = Vec::new();
    let mut names = HashMap::new();
    for (i, line) in text.lines().enumerate() {
        let line_of = |error| KeysError::Line { line: i + 1, error };
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        let entry: KeyEntry = line.parse().map_err(line_of)?;
        if names.insert(entry.name.clone(), ()).is_some() {
            return Err(line_of(BadLine("another key has the same name")));
        }
        entries.push(entry);
        if entries.len() > KEYS_MAX {
            return Err(KeysError::TooMany);
        }
    }
    Ok(entries)
}

/// A new key, to be shown once.
///
/// # Errors
/// When the system has no randomness.
pub fn new_key() -> Result<String, NoRandomness> {
    let mut bytes = [0_u8; 32];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| NoRandomness)?;
    let digits: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{KEY_PREFIX}{digits}"))
}

/// The system has no randomness.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the system has no randomness for a key")]
pub struct NoRandomness;

/// Keys to look up.
#[derive(Debug, Default)]
pub(crate) struct KeyTable(HashMap<u64, Vec<KeyEntry>>);

/// Why a key is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyRefusal {
    Unknown,
    Expired,
}

impl KeyTable {
    pub(crate) fn new(entries: Vec<KeyEntry>) -> Self {
        let mut table: HashMap<u64, Vec<KeyEntry>> = HashMap::new();
        for entry in entries {
            table.entry(entry.hash.head()).or_default().push(entry);
        }
        Self(table)
    }

    /// The entry of `key`. What it takes depends on the digest only, which says nothing about the key.
    pub(crate) fn find(&self, key: &str, now: SystemTime) -> Result<&KeyEntry, KeyRefusal> {
        let hash = KeyHash::of(key);
        let mut found = None;
        for entry in self.0.get(&hash.head()).into_iter().flatten() {
            if bool::from(entry.hash.0.ct_eq(&hash.0)) {
                found = Some(entry);
            }
        }
        let entry = found.ok_or(KeyRefusal::Unknown)?;
        match entry.expires {
            Some(at) if at <= now => Err(KeyRefusal::Expired),
            _ => Ok(entry),
        }
    }
}

/// The time `valid_for` from now, in whole seconds.
#[must_use]
pub fn expiry(now: SystemTime, valid_for: Duration) -> SystemTime {
    now.checked_add(valid_for).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, key: &str) -> KeyEntry {
        KeyEntry {
            name: TenantName::new(name).unwrap(),
            tenant: TenantName::new("acme").unwrap(),
            hash: KeyHash::of(key),
            expires: None,
            is_operator: false,
        }
    }

    #[test]
    fn a_key_is_long_random_and_found_by_its_hash_only() {
        let (key, other) = (new_key().unwrap(), new_key().unwrap());
        assert_ne!(key, other);
        assert_eq!(key.len(), KEY_PREFIX.len() + 64);
        let table = KeyTable::new(vec![entry("a", &key)]);
        let now = SystemTime::now();
        assert_eq!(table.find(&key, now).unwrap().tenant.as_str(), "acme");
        for wrong in [
            other.as_str(),
            "",
            &key[..key.len() - 1],
            &key.to_uppercase(),
        ] {
            assert_eq!(table.find(wrong, now).unwrap_err(), KeyRefusal::Unknown);
        }
        // The digest is no key.
        let hash = KeyHash::of(&key).to_string();
        assert_eq!(table.find(&hash, now).unwrap_err(), KeyRefusal::Unknown);
    }

    #[test]
    fn an_expired_key_is_refused_from_its_time_on() {
        let now = SystemTime::now();
        let mut expires = entry("a", "k");
        expires.expires = Some(now + Duration::from_secs(5));
        let table = KeyTable::new(vec![expires]);
        table.find("k", now).unwrap();
        let later = now + Duration::from_secs(5);
        assert_eq!(table.find("k", later).unwrap_err(), KeyRefusal::Expired);
    }

    #[test]
    fn a_line_survives_its_text_form() {
        let mut whole = entry("laptop", "k");
        whole.expires = Some(humantime::parse_rfc3339("2027-01-31T00:00:00Z").unwrap());
        whole.is_operator = true;
        let text = format!("# keys\n\n{}\n  {}\n", entry("a", "j"), whole);
        assert_eq!(
            parse_keys(text.as_bytes()).unwrap(),
            [entry("a", "j"), whole]
        );
        let short = format!("a acme {}", KeyHash::of("j"));
        assert_eq!(short.parse::<KeyEntry>().unwrap(), entry("a", "j"));
    }

    #[test]
    fn a_wrong_line_is_named_by_number_and_rule_and_never_shown() {
        let hash = KeyHash::of("k");
        for (line, rule) in [
            ("a/b acme 00".to_owned(), "the name must"),
            ("a".to_owned(), "the tenant must"),
            ("a acme trm_secret".to_owned(), "the digest must"),
            (
                format!("a acme +{}", &hash.to_string()[1..]),
                "the digest must",
            ),
            (format!("a acme {hash} tomorrow"), "the expiry must"),
            (format!("a acme {hash} never admin"), "the fifth word"),
            (format!("a acme {hash} never operator x"), "at most five"),
        ] {
            let error = parse_keys(format!("#\n{line}\n").as_bytes())
                .unwrap_err()
                .to_string();
            assert!(error.starts_with("line 2 of"), "{error}");
            assert!(error.contains(rule), "{error}");
            assert!(
                !error.contains("secret") && !error.contains(&hash.to_string()),
                "{error}"
            );
        }
        let twice = format!("a acme {hash}\na acme {hash}\n");
        assert!(parse_keys(twice.as_bytes()).is_err());
        assert_eq!(parse_keys(&[0xff]).unwrap_err(), KeysError::NotText);
    }
}
