//! `--wait`: looks at the cluster again and again until it shows the result of a change. Never longer than
//! `--timeout`, and not at all when it can see that the result cannot come.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tramontane_proto::v1;
use tramontane_types::Placement;

use super::{Admin, SEE_STATUS, placement, status, weights, workers};
use crate::args::ChangeArgs;
use crate::exit::{Exit, refusal};
use crate::output;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The cluster at one look.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) status: v1::ClusterStatusResponse,
    pub(super) workers: Vec<v1::WorkerSummary>,
    /// Of the version that serves; `None` when nothing is published.
    pub(super) placement: Option<Placement>,
    pub(super) weights: Vec<v1::WeightsSummary>,
}

/// How far a change is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Done,
    /// And for what it waits.
    Waiting(String),
    /// The same, for something that the weights that serve now have no part in: a shortage of theirs ends nothing.
    Elsewhere(String),
}

impl Look {
    async fn take(admin: &mut Admin) -> anyhow::Result<Self> {
        Ok(Self {
            status: status::read(admin).await?,
            workers: workers::read(admin).await?,
            placement: placement::read(admin).await?,
            weights: weights::read(admin).await?,
        })
    }

    pub(super) fn worker(&self, id: &str) -> Option<&v1::WorkerSummary> {
        self.workers.iter().find(|worker| worker.id == id)
    }

    /// Whether a published placement names a worker.
    pub(super) fn is_placed(&self, id: &str) -> bool {
        let mut named = self.placement.iter().flat_map(|p| &p.workers);
        // Of other weights than those that serve, the worker's own count tells.
        named.any(|worker| worker.as_str() == id) || self.worker(id).is_some_and(|w| w.slices > 0)
    }

    /// Done when no placement is on its way and the planner, where it can be asked, wants no other.
    pub(super) fn settled(&self) -> Progress {
        let status = &self.status;
        if status.pending_epoch != 0 {
            let epoch = status.pending_epoch;
            return Progress::Waiting(format!("workers load for epoch {epoch}"));
        }
        if status.plans && !status.settled {
            return Progress::Waiting(format!("planner: {}", status.planner_doing));
        }
        Progress::Done
    }
}

/// Waits for the result of a change if the operator wants that; says so when it is there.
///
/// # Errors
/// Exit status 124 when it takes too long, and 4 when experts have no room: the change stays as it is.
pub(super) async fn wait(
    admin: &mut Admin,
    change: &ChangeArgs,
    what: &str,
    progress: impl Fn(&Look) -> Progress,
) -> anyhow::Result<()> {
    if !change.wait {
        return Ok(());
    }
    let deadline = Instant::now() + change.timeout;
    loop {
        let look = Look::take(admin).await?;
        let (state, may_be_short) = match progress(&look) {
            Progress::Done => {
                output::note(&format!("done: {what}"));
                return Ok(());
            }
            Progress::Waiting(state) => (state, false),
            Progress::Elsewhere(state) => (state, true),
        };
        if !may_be_short && !look.status.shortage.is_empty() {
            let message = format!("{what} cannot come about: {}", look.status.shortage);
            return Err(refusal(Exit::Conflict, message, "start another worker"));
        }
        if Instant::now() >= deadline {
            let timeout = humantime::format_duration(change.timeout);
            let message = format!("{what}: not within {timeout}; it goes on ({state})");
            return Err(refusal(Exit::Timeout, message, SEE_STATUS));
        }
        sleep(LOOK_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_settled_when_nothing_is_pending_and_the_planner_agrees() {
        let mut look = Look::default();
        assert_eq!(look.settled(), Progress::Done, "another router plans");
        look.status.plans = true;
        look.status.planner_doing = "proposing epoch 4".to_owned();
        let waiting = Progress::Waiting("planner: proposing epoch 4".to_owned());
        assert_eq!(look.settled(), waiting);
        look.status.settled = true;
        assert_eq!(look.settled(), Progress::Done);
        look.status.pending_epoch = 4;
        assert!(matches!(look.settled(), Progress::Waiting(_)));
    }
}
