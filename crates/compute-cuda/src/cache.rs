//! Compiled modules on disk: found again by everything that decides their bytes. Never trusts a file.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::target::Target;

/// Every file begins with it; a new layout gets a new one.
const MAGIC: &[u8; 8] = b"TRCUBIN1";
const HASH_BYTES: usize = 32;
/// Largest module that is read back: ours have some hundred KiB.
const MODULE_BYTES_MAX: u64 = 64 << 20;

/// A directory of compiled modules; one file each, written whole or not at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelCache {
    dir: PathBuf,
}

/// What a module is made of, but for the compiler's version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ModuleKey {
    /// Name of the source, target and a hash of all that the compiler reads.
    stem: String,
}

impl ModuleKey {
    pub(crate) fn new(name: &str, source: &str, target: Target, options: &[String]) -> Self {
        let mut hash = Sha256::new();
        for part in [source, target.name()]
            .into_iter()
            .chain(options.iter().map(String::as_str))
        {
            // With its length: no two lists of parts are one text.
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let hash = hex(&hash.finalize()[..12]);
        Self {
            stem: format!("{name}-{target}-{hash}"),
        }
    }
}

impl KernelCache {
    /// A cache in `dir`, which is made when something is first kept.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The module that NVRTC of this version made, or that of any version when there is no NVRTC.
    ///
    /// A file that is not what was written is removed, and said.
    pub(crate) fn find(&self, key: &ModuleKey, version: Option<(i32, i32)>) -> Option<Vec<u8>> {
        let path = match version {
            Some(version) => self.dir.join(file_name(key, version)),
            None => self.newest(key)?,
        };
        match read(&path) {
            Ok(module) => Some(module),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "compiled kernels in the cache are unusable");
                let _ = fs::remove_file(&path);
                None
            }
        }
    }

    /// Keeps a module: written beside its place and then renamed, so that nobody finds half of one.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub(crate) fn keep(
        &self,
        key: &ModuleKey,
        version: (i32, i32),
        module: &[u8],
    ) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let name = file_name(key, version);
        let temporary = self
            .dir
            .join(format!(".{name}.{}-{}", std::process::id(), unique()));
        let written =
            write(&temporary, module).and_then(|()| fs::rename(&temporary, self.dir.join(&name)));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Of all versions' modules, the one whose name is last.
    fn newest(&self, key: &ModuleKey) -> Option<PathBuf> {
        let prefix = format!("{}-nvrtc", key.stem);
        let is_ours = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with(&prefix) && name.ends_with(".cubin"))
        };
        let entries = fs::read_dir(&self.dir).ok()?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(is_ours)
            .max()
    }
}

fn file_name(key: &ModuleKey, (major, minor): (i32, i32)) -> String {
    format!("{}-nvrtc{major:02}.{minor:02}.cubin", key.stem)
}

/// A number that no other call of this process has.
fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn write(path: &Path, module: &[u8]) -> io::Result<()> {
    let mut file = fs::File::create(path)?;
    file.write_all(MAGIC)?;
    file.write_all(&Sha256::digest(module))?;
    file.write_all(module)?;
    file.sync_all()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let size = fs::metadata(path)?.len();
    if size > MODULE_BYTES_MAX {
        return Err(invalid(format!(
            "has {size} bytes, expected at most {MODULE_BYTES_MAX}"
        )));
    }
    let bytes = fs::read(path)?;
    let rest = bytes.strip_prefix(MAGIC.as_slice());
    let Some((hash, module)) = rest.and_then(|rest| rest.split_at_checked(HASH_BYTES)) else {
        return Err(invalid("does not begin as such a file does".to_owned()));
    };
    if Sha256::digest(module)[..] != *hash {
        return Err(invalid("its hash is another one".to_owned()));
    }
    Ok(module.to_vec())
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(2 * bytes.len());
    for byte in bytes {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(source: &str, options: &[&str]) -> ModuleKey {
        let options: Vec<String> = options.iter().map(|&o| o.to_owned()).collect();
        ModuleKey::new("norm", source, Target::Sm80, &options)
    }

    #[test]
    fn a_key_is_everything_that_decides_the_bytes() {
        assert_eq!(key("a", &["b"]), key("a", &["b"]));
        assert_ne!(key("a", &["b"]), key("ab", &[]));
        assert_ne!(key("a", &["b", "c"]), key("a", &["bc"]));
        assert_ne!(
            key("a", &[]),
            ModuleKey::new("norm", "a", Target::Sm89, &[])
        );
    }

    #[test]
    fn what_was_kept_is_found_by_its_version_or_by_none() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path().join("new"));
        let key = key("a", &[]);
        assert_eq!(cache.find(&key, None), None);
        cache.keep(&key, (12, 9), b"old").unwrap();
        cache.keep(&key, (13, 0), b"new").unwrap();
        assert_eq!(cache.find(&key, Some((12, 9))).unwrap(), b"old");
        assert_eq!(cache.find(&key, Some((13, 1))), None);
        assert_eq!(cache.find(&key, None).unwrap(), b"new");
        assert_eq!(fs::read_dir(cache.dir()).unwrap().count(), 2);
    }

    #[test]
    fn a_changed_file_is_noticed_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = KernelCache::new(dir.path().to_owned());
        let key = key("a", &[]);
        let changes: [fn(&mut Vec<u8>); 3] = [|b| b[45] ^= 1, |b| b.truncate(20), |b| b[0] = b'X'];
        for change in changes {
            cache.keep(&key, (13, 0), b"machine code").unwrap();
            let path = dir.path().join(file_name(&key, (13, 0)));
            let mut bytes = fs::read(&path).unwrap();
            change(&mut bytes);
            fs::write(&path, bytes).unwrap();
            assert_eq!(cache.find(&key, Some((13, 0))), None);
            assert!(!path.exists());
        }
    }
}
