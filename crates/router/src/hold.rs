//! Requests that wait because nobody can serve them now: the workers load, or there are none yet. Bounded in number,
//! memory and time, whoever has most of them giving way; never holds what no worker will ever take.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use crate::cluster::ClusterView;
use crate::error::ApiError;
use crate::tenants::{Ask, Entered, FairQueue, Limits, QueueMax, TenantName, Ticket};

/// Who is held.
#[derive(Debug)]
pub(crate) struct Hold {
    wait: Duration,
    max: QueueMax,
    /// A queue that nobody is taken out of in turn. Who has to give way is told so by the end of its channel.
    held: Mutex<FairQueue<oneshot::Sender<()>>>,
    stopping: CancellationToken,
}

/// One that is held; no longer so when dropped.
struct Holding<'a> {
    hold: &'a Hold,
    tenant: TenantName,
    ticket: Ticket,
    gives_way: oneshot::Receiver<()>,
}

impl Drop for Holding<'_> {
    fn drop(&mut self) {
        self.hold.held.lock().leave(&self.tenant, self.ticket);
    }
}

impl Hold {
    /// `stopping` refuses whoever is held.
    pub(crate) fn new(wait: Duration, max: QueueMax, stopping: CancellationToken) -> Self {
        Self {
            wait,
            max,
            held: Mutex::new(FairQueue::new(0, false, max, Duration::MAX)),
            stopping,
        }
    }

    /// Requests that are held.
    pub(crate) fn num_held(&self) -> usize {
        self.held.lock().num_waiting()
    }

    /// Whether a request that came now would be held.
    pub(crate) fn would_hold(&self, cluster: &ClusterView) -> bool {
        !self.wait.is_zero() && !self.stopping.is_cancelled() && cluster.check().is_err()
    }

    /// Returns once requests can be served; an error when they cannot within the limit, or when a tenant that has fewer
    /// held wants the room.
    pub(crate) async fn until_ready(
        &self,
        cluster: &ClusterView,
        ask: &Ask,
    ) -> Result<(), ApiError> {
        let Err(reason) = cluster.check() else {
            return Ok(());
        };
        if self.wait.is_zero() {
            return Err(ApiError::unavailable(reason));
        }
        let mut holding = self.enter(ask)?;
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
            _gave_way = &mut holding.gives_way => {
                let message = "no worker is ready, and others have fewer requests that wait for one";
                return Err(ApiError::unavailable(message));
            }
        }
        let waited = humantime::format_duration(self.wait);
        let reason = cluster.check().err().unwrap_or(reason);
        Err(ApiError::unavailable(format!(
            "nobody could serve this within {waited}: {reason}"
        )))
    }

    fn enter(&self, ask: &Ask) -> Result<Holding<'_>, ApiError> {
        let nobody_runs = Limits {
            concurrent: 0,
            ..ask.limits
        };
        let ask = Ask {
            limits: nobody_runs,
            ..ask.clone()
        };
        let tenant = ask.tenant.clone();
        let (sender, gives_way) = oneshot::channel();
        let entered = self.held.lock().enter(ask, sender, Instant::now());
        let Entered::Waits { ticket, gone } = entered else {
            let QueueMax { requests, bytes } = self.max;
            return Err(ApiError::unavailable(format!(
                "no worker is ready, and {requests} requests or {bytes} bytes of them wait for one already"
            )));
        };
        drop(gone);
        Ok(Holding {
            hold: self,
            tenant,
            ticket,
            gives_way,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::watch;
    use tramontane_coordination::{Members, Placements, SeenIntent, Version, WorkerState};

    use super::*;
    use crate::error::ErrorKind;
    use crate::events::changes::tests::record;
    use crate::tenants::config::Class;

    const WAIT: Duration = Duration::from_secs(30);

    fn hold(requests: usize) -> Hold {
        let max = QueueMax {
            requests,
            bytes: 100,
        };
        Hold::new(WAIT, max, CancellationToken::new())
    }

    fn of(tenant: &str, bytes: usize) -> Ask {
        Ask {
            tenant: TenantName::new(tenant).unwrap(),
            class: Class::Normal,
            limits: Limits::default(),
            places: 1,
            prompt_tokens: 1,
            bytes,
        }
    }

    fn ask(bytes: usize) -> Ask {
        of("a", bytes)
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
        let asked = ask(10);
        let mut held = Box::pin(hold.until_ready(&cluster, &asked));
        assert!(futures::poll!(&mut held).is_pending());
        assert_eq!(hold.num_held(), 1);
        // There is room for one.
        let refused = hold.until_ready(&cluster, &ask(10)).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::Unavailable);
        appear();
        held.await.unwrap();
        assert_eq!(hold.num_held(), 0);
        assert!(!hold.would_hold(&cluster));
        hold.until_ready(&cluster, &ask(1000)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_waits_no_longer_than_the_limit_and_is_told_why() {
        let (hold, (cluster, _appear)) = (hold(1), cluster());
        let late = hold.until_ready(&cluster, &ask(10)).await.unwrap_err();
        assert_eq!(
            late.message,
            "nobody could serve this within 30s: the coordination store has not been read yet"
        );
        assert!(late.retry_after.is_some());
        let large = hold.until_ready(&cluster, &ask(101)).await.unwrap_err();
        assert!(large.message.contains("100 bytes"), "{large}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_router_that_stops_lets_go() {
        let (hold, (cluster, _appear)) = (hold(1), cluster());
        let asked = ask(10);
        let mut held = Box::pin(hold.until_ready(&cluster, &asked));
        assert!(futures::poll!(&mut held).is_pending());
        hold.stopping.cancel();
        assert_eq!(held.await.unwrap_err().message, "this router is stopping");
    }

    #[tokio::test(start_paused = true)]
    async fn who_has_most_held_gives_way_to_who_has_less() {
        // By number, and by bytes where many fit by number.
        for (requests, bytes) in [(4, 1), (100, 25)] {
            let (hold, (cluster, _appear)) = (hold(requests), cluster());
            let (a, b) = (of("a", bytes), of("b", bytes));
            let mut of_a = Vec::new();
            for _ in 0..4 {
                let mut held = Box::pin(hold.until_ready(&cluster, &a));
                assert!(futures::poll!(&mut held).is_pending());
                of_a.push(held);
            }
            let refused = hold.until_ready(&cluster, &a).await.unwrap_err();
            assert!(refused.message.contains("wait for one already"));
            let mut of_b = Vec::new();
            for _ in 0..2 {
                let mut held = Box::pin(hold.until_ready(&cluster, &b));
                assert!(futures::poll!(&mut held).is_pending());
                of_b.push(held);
                let told = of_a.pop().unwrap().await.unwrap_err();
                assert_eq!(told.kind, ErrorKind::Unavailable);
                assert!(told.message.contains("others have fewer"), "{told}");
            }
            // They have as many now.
            let third = hold.until_ready(&cluster, &b).await.unwrap_err();
            assert!(third.message.contains("wait for one already"));
            for held in of_a.iter_mut().chain(&mut of_b) {
                assert!(futures::poll!(held).is_pending());
            }
            assert_eq!(hold.num_held(), 4);
        }
    }
}
