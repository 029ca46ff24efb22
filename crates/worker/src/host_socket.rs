//! This worker's Unix socket for workers of the same host: made in a directory that only this user may
//! enter, removed when the worker ends. Without one, calls come over TCP.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::UnixListener;
use tramontane_coordination::registry::HostSocket;

/// Equal for all processes of one host until it starts again.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Differs between containers of one host that have networks of their own: a partition between these is
/// one for their workers too, also where they share a file system.
const NETWORK: &str = "/proc/self/ns/net";
/// A socket without a listener is removed when it is older than this: a younger one may be about to listen.
const STALE_AFTER: Duration = Duration::from_secs(10);

/// Why there is no Unix socket.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The host has no identity.
    #[error("{BOOT_ID}")]
    Host(#[source] io::Error),
    /// The directory cannot be made or looked at.
    #[error("{}", .0.display())]
    Directory(PathBuf, #[source] io::Error),
    /// Somebody else could put something there.
    #[error("{} must be a directory of mode 700 of user {uid}, got mode {mode:o} of user {owner}", .path.display())]
    NotPrivate {
        path: PathBuf,
        uid: u32,
        mode: u32,
        owner: u32,
    },
    /// The socket cannot be made.
    #[error("{}", .0.display())]
    Socket(PathBuf, #[source] io::Error),
}

/// A listening socket; dropped, its file is removed.
#[derive(Debug)]
pub(crate) struct BoundSocket {
    path: PathBuf,
    host: String,
}

impl BoundSocket {
    /// Listens in this user's directory below `base`, under a name that no other process takes.
    pub(crate) fn bind(base: &Path, incarnation: u64) -> Result<(Self, UnixListener), Error> {
        let host = host()?;
        let directory = private_directory(base)?;
        remove_stale(&directory);
        let path = directory.join(format!("{incarnation:016x}.sock"));
        let failed = |error| Error::Socket(path.clone(), error);
        let listener = UnixListener::bind(&path).map_err(failed)?;
        // From here on the file is removed whatever happens.
        let bound = Self {
            path: path.clone(),
            host,
        };
        fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
        Ok((bound, listener))
    }

    /// What others are told; `None` for a path that is no text.
    pub(crate) fn record(&self) -> Option<HostSocket> {
        let path = self.path.to_str()?.to_owned();
        Some(HostSocket {
            host: self.host.clone(),
            path,
        })
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the Unix socket was gone already");
        }
    }
}

/// The identity of this host.
pub(crate) fn host() -> Result<String, Error> {
    let id = fs::read_to_string(BOOT_ID).map_err(Error::Host)?;
    let network = fs::metadata(NETWORK).map_err(Error::Host)?.ino();
    Ok(format!("{}/{network}", id.trim()))
}

/// `base/tramontane-<uid>`, which must be a directory of ours that nobody else may enter.
fn private_directory(base: &Path) -> Result<PathBuf, Error> {
    let me = fs::metadata("/proc/self").map_err(Error::Host)?;
    let path = base.join(format!("tramontane-{}", me.uid()));
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(Error::Directory(path, error));
        }
        _ => {}
    }
    // Not following links: it must be the directory itself.
    let found = fs::symlink_metadata(&path).map_err(|e| Error::Directory(path.clone(), e))?;
    let mode = found.mode() & 0o777;
    if !found.is_dir() || found.uid() != me.uid() || mode != 0o700 {
        return Err(Error::NotPrivate {
            path,
            uid: me.uid(),
            mode,
            owner: found.uid(),
        });
    }
    Ok(path)
}

/// Removes sockets of workers that ended without doing so.
fn remove_stale(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_socket = path
            .extension()
            .is_some_and(|extension| extension == "sock");
        if is_socket && is_old(&path) && refuses(&path) {
            tracing::debug!(path = %path.display(), "removing the socket of a worker that is gone");
            // Another worker may do the same.
            let _gone = fs::remove_file(&path);
        }
    }
}

fn is_old(path: &Path) -> bool {
    let modified = fs::symlink_metadata(path).and_then(|found| found.modified());
    modified.is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE_AFTER))
}

fn refuses(path: &Path) -> bool {
    let refused = io::ErrorKind::ConnectionRefused;
    UnixStream::connect(path).is_err_and(|error| error.kind() == refused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_goes_with_its_worker() {
        let base = tempfile::tempdir().unwrap();
        let (bound, listener) = BoundSocket::bind(base.path(), 7).unwrap();
        let record = bound.record().unwrap();
        let found = fs::metadata(&record.path).unwrap();
        assert_eq!(found.mode() & 0o777, 0o600);
        let directory = Path::new(&record.path).parent().unwrap();
        assert_eq!(fs::metadata(directory).unwrap().mode() & 0o777, 0o700);
        UnixStream::connect(&record.path).unwrap();
        assert_eq!(record.host, host().unwrap());
        drop((bound, listener));
        assert!(!Path::new(&record.path).exists());
    }

    #[tokio::test]
    async fn sockets_without_a_listener_are_removed_and_others_stay() {
        let base = tempfile::tempdir().unwrap();
        let (first, listening) = BoundSocket::bind(base.path(), 1).unwrap();
        let (second, closed) = BoundSocket::bind(base.path(), 2).unwrap();
        drop(closed);
        let long_ago = std::time::SystemTime::now() - STALE_AFTER * 2;
        for bound in [&first, &second] {
            // The standard library sets times of opened files only, and a socket cannot be opened.
            let status = std::process::Command::new("touch")
                .args(["-d", &format!("@{}", seconds(long_ago))])
                .arg(&bound.path)
                .status();
            assert!(status.unwrap().success());
        }
        remove_stale(first.path.parent().unwrap());
        assert!(first.path.exists() && !second.path.exists());
        drop(listening);
    }

    fn seconds(time: std::time::SystemTime) -> u64 {
        time.duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_secs()
    }

    #[tokio::test]
    async fn a_directory_that_others_may_enter_is_refused() {
        let base = tempfile::tempdir().unwrap();
        let directory = private_directory(base.path()).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        let error = BoundSocket::bind(base.path(), 1).unwrap_err().to_string();
        assert!(
            error.contains("mode 700") && error.contains("got mode 755"),
            "{error}"
        );
    }
}
