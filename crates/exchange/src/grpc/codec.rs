//! Between wire frames and our own types. What comes in is checked for form here, for sense by the server.

use tramontane_proto::v1::{self, expert_frame::Kind, expert_refusal::Reason};
use tramontane_types::{Epoch, ExpertId, LayerId, SegmentRange};

use crate::limits::REFUSAL_TEXT_MAX;
use crate::{ExpertCall, Job, Refusal, Reply};

pub(crate) const fn frame(kind: Kind) -> v1::ExpertFrame {
    v1::ExpertFrame { kind: Some(kind) }
}

pub(crate) fn call_to_wire(call_id: u64, call: ExpertCall) -> v1::ExpertFrame {
    let job_to_wire = |job: Job| v1::ExpertJob {
        expert: job.expert.0.into(),
        segment_begin: job.range.begin().into(),
        segment_end: job.range.end().into(),
        row_ids: job.row_ids,
    };
    frame(Kind::Call(v1::ExpertCall {
        call_id,
        epoch: call.epoch.0,
        layer: call.layer.0.into(),
        num_rows: call.num_rows as u32,
        rows: call.rows,
        jobs: call.jobs.into_iter().map(job_to_wire).collect(),
    }))
}

/// The call, or what about its form is wrong.
pub(crate) fn call_from_wire(wire: v1::ExpertCall) -> Result<ExpertCall, String> {
    let layer = u16::try_from(wire.layer).map_err(|_big| format!("layer {}", wire.layer))?;
    let mut jobs = Vec::with_capacity(wire.jobs.len());
    for job in wire.jobs {
        jobs.push(job_from_wire(job)?);
    }
    Ok(ExpertCall {
        epoch: Epoch(wire.epoch),
        layer: LayerId(layer),
        num_rows: wire.num_rows as usize,
        rows: wire.rows,
        jobs,
    })
}

fn job_from_wire(wire: v1::ExpertJob) -> Result<Job, String> {
    let expert = u16::try_from(wire.expert).map_err(|_big| format!("expert {}", wire.expert))?;
    let (begin, end) = (wire.segment_begin, wire.segment_end);
    let range = u8::try_from(begin)
        .ok()
        .zip(u8::try_from(end).ok())
        .and_then(|(begin, end)| SegmentRange::new(begin, end).ok())
        .ok_or_else(|| format!("segments {begin}..{end} of expert {expert}"))?;
    Ok(Job {
        expert: ExpertId(expert),
        range,
        row_ids: wire.row_ids,
    })
}

pub(crate) fn answer_to_wire(
    call_id: u64,
    answer: Result<Reply, Refusal>,
    epoch: Epoch,
) -> v1::ExpertFrame {
    let refusal = match answer {
        Ok(Reply {
            outputs,
            service_us,
        }) => {
            return frame(Kind::Reply(v1::ExpertReply {
                call_id,
                outputs,
                service_us,
            }));
        }
        Err(refusal) => refusal,
    };
    let reason = match &refusal {
        Refusal::Stale { .. } => Reason::Stale,
        Refusal::Busy => Reason::Busy,
        Refusal::Invalid(_) | Refusal::Mismatch(_) => Reason::Invalid,
        Refusal::Stopping | Refusal::Lost(_) => Reason::Stopping,
    };
    let (epoch, message) = match refusal {
        Refusal::Stale { epoch } => (epoch, String::new()),
        Refusal::Invalid(message) => (epoch, clip(message)),
        other => (epoch, other.to_string()),
    };
    let (reason, epoch) = (reason.into(), epoch.0);
    frame(Kind::Refusal(v1::ExpertRefusal {
        call_id,
        reason,
        epoch,
        message,
    }))
}

pub(crate) fn refusal_from_wire(wire: v1::ExpertRefusal) -> Refusal {
    match Reason::try_from(wire.reason) {
        Ok(Reason::Stale) => Refusal::Stale {
            epoch: Epoch(wire.epoch),
        },
        Ok(Reason::Busy) => Refusal::Busy,
        Ok(Reason::Invalid) => Refusal::Invalid(clip(wire.message)),
        Ok(Reason::Stopping) => Refusal::Stopping,
        Ok(Reason::Unspecified) | Err(_) => {
            Refusal::Lost(format!("refused for the unknown reason {}", wire.reason))
        }
    }
}

/// Cuts a text that came from somebody else to what we keep.
pub(crate) fn clip(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(REFUSAL_TEXT_MAX));
    text
}
