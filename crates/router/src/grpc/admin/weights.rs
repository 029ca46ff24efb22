//! The versions of the weights that there are, and which of them an operator wants new requests to begin with.
//! Moves nothing itself: the planner does, once the wanted version is placed.

use std::collections::BTreeMap;

use tonic::Status;
use tramontane_coordination::{
    GroupPlacements, Intent, Members, Placements, Version, WorkerState, is_complete,
    survives_one_loss,
};
use tramontane_proto::v1;

use super::intent::{change_intent, until_seen};
use super::{count, not_found, refusal};
use crate::error::ApiError;
use crate::run::App;

/// Longest version that is read: a fingerprint has 16 digits.
const VERSION_BYTES_MAX: usize = 512;

pub(super) fn list(app: &App) -> v1::ListWeightsResponse {
    let view = View::of(app);
    let statuses = app.planning.as_ref().and_then(|p| p.status());
    let versions = view.versions().into_iter().map(|(version, workers)| {
        let planned = statuses.as_ref().and_then(|s| s.groups.get(&version.key()));
        v1::WeightsSummary {
            planner_doing: planned.map(|s| s.doing.clone()).unwrap_or_default(),
            ..view.summary(&version, workers)
        }
    });
    v1::ListWeightsResponse {
        weights: versions.collect(),
    }
}

pub(super) async fn use_weights(
    app: &App,
    request: &v1::UseWeightsRequest,
) -> Result<v1::UseWeightsResponse, Status> {
    let view = View::of(app);
    let wanted = view.find(request)?;
    let is_placed = view.is_placed(&wanted);
    if !is_placed && !request.let_come {
        return Err(refusal(&ApiError::precondition(format!(
            "{wanted} is not placed: {}; start more workers with it, or wait until it is",
            view.missing(&wanted)
        ))));
    }
    if !request.dry_run {
        let change = |intent: &mut Intent| {
            let is_new = intent.weights.as_ref() != Some(&wanted);
            intent.weights = Some(wanted.clone());
            is_new
        };
        let changed = change_intent(app, change).await?.is_some();
        until_seen(app, |intent| intent.weights.as_ref() == Some(&wanted)).await?;
        if changed {
            tracing::info!(version = %wanted, is_placed, "wanted for new requests");
        }
    }
    let serving = app.cluster.serving();
    let name = |text: Option<&str>| text.unwrap_or_default().to_owned();
    Ok(v1::UseWeightsResponse {
        version: wanted.model.to_string(),
        numeric_class: wanted.numeric_class.to_string(),
        placed: is_placed,
        serving: name(serving.as_deref().map(|v| &*v.model)),
        serving_class: name(serving.as_deref().map(|v| &*v.numeric_class)),
    })
}

/// The cluster at one moment.
struct View {
    members: std::sync::Arc<Members>,
    placements: std::sync::Arc<Placements>,
    intent: Intent,
}

impl View {
    fn of(app: &App) -> Self {
        Self {
            members: app.cluster.members(),
            placements: app.cluster.placements(),
            intent: app.cluster.intent().intent.clone(),
        }
    }

    /// Those that a worker has or that matter, each with its workers.
    fn versions(&self) -> BTreeMap<Version, Vec<String>> {
        let mut versions: BTreeMap<Version, Vec<String>> = BTreeMap::new();
        let serving = self.placements.serving.as_deref();
        for version in serving.into_iter().chain(&self.intent.weights) {
            versions.entry(version.clone()).or_default();
        }
        for worker in self.members.workers.values() {
            let ids = versions.entry(Version::of(worker)).or_default();
            ids.push(worker.id.to_string());
        }
        versions
    }

    fn summary(&self, version: &Version, workers: Vec<String>) -> v1::WeightsSummary {
        let group = self.placements.of(version).cloned().unwrap_or_default();
        let ours = || self.members.workers.values().filter(|w| version.has(w));
        let ready = ours().filter(|w| w.state == WorkerState::Ready).count();
        let load = ours().map(|w| w.load.running.saturating_add(w.load.waiting));
        let published = group.published.as_deref();
        v1::WeightsSummary {
            version: version.model.to_string(),
            numeric_class: version.numeric_class.to_string(),
            workers,
            workers_ready: count(ready),
            epoch: group.published_epoch().0,
            pending_epoch: group.pending.as_ref().map_or(0, |p| p.epoch.0),
            placed: self.is_placed(version),
            serving: self.placements.serving.as_deref() == Some(version),
            wanted: self.intent.weights.as_ref() == Some(version),
            sequences: load.fold(0, u32::saturating_add),
            survives_one_loss: published.is_some_and(|p| survives_one_loss(&self.members, p)),
            planner_doing: String::new(),
        }
    }

    fn published(&self, version: &Version) -> Option<&tramontane_types::Placement> {
        let group: Option<&GroupPlacements> = self.placements.of(version);
        group?.published.as_deref()
    }

    fn is_placed(&self, version: &Version) -> bool {
        let published = self.published(version);
        published.is_some_and(|p| is_complete(&self.members, p, &self.intent))
    }

    /// What a version lacks that is not placed.
    fn missing(&self, version: &Version) -> String {
        let ours = || self.members.workers.values().filter(|w| version.has(w));
        let (all, ready) = (
            ours().count(),
            ours().filter(|w| w.state == WorkerState::Ready).count(),
        );
        let workers = format!("{ready} of its {all} workers are ready");
        match self.published(version) {
            None => format!("{workers}, and no placement is published for it"),
            Some(published) => format!("{workers} for epoch {}", published.epoch),
        }
    }

    /// The one version that is meant.
    fn find(&self, request: &v1::UseWeightsRequest) -> Result<Version, Status> {
        let (prefix, class) = (&request.version, &request.numeric_class);
        if prefix.is_empty() || prefix.len() > VERSION_BYTES_MAX {
            let got = prefix.len();
            let message = format!("version must have 1 to {VERSION_BYTES_MAX} bytes, got {got}");
            return Err(refusal(&ApiError::invalid("version", message)));
        }
        let versions = self.versions();
        let is_meant = |version: &&Version| {
            version.model.starts_with(prefix.as_str())
                && (class.is_empty() || *version.numeric_class == **class)
        };
        let mut found = versions.keys().filter(is_meant);
        let Some(first) = found.next() else {
            let known: Vec<String> = versions.keys().map(ToString::to_string).collect();
            let message = format!(
                "no worker has weights whose version begins with {prefix:?}{}; there is {}",
                if class.is_empty() {
                    ""
                } else {
                    " in this class"
                },
                if known.is_empty() {
                    "none".to_owned()
                } else {
                    known.join(", ")
                }
            );
            return Err(not_found(message, "version"));
        };
        if let Some(second) = found.next() {
            let message = format!("version {prefix:?} is ambiguous: {first}, {second}");
            return Err(refusal(&ApiError::invalid("version", message)));
        }
        self.check_shape(first)?;
        Ok(first.clone())
    }

    /// A worker may read another model altogether, which this router has no tokenizer for.
    fn check_shape(&self, version: &Version) -> Result<(), Status> {
        let shape = |version: &Version| {
            let mut ours = self.members.workers.values().filter(|w| version.has(w));
            let model = ours
                .next()
                .map(|w| (w.model.num_layers, w.model.num_experts));
            let placed = self.published(version);
            model.or_else(|| placed.map(|p| (p.num_layers, p.num_experts)))
        };
        let serving = self.placements.serving.as_deref().and_then(shape);
        match (serving, shape(version)) {
            (Some(serving), Some(got)) if serving != got => {
                let message = format!(
                    "{version} is of another model: {} layers of {} experts, expected {} of {}",
                    got.0, got.1, serving.0, serving.1
                );
                Err(refusal(&ApiError::precondition(message)))
            }
            _ => Ok(()),
        }
    }
}
