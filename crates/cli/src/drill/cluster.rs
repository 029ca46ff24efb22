//! What the router says about the cluster while a drill runs: when it noticed, when all was well again.

use std::time::{Duration, Instant};

use tokio::time::{sleep, timeout};
use tonic::Status;
use tramontane_proto::v1::admin_client::AdminClient;
use tramontane_proto::v1::{self, DrillKind};

use super::{DrillArgs, Kind, REQUEST_TIMEOUT};
use crate::dial::Proven;

/// How often the router is asked.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// All must be well for this long before it counts.
const WELL_FOR: Duration = Duration::from_secs(1);
/// A worker that stands still does not answer: not waited for longer.
const REPORT_TIMEOUT: Duration = Duration::from_millis(500);

/// The cluster at one moment.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    pub(super) status: v1::ClusterStatusResponse,
    /// The drilled worker, while it is listed.
    pub(super) worker: Option<v1::WorkerSummary>,
    /// What it says itself, when it answers.
    pub(super) report: Option<v1::DrillReport>,
}

/// Asks the router.
pub(super) async fn look(admin: &mut AdminClient<Proven>, worker: &str) -> Result<Seen, Status> {
    let late = |_elapsed| Status::deadline_exceeded("the router did not answer");
    let asked = async {
        let status = admin.cluster_status(v1::ClusterStatusRequest {}).await?;
        let listed = admin.list_workers(v1::ListWorkersRequest {}).await?;
        let mut workers = listed.into_inner().workers.into_iter();
        Ok(Seen {
            status: status.into_inner(),
            worker: workers.find(|w| w.id == worker),
            report: None,
        })
    };
    timeout(REQUEST_TIMEOUT, asked).await.map_err(late)?
}

/// Asks the worker, through the router.
pub(super) async fn report(
    admin: &mut AdminClient<Proven>,
    worker: &str,
) -> Result<v1::DrillReport, Status> {
    let late = |_elapsed| Status::deadline_exceeded("the worker did not answer");
    let worker_id = worker.to_owned();
    let asked = admin.get_drill_report(v1::GetDrillReportRequest { worker_id });
    let answer = timeout(REQUEST_TIMEOUT, asked).await.map_err(late)??;
    Ok(answer.into_inner().report.unwrap_or_default())
}

/// Follows the cluster from the fault to its end.
#[derive(Debug)]
pub(super) struct Watch<'a> {
    args: &'a DrillArgs,
    pub(super) before: Seen,
    /// The last that was seen.
    pub(super) now: Seen,
    injected_at: Instant,
    /// When the router first did not list the worker, or not as ready.
    pub(super) loss_reported: Option<Duration>,
    /// When the first placement after the loss was published and loaded.
    pub(super) epoch_restored: Option<Duration>,
    /// From when on all was well.
    pub(super) well_again: Option<Duration>,
}

impl<'a> Watch<'a> {
    pub(super) fn new(args: &'a DrillArgs, before: Seen, injected_at: Instant) -> Self {
        Self {
            args,
            now: before.clone(),
            before,
            injected_at,
            loss_reported: None,
            epoch_restored: None,
            well_again: None,
        }
    }

    /// Returns when all has been well for a while, or will not be.
    pub(super) async fn until_well(&mut self, admin: &mut AdminClient<Proven>) {
        let limit = self.args.fault_time() + self.args.timeout;
        let mut well_since = None;
        while self.injected_at.elapsed() < limit {
            let at = self.injected_at.elapsed();
            // A router that does not answer is not well.
            let is_well = match look(admin, &self.args.worker).await {
                Ok(seen) => {
                    self.now = seen;
                    self.ask_worker(admin).await;
                    self.note(at);
                    at >= self.args.fault_time() && self.is_well()
                }
                Err(_silent) => false,
            };
            well_since = is_well.then(|| well_since.unwrap_or(at));
            if let Some(since) = well_since
                && at - since >= WELL_FOR
            {
                self.well_again = well_since;
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn ask_worker(&mut self, admin: &mut AdminClient<Proven>) {
        if self.now.worker.is_some() {
            let asked = timeout(REPORT_TIMEOUT, report(admin, &self.args.worker)).await;
            self.now.report = asked.ok().and_then(Result::ok);
        }
    }

    fn note(&mut self, at: Duration) {
        let is_ready = |worker: &v1::WorkerSummary| worker.state == "ready";
        if !self.now.worker.as_ref().is_some_and(is_ready) {
            self.loss_reported.get_or_insert(at);
        }
        let status = &self.now.status;
        let is_new = status.epoch > self.before.status.epoch && status.pending_epoch == 0;
        if self.loss_reported.is_some() && is_new {
            self.epoch_restored.get_or_insert(at);
        }
    }

    fn is_well(&self) -> bool {
        let status = &self.now.status;
        if !status.ready || status.pending_epoch != 0 {
            return false;
        }
        if self.args.kind == Kind::Kill {
            return self.has_died() && status.epoch > self.before.status.epoch;
        }
        let slices = |seen: &Seen| seen.worker.as_ref().map_or(0, |worker| worker.slices);
        let is_ready = |worker: &v1::WorkerSummary| worker.state == "ready";
        let is_over = |report: &v1::DrillReport| report.running() == DrillKind::Unspecified;
        self.now.worker.as_ref().is_some_and(is_ready)
            && self.now.report.as_ref().is_some_and(is_over)
            && (slices(&self.now) > 0 || slices(&self.before) == 0)
    }

    /// Whether the worker is gone, or another process has its name.
    pub(super) fn has_died(&self) -> bool {
        self.now.worker.is_none() || self.is_reborn()
    }

    pub(super) fn is_reborn(&self) -> bool {
        let incarnation = |seen: &Seen| seen.report.as_ref().map(|report| report.incarnation);
        let (before, now) = (incarnation(&self.before), incarnation(&self.now));
        now.is_some() && now != before
    }
}
