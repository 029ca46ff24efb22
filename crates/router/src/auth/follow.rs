//! Files and addresses whose content this server goes by, followed while it runs. What cannot be read or used changes
//! nothing at first: what was there before stays, and the log says so. Who follows a file decides what becomes of it when
//! it stays so.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};
use tokio::io::AsyncReadExt as _;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// How often a file is looked at: a key that is revoked works for no longer.
pub(crate) const LOOK_EVERY: Duration = Duration::from_secs(2);
/// A file that could not be used for so long counts as lost: nobody knows any more what it would say.
pub(crate) const UNUSABLE_MAX: Duration = Duration::from_secs(300);
/// How often the log says that a file cannot be used.
const SAY_EVERY: Duration = Duration::from_secs(30);
/// Longest time for the keys of an issuer to arrive.
pub(crate) const FETCH_TIMEOUT: Duration = Duration::from_secs(10);
/// Largest set of an issuer's keys.
pub(crate) const JWKS_BYTES_MAX: usize = 512 << 10;
/// Between two fetches, whoever asks for one.
const FETCH_PAUSE: Duration = Duration::from_secs(10);
/// While an issuer does not answer, it is asked this often.
const RETRY_PAUSE: Duration = Duration::from_secs(15);

/// What is in force now.
#[derive(Debug)]
pub(crate) struct Current<T>(RwLock<Arc<T>>);

impl<T> Current<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(RwLock::new(Arc::new(value)))
    }

    pub(crate) fn get(&self) -> Arc<T> {
        Arc::clone(&self.0.read())
    }

    pub(super) fn set(&self, value: T) {
        *self.0.write() = Arc::new(value);
    }
}

/// What a file said last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seen([u8; 32]);

/// A file that is read again and again.
#[derive(Debug)]
pub(crate) struct Followed {
    path: PathBuf,
    bytes_max: usize,
    what: &'static str,
}

impl Followed {
    pub(crate) const fn new(path: PathBuf, bytes_max: usize, what: &'static str) -> Self {
        Self {
            path,
            bytes_max,
            what,
        }
    }

    /// Reads it for the first time, when no task of the runtime waits for anything else.
    pub(crate) fn read_now(&self) -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let file = std::fs::File::open(&self.path)?;
        let most = self.bytes_max as u64 + 1;
        std::io::Read::read_to_end(&mut std::io::Read::take(file, most), &mut bytes)?;
        Ok(bytes)
    }

    /// Has `take` judge every new content until the future is dropped, and calls `lost` when there was none that can be
    /// used for [`UNUSABLE_MAX`]. `first` is what `take` knows already.
    pub(crate) async fn run(
        self,
        first: &[u8],
        take: impl Fn(&[u8]) -> Result<(), String>,
        lost: impl Fn(),
    ) {
        let mut seen = Ok(Seen(Sha256::digest(first).into()));
        let mut unusable = None;
        loop {
            sleep(LOOK_EVERY).await;
            let read = read(&self.path, self.bytes_max).await;
            let now = match &read {
                Ok(bytes) => Ok(Seen(Sha256::digest(bytes).into())),
                Err(error) => Err(error.kind()),
            };
            if now == seen {
                self.remind(&mut unusable, &lost);
                continue;
            }
            seen = now;
            let (path, what) = (self.path.display(), self.what);
            match read
                .map_err(|error| error.to_string())
                .and_then(|bytes| take(&bytes))
            {
                Ok(()) => {
                    unusable = None;
                    tracing::info!(%path, what, "read anew");
                }
                Err(error) => {
                    unusable.get_or_insert_with(Unusable::begin);
                    tracing::warn!(%path, what, error, "not usable, going on with what was there before");
                }
            }
        }
    }

    /// Says again that the file cannot be used, if it cannot, and that it is lost.
    fn remind(&self, unusable: &mut Option<Unusable>, lost: &impl Fn()) {
        let Some(unusable) = unusable else { return };
        let (path, what, since) = (self.path.display(), self.what, unusable.since.elapsed());
        if since >= UNUSABLE_MAX && !unusable.is_lost {
            unusable.is_lost = true;
            lost();
        }
        if unusable.said.elapsed() >= SAY_EVERY {
            unusable.said = Instant::now();
            let is_lost = unusable.is_lost;
            tracing::error!(%path, what, ?since, is_lost, "still not usable: what it says now is not in force");
        }
    }
}

/// A file that cannot be used.
#[derive(Debug)]
struct Unusable {
    since: Instant,
    said: Instant,
    is_lost: bool,
}

impl Unusable {
    fn begin() -> Self {
        let since = Instant::now();
        Self {
            since,
            said: since,
            is_lost: false,
        }
    }
}

/// At most one byte more than allowed, which whoever judges it refuses.
async fn read(path: &Path, bytes_max: usize) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = tokio::fs::File::open(path).await?;
    file.take(bytes_max as u64 + 1)
        .read_to_end(&mut bytes)
        .await?;
    Ok(bytes)
}

/// Keys that an issuer publishes at an address.
#[derive(Debug)]
pub(crate) struct Fetched {
    pub(crate) url: String,
    pub(crate) refresh: Duration,
    /// Somebody has a token with a key that is not known.
    pub(crate) wanted: Arc<Notify>,
}

impl Fetched {
    /// Has `take` judge what is fetched until the future is dropped.
    pub(crate) async fn run(self, take: impl Fn(&[u8]) -> Result<(), String>) {
        let client = match client(&self.url) {
            Ok(client) => client,
            Err(error) => {
                tracing::error!(%error, "no client for the issuer's keys");
                return;
            }
        };
        let mut was_good = true;
        loop {
            let fetched = match timeout(FETCH_TIMEOUT, fetch(&client, &self.url)).await {
                Ok(fetched) => fetched.and_then(|bytes| take(&bytes)),
                Err(_elapsed) => Err("no answer in time".to_owned()),
            };
            let at = Instant::now();
            if let Err(error) = &fetched
                && was_good
            {
                tracing::warn!(
                    error,
                    "the issuer's keys are not usable, going on with those before"
                );
            }
            was_good = fetched.is_ok();
            let pause = if was_good { self.refresh } else { RETRY_PAUSE };
            tokio::select! {
                () = sleep(pause) => {}
                () = self.wanted.notified() => sleep(FETCH_PAUSE.saturating_sub(at.elapsed())).await,
            }
        }
    }
}

fn client(url: &str) -> reqwest::Result<reqwest::Client> {
    tramontane_runtime::tls::install_provider();
    let builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(FETCH_TIMEOUT);
    // What is on this machine is not behind a proxy.
    if url.starts_with("http://") {
        return builder.no_proxy().build();
    }
    builder.build()
}

async fn fetch(client: &reqwest::Client, url: &str) -> Result<Vec<u8>, String> {
    let answer = client.get(url).send().await;
    // Its own text would show the address, which is the operator's to know, and nothing else of use.
    let mut answer = answer.map_err(|error| error.without_url().to_string())?;
    if answer.status() != http::StatusCode::OK {
        return Err(format!(
            "the answer is {}, expected 200",
            answer.status().as_u16()
        ));
    }
    let mut bytes = Vec::new();
    loop {
        let chunk = answer.chunk().await;
        let chunk = chunk.map_err(|error| error.without_url().to_string())?;
        let Some(chunk) = chunk else {
            return Ok(bytes);
        };
        if bytes.len() + chunk.len() > JWKS_BYTES_MAX {
            return Err(format!("the answer has more than {JWKS_BYTES_MAX} bytes"));
        }
        bytes.extend_from_slice(&chunk);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use parking_lot::Mutex;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    type Log = Arc<Mutex<Vec<String>>>;

    fn judge(log: &Log) -> impl Fn(&[u8]) -> Result<(), String> + use<> {
        let log = Arc::clone(log);
        move |bytes| {
            let text = String::from_utf8_lossy(bytes).into_owned();
            log.lock().push(text.clone());
            (!text.contains("bad"))
                .then_some(())
                .ok_or_else(|| "bad".to_owned())
        }
    }

    async fn until(log: &Log, expected: &[&str]) {
        while *log.lock() != expected {
            sleep(LOOK_EVERY / 4).await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_is_judged_when_its_content_changes_and_only_then() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"one").unwrap();
        let log = Log::default();
        let followed = Followed::new(file.path().to_owned(), 100, "test");
        assert_eq!(followed.read_now().unwrap(), b"one");
        let following = followed.run(b"one", judge(&log), || ());
        let scene = async {
            sleep(10 * LOOK_EVERY).await;
            assert!(log.lock().is_empty());
            std::fs::write(file.path(), "bad").unwrap();
            until(&log, &["bad"]).await;
            sleep(10 * LOOK_EVERY).await;
            let path = file.into_temp_path();
            std::fs::remove_file(&path).unwrap();
            sleep(10 * LOOK_EVERY).await;
            std::fs::write(&path, "two").unwrap();
            until(&log, &["bad", "two"]).await;
        };
        tokio::select! {
            () = following => {}
            done = timeout(1000 * LOOK_EVERY, scene) => done.unwrap(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_stays_unusable_is_lost_once_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "one").unwrap();
        let log = Log::default();
        let lost = || log.lock().push("lost".to_owned());
        let following = Followed::new(path.clone(), 100, "test").run(b"one", judge(&log), lost);
        let scene = async {
            // Two faults in a row are one time without the file.
            std::fs::write(&path, "bad").unwrap();
            sleep(UNUSABLE_MAX / 2).await;
            std::fs::remove_file(&path).unwrap();
            sleep(UNUSABLE_MAX / 2 - LOOK_EVERY).await;
            assert_eq!(*log.lock(), ["bad"]);
            sleep(4 * LOOK_EVERY).await;
            assert_eq!(*log.lock(), ["bad", "lost"]);
            sleep(3 * UNUSABLE_MAX).await;
            assert_eq!(*log.lock(), ["bad", "lost"]);
            // What it said before is news now.
            std::fs::write(&path, "one").unwrap();
            until(&log, &["bad", "lost", "one"]).await;
            std::fs::remove_file(&path).unwrap();
            until(&log, &["bad", "lost", "one", "lost"]).await;
        };
        tokio::select! {
            () = following => {}
            done = timeout(10 * UNUSABLE_MAX, scene) => done.unwrap(),
        }
    }

    /// Answers each connection with the next of `answers`, then the last for ever.
    async fn issuer(listener: TcpListener, answers: Vec<String>) {
        let mut answers = answers.into_iter().peekable();
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 1024];
            let _size = stream.read(&mut request).await.unwrap();
            let answer = match answers.len() {
                1 => answers.peek().cloned(),
                _ => answers.next(),
            };
            let _gone = stream.write_all(answer.unwrap().as_bytes()).await;
        }
    }

    fn answer(status: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\n{headers}connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    }

    #[tokio::test]
    async fn an_answer_that_is_not_what_was_asked_for_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/jwks.json", listener.local_addr().unwrap());
        let large = "x".repeat(JWKS_BYTES_MAX + 1);
        let answers = vec![
            answer("200 OK", "", "keys"),
            answer("302 Found", "location: http://127.0.0.1:1/\r\n", ""),
            answer("500 No", "", "keys"),
            answer("200 OK", "", &large),
        ];
        let expected = [
            Ok(b"keys".to_vec()),
            Err("the answer is 302, expected 200".to_owned()),
            Err("the answer is 500, expected 200".to_owned()),
            Err(format!("the answer has more than {JWKS_BYTES_MAX} bytes")),
        ];
        let client = client(&url).unwrap();
        let asking = async {
            for expected in expected {
                assert_eq!(fetch(&client, &url).await, expected);
            }
        };
        tokio::select! {
            () = issuer(listener, answers) => {}
            () = asking => {}
        }
    }
}
