//! The masks of constrained sequences, found while the model computes the next step: a few threads go on in a sequence's
//! grammar by the token that was sampled, and the engine waits for them only where it samples again.
//!
//! What they find depends on a sequence's tokens alone, so who finds it, and when, changes no token.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tramontane_grammar::{Canceller, MatchError, Matcher, Next};
use tramontane_types::TokenId;

use crate::sampler::SampleError;
use crate::{Error, FailureKind};

/// Threads that find masks, of each engine. Few: they take their time from those that compute.
pub const MASK_THREADS: usize = 2;
/// Masks that wait for a thread; the engine finds further ones itself.
pub const MASK_QUEUE_MAX: usize = 1024;
/// How long the engine waits for one. The fuel of a mask ends the work itself far earlier, so that it is this machine that
/// has stood still.
pub const MASK_WAIT_MAX: Duration = Duration::from_secs(5);
/// Bytes of all sequences' states in their grammars.
pub const MATCHERS_BYTES_MAX: usize = 1 << 30;
/// Stack of a thread: what expressions derive to calls itself.
const MASK_STACK_BYTES: usize = 16 << 20;

/// Why there is no mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MaskError {
    #[error(transparent)]
    Match(#[from] MatchError),
    #[error("the grammar's next tokens were not found within {} s", limit.as_secs())]
    Late { limit: Duration },
    #[error("the thread that looks for the grammar's next tokens has ended")]
    Lost,
    #[error("all grammars together have more than {limit} bytes")]
    Full { limit: usize },
}

impl MaskError {
    /// Another worker would find the same of the same tokens, and stand still for as long.
    const fn kind(&self) -> FailureKind {
        match self {
            Self::Match(_) | Self::Late { .. } => FailureKind::Constraint,
            Self::Full { .. } => FailureKind::Full,
            Self::Lost => FailureKind::Step,
        }
    }
}

/// Why a sequence has no next token.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoToken {
    #[error(transparent)]
    Sample(#[from] SampleError),
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// Beside the constraint there are `ignore_eos`, `min_tokens` and `bad_words`.
    #[error("no token is left that the grammar and the other parameters allow")]
    NothingLeft,
}

impl NoToken {
    /// Who may do something about it.
    pub(crate) const fn kind(&self) -> FailureKind {
        match self {
            Self::Sample(_) => FailureKind::Sequence,
            Self::Mask(error) => error.kind(),
            Self::NothingLeft => FailureKind::Constraint,
        }
    }
}

/// The threads of one engine.
#[derive(Debug)]
pub(crate) struct MaskThreads {
    jobs: Option<SyncSender<Job>>,
    threads: Vec<JoinHandle<()>>,
    counts: Arc<Counts>,
}

/// What the threads count.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Masks that were found or not.
    pub(crate) masks: AtomicU64,
    pub(crate) mask_us: AtomicU64,
    bytes: AtomicUsize,
}

/// The place of one sequence in its grammar: here, or with a thread.
#[derive(Debug)]
pub(crate) struct Matching {
    place: Place,
    canceller: Canceller,
}

#[derive(Debug)]
enum Place {
    Here(Held),
    Away(Receiver<Held>),
    Broken(MaskError),
}

/// A place, and what it takes of all that there may be.
#[derive(Debug)]
struct Held {
    matcher: Box<Matcher>,
    num_bytes: usize,
    counts: Arc<Counts>,
}

#[derive(Debug)]
struct Job {
    held: Held,
    tokens: Vec<TokenId>,
    done: SyncSender<Held>,
}

impl MaskThreads {
    /// Starts the threads.
    pub(crate) fn start() -> Result<Self, Error> {
        let (jobs, queue) = sync_channel::<Job>(MASK_QUEUE_MAX);
        let queue = Arc::new(Mutex::new(queue));
        let mut threads = Vec::with_capacity(MASK_THREADS);
        for _ in 0..MASK_THREADS {
            let queue = Arc::clone(&queue);
            let thread = thread::Builder::new()
                .name("masks".to_owned())
                .stack_size(MASK_STACK_BYTES)
                .spawn(move || {
                    loop {
                        // One waits inside of the lock, the other for the lock.
                        let job = queue.lock().recv();
                        let Ok(job) = job else { return };
                        job.run();
                    }
                });
            threads.push(thread.map_err(|source| Error::Thread { source })?);
        }
        Ok(Self {
            jobs: Some(jobs),
            threads,
            counts: Arc::default(),
        })
    }

    /// A sequence's place, as it was when its grammar was compiled.
    pub(crate) fn matching(&self, matcher: Matcher) -> Matching {
        Matching {
            canceller: matcher.canceller(),
            place: Place::Here(Held::new(Box::new(matcher), &self.counts)),
        }
    }

    /// Whether there is room for one more place of this size.
    pub(crate) fn has_room(&self, num_bytes: usize) -> bool {
        let held = self.counts.bytes.load(Ordering::Relaxed);
        held.saturating_add(num_bytes) <= MATCHERS_BYTES_MAX
    }

    pub(crate) fn counts(&self) -> &Counts {
        &self.counts
    }
}

impl Drop for MaskThreads {
    fn drop(&mut self) {
        self.jobs = None;
        // What they still have belongs to sequences that are gone, and so was given up.
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that finds masks had panicked");
            }
        }
    }
}

impl Matching {
    /// What may come next, and how long the engine stood still for it.
    pub(crate) fn allowed(&mut self) -> (Result<Next<'_>, MaskError>, Duration) {
        let began = Instant::now();
        if let Place::Away(done) = &self.place {
            self.place = match done.recv_timeout(MASK_WAIT_MAX) {
                Ok(held) => Place::Here(held),
                Err(error) => {
                    self.canceller.cancel();
                    let limit = MASK_WAIT_MAX;
                    Place::Broken(match error {
                        RecvTimeoutError::Timeout => MaskError::Late { limit },
                        RecvTimeoutError::Disconnected => MaskError::Lost,
                    })
                }
            };
        }
        let waited = began.elapsed();
        let next = match &mut self.place {
            Place::Here(held) => held.allowed(),
            Place::Broken(error) => Err(error.clone()),
            Place::Away(_) => Err(MaskError::Lost),
        };
        (next, waited)
    }

    /// Goes on by tokens that were sampled after [`allowed`](Self::allowed), and finds what comes then, while others compute.
    pub(crate) fn accept(&mut self, tokens: &[TokenId], threads: &MaskThreads) {
        let (done, back) = sync_channel(1);
        let place = std::mem::replace(&mut self.place, Place::Away(back));
        let held = match place {
            Place::Here(held) => held,
            broken => {
                self.place = broken;
                return;
            }
        };
        let job = Job {
            held,
            tokens: tokens.to_vec(),
            done,
        };
        let sent = match &threads.jobs {
            Some(jobs) => jobs.try_send(job),
            None => Err(TrySendError::Disconnected(job)),
        };
        if let Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) = sent {
            job.run();
        }
    }
}

impl Drop for Matching {
    fn drop(&mut self) {
        self.canceller.cancel();
    }
}

impl Job {
    fn run(self) {
        let Self {
            mut held,
            tokens,
            done,
        } = self;
        let began = Instant::now();
        held.go_on(&tokens);
        let took = began.elapsed().as_micros() as u64;
        held.counts.masks.fetch_add(1, Ordering::Relaxed);
        held.counts.mask_us.fetch_add(took, Ordering::Relaxed);
        // The sequence may have ended meanwhile.
        let _gone = done.try_send(held);
    }
}

impl Held {
    fn new(matcher: Box<Matcher>, counts: &Arc<Counts>) -> Self {
        let num_bytes = matcher.num_bytes();
        counts.bytes.fetch_add(num_bytes, Ordering::Relaxed);
        Self {
            matcher,
            num_bytes,
            counts: Arc::clone(counts),
        }
    }

    /// An error is kept by the matcher, and found by whoever asks for the next token.
    fn go_on(&mut self, tokens: &[TokenId]) {
        for &id in tokens {
            if self.matcher.accept(id).is_err() {
                return;
            }
        }
        let _kept = self.matcher.allowed().map(|_| ());
        let now = self.matcher.num_bytes();
        let bytes = &self.counts.bytes;
        bytes.fetch_add(now, Ordering::Relaxed);
        bytes.fetch_sub(self.num_bytes, Ordering::Relaxed);
        self.num_bytes = now;
    }

    fn allowed(&mut self) -> Result<Next<'_>, MaskError> {
        let limit = MATCHERS_BYTES_MAX;
        if self.counts.bytes.load(Ordering::Relaxed) > limit {
            return Err(MaskError::Full { limit });
        }
        Ok(self.matcher.allowed()?)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.counts
            .bytes
            .fetch_sub(self.num_bytes, Ordering::Relaxed);
    }
}
