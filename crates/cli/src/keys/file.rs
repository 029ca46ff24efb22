//! The file of keys, changed as a whole: no router ever reads half of it, two changes at once both count, and whoever
//! could read it before still can. Never says that a change is done which routers cannot see.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::Context as _;
use tramontane_router::auth::keys::KEYS_FILE_BYTES_MAX;

use crate::exit::{Exit, refusal};

/// Longest wait for another `tramontane keys` to be done with the file: it takes milliseconds.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);
/// Of a new file and of the lock: who else may read a file of keys is for its owner to say.
const MODE: u32 = 0o600;

/// The text of the file.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let size = fs::metadata(path)?.len();
    if size > KEYS_FILE_BYTES_MAX as u64 {
        let message = format!("{size} bytes, expected at most {KEYS_FILE_BYTES_MAX}");
        return Err(io::Error::other(message));
    }
    fs::read_to_string(path)
}

/// Replaces the text by what `edit` makes of it, of nothing when there is no file. Where `path` is a link, what it
/// points at is replaced.
///
/// # Errors
/// Those of `edit`, with which nothing is changed; or the new file could not have the old one's owner.
pub(super) fn change(
    path: &Path,
    edit: impl FnOnce(Option<String>) -> anyhow::Result<String>,
) -> anyhow::Result<()> {
    let shown = || path.display().to_string();
    let target = target(path).with_context(shown)?;
    let dir = match target.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let _locked = lock(&target)?;
    let text = match read(&target) {
        Ok(text) => Some(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error).with_context(shown),
    };
    let was_there = text.is_some();
    let text = edit(text)?;
    let mut new = tempfile::NamedTempFile::new_in(dir).with_context(shown)?;
    if was_there {
        resemble(new.as_file(), &target)?;
    }
    new.write_all(text.as_bytes()).with_context(shown)?;
    new.as_file().sync_all().with_context(shown)?;
    new.persist(&target).with_context(shown)?;
    // A revoked key does not come back with the power.
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.with_context(shown)
}

/// What a path means once all links are followed.
fn target(path: &Path) -> io::Result<PathBuf> {
    match fs::canonicalize(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_symlink() => {
            let message = "it is a link to a file that is not there";
            Err(io::Error::new(io::ErrorKind::NotFound, message))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(path.to_owned()),
        found => found,
    }
}

/// Gives `new` the owner and the mode of the file that it replaces.
fn resemble(new: &File, old: &Path) -> anyhow::Result<()> {
    let shown = || old.display().to_string();
    let was = fs::metadata(old).with_context(shown)?;
    give(new, &was, old)?;
    new.set_permissions(was.permissions()).with_context(shown)
}

/// Gives a file to the owner of the keys.
fn give(file: &File, keys: &Metadata, path: &Path) -> anyhow::Result<()> {
    let (uid, gid) = (keys.uid(), keys.gid());
    let is = file
        .metadata()
        .with_context(|| path.display().to_string())?;
    if (is.uid(), is.gid()) == (uid, gid) {
        return Ok(());
    }
    fchown(file, Some(uid), Some(gid)).map_err(|error| {
        let message = format!(
            "{} is of user {uid} and group {gid}, and a file that replaces it cannot be: {error}; routers might not be \
             able to read it, so nothing is changed",
            path.display()
        );
        refusal(Exit::Failed, message, "the same as that user or as root")
    })
}

/// Takes the lock beside the file until it is dropped. It stays where it is: a lock that is removed is no lock.
fn lock(target: &Path) -> anyhow::Result<File> {
    let mut name = OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push(".lock");
    let path = target.with_file_name(name);
    let shown = || format!("lock {}", path.display());
    let opened = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(MODE)
        .open(&path);
    let file = opened.with_context(shown)?;
    if let Ok(keys) = fs::metadata(target) {
        // So that the owner of the keys can take it too. Who may not give it away may not change the keys either.
        give(&file, &keys, target).inspect_err(|_refused| {
            // Left there, it would keep the owner out.
            let _gone = fs::remove_file(&path);
        })?;
    }
    let (sender, locked) = mpsc::sync_channel(1);
    std::thread::spawn(move || {
        let taken = file.lock().map(|()| file);
        // Nobody waits any more: the process is about to end.
        let _late = sender.send(taken);
    });
    match locked.recv_timeout(LOCK_WAIT_MAX) {
        Ok(taken) => taken.with_context(shown),
        Err(_elapsed) => {
            let message = format!(
                "another `tramontane keys` has had {} for {LOCK_WAIT_MAX:?}",
                path.display()
            );
            Err(refusal(Exit::Conflict, message, "the same again"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};

    use super::*;

    fn append(path: &Path, word: &str) -> anyhow::Result<()> {
        change(path, |text| {
            Ok(format!("{}{word}\n", text.unwrap_or_default()))
        })
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn whoever_could_read_it_still_can() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        append(&path, "one").unwrap();
        assert_eq!(mode(&path), MODE);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        // Only root can give files away; others test the mode alone.
        let given = chown(&path, Some(65534), Some(65534)).is_ok();
        append(&path, "two").unwrap();
        assert_eq!(mode(&path), 0o640);
        let owner = fs::metadata(&path).unwrap();
        assert_eq!((owner.uid(), owner.gid()) == (65534, 65534), given);
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn a_link_stays_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("keys"), dir.path().join("link"));
        symlink("keys", &link).unwrap();
        let error = append(&link, "one").unwrap_err();
        assert!(format!("{error:#}").contains("not there"), "{error:#}");
        append(&path, "one").unwrap();
        append(&link, "two").unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[test]
    fn changes_at_once_all_count() {
        const CHANGES: usize = 16;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        std::thread::scope(|scope| {
            for word in 0..CHANGES {
                let path = &path;
                scope.spawn(move || append(path, &word.to_string()).unwrap());
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), CHANGES, "{text}");
    }

    #[test]
    fn what_cannot_be_edited_is_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        append(&path, "one").unwrap();
        change(&path, |_text| anyhow::bail!("no")).unwrap_err();
        assert_eq!(fs::read_to_string(&path).unwrap(), "one\n");
        let mut left: Vec<_> = fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(left.drain(..).count(), 2, "the file and its lock");
    }
}
