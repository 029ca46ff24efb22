//! `tramontane.sha256`: the digests of a checkpoint's weight files, in the format of `sha256sum`.
//!
//! A checkpoint with a manifest is compared with it whenever it is opened, so a flipped bit on one
//! worker's disk is found before it serves. Every weight file must be in it, and nothing else.

use std::collections::BTreeMap;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::checkpoint::{Shard, read_text};
use crate::{Error, parallel};

/// Name of the file.
pub const FILE: &str = "tramontane.sha256";
/// Largest manifest.
const MANIFEST_BYTES_MAX: u64 = 1024 * 1024;

/// SHA-256 of bytes as lowercase hexadecimal digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

/// Compares the shards with the directory's manifest, if it has one.
pub(crate) fn check(directory: &Path, shards: &[Shard]) -> Result<(), Error> {
    let path = directory.join(FILE);
    if !path.is_file() {
        return Ok(());
    }
    let expected = parse(&read_text(&path, MANIFEST_BYTES_MAX)?)?;
    if let Some(name) = expected
        .keys()
        .find(|n| shards.iter().all(|s| s.name != **n))
    {
        return Err(wrong(format!(
            "names {name}, which is no weight file of this checkpoint"
        )));
    }
    parallel::for_each(shards, |shard| {
        let Some(expected) = expected.get(&shard.name) else {
            return Err(wrong(format!("has no digest of {}", shard.name)));
        };
        let got = digest(shard.bytes.get());
        if got == *expected {
            return Ok(());
        }
        Err(Error::Digest {
            file: shard.name.clone(),
            expected: expected.clone(),
            got,
        })
    })
}

/// File name to digest.
fn parse(text: &str) -> Result<BTreeMap<String, String>, Error> {
    let mut digests = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let parts = line.split_once("  ");
        let hex = |d: &str| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit());
        let Some((digest, name)) = parts.filter(|(digest, _)| hex(digest)) else {
            return Err(wrong(format!("line {line:?} is no digest and name")));
        };
        if digests
            .insert(name.to_owned(), digest.to_lowercase())
            .is_some()
        {
            return Err(wrong(format!("names {name} twice")));
        }
    }
    Ok(digests)
}

fn wrong(what: String) -> Error {
    Error::File {
        file: FILE.to_owned(),
        what,
    }
}

/// Writes the manifest of `digests`, `(file, digest)`.
///
/// # Errors
/// When the directory cannot be written.
pub fn write(directory: &Path, digests: &[(String, String)]) -> Result<(), Error> {
    let lines = digests.iter();
    let lines = lines.map(|(file, digest)| format!("{digest}  {file}\n"));
    let path = directory.join(FILE);
    std::fs::write(&path, lines.collect::<String>()).map_err(|source| Error::Read {
        file: path.display().to_string(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_what_sha256sum_writes() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest(b""), empty);
        let parsed = parse(&format!("{empty}  model.safetensors\n\n")).unwrap();
        assert_eq!(parsed["model.safetensors"], empty);
        for bad in [
            "nonsense",
            "abc  model.safetensors",
            &format!("{empty}  a\n{empty}  a"),
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
