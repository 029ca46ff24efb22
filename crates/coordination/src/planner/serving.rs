//! Which groups are planned for, and which version takes new requests. Pure: time comes as durations.
//!
//! A newcomer overturns nothing. The version changes when the operator says so and it is placed, or when the
//! one that serves has nobody left who stays.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Intent;
use crate::loss::is_complete;
use crate::placements::{GROUPS_MAX, GroupPlacements};
use crate::registry::Members;
use crate::version::{GroupKey, Version};

/// How long nobody of the version that serves may be listed before another one takes new requests: the time of
/// a process to start again under its name.
pub const MOVE_AFTER: Duration = Duration::from_secs(10);

/// Everything that the choice depends on.
#[derive(Clone, Copy, Debug)]
pub struct ServingView<'a> {
    /// Who is there.
    pub members: &'a Members,
    /// What the groups serve on.
    pub placements: &'a BTreeMap<GroupKey, GroupPlacements>,
    /// What the operator wants.
    pub intent: &'a Intent,
    /// The version that serves.
    pub current: Option<&'a Version>,
    /// For how long nobody of it has been listed; `None` while somebody is.
    pub gone_for: Option<Duration>,
}

impl ServingView<'_> {
    /// The version that takes new requests from now on; `None` while there is none to choose.
    #[must_use]
    pub fn choose(&self) -> Option<Version> {
        if self.members.stale || !self.members.synced {
            return self.current.cloned();
        }
        let wished = self.intent.weights.as_ref();
        if let Some(wished) = wished.filter(|wished| self.is_complete(wished)) {
            return Some(wished.clone());
        }
        let Some(current) = self.current else {
            return self.first();
        };
        let is_left = match self.gone_for {
            Some(gone_for) => gone_for < MOVE_AFTER,
            None => self.has_staying(current),
        };
        let other = || {
            let complete = self.versions().into_values().filter(|v| v != current);
            let complete = complete.filter(|v| self.is_alike(current, v) && self.is_complete(v));
            complete.max_by_key(|v| (capacity(self.members, v), v.key()))
        };
        let other = if is_left { None } else { other() };
        Some(other.unwrap_or_else(|| current.clone()))
    }

    /// The largest group that can be placed, once it is. A smaller one that is faster must not win.
    fn first(&self) -> Option<Version> {
        let placed = self.versions().into_values().filter(|version| {
            let group = self.placements.get(&version.key());
            group.is_some_and(|g| g.version().as_ref() == Some(version))
        });
        let largest = placed.max_by_key(|v| (capacity(self.members, v), v.key()))?;
        let group = self.placements.get(&largest.key())?;
        group.published.is_some().then_some(largest)
    }

    fn versions(&self) -> BTreeMap<GroupKey, Version> {
        let workers = self.members.workers.values();
        let versions = workers.map(|worker| Version::of(worker));
        versions.map(|version| (version.key(), version)).collect()
    }

    /// Whether requests that go to a version now find everything there.
    fn is_complete(&self, version: &Version) -> bool {
        let group = self.placements.get(&version.key());
        let published = group.and_then(|group| group.published.as_deref());
        published.is_some_and(|published| {
            Version::of_placement(published) == *version
                && is_complete(self.members, published, self.intent)
        })
    }

    /// Whether both are of one shape: a misconfigured worker may read another model altogether.
    fn is_alike(&self, one: &Version, other: &Version) -> bool {
        let shape = |version: &Version| {
            let group = self.placements.get(&version.key())?;
            let placement = group.published.as_ref()?;
            Some((placement.num_layers, placement.num_experts))
        };
        shape(one) == shape(other)
    }

    fn has_staying(&self, version: &Version) -> bool {
        let mut workers = self.members.workers.values();
        workers.any(|worker| version.has(worker) && worker.state.is_staying())
    }
}

/// Segments that the staying workers of a version have room for.
fn capacity(members: &Members, version: &Version) -> u64 {
    let workers = members.workers.values().filter(|w| version.has(w));
    let staying = workers.filter(|w| w.roles.experts && w.state.is_staying());
    staying.fold(0, |sum, w| sum.saturating_add(w.capacity_segments()))
}

/// The groups to plan for: the one that serves and the wished one, those that have a placement, and the largest
/// others, up to [`GROUPS_MAX`].
#[must_use]
pub(super) fn groups_to_plan(
    members: &Members,
    placements: &BTreeMap<GroupKey, GroupPlacements>,
    first: &[&Version],
) -> Vec<Version> {
    let view = ServingView {
        members,
        placements,
        intent: &Intent::default(),
        current: None,
        gone_for: None,
    };
    let mut versions: Vec<Version> = first.iter().copied().cloned().collect();
    versions.dedup();
    let mut others: Vec<Version> = view.versions().into_values().collect();
    others.sort_by_key(|version| {
        let is_placed = placements.contains_key(&version.key());
        (!is_placed, u64::MAX - capacity(members, version))
    });
    let missing = others.into_iter().filter(|v| !first.contains(&v));
    versions.extend(missing);
    versions.truncate(GROUPS_MAX);
    versions
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tramontane_types::{Epoch, WorkerId};

    use super::*;
    use crate::placement_store::tests::placement_of;
    use crate::registry::{WorkerRecord, WorkerState, record_for_tests as record};

    fn version(model: &str) -> Version {
        Version::of_placement(&placement_of(model, 1))
    }

    /// Workers as `id:model` with a state; each holds all of its model's only placement, epoch 1.
    struct Scene {
        members: Members,
        placements: BTreeMap<GroupKey, GroupPlacements>,
        intent: Intent,
        current: Option<Version>,
        gone_for: Option<Duration>,
    }

    impl Scene {
        fn of(workers: &[(&str, &str, WorkerState)]) -> Self {
            let (mut members, mut placements) = (Members::default(), BTreeMap::new());
            members.synced = true;
            for (id, model, state) in workers {
                let worker = worker(id, model, *state);
                let mut placement = placement_of(model, 1);
                placement.workers = vec![worker.id.clone()];
                let group = GroupPlacements {
                    published: Some(Arc::new(placement)),
                    pending: None,
                };
                placements.entry(version(model).key()).or_insert(group);
                members.workers.insert(worker.id.clone(), Arc::new(worker));
            }
            Self {
                members,
                placements,
                intent: Intent::default(),
                current: None,
                gone_for: None,
            }
        }

        fn serves(mut self, model: &str) -> Self {
            self.current = Some(version(model));
            self
        }

        fn chosen(&self) -> String {
            let view = ServingView {
                members: &self.members,
                placements: &self.placements,
                intent: &self.intent,
                current: self.current.as_ref(),
                gone_for: self.gone_for,
            };
            view.choose()
                .map_or("none".to_owned(), |v| v.model.to_string())
        }
    }

    fn worker(id: &str, model: &str, state: WorkerState) -> WorkerRecord {
        let mut worker = record(id);
        worker.model.fingerprint = model.to_owned();
        worker.state = state;
        worker.loaded = Epoch(1);
        worker
    }

    use WorkerState::{Draining, Joining, Ready};

    #[test]
    fn the_first_version_is_that_of_the_largest_group_that_can_be_placed() {
        let mut scene = Scene::of(&[("a", "x", Ready), ("b", "y", Ready), ("c", "y", Ready)]);
        assert_eq!(scene.chosen(), "y");
        // The larger one still loads: it is waited for.
        let group = scene.placements.get_mut(&version("y").key()).unwrap();
        group.pending = group.published.take();
        assert_eq!(scene.chosen(), "none");
        // It cannot be placed at all.
        scene.placements.remove(&version("y").key());
        assert_eq!(scene.chosen(), "x");
        assert_eq!(Scene::of(&[]).chosen(), "none");
    }

    #[test]
    fn a_newcomer_overturns_nothing_and_the_operator_does_once_it_is_placed() {
        let workers = [("a", "x", Ready), ("b", "y", Ready), ("c", "y", Ready)];
        let mut scene = Scene::of(&workers).serves("x");
        assert_eq!(scene.chosen(), "x");
        scene.intent.weights = Some(version("y"));
        assert_eq!(scene.chosen(), "y");
        let mut loading = Scene::of(&[("a", "x", Ready), ("b", "y", Joining)]).serves("x");
        loading.intent.weights = Some(version("y"));
        assert_eq!(loading.chosen(), "x", "nobody there could answer");
        loading.intent.weights = Some(version("z"));
        assert_eq!(loading.chosen(), "x", "there is no such version");
        // Cordoned workers take no sequences.
        let mut cordoned = Scene::of(&[("a", "x", Ready), ("b", "y", Ready)]).serves("x");
        cordoned.intent.weights = Some(version("y"));
        cordoned.intent.cordoned.insert(WorkerId::new("b"));
        assert_eq!(cordoned.chosen(), "x");
    }

    #[test]
    fn another_version_takes_over_when_nobody_stays() {
        let leaving = Scene::of(&[("a", "x", Draining), ("b", "y", Ready)]).serves("x");
        assert_eq!(leaving.chosen(), "y");
        let mut gone = Scene::of(&[("a", "x", Ready), ("b", "y", Ready)]).serves("x");
        gone.members.workers.remove(&WorkerId::new("a"));
        gone.gone_for = Some(MOVE_AFTER - Duration::from_secs(1));
        assert_eq!(gone.chosen(), "x", "it may only start again");
        gone.gone_for = Some(MOVE_AFTER);
        assert_eq!(gone.chosen(), "y");
        gone.members.stale = true;
        assert_eq!(gone.chosen(), "x", "nothing is known of who is there");
        let nobody = Scene::of(&[("a", "x", Draining), ("b", "y", Joining)]).serves("x");
        assert_eq!(nobody.chosen(), "x", "the other one could not answer");
    }

    #[test]
    fn a_model_of_another_shape_does_not_take_over() {
        let mut scene = Scene::of(&[("a", "x", Draining), ("b", "y", Ready)]).serves("x");
        let group = scene.placements.get_mut(&version("y").key()).unwrap();
        let placement = Arc::make_mut(group.published.as_mut().unwrap());
        placement.num_layers = 1;
        placement.experts.truncate(4);
        assert_eq!(scene.chosen(), "x");
    }

    #[test]
    fn only_so_many_groups_are_planned_for_and_those_that_matter_first() {
        let names: Vec<String> = (0..GROUPS_MAX + 5).map(|i| format!("w{i:02}")).collect();
        let workers: Vec<_> = names
            .iter()
            .map(|n| (n.as_str(), n.as_str(), Ready))
            .collect();
        let mut scene = Scene::of(&workers);
        let (serving, wished) = (version("w20"), version("absent"));
        scene
            .placements
            .retain(|key, _| *key == version("w19").key());
        let first = [&serving, &wished];
        let planned = groups_to_plan(&scene.members, &scene.placements, &first);
        assert_eq!(planned.len(), GROUPS_MAX);
        assert_eq!(planned[..3], [serving, wished, version("w19")]);
    }
}
