//! A connection that somebody has opened to us. One that never says what it wants is given up: HTTP/2 pings only
//! peers that have said hello, so without this a peer that vanishes before, or never means to, keeps its place. So is
//! one that never takes what it is sent.

use std::io::{self, Error, ErrorKind, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;
use tonic::transport::server::Connected;

/// Bytes of the hello of HTTP/2; the shortest request of HTTP/1.1 is longer.
const HELLO_BYTES: usize = 24;
/// How long they may take to come.
pub const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// A peer that takes nothing of what waits for it for this long is given up. A reader that is merely slow takes
/// something far more often; streams of answers have a shorter limit of their own.
pub const WRITE_STALL_MAX: Duration = Duration::from_secs(120);

/// An accepted connection.
#[derive(Debug)]
pub struct Accepted<S> {
    socket: S,
    /// While the hello is not complete.
    hello: Option<Hello>,
    /// While a write waits for the peer.
    stalled: Option<Pin<Box<Sleep>>>,
}

#[derive(Debug)]
struct Hello {
    missing: usize,
    until: Pin<Box<Sleep>>,
}

impl<S> Accepted<S> {
    /// A connection that was accepted just now.
    #[must_use]
    pub fn new(socket: S) -> Self {
        let until = Box::pin(tokio::time::sleep(HELLO_TIMEOUT));
        let missing = HELLO_BYTES;
        Self {
            socket,
            hello: Some(Hello { missing, until }),
            stalled: None,
        }
    }

    /// What a write says, unless it has waited for too long.
    fn moving<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_STALL_MAX)));
        let timed_out = stalled.as_mut().poll(cx);
        timed_out.map(|()| Err(Error::from(ErrorKind::TimedOut)))
    }
}

impl<S: Connected> Connected for Accepted<S> {
    type ConnectInfo = S::ConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.socket.connect_info()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Accepted<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let polled = Pin::new(&mut self.socket).poll_read(cx, buf);
        let Some(hello) = &mut self.hello else {
            return polled;
        };
        if polled.is_pending() {
            let timed_out = hello.until.as_mut().poll(cx);
            return timed_out.map(|()| Err(Error::from(ErrorKind::TimedOut)));
        }
        hello.missing = hello.missing.saturating_sub(buf.filled().len() - before);
        if hello.missing == 0 {
            self.hello = None;
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Accepted<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write(cx, buf);
        self.moving(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.socket).poll_write_vectored(cx, bufs);
        self.moving(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = Pin::new(&mut self.socket).poll_flush(cx);
        self.moving(cx, written)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = Pin::new(&mut self.socket).poll_shutdown(cx);
        self.moving(cx, written)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::{Instant, sleep};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_too_little_is_given_up_however_slowly_it_says_it() {
        let (mut peer, ours) = duplex(64);
        let mut accepted = Accepted::new(ours);
        let begin = Instant::now();
        let trickle = async {
            loop {
                peer.write_all(b"P").await.unwrap();
                sleep(Duration::from_secs(1)).await;
            }
        };
        let mut got = Vec::new();
        let error = tokio::select! {
            read = accepted.read_to_end(&mut got) => read.unwrap_err(),
            () = trickle => unreachable!(),
        };
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(begin.elapsed(), HELLO_TIMEOUT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_nothing_is_given_up() {
        let (_peer, ours) = duplex(64);
        let mut accepted = Accepted::new(ours);
        let begin = Instant::now();
        let error = accepted.write_all(&[0; 65]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
        assert_eq!(begin.elapsed(), WRITE_STALL_MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_takes_little_gets_everything_however_long_it_takes() {
        let (mut peer, ours) = duplex(64);
        let mut accepted = Accepted::new(ours);
        let begin = Instant::now();
        let reading = async {
            for _ in 0..100 {
                sleep(WRITE_STALL_MAX - Duration::from_secs(1)).await;
                peer.read_u8().await.unwrap();
            }
        };
        let (written, ()) = tokio::join!(accepted.write_all(&[0; 164]), reading);
        written.unwrap();
        assert!(begin.elapsed() > WRITE_STALL_MAX * 90);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_has_said_hello_may_be_silent() {
        let (mut peer, ours) = duplex(64);
        let mut accepted = Accepted::new(ours);
        peer.write_all(b"GET / HTTP/1.1\r\nHost:\r\n\r\n")
            .await
            .unwrap();
        let mut got = [0; 25];
        accepted.read_exact(&mut got).await.unwrap();
        let later = async {
            sleep(HELLO_TIMEOUT * 10).await;
            peer.write_all(b"more").await.unwrap();
        };
        let mut more = [0; 4];
        let (read, ()) = tokio::join!(accepted.read_exact(&mut more), later);
        assert_eq!((read.unwrap(), &more), (4, b"more"));
    }
}
