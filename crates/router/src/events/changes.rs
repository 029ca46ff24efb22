//! What happened between two looks at the cluster. Pure: no clock, no store, no log.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tramontane_coordination::{
    GroupPlacements, Intent, Members, Placements, Roles, SeenIntent, Version, WorkerRecord,
    WorkerState,
};
use tramontane_types::{Epoch, Placement, WorkerId};

/// The cluster at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) members: Arc<Members>,
    pub(crate) placements: Arc<Placements>,
    pub(crate) intent: Arc<SeenIntent>,
    /// Sequences that workers could not go on with since the look before.
    pub(crate) moved: BTreeMap<WorkerId, u32>,
}

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) kind: Kind,
    pub(crate) worker: Option<WorkerId>,
    /// The one that it is about, otherwise the published one.
    pub(crate) epoch: Epoch,
    pub(crate) text: String,
}

/// What sort of thing happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    RouterStarted,
    WorkerJoined,
    WorkerReady,
    WorkerDraining,
    WorkerLeaving,
    WorkerLeft,
    WorkerLost,
    WorkerRestarted,
    WorkerUnconfirmed,
    WorkerCordoned,
    WorkerUncordoned,
    WorkerRolesWanted,
    WorkerRolesChanged,
    SequencesMoved,
    PlacementProposed,
    PlacementPublished,
    StoreAway,
    StoreBack,
    StoreValuesSkipped,
    IntentChanged,
    WeightsServing,
    WeightsWanted,
}

impl Kind {
    /// As operators see it; stable.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::RouterStarted => "router_started",
            Self::WorkerJoined => "worker_joined",
            Self::WorkerReady => "worker_ready",
            Self::WorkerDraining => "worker_draining",
            Self::WorkerLeaving => "worker_leaving",
            Self::WorkerLeft => "worker_left",
            Self::WorkerLost => "worker_lost",
            Self::WorkerRestarted => "worker_restarted",
            Self::WorkerUnconfirmed => "worker_unconfirmed",
            Self::WorkerCordoned => "worker_cordoned",
            Self::WorkerUncordoned => "worker_uncordoned",
            Self::WorkerRolesWanted => "worker_roles_wanted",
            Self::WorkerRolesChanged => "worker_roles_changed",
            Self::SequencesMoved => "sequences_moved",
            Self::PlacementProposed => "placement_proposed",
            Self::PlacementPublished => "placement_published",
            Self::StoreAway => "store_away",
            Self::StoreBack => "store_back",
            Self::StoreValuesSkipped => "store_values_skipped",
            Self::IntentChanged => "intent_changed",
            Self::WeightsServing => "weights_serving",
            Self::WeightsWanted => "weights_wanted",
        }
    }
}

/// Everything that happened between two looks. Nothing did before the cluster was seen for the first time.
pub(crate) fn changes(before: &Snapshot, after: &Snapshot) -> Vec<Change> {
    let mut found = Changes {
        epoch: after.placements.published_epoch(),
        list: Vec::new(),
    };
    if !after.is_synced() {
        return found.list;
    }
    if !before.is_synced() {
        let workers = after.members.workers.len();
        let text = format!("the router sees the cluster: {workers} workers");
        found.push(Kind::RouterStarted, None, text);
        found.skipped(0, after.num_skipped());
        return found.list;
    }
    found.store(before, after);
    found.skipped(before.num_skipped(), after.num_skipped());
    found.workers(&before.members, &after.members);
    for (id, moved) in &after.moved {
        let text = format!("{moved} sequences lost their worker and go on elsewhere");
        found.push(Kind::SequencesMoved, Some(id), text);
    }
    found.placements(&before.placements, &after.placements);
    found.intent(&before.intent.intent, &after.intent.intent);
    found.list
}

impl Snapshot {
    fn is_synced(&self) -> bool {
        self.members.synced && self.placements.synced && self.intent.synced
    }

    fn is_stale(&self) -> bool {
        self.members.stale || self.placements.stale
    }

    fn num_skipped(&self) -> usize {
        self.members.skipped + self.placements.skipped + self.intent.skipped
    }
}

struct Changes {
    epoch: Epoch,
    list: Vec<Change>,
}

impl Changes {
    fn push(&mut self, kind: Kind, worker: Option<&WorkerId>, text: impl Into<String>) {
        self.list.push(Change {
            kind,
            worker: worker.cloned(),
            epoch: self.epoch,
            text: text.into(),
        });
    }

    fn store(&mut self, before: &Snapshot, after: &Snapshot) {
        match (before.is_stale(), after.is_stale()) {
            (false, true) => {
                let text = "the coordination store does not answer; serving goes on as it is";
                self.push(Kind::StoreAway, None, text);
            }
            (true, false) => {
                self.push(Kind::StoreBack, None, "the coordination store answers");
            }
            (false, false) | (true, true) => {}
        }
    }

    fn skipped(&mut self, before: usize, after: usize) {
        if before != after {
            let text = format!(
                "{after} values of the store cannot be read and are left out (before: {before})"
            );
            self.push(Kind::StoreValuesSkipped, None, text);
        }
    }

    fn workers(&mut self, before: &Members, after: &Members) {
        let ids: BTreeSet<&WorkerId> = before.workers.keys().chain(after.workers.keys()).collect();
        for id in ids {
            match (before.workers.get(id), after.workers.get(id)) {
                (None, Some(record)) => self.joined(record),
                (Some(record), None) => self.gone(record),
                (Some(old), Some(new)) => self.went_on(old, new),
                (None, None) => {}
            }
        }
        for id in after.unconfirmed.difference(&before.unconfirmed) {
            let text = "the store lost it in an outage; it is waited for to register again";
            self.push(Kind::WorkerUnconfirmed, Some(id), text);
        }
    }

    fn joined(&mut self, record: &WorkerRecord) {
        let (address, version) = (&record.address, Version::of(record));
        let text = format!("registered from {address}, {version}");
        self.push(Kind::WorkerJoined, Some(&record.id), text);
        self.entered(record);
    }

    fn gone(&mut self, record: &WorkerRecord) {
        if record.state.is_staying() {
            let text = "gone without having said that it leaves";
            self.push(Kind::WorkerLost, Some(&record.id), text);
            return;
        }
        self.push(Kind::WorkerLeft, Some(&record.id), "left after draining");
    }

    fn went_on(&mut self, old: &WorkerRecord, new: &WorkerRecord) {
        if old.incarnation != new.incarnation {
            let text = "another process of the same name took its place";
            self.push(Kind::WorkerRestarted, Some(&new.id), text);
        }
        if old.roles != new.roles && old.incarnation == new.incarnation {
            let text = format!("does {} (before: {})", shown(new.roles), shown(old.roles));
            self.push(Kind::WorkerRolesChanged, Some(&new.id), text);
        }
        if old.state != new.state || old.incarnation != new.incarnation {
            self.entered(new);
        }
    }

    /// The state that a worker is in now.
    fn entered(&mut self, record: &WorkerRecord) {
        let (kind, text) = match record.state {
            WorkerState::Joining => return,
            WorkerState::Ready => (Kind::WorkerReady, "serves"),
            WorkerState::Draining => (
                Kind::WorkerDraining,
                "finishes its sequences and hands over its experts",
            ),
            WorkerState::Leaving => (Kind::WorkerLeaving, "about to end"),
        };
        self.push(kind, Some(&record.id), text);
    }

    fn placements(&mut self, before: &Placements, after: &Placements) {
        let nothing = GroupPlacements::default();
        for (key, group) in &after.groups {
            self.group(before.groups.get(key).unwrap_or(&nothing), group);
        }
        if let Some(new) = after
            .serving
            .as_deref()
            .filter(|_| before.serving != after.serving)
        {
            let old = before.serving.as_deref();
            let old = old.map_or_else(|| "none".to_owned(), ToString::to_string);
            let text = format!("new requests begin with {new} (before: {old})");
            self.push(Kind::WeightsServing, None, text);
        }
    }

    fn group(&mut self, before: &GroupPlacements, after: &GroupPlacements) {
        let (old, new) = (before.published.as_deref(), after.published.as_deref());
        let published = new.filter(|new| old.is_none_or(|old| old.epoch < new.epoch));
        if let Some(new) = published {
            let text = described(old, new, "moved");
            self.about(Kind::PlacementPublished, new.epoch, text);
        }
        let Some(pending) = after.pending.as_deref() else {
            return;
        };
        let known = before.pending.as_deref().map(|p| p.epoch);
        if known != Some(pending.epoch) {
            let text = described(new, pending, "to load");
            self.about(Kind::PlacementProposed, pending.epoch, text);
        }
    }

    fn about(&mut self, kind: Kind, epoch: Epoch, text: String) {
        self.list.push(Change {
            kind,
            worker: None,
            epoch,
            text,
        });
    }

    fn intent(&mut self, before: &Intent, after: &Intent) {
        for id in after.cordoned.difference(&before.cordoned) {
            let text = "gets no new sequences and no slices";
            self.push(Kind::WorkerCordoned, Some(id), text);
        }
        for id in before.cordoned.difference(&after.cordoned) {
            let text = "may get sequences and slices again";
            self.push(Kind::WorkerUncordoned, Some(id), text);
        }
        let wanted = after
            .roles
            .iter()
            .filter(|(id, roles)| before.roles.get(*id) != Some(*roles));
        for (id, roles) in wanted {
            let text = format!("is to do {}", shown(*roles));
            self.push(Kind::WorkerRolesWanted, Some(id), text);
        }
        if before.weights != after.weights {
            let text = match &after.weights {
                Some(version) => format!("wanted for new requests: {version}"),
                None => "no version is wanted any more; the one that serves stays".to_owned(),
            };
            self.push(Kind::WeightsWanted, None, text);
        }
        let count =
            |n: Option<usize>| n.map_or_else(|| "by configuration".to_owned(), |n| n.to_string());
        let wishes = |intent: &Intent| {
            let slices = intent.slices_per_expert.map(usize::from);
            format!(
                "replicas {}, slices per expert {}",
                count(intent.replicas.map(std::num::NonZeroUsize::get)),
                count(slices)
            )
        };
        let (old, new) = (wishes(before), wishes(after));
        if old != new {
            self.push(Kind::IntentChanged, None, format!("{new} (before: {old})"));
        }
    }
}

/// Roles as they are shown.
fn shown(roles: Roles) -> &'static str {
    match (roles.attention, roles.experts) {
        (true, true) => "attention,experts",
        (true, false) => "attention",
        (false, true) => "experts",
        (false, false) => "nothing",
    }
}

fn described(old: Option<&Placement>, new: &Placement, moved: &str) -> String {
    format!(
        "epoch {} of {} on {} workers, {} slices {moved}",
        new.epoch,
        new.model,
        new.workers.len(),
        slices_moved(old, new)
    )
}

/// Slices of `new` on workers that did not hold all of their segments in `old`.
fn slices_moved(old: Option<&Placement>, new: &Placement) -> usize {
    let mut held: BTreeMap<(&WorkerId, u16, u16), u8> = BTreeMap::new();
    for (slice, holders) in old.into_iter().flat_map(Placement::iter) {
        for id in holders.iter().filter_map(|&h| old?.worker(h)) {
            *held.entry((id, slice.layer.0, slice.expert.0)).or_default() |= slice.range.mask();
        }
    }
    let mut moved = 0;
    for (slice, holders) in new.iter() {
        for id in holders.iter().filter_map(|&h| new.worker(h)) {
            let had = held.get(&(id, slice.layer.0, slice.expert.0));
            let lacks = slice.range.mask() & !had.copied().unwrap_or(0);
            moved += usize::from(lacks != 0);
        }
    }
    moved
}

#[cfg(test)]
pub(crate) mod tests {
    use std::num::NonZeroUsize;

    use tramontane_coordination::registry::RECORD_SCHEMA;
    use tramontane_coordination::{Measured, ModelFacts, Roles, WorkerLoad};
    use tramontane_types::{SegmentRange, SliceHolders};

    use super::*;

    /// A worker in this state.
    pub(crate) fn record(id: &str, state: WorkerState) -> WorkerRecord {
        WorkerRecord {
            schema: RECORD_SCHEMA,
            id: WorkerId::new(id),
            address: "10.0.0.1:7000".to_owned(),
            socket: None,
            roles: Roles {
                attention: true,
                experts: true,
            },
            capacity_bytes: 1000,
            segment_bytes: 10,
            numeric_class: "cpu-q8".to_owned(),
            model: ModelFacts {
                fingerprint: "f".to_owned(),
                name: "demo".to_owned(),
                num_layers: 1,
                num_experts: 2,
                num_segments: 8,
            },
            state,
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

    /// One layer, two experts; each is held whole by one of `holders`.
    pub(crate) fn placement(epoch: u64, holders: [&str; 2]) -> Placement {
        let workers: BTreeSet<&str> = holders.into_iter().collect();
        let workers: Vec<WorkerId> = workers.into_iter().map(WorkerId::new).collect();
        let slice = |id: &str| {
            let holder = workers.iter().position(|w| w.as_str() == id).unwrap();
            vec![SliceHolders {
                range: SegmentRange::WHOLE,
                holders: vec![holder as u16],
            }]
        };
        Placement {
            epoch: Epoch(epoch),
            numeric_class: "cpu-q8".to_owned(),
            model: "f".to_owned(),
            num_layers: 1,
            num_experts: 2,
            experts: holders.iter().map(|id| slice(id)).collect(),
            workers,
        }
    }

    fn snapshot(workers: &[(&str, WorkerState)]) -> Snapshot {
        let workers = workers.iter().map(|(id, state)| {
            let record = record(id, *state);
            (record.id.clone(), Arc::new(record))
        });
        Snapshot {
            members: Arc::new(Members {
                workers: workers.collect(),
                synced: true,
                ..Members::default()
            }),
            placements: Arc::new(Placements {
                synced: true,
                ..Placements::default()
            }),
            intent: Arc::new(SeenIntent {
                synced: true,
                ..SeenIntent::default()
            }),
            moved: BTreeMap::new(),
        }
    }

    fn check(before: &Snapshot, after: &Snapshot, expected: &[&str]) {
        let shown: Vec<String> = changes(before, after)
            .iter()
            .map(|change| {
                let worker = change.worker.as_ref().map_or("-", |id| id.as_str());
                format!("{} {worker} {}", change.kind.name(), change.epoch)
            })
            .collect();
        assert_eq!(shown, expected);
        assert_eq!(changes(after, after).len(), after.moved.len(), "told once");
    }

    #[test]
    fn the_first_sight_of_a_cluster_is_one_event() {
        let seen = snapshot(&[("a", WorkerState::Ready)]);
        check(&Snapshot::default(), &seen, &["router_started - 0"]);
        check(&Snapshot::default(), &Snapshot::default(), &[]);
    }

    #[test]
    fn a_worker_joins_serves_drains_and_leaves() {
        use WorkerState::{Draining, Joining, Leaving, Ready};
        let states = [Joining, Ready, Draining, Leaving];
        let [joining, ready, draining, leaving] = states.map(|state| snapshot(&[("a", state)]));
        let nobody = snapshot(&[]);
        check(&nobody, &joining, &["worker_joined a 0"]);
        check(&joining, &ready, &["worker_ready a 0"]);
        check(&nobody, &ready, &["worker_joined a 0", "worker_ready a 0"]);
        check(&ready, &draining, &["worker_draining a 0"]);
        check(&draining, &leaving, &["worker_leaving a 0"]);
        check(&leaving, &nobody, &["worker_left a 0"]);
        check(&ready, &nobody, &["worker_lost a 0"]);
    }

    #[test]
    fn a_new_process_of_the_same_name_is_told_apart() {
        let before = snapshot(&[("a", WorkerState::Ready)]);
        let mut after = before.clone();
        let mut young = record("a", WorkerState::Joining);
        young.incarnation = 2;
        let members = Arc::make_mut(&mut after.members);
        members.workers.insert(young.id.clone(), Arc::new(young));
        check(&before, &after, &["worker_restarted a 0"]);
    }

    #[test]
    fn a_busier_worker_is_no_event() {
        let before = snapshot(&[("a", WorkerState::Ready)]);
        let mut after = before.clone();
        let mut busy = record("a", WorkerState::Ready);
        busy.load.running = 9;
        busy.loaded = Epoch(3);
        let members = Arc::make_mut(&mut after.members);
        members.workers.insert(busy.id.clone(), Arc::new(busy));
        check(&before, &after, &[]);
    }

    #[test]
    fn a_placement_is_proposed_and_published_and_says_what_moves() {
        let mut before = snapshot(&[]);
        let version = Version::of_placement(&placement(1, ["a", "a"]));
        let key = version.key();
        let placements = Arc::make_mut(&mut before.placements);
        placements.serving = Some(Arc::new(version));
        let group = placements.groups.entry(key).or_default();
        group.published = Some(Arc::new(placement(1, ["a", "a"])));
        let mut proposed = before.clone();
        let placements = Arc::make_mut(&mut proposed.placements);
        let group = placements.groups.get_mut(&key).unwrap();
        group.pending = Some(Arc::new(placement(2, ["a", "b"])));
        check(&before, &proposed, &["placement_proposed - 2"]);
        let change = changes(&before, &proposed).remove(0);
        assert_eq!(change.text, "epoch 2 of f on 2 workers, 1 slices to load");
        let mut published = proposed.clone();
        let placements = Arc::make_mut(&mut published.placements);
        let group = placements.groups.get_mut(&key).unwrap();
        group.published = group.pending.take();
        check(&proposed, &published, &["placement_published - 2"]);
        let change = changes(&proposed, &published).remove(0);
        assert_eq!(change.text, "epoch 2 of f on 2 workers, 1 slices moved");
    }

    #[test]
    fn another_version_takes_over_and_is_told() {
        let version = |model: &str| Version {
            model: model.into(),
            numeric_class: "cpu-q8".into(),
        };
        let mut before = snapshot(&[]);
        Arc::make_mut(&mut before.placements).serving = Some(Arc::new(version("f")));
        let mut wanted = before.clone();
        Arc::make_mut(&mut wanted.intent).intent.weights = Some(version("g"));
        check(&before, &wanted, &["weights_wanted - 0"]);
        let mut after = wanted.clone();
        Arc::make_mut(&mut after.placements).serving = Some(Arc::new(version("g")));
        check(&wanted, &after, &["weights_serving - 0"]);
        let text = &changes(&wanted, &after)[0].text;
        let expected = "new requests begin with g (cpu-q8) (before: f (cpu-q8))";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_the_operator_does_is_told() {
        let before = snapshot(&[]);
        let mut after = before.clone();
        let intent = &mut Arc::make_mut(&mut after.intent).intent;
        intent.cordoned.insert(WorkerId::new("a"));
        intent.replicas = NonZeroUsize::new(2);
        check(
            &before,
            &after,
            &["worker_cordoned a 0", "intent_changed - 0"],
        );
        check(
            &after,
            &before,
            &["worker_uncordoned a 0", "intent_changed - 0"],
        );
        let text = &changes(&before, &after)[1].text;
        assert_eq!(
            text,
            "replicas 2, slices per expert by configuration \
             (before: replicas by configuration, slices per expert by configuration)"
        );
    }

    #[test]
    fn roles_are_told_when_they_are_wanted_and_when_they_are_there() {
        let before = snapshot(&[("a", WorkerState::Ready)]);
        let mut wanted = before.clone();
        let experts = Roles {
            attention: false,
            experts: true,
        };
        let intent = &mut Arc::make_mut(&mut wanted.intent).intent;
        intent.roles.insert(WorkerId::new("a"), experts);
        check(&before, &wanted, &["worker_roles_wanted a 0"]);
        let mut there = wanted.clone();
        let mut changed = record("a", WorkerState::Ready);
        changed.roles = experts;
        let members = Arc::make_mut(&mut there.members);
        members
            .workers
            .insert(changed.id.clone(), Arc::new(changed));
        check(&wanted, &there, &["worker_roles_changed a 0"]);
        let text = &changes(&wanted, &there)[0].text;
        assert_eq!(text, "does experts (before: attention,experts)");
    }

    #[test]
    fn a_store_that_goes_and_comes_back_and_whom_it_lost_are_told() {
        let here = snapshot(&[("a", WorkerState::Ready)]);
        let mut away = here.clone();
        Arc::make_mut(&mut away.members).stale = true;
        let mut further = away.clone();
        Arc::make_mut(&mut further.placements).stale = true;
        let mut back = here.clone();
        Arc::make_mut(&mut back.members)
            .unconfirmed
            .insert(WorkerId::new("a"));
        check(&here, &away, &["store_away - 0"]);
        check(&away, &further, &[]);
        check(
            &further,
            &back,
            &["store_back - 0", "worker_unconfirmed a 0"],
        );
    }

    #[test]
    fn values_that_cannot_be_read_are_told_when_their_number_changes() {
        let good = snapshot(&[]);
        let mut bad = good.clone();
        Arc::make_mut(&mut bad.members).skipped = 2;
        Arc::make_mut(&mut bad.placements).skipped = 1;
        Arc::make_mut(&mut bad.intent).skipped = 1;
        check(&good, &bad, &["store_values_skipped - 0"]);
        let text = &changes(&good, &bad)[0].text;
        assert!(text.starts_with("4 values of the store"), "{text}");
        check(&bad, &good, &["store_values_skipped - 0"]);
        let first = ["router_started - 0", "store_values_skipped - 0"];
        check(&Snapshot::default(), &bad, &first);
    }

    #[test]
    fn sequences_that_moved_are_counted_for_their_worker() {
        let before = snapshot(&[("a", WorkerState::Ready)]);
        let mut after = snapshot(&[]);
        after.moved.insert(WorkerId::new("a"), 3);
        check(&before, &after, &["worker_lost a 0", "sequences_moved a 0"]);
        let text = &changes(&before, &after)[1].text;
        assert!(text.starts_with("3 sequences"), "{text}");
    }
}
