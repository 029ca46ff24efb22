//! What reads a router's request and messages of other workers, for fuzzing. Nothing here may panic, whatever comes.

use prost::Message as _;
use tramontane_proto::v1;
use tramontane_types::ModelGeometry;

use crate::generate_service::check;

/// Tokens of the vocabulary.
const VOCAB: usize = 64;

/// `tramontane.v1.GenerateSequenceRequest`.
pub fn sequence(bytes: &[u8]) {
    if let Ok(message) = v1::GenerateSequenceRequest::decode(bytes)
        && let Ok(new) = check(message, VOCAB)
    {
        assert!(new.params.validate(VOCAB).is_ok());
    }
}

/// `tramontane.v1.LeadMessage` behind the byte `l`, otherwise `RankMessage`.
pub fn island(bytes: &[u8], geometry: &ModelGeometry) {
    crate::island::fuzzing::message(bytes, geometry);
}

/// `tramontane.v1.ReadWeightsRequest` behind the byte `r`, `CheckpointDescription` behind `d`, otherwise `WeightsChunk`s.
pub fn weights(bytes: &[u8]) {
    crate::weights::fuzzing::message(bytes);
}
