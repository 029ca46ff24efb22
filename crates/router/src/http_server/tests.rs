//! Clients that hold on to a connection without using it, and those that use it.

use std::net::SocketAddr;

use axum::routing::{get, post};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tramontane_runtime::tls::Door;
use tramontane_runtime::{HELLO_TIMEOUT, WRITE_STALL_MAX};

use super::*;

/// A server that takes one connection at a time.
async fn served(routes: Router) -> (SocketAddr, Doors, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let doors = Doors::default();
    let incoming = Incoming::new(listener, Door::plain("http")).at_most(1);
    let tasks = TaskTracker::new();
    let serving = tasks.spawn(serve(incoming, (routes, Versions::All), doors.clone()));
    (address, doors, serving)
}

/// Slowloris: each line of the head comes in time, the head never ends.
#[tokio::test(start_paused = true)]
async fn a_head_that_never_ends_does_not_keep_its_place() {
    let (address, doors, serving) = served(Router::new()).await;
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

const HELLO: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Sends `flood` over HTTP/2; whoever serves ends the connection, and serves the next one.
async fn ends_its_connection(routes: Router, flood: &[u8]) {
    let (address, doors, serving) = served(routes).await;
    let sent = [HELLO, &frame(SETTINGS, 0, 0, &[]), flood].concat();
    let (mut reader, mut writer) = TcpStream::connect(address).await.unwrap().into_split();
    let writing = TaskTracker::new().spawn(async move {
        let _cut_off = writer.write_all(&sent).await;
        writer
    });
    let mut got = Vec::new();
    let reading = timeout(Duration::from_secs(20), reader.read_to_end(&mut got));
    assert!(reading.await.is_ok(), "the flood keeps its connection");
    drop(writing.await.unwrap());
    let mut next = Pinged::connect(address, &[]).await;
    next.ask().await;
    let answered = timeout(Duration::from_secs(20), next.listen_for(Some(HEADERS)));
    answered.await.unwrap().unwrap();
    drop(next);
    doors.refuse.cancel();
    serving.await.unwrap();
}

/// CVE-2023-44487, RUSTSEC-2024-0003: requests that are reset as soon as they are sent.
#[tokio::test]
async fn a_flood_of_requests_that_are_reset_ends_its_connection() {
    let mut flood = Vec::new();
    for stream in (1..20_000).step_by(2) {
        flood.extend(frame(HEADERS, END_STREAM | END_HEADERS, stream, &GET));
        flood.extend(frame(RESET, 0, stream, &[0, 0, 0, 8]));
    }
    ends_its_connection(Router::new(), &flood).await;
}

/// CVE-2024-27316, RUSTSEC-2024-0332: a head that goes on in frame after frame.
#[tokio::test]
async fn a_flood_of_continuations_ends_its_connection() {
    // A literal header without indexing, `x: y`.
    let more = [0, 1, b'x', 1, b'y'];
    for payload in [&more[..], &more.repeat(1000), &[]] {
        let mut flood = frame(HEADERS, END_STREAM, 1, &GET);
        for _ in 0..2_000 {
            flood.extend(frame(CONTINUATION, 0, 1, payload));
        }
        ends_its_connection(Router::new(), &flood).await;
    }
}

/// CVE-2019-9518, RUSTSEC-2026-0258: a body of frames without data, which no window holds back.
#[tokio::test]
async fn a_flood_of_empty_data_ends_its_connection() {
    // POST http://x/.
    let head = [0x83, 0x86, 0x84, 0x41, 1, b'x'];
    let mut flood = frame(HEADERS, END_HEADERS, 1, &head);
    for _ in 0..200_000 {
        flood.extend(frame(DATA, 0, 1, &[]));
    }
    let reads = post(|body: axum::body::Bytes| async move { format!("{}", body.len()) });
    ends_its_connection(Router::new().route("/", reads), &flood).await;
    let waits = post(|| async { sleep(Duration::from_secs(3600)).await });
    ends_its_connection(Router::new().route("/", waits), &flood).await;
}

#[tokio::test(start_paused = true)]
async fn requests_one_behind_the_other_are_answered_in_their_order() {
    let slow = get(|| async {
        sleep(Duration::from_secs(5)).await;
        "the first"
    });
    let routes = Router::new().route("/slow", slow);
    let routes = routes.route("/fast", get(|| async { "the second" }));
    let (address, doors, serving) = served(routes).await;
    let mut client = TcpStream::connect(address).await.unwrap();
    let asked = "GET /slow HTTP/1.1\r\nhost: x\r\n\r\n\
                 GET /fast HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    client.write_all(asked.as_bytes()).await.unwrap();
    let mut got = String::new();
    client.read_to_string(&mut got).await.unwrap();
    assert_eq!(got.matches("HTTP/1.1 200").count(), 2, "{got}");
    assert!(got.find("the first") < got.find("the second"), "{got}");
    doors.refuse.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_asks_does_not_keep_its_place() {
    let (address, doors, serving) = served(Router::new()).await;
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

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
/// GET http://x/, whole.
const GET: [u8; 6] = [0x82, 0x86, 0x84, 0x41, 1, b'x'];

/// A client of HTTP/2 that answers every ping and gives no more room than its settings do.
struct Pinged {
    stream: TcpStream,
    /// Kinds of the frames that came.
    got: Vec<u8>,
}

impl Pinged {
    async fn connect(address: SocketAddr, settings: &[u8]) -> Self {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let mut hello = HELLO.to_vec();
        hello.extend(frame(SETTINGS, 0, 0, settings));
        stream.write_all(&hello).await.unwrap();
        let got = Vec::new();
        Self { stream, got }
    }

    async fn ask(&mut self) {
        let asked = frame(HEADERS, END_STREAM | END_HEADERS, 1, &GET);
        self.stream.write_all(&asked).await.unwrap();
    }

    /// Until a frame of this kind has come, or the connection has ended.
    async fn listen_for(&mut self, kind: Option<u8>) -> std::io::Result<()> {
        while kind.is_none_or(|kind| !self.got.contains(&kind)) {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await?;
            let size = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; size];
            self.stream.read_exact(&mut payload).await?;
            self.got.push(head[3]);
            match (head[3], head[4] & ACK) {
                (PING, 0) => {
                    self.stream
                        .write_all(&frame(PING, ACK, 0, &payload))
                        .await?;
                }
                (SETTINGS, 0) => {
                    self.stream.write_all(&frame(SETTINGS, ACK, 0, &[])).await?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// How long it takes until the server ends the connection.
    async fn until_closed(&mut self) -> Duration {
        let begin = Instant::now();
        let closed = timeout(WRITE_STALL_MAX * 2, self.listen_for(None)).await;
        assert!(closed.is_ok(), "the connection is kept");
        begin.elapsed()
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_a_request_ends_though_it_answers_pings() {
    let (address, doors, serving) = served(Router::new()).await;
    let mut idle = Pinged::connect(address, &[]).await;
    let took = idle.until_closed().await;
    assert!(
        took >= IDLE_MAX && took <= IDLE_MAX + ABORT_GRACE * 2,
        "{took:?}"
    );
    assert!(idle.got.contains(&PING), "pings were asked for");
    assert!(idle.got.contains(&GOAWAY), "it ends with a good-bye");
    doors.refuse.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_takes_long_keeps_its_connection() {
    let slow = get(|| async {
        sleep(IDLE_MAX * 10).await;
        "done"
    });
    let (address, doors, serving) = served(Router::new().route("/", slow)).await;
    let mut client = Pinged::connect(address, &[]).await;
    client.ask().await;
    client.listen_for(Some(DATA)).await.unwrap();
    let took = client.until_closed().await;
    assert!(took >= IDLE_MAX, "{took:?}");
    doors.refuse.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_connection_of_a_great_age_says_good_bye_and_answers_what_it_was_asked() {
    let slow = get(|| async {
        sleep(AGE_MAX * 2).await;
        "done"
    });
    let (address, doors, serving) = served(Router::new().route("/", slow)).await;
    let begin = Instant::now();
    let mut client = Pinged::connect(address, &[]).await;
    client.ask().await;
    client.listen_for(Some(GOAWAY)).await.unwrap();
    let age = begin.elapsed();
    assert!(
        age >= AGE_MAX.mul_f64(0.9) && age <= AGE_MAX.mul_f64(1.1) + ABORT_GRACE,
        "{age:?}"
    );
    assert!(!client.got.contains(&DATA));
    client.listen_for(Some(DATA)).await.unwrap();
    client.until_closed().await;
    doors.refuse.cancel();
    serving.await.unwrap();
}

/// CVE-2019-9511, CVE-2019-9517: an answer is asked for and never taken.
#[tokio::test(start_paused = true)]
async fn an_answer_that_nobody_takes_does_not_keep_its_connection() {
    let large = get(|| async { vec![b'x'; 1 << 20] });
    let (address, doors, serving) = served(Router::new().route("/", large)).await;
    // INITIAL_WINDOW_SIZE is 0.
    let mut client = Pinged::connect(address, &[0, 4, 0, 0, 0, 0]).await;
    client.ask().await;
    let took = client.until_closed().await;
    assert!(
        took >= WRITE_STALL_MAX && took < WRITE_STALL_MAX * 2,
        "{took:?}"
    );
    assert!(client.got.contains(&HEADERS) && !client.got.contains(&DATA));
    // Requests one behind the other, of whose answers nothing is read.
    let mut mute = TcpStream::connect(address).await.unwrap();
    let asked = "GET / HTTP/1.1\r\nhost: x\r\n\r\n".repeat(64);
    mute.write_all(asked.as_bytes()).await.unwrap();
    // There is one place: its end is another's begin.
    let mut next = Pinged::connect(address, &[]).await;
    next.ask().await;
    let served = timeout(WRITE_STALL_MAX * 2, next.listen_for(Some(HEADERS))).await;
    assert!(served.is_ok(), "who reads nothing keeps its place");
    drop(mute);
    doors.refuse.cancel();
    serving.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_reader_that_is_slow_gets_the_whole_answer() {
    let large = get(|| async { vec![b'x'; 300 << 10] });
    let (address, doors, serving) = served(Router::new().route("/", large)).await;
    let window = 64_u32 << 10;
    let mut settings = vec![0, 4];
    settings.extend(window.to_be_bytes());
    let mut client = Pinged::connect(address, &settings).await;
    client.ask().await;
    let reading = async {
        client.listen_for(Some(DATA)).await.unwrap();
        let mut rest = Vec::new();
        for _ in 0..5 {
            let more = frame(8, 0, 1, &window.to_be_bytes());
            let connection = frame(8, 0, 0, &window.to_be_bytes());
            let _pings = timeout(WRITE_STALL_MAX / 2, client.listen_for(None)).await;
            client.stream.write_all(&more).await.unwrap();
            client.stream.write_all(&connection).await.unwrap();
            rest.append(&mut client.got);
        }
        let _end = timeout(Duration::from_secs(1), client.listen_for(None)).await;
        rest.append(&mut client.got);
        rest
    };
    let kinds = reading.await;
    let num_data = kinds.iter().filter(|kind| **kind == DATA).count();
    assert!(
        num_data >= 300 / 16 && !kinds.contains(&GOAWAY),
        "{kinds:?}"
    );
    doors.refuse.cancel();
    serving.await.unwrap();
}
