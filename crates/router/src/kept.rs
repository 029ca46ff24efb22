//! Answers to requests with an idempotency key, kept so that a retry gets the same answer: while it is made,
//! and for a while after it is whole. Never holds more than its limits, and never shows one client another's:
//! an answer is found only by the tenant, with the key and the body of the request that began it. Where there is no room,
//! the tenant with most kept answers loses the oldest of its own.

mod forget;

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
use crate::tenants::TenantName;

/// Deltas that are kept of one answer: one per token at most, and few answers are longer.
const DELTAS_MAX: usize = 65_536;
/// Bytes that are kept of one answer: the longest answers of common contexts.
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// An answer keeps this many deltas also when there is no memory left, or nobody could follow it.
const DELTAS_MIN: usize = 64;

/// What a kept answer is found by: a digest of the tenant and its idempotency key.
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
    /// Who leaves what there is to read for this long does not count as a reader.
    pub(crate) stall: Duration,
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
    tenant: TenantName,
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
    readers: Vec<Progress>,
    next_reader: u64,
}

/// How far one reader is.
#[derive(Debug)]
struct Progress {
    reader: u64,
    num_read: usize,
    /// When it last read, or last had nothing to read.
    active_at: Instant,
}

impl TapeState {
    fn num_told(&self) -> usize {
        self.num_forgotten + self.told.len()
    }

    /// Whether some reader waits for what is to come, or has read lately.
    fn is_read(&self, stall: Duration) -> bool {
        let is_over = self.closed || self.whole_since.is_some();
        self.readers.iter().any(|reader| {
            let waits = !is_over && reader.num_read >= self.num_told();
            waits || reader.active_at.elapsed() < stall
        })
    }

    fn push(&mut self, told: Told) {
        let (end, now) = (self.num_told(), Instant::now());
        for reader in self.readers.iter_mut().filter(|r| r.num_read >= end) {
            reader.active_at = now;
        }
        self.bytes += told.size();
        self.told.push_back(told);
    }

    fn admit_reader(&mut self) -> u64 {
        let reader = self.next_reader;
        self.next_reader += 1;
        self.readers.push(Progress {
            reader,
            num_read: 0,
            active_at: Instant::now(),
        });
        reader
    }
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
        (tenant, key): (&TenantName, KeyDigest),
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
        if tapes.len() >= self.limits.answers_max && !self.forget_oldest(&mut tapes) {
            let max = self.limits.answers_max;
            let message = format!("{max} requests with an idempotency-key run already");
            return Err(ApiError::unavailable(message));
        }
        let tape = Arc::new(Tape {
            id,
            tenant: tenant.clone(),
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

impl Tape {
    /// A reader from the very beginning, while that is there.
    fn read_from_start(tape: &Arc<Self>) -> Option<Reader> {
        let mut state = tape.state.lock();
        let is_there = !state.closed && state.num_forgotten == 0;
        // Under the same lock: whoever closes the tape sees the reader, or the reader sees it closed.
        let number = is_there.then(|| state.admit_reader())?;
        drop(state);
        Some(Reader::admitted(tape, number))
    }

    /// What the answer began with, or why it did not; `None` while nobody knows.
    fn began(&self) -> Option<Began> {
        let state = self.state.lock();
        let stopped = state.closed.then(|| Err(stopping()));
        state.began.clone().or(stopped)
    }

    /// Reads what comes next for `reader`: `None` while it may come, `Some(None)` when it cannot.
    fn read(&self, reader: u64) -> Option<Option<Told>> {
        let mut state = self.state.lock();
        let state = &mut *state;
        let progress = state.readers.iter_mut().find(|r| r.reader == reader)?;
        let Some(index) = progress.num_read.checked_sub(state.num_forgotten) else {
            return Some(None);
        };
        let told = state.told.get(index).cloned();
        if told.is_some() {
            progress.num_read += 1;
            progress.active_at = Instant::now();
        }
        let is_over = state.closed || state.whole_since.is_some();
        (told.is_some() || is_over).then_some(told)
    }

    /// How many tokens each of `num_choices` answers has, once all have ended.
    fn num_tokens(&self, num_choices: usize) -> Option<Vec<u32>> {
        let state = self.state.lock();
        let (mut num_tokens, mut num_ended) = (vec![0; num_choices], 0);
        for delta in state
            .told
            .iter()
            .filter_map(|told| told.delta.as_ref().ok())
        {
            let num = num_tokens.get_mut(delta.choice);
            if let (Some(num), Some(last)) = (num, delta.tokens.last()) {
                *num = last.index.saturating_add(1);
            }
            num_ended += usize::from(delta.finish.is_some());
        }
        (num_ended == num_choices).then_some(num_tokens)
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
            if !self.kept.forget_oldest(&mut self.kept.tapes.lock()) {
                break;
            }
        }
        let mut state = self.tape.state.lock();
        state.push(told);
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

    /// Keeps the whole answer for its time, if its beginning is still there, and longer for those who read it.
    pub(crate) async fn keep(self) {
        if self.tape.end() {
            tokio::select! {
                () = sleep(self.kept.limits.keep) => {}
                () = self.until(|state| state.closed) => {}
            }
        }
        self.part().await;
    }

    /// Leaves what there is to those who read it.
    pub(crate) async fn part(self) {
        self.leave();
        self.unread().await;
        self.tape.forget();
    }

    /// Returns when nobody has read for the grace time, or all who read have stalled: what is kept for them is
    /// forgotten. Nobody can begin to read after that.
    pub(crate) async fn abandoned(&self) {
        loop {
            self.unread().await;
            let is_read = tokio::select! {
                () = sleep(self.kept.limits.grace) => false,
                () = self.until(|state| state.is_read(self.kept.limits.stall)) => true,
            };
            let mut state = self.tape.state.lock();
            if !is_read && !state.is_read(self.kept.limits.stall) {
                state.closed = true;
                drop(state);
                return self.tape.forget();
            }
        }
    }

    /// Returns when nobody reads: there are no readers, or what there is to read has waited too long for them.
    async fn unread(&self) {
        let stall = self.kept.limits.stall;
        let mut changed = self.tape.changed.subscribe();
        while self.tape.state.lock().is_read(stall) {
            tokio::select! {
                () = sleep(stall) => {}
                changed = changed.changed() => if changed.is_err() { return },
            }
        }
    }

    /// Takes the answer out of those that are found.
    fn leave(&self) {
        self.tape.close();
        let mut tapes = self.kept.tapes.lock();
        let is_ours = tapes
            .get(&self.key)
            .is_some_and(|tape| Arc::ptr_eq(tape, &self.tape));
        if is_ours {
            tapes.remove(&self.key);
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
        self.leave();
    }
}

/// Reads one answer from its beginning.
#[derive(Debug)]
pub(crate) struct Reader {
    tape: Arc<Tape>,
    number: u64,
    changed: watch::Receiver<()>,
}

impl Reader {
    fn new(tape: &Arc<Tape>) -> Self {
        let number = tape.state.lock().admit_reader();
        Self::admitted(tape, number)
    }

    fn admitted(tape: &Arc<Tape>, number: u64) -> Self {
        let reader = Self {
            tape: Arc::clone(tape),
            number,
            changed: tape.changed.subscribe(),
        };
        tape.changed.send_replace(());
        reader
    }

    /// The name of the answer.
    pub(crate) fn id(&self) -> AnswerId {
        self.tape.id
    }

    /// How many tokens each of `num_choices` answers has; `None` until all have ended.
    pub(crate) fn num_tokens(&self, num_choices: usize) -> Option<Vec<u32>> {
        self.tape.num_tokens(num_choices)
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
            match self.tape.read(self.number) {
                Some(told) => return told,
                None => self.changed.changed().await.ok()?,
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let mut state = self.tape.state.lock();
        state.readers.retain(|reader| reader.reader != self.number);
        drop(state);
        self.tape.changed.send_replace(());
    }
}

#[cfg(test)]
mod tests;
