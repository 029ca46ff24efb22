//! A watch that survives what etcd streams do not: silence, a dead endpoint, a lost leader.
//! Never skips a revision: it resumes behind the last one that it delivered, or says that it cannot.
//!
//! An etcd that comes back without its data counts revisions from 1 again. A watch for a later revision
//! would wait there in silence, so every answer's header is compared with what was read before.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    EventType, GetOptions, ResponseHeader, WatchOptions, WatchResponse, WatchStream,
};
use futures::stream;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::status::error_of;
use super::{ANSWER_BYTES_MAX, RETRY_PAUSE_MAX, RETRY_PAUSE_MIN, Shared};
use crate::Error;
use crate::backoff::Backoff;
use crate::store::{Revision, Watch, WatchEvent, check_prefix};

/// How often a silent stream is asked for a sign of life.
pub const WATCH_PROBE_EVERY: Duration = Duration::from_secs(2);
/// A stream that was silent for this long, probes included, is opened anew.
pub const WATCH_SILENCE_MAX: Duration = Duration::from_secs(5);
/// A watch that cannot be resumed for this long ends: its reader must know that it is blind.
pub const WATCH_BLIND_MAX: Duration = Duration::from_secs(5);

pub(super) fn watch(shared: Arc<Shared>, prefix: &str, from: Revision) -> Watch {
    if let Err(error) = check_prefix(prefix) {
        return Box::pin(stream::iter([Err(error)]));
    }
    let watcher = Watcher {
        prefix: shared.absolute(prefix),
        shared,
        next: from,
        cluster: None,
        ready: VecDeque::new(),
        open: None,
        heard: Instant::now(),
        backoff: Backoff::new(RETRY_PAUSE_MIN, RETRY_PAUSE_MAX),
        ended: false,
    };
    Box::pin(stream::unfold(watcher, Watcher::step))
}

struct Watcher {
    shared: Arc<Shared>,
    prefix: String,
    /// Where to resume: behind the last revision that was received.
    next: Revision,
    /// Etcd's own id of the cluster that answered first.
    cluster: Option<u64>,
    ready: VecDeque<WatchEvent>,
    open: Option<Open>,
    /// When etcd last answered anything.
    heard: Instant,
    backoff: Backoff,
    ended: bool,
}

struct Open {
    stream: WatchStream,
    endpoint: usize,
    opened: Instant,
    probe: Instant,
}

impl Watcher {
    async fn step(mut self) -> Option<(Result<WatchEvent, Error>, Self)> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some((Ok(event), self));
            }
            if self.ended {
                return None;
            }
            let progress = match self.open.take() {
                Some(open) => self.read(open).await,
                None => self.reopen().await,
            };
            let Err(error) = progress else { continue };
            if error.is_retryable() && self.heard.elapsed() < WATCH_BLIND_MAX {
                tracing::debug!(prefix = self.prefix, %error, "etcd watch interrupted");
                sleep(self.backoff.pause()).await;
                continue;
            }
            self.ended = true;
            return Some((Err(error), self));
        }
    }

    async fn reopen(&mut self) -> Result<(), Error> {
        let operation = "open watch";
        let shared = Arc::clone(&self.shared);
        let (index, endpoint) = shared.endpoint()?;
        let options = WatchOptions::new()
            .with_prefix()
            .with_start_revision(self.next.0);
        let open = async {
            let client = shared.client(operation, endpoint).await?;
            let mut watch = client
                .watch_client()
                .max_decoding_message_size(ANSWER_BYTES_MAX);
            let stream = watch.watch(self.prefix.as_str(), Some(options)).await;
            stream.map_err(|e| error_of(operation, &e))
        };
        let after = shared.config.attempt_timeout;
        let opened = timeout(after, open).await;
        let opened = opened.unwrap_or(Err(Error::Timeout { operation, after }));
        match opened {
            Ok(stream) => {
                let opened = Instant::now();
                self.open = Some(Open {
                    stream,
                    endpoint: index,
                    opened,
                    probe: opened + WATCH_PROBE_EVERY,
                });
                Ok(())
            }
            Err(error) => {
                shared.leave(index);
                Err(error)
            }
        }
    }

    /// Waits for one message; the stream is kept only if it is still good.
    async fn read(&mut self, mut open: Open) -> Result<(), Error> {
        let operation = "watch";
        let silent_at = self.heard.max(open.opened) + WATCH_SILENCE_MAX;
        let message = tokio::select! {
            message = open.stream.message() => message,
            () = sleep_until(open.probe.min(silent_at)) => {
                if Instant::now() >= silent_at {
                    self.shared.leave(open.endpoint);
                    return Err(Error::Timeout { operation, after: WATCH_SILENCE_MAX });
                }
                open.probe += WATCH_PROBE_EVERY;
                let asked = open.stream.request_progress().await;
                self.open = Some(open);
                return asked.map_err(|e| error_of(operation, &e));
            }
        };
        match message {
            Ok(Some(response)) => {
                self.heard = Instant::now();
                self.check_same_store(response.header(), open.endpoint)
                    .await?;
                self.receive(&response)?;
                self.backoff.reset();
                self.open = Some(open);
                Ok(())
            }
            Ok(None) => Err(Error::Unavailable {
                operation,
                detail: "etcd ended the stream".to_owned(),
            }),
            Err(error) => {
                self.shared.leave(open.endpoint);
                Err(error_of(operation, &error))
            }
        }
    }

    /// Refuses an etcd that is not the one that was read before.
    async fn check_same_store(
        &mut self,
        header: Option<&ResponseHeader>,
        endpoint: usize,
    ) -> Result<(), Error> {
        // Etcd leaves the revision out when it says that the history is gone.
        let Some(header) = header.filter(|header| header.revision() > 0) else {
            return Ok(());
        };
        let cluster = *self.cluster.get_or_insert(header.cluster_id());
        let found = Revision(header.revision());
        if cluster != header.cluster_id() {
            return Err(self.replaced(found));
        }
        if found.next() >= self.next {
            return Ok(());
        }
        // A member that lags behind the others is also at an earlier revision, but only they know.
        let found = self.newest_revision(endpoint).await?;
        if found.next() >= self.next {
            return Ok(());
        }
        Err(self.replaced(found))
    }

    fn replaced(&self, found: Revision) -> Error {
        Error::Replaced {
            expected: Revision(self.next.0 - 1),
            found,
        }
    }

    /// The revision that a majority agrees on.
    async fn newest_revision(&self, endpoint: usize) -> Result<Revision, Error> {
        let operation = "compare revisions";
        let shared = &self.shared;
        let Some(asked) = shared.endpoints.get(endpoint) else {
            return Err(Error::invalid("etcd endpoint", "no such index"));
        };
        let ask = async {
            let client = shared.client(operation, asked).await?;
            let options = GetOptions::new().with_count_only();
            let mut kv = client.kv_client();
            let answer = kv.get(self.prefix.as_str(), Some(options)).await;
            let answer = answer.map_err(|e| error_of(operation, &e))?;
            let revision = answer.header().map(ResponseHeader::revision);
            revision.map(Revision).ok_or_else(|| Error::Unavailable {
                operation,
                detail: "answer without a header".to_owned(),
            })
        };
        let after = shared.config.attempt_timeout;
        let newest = timeout(after, ask).await;
        let newest = newest.unwrap_or(Err(Error::Timeout { operation, after }));
        if newest.is_err() {
            shared.leave(endpoint);
        }
        newest
    }

    fn receive(&mut self, response: &WatchResponse) -> Result<(), Error> {
        if response.compact_revision() > 0 {
            return Err(Error::Compacted {
                from: self.next,
                oldest: Revision(response.compact_revision()),
            });
        }
        if response.canceled() {
            return Err(Error::Unavailable {
                operation: "watch",
                detail: response.cancel_reason().to_owned(),
            });
        }
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let revision = Revision(kv.mod_revision());
            // Progress answers carry a revision too, but it may run ahead of events: not used.
            self.next = self.next.max(revision.next());
            let ours = match event.event_type() {
                EventType::Put => self.shared.entry(kv).map(WatchEvent::Put),
                EventType::Delete => self
                    .shared
                    .relative(kv.key())
                    .map(|key| WatchEvent::Delete { key, revision }),
            };
            self.ready.extend(ours);
        }
        Ok(())
    }
}
