//! `tramontane events`: what happened in the cluster, as the router that is asked saw it.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use tramontane_proto::v1;

use super::{Admin, SEE_STATUS, connect, refused};
use crate::args::EventsArgs;
use crate::exit::{Exit, refusal};
use crate::output::{self, Format};

/// Latest time that can be shown: the end of the year 9999.
const TIME_MS_MAX: u64 = 253_402_300_799_999;

/// `tramontane events`
pub(crate) async fn events(args: &EventsArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.read.router).await?;
    let happened = read(&mut admin, args.last).await?;
    if args.follow {
        return follow(&mut admin, happened, args.read.output).await;
    }
    if args.read.output.is_data() {
        let happened: Vec<Value> = happened.iter().map(event_json).collect();
        return output::data(args.read.output, &happened);
    }
    let rows: Vec<Vec<String>> = happened.iter().map(row).collect();
    Ok(output::table(&HEADER, &rows)?)
}

pub(super) const HEADER: [&str; 5] = ["TIME", "EVENT", "WORKER", "EPOCH", "WHAT"];

pub(super) async fn read(admin: &mut Admin, limit: u32) -> anyhow::Result<Vec<v1::ClusterEvent>> {
    let answer = admin.list_events(v1::ListEventsRequest { limit }).await;
    Ok(answer.map_err(refused(SEE_STATUS))?.into_inner().events)
}

pub(super) fn row(event: &v1::ClusterEvent) -> Vec<String> {
    vec![
        time_text(event.time_ms),
        event.kind.clone(),
        event.worker.clone(),
        event.epoch.to_string(),
        event.text.clone(),
    ]
}

/// Keys are documented in docs/cli.md and stable.
pub(super) fn event_json(event: &v1::ClusterEvent) -> Value {
    json!({
        "sequence": event.sequence,
        "time": time_text(event.time_ms),
        "event": event.kind,
        "worker": (!event.worker.is_empty()).then_some(&event.worker),
        "epoch": event.epoch,
        "text": event.text,
    })
}

/// UTC.
pub(super) fn time_text(time_ms: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_millis(time_ms.min(TIME_MS_MAX));
    humantime::format_rfc3339_millis(time).to_string()
}

/// Shows what there is and then what comes, until the router ends.
async fn follow(
    admin: &mut Admin,
    happened: Vec<v1::ClusterEvent>,
    format: Format,
) -> anyhow::Result<()> {
    let mut after_sequence = 0;
    for event in &happened {
        after_sequence = event.sequence;
        show(event, format)?;
    }
    let request = v1::WatchEventsRequest { after_sequence };
    let stream = admin.watch_events(request).await;
    let mut stream = stream.map_err(refused(SEE_STATUS))?.into_inner();
    while let Some(event) = stream.message().await.map_err(refused(SEE_STATUS))? {
        let missed = event.sequence.saturating_sub(after_sequence + 1);
        if missed > 0 && after_sequence > 0 {
            output::note(&format!(
                "{missed} events were forgotten before they were read"
            ));
        }
        after_sequence = event.sequence;
        show(&event, format)?;
    }
    let message = "the router has ended";
    Err(refusal(Exit::Unavailable, message, SEE_STATUS))
}

fn show(event: &v1::ClusterEvent, format: Format) -> anyhow::Result<()> {
    if format.is_data() {
        return output::item(format, &event_json(event));
    }
    let worker = if event.worker.is_empty() {
        "-"
    } else {
        &event.worker
    };
    let time = time_text(event.time_ms);
    let (kind, epoch, text) = (&event.kind, event.epoch, &event.text);
    Ok(output::line(&format!(
        "{time}  {kind:<19}  {worker:<12}  {epoch:>5}  {text}"
    ))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_shown_in_utc_and_a_hostile_time_does_no_harm() {
        let event = v1::ClusterEvent {
            sequence: 3,
            time_ms: 1_000,
            kind: "worker_ready".to_owned(),
            worker: String::new(),
            epoch: 2,
            text: "serves".to_owned(),
        };
        assert_eq!(
            event_json(&event).to_string(),
            r#"{"sequence":3,"time":"1970-01-01T00:00:01.000Z","event":"worker_ready","worker":null,"epoch":2,"text":"serves"}"#
        );
        assert_eq!(time_text(u64::MAX), "9999-12-31T23:59:59.999Z");
    }
}
