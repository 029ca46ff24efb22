//! `tramontane top`: the cluster on one screen, drawn anew every second. Reads only.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tramontane_proto::v1;

use super::{Admin, connect, events, status, workers};
use crate::args::TopArgs;
use crate::output;

/// Time between two looks, and what the rate of tokens is measured over.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Events at the foot of the screen.
const EVENTS_SHOWN: u32 = 8;
/// Back to the first line, and clear from there to the end.
const REDRAW: &str = "\x1b[H\x1b[J";

/// Everything on the screen.
#[derive(Debug, Default)]
struct Screen {
    status: v1::ClusterStatusResponse,
    workers: Vec<v1::WorkerSummary>,
    events: Vec<v1::ClusterEvent>,
    /// `None` until two looks can be compared.
    tokens_per_second: Option<f64>,
}

/// `tramontane top`
pub(crate) async fn top(args: &TopArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.read.router).await?;
    let (mut last, mut at) = (look(&mut admin).await?, Instant::now());
    let is_live = !args.once && !args.read.output.is_data() && output::is_terminal();
    if is_live {
        output::fragment(&format!("{REDRAW}{}", last.text()))?;
    }
    loop {
        sleep(LOOK_EVERY).await;
        let now = Instant::now();
        let mut screen = match look(&mut admin).await {
            Ok(screen) => screen,
            Err(error) if is_live => {
                // It may come back: the channel connects again by itself.
                output::fragment(&format!("{REDRAW}{error}\n"))?;
                continue;
            }
            Err(error) => return Err(error),
        };
        screen.tokens_per_second = rate(&last.status, &screen.status, now - at);
        if !is_live {
            return show_once(args, &screen);
        }
        output::fragment(&format!("{REDRAW}{}", screen.text()))?;
        (last, at) = (screen, now);
    }
}

async fn look(admin: &mut Admin) -> anyhow::Result<Screen> {
    Ok(Screen {
        status: status::read(admin).await?,
        workers: workers::read(admin).await?,
        events: events::read(admin, EVENTS_SHOWN).await?,
        tokens_per_second: None,
    })
}

/// `None` when the router is another one than before.
fn rate(
    before: &v1::ClusterStatusResponse,
    after: &v1::ClusterStatusResponse,
    passed: Duration,
) -> Option<f64> {
    let tokens = after.tokens_sampled.checked_sub(before.tokens_sampled)?;
    Some(tokens as f64 / passed.as_secs_f64().max(f64::MIN_POSITIVE))
}

fn show_once(args: &TopArgs, screen: &Screen) -> anyhow::Result<()> {
    if args.read.output.is_data() {
        return output::data(args.read.output, &screen.json());
    }
    Ok(output::fragment(&screen.text())?)
}

impl Screen {
    fn text(&self) -> String {
        let status = &self.status;
        let rate = self
            .tokens_per_second
            .map_or_else(|| "-".to_owned(), |rate| format!("{rate:.1}"));
        let mut lines = vec![
            format!(
                "{}  {}  {}",
                status.model,
                status.numeric_class,
                status::state(status)
            ),
            format!(
                "requests {} running, {} queued   {rate} tokens/s   workers {}/{}   \
                 survives one loss: {}",
                status.requests_running,
                status.requests_queued,
                status.workers_ready,
                status.workers_total,
                if status.survives_one_loss {
                    "yes"
                } else {
                    "no"
                },
            ),
            format!(
                "placement {}   planner: {}",
                status::placement(status),
                status::planner(status)
            ),
        ];
        if !status.shortage.is_empty() {
            lines.push(format!("shortage {}", status.shortage));
        }
        if !status.store_available {
            lines.push("the coordination store does not answer".to_owned());
        }
        let workers: Vec<Vec<String>> = self.workers.iter().map(row).collect();
        lines.push(String::new());
        lines.push(output::table_text(&HEADER, &workers));
        lines.push(String::new());
        let happened: Vec<Vec<String>> = self.events.iter().map(events::row).collect();
        lines.push(output::table_text(&events::HEADER, &happened));
        lines.join("\n") + "\n"
    }

    fn json(&self) -> Value {
        json!({
            "status": status::status_json(&self.status),
            "tokens_per_second": self.tokens_per_second,
            "workers": self.workers.iter().map(workers::worker_json).collect::<Vec<_>>(),
            "events": self.events.iter().map(events::event_json).collect::<Vec<_>>(),
        })
    }
}

const HEADER: [&str; 8] = [
    "WORKER", "STATE", "ROLES", "RUNNING", "WAITING", "KV FREE", "SLICES", "EPOCH",
];

fn row(worker: &v1::WorkerSummary) -> Vec<String> {
    vec![
        worker.id.clone(),
        workers::state(worker),
        worker.roles.join(","),
        worker.sequences_running.to_string(),
        worker.sequences_waiting.to_string(),
        format!("{} pages", worker.kv_pages_free),
        worker.slices.to_string(),
        worker.loaded_epoch.to_string(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_screen_shows_workers_load_placement_and_what_happened() {
        let mut screen = Screen::default();
        screen.status.ready = true;
        screen.status.requests_running = 3;
        screen.status.epoch = 7;
        screen.status.pending_epoch = 8;
        screen.tokens_per_second = Some(12.345);
        screen.workers.push(v1::WorkerSummary {
            id: "w-1".to_owned(),
            state: "ready".to_owned(),
            cordoned: true,
            kv_pages_free: 99,
            ..v1::WorkerSummary::default()
        });
        screen.events.push(v1::ClusterEvent {
            kind: "worker_lost".to_owned(),
            worker: "w-2".to_owned(),
            ..v1::ClusterEvent::default()
        });
        let text = screen.text();
        for part in [
            "3 running",
            "12.3 tokens/s",
            "epoch 7",
            "epoch 8",
            "ready,cordoned",
            "99 pages",
            "worker_lost",
            "w-2",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(screen.json()["workers"][0]["cordoned"], true);
    }

    #[test]
    fn a_rate_is_of_one_router() {
        let (mut before, mut after) = (Screen::default().status, Screen::default().status);
        (before.tokens_sampled, after.tokens_sampled) = (10, 30);
        assert_eq!(rate(&before, &after, Duration::from_secs(2)), Some(10.0));
        assert_eq!(rate(&after, &before, Duration::from_secs(2)), None);
    }
}
