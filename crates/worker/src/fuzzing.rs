//! What reads a router's request, for fuzzing. Nothing here may panic, whatever comes.

use prost::Message as _;
use tramontane_proto::v1;

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
