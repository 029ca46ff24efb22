//! Serves HTTP connections, within limits on their headers and their patience. Knows nothing about what is served.

use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use tramontane_runtime::Accepted;
use tramontane_runtime::tls::{Incoming, Socket};

use crate::run::Doors;

/// Longest time for a request's headers; an idle connection is closed after it too.
const HEADER_TIMEOUT: Duration = Duration::from_secs(75);
/// Largest request head.
const HEADER_BYTES_MAX: usize = 64 * 1024;
/// Most headers of a request.
const HEADERS_MAX: usize = 100;
/// Requests at once on one HTTP/2 connection.
const STREAMS_MAX: u32 = 256;
/// HTTP/2 streams that a client may reset before they are accepted.
const RESET_STREAMS_MAX: usize = 64;
/// HTTP/2 connections are asked for a sign of life this often.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Aborted answers get this long to send their last event.
const ABORT_GRACE: Duration = Duration::from_secs(1);

/// Serves until `doors.refuse`, and then until every connection has ended.
pub(crate) async fn serve(mut incoming: Incoming, routes: Router, doors: Doors) {
    let tasks = TaskTracker::new();
    let builder = Arc::new(builder());
    loop {
        let stream = tokio::select! {
            accepted = poll_fn(|cx| incoming.poll_accept(cx)) => accepted,
            () = doors.refuse.cancelled() => break,
        };
        let builder = Arc::clone(&builder);
        tasks.spawn(connection(stream, routes.clone(), builder, doors.clone()));
    }
    drop(incoming);
    tasks.close();
    tasks.wait().await;
}

fn builder() -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE)
        .keep_alive_timeout(KEEPALIVE)
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(RESET_STREAMS_MAX)
        .max_header_list_size(HEADER_BYTES_MAX as u32);
    builder
}

async fn connection(
    stream: Accepted<Socket>,
    routes: Router,
    builder: Arc<Builder<TokioExecutor>>,
    doors: Doors,
) {
    let service = TowerToHyperService::new(routes);
    let serving = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = doors.refuse.cancelled() => {
            serving.as_mut().graceful_shutdown();
            tokio::select! {
                ended = serving.as_mut() => ended,
                () = doors.abort.cancelled() => {
                    timeout(ABORT_GRACE, serving.as_mut()).await.unwrap_or(Ok(()))
                }
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "connection ended early");
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::task::JoinHandle;
    use tokio::time::sleep;
    use tramontane_runtime::HELLO_TIMEOUT;
    use tramontane_runtime::tls::Door;

    use super::*;

    /// A server of no routes that takes one connection at a time.
    async fn served() -> (SocketAddr, Doors, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let doors = Doors::default();
        let incoming = Incoming::new(listener, Door::plain("http")).at_most(1);
        let tasks = TaskTracker::new();
        let serving = tasks.spawn(serve(incoming, Router::new(), doors.clone()));
        (address, doors, serving)
    }

    /// Slowloris: each line of the head comes in time, the head never ends.
    #[tokio::test(start_paused = true)]
    async fn a_head_that_never_ends_does_not_keep_its_place() {
        let (address, doors, serving) = served().await;
        let client = async {
            let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
            writer
                .write_all(b"GET / HTTP/1.1\r\nhost: x\r\n")
                .await
                .unwrap();
            let mut got = Vec::new();
            let dripping = async {
                while writer.write_all(b"x-more: y\r\n").await.is_ok() {
                    sleep(HEADER_TIMEOUT / 20).await;
                }
                // Nobody takes it any more; the answer says when the connection is over.
                std::future::pending::<()>().await;
            };
            tokio::select! {
                _closed_or_reset = reader.read_to_end(&mut got) => {}
                () = dripping => {}
            }
        };
        let cut_off = timeout(HEADER_TIMEOUT * 2, client).await;
        assert!(cut_off.is_ok(), "a slow head keeps its connection");
        doors.refuse.cancel();
        serving.await.unwrap();
    }

    /// An HTTP/2 frame.
    fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = length[1..].to_vec();
        frame.extend_from_slice(&[kind, flags]);
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    /// CVE-2023-44487: requests that are reset as soon as they are sent.
    #[tokio::test]
    async fn a_flood_of_requests_that_are_reset_ends_its_connection() {
        let (address, doors, serving) = served().await;
        let (headers, reset, settings) = (1, 3, 4);
        let mut flood = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        flood.extend(frame(settings, 0, 0, &[]));
        for stream in (1..20_000).step_by(2) {
            // GET http://x/, whole.
            flood.extend(frame(
                headers,
                0b101,
                stream,
                &[0x82, 0x86, 0x84, 0x41, 1, b'x'],
            ));
            flood.extend(frame(reset, 0, stream, &[0, 0, 0, 8]));
        }
        let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
        let writing = TaskTracker::new().spawn(async move {
            let _cut_off = writer.write_all(&flood).await;
            writer
        });
        let mut got = Vec::new();
        let reading = timeout(Duration::from_secs(20), reader.read_to_end(&mut got));
        assert!(reading.await.is_ok(), "the flood keeps its connection");
        drop(writing.await.unwrap());
        doors.refuse.cancel();
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_asks_does_not_keep_its_place() {
        let (address, doors, serving) = served().await;
        // The begin of HTTP/2's hello: nobody knows yet which version it will be.
        for said in ["", "PRI * HTTP/2.0"] {
            let client = async {
                let mut client = TcpStream::connect(address).await.unwrap();
                client.write_all(said.as_bytes()).await.unwrap();
                let mut got = Vec::new();
                let _closed_or_reset = client.read_to_end(&mut got).await;
            };
            let cut_off = timeout(HELLO_TIMEOUT * 2, client).await;
            assert!(cut_off.is_ok(), "{said:?}");
        }
        doors.refuse.cancel();
        serving.await.unwrap();
    }
}
