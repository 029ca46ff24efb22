//! What this worker says about itself in the store, and how its gauges get there. Never more often than
//! once a second, except for a change of state.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tramontane_coordination::{
    Measured, ModelFacts, Registration, Roles, WorkerLoad, WorkerRecord, WorkerState,
};
use tramontane_model::Checkpoint;
use tramontane_types::{Epoch, WorkerId};

use crate::WorkerConfig;
use crate::backend::Computing;
use crate::measure::Meter;
use crate::state::Node;

/// How often the gauges of a record are refreshed.
pub(crate) const LOAD_EVERY: Duration = Duration::from_secs(1);

/// The record of a worker that has just come up.
pub(crate) fn record(
    config: &WorkerConfig,
    roles: Roles,
    computing: &Computing,
    checkpoint: &Checkpoint,
    (model_name, address): (&str, String),
) -> WorkerRecord {
    let geometry = checkpoint.geometry();
    let since_1970 = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    WorkerRecord {
        schema: WorkerRecord::schema_of(computing.place.part),
        id: WorkerId::new(&config.id),
        address,
        socket: None,
        roles,
        capacity_bytes: config.capacity(roles, geometry),
        segment_bytes: computing.backend.segment_bytes(),
        numeric_class: computing.place.class.clone(),
        model: ModelFacts {
            fingerprint: checkpoint.fingerprint().to_owned(),
            name: model_name.to_owned(),
            num_layers: geometry.num_layers,
            num_experts: geometry.num_experts,
            num_segments: geometry.num_segments(),
        },
        state: WorkerState::Joining,
        loaded: Epoch(0),
        incarnation: WorkerRecord::new_incarnation(),
        started_ms: u64::try_from(since_1970.as_millis()).unwrap_or_default(),
        version: tramontane_runtime::build_info::VERSION.to_owned(),
        load: WorkerLoad::default(),
        measured: Measured::default(),
        sequences_max: u32::try_from(config.max_running).unwrap_or(u32::MAX),
        part: computing.place.part,
    }
}

/// Keeps state and gauges of the record in step with the worker until `stop`.
pub(crate) async fn refresh(node: Arc<Node>, registration: Registration, stop: CancellationToken) {
    let mut state = node.state.subscribe();
    let mut meter = Meter::default();
    let mut ticks = interval(LOAD_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _at = ticks.tick() => {}
            changed = state.changed() => if changed.is_err() {
                return;
            },
            () = stop.cancelled() => return,
        }
        let state = *state.borrow_and_update();
        let measured = meter.look(&node, Instant::now());
        // Together: a record that says "draining" has gauges that were read after the last new sequence.
        registration.update(|record| {
            record.state = state;
            record.load = node.load();
            if let Some(measured) = measured {
                record.measured = record.measured.settle(measured);
            }
        });
    }
}
