//! Between messages of ranks and our own types. What comes in is checked for form here, for sense by the backend.

use std::ops::Range;

use tramontane_compute::{SequenceSpan, StepBatch};
use tramontane_compute_cuda::RankStep;
use tramontane_proto::v1::{self, lead_message, rank_message};
use tramontane_types::{ExpertId, ExpertSlice, LayerId, PageId, SegmentRange};

pub(super) const fn lead(kind: lead_message::Kind) -> v1::LeadMessage {
    v1::LeadMessage { kind: Some(kind) }
}

pub(super) const fn rank(kind: rank_message::Kind) -> v1::RankMessage {
    v1::RankMessage { kind: Some(kind) }
}

pub(super) fn step_to_wire(epoch: u64, step: RankStep<'_>) -> v1::IslandStep {
    let RankStep { batch, pages } = step;
    let sequence = |span: &SequenceSpan| v1::StepSequence {
        row_begin: span.row_begin,
        num_rows: span.num_rows,
        block_table: span.block_table.iter().map(|page| page.0).collect(),
    };
    v1::IslandStep {
        epoch,
        tokens: batch.tokens.clone(),
        positions: batch.positions.clone(),
        sequences: batch.sequences.iter().map(sequence).collect(),
        logits_rows: batch.logits_rows.clone(),
        page_runs: pages.iter().flat_map(|run| [run.start, run.end]).collect(),
    }
}

/// The batch and the pages.
pub(super) fn step_from_wire(wire: v1::IslandStep) -> (StepBatch, Vec<Range<u32>>) {
    let sequence = |span: v1::StepSequence| SequenceSpan {
        row_begin: span.row_begin,
        num_rows: span.num_rows,
        block_table: span.block_table.into_iter().map(PageId).collect(),
    };
    let batch = StepBatch {
        tokens: wire.tokens,
        positions: wire.positions,
        sequences: wire.sequences.into_iter().map(sequence).collect(),
        logits_rows: wire.logits_rows,
    };
    let runs = wire.page_runs.as_chunks::<2>().0.iter();
    (batch, runs.map(|&[begin, end]| begin..end).collect())
}

/// A slice, or what about it is wrong.
pub(super) fn slice(
    layer: u32,
    expert: u32,
    (begin, end): (u32, u32),
) -> Result<ExpertSlice, String> {
    let small = |number: u32| u16::try_from(number).ok();
    let range = || SegmentRange::new(u8::try_from(begin).ok()?, u8::try_from(end).ok()?).ok();
    let parts = small(layer).zip(small(expert)).zip(range());
    let ((layer, expert), range) =
        parts.ok_or_else(|| format!("layer {layer}, expert {expert}, segments {begin}..{end}"))?;
    Ok(ExpertSlice {
        layer: LayerId(layer),
        expert: ExpertId(expert),
        range,
    })
}

/// The layer and slices of a call's jobs, or what about one of them is wrong.
pub(super) fn slices(call: &v1::ExpertCall) -> Result<(LayerId, Vec<ExpertSlice>), String> {
    let layer = slice(call.layer, 0, (0, 8))?.layer;
    let mut slices = Vec::with_capacity(call.jobs.len());
    for job in &call.jobs {
        let segments = (job.segment_begin, job.segment_end);
        slices.push(slice(call.layer, job.expert, segments)?);
    }
    Ok((layer, slices))
}

/// The segments of each expert that a rank has loaded, or why it has not come.
pub(super) fn held(formed: v1::RankFormed, num_experts: usize) -> Result<Vec<u8>, String> {
    if !formed.error.is_empty() {
        return Err(formed.error);
    }
    let got = formed.held.len();
    if got != num_experts {
        return Err(format!("{got} experts held, expected {num_experts}"));
    }
    Ok(formed.held)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_survives_the_wire() {
        let batch = StepBatch {
            tokens: vec![5, 6],
            positions: vec![63, 64],
            sequences: vec![SequenceSpan {
                row_begin: 0,
                num_rows: 2,
                block_table: vec![PageId(9), PageId::RELEASED],
            }],
            logits_rows: vec![1],
        };
        let pages = [1..3, 7..8];
        let step = RankStep {
            batch: &batch,
            pages: &pages,
        };
        let wire = step_to_wire(4, step);
        assert_eq!(wire.epoch, 4);
        assert_eq!(step_from_wire(wire), (batch, pages.to_vec()));
        assert!(slice(1, 2, (3, 3)).is_err() && slice(70_000, 0, (0, 8)).is_err());
        assert_eq!(slice(1, 2, (3, 5)).unwrap().range.len(), 2);
    }

    #[test]
    fn what_others_say_is_checked_for_form() {
        let job = |expert, segment_end| v1::ExpertJob {
            expert,
            segment_begin: 0,
            segment_end,
            row_ids: vec![u32::MAX],
        };
        let call = |layer, jobs| v1::ExpertCall {
            layer,
            jobs,
            ..v1::ExpertCall::default()
        };
        let (layer, found) = slices(&call(1, vec![job(2, 8), job(3, 1)])).unwrap();
        assert_eq!((layer, found.len()), (LayerId(1), 2));
        for wrong in [
            call(70_000, vec![]),
            call(1, vec![job(70_000, 8)]),
            call(1, vec![job(2, 9)]),
        ] {
            slices(&wrong).unwrap_err();
        }
        let formed = |held: Vec<u8>, error: &str| v1::RankFormed {
            epoch: 1,
            held,
            error: error.to_owned(),
        };
        assert_eq!(held(formed(vec![1, 2], ""), 2), Ok(vec![1, 2]));
        assert_eq!(held(formed(vec![], "no GPU"), 2), Err("no GPU".to_owned()));
        let short = held(formed(vec![1], ""), 2).unwrap_err();
        assert_eq!(short, "1 experts held, expected 2");
    }
}
