//! A connection that breaks in the middle of whatever it carries, as when its process dies. Says nothing to
//! the other end.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;
use tramontane_runtime::Accepted;
use tramontane_runtime::tls::{PeerInfo, Socket};

/// A connection and what breaks it.
#[derive(Debug)]
pub(crate) struct Severable {
    socket: Accepted<Socket>,
    cut: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Severable {
    /// A connection that breaks with `cut`; never without one.
    pub(crate) fn new(socket: Accepted<Socket>, cut: Option<CancellationToken>) -> Self {
        let cut = cut.map(|cut| Box::pin(cut.cancelled_owned()));
        Self { socket, cut }
    }

    /// Ready with an error when the connection is broken; otherwise the task is woken when it breaks.
    fn poll_cut(&mut self, cx: &mut Context<'_>) -> Result<()> {
        let cut = self.cut.as_mut().map(|cut| cut.as_mut().poll(cx));
        match cut {
            Some(Poll::Ready(())) => Err(Error::from(ErrorKind::ConnectionReset)),
            Some(Poll::Pending) | None => Ok(()),
        }
    }
}

impl Connected for Severable {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.socket.connect_info()
    }
}

impl AsyncRead for Severable {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<Result<()>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for Severable {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<Result<usize>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<Result<usize>> {
        self.poll_cut(cx)?;
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
