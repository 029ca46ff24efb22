//! The operator's verbs about placements to come: what the planner would do, and have it done.

use serde_json::{Value, json};
use tramontane_proto::v1;

use crate::args::{PlanArgs, RebalanceArgs};
use crate::output::{self, Format};

use super::{SEE_STATUS, connect, refused};

/// `tramontane placement plan`
pub(crate) async fn plan(args: &PlanArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.read.router).await?;
    let request = v1::PlanPlacementRequest {
        replicas: u32::from(args.replicas.unwrap_or(0)),
        slices_per_expert: u32::from(args.slices.unwrap_or(0)),
    };
    let plan = admin
        .plan_placement(request)
        .await
        .map_err(refused(SEE_STATUS))?;
    let plan = plan.into_inner();
    if args.read.output != Format::Table {
        return output::data(args.read.output, &plan_json(&plan));
    }
    let header = [
        "",
        "SLICES",
        "REPLICAS",
        "US PER LAYER",
        "TO LOAD",
        "SURVIVES ONE LOSS",
    ];
    let mut rows: Vec<Vec<String>> = Vec::new();
    if let Some(now) = &plan.now {
        let cells = ["now", "", ""].map(str::to_owned);
        rows.push(cells.into_iter().chain(promise(now)).collect());
    }
    for (index, candidate) in plan.candidates.iter().enumerate() {
        let mark = if index == plan.chosen as usize {
            "->"
        } else {
            ""
        };
        let cells = [
            mark.to_owned(),
            candidate.slices_per_expert.to_string(),
            candidate.replicas.to_string(),
        ];
        rows.push(cells.into_iter().chain(promise(candidate)).collect());
    }
    output::table(&header, &rows)?;
    if args.explain {
        for line in &plan.why {
            output::line(line)?;
        }
    }
    Ok(())
}

/// The last three columns.
fn promise(candidate: &v1::PlanCandidate) -> [String; 3] {
    if !candidate.impossible.is_empty() {
        return [candidate.impossible.clone(), String::new(), String::new()];
    }
    let survives = if candidate.survives_one_loss {
        "yes"
    } else {
        "no"
    };
    [
        format!("{:.0}", candidate.layer_us),
        indicatif::HumanBytes(candidate.moved_bytes).to_string(),
        survives.to_owned(),
    ]
}

fn plan_json(plan: &v1::PlanPlacementResponse) -> Value {
    let candidate = |c: &v1::PlanCandidate| {
        json!({
            "slices_per_expert": c.slices_per_expert,
            "replicas": c.replicas,
            "layer_us": c.layer_us,
            "moved_bytes": c.moved_bytes,
            "survives_one_loss": c.survives_one_loss,
            "impossible": c.impossible,
        })
    };
    let candidates: Vec<Value> = plan.candidates.iter().map(candidate).collect();
    let now = plan
        .now
        .as_ref()
        .map(|now| json!({ "layer_us": now.layer_us, "survives_one_loss": now.survives_one_loss }));
    json!({
        "candidates": candidates,
        "chosen": plan.chosen,
        "proposes": plan.proposes,
        "now": now,
        "why": plan.why,
    })
}

/// `tramontane placement rebalance`
pub(crate) async fn rebalance(args: &RebalanceArgs) -> anyhow::Result<()> {
    let mut admin = connect(&args.router).await?;
    let request = v1::RebalanceRequest {
        dry_run: args.dry_run,
    };
    let answer = admin
        .rebalance(request)
        .await
        .map_err(refused(SEE_STATUS))?
        .into_inner();
    for line in &answer.why {
        output::line(line)?;
    }
    if answer.replaces_epoch == 0 {
        output::note("nothing to move: no other placement suits loads and speeds better");
        return Ok(());
    }
    let bytes = indicatif::HumanBytes(answer.moved_bytes);
    output::note(&if args.dry_run {
        format!(
            "would replace epoch {}, loading {bytes}",
            answer.replaces_epoch
        )
    } else {
        format!(
            "the planner replaces epoch {}, loading {bytes}; follow it with `tramontane status`",
            answer.replaces_epoch
        )
    });
    Ok(())
}
