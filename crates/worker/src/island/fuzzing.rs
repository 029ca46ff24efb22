//! What reads messages between the ranks of an island, for fuzzing: up to what a device would be asked.

use prost::Message as _;
use tramontane_compute::{AttentionConfig, KvFormat};
use tramontane_compute_cuda::rank_segments;
use tramontane_proto::v1::{self, lead_message::Kind, rank_message::Kind as Said};
use tramontane_types::ModelGeometry;

use super::wire;

/// What a leader says behind the byte `l`, otherwise what a rank says.
pub(crate) fn message(bytes: &[u8], geometry: &ModelGeometry) {
    match bytes.split_first() {
        Some((b'l', bytes)) => lead(bytes, geometry),
        Some((_, bytes)) => rank(bytes, geometry),
        None => {}
    }
}

fn lead(bytes: &[u8], geometry: &ModelGeometry) {
    let Ok(v1::LeadMessage { kind: Some(kind) }) = v1::LeadMessage::decode(bytes) else {
        return;
    };
    match kind {
        Kind::Form(form) => {
            let segments = rank_segments(form.rank, form.num_ranks);
            assert!(segments.is_none() || form.rank < form.num_ranks);
        }
        Kind::Step(step) => check_step(step, geometry),
        Kind::Load(load) => {
            let segments = (load.segment_begin, load.segment_end);
            let _ = wire::slice(load.layer, load.expert, segments);
        }
        Kind::Unload(unload) => {
            let segments = (unload.segment_begin, unload.segment_end);
            let _ = wire::slice(unload.layer, unload.expert, segments);
        }
        Kind::Call(call) => {
            if let Ok((_, slices)) = wire::slices(&call) {
                assert_eq!(slices.len(), call.jobs.len());
            }
        }
        Kind::Part(_) | Kind::Beat(_) => {}
    }
}

/// As a device does before it computes one.
fn check_step(step: v1::IslandStep, geometry: &ModelGeometry) {
    let config = AttentionConfig {
        num_pages: 8,
        max_rows: 16,
        kv_format: KvFormat::F16,
    };
    let (batch, _runs) = wire::step_from_wire(step);
    let mut written = Vec::new();
    if batch.check(geometry, config, &mut written).is_ok() {
        assert!(batch.num_rows() <= config.max_rows);
        assert!(written.len() <= batch.num_rows());
        assert!(
            written
                .iter()
                .all(|page| (page.0 as usize) < config.num_pages)
        );
    }
}

fn rank(bytes: &[u8], geometry: &ModelGeometry) {
    let num_experts = geometry.num_layers * geometry.num_experts;
    if let Ok(v1::RankMessage {
        kind: Some(Said::Formed(formed)),
    }) = v1::RankMessage::decode(bytes)
        && let Ok(held) = wire::held(formed, num_experts)
    {
        assert_eq!(held.len(), num_experts);
    }
}
