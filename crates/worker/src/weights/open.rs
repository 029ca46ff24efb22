//! Opens the checkpoint that a cluster serves when it is not, or not whole, on this machine. Waits for somebody
//! who has it as every worker waits for the store; gives up only on a checkpoint that cannot be opened.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tramontane_coordination::{
    Members, Placements, Scope, Store, WorkerState, watch_members, watch_placements,
};
use tramontane_grammar::Vocabulary;
use tramontane_model::Checkpoint;
use tramontane_proto::v1;
use tramontane_runtime::tls::Link;

use super::client::PeerWeights;
use crate::Error;

/// How often a worker that waits for somebody says so.
const WAIT_NOTE: Duration = Duration::from_secs(30);
/// Attempts to open what others have before the worker ends.
const OPEN_ATTEMPTS_MAX: u32 = 10;
/// Pause between two of them.
const OPEN_PAUSE: Duration = Duration::from_secs(2);

/// Which model a worker wants of the others.
#[derive(Clone, Debug)]
pub struct PeerModel {
    /// Where the others are listed.
    pub store: Arc<dyn Store>,
    /// The way to them.
    pub link: Link,
    /// Name of the cluster.
    pub cluster: String,
    /// Id of the worker that wants it.
    pub id: String,
    /// The model's name; `None` takes that of the published placement, or the most common one.
    pub name: Option<String>,
    /// A directory that may have some of its files.
    pub directory: Option<PathBuf>,
}

/// What others had of a model.
#[derive(Debug)]
pub struct PeerOpened {
    /// Its checkpoint, the rest of which they are asked for.
    pub checkpoint: Checkpoint,
    /// Its name.
    pub name: String,
    /// What its tokens stand for, if whoever described it knew.
    pub vocabulary: Option<Vocabulary>,
}

/// A model that some member has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    fingerprint: String,
    name: String,
}

/// The checkpoint and what belongs to it; `None` when `stop` came first.
///
/// # Errors
/// When workers list a model that cannot be opened from them, again and again.
pub async fn open_from_peers(
    wish: PeerModel,
    stop: CancellationToken,
) -> Result<Option<PeerOpened>, Error> {
    let (tasks, ended) = (TaskTracker::new(), stop.child_token());
    let members = watch_members(Arc::clone(&wish.store), &tasks, ended.clone());
    let placements = watch_placements(Arc::clone(&wish.store), Scope::All, &tasks, ended.clone());
    let opened = stop
        .run_until_cancelled(look(&wish, members, placements, ended.clone()))
        .await;
    ended.cancel();
    tasks.close();
    tasks.wait().await;
    opened.transpose()
}

async fn look(
    wish: &PeerModel,
    mut members: watch::Receiver<Arc<Members>>,
    placements: watch::Receiver<Arc<Placements>>,
    ended: CancellationToken,
) -> Result<PeerOpened, Error> {
    let (mut attempts, mut noted) = (0, None);
    loop {
        let seen = (
            members.borrow_and_update().clone(),
            placements.borrow().clone(),
        );
        let Some(found) = choose(wish, &seen.0, &seen.1) else {
            let now = Instant::now();
            if noted.is_none_or(|noted| now - noted >= WAIT_NOTE) {
                noted = Some(now);
                let (worker, model) = (&wish.id, wish.name.as_deref());
                tracing::info!(
                    worker,
                    model,
                    "no other worker has the model, waiting for one"
                );
            }
            let _changed_or_time = timeout(WAIT_NOTE, members.changed()).await;
            continue;
        };
        let opened = open(wish, &found, members.clone(), ended.clone()).await;
        attempts += 1;
        match opened {
            Ok((checkpoint, vocabulary)) => {
                return Ok(PeerOpened {
                    checkpoint,
                    name: found.name,
                    vocabulary,
                });
            }
            Err(error) if attempts >= OPEN_ATTEMPTS_MAX => return Err(error),
            Err(error) => report(wish, &found, &error),
        }
        sleep(OPEN_PAUSE).await;
    }
}

fn report(wish: &PeerModel, found: &Found, error: &Error) {
    let (worker, model, error) = (
        &wish.id,
        &found.fingerprint,
        error as &dyn std::error::Error,
    );
    tracing::warn!(
        worker,
        model,
        error,
        "the model of other workers cannot be opened, trying again"
    );
}

/// The model of the published placement if a member has it, otherwise the one that most members have.
fn choose(wish: &PeerModel, members: &Members, placements: &Placements) -> Option<Found> {
    let mut models: BTreeMap<(&str, &str), usize> = BTreeMap::new();
    for record in members.workers.values() {
        let (model, is_named) = (&record.model, wish.name.as_ref());
        let is_other = record.id.as_str() != wish.id && record.state != WorkerState::Leaving;
        if is_other && is_named.is_none_or(|name| *name == model.name) {
            *models.entry((&model.fingerprint, &model.name)).or_default() += 1;
        }
    }
    let serving = placements.serving.as_ref().map(|version| &*version.model);
    let is_serving = |(fingerprint, _): &(&str, &str)| Some(*fingerprint) == serving;
    let most = models
        .iter()
        .max_by_key(|(model, count)| (is_serving(model), **count));
    most.map(|((fingerprint, name), _)| Found {
        fingerprint: (*fingerprint).to_owned(),
        name: (*name).to_owned(),
    })
}

async fn open(
    wish: &PeerModel,
    found: &Found,
    members: watch::Receiver<Arc<Members>>,
    ended: CancellationToken,
) -> Result<(Checkpoint, Option<Vocabulary>), Error> {
    let asker = v1::WeightsAsker {
        worker_id: wish.id.clone(),
        cluster: wish.cluster.clone(),
        model: found.fingerprint.clone(),
    };
    let peers = Arc::new(PeerWeights::new(
        asker,
        wish.link.clone(),
        members,
        Arc::default(),
        ended,
    ));
    let described = peers.describe().await.map_err(|source| Error::Described {
        model: found.fingerprint.clone(),
        source: Box::new(source),
    })?;
    let (description, vocabulary) = described;
    let directory = wish.directory.clone();
    let open = move || Checkpoint::open_described(&description, directory.as_deref(), peers);
    let what = "opening the checkpoint of other workers";
    let opened = tokio::task::spawn_blocking(open).await;
    let checkpoint = opened
        .map_err(|source| Error::Task { what, source })?
        .map_err(Error::Checkpoint)?;
    let (here, files) = checkpoint.files_here();
    let (worker, model) = (&wish.id, &found.fingerprint);
    tracing::info!(
        worker,
        model,
        files,
        here,
        "opened the model of other workers"
    );
    Ok((checkpoint, vocabulary))
}

#[cfg(test)]
mod tests {
    use tramontane_coordination::registry::RECORD_SCHEMA;
    use tramontane_coordination::{
        Measured, MemoryStore, ModelFacts, Roles, Version, WorkerLoad, WorkerRecord,
    };
    use tramontane_types::{Epoch, WorkerId};

    use super::*;

    fn record(id: &str, model: &str) -> WorkerRecord {
        WorkerRecord {
            schema: RECORD_SCHEMA,
            id: WorkerId::new(id),
            address: "127.0.0.1:1".to_owned(),
            socket: None,
            roles: Roles::default(),
            capacity_bytes: 0,
            segment_bytes: 1,
            numeric_class: "cpu-q8".to_owned(),
            model: ModelFacts {
                fingerprint: format!("f-{model}"),
                name: model.to_owned(),
                num_layers: 1,
                num_experts: 1,
                num_segments: 8,
            },
            state: WorkerState::Ready,
            loaded: Epoch(0),
            incarnation: 1,
            started_ms: 1,
            version: "0".to_owned(),
            load: WorkerLoad::default(),
            measured: Measured::default(),
            sequences_max: 0,
            part: None,
        }
    }

    #[test]
    fn the_model_is_the_published_one_or_what_most_have() {
        let wish = |name: Option<&str>| PeerModel {
            store: Arc::new(MemoryStore::new()),
            link: Link::default(),
            cluster: "c".to_owned(),
            id: "me".to_owned(),
            name: name.map(str::to_owned),
            directory: None,
        };
        let mut members = Members::default();
        for (id, model) in [("me", "x"), ("a", "x"), ("b", "y"), ("c", "y"), ("d", "z")] {
            members
                .workers
                .insert(WorkerId::new(id), Arc::new(record(id, model)));
        }
        let mut placements = Placements::default();
        let chosen = |name: Option<&str>, placements: &Placements| {
            choose(&wish(name), &members, placements).map(|found| found.fingerprint)
        };
        let none = placements.clone();
        placements.serving = Some(Arc::new(Version {
            model: "f-z".into(),
            numeric_class: "cpu-q8".into(),
        }));
        assert_eq!(chosen(None, &none).as_deref(), Some("f-y"));
        assert_eq!(chosen(None, &placements).as_deref(), Some("f-z"));
        assert_eq!(chosen(Some("x"), &placements).as_deref(), Some("f-x"));
        assert_eq!(chosen(Some("nobody's"), &placements), None);
    }
}
