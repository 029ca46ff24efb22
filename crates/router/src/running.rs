//! The sequences of one request while they run: what they say is told to whoever reads the answer, and counted.

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{BoxStream, SelectAll};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tramontane_coordination::Version;
use tramontane_types::Usage;

use crate::admission::Places;
use crate::answer::{Spent, Told, stopping};
use crate::error::ApiError;
use crate::metrics::{Metrics, Outcome};
use crate::sequence::Delta;
use crate::tenants::{Quotas, TenantName};

/// The sequences of one request. Dropping it aborts them.
pub(crate) struct Running {
    /// What all of them began with.
    pub(crate) version: Arc<Version>,
    pub(crate) streams: SelectAll<BoxStream<'static, Result<Delta, ApiError>>>,
    /// Answers per prompt.
    pub(crate) n: usize,
    pub(crate) usage: Usage,
    pub(crate) progress: Vec<Progress>,
    pub(crate) arrived: Instant,
    pub(crate) queued: Duration,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) abort: CancellationToken,
    pub(crate) failed: bool,
    pub(crate) tenant: TenantName,
    pub(crate) quotas: Arc<Quotas>,
    pub(crate) places: Places,
}

/// How far one answer is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Progress {
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    num_tokens: u32,
    cached_tokens: u32,
    finished: bool,
}

impl Running {
    /// Tells `reader` everything up to the end, to an error, or until it is gone or stalls.
    pub(crate) async fn follow(mut self, reader: mpsc::Sender<Told>, stall_max: Duration) {
        loop {
            let next = tokio::select! {
                biased;
                next = self.next() => next,
                () = reader.closed() => return,
            };
            let Some(delta) = next else {
                // Counted before the reader sees the end.
                drop(self);
                return;
            };
            let spent = self.spent();
            let telling = timeout(stall_max, reader.send(Told { delta, spent }));
            let told = tokio::select! {
                biased;
                told = telling => told,
                // The reader sees from the token why nothing more comes.
                () = self.abort.cancelled(), if !self.failed => return,
            };
            match told {
                Ok(Ok(())) => {}
                Ok(Err(_gone)) => return,
                Err(_elapsed) => {
                    tracing::debug!("a client does not read its answer and is cut off");
                    return;
                }
            }
        }
    }

    /// What comes next in any of the answers; `None` when all have ended. Nothing follows an error.
    pub(crate) async fn next(&mut self) -> Option<Result<Delta, ApiError>> {
        if self.failed {
            return None;
        }
        // The stop signal first: answers that never pause must not hide it.
        let next = tokio::select! {
            biased;
            () = self.abort.cancelled() => Err(stopping()),
            next = self.streams.next() => next?,
        };
        match &next {
            Ok(delta) => self.note(delta),
            Err(_) => {
                self.failed = true;
                // Aborts the other answers now, not when the client is done reading.
                self.streams.clear();
                self.places.shrink_to(0);
            }
        }
        Some(next)
    }

    /// What the request took so far.
    pub(crate) fn spent(&self) -> Spent {
        let first = self.progress.iter().filter_map(|p| p.first_token).min();
        Spent {
            usage: self.usage,
            queued: self.queued,
            first_token: first.map(|first| first - self.arrived),
            next_token: self.next_token(),
            total: self.arrived.elapsed(),
        }
    }

    /// Mean time from a token to the next one of the same answer.
    fn next_token(&self) -> Option<Duration> {
        let (mut time, mut num_next) = (Duration::ZERO, 0_u32);
        for progress in &self.progress {
            if let (Some(first), Some(last)) = (progress.first_token, progress.last_token) {
                time += last - first;
                num_next = num_next.saturating_add(progress.num_tokens.saturating_sub(1));
            }
        }
        time.checked_div(num_next)
    }

    fn note(&mut self, delta: &Delta) {
        let Some(progress) = self.progress.get_mut(delta.choice) else {
            return;
        };
        let now = Instant::now();
        let is_first_of_prompt = delta.choice.is_multiple_of(self.n.max(1));
        if let Some(cached) = delta.cached_tokens.filter(|_| is_first_of_prompt) {
            // A sequence that starts anew elsewhere says it again.
            let before = std::mem::replace(&mut progress.cached_tokens, cached);
            let others = self.usage.cached_tokens.saturating_sub(before);
            self.usage.cached_tokens = others.saturating_add(cached);
        }
        let num_tokens = u32::try_from(delta.tokens.len()).unwrap_or(u32::MAX);
        if num_tokens > 0 {
            self.metrics.sampled(num_tokens);
            self.metrics.tenants.generated(&self.tenant, num_tokens);
            self.quotas.generated(&self.tenant, num_tokens.into());
            self.places.generated(num_tokens);
            match progress.last_token {
                None => self.metrics.first_token(self.arrived.elapsed()),
                Some(last) => self.metrics.next_tokens(now - last, num_tokens),
            }
            progress.first_token.get_or_insert(now);
            progress.last_token = Some(now);
            progress.num_tokens = progress.num_tokens.saturating_add(num_tokens);
            self.usage.completion_tokens = self.usage.completion_tokens.saturating_add(num_tokens);
        }
        if let Some(reason) = delta.finish {
            progress.finished = true;
            self.metrics.finished(Outcome::from(reason));
            let num_running = self.progress.iter().filter(|p| !p.finished).count();
            self.places.shrink_to(num_running);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for progress in &self.progress {
            if !progress.finished {
                self.metrics.finished(if self.failed {
                    Outcome::Error
                } else {
                    Outcome::Abort
                });
            }
            if let (Some(first), Some(last)) = (progress.first_token, progress.last_token) {
                self.metrics.token_pace(last - first, progress.num_tokens);
            }
        }
        self.metrics
            .request_ended(self.arrived.elapsed(), self.usage);
    }
}
