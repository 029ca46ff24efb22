//! What reads a Unix socket, for fuzzing: the greeting, then frames as long as there are whole ones.

use std::io::Read as _;

use tramontane_proto::v1;

use super::frame::{Frame, Reader, frame_bytes_max};
use super::greeting::{HELLO_BYTES_MAX, hello_of};
use crate::CallLimits;
use crate::grpc::Group;

/// Gives `on` every frame that comes behind a greeting of this group.
pub(crate) fn frames(
    mut bytes: &[u8],
    group: &Group<'_>,
    limits: &CallLimits,
    mut on: impl FnMut(v1::ExpertFrame),
) {
    let first = Reader::new(HELLO_BYTES_MAX).read(&mut bytes);
    let Ok(hello) = first.and_then(hello_of) else {
        return;
    };
    if group.check(&hello).is_err() {
        return;
    }
    let mut reader = Reader::new(frame_bytes_max(limits));
    while let Ok(frame) = reader.read(&mut bytes) {
        comes_back(&frame);
        on(frame);
    }
}

/// What was read is written as it came.
fn comes_back(frame: &v1::ExpertFrame) {
    let written = Frame::new(frame.clone());
    let [head, payload] = written.slices();
    let len = head.len() + payload.len();
    let mut stream = head.chain(&*payload);
    let read = Reader::new(len).read(&mut stream);
    assert!(read.is_ok_and(|read| read == *frame), "another frame");
}
