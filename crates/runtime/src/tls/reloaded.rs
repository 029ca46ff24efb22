//! Something made of files, and made again when they change. A change that cannot be used is logged once and tried at
//! every look, for it may be usable later: a certificate's time begins. What was made before stays. Never touches what
//! runs: who asks next gets the new one.

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
    /// What the current value was made of.
    contents: Contents,
    /// What was not used at the last look, if anything.
    refused: Option<Refused>,
    until: Option<i64>,
    /// When the end of its time was last warned about.
    warned: Option<i64>,
}

/// What is said once for as long as it stays so.
#[derive(PartialEq, Eq)]
enum Refused {
    /// Files that cannot be read, and why.
    Unreadable(String),
    /// Contents that nothing can be made of.
    Unusable(Contents),
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
            refused: None,
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
            Ok(contents) if contents == seen.contents => seen.refused = None,
            Ok(contents) => self.replace(&mut seen, contents),
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                let cause = error.source().map(ToString::to_string);
                let why = format!("{error}: {}", cause.unwrap_or_default());
                if seen.is_news(Refused::Unreadable(why)) {
                    tracing::warn!(
                        what = self.what,
                        error,
                        "TLS files cannot be read, the old identity stays"
                    );
                }
            }
        }
        self.warn_of_end(&mut seen, now);
    }

    fn replace(&self, seen: &mut Seen, contents: Contents) {
        match (self.make)(&self.files, &contents) {
            Ok((value, until)) => {
                self.current.store(Arc::new(value));
                *seen = Seen {
                    contents,
                    refused: None,
                    until,
                    warned: None,
                };
                let until = until.map(date);
                tracing::info!(
                    what = self.what,
                    until,
                    "new TLS files are used from now on"
                );
            }
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                if seen.is_news(Refused::Unusable(contents)) {
                    tracing::error!(
                        what = self.what,
                        error,
                        "new TLS files cannot be used, the old identity stays"
                    );
                }
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

impl Seen {
    /// Remembers what is refused; whether it was not refused at the look before.
    fn is_news(&mut self, refused: Refused) -> bool {
        let refused = Some(refused);
        let is_news = self.refused != refused;
        self.refused = refused;
        is_news
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io;
    use std::path::Path;
    use std::sync::atomic::{AtomicI64, Ordering};

    use super::*;

    /// What was logged, a line each.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn count(&self, words: &str) -> usize {
            let text = String::from_utf8(self.0.lock().clone()).unwrap();
            text.lines().filter(|line| line.contains(words)).count()
        }
    }

    /// A file with the time from which on it can be used.
    fn following(file: &Path, clock: &Arc<AtomicI64>) -> Reloaded<i64> {
        let files = Files {
            own: None,
            ca: Some(file.to_owned()),
        };
        let (clock, path) = (Arc::clone(clock), file.to_owned());
        let make = move |_: &Files, contents: &Contents| {
            let text = std::str::from_utf8(contents.ca.as_deref().unwrap()).unwrap();
            let (from, now) = (text.parse::<i64>().unwrap(), clock.load(Ordering::Relaxed));
            if now >= from {
                return Ok((from, None));
            }
            Err(TlsError::NotNow {
                path: path.clone(),
                from: from.to_string(),
                until: String::new(),
                now: now.to_string(),
            })
        };
        Reloaded::load("test", files, make).unwrap()
    }

    #[test]
    fn what_cannot_be_used_yet_is_said_once_and_used_when_its_time_comes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "0").unwrap();
        let (log, clock) = (Log::default(), Arc::new(AtomicI64::new(0)));
        let followed = following(&file, &clock);
        let written = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || written.clone())
            .finish();
        let _logged = tracing::subscriber::set_default(subscriber);

        fs::write(&file, "5").unwrap();
        for now in 1..5 {
            clock.store(now, Ordering::Relaxed);
            followed.look();
            assert_eq!(*followed.get(), 0);
        }
        assert_eq!(log.count("cannot be used"), 1);
        clock.store(5, Ordering::Relaxed);
        followed.look();
        assert_eq!(*followed.get(), 5);
        // Another content is other news, also after one that was good.
        fs::write(&file, "9").unwrap();
        followed.look();
        fs::write(&file, "5").unwrap();
        followed.look();
        fs::write(&file, "9").unwrap();
        followed.look();
        assert_eq!(log.count("cannot be used"), 3);
        assert_eq!(*followed.get(), 5);
    }

    #[test]
    fn a_file_that_cannot_be_read_is_said_once() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "0").unwrap();
        let log = Log::default();
        let followed = following(&file, &Arc::default());
        let written = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_writer(move || written.clone())
            .finish();
        let _logged = tracing::subscriber::set_default(subscriber);
        for times in 1..3 {
            fs::remove_file(&file).unwrap();
            for _ in 0..3 {
                followed.look();
            }
            assert_eq!(log.count("cannot be read"), times);
            fs::write(&file, "0").unwrap();
            followed.look();
        }
    }
}
