//! `tramontane placement ...`: who holds which expert, and what the operator wants of that.

use anyhow::Context as _;
use tonic::Code;
use tramontane_proto::v1;
use tramontane_types::Placement;

use super::wait::{Look, Progress, wait};
use super::{Admin, SEE_STATUS, connect, plan, refused, status};
use crate::args::{ApplyArgs, PlacementCommand, ReadArgs};
use crate::exit::{Exit, refusal};
use crate::output;

/// `tramontane placement ...`
pub(crate) async fn placement(command: PlacementCommand) -> anyhow::Result<()> {
    match command {
        PlacementCommand::Show(args) => show(&args).await,
        PlacementCommand::Apply(args) => apply(&args).await,
        PlacementCommand::Plan(args) => plan::plan(&args).await,
        PlacementCommand::Rebalance(args) => plan::rebalance(&args).await,
    }
}

/// The published placement, if there is one.
pub(super) async fn read(admin: &mut Admin) -> anyhow::Result<Option<Placement>> {
    let answer = match admin.get_placement(v1::GetPlacementRequest {}).await {
        Err(status) if status.code() == Code::NotFound => return Ok(None),
        answer => answer.map_err(refused(SEE_STATUS))?.into_inner(),
    };
    let placement = serde_json::from_str(&answer.placement_json);
    Ok(Some(placement.context("placement that the router sent")?))
}

async fn show(args: &ReadArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let Some(placement) = read(&mut admin).await? else {
        let message = "no placement is published";
        return Err(refusal(Exit::NotFound, message, SEE_STATUS));
    };
    if args.output.is_data() {
        return output::data(args.output, &placement);
    }
    output::line(&format!(
        "epoch {}, {}, model {}, {} layers x {} experts",
        placement.epoch,
        placement.numeric_class,
        placement.model,
        placement.num_layers,
        placement.num_experts
    ))?;
    let rows: Vec<Vec<String>> = placement
        .iter()
        .map(|(slice, holders)| {
            let names: Vec<&str> = holders
                .iter()
                .filter_map(|&h| placement.worker(h))
                .map(|w| w.as_str())
                .collect();
            vec![
                slice.layer.to_string(),
                slice.expert.to_string(),
                slice.range.to_string(),
                names.join(","),
            ]
        })
        .collect();
    Ok(output::table(
        &["LAYER", "EXPERT", "SEGMENTS", "WORKERS"],
        &rows,
    )?)
}

async fn apply(args: &ApplyArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.change.router).await?;
    if args.change.dry_run {
        let status = status::read(&mut admin).await?;
        let changes = [
            ("replicas", status.intent_replicas, args.replicas),
            (
                "slices per expert",
                status.intent_slices_per_expert,
                args.slices,
            ),
        ];
        for (what, old, new) in changes {
            if let Some(new) = new {
                let new = Some(new).filter(|new| *new != 0);
                output::note(&format!(
                    "would set {what} from {} to {}",
                    shown(old),
                    shown(new)
                ));
            }
        }
        return Ok(());
    }
    let request = v1::SetIntentRequest {
        replicas: args.replicas,
        slices_per_expert: args.slices,
    };
    let answer = admin.set_intent(request).await;
    let now = answer.map_err(refused(SEE_STATUS))?.into_inner();
    output::note(&format!(
        "wanted: replicas {}, slices per expert {}",
        shown(now.replicas),
        shown(now.slices_per_expert)
    ));
    wait(&mut admin, &args.change, "the placement fits", |look| {
        apply_progress(look, &now)
    })
    .await
}

fn shown(wish: Option<u32>) -> String {
    wish.map_or_else(|| "default".to_owned(), |n| n.to_string())
}

/// The planner says when it has done what it can. A router without the planner can only compare.
fn apply_progress(look: &Look, wanted: &v1::SetIntentResponse) -> Progress {
    let status = &look.status;
    if !status.plans && wanted.replicas.is_some_and(|n| n != status.replicas_min) {
        let (min, max) = (status.replicas_min, status.replicas_max);
        return Progress::Waiting(format!("slices have {min} to {max} holders"));
    }
    if !status.plans
        && wanted
            .slices_per_expert
            .is_some_and(|n| n != status.slices_per_expert)
    {
        let n = status.slices_per_expert;
        return Progress::Waiting(format!("experts are cut into {n} slices"));
    }
    look.settled()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_the_planner_the_placement_itself_must_show_it() {
        let wanted = v1::SetIntentResponse {
            replicas: Some(2),
            slices_per_expert: None,
        };
        let mut look = Look::default();
        look.status.replicas_min = 1;
        assert!(matches!(
            apply_progress(&look, &wanted),
            Progress::Waiting(_)
        ));
        look.status.replicas_min = 2;
        assert_eq!(apply_progress(&look, &wanted), Progress::Done);
        // With the planner its word counts: there may be fewer workers than replicas.
        look.status.replicas_min = 1;
        look.status.plans = true;
        look.status.settled = true;
        assert_eq!(apply_progress(&look, &wanted), Progress::Done);
    }
}
