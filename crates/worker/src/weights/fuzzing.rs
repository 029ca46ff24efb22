//! What reads messages about weights, for fuzzing: requests of others, and what they say and send of a checkpoint.

use std::sync::Arc;

use prost::Message as _;
use tramontane_grammar::Vocabulary;
use tramontane_model::{Checkpoint, Error, Part, Source};
use tramontane_proto::v1;

use super::client::Filling;
use super::service::Range;
use super::{CHUNK_BYTES_MAX, RANGE_BYTES_MAX, RANGE_PIECES_MAX, from_wire};

/// Bytes of the range that chunks fill.
const RANGE_BYTES: usize = 64;

/// A request behind the byte `r`, a description and the bytes of its files behind `d`, otherwise the chunks of a range. All but
/// the request have their lengths before them.
pub(crate) fn message(bytes: &[u8]) {
    match bytes.split_first() {
        Some((b'r', bytes)) => request(bytes),
        Some((b'd', bytes)) => description(bytes),
        Some((_, bytes)) => chunks(bytes),
        None => {}
    }
}

fn request(bytes: &[u8]) {
    let Ok(request) = v1::ReadWeightsRequest::decode(bytes) else {
        return;
    };
    let Ok(range) = Range::new(request) else {
        return;
    };
    let whole = range.part();
    let (len, end) = (whole.len().unwrap_or(usize::MAX), whole.end());
    assert!((1..=RANGE_BYTES_MAX).contains(&len));
    let mut sum = 0;
    for part in whole.cut(CHUNK_BYTES_MAX, RANGE_PIECES_MAX) {
        assert!(part.end() <= end);
        let len = part.len().unwrap_or(usize::MAX);
        assert!((1..=CHUNK_BYTES_MAX).contains(&len));
        sum += len;
    }
    assert_eq!(sum, len);
}

fn description(mut bytes: &[u8]) {
    let Ok(mut message) = v1::CheckpointDescription::decode_length_delimited(&mut bytes) else {
        return;
    };
    if let Some(words) = message.vocabulary.take() {
        let _ = Vocabulary::from_words(words.words, &words.eos_ids);
    }
    if let Some(description) = from_wire(message) {
        let files = Arc::new(Bytes(bytes.to_vec()));
        let _ = Checkpoint::open_described(&description, None, files);
    }
}

fn chunks(mut bytes: &[u8]) {
    let mut out = [0; RANGE_BYTES];
    let mut filling = Filling::new(&mut out);
    loop {
        let chunk = v1::WeightsChunk::decode_length_delimited(&mut bytes).ok();
        let is_end = chunk.is_none();
        match filling.take(chunk) {
            Ok(false) => assert!(!is_end, "a range that ended goes on"),
            Ok(true) | Err(_) => return,
        }
    }
}

/// Files of any name, with these bytes from where one is asked for on.
#[derive(Debug)]
struct Bytes(Vec<u8>);

impl Source for Bytes {
    fn read(&self, part: &Part<'_>, out: &mut [u8]) -> Result<(), Error> {
        let pieces = out.chunks_mut(part.piece.max(1));
        for (index, piece) in (0..).zip(pieces) {
            let begin = part.begin.saturating_add(part.stride.saturating_mul(index));
            let begin = usize::try_from(begin).unwrap_or(usize::MAX);
            let found = self.0.get(begin..begin.saturating_add(piece.len()));
            let Some(found) = found else {
                return Err(Error::NotHere {
                    file: part.file.to_owned(),
                    tensor: part.tensor.to_owned(),
                });
            };
            piece.copy_from_slice(found);
        }
        Ok(())
    }
}
