//! Answers to requests with an idempotency key, kept so that a retry gets the same answer: while it is made,
//! and for a while after it is whole. Never holds more than its limits, and never shows one client another's:
//! an answer is found only with the key, the credentials and the body of the request that began it.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tramontane_coordination::Version;

use crate::answer::{Told, stopping};
use crate::answer_id::AnswerId;
use crate::error::{ApiError, ErrorKind};

/// Deltas that are kept of one answer: one per token at most, and few answers are longer.
const DELTAS_MAX: usize = 65_536;
/// Bytes that are kept of one answer: the longest answers of common contexts.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// An answer keeps this many deltas also when there is no memory left, or nobody could follow it.
const DELTAS_MIN: usize = 64;

/// What a kept answer is found by: a digest of the client's credentials and its idempotency key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyDigest(pub(crate) [u8; 32]);

/// A digest of a request's route and body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BodyDigest(pub(crate) [u8; 32]);

/// How much is kept, and for how long.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KeepLimits {
    pub(crate) answers_max: usize,
    pub(crate) bytes_max: usize,
    /// A whole answer is kept this long.
    pub(crate) keep: Duration,
    /// An answer that nobody reads is made for this long.
    pub(crate) grace: Duration,
}

/// All kept answers of this router.
#[derive(Debug)]
pub(crate) struct KeptAnswers {
    limits: KeepLimits,
    tapes: Mutex<HashMap<KeyDigest, Arc<Tape>>>,
    bytes: Arc<AtomicUsize>,
}

/// What a request with a key finds.
#[derive(Debug)]
pub(crate) enum Found {
    /// Nothing: whoever has the recorder makes the answer.
    Nothing(Recorder, Reader),
    /// The answer, as far as it is made.
    Answer(Reader),
}

/// The weights that an answer began with, or why there is none.
pub(crate) type Began = Result<Arc<Version>, ApiError>;

/// What is kept of one answer.
#[derive(Debug)]
struct Tape {
    id: AnswerId,
    body: BodyDigest,
    state: Mutex<TapeState>,
    changed: watch::Sender<()>,
    /// Of all tapes.
    bytes: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct TapeState {
    told: VecDeque<Told>,
    /// How many were forgotten before the first of `told`.
    num_forgotten: usize,
    bytes: usize,
    /// What the answer began with, or why it did not.
    began: Option<Began>,
    /// Since when the answer is whole.
    whole_since: Option<Instant>,
    /// Nothing more will come, and nobody may begin to read.
    closed: bool,
    num_readers: usize,
}

impl KeptAnswers {
    pub(crate) fn new(limits: KeepLimits) -> Arc<Self> {
        Arc::new(Self {
            limits,
            tapes: Mutex::default(),
            bytes: Arc::default(),
        })
    }

    /// Answers that are kept.
    pub(crate) fn num_answers(&self) -> usize {
        self.tapes.lock().len()
    }

    /// Bytes that are kept of them.
    pub(crate) fn num_bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The answer to the request with this key, or the right to make it under the name `id`.
    pub(crate) fn find(
        self: &Arc<Self>,
        key: KeyDigest,
        body: BodyDigest,
        id: AnswerId,
    ) -> Result<Found, ApiError> {
        let mut tapes = self.tapes.lock();
        if let Some(tape) = tapes.get(&key) {
            if tape.body != body {
                let message = "idempotency-key was used for another request, expected the same route \
                               and the same body byte for byte";
                return Err(ApiError::new(ErrorKind::KeyReused, message).at("idempotency-key"));
            }
            if let Some(reader) = Tape::read_from_start(tape) {
                return Ok(Found::Answer(reader));
            }
        }
        // An answer whose beginning is forgotten is made again: it comes out the same.
        tapes.remove(&key);
        if tapes.len() >= self.limits.answers_max && !forget_oldest(&mut tapes) {
            let max = self.limits.answers_max;
            let message = format!("{max} requests with an idempotency-key run already");
            return Err(ApiError::unavailable(message));
        }
        let tape = Arc::new(Tape {
            id,
            body,
            state: Mutex::default(),
            changed: watch::Sender::new(()),
            bytes: Arc::clone(&self.bytes),
        });
        tapes.insert(key, Arc::clone(&tape));
        let reader = Reader::new(&tape);
        let recorder = Recorder {
            kept: Arc::clone(self),
            key,
            tape,
        };
        Ok(Found::Nothing(recorder, reader))
    }
}

/// Forgets the answer that has been whole for the longest time and is not read, if there is one.
fn forget_oldest(tapes: &mut HashMap<KeyDigest, Arc<Tape>>) -> bool {
    let mut oldest: Option<(Instant, KeyDigest)> = None;
    for (key, tape) in tapes.iter() {
        let state = tape.state.lock();
        let Some(since) = state.whole_since.filter(|_| state.num_readers == 0) else {
            continue;
        };
        if oldest.is_none_or(|(other, _)| since < other) {
            oldest = Some((since, *key));
        }
    }
    let Some(tape) = oldest.and_then(|(_, key)| tapes.remove(&key)) else {
        return false;
    };
    tape.forget();
    true
}

impl Tape {
    /// A reader from the very beginning, while that is there.
    fn read_from_start(tape: &Arc<Self>) -> Option<Reader> {
        let mut state = tape.state.lock();
        let is_there = !state.closed && state.num_forgotten == 0;
        // Under the same lock: whoever closes the tape sees the reader, or the reader sees it closed.
        state.num_readers += usize::from(is_there);
        drop(state);
        is_there.then(|| Reader::counted(tape))
    }

    /// What the answer began with, or why it did not; `None` while nobody knows.
    fn began(&self) -> Option<Began> {
        let state = self.state.lock();
        let stopped = state.closed.then(|| Err(stopping()));
        state.began.clone().or(stopped)
    }

    /// What was told at `index`: `None` while it may come, `Some(None)` when it cannot.
    fn told(&self, index: usize) -> Option<Option<Told>> {
        let state = self.state.lock();
        let Some(index) = index.checked_sub(state.num_forgotten) else {
            return Some(None);
        };
        let told = state.told.get(index).cloned();
        let is_over = state.closed || state.whole_since.is_some();
        (told.is_some() || is_over).then_some(told)
    }

    fn close(&self) {
        self.state.lock().closed = true;
        self.changed.send_replace(());
    }

    /// Notes that the answer is at its end; whether all of it is still there.
    fn end(&self) -> bool {
        let mut state = self.state.lock();
        state.whole_since = Some(Instant::now());
        let is_there = state.num_forgotten == 0;
        drop(state);
        self.changed.send_replace(());
        is_there
    }

    /// Gives its memory back now, not when its recorder has noticed.
    fn forget(&self) {
        let mut state = self.state.lock();
        state.num_forgotten += state.told.len();
        state.told = VecDeque::new();
        let bytes = std::mem::take(&mut state.bytes);
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
        drop(state);
        self.close();
    }
}

impl Drop for Tape {
    fn drop(&mut self) {
        let bytes = self.state.get_mut().bytes;
        self.bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// Writes one answer down. Dropping it ends the answer where it is; one that is not whole is forgotten.
#[derive(Debug)]
pub(crate) struct Recorder {
    kept: Arc<KeptAnswers>,
    key: KeyDigest,
    tape: Arc<Tape>,
}

impl Recorder {
    /// Says what the answer begins with, or why there is none.
    pub(crate) fn began(&self, result: Began) {
        self.tape.state.lock().began = Some(result);
        self.tape.changed.send_replace(());
    }

    /// Writes down what comes next; forgets the oldest beyond the limits.
    pub(crate) fn push(&self, told: Told) {
        let (size, bytes) = (told.size(), &self.kept.bytes);
        let bytes_max = self.kept.limits.bytes_max;
        bytes.fetch_add(size, Ordering::Relaxed);
        while self.kept.num_bytes() > bytes_max {
            if !forget_oldest(&mut self.kept.tapes.lock()) {
                break;
            }
        }
        let mut state = self.tape.state.lock();
        state.bytes += size;
        state.told.push_back(told);
        while state.told.len() > DELTAS_MIN
            && (state.told.len() > DELTAS_MAX
                || state.bytes > ANSWER_BYTES_MAX
                || self.kept.num_bytes() > bytes_max)
        {
            let forgotten = state.told.pop_front().map_or(0, |told| told.size());
            state.num_forgotten += 1;
            state.bytes -= forgotten;
            bytes.fetch_sub(forgotten, Ordering::Relaxed);
        }
        drop(state);
        self.tape.changed.send_replace(());
    }

    /// Keeps the whole answer for its time, if its beginning is still there.
    pub(crate) async fn keep(self) {
        if !self.tape.end() {
            return;
        }
        tokio::select! {
            () = sleep(self.kept.limits.keep) => {}
            () = self.until(|state| state.closed) => {}
        }
    }

    /// Returns when nobody has read for the grace time. Nobody can begin to read after that.
    pub(crate) async fn abandoned(&self) {
        loop {
            self.until(|state| state.num_readers == 0).await;
            let is_read = tokio::select! {
                () = sleep(self.kept.limits.grace) => false,
                () = self.until(|state| state.num_readers > 0) => true,
            };
            let mut state = self.tape.state.lock();
            if !is_read && state.num_readers == 0 {
                state.closed = true;
                return;
            }
        }
    }

    async fn until(&self, reached: impl Fn(&TapeState) -> bool) {
        let mut changed = self.tape.changed.subscribe();
        while !reached(&self.tape.state.lock()) {
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.tape.close();
        let mut tapes = self.kept.tapes.lock();
        let is_ours = tapes
            .get(&self.key)
            .is_some_and(|tape| Arc::ptr_eq(tape, &self.tape));
        if is_ours {
            tapes.remove(&self.key);
        }
    }
}

/// Reads one answer from its beginning.
#[derive(Debug)]
pub(crate) struct Reader {
    tape: Arc<Tape>,
    changed: watch::Receiver<()>,
    num_read: usize,
}

impl Reader {
    fn new(tape: &Arc<Tape>) -> Self {
        tape.state.lock().num_readers += 1;
        Self::counted(tape)
    }

    /// A reader that is counted already.
    fn counted(tape: &Arc<Tape>) -> Self {
        let reader = Self {
            tape: Arc::clone(tape),
            changed: tape.changed.subscribe(),
            num_read: 0,
        };
        tape.changed.send_replace(());
        reader
    }

    /// The name of the answer.
    pub(crate) fn id(&self) -> AnswerId {
        self.tape.id
    }

    /// Waits until the answer begins, and says with what; an error when there is none.
    pub(crate) async fn began(&mut self) -> Began {
        loop {
            self.changed.borrow_and_update();
            if let Some(began) = self.tape.began() {
                return began;
            }
            if self.changed.changed().await.is_err() {
                return Err(stopping());
            }
        }
    }

    /// What comes next; `None` when nothing does, or when it was forgotten before it was read. Dropping the
    /// future loses nothing.
    pub(crate) async fn next(&mut self) -> Option<Told> {
        loop {
            self.changed.borrow_and_update();
            match self.tape.told(self.num_read) {
                Some(Some(told)) => {
                    self.num_read += 1;
                    return Some(told);
                }
                Some(None) => return None,
                None => self.changed.changed().await.ok()?,
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.tape.state.lock().num_readers -= 1;
        self.tape.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests;
