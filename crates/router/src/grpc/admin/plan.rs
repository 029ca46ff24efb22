//! Planning before anything moves: what the planner would do, and how to have it done. Decides nothing
//! itself, and writes nothing but the operator's wish.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Duration;

use tonic::Status;
use tramontane_coordination::planner::{
    self, Candidate, Figures, PlanReport, PlanWish, PlannerView, Promise, WaitReason, explore,
};
use tramontane_coordination::{Intent, Members};
use tramontane_proto::v1;
use tramontane_types::SEGMENTS_PER_EXPERT;

use super::refusal;
use crate::error::{ApiError, ErrorKind};
use crate::run::App;

/// Answers `PlanPlacement`.
pub(super) async fn plan_placement(
    app: &Arc<App>,
    request: v1::PlanPlacementRequest,
) -> Result<v1::PlanPlacementResponse, Status> {
    let wish = wish(request).map_err(|error| refusal(&error))?;
    let (intent, _) = intent(app).await?;
    let report = report(app, intent, wish).await?;
    Ok(v1::PlanPlacementResponse {
        candidates: report.candidates.iter().map(candidate).collect(),
        chosen: report.chosen as u32,
        proposes: report.proposes,
        now: report.now.as_ref().map(|promise| v1::PlanCandidate {
            layer_us: promise.layer_us,
            survives_one_loss: promise.survives_one_loss,
            ..v1::PlanCandidate::default()
        }),
        why: report.why,
    })
}

/// Answers `Rebalance`: the wish goes into the store, for whichever router is elected.
pub(super) async fn rebalance(
    app: &Arc<App>,
    request: v1::RebalanceRequest,
) -> Result<v1::RebalanceResponse, Status> {
    let placements = app.cluster.placements();
    let Some(published) = placements.published() else {
        let error = ApiError::unavailable("no placement is published");
        return Err(refusal(&error));
    };
    let (intent, revision) = intent(app).await?;
    let wish = PlanWish {
        rebalance: true,
        ..PlanWish::default()
    };
    let report = report(app, intent.clone(), wish).await?;
    let moved_bytes = chosen(&report).map_or(0, |promise| promise.moved_bytes);
    if report.proposes && !request.dry_run {
        let wished = Intent {
            rebalance: Some(published.epoch),
            ..intent
        };
        planner::set_intent(&*app.store, &wished, revision)
            .await
            .map_err(|error| unavailable(&error))?;
        tracing::info!(epoch = %published.epoch, "asked the planner to rebalance");
    }
    Ok(v1::RebalanceResponse {
        replaces_epoch: if report.proposes {
            published.epoch.0
        } else {
            0
        },
        moved_bytes,
        why: report.why,
    })
}

fn wish(request: v1::PlanPlacementRequest) -> Result<PlanWish, ApiError> {
    let replicas = request.replicas as usize;
    if replicas > planner::REPLICAS_MAX {
        let max = planner::REPLICAS_MAX;
        let message = format!("replicas must be at most {max}, got {replicas}");
        return Err(ApiError::new(ErrorKind::Invalid, message).at("replicas"));
    }
    let slices = request.slices_per_expert;
    if slices > u32::from(SEGMENTS_PER_EXPERT) {
        let message =
            format!("slices_per_expert must be at most {SEGMENTS_PER_EXPERT}, got {slices}");
        return Err(ApiError::new(ErrorKind::Invalid, message).at("slices_per_expert"));
    }
    Ok(PlanWish {
        replicas: NonZeroUsize::new(replicas),
        slices_per_expert: Some(slices as u8).filter(|slices| *slices > 0),
        rebalance: false,
    })
}

async fn intent(app: &App) -> Result<(Intent, Option<tramontane_coordination::Revision>), Status> {
    let read = planner::intent(&*app.store).await;
    read.map_err(|error| unavailable(&error))
}

fn unavailable(error: &tramontane_coordination::Error) -> Status {
    refusal(&ApiError::unavailable(format!(
        "the coordination store: {error}"
    )))
}

/// What the elected planner would do, as far as this router sees: it may know of workers that were late.
async fn report(app: &Arc<App>, intent: Intent, wish: PlanWish) -> Result<PlanReport, Status> {
    let app = Arc::clone(app);
    let explored = tokio::task::spawn_blocking(move || {
        let (members, placements) = (app.cluster.members(), app.cluster.placements());
        // What is planned is the version that serves; before one does, all are one.
        let members = match &placements.serving {
            Some(version) => members.of(version),
            None => Members::clone(&members),
        };
        let (behind_for, late) = (BTreeMap::new(), BTreeSet::new());
        let view = PlannerView {
            members: &members,
            published: placements.published().map(|p| &**p),
            known: placements.published().map(|p| &**p),
            pending: placements.pending().map(|p| &**p),
            intent: &intent,
            config: &app.config.planner(),
            // What the planner waits for is said in words.
            settled_for: Duration::MAX,
            published_for: Duration::MAX,
            pending_for: Duration::ZERO,
            behind_for: &behind_for,
            late: &late,
            figures: &Figures::default().follow(&members),
        };
        explore(&view, wish)
    });
    let explored = explored.await.map_err(|error| {
        tracing::error!(%error, "planning panicked");
        refusal(&ApiError::internal())
    })?;
    explored.map_err(|reason| refusal(&ApiError::unavailable(no_plan(&reason))))
}

fn no_plan(reason: &WaitReason) -> String {
    let action = planner::PlannerAction::Wait {
        reason: reason.clone(),
        again_in: None,
    };
    format!("there is no placement on these workers: {action}")
}

fn chosen(report: &PlanReport) -> Option<&Promise> {
    let candidate = report.candidates.get(report.chosen)?;
    candidate.promise.as_ref().ok()
}

fn candidate(candidate: &Candidate) -> v1::PlanCandidate {
    let shape = v1::PlanCandidate {
        slices_per_expert: u32::from(candidate.slices_per_expert),
        replicas: candidate.replicas as u32,
        ..v1::PlanCandidate::default()
    };
    match &candidate.promise {
        Ok(promise) => v1::PlanCandidate {
            layer_us: promise.layer_us,
            moved_bytes: promise.moved_bytes,
            survives_one_loss: promise.survives_one_loss,
            ..shape
        },
        Err(error) => v1::PlanCandidate {
            impossible: error.to_string(),
            ..shape
        },
    }
}
