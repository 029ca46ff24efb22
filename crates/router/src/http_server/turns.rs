//! Whose turn it is on one connection: ours while a request has no answer yet or its next part is not made, the
//! client's while it has to take what is made, or to ask. HTTP/2 pings keep a connection alive that nobody uses; this
//! tells when its client has done nothing for too long. Never looks at what is asked or answered.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::response::Response;
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};
use tonic::codegen::Service;
use tramontane_runtime::WRITE_STALL_MAX;
use tramontane_runtime::tls::PeerInfo;

/// Answers go out in pieces of this size at most: who takes one within [`WRITE_STALL_MAX`] is slow and not gone.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// The turns of a connection.
#[derive(Debug)]
pub(super) struct Turns(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Requests whose answers are not over.
    open: usize,
    /// Those among them where it is our turn.
    ours: usize,
    /// When the client did something last, or got something to do.
    last: Instant,
}

impl Turns {
    pub(super) fn new() -> Self {
        let last = Instant::now();
        Self(Mutex::new(State {
            open: 0,
            ours: 0,
            last,
        }))
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.0.lock();
        change(&mut state);
        state.last = Instant::now();
    }

    /// A client that asks for nothing has time to say good-bye from now on.
    pub(super) fn part(&self) {
        let mut state = self.0.lock();
        if state.open == 0 {
            state.last = Instant::now();
        }
    }

    /// Ends when the client has asked for nothing for `idle`, or takes none of its answers for [`WRITE_STALL_MAX`].
    pub(super) async fn quiet(&self, idle: Duration) {
        loop {
            let until = self.quiet_at(idle);
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// The earliest time at which that may be.
    fn quiet_at(&self, idle: Duration) -> Instant {
        let state = self.0.lock();
        match *state {
            State { open: 0, last, .. } => last + idle,
            State { ours: 0, last, .. } => last + WRITE_STALL_MAX,
            State { .. } => Instant::now() + idle.min(WRITE_STALL_MAX),
        }
    }
}

/// One request and its answer.
#[derive(Debug)]
struct Turn {
    turns: Arc<Turns>,
    is_ours: bool,
}

impl Turn {
    fn begin(turns: Arc<Turns>) -> Self {
        turns.change(|state| {
            state.open += 1;
            state.ours += 1;
        });
        let is_ours = true;
        Self { turns, is_ours }
    }

    fn give(&mut self, is_ours: bool) {
        if self.is_ours == is_ours {
            return;
        }
        self.is_ours = is_ours;
        self.turns.change(|state| {
            if is_ours {
                state.ours += 1;
            } else {
                state.ours -= 1;
            }
        });
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let was_ours = usize::from(self.is_ours);
        self.turns.change(|state| {
            state.open -= 1;
            state.ours -= was_ours;
        });
    }
}

/// The routes for one connection, which keep its turns and tell each request who its peer is.
#[derive(Clone, Debug)]
pub(super) struct Attended {
    pub(super) routes: Router,
    pub(super) turns: Arc<Turns>,
    pub(super) peer: PeerInfo,
}

impl<B> Service<http::Request<B>> for Attended
where
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<axum::BoxError>,
{
    type Response = Response;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // As a router always is.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let mut turn = Turn::begin(Arc::clone(&self.turns));
        request.extensions_mut().insert(self.peer.clone());
        let answering = self.routes.call(request);
        Box::pin(async move {
            let (parts, body) = answering.await?.into_parts();
            turn.give(false);
            let rest = Bytes::new();
            let body = Body::new(AttendedBody { body, rest, turn });
            Ok(Response::from_parts(parts, body))
        })
    }
}

/// An answer: whoever asks for more of it has taken what it got.
#[derive(Debug)]
struct AttendedBody {
    body: Body,
    /// Of a part that is larger than a piece.
    rest: Bytes,
    turn: Turn,
}

impl HttpBody for AttendedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = &mut *self;
        this.turn.give(true);
        if this.rest.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => {
                        this.turn.give(false);
                        return Poll::Ready(Some(Ok(trailers)));
                    }
                },
                ended => return Poll::Ready(ended),
            }
        }
        let size = this.rest.len().min(PIECE_BYTES_MAX);
        let piece = this.rest.split_to(size);
        this.turn.give(false);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let hint = self.body.size_hint();
        let rest = self.rest.len() as u64;
        let mut whole = SizeHint::new();
        whole.set_lower(hint.lower().saturating_add(rest));
        if let Some(upper) = hint.upper() {
            whole.set_upper(upper.saturating_add(rest));
        }
        whole
    }
}
