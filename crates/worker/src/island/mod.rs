//! An island: processes with a GPU each that are one worker together. Never changes what is computed, only by whom.
//!
//! Rank 0 leads ([`Hub`]): it is the worker that the cluster sees, with engine, sampler and placement. The others follow
//! ([`rank`]) on one gRPC stream each: they load their segments of every expert, compute every step that the leader begins,
//! and exchange partial sums with it by NCCL. Steps that the placement does not give to this worker alone are computed layer by
//! layer by rank 0, whose experts ([`IslandExperts`]) ask the others for their part.
//!
//! A rank that is lost ends the step that runs; its sequences are handed back as those of a lost worker are. The ranks that
//! are left come together at the next epoch, and load what is missing as the placement asks for it.

mod experts;
mod form;
pub(crate) mod fuzzing;
mod hub;
pub(crate) mod rank;
mod service;
mod wire;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use tramontane_compute::RowFormat;
use tramontane_compute_cuda::collective::Collective;
use tramontane_compute_cuda::device::Device;
use tramontane_types::{ExpertId, LayerId, ModelGeometry, SegmentRange};

pub(crate) use experts::IslandExperts;
pub(crate) use hub::{Formation, Hub, HubConfig};
pub(crate) use service::IslandService;

/// How often both sides of a stream say that they are there.
const BEAT_EVERY: Duration = Duration::from_millis(200);
/// A side that says nothing for so long is lost: as long as a router is given, whose cores may be throttled as well.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// How often the leader looks after its ranks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long ranks may take to come together: weights are loaded before, this is connecting.
const FORM_MAX: Duration = Duration::from_secs(60);
/// Threads that may be in a meeting at once: those that wait inside a library for a rank that died end only with it.
const MEETINGS_MAX: usize = 16;
/// Threads that are.
static MEETINGS: AtomicUsize = AtomicUsize::new(0);
/// How long a rank may take to load a slice: the largest from a slow disk.
const LOAD_MAX: Duration = Duration::from_secs(120);
/// How long a rank may take for its part of a call.
const CALL_MAX: Duration = Duration::from_secs(10);
/// Messages that may wait for a rank; one that takes no more is lost.
const QUEUE_MAX: usize = 1024;
/// Loads and calls that a rank has under way at once.
const CALLS_MAX: usize = 512;
/// (row, expert) pairs of one call to a rank.
const PAIRS_MAX: usize = 512;
/// Most nodes of a range of segments.
const NODES_MAX: usize = 4;
/// Everything else in a message, the rows of the longest step and their tables included.
const MESSAGE_OVERHEAD_BYTES: usize = 64 << 20;

/// Most bytes of a message between ranks.
fn message_bytes_max(geometry: &ModelGeometry) -> usize {
    let row_bytes = RowFormat::F32.row_bytes(geometry.hidden);
    PAIRS_MAX * (NODES_MAX + 1) * row_bytes + MESSAGE_OVERHEAD_BYTES
}

/// A thread that connects to the other ranks.
struct Meeting;

impl Meeting {
    fn begin() -> Result<Self, String> {
        let more = |num: usize| (num < MEETINGS_MAX).then_some(num + 1);
        let begun = MEETINGS.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        begun.map(|_| Self).map_err(|num| {
            format!("{num} earlier meetings still wait for ranks that did not come: start this process again")
        })
    }
}

impl Drop for Meeting {
    fn drop(&mut self) {
        MEETINGS.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects to the other ranks on a thread of its own: one that waits inside a library for a rank that died keeps nobody.
fn meet(
    device: &Arc<dyn Device>,
    meeting: Vec<u8>,
    (rank, num_ranks): (u32, u32),
) -> Result<Arc<dyn Collective>, String> {
    let (met, answer) = sync_channel(1);
    let device = Arc::clone(device);
    let counted = Meeting::begin()?;
    let started = std::thread::Builder::new()
        .name("meet".to_owned())
        .spawn(move || {
            let _counted = counted;
            // One that comes too late is dropped, and so ended.
            let _late = met.try_send(device.meet(&meeting, rank, num_ranks));
        });
    started.map_err(|error| error.to_string())?;
    let met = answer.recv_timeout(FORM_MAX);
    let met = met.map_err(|_late| format!("not connected within {FORM_MAX:?}"))?;
    met.map_err(|error| error.to_string())
}

/// What two ranges have in common.
fn overlap(a: SegmentRange, b: SegmentRange) -> Option<SegmentRange> {
    SegmentRange::new(a.begin().max(b.begin()), a.end().min(b.end())).ok()
}

/// Place of an expert in a table of all.
fn index_of(geometry: &ModelGeometry, layer: LayerId, expert: ExpertId) -> usize {
    usize::from(layer.0) * geometry.num_experts + usize::from(expert.0)
}

/// Every expert of the model.
fn all_experts(geometry: &ModelGeometry) -> impl Iterator<Item = (LayerId, ExpertId)> + use<> {
    let (layers, experts) = (geometry.num_layers as u16, geometry.num_experts as u16);
    (0..layers).flat_map(move |layer| (0..experts).map(move |e| (LayerId(layer), ExpertId(e))))
}

/// Bits of the segments that have columns.
fn real_segments(geometry: &ModelGeometry) -> u8 {
    SegmentRange::new(0, geometry.num_segments()).map_or(0, SegmentRange::mask)
}

/// Drops whatever is not in these segments.
fn keep_only(
    experts: &dyn tramontane_compute::Experts,
    geometry: &ModelGeometry,
    own: SegmentRange,
) {
    let outside = [(0, own.begin()), (own.end(), 8)];
    let outside = outside.map(|(begin, end)| SegmentRange::new(begin, end).ok());
    for (layer, expert) in all_experts(geometry) {
        for range in outside.into_iter().flatten() {
            if experts.held(layer, expert) & range.mask() & real_segments(geometry) != 0 {
                experts.unload(tramontane_types::ExpertSlice {
                    layer,
                    expert,
                    range,
                });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meetings_that_wait_are_limited() {
        let mut waiting: Vec<Meeting> = (0..MEETINGS_MAX)
            .map(|_| Meeting::begin().unwrap())
            .collect();
        let refused = Meeting::begin().err().unwrap();
        assert!(refused.starts_with("16 earlier meetings"), "{refused}");
        waiting.pop();
        Meeting::begin().unwrap();
    }
}
