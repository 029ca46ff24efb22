//! What reads expert frames of another worker, for fuzzing. Nothing here may panic, whatever comes.

use prost::Message as _;
use tramontane_proto::v1::{ExpertFrame, expert_frame::Kind};
use tramontane_types::ModelGeometry;

use crate::CallLimits;
use crate::grpc::{Group, codec};
use crate::host::fuzzing::frames;
use crate::validate::check_call;

/// One frame, up to the queue of the server or to whoever waits for the reply.
pub fn frame(bytes: &[u8], geometry: &ModelGeometry, limits: &CallLimits) {
    if let Ok(frame) = ExpertFrame::decode(bytes) {
        take(frame, geometry, limits);
    }
}

/// What comes on a Unix socket of the host: a greeting, and frames behind it.
pub fn socket(bytes: &[u8], geometry: &ModelGeometry, limits: &CallLimits) {
    let group = Group {
        cluster: "c",
        numeric_class: "n",
        model: "m",
    };
    frames(bytes, &group, limits, |frame| take(frame, geometry, limits));
}

fn take(frame: ExpertFrame, geometry: &ModelGeometry, limits: &CallLimits) {
    match frame.kind {
        Some(Kind::Call(call)) => {
            if let Ok(call) = codec::call_from_wire(call) {
                let checked = check_call(&call, geometry, limits);
                assert!(checked.is_err() || call.rows.len() == call.num_rows * limits.row_bytes);
            }
        }
        Some(Kind::Refusal(refusal)) => drop(codec::refusal_from_wire(refusal)),
        _ => {}
    }
}
