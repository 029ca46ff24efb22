//! What the operator wants of the placement, as it stands in the store. Decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroUsize;

use serde::{Deserialize, Serialize};
use tramontane_types::{Epoch, SEGMENTS_PER_EXPERT, WorkerId};

use crate::Error;
use crate::balance::PLACEMENT_WORKERS_MAX;
use crate::registry::{Roles, WorkerRecord};
use crate::store::{CasOutcome, Entry, Revision, Store, keys};
use crate::version::Version;

/// Largest intent.
pub const INTENT_BYTES_MAX: usize = 64 * 1024;

/// Most replicas that an operator may ask for.
pub const REPLICAS_MAX: usize = 64;

/// What the operator wants; the value of the key `intent`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Intent {
    /// Workers that hold each slice; `None` leaves it to the configuration.
    pub replicas: Option<NonZeroUsize>,
    /// Slices per expert; `None` leaves it to `balance`.
    pub slices_per_expert: Option<u8>,
    /// Workers that get no slices.
    pub cordoned: BTreeSet<WorkerId>,
    /// What workers are to do; those that are not named do what they were configured for.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<WorkerId, Roles>,
    /// The epoch that is to be planned again for load and speed now, however little there is to gain.
    /// Done once a later one is published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebalance: Option<Epoch>,
    /// The version that new requests go to as soon as it is placed; `None` leaves it as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Version>,
}

impl Intent {
    /// Checks every field against its limit.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the field, its value and the rule.
    pub fn validate(&self) -> Result<(), Error> {
        let refuse = |detail: String| Err(Error::invalid("intent", detail));
        if let Some(replicas) = self.replicas.filter(|r| r.get() > REPLICAS_MAX) {
            return refuse(format!("{replicas} replicas, at most {REPLICAS_MAX}"));
        }
        let slices = self.slices_per_expert;
        if let Some(slices) = slices.filter(|s| !(1..=SEGMENTS_PER_EXPERT).contains(s)) {
            return refuse(format!("{slices} slices per expert, 1 to 8 expected"));
        }
        if self.cordoned.len() > PLACEMENT_WORKERS_MAX {
            return refuse(format!("{} cordoned workers", self.cordoned.len()));
        }
        if self.roles.len() > PLACEMENT_WORKERS_MAX {
            return refuse(format!("roles of {} workers", self.roles.len()));
        }
        let idle = |roles: &Roles| *roles == Roles::default();
        if let Some((id, _)) = self.roles.iter().find(|(_, roles)| idle(roles)) {
            return refuse(format!("worker {id} without a role"));
        }
        match &self.weights {
            Some(weights) => weights.validate("weights of the intent"),
            None => Ok(()),
        }
    }

    /// The roles that are wanted of a worker which can have `can`; `None` where nobody has said any of these.
    #[must_use]
    pub fn roles_of(&self, worker: &WorkerId, can: Roles) -> Option<Roles> {
        let wish = self.roles.get(worker)?;
        let both = Roles {
            attention: wish.attention && can.attention,
            experts: wish.experts && can.experts,
        };
        (both != Roles::default()).then_some(both)
    }

    /// Whether new placements may name a worker.
    #[must_use]
    pub fn may_hold(&self, worker: &WorkerRecord) -> bool {
        let wish = self.roles_of(&worker.id, worker.possible_roles());
        !self.cordoned.contains(&worker.id) && wish.is_none_or(|roles| roles.experts)
    }

    /// Whether new sequences may go to a worker.
    #[must_use]
    pub fn may_attend(&self, worker: &WorkerRecord) -> bool {
        let wish = self.roles_of(&worker.id, worker.possible_roles());
        !self.cordoned.contains(&worker.id) && wish.is_none_or(|roles| roles.attention)
    }
}

/// Reads the intent; none means the default.
pub(crate) fn read_intent(entry: Option<Entry>) -> Result<Intent, Error> {
    let Some(entry) = entry else {
        return Ok(Intent::default());
    };
    let size = entry.value.len();
    if size > INTENT_BYTES_MAX {
        return Err(Error::TooLarge {
            what: keys::INTENT.to_owned(),
            size,
            max: INTENT_BYTES_MAX,
        });
    }
    let intent: Intent = serde_json::from_slice(&entry.value)
        .map_err(|e| Error::invalid(keys::INTENT, e.to_string()))?;
    intent.validate()?;
    Ok(intent)
}

/// The operator's wish and where to swap it from.
///
/// # Errors
/// The store's, or [`Error::Invalid`] for a value that is none.
pub async fn intent(store: &dyn Store) -> Result<(Intent, Option<Revision>), Error> {
    let entry = store.get(keys::INTENT).await?;
    let revision = entry.as_ref().map(|entry| entry.revision);
    Ok((read_intent(entry)?, revision))
}

/// Writes the operator's wish in place of what was read at `replaces`.
///
/// # Errors
/// [`Error::Invalid`] for a wish outside its limits; [`Error::Conflict`] when somebody else wrote since.
pub async fn set_intent(
    store: &dyn Store,
    intent: &Intent,
    replaces: Option<Revision>,
) -> Result<Revision, Error> {
    intent.validate()?;
    let text = serde_json::to_vec(intent);
    let text = text.map_err(|e| Error::invalid(keys::INTENT, e.to_string()))?;
    let outcome = store
        .compare_and_swap(keys::INTENT, replaces, text.into(), None)
        .await?;
    match outcome {
        CasOutcome::Swapped(revision) => Ok(revision),
        CasOutcome::Conflict(_) => Err(Error::Conflict {
            key: keys::INTENT.to_owned(),
            expected: replaces,
        }),
    }
}
