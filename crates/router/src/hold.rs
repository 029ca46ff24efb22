//! Requests that wait because nobody can serve them now: the workers load, or there are none yet. Bounded in number,
//! memory and time; never holds what no worker will ever take.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::cluster::ClusterView;
use crate::error::{ApiError, ErrorKind};
use crate::tenants::QueueMax;

/// Who is held.
#[derive(Debug)]
pub(crate) struct Hold {
    wait: Duration,
    max: QueueMax,
    held: Mutex<Held>,
    stopping: CancellationToken,
}

#[derive(Debug, Default)]
struct Held {
    requests: usize,
    bytes: usize,
}

/// One that is held.
struct Holding<'a> {
    hold: &'a Hold,
    bytes: usize,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        let mut held = self.hold.held.lock();
        held.requests -= 1;
        held.bytes -= self.bytes;
    }
}

impl Hold {
    /// `stopping` refuses whoever is held.
    pub(crate) fn new(wait: Duration, max: QueueMax, stopping: CancellationToken) -> Self {
        Self {
            wait,
            max,
            held: Mutex::default(),
            stopping,
        }
    }

    /// Requests that are held.
    pub(crate) fn num_held(&self) -> usize {
        self.held.lock().requests
    }

    /// Whether a request that came now would be held.
    pub(crate) fn would_hold(&self, cluster: &ClusterView) -> bool {
        !self.wait.is_zero() && !self.stopping.is_cancelled() && cluster.check().is_err()
    }

    /// Returns once requests can be served; an error when they cannot within the limit.
    pub(crate) async fn until_ready(
        &self,
        cluster: &ClusterView,
        bytes: usize,
    ) -> Result<(), ApiError> {
        let Err(reason) = cluster.check() else {
            return Ok(());
        };
        if self.wait.is_zero() {
            return Err(ApiError::unavailable(reason));
        }
        let _holding = self.enter(bytes)?;
        let mut cluster = cluster.clone();
        let ready = async {
            while cluster.check().is_err() {
                cluster.changed().await;
            }
        };
        tokio::select! {
            biased;
            ready = timeout(self.wait, ready) => {
                let Err(_elapsed) = ready else { return Ok(()) };
            }
            () = self.stopping.cancelled() => {
                return Err(ApiError::unavailable("this router is stopping"));
            }
        }
        let waited = humantime::format_duration(self.wait);
        let reason = cluster.check().err().unwrap_or(reason);
        Err(ApiError::unavailable(format!(
            "nobody could serve this within {waited}: {reason}"
        )))
    }

    fn enter(&self, bytes: usize) -> Result<Holding<'_>, ApiError> {
        let QueueMax {
            requests,
            bytes: bytes_max,
        } = self.max;
        let mut held = self.held.lock();
        if held.requests >= requests || held.bytes.saturating_add(bytes) > bytes_max {
            let message = format!(
                "no worker is ready, and {requests} requests or {bytes_max} bytes of them wait for one already"
            );
            return Err(ApiError::new(ErrorKind::Unavailable, message));
        }
        held.requests += 1;
        held.bytes += bytes;
        Ok(Holding { hold: self, bytes })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::watch;
    use tramontane_coordination::{Members, Placements, SeenIntent, Version, WorkerState};

    use super::*;
    use crate::events::changes::tests::record;

    const WAIT: Duration = Duration::from_secs(30);

    fn hold(requests: usize) -> Hold {
        let max = QueueMax {
            requests,
            bytes: 100,
        };
        Hold::new(WAIT, max, CancellationToken::new())
    }

    /// A cluster that nobody has seen yet, and who says that it is there.
    fn cluster() -> (ClusterView, impl FnOnce()) {
        let (members_sender, members) = watch::channel(Arc::<Members>::default());
        let (placements_sender, placements) = watch::channel(Arc::<Placements>::default());
        let (intent_sender, intent) = watch::channel(Arc::<SeenIntent>::default());
        let view = ClusterView {
            members,
            placements,
            intent,
        };
        let appear = move || {
            let worker = record("a", WorkerState::Ready);
            let version = Version::of(&worker);
            let mut placements = Placements {
                synced: true,
                serving: Some(Arc::new(version.clone())),
                ..Placements::default()
            };
            let placement = crate::events::changes::tests::placement(1, ["a", "a"]);
            let group = placements.groups.entry(version.key()).or_default();
            group.published = Some(Arc::new(placement));
            intent_sender.send_modify(|seen| Arc::make_mut(seen).synced = true);
            placements_sender.send_replace(Arc::new(placements));
            members_sender.send_modify(|members| {
                let members = Arc::make_mut(members);
                members.synced = true;
                members.workers.insert(worker.id.clone(), Arc::new(worker));
            });
        };
        (view, appear)
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_until_somebody_can_serve_it() {
        let (hold, (cluster, appear)) = (hold(1), cluster());
        let mut held = Box::pin(hold.until_ready(&cluster, 10));
        assert!(futures::poll!(&mut held).is_pending());
        assert_eq!(hold.num_held(), 1);
        // There is room for one.
        let refused = hold.until_ready(&cluster, 10).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unavailable);
        appear();
        held.await.unwrap();
        assert_eq!(hold.num_held(), 0);
        assert!(!hold.would_hold(&cluster));
        hold.until_ready(&cluster, 1000).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_no_longer_than_the_limit_and_is_told_why() {
        let (hold, (cluster, _appear)) = (hold(1), cluster());
        let late = hold.until_ready(&cluster, 10).await.unwrap_err();
        assert_eq!(
            late.message,
            "nobody could serve this within 30s: the coordination store has not been read yet"
        );
        assert!(late.retry_after.is_some());
        let large = hold.until_ready(&cluster, 101).await.unwrap_err();
        assert!(large.message.contains("100 bytes"), "{large}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_router_that_stops_lets_go() {
        let (hold, (cluster, _appear)) = (hold(1), cluster());
        let mut held = Box::pin(hold.until_ready(&cluster, 10));
        assert!(futures::poll!(&mut held).is_pending());
        hold.stopping.cancel();
        assert_eq!(held.await.unwrap_err().message, "this router is stopping");
    }
}
