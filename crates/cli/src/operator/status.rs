//! `tramontane status`: whether the cluster serves, and what it is about to do.

use serde_json::{Value, json};
use tramontane_proto::v1;

use super::{Admin, SEE_STATUS, connect, refused};
use crate::args::ReadArgs;
use crate::output;

/// `tramontane status`; `Ok(false)` when the cluster does not serve.
pub(crate) async fn status(args: &ReadArgs) -> anyhow::Result<bool> {
    let mut admin = connect(&args.router).await?;
    let status = read(&mut admin).await?;
    if args.output.is_data() {
        output::data(args.output, &status_json(&status))?;
    } else {
        output::table(&["", ""], &rows(&status))?;
    }
    Ok(status.ready)
}

pub(super) async fn read(admin: &mut Admin) -> anyhow::Result<v1::ClusterStatusResponse> {
    let answer = admin.cluster_status(v1::ClusterStatusRequest {}).await;
    Ok(answer.map_err(refused(SEE_STATUS))?.into_inner())
}

fn rows(status: &v1::ClusterStatusResponse) -> Vec<Vec<String>> {
    let row = |key: &str, value: String| vec![key.to_owned(), value];
    let mut rows = vec![
        row("state", state(status)),
        row("model", status.model.clone()),
        row("weights", weights(status)),
        row("numeric class", status.numeric_class.clone()),
        row("placement", placement(status)),
        row("wanted", wanted(status)),
        row("planner", planner(status)),
        row(
            "workers",
            format!("{} ready of {}", status.workers_ready, status.workers_total),
        ),
        row(
            "requests",
            format!(
                "{} running, {} queued",
                status.requests_running, status.requests_queued
            ),
        ),
        row("survives one loss", yes(status.survives_one_loss)),
        row("store available", yes(status.store_available)),
        row("version", status.version.clone()),
    ];
    let lists = [
        ("cordoned", status.cordoned.join(" ")),
        ("other weights", status.other_weights.join("; ")),
        ("shortage", status.shortage.clone()),
    ];
    for (key, value) in lists {
        if !value.is_empty() {
            rows.push(row(key, value));
        }
    }
    rows
}

/// Those that take new requests, and those that the operator would rather have.
fn weights(status: &v1::ClusterStatusResponse) -> String {
    let wanted = &status.weights_wanted;
    if wanted.is_empty() || *wanted == status.weights {
        return status.weights.clone();
    }
    format!("{}, wanted {wanted}", status.weights)
}

pub(super) fn state(status: &v1::ClusterStatusResponse) -> String {
    if status.ready {
        return "ready".to_owned();
    }
    format!("not ready: {}", status.reason)
}

pub(super) fn placement(status: &v1::ClusterStatusResponse) -> String {
    let holders = match (status.replicas_min, status.replicas_max) {
        (1, 1) => "each slice on 1 worker".to_owned(),
        (min, max) if min == max => format!("each slice on {min} workers"),
        (min, max) => format!("each slice on {min} to {max} workers"),
    };
    let pending = match status.pending_epoch {
        0 => String::new(),
        epoch => format!(", workers load for epoch {epoch}"),
    };
    format!("epoch {}, {holders}{pending}", status.epoch)
}

fn wanted(status: &v1::ClusterStatusResponse) -> String {
    let shown = |n: Option<u32>| n.map_or_else(|| "by configuration".to_owned(), |n| n.to_string());
    format!(
        "replicas {}, slices per expert {}",
        shown(status.intent_replicas),
        shown(status.intent_slices_per_expert)
    )
}

pub(super) fn planner(status: &v1::ClusterStatusResponse) -> String {
    if status.plans {
        return status.planner_doing.clone();
    }
    "in another router".to_owned()
}

fn yes(flag: bool) -> String {
    if flag { "yes" } else { "no" }.to_owned()
}

/// Keys are documented in docs/cli.md and stable.
pub(super) fn status_json(status: &v1::ClusterStatusResponse) -> Value {
    let text = |text: &String| (!text.is_empty()).then(|| text.clone());
    json!({
        "ready": status.ready,
        "reason": status.reason,
        "model": status.model,
        "numeric_class": status.numeric_class,
        "weights": text(&status.weights),
        "weights_wanted": text(&status.weights_wanted),
        "other_weights": status.other_weights,
        "epoch": status.epoch,
        "pending_epoch": status.pending_epoch,
        "workers_ready": status.workers_ready,
        "workers_total": status.workers_total,
        "requests_running": status.requests_running,
        "requests_queued": status.requests_queued,
        "survives_one_loss": status.survives_one_loss,
        "store_available": status.store_available,
        "version": status.version,
        "planner": {
            "here": status.plans,
            "doing": text(&status.planner_doing),
            "shortage": text(&status.shortage),
            "settled": status.plans.then_some(status.settled),
        },
        "intent": {
            "replicas": status.intent_replicas,
            "slices_per_expert": status.intent_slices_per_expert,
        },
        "replicas_min": status.replicas_min,
        "replicas_max": status.replicas_max,
        "slices_per_expert": status.slices_per_expert,
        "cordoned": status.cordoned,
        "incompatible": status.incompatible,
        "tokens_sampled": status.tokens_sampled,
        "scalable": status.scalable,
    })
}
