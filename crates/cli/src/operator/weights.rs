//! `tramontane weights ...`: the versions of the weights, a rolling update and its way back.

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Subcommand};
use serde_json::{Value, json};
use tramontane_proto::v1;

use super::wait::{Look, Progress, wait};
use super::{Admin, SEE_STATUS, SEE_WEIGHTS, connect, refused};
use crate::args::{ChangeArgs, ReadArgs};
use crate::output;

/// `tramontane weights ...`
#[derive(Debug, Subcommand)]
pub(crate) enum WeightsCommand {
    /// List the versions that workers have
    List(ReadArgs),
    /// Have new requests begin with a version; what runs goes on with its own
    Use(UseArgs),
}

/// `tramontane weights use`
#[derive(Clone, Debug, Args)]
pub(crate) struct UseArgs {
    /// Its fingerprint, or as much of the beginning as tells it apart
    #[arg(value_name = "VERSION", value_parser = NonEmptyStringValueParser::new())]
    pub(crate) weights: String,
    /// Its numeric class, where workers compute with it in several
    #[arg(long)]
    pub(crate) class: Option<String>,
    #[command(flatten)]
    pub(crate) change: ChangeArgs,
}

/// `tramontane weights ...`
pub(crate) async fn weights(command: WeightsCommand) -> anyhow::Result<()> {
    match command {
        WeightsCommand::List(args) => list(&args).await,
        WeightsCommand::Use(args) => use_version(&args).await,
    }
}

pub(super) async fn read(admin: &mut Admin) -> anyhow::Result<Vec<v1::WeightsSummary>> {
    let answer = admin.list_weights(v1::ListWeightsRequest {}).await;
    Ok(answer.map_err(refused(SEE_STATUS))?.into_inner().weights)
}

async fn list(args: &ReadArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let versions = read(&mut admin).await?;
    if args.output.is_data() {
        let rows: Vec<Value> = versions.iter().map(version_json).collect();
        return output::data(args.output, &rows);
    }
    let header = [
        "VERSION",
        "CLASS",
        "WORKERS",
        "PLACED",
        "SERVING",
        "SEQUENCES",
        "SURVIVES ONE LOSS",
    ];
    let rows: Vec<Vec<String>> = versions
        .iter()
        .map(|version| {
            vec![
                version.version.clone(),
                version.numeric_class.clone(),
                format!(
                    "{} ready of {}",
                    version.workers_ready,
                    version.workers.len()
                ),
                placed(version),
                serving(version).to_owned(),
                version.sequences.to_string(),
                yes(version.survives_one_loss).to_owned(),
            ]
        })
        .collect();
    Ok(output::table(&header, &rows)?)
}

fn placed(version: &v1::WeightsSummary) -> String {
    match (version.placed, version.epoch, version.pending_epoch) {
        (true, epoch, 0) => format!("epoch {epoch}"),
        (true, epoch, pending) => format!("epoch {epoch}, workers load for epoch {pending}"),
        (false, _, 0) => "no".to_owned(),
        (false, _, pending) => format!("no, workers load for epoch {pending}"),
    }
}

const fn serving(version: &v1::WeightsSummary) -> &'static str {
    match (version.serving, version.wanted) {
        (true, _) => "yes",
        (false, true) => "wanted",
        (false, false) => "no",
    }
}

const fn yes(flag: bool) -> &'static str {
    if flag { "yes" } else { "no" }
}

/// Keys are documented in docs/cli.md and stable.
fn version_json(version: &v1::WeightsSummary) -> Value {
    json!({
        "version": version.version,
        "numeric_class": version.numeric_class,
        "workers": version.workers,
        "workers_ready": version.workers_ready,
        "epoch": version.epoch,
        "pending_epoch": version.pending_epoch,
        "placed": version.placed,
        "serving": version.serving,
        "wanted": version.wanted,
        "sequences": version.sequences,
        "survives_one_loss": version.survives_one_loss,
        "planner": (!version.planner_doing.is_empty()).then(|| version.planner_doing.clone()),
    })
}

async fn use_version(args: &UseArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.change.router).await?;
    let request = v1::UseWeightsRequest {
        version: args.weights.clone(),
        numeric_class: args.class.clone().unwrap_or_default(),
        let_come: args.change.wait,
        dry_run: args.change.dry_run,
    };
    let answer = admin.use_weights(request).await.map_err(|status| {
        let next = match status.code() {
            tonic::Code::FailedPrecondition => {
                format!(
                    "tramontane weights use {} --wait, or {SEE_WEIGHTS}",
                    args.weights
                )
            }
            _ => SEE_WEIGHTS.to_owned(),
        };
        refused(&next)(status)
    })?;
    let meant = answer.into_inner();
    let wanted = format!("{} ({})", meant.version, meant.numeric_class);
    let before = match meant.serving.as_str() {
        "" => "none".to_owned(),
        serving => format!("{serving} ({})", meant.serving_class),
    };
    if args.change.dry_run {
        output::note(&format!(
            "would have new requests begin with {wanted}, now {before}; {}",
            if meant.placed {
                "it is placed"
            } else {
                "it is not placed yet"
            }
        ));
        return Ok(());
    }
    if wanted == before {
        output::note(&format!("new requests begin with {wanted} already"));
    } else {
        output::note(&format!(
            "new requests begin with {wanted}{}; undo it with `tramontane weights use {}`",
            if meant.placed {
                ""
            } else {
                " as soon as it is placed"
            },
            undo(&meant)
        ));
    }
    let what = format!("new requests begin with {wanted}");
    wait(&mut admin, &args.change, &what, |look| {
        progress(look, &meant)
    })
    .await
}

/// The version to go back to; with its class where that is what is left behind.
fn undo(meant: &v1::UseWeightsResponse) -> String {
    if meant.serving.is_empty() {
        return "VERSION".to_owned();
    }
    let serving = meant.serving.clone();
    match meant.serving == meant.version {
        true => format!("{serving} --class {}", meant.serving_class),
        false => serving,
    }
}

/// The router that is asked shows it; others follow within a moment.
fn progress(look: &Look, meant: &v1::UseWeightsResponse) -> Progress {
    let is_meant = |w: &&v1::WeightsSummary| {
        (&w.version, &w.numeric_class) == (&meant.version, &meant.numeric_class)
    };
    match look.weights.iter().find(is_meant) {
        Some(version) if version.serving => Progress::Done,
        Some(version) => Progress::Elsewhere(format!(
            "{} of its {} workers are ready, placed: {}",
            version.workers_ready,
            version.workers.len(),
            placed(version)
        )),
        None => Progress::Elsewhere("no worker has it any more".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_is_done_when_requests_go_to_the_version_in_its_class() {
        let meant = v1::UseWeightsResponse {
            version: "f2".to_owned(),
            numeric_class: "cpu-q8".to_owned(),
            ..v1::UseWeightsResponse::default()
        };
        let summary = |class: &str, serving: bool| v1::WeightsSummary {
            version: "f2".to_owned(),
            numeric_class: class.to_owned(),
            pending_epoch: 1,
            serving,
            ..v1::WeightsSummary::default()
        };
        let mut look = Look {
            weights: vec![summary("cpu-q4", true), summary("cpu-q8", false)],
            ..Look::default()
        };
        let loading = "0 of its 0 workers are ready, placed: no, workers load for epoch 1";
        assert_eq!(
            progress(&look, &meant),
            Progress::Elsewhere(loading.to_owned())
        );
        look.weights[1].serving = true;
        assert_eq!(progress(&look, &meant), Progress::Done);
        look.weights.clear();
        assert!(matches!(progress(&look, &meant), Progress::Elsewhere(_)));
    }
}
