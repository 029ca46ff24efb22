//! What a drill has shown: passed only when no request failed, no token differs, the fault is proved and
//! the cluster is well again. Judges, and prints.

use std::time::Duration;

use serde::Serialize;

use super::cluster::{Seen, Watch};
use super::probe::{Answered, Said};
use super::{DrillArgs, Kind};
use crate::output::{self, Format};

/// Part of the asked duration for which a paused process must have stood still: the rest is the time that
/// it takes to stop and to be continued.
const PAUSE_PROVED: f64 = 0.8;
/// Failures that are told; a dead cluster fails all alike.
const FAILURES_TOLD: usize = 5;

/// The verdict, in a stable form for programs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Verdict {
    pub(super) passed: bool,
    drill: &'static str,
    worker: String,
    /// Why it did not pass.
    reasons: Vec<String>,
    fault_proved: bool,
    /// What shows that the fault happened.
    proof: String,
    before: Requests,
    during: Requests,
    after: Requests,
    /// Longest time without a token during the drill, of each stream.
    stall_ms: Vec<u64>,
    epoch_before: u64,
    epoch_after: u64,
    /// From the fault to the router's list of workers without it, or with it as not ready.
    loss_reported_ms: Option<u64>,
    /// From the fault to a newer placement, loaded and published.
    epoch_restored_ms: Option<u64>,
    /// From the fault to a cluster where all is well.
    pub(super) well_again_ms: Option<u64>,
}

/// Requests of one of the three runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Requests {
    requests: usize,
    failed: usize,
    lost_tokens: usize,
    duplicated_tokens: usize,
    changed_tokens: usize,
    longest_stall_ms: u64,
    failures: Vec<String>,
}

impl Requests {
    fn of(streams: &[Vec<Answered>]) -> Self {
        let mut sum = Self::default();
        for answered in streams.iter().flatten() {
            sum.add(&answered.said);
            sum.lost_tokens += answered.difference.lost;
            sum.duplicated_tokens += answered.difference.duplicated;
            sum.changed_tokens += answered.difference.changed;
        }
        sum
    }

    fn add(&mut self, said: &Said) {
        self.requests += 1;
        self.longest_stall_ms = self.longest_stall_ms.max(millis(said.longest_stall));
        let Some(failure) = &said.failure else { return };
        self.failed += 1;
        if self.failures.len() < FAILURES_TOLD {
            self.failures.push(failure.clone());
        }
    }

    /// What is wrong with them.
    fn complaints(&self, when: &str) -> Vec<String> {
        let counts = [
            (self.failed, "requests failed"),
            (self.lost_tokens, "tokens lost"),
            (self.duplicated_tokens, "tokens came twice"),
            (self.changed_tokens, "tokens changed"),
        ];
        let wrong = counts.iter().filter(|(count, _)| *count > 0);
        let mut complaints: Vec<String> = wrong
            .map(|(count, what)| format!("{count} {what} {when} the drill"))
            .collect();
        if self.requests == 0 {
            complaints.push(format!("no request was answered {when} the drill"));
        }
        complaints
    }
}

impl Verdict {
    pub(super) fn new(
        args: &DrillArgs,
        reference: &[Said],
        watch: &Watch<'_>,
        during: &[Vec<Answered>],
        after: &[Vec<Answered>],
    ) -> Self {
        let mut before = Requests::default();
        for said in reference {
            before.add(said);
        }
        let stall = |stream: &Vec<Answered>| {
            let stalls = stream.iter().map(|answered| answered.said.longest_stall);
            millis(stalls.max().unwrap_or_default())
        };
        let stall_ms = during.iter().map(stall).collect();
        let (during, after) = (Requests::of(during), Requests::of(after));
        let (fault_proved, proof) = proof(args, watch);
        let mut reasons = during.complaints("during");
        reasons.extend(after.complaints("after"));
        if !fault_proved {
            reasons.push(format!("the fault is not proved: {proof}"));
        }
        if watch.well_again.is_none() {
            let limit = humantime::format_duration(args.timeout);
            reasons.push(format!("the cluster was not well again within {limit}"));
        }
        Self {
            passed: reasons.is_empty(),
            drill: args.kind.name(),
            worker: args.worker.clone(),
            reasons,
            fault_proved,
            proof,
            before,
            during,
            after,
            stall_ms,
            epoch_before: watch.before.status.epoch,
            epoch_after: watch.now.status.epoch,
            loss_reported_ms: watch.loss_reported.map(millis),
            epoch_restored_ms: watch.epoch_restored.map(millis),
            well_again_ms: watch.well_again.map(millis),
        }
    }

    pub(super) fn print(&self, format: Format) -> anyhow::Result<()> {
        if format != Format::Table {
            return output::data(format, self);
        }
        let run = |when: &str, requests: &Requests| {
            let counts = [
                requests.requests,
                requests.failed,
                requests.lost_tokens,
                requests.duplicated_tokens,
                requests.changed_tokens,
            ];
            let mut row = vec![when.to_owned()];
            row.extend(counts.iter().map(usize::to_string));
            row.push(requests.longest_stall_ms.to_string());
            row
        };
        let header = [
            "", "REQUESTS", "FAILED", "LOST", "TWICE", "CHANGED", "STALL MS",
        ];
        let rows = [
            run("before", &self.before),
            run("during", &self.during),
            run("after", &self.after),
        ];
        output::table(&header, &rows)?;
        let stalls: Vec<String> = self.stall_ms.iter().map(u64::to_string).collect();
        let time = |ms: Option<u64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{ms} ms"));
        let row = |key: &str, value: String| vec![key.to_owned(), value];
        let epochs = format!("{} -> {}", self.epoch_before, self.epoch_after);
        let verdict = if self.passed { "passed" } else { "FAILED" };
        let mut rows = vec![
            row("fault", self.proof.clone()),
            row("stall of each stream, ms", stalls.join(" ")),
            row("loss reported after", time(self.loss_reported_ms)),
            row("placement epoch", epochs),
            row("placement restored after", time(self.epoch_restored_ms)),
            row("well again after", time(self.well_again_ms)),
            row("verdict", verdict.to_owned()),
        ];
        rows.extend(self.reasons.iter().map(|why| row("", why.clone())));
        let failures = self.during.failures.iter().chain(&self.after.failures);
        rows.extend(failures.map(|failure| row("failure", failure.clone())));
        Ok(output::table(&["", ""], &rows)?)
    }
}

/// Whether the fault happened, and what shows it.
fn proof(args: &DrillArgs, watch: &Watch<'_>) -> (bool, String) {
    let worker = &args.worker;
    if args.kind == Kind::Kill {
        if watch.now.worker.is_none() {
            return (true, format!("{worker} is gone"));
        }
        let text = if watch.is_reborn() {
            format!("another process took the name {worker}")
        } else {
            format!("{worker} is still there")
        };
        return (watch.is_reborn(), text);
    }
    if watch.is_reborn() {
        return (false, format!("{worker} was started again meanwhile"));
    }
    let Some(now) = &watch.now.report else {
        return (false, format!("{worker} does not answer"));
    };
    let grew = |count: fn(&tramontane_proto::v1::DrillReport) -> u64| {
        let before = |seen: &Seen| seen.report.as_ref().map_or(0, count);
        count(now).saturating_sub(before(&watch.before))
    };
    match args.kind {
        Kind::Kill | Kind::Pause => {
            let stopped = grew(|report| report.stopped_ms);
            let needed = args.duration.mul_f64(PAUSE_PROVED);
            let text = format!("{worker} stood still for {stopped} ms");
            (Duration::from_millis(stopped) >= needed, text)
        }
        Kind::Slow => {
            let replies = grew(|report| report.replies_delayed);
            let steps = grew(|report| report.steps_delayed);
            let text = format!("{worker} was late with {replies} expert replies and {steps} steps");
            (replies + steps > 0, text)
        }
        Kind::Partition => {
            let dropped = grew(|report| report.frames_dropped);
            let text = format!("{worker} dropped {dropped} expert calls and answers");
            (dropped > 0, text)
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
