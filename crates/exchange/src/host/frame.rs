//! One frame on a Unix socket: two lengths, the message without its rows or outputs, and these as raw
//! bytes behind it. Trusts no length.

use std::io::{self, IoSlice, Read};

use bytes::Bytes;
use prost::Message;
use tramontane_proto::v1::{self, expert_frame::Kind};

use crate::CallLimits;

/// Two u32, little-endian: bytes of the message, bytes of the payload.
const LENGTHS: usize = 8;
/// The payload begins at a multiple of this, so that it can be read as f32 in place.
const ALIGN: usize = 16;

/// A frame that is to be written.
#[derive(Debug)]
pub(super) struct Frame {
    head: Bytes,
    payload: Bytes,
}

impl Frame {
    pub(super) fn new(mut frame: v1::ExpertFrame) -> Self {
        let payload = match &mut frame.kind {
            Some(Kind::Call(call)) => std::mem::take(&mut call.rows),
            Some(Kind::Reply(reply)) => std::mem::take(&mut reply.outputs),
            _ => Bytes::new(),
        };
        let message = frame.encoded_len();
        let mut head = Vec::with_capacity(LENGTHS + message.next_multiple_of(ALIGN));
        head.extend((message as u32).to_le_bytes());
        head.extend((payload.len() as u32).to_le_bytes());
        frame.encode_raw(&mut head);
        head.resize(LENGTHS + message.next_multiple_of(ALIGN), 0);
        Self {
            head: head.into(),
            payload,
        }
    }

    /// What is left to be written.
    pub(super) fn slices(&self) -> [IoSlice<'_>; 2] {
        [IoSlice::new(&self.head), IoSlice::new(&self.payload)]
    }

    /// Notes that `written` bytes of it were. Whether all is.
    pub(super) fn advance(&mut self, written: usize) -> bool {
        let of_head = written.min(self.head.len());
        self.head = self.head.split_off(of_head);
        self.payload = self
            .payload
            .split_off((written - of_head).min(self.payload.len()));
        self.head.is_empty() && self.payload.is_empty()
    }
}

/// Most bytes of one frame behind its lengths, by the same limits as over gRPC.
pub(super) fn frame_bytes_max(limits: &CallLimits) -> usize {
    limits.request_bytes_max().max(limits.reply_bytes_max())
}

/// Puts frames together out of what has come.
#[derive(Debug)]
pub(super) struct Reader {
    bytes_max: usize,
    lengths: [u8; LENGTHS],
    num_lengths: usize,
    /// Message and payload of the running frame; as long as they will be.
    body: Vec<u8>,
    filled: usize,
}

impl Reader {
    pub(super) const fn new(bytes_max: usize) -> Self {
        Self {
            bytes_max,
            lengths: [0; LENGTHS],
            num_lengths: 0,
            body: Vec::new(),
            filled: 0,
        }
    }

    /// The next whole frame; `WouldBlock` when it has not all come yet.
    ///
    /// # Errors
    /// What the socket says; the end of the stream; a frame that is too long or no frame.
    pub(super) fn read(&mut self, socket: &mut impl Read) -> io::Result<v1::ExpertFrame> {
        while self.num_lengths < LENGTHS {
            self.num_lengths += read_some(socket, &mut self.lengths[self.num_lengths..])?;
            if self.num_lengths == LENGTHS {
                self.begin_body()?;
            }
        }
        while self.filled < self.body.len() {
            self.filled += read_some(socket, &mut self.body[self.filled..])?;
        }
        self.finish()
    }

    fn begin_body(&mut self) -> io::Result<()> {
        let (message, payload) = self.lens();
        let len = message.next_multiple_of(ALIGN).saturating_add(payload);
        if len > self.bytes_max {
            let max = self.bytes_max;
            return Err(invalid(format!("frame of {len} bytes, at most {max}")));
        }
        self.body = vec![0; len];
        self.filled = 0;
        Ok(())
    }

    fn finish(&mut self) -> io::Result<v1::ExpertFrame> {
        let (message, _) = self.lens();
        self.num_lengths = 0;
        let body = Bytes::from(std::mem::take(&mut self.body));
        let payload = body.slice(message.next_multiple_of(ALIGN).min(body.len())..);
        let mut frame = v1::ExpertFrame::decode(&body[..message.min(body.len())])
            .map_err(|error| invalid(error.to_string()))?;
        match &mut frame.kind {
            Some(Kind::Call(call)) => call.rows = payload,
            Some(Kind::Reply(reply)) => reply.outputs = payload,
            _ => {}
        }
        Ok(frame)
    }

    fn lens(&self) -> (usize, usize) {
        let [a, b, c, d, e, f, g, h] = self.lengths;
        let len = |bytes| u32::from_le_bytes(bytes) as usize;
        (len([a, b, c, d]), len([e, f, g, h]))
    }
}

fn read_some(socket: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match socket.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(outputs: &'static [u8]) -> v1::ExpertFrame {
        v1::ExpertFrame {
            kind: Some(Kind::Reply(v1::ExpertReply {
                call_id: 9,
                outputs: Bytes::from_static(outputs),
                service_us: 3,
            })),
        }
    }

    fn bytes(mut frame: Frame) -> Vec<u8> {
        let bytes = frame
            .slices()
            .iter()
            .flat_map(|s| s.to_vec())
            .collect::<Vec<u8>>();
        assert!(!frame.advance(3) && frame.advance(bytes.len() - 3));
        bytes
    }

    /// Gives one byte at a time and would block after each.
    struct Drip<'a>(&'a [u8], bool);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            (&mut self.0).take(1).read(buffer)
        }
    }

    #[test]
    fn frames_come_back_however_they_are_cut() {
        let frames = [reply(b"outputs of some rows"), reply(b""), reply(b"x")];
        let stream: Vec<u8> = frames
            .iter()
            .flat_map(|f| bytes(Frame::new(f.clone())))
            .collect();
        let mut reader = Reader::new(1000);
        let mut socket = Drip(&stream, false);
        for expected in frames {
            let got = loop {
                match reader.read(&mut socket) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    got => break got.unwrap(),
                }
            };
            assert_eq!(got, expected);
            if let Some(Kind::Reply(reply)) = got.kind {
                assert!(reply.outputs.is_empty() || reply.outputs.as_ptr().align_offset(4) == 0);
            }
        }
        let end = reader.read(&mut &b""[..]).unwrap_err();
        assert_eq!(end.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn hostile_lengths_and_messages_are_refused() {
        let stream = |message: u32, payload: u32, rest: &[u8]| {
            let lengths = [message.to_le_bytes(), payload.to_le_bytes()].concat();
            [&lengths, rest].concat()
        };
        for bytes in [
            stream(u32::MAX, u32::MAX, b""),
            stream(0, 1000, b""),
            stream(5, 0, &[0xff; 16]),
        ] {
            let error = Reader::new(999).read(&mut &bytes[..]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
        }
    }
}
