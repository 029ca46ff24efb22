//! Changes of what the operator wants: compare-and-swap on the store's one value, and then seen by this
//! router itself, so that whoever asks next finds it done.

use std::num::NonZeroUsize;
use std::time::Duration;

use tokio::time::timeout;
use tonic::Status;
use tramontane_coordination::planner::{intent, set_intent as write_intent};
use tramontane_coordination::store::keys;
use tramontane_coordination::{Error, Intent};
use tramontane_proto::v1;
use tramontane_types::WorkerId;

use super::{count, not_found, refusal, store_refused};
use crate::error::ApiError;
use crate::run::App;

/// Tries until a change is given up: another operator changes the intent at the same time.
const WRITE_ATTEMPTS_MAX: u32 = 8;
/// Longest wait for this router to see what was written.
const SEEN_MAX: Duration = Duration::from_secs(5);

pub(super) async fn set_cordon(
    app: &App,
    request: &v1::SetCordonRequest,
) -> Result<v1::SetCordonResponse, Status> {
    let id = WorkerId::new(&request.worker_id);
    let is_cordoned = app.cluster.intent().intent.cordoned.contains(&id);
    if !is_cordoned && !app.cluster.members().workers.contains_key(&id) {
        return Err(not_found(format!("there is no worker {id}"), "worker_id"));
    }
    let changed = cordon(app, &id, request.cordoned).await?;
    Ok(v1::SetCordonResponse { changed })
}

/// Whether anything was to be changed.
pub(super) async fn cordon(app: &App, id: &WorkerId, cordoned: bool) -> Result<bool, Status> {
    let change = |intent: &mut Intent| {
        if cordoned {
            intent.cordoned.insert(id.clone())
        } else {
            intent.cordoned.remove(id)
        }
    };
    let changed = change_intent(app, change).await?.is_some();
    until_seen(app, |intent| intent.cordoned.contains(id) == cordoned).await?;
    if changed {
        tracing::info!(worker = %id, cordoned, "cordon changed");
    }
    Ok(changed)
}

pub(super) async fn set_intent(
    app: &App,
    request: v1::SetIntentRequest,
) -> Result<v1::SetIntentResponse, Status> {
    let replicas = request.replicas.map(|n| NonZeroUsize::new(n as usize));
    let slices = request.slices_per_expert.map(|n| match n {
        0 => Ok(None),
        n => u8::try_from(n).map(Some),
    });
    let slices = slices.transpose().map_err(|_| {
        let got = request.slices_per_expert.unwrap_or_default();
        let message = format!("slices_per_expert must be 0 to 8, got {got}");
        refusal(&ApiError::invalid("slices_per_expert", message))
    })?;
    let change = |intent: &mut Intent| {
        let before = intent.clone();
        intent.replicas = replicas.unwrap_or(intent.replicas);
        intent.slices_per_expert = slices.unwrap_or(intent.slices_per_expert);
        *intent != before
    };
    if let Some(written) = change_intent(app, change).await? {
        tracing::info!(replicas = ?written.replicas, slices = ?written.slices_per_expert, "intent changed");
    }
    let is_meant = |intent: &Intent| !change(&mut intent.clone());
    until_seen(app, is_meant).await?;
    let now = app.cluster.intent();
    Ok(v1::SetIntentResponse {
        replicas: now.intent.replicas.map(|n| count(n.get())),
        slices_per_expert: now.intent.slices_per_expert.map(u32::from),
    })
}

/// Applies `change` to what the store holds, which says whether it changed anything; what was written.
pub(super) async fn change_intent(
    app: &App,
    change: impl Fn(&mut Intent) -> bool,
) -> Result<Option<Intent>, Status> {
    for _ in 0..WRITE_ATTEMPTS_MAX {
        let (mut wish, revision) = match intent(&*app.store).await {
            // What nobody can read is replaced by the last that could be read.
            Err(Error::Invalid { .. } | Error::TooLarge { .. }) => {
                let entry = app.store.get(keys::INTENT).await.map_err(store_refused)?;
                let known = app.cluster.intent().intent.clone();
                (known, entry.map(|entry| entry.revision))
            }
            read => read.map_err(store_refused)?,
        };
        if !change(&mut wish) {
            return Ok(None);
        }
        match write_intent(&*app.store, &wish, revision).await {
            Ok(_revision) => return Ok(Some(wish)),
            Err(Error::Conflict { .. }) => {}
            Err(error) => return Err(store_refused(error)),
        }
    }
    Err(refusal(&ApiError::precondition(format!(
        "somebody else changed the intent {WRITE_ATTEMPTS_MAX} times in a row; try again"
    ))))
}

/// From then on this router goes by it.
pub(super) async fn until_seen(app: &App, reached: impl Fn(&Intent) -> bool) -> Result<(), Status> {
    let mut intent = app.cluster.intent.clone();
    let seen = intent.wait_for(|seen| reached(&seen.intent));
    match timeout(SEEN_MAX, seen).await {
        Ok(Ok(_seen)) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(refusal(&ApiError::unavailable(format!(
            "written, but this router has not seen it within {SEEN_MAX:?}"
        )))),
    }
}
