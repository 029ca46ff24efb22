//! `tramontane.sha256`, of a GGUF file `NAME.sha256`: the digests of a checkpoint's weight files, in the format
//! of `sha256sum`.
//!
//! A checkpoint with a manifest is compared with it whenever it is opened, so a flipped bit on one
//! worker's disk is found before it serves. Every weight file must be in it, and nothing else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::checkpoint::read_text;
use crate::shard::Shard;
use crate::source::Part;
use crate::{Error, parallel};

/// Name of the file in a directory.
pub const FILE: &str = "tramontane.sha256";
/// Largest manifest.
const MANIFEST_BYTES_MAX: u64 = 1024 * 1024;

/// Bytes that are read at once.
const READ_BYTES: usize = 1 << 20;

/// SHA-256 of a file that is here, as lowercase hexadecimal digits.
pub(crate) fn digest(shard: &Shard) -> Result<String, Error> {
    let mut hash = Sha256::new();
    let mut bytes = vec![0; READ_BYTES];
    for part in Part::whole(&shard.name, "all of it", 0, shard.len).cut(READ_BYTES, 1) {
        // `cut` makes no part longer.
        let bytes = &mut bytes[..part.piece * part.count];
        shard.read(&part, bytes, None)?;
        hash.update(bytes);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The manifest of a checkpoint that is a file: `NAME.sha256` beside it.
pub(crate) fn path_of_file(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(".sha256");
    PathBuf::from(name)
}

/// Compares the shards with the manifest at `path`, if there is one.
pub(crate) fn check(path: &Path, shards: &[Shard]) -> Result<(), Error> {
    if !path.is_file() {
        return Ok(());
    }
    let manifest = path.file_name().unwrap_or(path.as_os_str());
    let manifest = manifest.to_string_lossy();
    let wrong = |what: String| Error::File {
        file: manifest.clone().into_owned(),
        what,
    };
    let expected = parse(&read_text(path, MANIFEST_BYTES_MAX)?).map_err(wrong)?;
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
        let got = digest(shard)?;
        if got == *expected {
            return Ok(());
        }
        Err(Error::Digest {
            file: shard.name.clone(),
            expected: expected.clone(),
            manifest: manifest.clone().into_owned(),
            got,
        })
    })
}

/// File name to digest.
pub(crate) fn parse(text: &str) -> Result<BTreeMap<String, String>, String> {
    let mut digests = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let parts = line.split_once("  ");
        let hex = |d: &str| d.len() == 64 && d.bytes().all(|b| b.is_ascii_hexdigit());
        let Some((digest, name)) = parts.filter(|(digest, _)| hex(digest)) else {
            return Err(format!("line {line:?} is no digest and name"));
        };
        if digests
            .insert(name.to_owned(), digest.to_lowercase())
            .is_some()
        {
            return Err(format!("names {name} twice"));
        }
    }
    Ok(digests)
}

/// Writes the manifest of `digests`, `(file, digest)`, to `path`.
///
/// # Errors
/// When it cannot be written.
pub fn write(path: &Path, digests: &[(String, String)]) -> Result<(), Error> {
    let lines = digests.iter();
    let lines = lines.map(|(file, digest)| format!("{digest}  {file}\n"));
    std::fs::write(path, lines.collect::<String>()).map_err(|source| Error::Read {
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
