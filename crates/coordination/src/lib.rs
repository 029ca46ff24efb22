//! Registry, leases, watch, election, placement and balance over etcd or memory.
//!
//! Losing the store freezes membership and never ends a process: every loop here keeps what it last
//! knew, says that it is stale, and goes on trying.

mod backoff;
pub mod balance;
pub mod election;
mod error;
pub mod etcd;
pub mod fault;
#[doc(hidden)]
pub mod fuzzing;
mod intent_watch;
pub mod loss;
pub mod memory;
mod mirror;
#[doc(hidden)]
pub mod mutation;
pub mod placement_store;
pub mod placements;
pub mod planner;
pub mod registry;
pub mod remember;
mod skipped;
pub mod slices;
pub mod store;
pub mod version;

#[doc(hidden)]
pub use backoff::seed_this_thread;
pub use balance::{BalanceError, BalanceInput, PlacementPolicy, WorkerShare, balance};
pub use election::run_elected;
pub use error::Error;
pub use etcd::{EtcdConfig, EtcdStore};
pub use fault::FaultStore;
pub use intent_watch::{SeenIntent, watch_intent};
pub use loss::{essential_workers, is_complete, survives_one_loss};
pub use memory::MemoryStore;
pub use placement_store::PlacementStore;
pub use placements::{GroupPlacements, Placements, Scope, watch_placements};
pub use planner::{Intent, Planner, PlannerConfig, PlannerStatus, PlannerStatuses};
pub use registry::{
    ExpertLoad, Measured, Members, ModelFacts, Part, Registration, Roles, WorkerLoad, WorkerRecord,
    WorkerState, remove_worker, watch_members,
};
pub use remember::RememberingStore;
pub use slices::{slices_to_drop, slices_to_load};
pub use store::{CasOutcome, Entry, LeaseId, Listing, Revision, Store, Watch, WatchEvent};
pub use version::{GroupKey, Version};
