//! Who is in the cluster: worker records, kept by their workers and watched by everybody else.
//! Never evicts anybody because the store is away.

mod measured;
mod members;
mod record;
mod registration;
mod removal;

pub use measured::{
    ExpertLoad, LINK_US_MAX, LOAD_EXPERTS_MAX, Measured, NOTICEABLE, ROWS_MAX, SEGMENT_NS_MAX,
    noticeably_apart, settled,
};
pub use members::{Members, REJOIN_GRACE, watch_members};
pub use record::{
    HostSocket, MODEL_DIMENSION_MAX, MODEL_EXPERTS_MAX, ModelFacts, Part, RECORD_BYTES_MAX,
    RECORD_SCHEMA, RECORD_SCHEMA_OF_PARTS, RECORD_TEXT_BYTES_MAX, Roles, WorkerLoad, WorkerRecord,
    WorkerState,
};
pub use registration::{
    DEREGISTER_MAX, KEEP_ALIVES_PER_TTL, RECORD_WRITE_SPACING, REREGISTER_PAUSE_MAX,
    REREGISTER_PAUSE_MIN, Registration,
};
pub use removal::{REMOVE_ATTEMPTS_MAX, remove_worker};

#[cfg(test)]
pub(crate) use record::tests::record as record_for_tests;
