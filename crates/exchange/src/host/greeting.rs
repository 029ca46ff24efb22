//! The first frame in each direction, before a socket goes to the desk.

use std::io::{self, Read};

use tokio::net::UnixStream;
use tramontane_proto::v1::{self, expert_frame::Kind};

use super::frame::{Frame, Reader};
use crate::grpc::codec;

/// Most bytes of a hello: five short texts and numbers.
pub(super) const HELLO_BYTES_MAX: usize = 16 * 1024;

/// Sends a hello.
pub(super) async fn say_hello(socket: &UnixStream, hello: v1::Hello) -> io::Result<()> {
    let mut frame = Frame::new(codec::frame(Kind::Hello(hello)));
    loop {
        socket.writable().await?;
        match socket.try_write_vectored(&frame.slices()) {
            Ok(written) if frame.advance(written) => return Ok(()),
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => return Err(error),
            _ => {}
        }
    }
}

/// Reads a hello; takes nothing behind it.
pub(super) async fn hear_hello(socket: &UnixStream) -> io::Result<v1::Hello> {
    struct Ready<'a>(&'a UnixStream);
    impl Read for Ready<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.try_read(buffer)
        }
    }
    let mut reader = Reader::new(HELLO_BYTES_MAX);
    loop {
        socket.readable().await?;
        match reader.read(&mut Ready(socket)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
            Ok(frame) => return hello_of(frame),
        }
    }
}

/// The hello that a first frame must be.
pub(super) fn hello_of(frame: v1::ExpertFrame) -> io::Result<v1::Hello> {
    let Some(Kind::Hello(hello)) = frame.kind else {
        let what = "the first frame is not a hello";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    };
    Ok(hello)
}
