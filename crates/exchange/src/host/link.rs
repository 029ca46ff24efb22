//! One connection between two workers of a host: calls one way, answers the other. Any thread writes, the
//! thread at the desk reads, nobody waits.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use mio::event::Source;
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use parking_lot::Mutex;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tramontane_proto::v1::{self, expert_frame::Kind};
use tramontane_types::WorkerId;

use super::frame::{Frame, Reader, frame_bytes_max};
use super::sockets::Doorbell;
use crate::faults::Gate;
use crate::grpc::codec;
use crate::local::Counters;
use crate::rhythm::Caller;
use crate::stats::add;
use crate::{CallLimits, ExpertCall, ExpertServerHandle, Refusal, Reply, ReplySender};

/// A greeted connection.
#[derive(Debug)]
pub(crate) struct Link {
    socket: UnixStream,
    doorbell: Arc<Doorbell>,
    token: Token,
    reader: Mutex<Reader>,
    out: Mutex<Out>,
    side: Side,
}

/// Frames that the socket would not take yet.
#[derive(Debug, Default)]
struct Out {
    waiting: VecDeque<Frame>,
    is_closed: bool,
}

/// What a connection is for.
#[derive(Debug)]
pub(super) enum Side {
    Calls(Calls),
    Service(Service),
}

/// The calling side.
#[derive(Debug)]
pub(super) struct Calls {
    pub(super) worker: WorkerId,
    pub(super) credits: usize,
    pub(super) counters: Arc<Counters>,
    /// Cancelled when the connection is lost.
    pub(super) lost: CancellationToken,
    pub(super) open: Mutex<OpenCalls>,
}

#[derive(Debug, Default)]
pub(super) struct OpenCalls {
    next_id: u64,
    replies: HashMap<u64, ReplySender>,
    /// Whether the connection ends with the last answer.
    is_last: bool,
}

/// The answering side.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) server: ExpertServerHandle,
    pub(super) caller: Caller,
    pub(super) gate: Option<Gate>,
    pub(super) credits: usize,
    /// Calls that were not answered yet.
    pub(super) num_open: Arc<AtomicUsize>,
    /// Its place among the streams that are served at once.
    pub(super) _place: OwnedSemaphorePermit,
}

impl Link {
    /// Has a greeted socket read at the desk that `doorbell` belongs to.
    ///
    /// # Errors
    /// When the system refuses it.
    pub(super) fn open(
        socket: UnixStream,
        side: Side,
        limits: &CallLimits,
        doorbell: &Arc<Doorbell>,
    ) -> io::Result<Arc<Self>> {
        socket.set_nonblocking(true)?;
        let link = Arc::new(Self {
            socket,
            doorbell: Arc::clone(doorbell),
            token: doorbell.token(),
            reader: Mutex::new(Reader::new(frame_bytes_max(limits))),
            out: Mutex::default(),
            side,
        });
        doorbell.add(link.token, &link)?;
        Ok(link)
    }

    /// Sends a call, or gives it back when the connection is lost or all credits are used.
    pub(super) fn call(
        &self,
        call: ExpertCall,
        reply: ReplySender,
    ) -> Result<(), (ExpertCall, ReplySender)> {
        let Side::Calls(calls) = &self.side else {
            return Err((call, reply));
        };
        let mut open = calls.open.lock();
        if calls.lost.is_cancelled() || open.is_last || open.replies.len() >= calls.credits {
            return Err((call, reply));
        }
        let id = open.next_id;
        open.next_id += 1;
        open.replies.insert(id, reply);
        drop(open);
        add(&calls.counters.calls, 1);
        add(&calls.counters.bytes_sent, call.rows.len());
        self.send(codec::call_to_wire(id, call));
        Ok(())
    }

    /// Ends the connection once everything is answered: the peer is not to be asked any more.
    pub(super) fn retire(&self) {
        let Side::Calls(calls) = &self.side else {
            return;
        };
        let mut open = calls.open.lock();
        open.is_last = true;
        if open.replies.is_empty() {
            drop(open);
            self.close("the peer was removed");
        }
    }

    /// Ends the connection; what is open is lost.
    pub(super) fn close(&self, why: &str) {
        {
            let mut out = self.out.lock();
            if std::mem::replace(&mut out.is_closed, true) {
                return;
            }
            out.waiting.clear();
        }
        // The reader sees the end and forgets the link. A socket that was never connected has no end.
        let _ended = self.socket.shutdown(Shutdown::Both);
        match &self.side {
            Side::Calls(calls) => calls.lose(why),
            Side::Service(service) => service.server.forget(service.caller),
        }
    }

    /// Writes a frame, or as much of it as the socket takes now.
    fn send(&self, frame: v1::ExpertFrame) {
        let mut out = self.out.lock();
        if out.is_closed {
            drop(out);
            return;
        }
        out.waiting.push_back(Frame::new(frame));
        if out.waiting.len() > 1 {
            return;
        }
        let flushed = self.flush(&mut out);
        let watched = match flushed {
            Ok(true) => Ok(()),
            Ok(false) => self.watch(true),
            Err(error) => Err(error),
        };
        drop(out);
        if let Err(error) = watched {
            self.close(&error.to_string());
        }
    }

    /// Writes what waits. Whether all of it is written.
    fn flush(&self, out: &mut Out) -> io::Result<bool> {
        while let Some(frame) = out.waiting.front_mut() {
            match (&self.socket).write_vectored(&frame.slices()) {
                Ok(written) => {
                    if frame.advance(written) {
                        out.waiting.pop_front();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// The socket can be read or written, or has ended. False: forget it.
    pub(super) fn on_ready(&self) -> bool {
        let done = self.write_on().and_then(|()| self.read_all());
        if let Err(error) = &done {
            self.close(&error.to_string());
            // What is left is that the socket closes with its last owner.
            let _gone = SourceFd(&self.socket.as_raw_fd()).deregister(self.doorbell.registry());
        }
        done.is_ok()
    }

    fn write_on(&self) -> io::Result<()> {
        let mut out = self.out.lock();
        if !out.waiting.is_empty() && self.flush(&mut out)? {
            self.watch(false)?;
        }
        Ok(())
    }

    /// Takes frames until the socket has none.
    fn read_all(&self) -> io::Result<()> {
        let mut reader = self.reader.lock();
        loop {
            match reader.read(&mut &self.socket) {
                Ok(frame) => self.on_frame(frame),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn on_frame(&self, frame: v1::ExpertFrame) {
        match (&self.side, frame.kind) {
            (Side::Service(service), Some(Kind::Call(call))) => self.serve(service, call),
            (
                Side::Calls(calls),
                Some(Kind::Reply(v1::ExpertReply {
                    call_id,
                    outputs,
                    service_us,
                })),
            ) => {
                let reply = Reply {
                    outputs,
                    service_us,
                };
                self.answer(calls, call_id, Ok(reply));
            }
            (Side::Calls(calls), Some(Kind::Refusal(refusal))) => {
                self.answer(
                    calls,
                    refusal.call_id,
                    Err(codec::refusal_from_wire(refusal)),
                );
            }
            // A newer worker may say more than we know.
            _ => {}
        }
    }

    fn serve(&self, service: &Service, call: v1::ExpertCall) {
        let Some(link) = self.doorbell.link(self.token) else {
            return;
        };
        let (id, epoch) = (call.call_id, service.server.epoch());
        let open = Arc::clone(&service.num_open);
        let num_open = open.fetch_add(1, Ordering::AcqRel);
        let reply = ReplySender::new(move |answer| {
            // First the count: with the answer the caller may send its next call.
            open.fetch_sub(1, Ordering::AcqRel);
            link.send(codec::answer_to_wire(id, answer, epoch));
        });
        let Some(reply) = Gate::through(service.gate.as_ref(), reply) else {
            return;
        };
        if num_open >= service.credits {
            reply.send(Err(Refusal::Busy));
            return;
        }
        match codec::call_from_wire(call) {
            Ok(call) => service.server.submit_from(service.caller, call, reply),
            Err(reason) => reply.send(Err(Refusal::Invalid(reason))),
        }
    }

    fn answer(&self, calls: &Calls, id: u64, answer: Result<Reply, Refusal>) {
        let mut open = calls.open.lock();
        let reply = open.replies.remove(&id);
        let is_over = open.is_last && open.replies.is_empty();
        drop(open);
        match reply {
            Some(reply) => {
                if let Ok(Reply { outputs, .. }) = &answer {
                    add(&calls.counters.bytes_received, outputs.len());
                }
                reply.send(answer);
            }
            None => {
                tracing::warn!(worker = %calls.worker, call_id = id, "answer to a call that is not open");
            }
        }
        if is_over {
            self.close("the peer was removed");
        }
    }

    pub(super) fn register(&self, registry: &Registry) -> io::Result<()> {
        SourceFd(&self.socket.as_raw_fd()).register(registry, self.token, Interest::READABLE)
    }

    /// Whether to be told when the socket takes more.
    fn watch(&self, writes: bool) -> io::Result<()> {
        let interest = if writes {
            Interest::READABLE | Interest::WRITABLE
        } else {
            Interest::READABLE
        };
        SourceFd(&self.socket.as_raw_fd()).reregister(
            self.doorbell.registry(),
            self.token,
            interest,
        )
    }
}

impl Calls {
    fn lose(&self, why: &str) {
        self.lost.cancel();
        let lost = std::mem::take(&mut self.open.lock().replies);
        for (_, reply) in lost {
            add(&self.counters.lost, 1);
            reply.send(Err(Refusal::Lost(why.to_owned())));
        }
    }
}
