//! Weights between workers: one that lacks files asks those that have them. Never packs or keeps a weight.
//!
//! The client is a [`Source`](tramontane_model::Source) of the checkpoint, so whoever packs does not know where
//! bytes come from. The service gives only what its own files have: nobody asks on behalf of somebody else.

mod client;
pub(crate) mod fuzzing;
mod open;
mod pace;
mod service;

use std::sync::atomic::AtomicU64;

use tramontane_model::{Description, FileDescription, Form};
use tramontane_proto::v1;

pub(crate) use client::PeerWeights;
pub use open::{PeerModel, PeerOpened, open_from_peers};
pub(crate) use service::{WeightsService, WeightsServing};

/// Bytes of one request, with a digest of their own: what is asked again when a peer dies meanwhile.
pub(crate) const RANGE_BYTES_MAX: usize = 16 << 20;
/// Pieces of one request: each is a read of its own.
pub(crate) const RANGE_PIECES_MAX: usize = 16 << 10;
/// Bytes of one message.
pub(crate) const CHUNK_BYTES_MAX: usize = 256 << 10;
/// Requests that one worker answers at once.
pub(crate) const TRANSFERS_MAX: usize = 4;
/// Further requests that wait for a place; one more is refused as busy.
pub(crate) const TRANSFERS_WAITING_MAX: usize = 64;
/// Requests that one worker has under way.
pub(crate) const FETCHES_MAX: usize = 4;

/// What was given and taken. Counters only grow.
#[derive(Debug, Default)]
pub(crate) struct WeightStats {
    /// Bytes given to others.
    pub(crate) sent: AtomicU64,
    /// Bytes taken from others, checked.
    pub(crate) received: AtomicU64,
    /// Requests that came to nothing, busy peers not counted.
    pub(crate) failed: AtomicU64,
    /// Reads of files of this worker that failed and were made up for by others.
    pub(crate) unreadable: AtomicU64,
}

fn to_wire(description: Description) -> v1::CheckpointDescription {
    let form = match description.form {
        Form::Safetensors => v1::CheckpointForm::Safetensors,
        Form::Gguf => v1::CheckpointForm::Gguf,
    };
    let files = description.files.into_iter().map(|file| v1::WeightFile {
        name: file.name,
        bytes: file.bytes,
        header_bytes: file.header_bytes,
        here: file.is_here,
    });
    v1::CheckpointDescription {
        fingerprint: description.fingerprint,
        form: form.into(),
        config: description.config,
        sliding_window: description.sliding_window.map(|keys| keys as u64),
        files: files.collect(),
        vocabulary: None,
    }
}

/// `None` when it is of a form that is not known here. Its numbers are checked when it is opened.
fn from_wire(description: v1::CheckpointDescription) -> Option<Description> {
    let form = match description.form() {
        v1::CheckpointForm::Safetensors => Form::Safetensors,
        v1::CheckpointForm::Gguf => Form::Gguf,
        v1::CheckpointForm::Unspecified => return None,
    };
    let window = description.sliding_window;
    let files = description.files.into_iter().map(|file| FileDescription {
        name: file.name,
        bytes: file.bytes,
        header_bytes: file.header_bytes,
        is_here: file.here,
    });
    Some(Description {
        fingerprint: description.fingerprint,
        form,
        config: description.config,
        sliding_window: window.map(|keys| usize::try_from(keys).unwrap_or(usize::MAX)),
        files: files.collect(),
    })
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod wire_tests {
    use super::*;

    #[test]
    fn a_description_survives_the_wire() {
        for (form, sliding_window) in [(Form::Safetensors, None), (Form::Gguf, Some(7))] {
            let description = Description {
                fingerprint: "f1".to_owned(),
                form,
                config: "{}".to_owned(),
                sliding_window,
                files: vec![FileDescription {
                    name: "a".to_owned(),
                    bytes: 9,
                    header_bytes: 4,
                    is_here: true,
                }],
            };
            assert_eq!(from_wire(to_wire(description.clone())), Some(description));
        }
        assert_eq!(from_wire(v1::CheckpointDescription::default()), None);
    }
}
