//! Something made of files, and made again when they change. A change that cannot be used is logged, and what was made
//! before stays. Never touches what runs: who asks next gets the new one.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::TlsError;
use super::files::{Contents, Files, date, unix_seconds};

/// A certificate that ends sooner is warned about.
const EXPIRY_WARNING: Duration = Duration::from_secs(14 * 24 * 3600);
/// How often.
const EXPIRY_WARNING_EVERY: Duration = Duration::from_secs(24 * 3600);

/// A value, and until when the certificate in it is valid (Unix time in seconds).
pub(super) type Made<T> = (T, Option<i64>);
type Make<T> = dyn Fn(&Files, &Contents) -> Result<Made<T>, TlsError> + Send + Sync;

/// A value that follows its files.
pub(super) struct Reloaded<T> {
    what: &'static str,
    files: Files,
    make: Box<Make<T>>,
    current: ArcSwap<T>,
    seen: Mutex<Seen>,
}

struct Seen {
    contents: Contents,
    until: Option<i64>,
    /// When the end of its time was last warned about.
    warned: Option<i64>,
}

impl<T> fmt::Debug for Reloaded<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reloaded")
            .field("what", &self.what)
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl<T: Send + Sync + 'static> Reloaded<T> {
    /// Reads the files for the first time.
    pub(super) fn load(
        what: &'static str,
        files: Files,
        make: impl Fn(&Files, &Contents) -> Result<Made<T>, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let contents = files.read()?;
        let (value, until) = make(&files, &contents)?;
        let seen = Seen {
            contents,
            until,
            warned: None,
        };
        Ok(Self {
            what,
            files,
            make: Box::new(make),
            current: ArcSwap::from_pointee(value),
            seen: Mutex::new(seen),
        })
    }

    /// The newest that can be used.
    pub(super) fn get(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Follows the files until `stop`.
    pub(super) fn watch(
        self: Arc<Self>,
        every: Duration,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) {
        let task = async move {
            loop {
                let looked = Arc::clone(&self);
                let looked = tokio::task::spawn_blocking(move || looked.look());
                if let Err(error) = looked.await {
                    tracing::error!(what = self.what, %error, "looking at TLS files did not end well");
                }
                tokio::time::sleep(every).await;
            }
        };
        tasks.spawn(async move {
            let _stopped = stop.run_until_cancelled(task).await;
        });
    }

    /// Looks at the files once. Contents are compared, not times: a mounted secret is a link that is pointed elsewhere.
    pub(super) fn look(&self) {
        let mut seen = self.seen.lock();
        let now = unix_seconds();
        match self.files.read() {
            Ok(contents) if contents != seen.contents => {
                seen.contents = contents;
                self.replace(&mut seen);
            }
            Ok(_same) => {}
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(
                    what = self.what,
                    error,
                    "TLS files cannot be read, the old identity stays"
                );
            }
        }
        self.warn_of_end(&mut seen, now);
    }

    fn replace(&self, seen: &mut Seen) {
        match (self.make)(&self.files, &seen.contents) {
            Ok((value, until)) => {
                self.current.store(Arc::new(value));
                (seen.until, seen.warned) = (until, None);
                let until = until.map(date);
                tracing::info!(
                    what = self.what,
                    until,
                    "new TLS files are used from now on"
                );
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::error!(
                    what = self.what,
                    error,
                    "new TLS files cannot be used, the old identity stays"
                );
            }
        }
    }

    fn warn_of_end(&self, seen: &mut Seen, now: i64) {
        let (soon, again) = (
            EXPIRY_WARNING.as_secs() as i64,
            EXPIRY_WARNING_EVERY.as_secs() as i64,
        );
        let Some(until) = seen.until.filter(|until| *until < now.saturating_add(soon)) else {
            return;
        };
        if seen.warned.is_none_or(|warned| now - warned >= again) {
            seen.warned = Some(now);
            let (what, until) = (self.what, date(until));
            tracing::warn!(what, until, "the TLS certificate ends soon");
        }
    }
}
